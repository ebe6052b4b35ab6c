"""`zcache up` and `zcache down`: swap onto a server of this machine, and all of it back.

    up     server -> attach -> mkswap -> swapon       each step only if it is not done yet
    down   swapoff -> detach -> stop                   each step only if there is something to undo

The order is the safety: nobody swaps onto a device before somebody mends it, and no server stops
before its pages are back.  What is done is asked of the kernel and of the server each time, so
either command may be cut off anywhere and run again, and run twice.

Before `down` begins it makes sure that it can end: that the pages fit into memory and other swap,
that the server answers, and that somebody mends the connection.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO
from urllib.parse import quote

from cluster import unixsock
from plugin import attach, serve, servestate, show, statepage, swaparea
from plugin.attach import Attached, Wish
from plugin.config import AHEAD, parse
from plugin.instance import Instance
from plugin.interrupts import as_ctrl_c
from plugin.nbdnetlink import Timeouts, load_module
from plugin.swaparea import Area
from zcache_core.errors import AttachError, ConfigError, InUseError

Say = Callable[[str], None]
CONNECTED_S = 20.0
# The server answers how they turned out, and no password.
NOT_COMPARED = ("realtime", "disk_size", "disk_force", "metrics", "listen", "etcd")
SAY_S = 2.0
FAULT = "ZCACHE_FAULT_AFTER"  # tests: die at this step, like "up:attach"


@dataclass(frozen=True)
class Plan:
    """What `up` is asked for.  words: key=value of the server; none: as it was, or defaults."""

    instance: Instance
    words: tuple[str, ...]
    priority: int
    index: int | None
    timeouts: Timeouts


def up(plan: Plan, say: Say) -> Attached:
    """Everything up; what is attached.  Raises ZcacheError."""
    if "nbd" in dict(map(serve.split, plan.words)):
        raise ConfigError(
            "nbd= is for other machines, and 'zcache up' swaps onto this one; leave it out, or use "
            "'zcache serve' here and 'zcache attach' there"
        )
    load_module()  # before a server takes a pool's memory in vain
    _serve(plan, say)
    _reached("up:serve")
    wish = Wish(uri_of(plan.instance), plan.index, plan.timeouts)
    found = attach.attach(plan.instance, wish, say)
    _reached("up:attach")
    if (area := swaparea.find(found.device)) is not None:
        say(f"{found.device} is swap already, priority {area.priority}")
        return found
    swaparea.make(found.device)
    say(f"{found.device} is made a swap area")
    _reached("up:mkswap")
    swaparea.enable(found.device, plan.priority)
    say(f"{found.device} is swap, priority {plan.priority}, and says what it frees (discard)")
    _reached("up:swapon")
    return found


def uri_of(instance: Instance) -> str:
    """Its server, for `attach`."""
    return f"nbd+unix:///?socket={quote(str(instance.socket))}"


def down(instance: Instance, force: bool, say: Say, out: TextIO | None = None) -> None:
    """Everything back.  Raises ZcacheError, with swap still on; KeyboardInterrupt likewise."""
    found = attach.look(instance)
    area = swaparea.find(found.device) if found is not None else None
    if found is not None and area is not None:
        _take_back(instance, found, area, force, say, out or sys.stdout)
    _reached("down:swapoff")
    attach.detach(instance, say)
    _reached("down:detach")
    for device, name in servestate.attached(instance):
        raise InUseError(
            f"the server {instance.name} goes on: {device} is attached to it too; run 'zcache down "
            f"--name {name}', then this again"
        )
    if serve.stop(instance):
        say(f"the server {instance.name} has ended")
    else:
        say(f"no server {instance.name} is running")
    _reached("down:stop")


# ---- up -------------------------------------------------------------------------


def _serve(plan: Plan, say: Say) -> None:
    from cluster.etcdurl import without_password

    instance = plan.instance
    state = servestate.read(instance)
    if state is None or not state.is_supervised:
        words = plan.words or default_words(state.words if state else ())
        serve.start(instance, serve.own_machine_words(words))
        now = servestate.read(instance)
        shown = map(without_password, now.words if now else ())
        say(f"the server {instance.name} is running: {' '.join(shown)}")
        return
    deadline = time.monotonic() + CONNECTED_S
    while not unixsock.is_alive(instance.control):
        if time.monotonic() > deadline:
            raise AttachError(
                f"the server {instance.name} does not come up ({state.error or 'no reason'}); see "
                f"{serve.log_path(instance)}"
            )
        time.sleep(0.1)
    running = refuse_other_settings(plan)
    say(f"the server {instance.name} is running already")
    if running.get("commit") == "ahead":
        say(f"warning: {AHEAD}")


def refuse_other_settings(plan: Plan) -> dict[str, Any]:
    """What the server runs with; InUseError when those are other values than were asked for."""
    from cluster.link import BlockingClient  # asyncio: 10 MB, which `down` has to do without

    given = dict(map(serve.split, plan.words))
    wanted = parse(_with_size(given).items()).as_dict()
    with BlockingClient(plan.instance.control) as client:
        running: dict[str, Any] = client.call("config")
    for key, text in given.items():
        if key not in running or key in NOT_COMPARED:
            continue
        if _plain(running[key]) != _plain(wanted[key]):  # RPC has no tuples
            raise InUseError(
                f"the server {plan.instance.name} runs with {key}={running[key]}, not {text}; "
                f"leave {key} out, or run 'zcache down' first"
            )
    return running


def _with_size(given: dict[str, str]) -> dict[str, str]:
    """Words that `parse` takes: a size, if nothing says how large."""
    return given if "devices" in given else {"size": "1G", **given}


def _plain(value: Any) -> Any:
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def default_words(words: Sequence[str]) -> list[str]:
    """A pool of a quarter of RAM, and the size that such a pool can always hold: twice that.

    (zbud keeps two pages in a frame, so pages that compress to a half fill the device first.)
    """
    given = dict(map(serve.split, words))
    if "pool" not in given:
        given["pool"] = "25%"
    if not {"size", "devices"} & given.keys():
        config = parse({"size": "1G", **given}.items())
        given["size"] = f"{max(1, 2 * config.pool_bytes >> 20)}M"
    return [f"{key}={value}" for key, value in given.items()]


# ---- down -----------------------------------------------------------------------


def _take_back(
    instance: Instance, found: Attached, area: Area, force: bool, say: Say, out: TextIO
) -> None:
    if not force:
        refuse_without_room(area)
    if not found.mender_pid:
        state = statepage.read(instance.attach)
        say(f"{found.device} has nobody who mends its connection")
        limits = Timeouts(int(state.get("timeout_s", 3)), int(state.get("dead_timeout_s", 60)))
        uri = str(state.get("uri") or uri_of(instance))
        own = state.get("tls"), state.get("tls_name")
        attach.attach(instance, Wish(uri, None, limits, bool(state.get("plain")), *own), say)
    _wait_for_server(instance, found)
    with as_ctrl_c(signal.SIGTERM), Progress(area.used_bytes, out) as progress:
        try:
            swaparea.disable(found.device, progress.look)
        except KeyboardInterrupt:
            say(f"interrupted; {found.device} is still swap, run 'zcache down' again")
            raise
    say(f"{found.device} is no swap any more")


def refuse_without_room(area: Area) -> None:
    """AttachError when what is out would not fit."""
    room = swaparea.room_to_return(area, swaparea.areas())
    if room.missing_bytes:
        raise AttachError(
            f"{show.size(room.needed_bytes)} would have to come back from {area.path}, and there "
            f"are only {show.size(room.memory_bytes)} of memory and "
            f"{show.size(room.other_swap_bytes)} of other swap for it; end programs or add swap "
            f"for {show.size(room.missing_bytes)} more, or try it with --force.  Swap is still on"
        )


def _wait_for_server(instance: Instance, found: Attached) -> None:
    """Without a server nothing comes back: swapoff would hang, then lose pages."""
    deadline = time.monotonic() + CONNECTED_S
    while (state := statepage.read(instance.attach)).get("state") != "connected":
        if time.monotonic() > deadline:
            raise AttachError(
                f"the server of {found.device} does not answer ({state.get('error', 'no reason')});"
                f" start it again ('zcache up'), so that its pages can come back.  Swap is still on"
            )
        time.sleep(0.1)


class Progress:
    """How far swapoff is: a bar on a terminal, a line every other second elsewhere."""

    def __init__(self, total_bytes: int, out: TextIO) -> None:
        self._total_bytes, self._out = max(1, total_bytes), out
        self._said_s = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Progress:
        if self._out.isatty():
            from rich import progress
            from rich.console import Console

            self._bar = progress.Progress(
                progress.TextColumn("taking pages back"),
                progress.BarColumn(),
                progress.TaskProgressColumn(),
                progress.DownloadColumn(binary_units=True),
                progress.TimeRemainingColumn(),
                console=Console(file=self._out),
                transient=True,
            )
            self._task = self._bar.add_task("", total=self._total_bytes)
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def look(self, left_bytes: int) -> None:
        """So much is still out."""
        back = max(0, self._total_bytes - left_bytes)
        if self._bar is not None:
            self._bar.update(self._task, completed=back)
        elif time.monotonic() - self._said_s >= SAY_S:
            self._said_s = time.monotonic()
            share = show.percent(back, self._total_bytes)
            print(f"{share} back, {show.size(left_bytes)} still out", file=self._out, flush=True)


def _reached(step: str) -> None:
    if os.environ.get(FAULT) == step:
        os.kill(os.getpid(), signal.SIGKILL)
