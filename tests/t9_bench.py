"""The bench in small: client, servers, every part but the lab, and what is made of the figures.

One round of a twentieth of a second each, on synthetic pages: it shows that nothing has rotted,
and judges no time.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from bench import (
    build,
    corpus,
    disk,
    disk_full,
    footprint,
    load,
    nbd_goals,
    overflow,
    pages,
    plot,
    polling,
    remote,
    servers,
    store_alone,
    thread_study,
)
from bench.__main__ import ONLY_WHEN_ASKED, PAGE_FILE, PARTS
from bench.bare import BareLoops
from bench.load import KIB, Load, LoadError
from bench.report import Goal, Section, figure, print_goals, print_section
from bench.rounds import Plan, interleave, turned
from bench.servers import Server
from bench.setup import Setup, machine

MIB = 1 << 20
CORPUS_MIB = 4


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory) -> Setup:
    folder = tmp_path_factory.mktemp("bench")
    corpus.make(CORPUS_MIB, folder / "corpus", synthetic=True)
    data = folder / "corpus" / "pages.bin"
    plan = Plan(data, CORPUS_MIB * MIB, seconds=0.05, rounds=1)
    return Setup(plan, memoryview(data.read_bytes()), folder, lab_rounds=0, lab_seconds=0)


def zcache() -> servers.Recipe:
    return servers.zcache("64M", "32M", threads=1)


@pytest.mark.parametrize("op", ["read", "write", "mix"])
def test_client_counts_what_it_did(setup: Setup, op: str) -> None:
    with setup.serving([servers.memory("64M")]) as (server,):
        asked = Load(op, 32 * KIB, depth=8, connections=2, order="sequential")
        done = load.run(asked, server.socket, setup.plan.data, 2 * MIB, 0.05, seed=1)
    assert done.requests > 0
    assert 0 < done.p50_us <= done.p99_us <= 1.01 * done.max_us
    assert done.mb_per_s == pytest.approx(done.requests_per_s * 32 * KIB / 1e6, rel=0.01)


def test_what_was_filled_comes_back(setup: Setup) -> None:
    with setup.serving([zcache()]) as (server,):
        load.verify(server.socket, setup.plan.data, 8 * MIB, 0.05)


def test_client_notices_other_pages(setup: Setup) -> None:
    with (
        setup.serving([servers.null("64M")]) as (server,),
        pytest.raises(LoadError, match="not what was written"),
    ):
        load.verify(server.socket, setup.plan.data, 8 * MIB, 0.05)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (Load("read", 5000), "whole pages"),
        (Load("read", 4096, depth=3, connections=2), "multiple"),
        (Load("erase", 4096), "read, write or mix"),
    ],
)
def test_client_refuses_nonsense(setup: Setup, asked: Load, said: str) -> None:
    with (
        setup.serving([servers.null("64M")]) as (server,),
        pytest.raises(LoadError, match=said),
    ):
        load.run(asked, server.socket, setup.plan.data, MIB, 0.05, seed=1)


def test_server_that_does_not_start(tmp_path: Path) -> None:
    recipe = servers.memory("nonsense")
    with (
        pytest.raises(servers.ServerError, match=r"(?s)memory did not start: .*size"),
        Server(recipe, tmp_path),
    ):
        pass


def test_what_does_not_compile_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken.c").write_text("int main(void) { return nothing; }\n")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(build.BuildError, match="nothing"):
        build.program("broken")


def test_rounds_take_turns(setup: Setup) -> None:
    assert turned("ABC", 0) == ["A", "B", "C"]
    assert turned("ABC", 4) == ["B", "C", "A"]
    rounds: list[Load] = []
    row = Load("read", 4 * KIB)
    with setup.serving([servers.null("64M"), zcache()]) as running:
        plan = Plan(setup.plan.data, MIB, seconds=0.05, rounds=2)
        results = interleave(running, [row], plan, before=rounds.append)
    assert rounds == [row, row]
    for name in ("null", "zcache"):
        assert len(results.of(row, name)) == 2
        assert results.median(row, name).requests > 0
        assert results.cpu_us(row, name) > 0


def test_bare_loops(setup: Setup) -> None:
    times = BareLoops(setup.pages).measure()
    assert all(value > 0 for value in vars(times).values())


def test_every_part_and_the_plot(
    setup: Setup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(thread_study, "COUNTS", (1, 2))
    console = Console(file=io.StringIO())
    parts = (store_alone, nbd_goals, thread_study, polling, disk, disk_full, footprint)
    sections = [part.measure(setup) for part in parts]
    for section in sections:
        assert all(len(row) == len(section.head) for row in section.rows), section.title
        assert section.rows
        print_section(section, console)
    print_goals(sections, console)
    document = {"machine": machine(), "sections": {s.name: s.as_json() for s in sections}}
    document = json.loads(json.dumps(document))
    assert plot.draw(document, tmp_path / "one.svg")
    assert plot.draw(document, tmp_path / "two.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_pages_from_another_node(setup: Setup) -> None:
    section = remote.measure(setup)
    assert len(section.rows) == 4 * len(remote.BATCHES)
    assert len(section.goals) == 2 * len(remote.BATCHES)
    for rounds in section.raw.values():
        assert all(one["requests"] > 0 and 0 < one["p50_us"] <= one["p99_us"] for one in rounds)


def test_pages_to_other_nodes(setup: Setup) -> None:
    """Without the renewing, which waits ten seconds for a dead node."""
    image = setup.folder / "image"
    overflow.make_image(image, setup.pages, 32 * MIB)
    raw = overflow.rounds(setup, image, 32 * MIB)
    for name in ("memory", "plain", "TLS"):
        assert all(speed > 0 for speed in raw[name])
    assert raw["remoted"]["plain"] > 0


def test_figures_go_between_the_marks(tmp_path: Path) -> None:
    section = Section("memory", "M", ["", "MiB"], [["resident", "1"]], notes=["a note"])
    section.goals = [Goal("g", 1.0, 1.15, True, "latency")]
    document = {
        "machine": machine(),
        "corpus": {"sources": {"synthetic": 1}},
        "options": {"rounds": 1, "seconds": 1, "lab_rounds": 0},
        "sections": {"memory": section.as_json()},
    }
    page = tmp_path / "page.md"
    page.write_text(
        "Said.\n<!-- bench memory -->\nold\n<!-- end -->\n<!-- bench goals -->\n<!-- end -->\n"
        "<!-- bench lab -->\nkept\n<!-- end -->\nSaid too.\n"
    )
    found = pages.tables(json.loads(json.dumps(document)))
    for _ in range(2):  # the second time changes nothing
        pages.update(page, found)
        assert page.read_text().splitlines() == [
            "Said.",
            "<!-- bench memory -->",
            "|  | MiB |",
            "| --- | ---: |",
            "| resident | 1 |",
            "",
            "- a note",
            "<!-- end -->",
            "<!-- bench goals -->",
            "| what | measured as | measured | goal |  |",
            "| --- | ---: | ---: | ---: | ---: |",
            "| g | latency | 1.00 | <= 1.15 | met |",
            "<!-- end -->",
            "<!-- bench lab -->",
            "kept",
            "<!-- end -->",
            "Said too.",
        ]
    assert "synthetic" in found["machine"]


def test_every_mark_of_the_page_is_known() -> None:
    marks = [match["name"] for match in pages.MARKED.finditer(PAGE_FILE.read_text())]
    assert set(marks) == {*PARTS, *ONLY_WHEN_ASKED, "goals", "machine"}


def test_nothing_to_plot(tmp_path: Path) -> None:
    assert not plot.draw({"sections": {}}, tmp_path / "none.svg")


def test_goal_is_judged_as_it_was_measured() -> None:
    """Rounding helps nobody over a bound, and a miss that it would hide is shown."""
    assert Goal("a", 1.15, 1.15, True, "").met
    assert not Goal("a", 1.151, 1.15, True, "").met
    assert Goal("a", 0.85, 0.85, False, "").met
    assert Goal("a", 0.968, 0.97, False, "").row()[2:] == ["0.968", ">= 0.97", "missed"]
    assert Goal("a", 0.9, 0.97, False, "").row()[2] == "0.90"
    assert Goal("a", 39.96, 40, True, "", "MiB").row()[2:] == ["40.0 MiB", "<= 40.0 MiB", "met"]


def test_figures_have_three_digits() -> None:
    texts = [figure(value) for value in (0.0, 1.234, 12.34, 123.4, 1234.5, float("nan"))]
    assert texts == ["0", "1.23", "12.3", "123", "1234", "-"]


def test_section_as_json_is_json() -> None:
    section = Section("x", "X", ["", "a"], [["row", "1"]], [Goal("g", 1, 1, True, "t")])
    assert json.loads(json.dumps(section.as_json()))["goals"][0]["met"] is True
