"""The lab: a network, servers and guests with one time limit, and nothing left over afterwards.

    with Lab(limit_s=120) as lab:
        server = lab.serve(nbdkit_memory("512M"))
        guest = lab.boot(GuestConfig(mem_mib=128))
        attach(guest, server)
        swap_on(guest)
        result = lab.watch(hog(guest, 192, corpus), server)

When the limit runs out, every guest first dumps its blocked tasks into its kernel log, then all of
it ends; whoever waits gets LabTimeoutError with the end of that log.  Leaving the `with` ends
guests (by force), servers, and whatever they have left running in the lab's network, and removes
the folder, except when SWAPLAB_KEEP names a folder to move it to.

Start processes from the thread that will also leave the `with`: they die with the thread that
started them.  Any number of labs may run beside each other, in threads or processes.
"""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from . import fitness
from .clock import Deadline, until
from .errors import LabError, LabTimeoutError
from .guest import Guest, GuestConfig, Job
from .guest_link import Exit
from .host_server import HostServer
from .kernel_log import LogLine
from .network import Network
from .servers import Recipe, stored_bytes, tcp_place
from .swap import InsideServer
from .vmstat import Progress, Sample, progress

PORT = 10809
GRACE_S = 5
DIAGNOSIS_S = 10
STATS_EVERY_S = 1.0


@dataclass
class Result:
    """What a workload did, as data.

    seconds: its wall clock time.
    vmstat_before, vmstat_after: all of /proc/vmstat.  samples: those of the workload's time.
    log: the kernel log since the workload began.  stats: the server's numbers (see `watch`).
    """

    name: str
    exit: Exit
    seconds: float
    stdout: str
    stderr: str
    vmstat_before: dict[str, int]
    vmstat_after: dict[str, int]
    samples: list[Sample]
    log: list[LogLine]
    stats: dict[str, dict[str, int]] = field(default_factory=dict)
    server_cpu_s: float | None = None

    def progress(self, parts: int = 4) -> Progress:
        return progress(self.samples, parts)

    def counted(self, name: str) -> int:
        """How much a counter of /proc/vmstat grew over the workload."""
        return self.vmstat_after[name] - self.vmstat_before[name]


