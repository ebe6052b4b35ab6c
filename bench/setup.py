"""What every part of the bench is given: real pages, a folder, and how long to take."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import load
from bench.rounds import Plan
from bench.servers import Recipe, Server

SIZE = "1G"
POOL = "512M"


@dataclass(frozen=True)
class Setup:
    """pages: the corpus, `plan.data` as memory.  folder: for sockets and logs; temporary."""

    plan: Plan
    pages: memoryview
    folder: Path
    lab_rounds: int
    lab_seconds: float

    @contextmanager
    def serving(
        self, recipes: Sequence[Recipe], region_bytes: int | None = None
    ) -> Iterator[list[Server]]:
        """All of these servers, running and filled with the corpus."""
        with ExitStack() as stack:
            servers = [stack.enter_context(Server(recipe, self.folder)) for recipe in recipes]
            for server in servers:
                load.fill(server.socket, self.plan.data, region_bytes or self.plan.region_bytes)
            yield servers


def machine() -> dict[str, object]:
    """What the figures are figures of."""
    rows = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((row.split(":", 1)[1].strip() for row in rows if row.startswith("model name")), "")
    nbdkit = subprocess.run(["nbdkit", "--version"], capture_output=True, text=True).stdout.strip()
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "nbdkit": nbdkit,
        "nice": os.nice(0),
        "load_before": round(os.getloadavg()[0], 2),
    }
