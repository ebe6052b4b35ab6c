"""Compiled helpers of the measurements, made when first needed and kept in the user's cache.

    ${XDG_CACHE_HOME:-~/.cache}/zcache/bench/DIGEST/nbdload

DIGEST is over the flags and the source, so an old program is never taken for a new one.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

SOURCES = Path(__file__).parent / "client"
FLAGS = ("-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread")
LIBRARIES = ("libnbd",)


class BuildError(Exception):
    """A helper program does not compile."""


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "zcache" / "bench"


def program(name: str) -> Path:
    """The built program, e.g. `program("nbdload")`.  Raises BuildError with what gcc said."""
    source = SOURCES / f"{name}.c"
    digest = hashlib.sha256(" ".join(FLAGS).encode() + source.read_bytes()).hexdigest()[:16]
    target = cache_folder() / digest / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / name
        libraries = _run(["pkg-config", "--cflags", "--libs", *LIBRARIES]).split()
        _run(["gcc", *FLAGS, "-o", str(made), str(source), *libraries])
        made.replace(target)
    return target


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except FileNotFoundError:
        raise BuildError(f"{command[0]} is not installed; run `make setup`") from None
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stderr}")
    return done.stdout
