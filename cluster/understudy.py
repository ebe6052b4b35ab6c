"""A process that works, one that waits for its turn, and the one that both are forked from.

    origin   everything loaded and locked; it does no work
       │ fork
       ├─► actor     works
       └─► understudy  waits ── the actor was killed: "g" ──► the actor.  A next one is forked

As the server's own standby (plugin/standby.py), and for the same reason: where memory is exhausted
nobody can be started, because its memory could only be had by swapping, to pages that only it can
bring out or back.  Its turn costs neither exec nor a library's page, and no page of its own: it has
copied what it shared, and its heap is as large as it gets.

    the actor is killed       the understudy goes on
    it ends by itself         the origin ends, with its exit code: who started it knows what to do
    QUICK_MOST killed in turn, each within QUICK_S
                              the same, exit code 1
    the origin is killed      both end with it (PR_SET_PDEATHSIG)

Bound: three processes.  What it is not: for programs with threads; the origin has none.
"""

from __future__ import annotations

import contextlib
import gc
import os
import select
import signal
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from zcache_core import process

GO = b"g"
QUICK_S, QUICK_MOST = 1.0, 5
AGAIN_S = 1.0  # when no understudy could be made
# While batches of 512 pages are under way to three donors with TLS, 12 MiB are taken.  With 16
# there were 19 page faults in 12,000 pages written and 3,000 read, with 8 there were 1,100.
HEAP_BYTES = 16 << 20
END_S = 2.0  # for the actor to end after SIGTERM; the keeper gives us 3 s


@dataclass
class _Child:
    """A forked process: its pidfd, and our end of the pipe that says when it is its turn."""

    pid: int
    pidfd: int
    line: int
    began_s: float = 0.0

    def go(self) -> None:
        self.began_s = time.monotonic()
        with contextlib.suppress(OSError):
            os.write(self.line, GO)

    def has_ended(self) -> bool:
        return bool(select.select([self.pidfd], [], [], 0)[0])

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, number)

    def reap(self) -> int:
        """Its exit code, or minus the signal that killed it; it has ended."""
        _, status = os.waitpid(self.pid, 0)
        os.close(self.pidfd)
        os.close(self.line)
        return os.waitstatus_to_exitcode(status)


def act(play: Callable[[], int], watched: int, realtime: bool) -> int:
    """Run `play` in a child that has an understudy; its exit code, in the origin.

    `realtime`: in that class, where memory is given to it that others do not get any more (a
    quarter of what the kernel keeps free), and the CPU before those who wait for its work.
    `watched`: a descriptor that is readable when it is over anyway: a killed actor has no
    successor then.  SIGTERM and SIGINT are passed on.
    """
    process.load_files()
    gc.collect()
    gc.freeze()  # or the collector would touch, and so copy, in each child what they share
    wake, waker = os.pipe()
    for fd in (wake, waker):
        os.set_blocking(fd, False)
    signal.set_wakeup_fd(waker)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    actor = _fork(play, realtime, (wake, waker))
    actor.go()
    understudy = _another(play, realtime, (wake, waker))
    quick = 0
    while True:
        watch = [actor.pidfd, wake, *([understudy.pidfd] if understudy else [])]
        select.select(watch, [], [], None if understudy else AGAIN_S)
        if _was_told(wake):
            _dismiss(understudy)
            return _end(actor)
        if actor.has_ended():
            code = actor.reap()
            quick = quick + 1 if time.monotonic() - actor.began_s < QUICK_S else 0
            if code >= 0 or quick >= QUICK_MOST or select.select([watched], [], [], 0)[0]:
                _dismiss(understudy)
                return code if code >= 0 else 1
            successor = understudy or _another(play, realtime, (wake, waker))
            if successor is None:
                return 1  # the server starts another node
            actor = successor
            actor.go()
            understudy = _another(play, realtime, (wake, waker))
        elif understudy is None:
            understudy = _another(play, realtime, (wake, waker))
        elif understudy.has_ended():
            understudy.reap()
            time.sleep(QUICK_S / 10)  # whatever kills it: not as fast as it can
            understudy = _another(play, realtime, (wake, waker))


def _was_told(wake: int) -> bool:
    with contextlib.suppress(BlockingIOError):
        return bool(os.read(wake, 64))
    return False


def _dismiss(understudy: _Child | None) -> None:
    if understudy is not None:
        understudy.signal(signal.SIGKILL)
        understudy.reap()


def _another(play: Callable[[], int], realtime: bool, ours: tuple[int, ...]) -> _Child | None:
    """An understudy; None when there is no memory for one just now: asked again in AGAIN_S."""
    try:
        return _fork(play, realtime, ours)
    except OSError:
        return None


def _end(actor: _Child) -> int:
    actor.signal(signal.SIGTERM)
    if not select.select([actor.pidfd], [], [], END_S)[0]:
        actor.signal(signal.SIGKILL)
    return max(0, actor.reap())


def _fork(play: Callable[[], int], realtime: bool, ours: tuple[int, ...]) -> _Child:
    """A child that waits for its turn."""
    its, line = os.pipe()
    parent = os.getpid()
    try:
        pid = os.fork()
    except OSError:
        os.close(its)
        os.close(line)
        raise
    if pid:
        os.close(its)
        try:
            return _Child(pid, os.pidfd_open(pid), line)
        except OSError:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(line)
            raise
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_DFL)
        for fd in (*ours, line):
            os.close(fd)
        process.end_with_parent()
        process.own_memory()
        process.keep_heap(HEAP_BYTES)
        process.lock_memory(on_fault=True)  # a lock is not inherited
        if os.getppid() == parent and os.read(its, 1) == GO:
            os.close(its)
            if realtime:
                process.real_time()
            code = play()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)
    raise AssertionError("not reached")
