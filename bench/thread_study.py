"""How many nbdkit threads: zcache and null with 1, 2, 4, 8 and 16 of them, side by side.

nbdkit gives every connection so many workers; with one, the connection's own thread answers, and
no request wakes another thread.  null shows what nbdkit itself pays for its workers, zcache what
the GIL and the codec add.  Real-time priority is tried with the fewest and the most; without `-t`
zcache chooses by itself.
"""

from __future__ import annotations

from dataclasses import replace

from bench import servers
from bench.load import KIB, Load
from bench.report import Section, figure
from bench.rounds import interleave
from bench.servers import Recipe
from bench.setup import POOL, SIZE, Setup

COUNTS = (1, 2, 4, 8, 16)
REGION_BYTES = 64 << 20
MOST_ROUNDS = 5  # thirteen servers take their time
ROWS = (
    Load("read", 4 * KIB),
    Load("write", 128 * KIB, order="sequential"),
    Load("read", 4 * KIB, depth=32),
    Load("write", 128 * KIB, depth=4),
    Load("write", 128 * KIB, depth=4, connections=2),
)
HEAD = ["", *map(str, ROWS)]


def recipes() -> list[Recipe]:
    found = []
    for count in COUNTS:
        found.append(servers.null(SIZE, count, f"null -t {count}"))
        name = f"zcache -t {count}"
        found.append(servers.zcache(SIZE, POOL, "realtime=no", threads=count, name=name))
    for count in (COUNTS[0], COUNTS[-1]):
        name = f"zcache -t {count}, real time"
        found.append(servers.zcache(SIZE, POOL, "realtime=yes", threads=count, name=name))
    found.append(servers.zcache(SIZE, POOL, name="zcache as it is"))
    return sorted(found, key=lambda recipe: recipe.name.partition(" ")[0])


def measure(setup: Setup) -> Section:
    plan = replace(
        setup.plan,
        region_bytes=min(REGION_BYTES, setup.plan.region_bytes),
        rounds=min(MOST_ROUNDS, setup.plan.rounds),
    )
    asked = recipes()
    with setup.serving(asked, plan.region_bytes) as running:
        results = interleave(running, ROWS, plan)
    section = Section(
        "threads", "nbdkit threads: p50 us or requests/s, and the server's CPU us per request", HEAD
    )
    for recipe in asked:
        cells = [recipe.name]
        for load in ROWS:
            middle = results.median(load, recipe.name)
            speed = (
                f"{figure(middle.p50_us)} us"
                if load.depth == 1
                else f"{figure(middle.requests_per_s)}/s"
            )
            cells.append(f"{speed}, {figure(results.cpu_us(load, recipe.name))}")
        section.rows.append(cells)
    section.raw = results.as_json()
    return section