class Lab:
    """limit_s: for everything from here to the end of the `with`."""

    def __init__(self, limit_s: float = 180) -> None:
        self.limit_s = limit_s
        # Waiters get a little more, so that the watchdog can ask the guests first what is wrong.
        self.deadline = Deadline(limit_s + DIAGNOSIS_S)
        self.guests: list[Guest] = []
        self.servers: list[HostServer] = []
        self.timings_s: dict[str, float] = {}

    def __enter__(self) -> Lab:
        fitness.require()
        self.network = Network()
        self.folder = Path(tempfile.mkdtemp(prefix="swaplab-"))
        self._watch_for(self.limit_s)
        return self

    def _watch_for(self, limit_s: float) -> None:
        self._watchdog = threading.Timer(limit_s, self._expire)
        self._watchdog.daemon = True
        self._watchdog.start()

    def _expire(self) -> None:
        for guest in self.guests:
            guest.expire()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._watchdog.cancel()
        try:
            for guest in self.guests:
                if isinstance(error, LabError):
                    guest.diagnose()
                guest.close()
            for server in self.servers:
                server.stop()
            self._end_leftovers()
        finally:
            self.network.close()
            self._put_away()

    def _end_leftovers(self) -> None:
        """Processes that servers have started and not ended: given a moment, then killed."""
        with suppress(LabTimeoutError):
            until(lambda: not self.network.pids(), Deadline(GRACE_S), "the network to empty")
        for pid in self.network.pids():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def _put_away(self) -> None:
        for number, guest in enumerate(self.guests):
            text = "\n".join(
                line.text if line.time_s is None else f"[{line.time_s:12.6f}] {line.text}"
                for line in guest.log
            )
            (self.folder / f"console{number}.log").write_text(text)
        keep = os.environ.get("SWAPLAB_KEEP")
        if keep:
            Path(keep).mkdir(parents=True, exist_ok=True)
            shutil.move(self.folder, Path(keep) / self.folder.name)
        else:
            shutil.rmtree(self.folder, ignore_errors=True)

    def end_within(self, limit_s: float) -> None:
        """Bring the end of everything nearer.  Call it while nobody waits."""
        self._watchdog.cancel()
        self.deadline.bring_nearer(limit_s + DIAGNOSIS_S)
        self._watch_for(min(limit_s, self.deadline.left_s()))

    # ---- parts ----

    def serve(self, recipe: Recipe) -> HostServer:
        """Start another server on the host, at an address of its own that every guest reaches."""
        number = len(self.servers)
        folder = self.folder / f"server{number}"
        folder.mkdir()
        address, port = "10.77.255.254", PORT + number
        if number == 0:
            self.network.run([fitness.tool("ip"), "addr", "add", f"{address}/32", "dev", "lo"])
        place = tcp_place(address, port, folder)
        server = HostServer(self.network, recipe(place), place, address, port)
        self.servers.append(server)
        with self.timed("server"):
            server.start(self.deadline)
        return server

    def boot(self, config: GuestConfig | None = None) -> Guest:
        """Boot another guest."""
        folder = self.folder / f"guest{len(self.guests)}"
        folder.mkdir()
        tap = self.network.add_tap()
        guest = Guest(self.network, tap, folder, config or GuestConfig(), self.deadline)
        self.guests.append(guest)
        with self.timed("boot"):
            guest.boot()
        return guest

    def timed(self, name: str) -> _Timed:
        """A `with` that adds its time to `timings_s[name]`."""
        return _Timed(self.timings_s, name)

    # ---- running a workload ----

    def watch(
        self,
        start: Callable[[], Job],
        server: HostServer | InsideServer | None = None,
        limit_s: float | None = None,
        while_running: Callable[[Job], None] | None = None,
    ) -> Result:
        """Start a workload in the newest guest, wait for its end, and collect everything about it.

        while_running: called once after the start; it may kill servers, cut links, poll numbers,
        and returns before or after the job's end.  stats of a server on the host: "before",
        "peak" (when it held the most, asked about once a second) and "after".
        """
        guest = self.guests[-1]
        before = self._stats(server)
        cpu_s = server.usage().cpu_s if isinstance(server, HostServer) else 0.0
        vmstat_before = guest.vmstat()
        log_start, sample_start = len(guest.log), max(0, len(guest.samples) - 1)
        job = start()
        assert job.guest is guest
        if while_running is not None:
            while_running(job)
        peak = self._peak_stats(job, server, limit_s)
        ended = job.wait(limit_s)
        result = Result(
            name=job.name,
            exit=ended,
            seconds=job.seconds(),
            stdout=job.stdout(),
            stderr=job.stderr(),
            vmstat_before=vmstat_before,
            vmstat_after=guest.vmstat(),
            samples=guest.samples[sample_start:],
            log=guest.log[log_start:],
        )
        if isinstance(server, HostServer) and server.running():
            result.server_cpu_s = server.usage().cpu_s - cpu_s
            result.stats = {"before": before, "peak": peak, "after": self._stats(server)}
        return result

    def until_stats(
        self,
        server: HostServer,
        enough: Callable[[dict[str, int]], bool],
        limit_s: float | None = 30,
    ) -> dict[str, int]:
        """Ask for the server's numbers until `enough` of them; those numbers."""
        seen: list[dict[str, int]] = [{}]

        def look() -> bool:
            seen.append(server.stats())
            return enough(seen[-1])

        try:
            until(look, self.deadline.nearer(limit_s), "the server's numbers", STATS_EVERY_S / 2)
        except LabTimeoutError as error:
            raise LabTimeoutError(f"{error}; last: {seen[-1]}") from error
        return seen[-1]

    def _stats(self, server: HostServer | InsideServer | None) -> dict[str, int]:
        return server.stats() if isinstance(server, HostServer) else {}

    def _peak_stats(
        self, job: Job, server: HostServer | InsideServer | None, limit_s: float | None
    ) -> dict[str, int]:
        """The server's numbers when it held the most.

        Not when the guest used the most swap: its last sample is up to a second old, and by the
        time the server answers, the job may have ended and its pages been discarded.
        """
        peak: dict[str, int] = {}
        deadline = self.deadline.nearer(limit_s)
        while isinstance(server, HostServer) and not job.done() and not deadline.passed():
            with suppress(LabError):
                stats = server.stats()
                if not peak or stored_bytes(stats) > stored_bytes(peak):
                    peak = stats
            job.done_within(STATS_EVERY_S)
        return peak


class _Timed:
    def __init__(self, timings_s: dict[str, float], name: str) -> None:
        self._timings_s, self._name = timings_s, name

    def __enter__(self) -> None:
        self._start_s = time.monotonic()

    def __exit__(self, *error: object) -> None:
        spent_s = time.monotonic() - self._start_s
        self._timings_s[self._name] = self._timings_s.get(self._name, 0.0) + spent_s
