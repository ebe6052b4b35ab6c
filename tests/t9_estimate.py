"""`zcache estimate`: what known memory compresses to, with no more rights than it needs."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from plugin import sampling
from plugin.estimate import CODECS, PAGE_BYTES, Sizes, rows
from tests.plugin_helpers import ROOT
from zcache_core import PAGES_PER_FRAME

PAGE = 4096
PAGES = 6000
ZCACHE = ROOT / ".venv/bin/zcache"
# A quarter same-filled, half of them a third of noise, a quarter noise.
HOLDER = f"""
import mmap, random, sys
rng = random.Random(1)
area = mmap.mmap(-1, {PAGES} * {PAGE}, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range({PAGES}):
    noise = (0, 1365, 1365, {PAGE})[page % 4]
    rest = {PAGE} - noise
    area.write(rng.randbytes(noise) + b"secret! " * (rest // 8) + bytes(rest % 8))
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder() -> Iterator[int]:
    """The number of a process that holds that."""
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    yield child.pid
    child.kill()
    child.wait()
    child.stdout.close()
    assert child.stdin is not None
    child.stdin.close()


def estimate(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [ZCACHE, "estimate", *map(str, words)], capture_output=True, text=True, timeout=120
    )


def test_known_memory(holder: int) -> None:
    done = estimate("--pid", holder, "--json", "--pool", "64M", "--pages", 4000)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert PAGES * PAGE < found["anonymous_bytes"] < 2 * PAGES * PAGE
    assert found["processes"] == 1
    assert found["sampled_pages"] == 4000
    assert 0.15 < found["same_filled_pages"] / 4000 < 0.35
    rows = {(row["allocator"], row["codec"]): row for row in found["rows"]}
    assert set(rows) == {(a, c) for a in PAGES_PER_FRAME for c in CODECS}
    assert "secret" not in done.stdout + done.stderr
    for codec in CODECS:
        # A third of those that are no word are noise: alone in a frame, of 3.  The others: two
        # in a frame of zbud, and 1365 + 24 + a little bytes: 2.8 in one of zsmalloc.
        zbud, dense = (rows[name, codec]["pages_per_frame"] for name in ("zbud", "zsmalloc"))
        assert 1.3 < zbud < 1.7
        assert 1.6 < dense < 2.1
        assert min(rows["zbud", codec]["out_us"], rows["zbud", codec]["in_us"]) > 0
    best = rows[found["recommended"]["allocator"], found["recommended"]["codec"]]
    assert best["capacity_bytes"] > (64 << 20) * 1.8
    assert best["capacity_bytes"] * best["ram_bytes_per_page"] / PAGE == pytest.approx(
        64 << 20, rel=0.01
    )


def test_a_table_for_a_person(holder: int) -> None:
    done = estimate("--all", "--pages", 500)
    assert done.returncode == 0, done.stderr
    assert len(re.findall("<- recommended", done.stdout)) == 1
    assert re.search(r"^zcache serve size=\S+ pool=\S+ allocator=\w+ codec=\S+$", done.stdout, re.M)
    assert done.stderr == "", "no progress into a pipe"


def test_what_cannot_be() -> None:
    for words, sentence in (
        (("--pid", 999999999), "says nothing: there is no such process (process 999999999)"),
        (("--all", "--pages", 5), "use 64 to 262144"),
        (("--all", "--pool", "3%%"), "write it like pool=20%"),
    ):
        done = estimate(*words)
        assert done.returncode == 3
        assert sentence in done.stderr
        assert "Traceback" not in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: there is nothing to drop")
def test_rights_are_dropped(holder: int) -> None:
    told = subprocess.run(
        [
            sys.executable, "-c",
            "from plugin import sampling; sampling.drop_privileges();"
            f"print(open('/proc/self/status').read()); open('/proc/{holder}/mem', 'rb').close()",
        ],
        capture_output=True, text=True, check=True, cwd=ROOT,
    ).stdout  # fmt: skip
    words = dict(line.split(":\t") for line in told.splitlines() if ":\t" in line)
    kept = sampling.CAP_DAC_READ_SEARCH, sampling.CAP_IPC_LOCK, sampling.CAP_SYS_PTRACE
    has = int(words["CapEff"], 16)
    assert has == int(words["CapPrm"], 16) == sum(1 << number for number in kept)
    assert int(words["NoNewPrivs"]) == 1
    assert int(words["VmLck"].split()[0]) > 0


def test_every_page_has_the_same_chance(holder: int) -> None:
    """Addresses that are not there any more are left out, and nothing beyond the bound is read."""
    held, looked = sampling.look(holder, 1 << 25)
    assert PAGES <= len(held.present) < looked
    few, looked = sampling.look(holder, 4)
    assert len(few.present) <= looked <= 4
    taken: list[bytes] = []
    gone = held._replace(present=[*held.present, 0], pid=holder)
    assert list(sampling.sample([gone, few._replace(pid=999999999)], 1 << 20, 1, taken.append))
    assert len(taken) == len(held.present)
    assert sum(page == b"secret! " * 512 for page in taken) == PAGES // 4
    only: list[bytes] = []
    list(sampling.sample([held], 100, 1, only.append))
    assert len(only) == 100


def test_nothing_is_stopped_and_no_file_written(holder: int) -> None:
    before = set(os.listdir("/dev/shm"))
    done = estimate("--pid", holder, "--pages", 200)
    assert done.returncode == 0
    assert set(os.listdir("/dev/shm")) - before == set()
    state = Path(f"/proc/{holder}/status").read_text()
    assert re.search(r"State:\tS", state), "it goes on"


def test_pages_that_are_all_same_filled_need_no_frame() -> None:
    sizes = Sizes()
    for _ in range(64):
        sizes.take(bytes(PAGE_BYTES))
    sizes.measure()
    assert {row.pages_per_frame for row in rows(sizes, 1 << 30)} == {0.0}
