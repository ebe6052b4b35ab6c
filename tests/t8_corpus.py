"""The corpus: pages of live programs where they can be had, seeded ones where not."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from pathlib import Path

import lz4.block
import pytest

from bench import corpus, corpus_programs
from bench.corpus_capture import PAGE_BYTES, ZEROS, anonymous_runs, capture
from bench.corpus_synthetic import RUN_PAGES, runs

KNOWN = """
import mmap, sys
memory = mmap.mmap(-1, 64 * 4096, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
for page in range(0, 64, 2):
    memory[page * 4096 : page * 4096 + 4096] = bytes([page + 1]) * 4096
memory[4096] = 0
print("ready", flush=True)
sys.stdin.read()
"""


def split(data: bytes) -> list[bytes]:
    return [data[at : at + PAGE_BYTES] for at in range(0, len(data), PAGE_BYTES)]


# ---- synthetic ----


def test_a_seed_makes_the_same_pages_every_time(seed: int) -> None:
    first, again = b"".join(runs(300, seed)), b"".join(runs(300, seed))
    assert first == again
    assert len(first) == 300 * PAGE_BYTES
    assert first != b"".join(runs(300, seed + 1))
    # A longer corpus begins with the shorter one, up to the last, cut run.
    whole = 300 // RUN_PAGES * RUN_PAGES * PAGE_BYTES
    assert b"".join(runs(400, seed))[:whole] == first[:whole]


def test_synthetic_pages_compress_like_captured_ones(seed: int) -> None:
    pages = split(b"".join(runs(100 * RUN_PAGES, seed)))
    sizes = [len(lz4.block.compress(page, store_size=False)) for page in pages]
    assert 0.33 < sum(sizes) / len(pages) / PAGE_BYTES < 0.47
    assert 0.01 < sum(size > 4032 for size in sizes) / len(pages) < 0.06
    assert sum(page == page[:8] * 512 for page in pages) == RUN_PAGES


# ---- captured ----


def test_capture_finds_the_anonymous_pages_and_no_others() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KNOWN], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as child:
        try:
            assert child.stdout
            assert child.stdout.readline() == b"ready\n"
            present = sum(len(run) for run in anonymous_runs(child.pid))
            pages = [page for run in capture(child.pid, 1 << 20, 1) for page in split(run)]
            few = [page for run in capture(child.pid, 40, 1) for page in split(run)]
        finally:
            child.kill()
    assert 0 < len(pages) <= present
    assert len(few) == 40
    assert ZEROS not in pages
    # Every second page of the mapping holds its number; page 2 has been touched and is zeros.
    for number in range(0, 64, 2):
        assert pages.count(bytes([number + 1]) * PAGE_BYTES) == 1
    with pytest.raises(OSError, match=r"."):
        capture(child.pid, 10, 1)


@pytest.mark.timeout(120)
def test_a_corpus_is_made_once_and_again_when_it_is_too_small(tmp_path: Path) -> None:
    first = corpus.pages_file(4, tmp_path)
    made = first.stat()
    assert made.st_size == 4 << 20
    assert corpus.pages_file(3, tmp_path).stat().st_mtime_ns == made.st_mtime_ns
    document = corpus.manifest(tmp_path)
    sources = document["sources"]
    assert isinstance(sources, dict)
    assert sum(sources.values()) == document["pages"] == 1024
    assert "python3" in sources
    with corpus.pages(2, tmp_path) as pages:
        assert isinstance(pages, mmap.mmap)
        assert len(pages) == 2 << 20
        assert ZEROS not in split(bytes(pages))
    assert corpus.pages_file(5, tmp_path).stat().st_size == 5 << 20
    os.truncate(first, 1 << 20)  # torn by somebody: made anew
    assert corpus.pages_file(5, tmp_path).stat().st_size == 5 << 20


def test_synthetic_pages_stand_in_where_nothing_can_be_captured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(name: str) -> str:
        raise FileNotFoundError(f"{name} is not installed")

    monkeypatch.setattr(corpus_programs, "_command", refuse)
    monkeypatch.setattr("shutil.which", lambda name: None)
    document = corpus.make(2, tmp_path, seed=9)
    assert document["sources"] == {"synthetic": 512}
    assert (tmp_path / "pages.bin").stat().st_size == 2 << 20
    failures = document["left_out"]
    assert isinstance(failures, dict)
    assert set(failures) == set(corpus_programs.PROGRAMS)


def test_the_command_says_what_it_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert corpus.main(["--mib", "1", "--out", str(tmp_path), "--synthetic"]) == 0
    said = capsys.readouterr().out
    assert "synthetic" in said
    assert "1.0 MiB in" in said
    with pytest.raises(SystemExit):
        corpus.main(["--mib", "0"])
