"""Is this machine fit to swap onto zcache: one small look at one thing each.

Each look returns a Finding: `ok`, `note` (works, but know this) or `todo` (will not
work, or not survive pressure, until it is done), with a sentence on what to do.
Nothing is changed here, except by `remove_leftovers`, when asked.

What it is not: a look at a running server; that is the RPC's `health`.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

OK, NOTE, TODO = "ok", "note", "todo"
NBDKIT_S = 20.0
# Address space counts, not what is touched: nbdkit's tables have 192 MiB, and each of
# the 16 threads of a connection has a stack of 8 MiB.  The pool comes on top.
LOCK_BYTES_MIN = 512 << 20
# linux/capability.h
CAPABILITIES = {
    "CAP_IPC_LOCK": (14, "locking memory"),
    "CAP_SYS_NICE": (23, "real-time priority"),
    "CAP_SYS_RESOURCE": (24, "the OOM exemption and PR_SET_IO_FLUSHER"),
}
CAP_SYS_ADMIN = 21


class Finding(NamedTuple):
    """`level` is ok, note or todo; `do` is empty when there is nothing to do."""

    level: str
    subject: str
    what: str
    do: str = ""


def nbdkit_present() -> Finding:
    if shutil.which("nbdkit") is None:
        return Finding(TODO, "nbdkit", "not installed", "apt install nbdkit nbdkit-plugin-python")
    try:
        done = subprocess.run(
            ["nbdkit", "--dump-plugin", "python"], capture_output=True, text=True, timeout=NBDKIT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Finding(TODO, "nbdkit", f"does not run ({error})", "reinstall nbdkit")
    fields = dict(line.partition("=")[::2] for line in done.stdout.splitlines())
    if done.returncode != 0 or "python_version" not in fields:
        return Finding(TODO, "nbdkit", "has no python plugin", "apt install nbdkit-plugin-python")
    python = fields["python_version"]
    ours = f"{sys.version_info.major}.{sys.version_info.minor}"
    if python.split(".")[:2] != ours.split("."):
        return Finding(
            TODO,
            "nbdkit",
            f"embeds Python {python}, the core is built for {ours}",
            "use Debian's nbdkit and /usr/bin/python3: 'make clean', then 'make setup'",
        )
    return Finding(OK, "nbdkit", f"{fields.get('version', '?')} with Python {python}")


def core_built() -> Finding:
    try:
        import zcache_core.store  # noqa: F401
    except ImportError as error:
        return Finding(TODO, "compiled core", f"cannot be imported ({error})", "run 'make setup'")
    return Finding(OK, "compiled core", "built")


def lockable_memory() -> Finding:
    if has_capability(CAPABILITIES["CAP_IPC_LOCK"][0]):
        return Finding(OK, "memory lock", "no limit (CAP_IPC_LOCK)")
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if soft == resource.RLIM_INFINITY or soft >= LOCK_BYTES_MIN:
        what = "no limit" if soft == resource.RLIM_INFINITY else f"{soft >> 20} MiB"
        return Finding(
            NOTE, "memory lock", what, f"the pool counts too: {grant('CAP_IPC_LOCK', 'the server')}"
        )
    return Finding(
        TODO,
        "memory lock",
        f"only {soft >> 10} KiB may be locked, the server would be swapped onto itself",
        f"raise LimitMEMLOCK= (ulimit -l), or {grant('CAP_IPC_LOCK', 'the server')}",
    )


def capabilities() -> Finding:
    missing = [name for name, (bit, _) in CAPABILITIES.items() if not has_capability(bit)]
    if missing:
        what = ", ".join(f"{name} ({CAPABILITIES[name][1]})" for name in missing)
        return Finding(
            TODO, "capabilities", f"without {what}", grant(", ".join(missing), "the server")
        )
    return Finding(OK, "capabilities", "all that the server wants")


def grant(names: str, what: str) -> str:
    """What to do about missing capabilities: root without them is root in a container."""
    if os.geteuid() != 0:
        return f"run {what} as root, or grant {names}"
    return (
        f"root lacks {names} here (a container, or a unit's CapabilityBoundingSet=): grant it "
        f"there (docker: --cap-add), or run {what} outside"
    )


def nbd_module() -> Finding:
    if Path("/sys/module/nbd").exists():
        return Finding(OK, "kernel nbd", "loaded")
    release = os.uname().release
    listing = Path(f"/lib/modules/{release}/modules.builtin")
    for path in (listing, listing.with_name("modules.dep")):
        if path.exists() and "/nbd.ko" in path.read_text(errors="replace"):
            return Finding(OK, "kernel nbd", "available", "")
    return Finding(
        TODO,
        "kernel nbd",
        f"kernel {release} has no nbd module here",
        "boot a kernel that has one (Debian's do); serving works without, swapping does not",
    )


def nbd_client_present() -> Finding:
    if shutil.which("nbd-client", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"):
        return Finding(OK, "nbd-client", "installed")
    return Finding(TODO, "nbd-client", "not installed", "apt install nbd-client")


def pressure_information() -> Finding:
    if Path("/proc/pressure/memory").exists():
        return Finding(OK, "pressure (PSI)", "available")
    return Finding(
        NOTE, "pressure (PSI)", "not available", "boot with psi=1 to see memory pressure"
    )


def reclaim_settings() -> Finding:
    """What a machine that serves its own swap needs; measured, see the documentation."""
    boost = _sysctl("vm/watermark_boost_factor")
    free_kbytes = _sysctl("vm/min_free_kbytes")
    todo = []
    if boost not in (None, 0):
        todo.append("vm.watermark_boost_factor=0")
    if free_kbytes is not None and free_kbytes < 16384:
        todo.append("vm.min_free_kbytes=16384")
    if not todo:
        return Finding(OK, "reclaim settings", "fit for swapping onto the same machine")
    return Finding(
        NOTE,
        "reclaim settings",
        "not those that swapping onto the same machine wants",
        f"sysctl -w {' '.join(todo)}",
    )


def leftover_memory() -> list[Finding]:
    """Memory files that killed servers left, one Finding each."""
    from zcache_core import memfile

    return [
        Finding(
            NOTE,
            "leftover",
            f"memory file {row.name or 'without a name'} (segment {row.shmid}, user {row.uid}), "
            f"{row.resident_bytes >> 20} MiB of RAM, used by nobody",
            _go_on_with(row.name) + f"'zcache check --remove-leftovers {row.shmid}'",
        )
        for row in memfile.leftovers()
    ]


def _go_on_with(name: str) -> str:
    """What else can be done with a leftover than to remove it: nobody finds one without a name."""
    if not name:
        return "remove it with "
    return (
        f"start a server with memory={name} (or, if it lent, 'zcache node --memory {name}') to go "
        f"on with its pages, or remove it with "
    )


def remove_leftovers(
    wanted: Sequence[str] = (), needed_by: Callable[[str], str] = lambda name: ""
) -> list[Finding]:
    """Remove those that we may; their pages are lost.  One Finding for each.

    `wanted`: only those of these names or segment numbers; each of these has a Finding, too.
    `needed_by`: who needs the memory file of that name, "" if nobody does.
    """
    from zcache_core import memfile
    from zcache_core.errors import MemoryFileError

    rows = memfile.leftovers()
    known = {key for row in rows for key in (row.name, str(row.shmid))}
    found = [
        Finding(TODO, "leftover", f"{key} is none", "see 'zcache check' for those there are")
        for key in wanted
        if key not in known
    ]
    for row in rows:
        if wanted and row.name not in wanted and str(row.shmid) not in wanted:
            continue
        name = f"memory file {row.name or 'without a name'} (segment {row.shmid})"
        if row.name and (holder := needed_by(row.name)):
            found.append(
                Finding(TODO, "leftover", f"{name} is needed by {holder}", "end that first")
            )
            continue
        try:
            memfile.remove(row.shmid)
        except MemoryFileError as error:
            found.append(Finding(TODO, "leftover", f"{name}: {error}", "try as that user"))
        else:
            found.append(Finding(OK, "leftover", f"{name} removed"))
    return found


LOOKS: tuple[Callable[[], Finding], ...] = (
    nbdkit_present,
    core_built,
    nbd_module,
    nbd_client_present,
    lockable_memory,
    capabilities,
    pressure_information,
    reclaim_settings,
)


def has_capability(bit: int) -> bool:
    """Whether this process has the capability in effect."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return bool(int(line.split()[1], 16) >> bit & 1)
    return False


def _sysctl(name: str) -> int | None:
    try:
        return int(Path("/proc/sys", name).read_text())
    except (OSError, ValueError):
        return None
