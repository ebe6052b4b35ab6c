"""`make demo`: watch a small Linux swap onto the server, from boot to summary.

    python -m tests.swaplab.demo [--hog MIB] [--memory MIB] [--seconds S]

It boots a second Linux as a program (User Mode Linux: no kernel module, nothing of this machine's
own swap is touched), swaps onto a zcache server, starts a program that wants more memory than that
Linux has, and shows both sides while it runs: the guest's memory, and what `zcache status` says of
the server.  On a terminal the two views are live; in a pipe there is a line every few seconds.

Bound: one lab of LIMIT_S; everything it starts ends with it, also on Ctrl-C.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

from bench.corpus import manifest, pages_file
from cluster.link import BlockingClient
from plugin import show
from zcache_core.errors import ZcacheError

from . import fitness
from .errors import LabError
from .guest import Guest, GuestConfig, Job
from .kernel_log import trouble
from .lab import Lab, Result
from .servers import zcache
from .swap import attach, detach, swap_off, swap_on
from .vmstat import Sample
from .workloads import HogReport, hog, read_hog

LIMIT_S = 240
CORPUS_MIB = 64
LIVE_S = 0.5
PLAIN_S = 2.0
BAD_MEMORY = 3

PHASES = {
    "fill": "fills its memory",
    "sequential": "walks through all of it, again and again",
    "random": "jumps around in it",
    "audit": "looks at every page a last time",
}
"""What the hog is doing, by the last word it has said."""


class ServerView:
    """What `zcache status` says, asked over the control socket; `peak` keeps the fullest moment."""

    def __init__(self, control: str) -> None:
        self._control = control
        self.peak: dict[str, int] = {}

    def lines(self) -> list[show.Line]:
        """A line that says why where there is no answer."""
        try:
            with BlockingClient(self._control) as client:
                answers: dict[str, Any] = {
                    method: client.call(method) for method in ("ping", "stats", "config", "health")
                }
        except (ZcacheError, OSError) as error:
            return [show.Line("zcache", f"does not answer: {error}")]
        stats = answers["stats"]
        if stats["logical_bytes"] >= self.peak.get("logical_bytes", 0):
            self.peak = stats
        return show.lines(self._control, **answers)


def hog_phase(job: Job) -> str:
    words = job.stderr().split()
    return PHASES.get(words[-1], words[-1]) if words else "starts"


def guest_lines(samples: Sequence[Sample], total_bytes: int, job: Job) -> list[show.Line]:
    """The guest's side: memory, swap, pages per second, what the hog does."""
    now = samples[-1]
    before = samples[max(0, len(samples) - 6)]
    seconds = max(now.guest_s - before.guest_s, 1e-3)
    used = total_bytes - (now.free_kb << 10)
    return [
        show.Line("hog", f"{job.seconds():4.0f} s  {hog_phase(job)}"),
        show.Line(
            "memory",
            f"{show.bar(used / total_bytes)} {show.size(used)} of {show.size(total_bytes)} in use",
        ),
        show.Line("swapped", f"{show.size(now.swap_used_kb << 10)}"),
        show.Line(
            "moving",
            f"{(now.pswpout - before.pswpout) / seconds:8,.0f} pages/s out"
            f"{(now.pswpin - before.pswpin) / seconds:9,.0f} pages/s in",
        ),
    ]


class Screen:
    """Shows both sides while the hog runs: live on a terminal, line by line elsewhere."""

    def __init__(self, guest: Guest, server: ServerView) -> None:
        self._guest, self._server = guest, server
        self._total_bytes = guest.meminfo_kb()["MemTotal"] << 10

    def watch(self, job: Job) -> None:
        """Until the job ends."""
        if sys.stdout.isatty():
            self._live(job)
        else:
            self._plain(job)

    def _live(self, job: Job) -> None:
        from rich.live import Live

        with Live(self._view(job), auto_refresh=False, transient=False) as live:
            self._until_done(job, LIVE_S, lambda: live.update(self._view(job), refresh=True))

    def _view(self, job: Job) -> Any:
        from rich.console import Group
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        panels = []
        for title, lines in (
            ("the guest that swaps", self._guest_lines(job)),
            ("the server it swaps onto: zcache status", self._server.lines()),
        ):
            table = Table.grid(padding=(0, 2))
            for line in lines:
                style = show.STYLES.get(line.style, "")
                table.add_row(Text(line.label, "bold"), Text(line.text, style))
            panels.append(Panel(table, title=title, title_align="left"))
        return Group(*panels)

    def _guest_lines(self, job: Job) -> list[show.Line]:
        return guest_lines(self._guest.samples, self._total_bytes, job)

    def _plain(self, job: Job) -> None:
        self._until_done(job, PLAIN_S, lambda: print(self._plain_line(job), flush=True))

    def _plain_line(self, job: Job) -> str:
        sides = (self._guest_lines(job), self._server.lines())
        found = {line.label: line.text for lines in sides for line in lines}
        moving = " ".join(found["moving"].split())
        told = found.get("stored", found["zcache"]).partition(" (")[0]
        return f"   {found['hog']}: {found['swapped']} swapped, {moving}; server: {told}"

    def _until_done(self, job: Job, every_s: float, draw: Callable[[], None]) -> None:
        draw()
        while not job.done_within(every_s):
            draw()
        draw()


