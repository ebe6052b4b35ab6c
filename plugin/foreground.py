"""`zcache attach --foreground`: stay until told to end, or until the device is gone.

    attached ──► READY=1 ──► look every LOOK_S ──► device gone: 0
                              │        └ helper and spare both killed: a new helper
                              └ SIGTERM, SIGINT: detach; in use: it stays attached, and we end: 5

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


def stay(instance: Instance, wish: Wish, say: Callable[[str], None]) -> int:
    """The exit code.  Raises ZcacheError."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the helper is our child: let its end be seen
    try:
        with as_ctrl_c(signal.SIGTERM):
            notify("READY=1")
            alone = False
            while (found := attach.look(instance)) is not None:
                if alone and not found.mender_pid:
                    _helper_again(instance, wish, say)
                alone = not found.mender_pid  # once only: somebody detaches it just now
                time.sleep(LOOK_S)
    except KeyboardInterrupt:
        notify("STOPPING=1")
        try:
            attach.detach(instance, say)
        except InUseError as error:
            raise InUseError(f"{error}.  It stays attached, and its helper goes on") from None
        return 0
    say("the device was detached")
    return 0


def _helper_again(instance: Instance, wish: Wish, say: Callable[[str], None]) -> None:
    """Unless somebody else is about it."""
    try:
        attach.attach(instance, wish, say)
    except InUseError as error:
        say(str(error))
