"""Real pages to measure and test with: a local corpus, made once, never committed.

    python -m bench.corpus --mib 64 [--out FOLDER] [--synthetic] [--pid PID ...]

    FOLDER/pages.bin     page after page, 4096 bytes each, nothing else
    FOLDER/corpus.json   where they come from: {"format": 1, "pages": N, "sources": {...}, ...}

The pages are the anonymous pages of programs that it starts itself (corpus_programs.py), captured
while they run (corpus_capture.py); where that is not possible, or yields too little, seeded
synthetic ones fill up (corpus_synthetic.py), and the manifest says how many.  Runs of up to 32
neighbouring pages of one program stay together and the runs of all sources are shuffled, so that
any prefix of the file is a fair mix.

For programs:  `pages(mib)` gives the bytes, `pages_file(mib)` a path; both make what is missing, in
${XDG_CACHE_HOME:-~/.cache}/zcache/corpus unless told otherwise.  Two processes that do so at the
same time make it one after the other.  Bound: MOST_MIB, and about START_LIMIT_S a program.

Captured pages hold what those programs hold: text of the Debian packages and generated data, no
one's secrets.  With --pid that is up to the caller.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import mmap
import os
import random
import sys
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from bench.corpus_capture import PAGE_BYTES, capture
from bench.corpus_programs import PROGRAMS
from bench.corpus_synthetic import runs as synthetic_runs

FORMAT = 1
MOST_MIB = 1024
PAGES_PER_MIB = (1 << 20) // PAGE_BYTES
SPARE_MIB = 64
"""What a runtime needs before its data begins, and what is not anonymous in it."""


def default_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "zcache" / "corpus"


def pages(mib: int, folder: Path | None = None) -> mmap.mmap:
    """`mib` MiB of pages, read-only.  Makes the corpus if there is none that is large enough."""
    path = pages_file(mib, folder)
    with open(path, "rb") as file:
        return mmap.mmap(file.fileno(), mib << 20, prot=mmap.PROT_READ)


def pages_file(mib: int, folder: Path | None = None) -> Path:
    """A file with `mib` MiB of pages or more."""
    assert 0 < mib <= MOST_MIB, f"a corpus has 1 to {MOST_MIB} MiB"
    folder = folder or default_folder()
    path = folder / "pages.bin"
    if not _large_enough(folder, mib):
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _large_enough(folder, mib):
                make(mib, folder)
    return path


def manifest(folder: Path | None = None) -> dict[str, object]:
    """corpus.json; empty when there is no corpus."""
    try:
        text = ((folder or default_folder()) / "corpus.json").read_text()
    except FileNotFoundError:
        return {}
    document: dict[str, object] = json.loads(text)
    return document


def _large_enough(folder: Path, mib: int) -> bool:
    document = manifest(folder)
    count = document.get("pages")
    return (
        document.get("format") == FORMAT
        and isinstance(count, int)
        and count >= mib * PAGES_PER_MIB
        and (folder / "pages.bin").stat().st_size == count * PAGE_BYTES
    )


def make(
    mib: int, folder: Path, seed: int = 1, synthetic: bool = False, pids: Sequence[int] = ()
) -> dict[str, object]:
    """Make the corpus anew, whatever is there; its manifest."""
    wanted = mib * PAGES_PER_MIB
    runs: list[bytes] = []
    sources: dict[str, int] = {}
    failures: dict[str, str] = {}
    if not synthetic:
        runs = _capture_all(wanted, seed, pids, sources, failures)
    missing = wanted - sum(sources.values())
    if missing > 0:
        runs += synthetic_runs(missing, seed)
        sources["synthetic"] = missing
    random.Random(seed).shuffle(runs)
    document: dict[str, object] = {
        "format": FORMAT,
        "pages": wanted,
        "page_bytes": PAGE_BYTES,
        "seed": seed,
        "sources": sources,
        "left_out": failures,
    }
    folder.mkdir(parents=True, exist_ok=True)
    # The manifest goes first and comes back last: without it there is no corpus.
    (folder / "corpus.json").unlink(missing_ok=True)
    _replace(folder / "pages.bin", b"".join(runs)[: wanted * PAGE_BYTES])
    _replace(folder / "corpus.json", json.dumps(document, indent=2).encode() + b"\n")
    return document


def _capture_all(
    wanted: int, seed: int, pids: Sequence[int], sources: dict[str, int], failures: dict[str, str]
) -> list[bytes]:
    """About equal shares from every program; what one lacks, the next ones may add."""
    runs: list[bytes] = []
    programs: dict[str, AbstractContextManager[int]] = {}
    for pid in pids:
        programs[f"pid {pid}"] = nullcontext(pid)
    if not pids:
        share_mib = wanted // PAGES_PER_MIB // len(PROGRAMS) + 1
        # Room for the case that only half of the programs are there.
        programs = {n: p(2 * share_mib + SPARE_MIB) for n, p in PROGRAMS.items()}
    for position, (name, program) in enumerate(programs.items()):
        share = (wanted - sum(sources.values())) // (len(programs) - position)
        try:
            with program as pid:
                taken = capture(pid, share, seed)
        except (OSError, UnicodeError) as error:
            failures[name] = str(error)
            continue
        runs += taken
        sources[name] = sum(map(len, taken)) // PAGE_BYTES
    return runs


def _replace(path: Path, data: bytes) -> None:
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(data)
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench.corpus", description="Capture pages of live programs."
    )
    parser.add_argument("--mib", type=int, default=64, help="how much (default 64)")
    parser.add_argument("--out", type=Path, default=default_folder(), help="folder to put it in")
    parser.add_argument("--seed", type=int, default=1, help="of choices and synthetic pages")
    parser.add_argument("--synthetic", action="store_true", help="capture nothing")
    parser.add_argument(
        "--pid", type=int, action="append", default=[], help="capture this process instead"
    )
    options = parser.parse_args(argv)
    if not 0 < options.mib <= MOST_MIB:
        parser.error(f"--mib must be 1 to {MOST_MIB}")
    document = make(options.mib, options.out, options.seed, options.synthetic, options.pid)
    sources, left_out = document["sources"], document["left_out"]
    assert isinstance(sources, dict)
    assert isinstance(left_out, dict)
    for name, count in sources.items():
        print(f"{name:12} {count / PAGES_PER_MIB:8.1f} MiB")
    for name, reason in left_out.items():
        print(f"{name:12} left out: {reason}", file=sys.stderr)
    print(f"{'':12} {options.mib:8.1f} MiB in {options.out / 'pages.bin'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
