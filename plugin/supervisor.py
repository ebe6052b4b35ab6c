"""The supervisor: one server of one name, kept running, replaced, and ended in good order.

    start ---> STARTING --serving--> SERVING --ends--> a standby is ready: it goes on
    adopt ---------------------------^  |              else WAITING (back-off) --> STARTING ...
                              SIGHUP    v
                      UPGRADING: a standby of the new version loads, says "waiting";
                      the old one finishes its requests and ends; the standby serves
    SIGTERM, SIGINT           STOPPING: the server finishes and ends, then we do
    SIGUSR2                   look whether this machine has it attached (standby=auto)

One owner at a time: the memory file's lock and its owner's pidfd see to that; here
they decide only who is started.  Before each start we look whether the memory file has
a living owner and adopt that one: so a supervisor that dies costs nothing, and neither
does one that dies between starting a server and knowing it.

The first restart is at once, then after 0.1 s, doubling up to BACKOFF_MAX_S; a server
that lived CALM_S was well.  A server that refuses its configuration at our first start
ends us too, with its own sentence.

It must never need a page that is swapped out to the device whose server it restarts:
locked in memory, no I/O for its own memory, nothing read from /run (servestate.py), no
/proc of others but `stat`, and a log line never waits.

Bound: one server, one standby, one node each; it sleeps in poll otherwise.
What it is not: on the data path.  Pages pass it by.
"""

from __future__ import annotations

from plugin.napping import RESUME  # first: it makes the imports below take naps

# isort: split
import argparse
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable

import zcache_core
from plugin import servestate
from plugin.instance import Instance
from plugin.leave import LEAVE
from plugin.servestate import LOOK, Kept, ServeLock, State
from plugin.standby import LOAD_S, Standby
from plugin.supervised import ROOT, Server, answers, command, living_owner, spawn
from plugin.teller import Teller, flush, say, start_log
from zcache_core import process
from zcache_core.errors import ZcacheError
from zcache_core.owner import start_ticks

BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 2.0  # all that swap wait with us, and the kernel gives up after a minute
CALM_S = 5.0  # a server that loops in its death does it within a second
ADOPTED_S = 5.0  # for an adopted server to answer on its socket; else it is replaced
# For a server to end its node (whose pages may have to come back first, from that server), to
# finish its requests, and to end; then SIGKILL.
END_S = 10.0
UPGRADE_S = 30.0  # for the new version to load
# For a standby that is on its way when its server dies; then another is started, which takes longer
# than a fork anywhere.
LOADING_S = 10.0
# For the node of a dead server to end by itself, and to pass on what its server said last.  It may
# be swapped out, or still be loading: with memory exhausted, twenty kills left nineteen of them,
# their pages filled the swap, and the OOM killer came.
NODE_S = 2.0
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, LOOK)


