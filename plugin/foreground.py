"""`zcache attach --foreground`: attach, and stay until told to end, or until the device is gone.

    attach ──► READY=1 ──► look every LOOK_S ──► device gone: 0
       │                     │        └ helper and spare both killed: a new helper
       └─────────────────────┴ SIGTERM, SIGINT: detach, 0; in use: it stays attached, and we end, 5

What it is not: needed.  The helper mends the connection whether this lives or not; killed, it
leaves the device as it is, and `zcache detach` takes it away.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable

from plugin import attach
from plugin.attach import Wish
from plugin.instance import Instance
from plugin.interrupts import as_ctrl_c
from plugin.teller import notify
from zcache_core.errors import InUseError

LOOK_S = 1.0
Say = Callable[[str], None]


def attach_and_stay(instance: Instance, wish: Wish, say: Say) -> None:
    """Returns when the device is gone.  Raises ZcacheError."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the helper is our child: let its end be seen
    try:
        with as_ctrl_c(signal.SIGTERM):
            attach.attach(instance, wish, say)
            notify("READY=1")
            _stay(instance, wish, say)
    except KeyboardInterrupt:
        notify("STOPPING=1")
        _leave(instance, say)


def _stay(instance: Instance, wish: Wish, say: Say) -> None:
    alone = False
    while (found := attach.look(instance)) is not None:
        if alone and not found.mender_pid:
            _helper_again(instance, wish, say)
        alone = not found.mender_pid  # once only: somebody detaches it just now
        time.sleep(LOOK_S)
    say("the device was detached")


def _helper_again(instance: Instance, wish: Wish, say: Say) -> None:
    """Unless somebody else is about it."""
    try:
        attach.attach(instance, wish, say)
    except InUseError as error:
        say(str(error))


def _leave(instance: Instance, say: Say) -> None:
    try:
        attach.detach(instance, say)
    except InUseError as error:
        raise InUseError(f"{error}.  It stays attached, and its helper goes on") from None
