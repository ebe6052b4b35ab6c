"""Keeps one child process running: started, waited for, started again.

    start -> [spawn -> blocked in waitid, without the GIL -> reap -> back-off] ...

The thread runs a few microseconds of Python for each death of the child and none
otherwise, so it costs the data path nothing (another thread that runs Python
bytecode multiplies the latency of every page by ten and more).

Bound: at most one start in `BACKOFF_MAX_S` when the child dies at once every
time, and one log line for every doubling of the wait.

What it is not: a supervisor of the server.  The child must notice by itself that
the server is gone (it may have been killed).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable

from plugin.spawn import Program

BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 30.0
CALM_S = 60.0  # a child that lived this long was well: begin again with the first wait
STOP_S = 3.0  # for a child to end after SIGTERM, then SIGKILL
STACK_BYTES = 256 * 1024  # the default of 8 MiB would be locked as far as touched


class Keeper:
    """Keeps `program` running until `stop`; tells of its ends through `say`."""

    def __init__(self, what: str, program: Program, say: Callable[[str], None]) -> None:
        self._what, self._program, self._say = what, program, say
        self._stopping = threading.Event()
        # Protects _pid: a number is only signalled while its process is not reaped.
        self._lock = threading.Lock()
        self._pid: int | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Start the child, and the thread that waits for it."""
        before = threading.stack_size(STACK_BYTES)
        try:
            self._thread = threading.Thread(target=self._run, name="zcache-keeper", daemon=True)
            self._thread.start()
        finally:
            threading.stack_size(before)

    def stop(self) -> None:
        """End the child, by force if it must be; returns when it is reaped."""
        self._stopping.set()
        for number in (signal.SIGTERM, signal.SIGKILL):
            self._signal(number)
            if self._thread is not None:
                self._thread.join(STOP_S)
                if not self._thread.is_alive():
                    return

    def _run(self) -> None:
        wait_s = BACKOFF_FIRST_S
        while not self._stopping.is_set():
            began_s = time.monotonic()
            how = self._spawn_and_wait()
            if self._stopping.is_set():
                return
            lived_s = time.monotonic() - began_s
            if lived_s > CALM_S:
                wait_s = BACKOFF_FIRST_S
            if wait_s < BACKOFF_MAX_S:
                self._say(
                    f"zcache: {self._what} ended ({how}) after {lived_s:.1f} s; "
                    f"starting it again in {wait_s:.1f} s"
                )
            self._stopping.wait(wait_s)
            wait_s = min(2 * wait_s, BACKOFF_MAX_S)

    def _spawn_and_wait(self) -> str:
        """One life of the child; how it ended, in a few words."""
        try:
            with self._lock:
                self._pid = pid = self._program.spawn()
        except OSError as error:
            return f"{self._program.path}: {error.strerror}"
        if self._stopping.is_set():  # stop() came before there was anything to signal
            self._signal(signal.SIGTERM)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        with self._lock:
            self._pid = None
            _, status = os.waitpid(pid, 0)
        code = os.waitstatus_to_exitcode(status)
        return f"exit code {code}" if code >= 0 else f"signal {-code}"

    def _signal(self, number: int) -> None:
        with self._lock, contextlib.suppress(ProcessLookupError):
            if self._pid is not None:
                os.kill(self._pid, number)
