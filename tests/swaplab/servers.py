"""Which server to swap onto: recipes that work on the host and inside of the guest alike.

A recipe is a function from a `Place` (where to listen, where to put files) to a `ServerCommand`
(what to run, and how its numbers are asked for):

    recipe = zcache(size="512M", pool="128M")
    lab.serve(recipe)              # on the host, TCP in the lab's namespace
    serve_inside(guest, recipe)    # in the guest, Unix socket in its own tmpfs

`zcache` is ours; `nbdkit_memory` is nbdkit's own RAM disk (uncompressed, or with
`allocator="zstd"`), the yardstick, and what the lab itself was built against.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from .fitness import tool

REPOSITORY = Path(__file__).resolve().parents[2]
PLUGIN = REPOSITORY / "plugin" / "zcache_plugin.py"
SMALL_STACK_BYTES = 256 << 10
"""Stack of a server's threads in the guest: 16 of nbdkit's with the usual 8 MiB each, all of it
locked, do not fit beside anything in a guest of 256 MiB."""


@dataclass(frozen=True)
class Place:
    """Where a server listens.

    listen: nbdkit's words for it.  uri: the same for NBD clients beside the server.
    folder: for its socket, its pid file and its control socket, as the server sees it.
    """

    listen: tuple[str, ...]
    uri: str
    folder: str

    @property
    def pidfile(self) -> str:
        """nbdkit writes it once it answers."""
        return f"{self.folder}/server.pid"

    @property
    def control(self) -> str:
        """The control socket of a zcache server."""
        return f"{self.folder}/control"


def tcp_place(address: str, port: int, folder: Path) -> Place:
    return Place(("-i", address, "-p", str(port)), f"nbd://{address}:{port}", os.fspath(folder))


def unix_place(folder: str) -> Place:
    socket = f"{folder}/nbd.sock"
    return Place(("-U", socket), f"nbd+unix:///?socket={socket}", folder)


@dataclass(frozen=True)
class ServerCommand:
    """argv and environment of a server, and the command that prints its statistics.

    stats_argv: run beside the server; read_stats turns its output into numbers.
    """

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    stats_argv: tuple[str, ...] = ()
    read_stats: Callable[[str], dict[str, int]] | None = None


Recipe = Callable[[Place], ServerCommand]


def nbdkit_memory(size: str = "512M", threads: int = 4, **words: str) -> Recipe:
    """`nbdkit memory SIZE key=value ...`; statistics: stored_bytes, from the export's extents."""

    def recipe(place: Place) -> ServerCommand:
        extra = tuple(f"{key}={value}" for key, value in words.items())
        nbdkit = (tool("nbdkit"), "-f", "-P", place.pidfile, "-t", str(threads), *place.listen)
        return ServerCommand(
            name=" ".join(("nbdkit memory", *extra)),
            argv=(*nbdkit, "memory", size, *extra),
            stats_argv=(tool("nbdinfo"), "--map", "--json", place.uri),
            read_stats=_stored_bytes,
        )

    return recipe


def zcache(threads: int | None = None, nbdkit_words: tuple[str, ...] = (), **keys: str) -> Recipe:
    """Our server with the plugin's keys (size="512M", pool="128M", ...).

    nbdkit_words: further options of nbdkit, e.g. ("--log=null",) or ("--filter=delay",).
    """

    def recipe(place: Place) -> ServerCommand:
        words = tuple(f"{key}={value}" for key, value in keys.items())
        nbdkit = [tool("nbdkit"), "-f", "-P", place.pidfile, *nbdkit_words, *place.listen]
        status = (_python(), "-m", "plugin.cli", "status")
        if threads is not None:
            nbdkit += ["-t", str(threads)]
        return ServerCommand(
            name=" ".join(("zcache", *words)),
            argv=(*nbdkit, "python", str(PLUGIN), *words, f"control={place.control}"),
            env=_zcache_environment(),
            stats_argv=(*status, "--json", "--control", place.control),
            read_stats=_status_json,
        )

    return recipe


def stored_bytes(stats: dict[str, int]) -> int:
    """Bytes of pages that the server holds, whichever server it is."""
    return stats["logical_bytes"] if "logical_bytes" in stats else stats["stored_bytes"]


def _python() -> str:
    """The interpreter that has what the project needs: the one of `make setup`, else ours."""
    installed = REPOSITORY / ".venv" / "bin" / "python"
    return os.fspath(installed) if installed.exists() else sys.executable


def _zcache_environment() -> dict[str, str]:
    """ZCACHE_PYTHON is the plugin's own word for the interpreter of its node process."""
    return {"MALLOC_ARENA_MAX": "1", "ZCACHE_PYTHON": _python()}


def _stored_bytes(text: str) -> dict[str, int]:
    """nbdinfo --map --json: [{"offset":, "length":, "type":}, ...]; type 0 is data."""
    stored = sum(int(extent["length"]) for extent in json.loads(text) if extent["type"] == 0)
    return {"stored_bytes": stored}


def _status_json(text: str) -> dict[str, int]:
    """zcache status --json: the counters, wherever in the document they are."""
    document = json.loads(text)
    counters = document.get("stats", document)
    return {name: value for name, value in counters.items() if isinstance(value, int)}
