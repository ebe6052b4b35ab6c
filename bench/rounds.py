"""Rounds: every server under every load in turn, again and again, so that nobody has the quiet half.

    round 1:  load 1 on A B C D, load 2 on A B C D, ...      round 2:  load 1 on B C D A, ...

What is compared stands side by side in time, seconds apart; whoever comes first changes from round
to round.  Of all rounds the median counts, for each figure by itself.
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
Results = dict[tuple[Load, str], list[Outcome]]


@dataclass(frozen=True)
class Plan:
    """What all measurements of one run share."""

    data: Path
    region_bytes: int
    seconds: float
    rounds: int
    seed: int = 1


def turned(items: Sequence[T], number: int) -> list[T]:
    """The same items, beginning with another one in every round."""
    start = number % len(items)
    return [*items[start:], *items[:start]]


def measure(server: Server, load: Load, plan: Plan, seed: int) -> Outcome:
    before_s = server.cpu_s()
    outcome = loads.run(load, server.socket, plan.data, plan.region_bytes, plan.seconds, seed)
    return replace(outcome, server_cpu_s=server.cpu_s() - before_s)


def interleave(
    servers: Sequence[Server],
    rows: Sequence[Load],
    plan: Plan,
    wanted: Callable[[Load, str], bool] = lambda load, name: True,
) -> Results:
    """Every load on every server, `plan.rounds` times.  Servers must have been filled."""
    results: Results = {}
    for number in range(plan.rounds):
        for load in rows:
            for server in turned(servers, number):
                if wanted(load, server.name):
                    outcome = measure(server, load, plan, plan.seed + number)
                    results.setdefault((load, server.name), []).append(outcome)
    return results


def median(outcomes: Sequence[Outcome]) -> Outcome:
    """Figure by figure."""
    assert outcomes, "there must be a round"
    names = [field.name for field in fields(Outcome)]
    return Outcome(**{n: statistics.median(getattr(o, n) for o in outcomes) for n in names})