class Supervisor:
    """`tell` hears once: (0, "") when pages are answered, or (exit code, why not).

    `before` is what a predecessor wrote down.
    """

    def __init__(
        self,
        instance: Instance,
        lock: ServeLock,
        state: State,
        tell: Callable[[int, str], None],
        before: State | None,
        realtime: bool = False,
    ) -> None:
        self._realtime = realtime
        self._instance, self._lock, self._state, self._tell = instance, lock, state, tell
        self._before = before
        self._left_behind = before.server_pid if before is not None and before.has_server else None
        self._server: Server | None = None
        self._standby = Standby(self._on_standby_ready, self._on_standby_end, self._write)
        self._upgrading = False  # it is to replace a living server
        self._served = False  # some server did, since we are there
        self._stopping = False
        self._due_s = 0.0  # when to start the next server
        self._kill_s: float | None = None  # when to end by force who is asked to end
        self._backoff_s = 0.0
        self._check_s: float | None = None  # when to see whether an adopted server answers
        self._kept: list[Kept] = []
        self._wake, wake_w = os.pipe()
        os.set_blocking(wake_w, False)
        signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
        for number in SIGNALS:
            signal.signal(number, lambda *_: None)
        self._exit_code = 0
        self._wanted = False  # a standby beside the server
        self._ended: list[tuple[float, Server]] = []  # when its children are ended by force

    # ---- the loop -------------------------------------------------------------------

    def run(self, upgrade: bool = False) -> int:
        """Until told to stop, or the first start is refused; the exit code."""
        if not upgrade:
            self._standby.adopt(self._instance, self._before, self._state)
        self._write()
        self._adopt()
        if upgrade:
            self._upgrade()
        elif self._server is None and self._standby.ready:
            self._hand_over()
        while True:
            self._start_if_due()
            if self._stopping and self._server is None and not self._standby.exists:
                break
            self._wait()
            if self._kill_s is not None and time.monotonic() >= self._kill_s:
                self._force()
            if self._standby.late_s is not None and time.monotonic() >= self._standby.late_s:
                self._standby.give_up()
            if self._check_s is not None and time.monotonic() >= self._check_s:
                self._check_adopted()
            if self._ended and time.monotonic() >= self._ended[0][0]:
                self._ended.pop(0)[1].end_children()
        self._keep_in_memory(False)
        self._phase(servestate.STOPPED)
        return self._exit_code

    def _wait(self) -> None:
        poll, calls = select.poll(), {self._wake: self._on_signal}
        if self._server is not None:
            calls[self._server.pidfd] = self._on_end
            if self._server.line is not None:
                calls[self._server.line.fileno()] = self._on_line
        calls |= self._standby.calls()
        for fd in calls:
            poll.register(fd, select.POLLIN)
        ready = [fd for fd, _ in poll.poll(self._patience_ms())]
        # One at a time: what is done for one may have ended another, whose number may be somebody
        # else's by now.  What a server said comes before its end.
        for fd in sorted(ready, key=lambda fd: calls[fd] == self._on_end)[:1]:
            calls[fd]()

    def _patience_ms(self) -> float | None:
        # A standby is started only beside a server.
        due_s = self._standby.due_s if self._server is not None else None
        times = self._kill_s, self._check_s, due_s, self._standby.late_s
        until = [time_s for time_s in times if time_s is not None]
        until += [time_s for time_s, _ in self._ended[:1]]
        if self._server is None and not self._stopping:
            until.append(self._due_s)
        return max(0.0, (min(until) - time.monotonic()) * 1000 + 1) if until else None

    def _on_signal(self) -> None:
        numbers = set(os.read(self._wake, 512))
        if numbers & {signal.SIGTERM, signal.SIGINT}:
            self._stop()
        elif signal.SIGHUP in numbers:
            self._state.upgrades_asked += 1
            self._state.upgrade_error = ""
            self._exec_anew()
        elif LOOK in numbers and self._server is not None:
            self._look()
            self._want_standby()

    # ---- starting -------------------------------------------------------------------

    def _start_if_due(self) -> None:
        if self._stopping:
            return
        if self._standby.is_due() and self._server is not None:
            self._start_standby()
        if self._server is not None or time.monotonic() < self._due_s:
            return
        self._standby.dismiss()  # it is loading since LOADING_S, or would be a second one
        if self._upgrading:
            self._upgrade_failed("the new version took too long to load")
        if not self._adopt():
            self._server = self._spawned()
            self._phase(servestate.STARTING if self._server is not None else servestate.WAITING)

    def _adopt(self) -> bool:
        """Take over the watch of a living owner of the memory file, if there is one.

        Or of the server that our predecessor wrote down: the file may have a format that we
        cannot read, after an upgrade that cannot be done.
        """
        pid, self._left_behind = living_owner(self._instance.name) or self._left_behind, None
        if pid is None:
            return False
        try:
            self._server = Server(pid, None)
        except ProcessLookupError:
            return False
        self._check_s = time.monotonic() + ADOPTED_S
        self._on_serving("adopted")
        return True

    def _check_adopted(self) -> None:
        """Of two servers that were started at once, the one with the memory lost its socket."""
        self._check_s = None
        if self._server is not None and not answers(self._instance, self._state.words):
            self._say(f"the server (process {self._server.pid}) does not answer; replacing it")
            self._server.signal(LEAVE)
            self._kill_s = time.monotonic() + END_S

    def _spawned(self) -> Server | None:
        try:
            return spawn(command(self._instance, self._state.words), standby=False)
        except (OSError, ZcacheError) as error:
            self._state.error = f"no server can be started ({_why(error)})"
            if not self._served:
                self._give_up(ZcacheError.exit_code, self._state.error)
                return None
            self._due_s = time.monotonic() + max(self._backoff_s, BACKOFF_FIRST_S)
            self._back_off()
            self._say(self._state.error)
            return None

    def _start_standby(self, load_s: float = LOAD_S) -> bool:
        try:
            self._standby.start(command(self._instance, self._state.words), load_s)
        except (OSError, ZcacheError) as error:
            self._say(f"no standby can be started ({_why(error)})")
        self._write()
        return self._standby.exists

    def _look(self) -> None:
        """Whether a standby is wanted.  It reads in /run: never while no server answers."""
        wish = dict(word.partition("=")[::2] for word in self._state.words).get("standby", "auto")
        if wish == "auto":
            self._wanted = servestate.attached_device(self._instance) is not None
        else:
            self._wanted = wish == "yes"

    def _want_standby(self) -> None:
        """One beside the server, or none."""
        if self._wanted:
            self._standby.want()
        elif not self._upgrading:
            self._standby.dismiss()
            self._write()

    def _on_line(self) -> None:
        assert self._server is not None
        if "serving" in self._server.heard():
            self._on_serving("started")

    def _on_serving(self, how: str) -> None:
        assert self._server is not None
        self._server.hang_up()
        self._state.starts += 1
        self._state.error = ""
        self._phase(servestate.SERVING)
        self._keep_in_memory(True)
        if not self._served:
            self._served = True
            self._tell(0, "")
            self._look()
        else:
            self._say(f"the server (process {self._server.pid}) is {how}")
        self._want_standby()

    # ---- ending ---------------------------------------------------------------------

    def _on_end(self) -> None:
        assert self._server is not None
        server, self._server = self._server, None
        if server.line is not None:
            server.heard()
        how = server.reap()
        now_s = time.monotonic()
        self._ended.append((now_s + NODE_S, server))
        self._kill_s = self._check_s = None
        if self._stopping:
            return
        if self._standby.ready:
            self._state.error = f"the server ended ({how})"
            self._hand_over()
            return
        self._state.error = server.refused[1] if server.refused else f"the server ended ({how})"
        # (A standby that we found, and that failed, was not started with our words.)
        is_first = not self._served and not self._state.takeovers
        if is_first and living_owner(self._instance.name) is None:
            code, sentence = server.refused or (ZcacheError.exit_code, "")
            self._give_up(code, sentence or f"{self._state.error}; its log says why")
            return
        if now_s - server.began_s > CALM_S:
            self._backoff_s = 0.0
        self._due_s = now_s + self._backoff_s
        if self._standby.exists:
            self._standby.hurry()
            self._due_s = now_s + LOADING_S
        self._phase(servestate.WAITING)
        self._say(f"{self._state.error}; starting it again in {self._backoff_s:.1f} s")
        self._back_off()

    def _back_off(self) -> None:
        """The next wait is twice as long."""
        self._backoff_s = min(max(2 * self._backoff_s, BACKOFF_FIRST_S), BACKOFF_MAX_S)

    def _give_up(self, code: int, sentence: str) -> None:
        """Our first server did not come up: this is our answer."""
        self._tell(code, sentence)
        self._exit_code, self._stopping = code, True

    def _stop(self) -> None:
        self._stopping = True
        self._phase(servestate.STOPPING)
        self._kill_s = time.monotonic() + END_S
        if self._server is not None:
            self._server.signal(LEAVE)
        self._standby.dismiss()

    def _force(self) -> None:
        """Who was asked to end has not."""
        self._kill_s = None
        if self._server is not None:
            self._server.signal(signal.SIGKILL)

    # ---- upgrading ------------------------------------------------------------------

    def _exec_anew(self) -> None:
        """Become the supervisor that lies on the disk now; the server goes on, still our child."""
        # Before the first answer somebody still waits on the pipe that exec would lose.
        if self._stopping or self._upgrading or self._server is None or not self._served:
            self._upgrade_failed("the server is starting or ending just now; try again")
            return
        self._standby.dismiss()  # it is of the old version
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        os.set_inheritable(self._lock.fd, True)
        self._phase(servestate.UPGRADING)
        resume = {
            "fd": self._lock.fd, "asked": self._state.upgrades_asked,
            "done": self._state.upgrades, "starts": self._state.starts,
            "takeovers": self._state.takeovers,
        }  # fmt: skip
        try:
            words = [sys.executable, *sys.orig_argv[1:]]
            flush()
            # Its start takes half a second of a slow CPU, which belongs to others, too: `napping`.
            # (As an ordinary process, where memory is short, it took more than a minute.)
            process.in_turns()
            os.execve(words[0], words, os.environ | {RESUME: json.dumps(resume)})
        except OSError as error:
            os.set_inheritable(self._lock.fd, False)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            if self._realtime:
                process.real_time()
            self._upgrade_failed(f"{sys.executable} cannot be run ({error.strerror})")

    def _upgrade(self) -> None:
        """Start the standby; when it is ready the server is told to leave."""
        if self._server is None:
            self._upgrade_failed("the server ended meanwhile; a new one is started")
            return
        self._standby.dismiss()
        if not self._start_standby(UPGRADE_S):
            self._upgrade_failed("the new version cannot be started; its log says why")
            return
        self._upgrading = True
        self._phase(servestate.UPGRADING)

    def _on_standby_ready(self) -> None:
        if self._server is None:
            self._hand_over()
        elif self._upgrading:
            self._kill_s = time.monotonic() + END_S
            self._server.signal(LEAVE)
        self._write()

    def _hand_over(self) -> None:
        """The old server is gone: the standby goes on, as the server."""
        self._server = self._standby.take()
        if self._upgrading:
            self._state.upgrades += 1
            self._state.upgrade_error = ""
        else:
            self._state.takeovers += 1
        self._upgrading = False
        self._phase(servestate.STARTING)

    def _on_standby_end(self, sentence: str) -> None:
        """It refused or died before its turn; the old server goes on, if it lives."""
        self._due_s = min(self._due_s, time.monotonic())
        if self._upgrading:
            self._upgrade_failed(sentence)
        elif not self._stopping:
            self._say(f"the standby ended: {sentence}")
        self._write()

    def _upgrade_failed(self, sentence: str) -> None:
        self._upgrading = False
        self._state.upgrade_error = sentence
        self._say(f"not upgraded: {sentence}")
        self._phase(servestate.SERVING if self._server is not None else servestate.WAITING)
        if self._server is not None:
            self._want_standby()

    # ---- telling --------------------------------------------------------------------

    def _phase(self, phase: str) -> None:
        self._state.phase = phase
        self._write()

    def _write(self) -> None:
        state, server = self._state, self._server
        state.server_pid = server.pid if server is not None else 0
        state.server_ticks = server.ticks if server is not None else 0
        standby = self._standby.server
        state.standby_pid = standby.pid if standby is not None else 0
        state.standby_ticks = standby.ticks if standby is not None else 0
        state.standby_ready = self._standby.ready
        self._lock.write(state)

    def _keep_in_memory(self, keep: bool) -> None:
        """What the next server reads from /run; the files may be new ones by now."""
        for kept in self._kept:
            kept.close()
        self._kept = [Kept(self._instance.memory_lock)] if keep else []

    def _say(self, sentence: str) -> None:
        say(f"zcache: {self._instance.name}: {sentence}")


