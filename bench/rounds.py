"""Rounds: every server under every load in turn, again and again, so nobody has the quiet half.

    round 1:  load 1 on A B C D, load 2 on A B C D, ...      round 2:  load 1 on B C D A, ...

What is compared stands side by side in time, well under a second apart, and who comes first
changes from round to round.  A ratio is taken within each round, where both sides had the same
machine; of all rounds the median counts.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TypeVar

from bench import load as loads
from bench.load import Load, Outcome
from bench.servers import Server

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """What the measurements of one run share.  `seconds`: of one load on one server."""

    data: Path
    region_bytes: int
    seconds: float
    rounds: int
    seed: int = 1


@dataclass
class Results:
    """Outcomes by load and server's name, in the order of the rounds."""

    outcomes: dict[tuple[Load, str], list[Outcome]]

    def of(self, load: Load, name: str) -> list[Outcome]:
        return self.outcomes[load, name]

    def each(self, load: Load, name: str, figure: str) -> list[float]:
        """One figure of every round, e.g. "p50_us"."""
        return [getattr(outcome, figure) for outcome in self.outcomes[load, name]]

    def median(self, load: Load, name: str) -> Outcome:
        """Figure by figure."""
        return Outcome(*(statistics.median(self.each(load, name, f.name)) for f in fields(Outcome)))

    def cpu_us(self, load: Load, name: str) -> float:
        """Server CPU time of a request, in all rounds together."""
        outcomes = self.outcomes[load, name]
        return 1e6 * sum(o.server_cpu_s for o in outcomes) / sum(o.requests for o in outcomes)

    def as_json(self) -> list[dict[str, object]]:
        return [
            {"load": str(load), "server": name, "rounds": [vars(o) for o in outcomes]}
            for (load, name), outcomes in self.outcomes.items()
        ]


def turned(items: Sequence[T], number: int) -> list[T]:
    """The same items, beginning with another one in every round."""
    start = number % len(items)
    return [*items[start:], *items[:start]]


def measure(server: Server, load: Load, plan: Plan, seed: int) -> Outcome:
    """One load on one server, with the server's CPU time."""
    before_s = server.cpu_s()
    outcome = loads.run(load, server.socket, plan.data, plan.region_bytes, plan.seconds, seed)
    return replace(outcome, server_cpu_s=server.cpu_s() - before_s)


def interleave(
    servers: Sequence[Server],
    rows: Sequence[Load],
    plan: Plan,
    before: Callable[[Load], None] = lambda load: None,
) -> Results:
    """Every load on every server, `plan.rounds` times.  Servers must have been filled.

    before: called with a load before the first server gets it, in every round; for what has to be
    measured beside it.
    """
    results = Results({(load, server.name): [] for load in rows for server in servers})
    for number in range(plan.rounds):
        for load in rows:
            before(load)
            for server in turned(servers, number):
                outcome = measure(server, load, plan, plan.seed + number)
                results.of(load, server.name).append(outcome)
    return results
