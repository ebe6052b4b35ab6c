"""Which module stands on which floor, and who imports what: the checker behind t0_floors.

    plugin        6 config        7 wiring     8 control     9 zcache_plugin, cli
    cluster       1 wire          2 session    3 link        5 node
    zcache_core   0 layout, ...   1 arena, ... 2 zbud, ...   3 store   ...   6 device

A module imports only what is lower: in its own package whatever stands on a lower
floor, or left of it on the same one, so there can be no circle; in the packages below
only a lower floor.  Imports are read, not run: Python's by its own parser, Cython's by
their lines.  What is imported for type checkers only does not count.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Lowest first: a package imports only from itself and those before it.
FLOORS = {
    "zcache_core": {
        0: "native pthread layout counter_ids errors counters commands owner naps process",
        1: "inventory geometry memfile headroom backing arena committer adoption stacks samefill "
        "slots codec crypt crew",
        2: "allocator accounting budframe buds zbud z3fold sizeclass zspage zsmalloc several index",
        3: "cold ring ringside core ramtier cooling takeover moving share tidying dictionary "
        "learning denseroom denser store probe foreign foreignfound donation",
        5: "diskfile diskobject diskio segments quota diskstate diskput disk diskrun orders "
        "peerwhere peernotes peers peertier bothstate backup both ahead below fullness eviction "
        "cooler fetching tiers pressure steward faulty coldprobe",
        6: "device",
    },
    "cluster": {
        1: "wire frames keyset tls unixsock logrelay addresses connections peeraddress etcdurl "
        "certificates placement understudy roll reasons lifeline",
        2: "lanesend lane session peerwire seats sheaf replicas peersocket expiry",
        3: "link webserver laneport peerchannel members peerhealth",
        4: "putlane courier donorlane health steering metrics webpages peerlink generosity donor "
        "renewal overflow farewell rack peerring",
        5: "lending node",
    },
    "plugin": {
        6: "interrupts messages logpipe amounts instance peerkeys codeckeys config liaison teller "
        "handshake relays dialer statepage swift spare tlsfiles genetlink nbdmessage napping",
        7: "spawn keeper leave places fitness show lent lower servestate lone wiring "
        "supervised nbdnetlink swaparea upfile rates terminal reach counterfiles recording "
        "sampling",
        8: "control drain standby supervisor serve mender attach foreground swapping topview top "
        "statsfs record plot slowness doctor watching estimate",
        9: "zcache_plugin attachcli nodecli reference estimatecli fitswap cli writepages",
    },
}
PACKAGES = list(FLOORS)

# What may be imported from outside, beside the standard library.
OUTSIDE = {
    "zcache_core": set[str](),
    "cluster": {"msgpack", "prometheus_client", "cryptography", "requests", "etcd3gw"},
    "plugin": {"msgpack", "rich", "mfusepy", "matplotlib", "nbdkit", "pyroute2"},
}
CYTHON_ROOTS = {"cython", "cpython", "libc", "posix"}
# The core knows no sockets and no event loop, not even the standard library's.
BANNED_IN_CORE = {"socket", "socketserver", "asyncio", "ssl", "selectors", "http", "nbdkit"}
BANNED_HEADERS = re.compile(r"sys/socket\.h|netinet/|arpa/|nbdkit")

SOURCES = {".py", ".pyx", ".pxd"}

STRING = re.compile(r'"""[\s\S]*?"""|\'\'\'[\s\S]*?\'\'\'')
CYTHON_IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+(?P<source>[.\w]+)[ \t]+(?P<c1>c?)import[ \t]+"
    r"(?P<names>\([^)]*\)|[^\n#;]+)|(?P<c2>c?)import[ \t]+(?P<modules>[^\n#;]+))",
    re.MULTILINE,
)


class Import(NamedTuple):
    """One imported name: `target` as deep as it was written (`package.module.name`)."""

    target: str
    compiled: bool  # a cimport


def module_of(root: Path, file: Path) -> str:
    """Dotted name of a source file; the package's own for an `__init__`."""
    return ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")


def imports(root: Path, file: Path) -> Iterator[Import]:
    """Every import of a .py, .pyx or .pxd file."""
    text = file.read_text()
    package = module_of(root, file) if file.stem == "__init__" else module_of(root, file.parent)
    if file.suffix == ".py":
        yield from _python_imports(ast.parse(text), package)
    else:
        yield from _cython_imports(STRING.sub('""', text), package)


