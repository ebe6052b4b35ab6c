"""Imports go down only: the tree keeps to the floors, and the checker sees who does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests import floors_helpers as floors

ROOT = Path(__file__).resolve().parents[1]


def test_the_tree_keeps_to_its_floors() -> None:
    found = floors.problems(ROOT)
    assert not found, "\n".join(found)


def test_every_package_was_seen() -> None:
    for package in floors.PACKAGES:
        assert [f for f in (ROOT / package).rglob("*") if f.suffix in floors.SOURCES], package


def plant(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def test_the_server_process_loads_nothing_of_the_node() -> None:
    """No asyncio, no ssl: megabytes, and with another Python first on PATH not to be had."""
    script = "import sys, plugin.wiring, plugin.leave; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert "plugin.config" in loaded
    assert not loaded & {"asyncio", "ssl", "msgpack", "cryptography", "cluster.peersocket"}


def test_imports_that_go_down_are_fine(tmp_path: Path) -> None:
    plant(
        tmp_path,
        {
            "zcache_core/__init__.py": '__version__ = "1"\n',
            "zcache_core/layout.pxd": "from libc.stdint cimport uint64_t\n",
            "zcache_core/counters.py": (
                "from typing import TYPE_CHECKING\n"
                "if TYPE_CHECKING:\n    from zcache_core.memfile import MemoryFile\n"
            ),
            "zcache_core/memfile.pyx": (
                '"""Text about it:\nfrom zcache_core.store import nothing\n"""\n'
                "cimport cython\nfrom zcache_core cimport layout\n"
                "from zcache_core.counters import (  # rows\n    a,\n    b,\n)\n"
            ),
            "zcache_core/memfile.pxd": "from .layout cimport PAGE_BYTES\n",
            "zcache_core/memfile.pyi": "class MemoryFile: ...\n",
            "zcache_core/arena.pyx": "from zcache_core.memfile cimport MemoryFile\n",
            "zcache_core/arena.pyi": "",
            "cluster/node.py": "import asyncio, msgpack\nfrom zcache_core import store\n",
            "plugin/cli.py": "import rich.table\nfrom plugin.config import Config\nimport nbdkit\n",
        },
    )
    assert floors.problems(tmp_path) == []


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"zcache_core/arena.pyx": "from zcache_core.store cimport Store"}, "store, which is not"),
        ({"zcache_core/arena.pyx": "cimport zcache_core.zbud"}, "zbud, which is not lower"),
        ({"zcache_core/arena.pxd": "from . cimport zbud"}, "zbud, which is not lower"),
        ({"zcache_core/arena.pyx": "from .zbud import (\n  a,\n  b)"}, "zbud, which is not lower"),
        ({"zcache_core/memfile.pyx": "from zcache_core cimport arena"}, "arena, which is not"),
        ({"zcache_core/errors.py": "def f():\n    import zcache_core.store"}, "store, which is"),
        ({"zcache_core/__init__.py": "from .errors import ZcacheError"}, "errors, which is not"),
        ({"zcache_core/store.py": "from cluster.wire import Frame"}, "wire, which is not lower"),
        ({"zcache_core/disk.py": "from asyncio import run"}, "no sockets"),
        ({"zcache_core/store.pyx": "from nbdkit cimport x"}, "no sockets"),
        ({"zcache_core/native.h": "#include <sys/socket.h>"}, "header of sockets"),
        ({"zcache_core/store.pyx": 'cdef extern from "<nbdkit-plugin.h>":'}, "header of sockets"),
        ({"zcache_core/store.py": "import numpy"}, "imports numpy, which is not for zcache_core"),
        ({"zcache_core/store.py": "from cython import cclass"}, "cython, which is not for"),
        ({"cluster/wire.py": "from zcache_core.memfile import MemoryFile"}, "memfile, which is"),
        ({"cluster/node.py": "from plugin import config"}, "plugin.config, which is not lower"),
        ({"cluster/node.py": "if TYPE_CHECKING:\n  pass\nelse:\n  import rich"}, "imports rich"),
        ({"plugin/config.py": "from .cli import main"}, "plugin.cli, which is not lower"),
        ({"plugin/cli.py": "from tests import conftest"}, "imports tests, which is not for plugin"),
        ({"plugin/surprise.py": ""}, "plugin/surprise.py: has no floor"),
        ({"cluster/deep/down.py": ""}, "cluster/deep/down.py: has no floor"),
        ({"zcache_core/zbud.pyx": ""}, "zbud.pyx: has no .pyi"),
        (
            {"zcache_core/arena.pyx": "", "zcache_core/zbud.pyx": "from .arena cimport Arena"},
            "zbud.pyx: cimports zcache_core.arena, which has no .pxd",
        ),
    ],
)
def test_what_breaks_a_floor_is_seen(tmp_path: Path, files: dict[str, str], said: str) -> None:
    plant(tmp_path, files)
    assert any(said in problem for problem in floors.problems(tmp_path)), floors.problems(tmp_path)
