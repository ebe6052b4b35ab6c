"""bench.density on a few pages: the figures are what they say, and the order is the known one."""

from __future__ import annotations

import random

import pytest

from bench import density, pages, zram
from bench.corpus_synthetic import runs
from zcache_core.several import ALLOCATORS

MIB = 1 << 20


@pytest.fixture(scope="module")
def data() -> memoryview:
    found = b"".join(runs(4 * MIB // 4096, 1))
    assert len(found) == 4 * MIB
    return memoryview(found)


def test_denser_in_the_known_order() -> None:
    data = memoryview(b"".join(runs(24 * MIB // 4096, 1)))
    frames = {name: density.frames_in_use(density.cost(data, name)) for name in ALLOCATORS}
    assert frames["zsmalloc"] < frames["z3fold"] < frames["zbud"]
    assert frames["zbud"] >= density.two_buds_bound(data)


def test_bound_of_two_buds() -> None:
    """By hand: zeros cost nothing, incompressible pages one frame each, small ones a half."""
    rng = random.Random(1)
    zeros = bytes(4096)
    raw = rng.randbytes(4096)
    small = rng.randbytes(1000) + bytes(3096)
    large = rng.randbytes(3500) + bytes(596)
    assert density.two_buds_bound(memoryview(zeros * 3 + raw * 2)) == 2
    assert density.two_buds_bound(memoryview(small * 4)) == 2
    assert density.two_buds_bound(memoryview(large * 2 + small)) == 3
    assert density.two_buds_bound(memoryview(large + small * 3)) == 3


def test_cold_pages_take_less(data: memoryview) -> None:
    before = density.cost(data, "zsmalloc")
    after = density.cost_of_cold(data, "zsmalloc", "zstd:3")
    assert density.frames_in_use(after) < density.frames_in_use(before)
    assert after["recompressed_pages"] > 0


@pytest.mark.parametrize("name", ALLOCATORS)
def test_churn_is_undone(data: memoryview, name: str) -> None:
    found = density.churned(data, name)
    assert found["moved_pages"] > 0
    assert found["frames"] > 0.9


def test_zram_where_there_is_none_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zram, "FOLDER", zram.FOLDER / "nothing")
    assert zram.algorithms() == []


def test_the_page_has_a_mark_for_every_section() -> None:
    marks = {match["name"] for match in pages.MARKED.finditer(density.PAGE_FILE.read_text())}
    assert marks == {"machine", "density", "cold", "beside", "churn", "times", "goals"}