def _python_imports(node: ast.AST, package: str) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        yield from (Import(alias.name, False) for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        source = _absolute("." * node.level + (node.module or ""), package)
        yield from (Import(f"{source}.{alias.name}", False) for alias in node.names)
    children: Iterator[ast.AST] = ast.iter_child_nodes(node)
    if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
        children = iter(node.orelse)
    for child in children:
        yield from _python_imports(child, package)


def _cython_imports(text: str, package: str) -> Iterator[Import]:
    for found in CYTHON_IMPORT.finditer(text):
        compiled = bool(found["c1"] or found["c2"])
        names = re.sub(r"#.*", "", found["names"] or found["modules"]).strip("() \t\n")
        prefix = _absolute(found["source"], package) + "." if found["source"] else ""
        for name in names.split(","):
            if name.strip():
                yield Import(prefix + name.split()[0], compiled)


def _absolute(source: str, package: str) -> str:
    """`..a` seen from `package` as an absolute name; absolute names as they are."""
    name = source.lstrip(".")
    dots = len(source) - len(name)
    if not dots:
        return name
    base = package.split(".")[: len(package.split(".")) - (dots - 1)]
    return ".".join([*base, name] if name else base)


def _rank(module: str) -> tuple[int, int, int] | None:
    """(package, floor, place on the floor) of a module in the table, or None."""
    package, _, name = module.partition(".")
    if package in FLOORS and not name:
        return (PACKAGES.index(package), -1, 0)  # the `__init__` lies below all floors
    for floor, row in FLOORS.get(package, {}).items():
        if name in row.split():
            return (PACKAGES.index(package), floor, row.split().index(name))
    return None


def _lower(target: tuple[int, int, int], module: tuple[int, int, int]) -> bool:
    if target[0] == module[0]:
        return target[1:] < module[1:]
    return target[0] < module[0] and target[1] < module[1]


def problems(root: Path) -> list[str]:
    """Every sentence there is to say against the imports of the tree at `root`."""
    found = []
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*")):
            if file.suffix in SOURCES:
                found += [f"{file.relative_to(root)}: {p}" for p in _of_file(root, package, file)]
            elif file.suffix == ".h" and package == "zcache_core":
                found += [f"{file.relative_to(root)}: {p}" for p in _headers(file)]
    return list(dict.fromkeys(found))


def _of_file(root: Path, package: str, file: Path) -> Iterator[str]:
    module = module_of(root, file)
    rank = _rank(module)
    if rank is None:
        yield "has no floor: add it to tests/floors_helpers.py and docs/architecture.md"
        return
    if file.suffix == ".pyx" and not file.with_suffix(".pyi").exists():
        yield "has no .pyi beside it"
    if package == "zcache_core":
        yield from _headers(file)
    for target, compiled in imports(root, file):
        top = target.partition(".")[0]
        if top in FLOORS:
            yield from _inside(root, module, rank, target, compiled)
        elif package == "zcache_core" and top in BANNED_IN_CORE:
            yield f"imports {top}: the core knows no sockets, no nbdkit and no event loop"
        elif not (
            top in OUTSIDE[package]
            or top in sys.stdlib_module_names
            or (file.suffix != ".py" and top in CYTHON_ROOTS)
        ):
            yield f"imports {top}, which is not for {package}"


def _inside(
    root: Path, module: str, rank: tuple[int, int, int], target: str, compiled: bool
) -> Iterator[str]:
    # `from a.b import c`: the module is a.b.c if there is one, else a.b.
    while _rank(target) is None and "." in target:
        target = target.rpartition(".")[0]
    lower = _rank(target)
    assert lower is not None
    if target != module and not _lower(lower, rank):
        yield f"imports {target}, which is not lower"
    source = root.joinpath(*target.split("."))
    if compiled and source.with_suffix(".pyx").exists() and not source.with_suffix(".pxd").exists():
        yield f"cimports {target}, which has no .pxd"


def _headers(file: Path) -> Iterator[str]:
    for line in file.read_text().splitlines():
        if re.match(r"\s*(cdef extern from|#\s*include)", line) and BANNED_HEADERS.search(line):
            yield f"includes a header of sockets or nbdkit: {line.strip()}"
