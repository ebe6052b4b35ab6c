"""Does asking cost those who swap?  Latency while a client asks for `stats` as fast as it can.

    quiet     nobody asks
    polled    one client asks again as soon as it has its answer

The node process answers from the memory file and asks the server nothing, so what remains is the
machine's own: two more busy processes.  Measured as it is, and with server and NBD client on one
core, node process and poller on another: the second shows what the server itself notices.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import servers
from bench.load import KIB, Load, Outcome
from bench.report import Goal, Section, figure
from bench.rounds import measure as measure_load
from bench.servers import ROOT, Server
from bench.setup import POOL, SIZE, Setup
from cluster.link import BlockingClient
from zcache_core.errors import ControlError

ROWS = (Load("read", 4 * KIB), Load("read", 32 * KIB), Load("write", 128 * KIB))
START_LIMIT_S = 20.0
MOST = 1.1

# SIGINT is ignored in the children of a shell's background job, unless somebody asks for it.
POLLER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from cluster.link import BlockingClient
answers = 0
with BlockingClient(sys.argv[1]) as client:
    print("polling", flush=True)
    try:
        while True:
            client.call("stats")
            answers += 1
    except KeyboardInterrupt:
        print(answers)
"""


@contextmanager
def polled(control: Path, cores: set[int]) -> Iterator[list[int]]:
    """A client that asks all the time; the list has the number of answers afterwards."""
    answers: list[int] = []
    command = [sys.executable, "-c", POLLER, str(control)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        os.sched_setaffinity(process.pid, cores)
        assert process.stdout
        try:
            assert process.stdout.readline() == "polling\n"
            yield answers
            process.send_signal(signal.SIGINT)
            answers.append(int(process.stdout.read()))
        finally:
            process.kill()


def node_pid(server: Server) -> int:
    deadline = time.monotonic() + START_LIMIT_S
    while True:
        try:
            with BlockingClient(server.control) as client:
                return int(client.call("ping")["pid"])
        except ControlError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def pin(pid: int, cores: set[int]) -> None:
    for task in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(task.name), cores)


def measure(setup: Setup) -> Section:
    head = ["", "quiet p50", "polled p50", "ratio"]
    section = Section("polling", "Control RPC polled all the time: request latency", head)
    everywhere = os.sched_getaffinity(0)
    first, *others = sorted(everywhere)
    places = {"as it is": (everywhere, everywhere)}
    if others:
        places["on cores of their own"] = ({first}, set(others))
    raw: dict[str, list[tuple[Outcome, Outcome]]] = {}
    counted: list[int] = []
    polled_s = 0.0
    recipe = servers.zcache(SIZE, POOL)
    with setup.serving([recipe]) as (server,):
        node = node_pid(server)
        for number in range(setup.plan.rounds):
            for place, (serving, asking) in places.items():
                with servers.on_cores([server], serving):
                    pin(node, asking)
                    for load in ROWS:
                        seed = setup.plan.seed + number
                        quiet = measure_load(server, load, setup.plan, seed)
                        with polled(server.control, asking) as answers:
                            start_s = time.monotonic()
                            busy = measure_load(server, load, setup.plan, seed)
                            polled_s += time.monotonic() - start_s
                        counted += answers
                        raw.setdefault(f"{load}, {place}", []).append((quiet, busy))
    for name, pairs in raw.items():
        ratio = statistics.median(busy.p50_us / quiet.p50_us for quiet, busy in pairs)
        sides = [
            statistics.median(outcome.p50_us for outcome in side)
            for side in zip(*pairs, strict=True)
        ]
        section.rows.append([name, *(f"{figure(us)} us" for us in sides), f"{ratio:.2f}"])
        section.goals.append(Goal(f"polled: {name}", ratio, MOST, True, "latency, of quiet"))
    section.notes.append(f"{sum(counted) / polled_s:.0f} answers/s while polled")
    section.raw = {
        name: [[vars(quiet), vars(busy)] for quiet, busy in pairs] for name, pairs in raw.items()
    }
    return section