def summary(
    result: Result, report: HogReport, peak: dict[str, int], bad: Sequence[str]
) -> list[show.Line]:
    """What came of it, for a person."""
    moved = result.progress()
    touches = sum(phase.touches for phase in report.phases)
    lines = [
        show.Line(
            "verified",
            f"{touches:,} touches of {report.pages:,} pages, {report.bad} found wrong",
            "critical" if report.bad else "ok",
        ),
        show.Line(
            "swapped",
            f"{moved.pages_out:,} pages out, {moved.pages_in:,} back in, in {result.seconds:.0f} s",
        ),
    ]
    lines += [
        show.Line(
            phase.name,
            f"{phase.touches_per_s:,.0f} touches/s; half of the faults that had to read were "
            f"served within {phase.major_us['p50']:,.0f} us, 99 of 100 within "
            f"{phase.major_us['p99']:,.0f} us",
        )
        for phase in report.phases
        if phase.major_us["count"]
    ]
    if peak:
        left = show.size(result.stats["after"]["logical_bytes"])
        lines.append(
            show.Line(
                "server",
                f"{show.size(peak['logical_bytes'])} of pages in {show.size(peak['ram_bytes'])} of "
                f"RAM at the peak, {left} once the hog had gone",
            )
        )
    if result.server_cpu_s is not None:
        lines.append(show.Line("", f"{result.server_cpu_s:.1f} s of CPU time"))
    said = "; ".join(bad) or "nothing bad in the guest's kernel log"
    lines.append(show.Line("kernel", said, "critical" if bad else "ok"))
    return lines


def say(text: str) -> None:
    print(text, flush=True)


def sources() -> list[str]:
    """Which programs the corpus was captured from."""
    found = manifest().get("sources")
    return sorted(found) if isinstance(found, dict) else []


def run(memory_mib: int, hog_mib: int, seconds: float) -> int:
    fitness.require()
    say(f"1  Pages: {CORPUS_MIB} MiB, captured from live programs the first time.")
    corpus = pages_file(CORPUS_MIB)
    say(f"     from {', '.join(sources())}")
    with Lab(LIMIT_S) as lab:
        server = lab.serve(zcache(size="512M", pool="256M"))
        say(f"2  Server:\n     {' '.join(server.command.argv)}")
        say(f"3  Guest: Linux {fitness.kernel_version()}, {memory_mib} MiB, User Mode Linux.")
        guest = lab.boot(GuestConfig(mem_mib=memory_mib))
        say(f"     booted in {lab.timings_s['boot']:.1f} s, root file system: ours, read-only")
        attach(guest, server)
        swap_on(guest)
        say("4  Swap, in the guest:")
        say(f"     nbd-client {server.address} {server.port} /dev/nbd0 -swap")
        say("     mkswap /dev/nbd0\n     swapon --discard -p 10 /dev/nbd0")
        say(f"5  Hog, in the guest: {hog_mib} MiB of those pages, a checksum at every touch.")
        view = ServerView(server.place.control)
        screen = Screen(guest, view)
        result = lab.watch(
            lambda: hog(guest, hog_mib, corpus, seconds / 2, seconds / 2),
            server,
            while_running=screen.watch,
        )
        if result.exit.code not in (0, 2):
            say(f"The hog ended with {result.exit.code}: {result.stdout}{result.stderr}")
            return BAD_MEMORY
        swap_off(guest)
        detach(guest)
        report = read_hog(result.stdout)
        bad = trouble(guest.log)
        say("6  Summary:")
        show.print_lines(summary(result, report, view.peak, bad))
    return BAD_MEMORY if report.bad or bad else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make demo", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--memory", type=int, default=128, help="MiB of the guest (default 128)")
    parser.add_argument("--hog", type=int, default=192, help="MiB that the hog wants (default 192)")
    parser.add_argument("--seconds", type=float, default=16, help="of touching (default 16)")
    options = parser.parse_args(argv)
    try:
        return run(options.memory, options.hog, options.seconds)
    except LabError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
