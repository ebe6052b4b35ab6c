"""Builds the compiled modules, and the TLS relay, in place: `python setup.py build_ext --inplace`.

Everything else stands in pyproject.toml.  ZCACHE_WERROR=1 turns the C compiler's
warnings into errors (development and CI); ZCACHE_SANITIZE=address,undefined builds
with sanitizers.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

from Cython.Build import cythonize
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGES = ("zcache_core", "cluster")
sys.path.insert(0, str(ROOT))

LIBRARIES = {
    "codec": ["lz4", "zstd"],
    "learning": ["zstd"],
    "crypt": ["crypto"],
    "tls": ["ssl", "crypto"],
}


def write_counter_ids() -> None:
    """Cell numbers of the counter table, for the compiled code."""
    from zcache_core.counters import HISTOGRAM_CELL, STORED

    lines = [
        '"""Written by setup.py from counters.py; do not edit."""\n',
        "cdef enum:",
        *(f"    C_{c.name.upper()} = {i}" for i, c in enumerate(STORED)),
        *(f"    H_{name.upper()} = {cell}" for name, cell in HISTOGRAM_CELL.items()),
    ]
    target = ROOT / "zcache_core" / "counter_ids.pxd"
    text = "\n".join(lines) + "\n"
    if not target.exists() or target.read_text() != text:
        target.write_text(text)


def flags() -> list[str]:
    """Compiler flags: x86-64-v2 has cmpxchg16b and popcnt (every CPU since 2009)."""
    found = ["-O3", "-g", "-fno-strict-aliasing", "-Wall", "-Wextra"]
    # Cython's own scaffolding, not our code
    found += [
        "-Wno-unused-parameter",
        "-Wno-missing-field-initializers",
        "-Wno-unused-function",
        "-Wno-sign-compare",
    ]
    if platform.machine() == "x86_64":
        found += ["-march=x86-64-v2"]
    if os.environ.get("ZCACHE_WERROR"):
        found += ["-Werror"]
    return found


def extensions() -> list[Extension]:
    sanitize = [f"-fsanitize={s}" for s in [os.environ.get("ZCACHE_SANITIZE")] if s]
    return [
        Extension(
            f"{source.parent.name}.{source.stem}",
            [str(source.relative_to(ROOT))],
            include_dirs=["zcache_core"],
            depends=[f"zcache_core/{name}.h" for name in ("native", "callbacks", "mapped")],
            libraries=[*LIBRARIES.get(source.stem, []), "xxhash"],
            extra_compile_args=flags() + sanitize,
            extra_link_args=["-Wl,--as-needed", *sanitize],
        )
        for package in PACKAGES
        for source in sorted((ROOT / package).glob("*.pyx"))
    ]


class Build(build_ext):
    """The extensions, and the one program that is no module."""

    def run(self) -> None:
        super().run()
        source, program = ROOT / "plugin/relay.c", ROOT / "plugin/zcache-relay"
        if program.exists() and program.stat().st_mtime > source.stat().st_mtime:
            return
        sanitize = [f"-fsanitize={s}" for s in [os.environ.get("ZCACHE_SANITIZE")] if s]
        objects = self.compiler.compile(
            [str(source.relative_to(ROOT))],
            output_dir=self.build_temp,
            extra_postargs=flags() + sanitize,
        )
        new = program.with_name("zcache-relay.new")  # another one may be running
        self.compiler.link_executable(
            objects, str(new), libraries=["ssl", "crypto"], extra_postargs=sanitize
        )
        new.replace(program)


write_counter_ids()
setup(
    cmdclass={"build_ext": Build},
    ext_modules=cythonize(
        extensions(),
        nthreads=0,
        compiler_directives={
            "language_level": "3",
            "boundscheck": False,
            "wraparound": False,
            "cdivision": True,
            "initializedcheck": False,
            "embedsignature": True,
            "freethreading_compatible": False,
        },
    ),
)
