"""One load on one server: what is asked (`Load`), and what came of it (`Outcome`).

The asking is done by bench/client/nbdload.c, a closed loop over libnbd; this file only starts it.
"""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Self

from bench.build import program

CLIENT_LIMIT_S = 120.0
KIB = 1024


@dataclass(frozen=True)
class Load:
    """Requests of one kind, `depth` of them open at any time, over all connections together."""

    op: str
    block_bytes: int
    depth: int = 1
    connections: int = 1
    order: str = "random"

    def __str__(self) -> str:
        lines = f", {self.connections} connections" if self.connections > 1 else ""
        return f"{self.op} {self.block_bytes // KIB} KiB {self.order}, depth {self.depth}{lines}"


@dataclass(frozen=True)
class Outcome:
    """What nbdload says; latencies are from sending a request to its answer."""

    requests: float
    seconds: float
    requests_per_s: float
    mb_per_s: float
    mean_us: float
    p50_us: float
    p99_us: float
    max_us: float
    client_cpu_s: float
    server_cpu_s: float = 0.0

    @classmethod
    def read(cls, text: str) -> Self:
        document = json.loads(text)
        return cls(**{f.name: document[f.name] for f in fields(cls) if f.name in document})


class LoadError(Exception):
    """The client did not get through: the server refused, broke, or did not answer in time."""


def fill(socket: Path, data: Path, region_bytes: int) -> None:
    """Write the pages of `data`, again and again, over the first `region_bytes`."""
    _client(socket, data, region_bytes, "--fill")


def verify(socket: Path, data: Path, region_bytes: int, seconds: float) -> Outcome:
    """Fill, then read for a while and compare with what was written."""
    text = _client(
        socket, data, region_bytes, "--fill", "--verify", "--op=read", f"--seconds={seconds}"
    )
    return Outcome.read(text)


def run(
    load: Load, socket: Path, data: Path, region_bytes: int, seconds: float, seed: int
) -> Outcome:
    """Drive one server for so long.  Raises LoadError."""
    text = _client(
        socket,
        data,
        region_bytes,
        f"--op={load.op}",
        f"--block={load.block_bytes}",
        f"--depth={load.depth}",
        f"--connections={load.connections}",
        f"--order={load.order}",
        f"--seconds={seconds}",
        f"--seed={seed}",
    )
    return Outcome.read(text)


def _client(socket: Path, data: Path, region_bytes: int, *words: str) -> str:
    command = [str(program("nbdload")), f"--socket={socket}", f"--data={data}"]
    command += [f"--region={region_bytes}", *words]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CLIENT_LIMIT_S)
    except subprocess.TimeoutExpired:
        raise LoadError(f"no end after {CLIENT_LIMIT_S:.0f} s: {' '.join(words)}") from None
    if done.returncode:
        raise LoadError(done.stderr.strip())
    return done.stdout
