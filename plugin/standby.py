"""The second server of a supervisor: loaded and locked beforehand, it waits for its turn.

    origin   nbdkit, the plugin, every library: loaded, locked, rehearsed once; it serves nobody
       │ fork, on demand
       ▼
    standby  "waiting" ── take(): "g" ──► the server.  A next one is forked when that serves

On a machine that swaps onto its own server there may be no memory to start another one when
that server is killed: it could be had only by swapping, onto the device that waits for it.
(Measured in the lab: nbdkit and its Python did not come up, and the machine hung.)  So the next
one is there already, and its turn costs neither exec nor a library's page; and the one after
that is a fork, which takes milliseconds where loading would take seconds, in which the server
may be killed again.  What a fork changes of the memory it shares, it copies then: about as much as
the killed server has just given back.

It does not have the memory file until its turn.  When the supervisor dies the origin ends, and the
standby goes on alone (lone.py); the next supervisor adopts it, and has an origin of its own loaded
behind.  For an upgrade origin and standby are the new version's, started while the old one serves.

Bound: two processes.  What it is not: a decision when it is needed; that is `supervisor`.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from plugin import lone
from plugin.instance import Instance
from plugin.liaison import FORK, GO
from plugin.servestate import State
from plugin.supervised import Server, living_owner, spawn
from zcache_core.owner import start_ticks

SOON_S = 0.1  # after a server's first answer: those that waited for it come first
LATER_FIRST_S, LATER_MAX_S = 1.0, 60.0  # when it dies, or cannot be started
LOAD_S = 60.0  # it loads in half a second; where memory is short it may take many
END_S = 2.0
# For a lone standby to answer: it may still be copying its memory, or have been told to go on.
ANSWER_S, LOOK_S = 5.0, 0.02


class Standby:
    """`ready`: `server` has said so.  `on_ready` is called then, `on_end` with a sentence when
    there is none any more and there will be none for a while, `on_change` when it is another one.
    """

    def __init__(
        self,
        on_ready: Callable[[], None],
        on_end: Callable[[str], None],
        on_change: Callable[[], None],
    ) -> None:
        self._on_ready, self._on_end, self._on_change = on_ready, on_end, on_change
        self._origin: Server | None = None
        self._loaded = False  # the origin has said so
        self._forking = False  # it was asked to, and has not answered
        self._outdated = False  # `server` is not what we would start
        self.server: Server | None = None
        self.ready = False
        self.due_s: float | None = None  # when to start it; None: not wanted
        self.late_s: float | None = None  # when to give it up
        self._back_off_s = LATER_FIRST_S

    @property
    def exists(self) -> bool:
        """Whether any process of it lives."""
        return self._origin is not None or self.server is not None

    def want(self) -> None:
        """One is to be there soon, unless there is."""
        if self.server is None and not self._forking and self.due_s is None:
            self.due_s = time.monotonic() + SOON_S

    def is_due(self) -> bool:
        return self.due_s is not None and time.monotonic() >= self.due_s

    def start(self, words: Sequence[str], load_s: float = LOAD_S) -> None:
        """Start it: by a fork, or what it will be forked from.  Raises OSError."""
        self.due_s = None
        if self._forking or (self.server is not None and self._origin is not None):
            return
        self.late_s = time.monotonic() + load_s
        if self._origin is None:
            try:
                # An ordinary process until it is loaded: who serves meanwhile comes first.
                self._origin, self._loaded = spawn(words, standby=True), False
            except OSError:
                self.retry()
                raise
        elif self._loaded:
            self._fork()

    def adopt(self, instance: Instance, before: State | None, now: State) -> None:
        """The lone one that a dead supervisor has left; one that does not answer is ended.

        It waits as well as a fork of our own; if it is of another version or has other words, it
        goes when there is one.
        """
        until_s = time.monotonic() + ANSWER_S
        while not self._call(instance.lone):
            left = before is not None and before.has_standby
            if not left or time.monotonic() > until_s or owns(instance, before):
                end_lone(instance, before)
                return
            time.sleep(LOOK_S)
        same = before is not None and (before.root, before.version) == (now.root, now.version)
        self._outdated = not (same and before is not None and before.words == now.words)
        self.due_s = time.monotonic() + SOON_S  # the origin; not before a server answers

    def _call(self, path: Path) -> bool:
        found = lone.call(path)
        if found is None:
            return False
        pid, line = found
        try:
            one = Server(pid, line)
        except ProcessLookupError:
            line.close()
            return False
        if select.select([line], [], [], ANSWER_S)[0] and "waiting" in one.heard():
            self.server, self.ready = one, True
            return True
        one.reap(wait=False)
        return False

    def hurry(self) -> None:
        """The server has died: now, not soon.

        Also one that had not served yet, after which none is due.
        """
        if self._loaded and self.server is None and not self._forking:
            self.due_s = None
            self._fork()

    def _fork(self) -> None:
        assert self._origin is not None
        if self._origin.line is not None:
            self._forking = True
            with contextlib.suppress(OSError):
                self._origin.line.sendall(FORK)

    def retry(self) -> None:
        """Try it again later, each time later."""
        self.late_s = None
        self.due_s = time.monotonic() + self._back_off_s
        self._back_off_s = min(2 * self._back_off_s, LATER_MAX_S)

    def take(self) -> Server:
        """Its predecessor is gone: it goes on, as the server."""
        assert self.server is not None
        assert self.ready
        server, self.server, self.ready, self.due_s = self.server, None, False, None
        server.began_s = time.monotonic()
        if server.line is not None:
            with contextlib.suppress(OSError):
                server.line.sendall(GO)
        return server

    def give_up(self) -> None:
        """It takes too long."""
        self.late_s = None
        late = self._origin if self.server is None or self.ready else self.server
        if late is not None:
            late.signal(signal.SIGKILL)

    def dismiss(self) -> None:
        """It is not needed any more; returns when it is gone."""
        self.due_s = self.late_s = None
        if self._origin is not None:
            _end(self._origin)
        self._origin, self._loaded, self._forking = None, False, False
        self._drop()

    def _drop(self) -> None:
        if self.server is not None:
            _end(self.server)
        self.server, self.ready, self._outdated = None, False, False

    # ---- what is heard -----------------------------------------------------------------

    def calls(self) -> dict[int, Callable[[], None]]:
        """Descriptors to watch, and what to call when one is readable."""
        found: dict[int, Callable[[], None]] = {}
        for one, on_line, on_end in (
            (self._origin, self._on_origin_line, self._on_origin_end),
            (self.server, self._on_line, self._on_server_end),
        ):
            if one is not None:
                found[one.pidfd] = on_end
                if one.line is not None:
                    found[one.line.fileno()] = on_line
        return found

    def _on_origin_line(self) -> None:
        """ "waiting", or "forked PID" and the line to it."""
        if self._origin is None or self._origin.line is None:
            return
        fds: list[int] = []
        for word in self._origin.heard(fds):
            if word == "waiting":
                self._loaded = True
                if self._outdated:
                    self._drop()
                if self.server is None:
                    self._fork()
                else:
                    self.late_s = None
            elif word.startswith("forked ") and fds:
                self._forking = False
                line = socket.socket(fileno=fds.pop(0))
                with contextlib.suppress(ProcessLookupError):
                    self.server, self.ready = Server(int(word.split()[1]), line), False
            self._on_change()
        for fd in fds:
            os.close(fd)

    def _on_line(self) -> None:
        if self.server is None or self.server.line is None:
            return
        if "waiting" in self.server.heard():
            self.ready, self.late_s, self._back_off_s = True, None, LATER_FIRST_S
            self._on_ready()

    def _on_origin_end(self) -> None:
        assert self._origin is not None
        origin, self._origin, self._loaded, self._forking = self._origin, None, False, False
        self._ended(origin)
        if self.server is not None and self.due_s is None:
            self.retry()  # behind one that waits already

    def _on_server_end(self) -> None:
        assert self.server is not None
        server, self.server, self.ready = self.server, None, False
        self._ended(server)

    def _ended(self, one: Server) -> None:
        if one.line is not None:
            one.heard()
        how = one.reap()
        if self.server is None:
            self.retry()
            self._on_end(one.refused[1] if one.refused else f"the new server ended ({how})")


def _end(one: Server) -> None:
    one.signal(signal.SIGKILL)
    # One that waits for memory inside the kernel ends when it has got it.
    ended = select.select([one.pidfd], [], [], END_S)[0]
    one.reap(wait=bool(ended))


def owns(instance: Instance, state: State | None) -> bool:
    """Whether the standby of that state has become the server."""
    return state is not None and living_owner(instance.name) == state.standby_pid


def end_lone(instance: Instance, state: State | None) -> None:
    """End the standby that nobody supervises, unless it is the server; returns when it is gone."""
    left = []
    if (found := lone.call(instance.lone)) is not None:
        found[1].close()
        left.append((found[0], start_ticks(found[0])))
    if state is not None and state.has_standby:
        left.append((state.standby_pid, state.standby_ticks))
    for pid, ticks in left:
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(pid)
            try:
                if start_ticks(pid) == ticks and living_owner(instance.name) != pid:
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    select.select([pidfd], [], [], END_S)
            finally:
                os.close(pidfd)
    instance.lone.unlink(missing_ok=True)