# ---- as a process -------------------------------------------------------------------------


def _why(error: OSError | ZcacheError) -> str:
    return (error.strerror or "") if isinstance(error, OSError) else str(error)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0 after an orderly end, else that of the error which was told."""
    args = _parser().parse_args(argv)
    resume = json.loads(os.environ.pop(RESUME, "null"))
    tell = Teller(args.tell_fd if resume is None else None)
    prepare(realtime=args.realtime == "yes")  # before the lock: who has it decides at once
    try:
        instance = Instance(args.name)
        if resume is not None:
            os.set_inheritable(resume["fd"], False)
            lock = ServeLock(instance.serve, resume["fd"])
        else:
            lock = ServeLock.acquire(instance)
    except ZcacheError as error:
        tell(error.exit_code, str(error))
        return error.exit_code
    state = State(
        supervisor_pid=os.getpid(), supervisor_ticks=start_ticks(os.getpid()),
        words=args.words, root=str(ROOT), version=zcache_core.__version__, looks=True,
    )  # fmt: skip
    if resume is not None:
        state.starts, state.upgrades = resume["starts"], resume["done"]
        state.upgrades_asked = resume["asked"]
        state.takeovers = resume.get("takeovers", 0)  # whom we replace may be older
    before = servestate.read(instance)
    supervisor = Supervisor(instance, lock, state, tell, before, args.realtime == "yes")
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    code = supervisor.run(upgrade=resume is not None)
    lock.release(forget=code != 0)  # words that were refused are nobody's
    return code


def prepare(realtime: bool) -> None:
    """Fit to mend a machine that waits for its swap; the children inherit it.  No core dumps:
    they would hold pages of every process, and the lock until they are written."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    refused = process.prepare(realtime=False)
    process.load_files()
    if realtime:
        refused += filter(None, [process.real_time()])
    start_log()
    if refused:
        say(f"zcache: warning: the supervisor is not fit for swapping: {'; '.join(refused)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="zcache-supervisor", description="see 'zcache serve'")
    parser.add_argument("--name", required=True)
    parser.add_argument("--realtime", choices=("yes", "no"), default="yes")
    parser.add_argument("--tell-fd", type=int, help="where to say how the start went")
    parser.add_argument("words", nargs="*", help="key=value, checked already")
    return parser


if __name__ == "__main__":
    sys.exit(main())
