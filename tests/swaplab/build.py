"""Compiles the guest's own programs (guest/*.c) when a lab first needs them.

They are static, because the guest's PID 1 must not depend on pages of a shared library, and they
are built outside of the source tree, under a name made of the source's and the flags' hash:

    ${XDG_CACHE_HOME:-~/.cache}/zcache/swaplab/<hash>/agent

Bound: one compiler run per program and version of it, ever.  Two labs that build at the same time
both compile and one rename wins; both results are the same file.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from pathlib import Path

from .errors import LabError
from .fitness import tool

SOURCES = Path(__file__).parent / "guest"
FLAGS = ("-std=gnu11", "-O2", "-static", "-Wall", "-Wextra", "-Werror")


def cache_folder() -> Path:
    """Where the project keeps what it can make again."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "zcache"


def program(name: str) -> Path:
    """The built guest program, e.g. `program("hog")`.  Raises LabError with what gcc said."""
    source = SOURCES / f"{name}.c"
    digest = hashlib.sha256(" ".join(FLAGS).encode() + source.read_bytes()).hexdigest()[:16]
    target = cache_folder() / "swaplab" / digest / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        made = Path(folder) / name
        command = [tool("gcc"), *FLAGS, "-o", str(made), str(source)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode:
            raise LabError(f"{source.name} does not compile:\n{run.stderr}")
        made.replace(target)
    return target
