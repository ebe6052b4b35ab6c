"""A swap area: which there are, whether one can be taken back, made, switched on and off.

    areas()            /proc/swaps as data
    room_to_return()   pages to take back against memory and other swap that could hold them
    make, enable       mkswap, swapon with discard and priority
    disable            swapoff in a process of its own, watched, and interruptible

swapoff is a child so that it can be told to stop (SIGINT: the kernel ends it between two pages
and the area is on again), and so that the OOM killer, if it comes to that, takes the child,
which the kernel offers it first, and not the one who tells about it.

Linux: swapon(2), proc(5), mm/swapfile.c.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from zcache_core.errors import AttachError
from zcache_core.process import PR_SET_PDEATHSIG

SWAPS, MEMINFO = Path("/proc/swaps"), Path("/proc/meminfo")
TOOLS_PATH = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
TOOL_S = 120.0
LOOK_S = 0.2
# What has to stay free while pages come back: a part of RAM, and never less than this.
MARGIN_BYTES_MIN, MARGIN_SHARE = 16 << 20, 64
WAITING = "Invalid argument"  # what swapoff says when another one is at work on the area


class Area(NamedTuple):
    """One line of /proc/swaps."""

    path: str
    size_bytes: int
    used_bytes: int
    priority: int


class Room(NamedTuple):
    """What comes back, and what there is for it: memory, and free space in other swap areas."""

    needed_bytes: int
    memory_bytes: int
    other_swap_bytes: int

    @property
    def missing_bytes(self) -> int:
        """0 when it fits."""
        return max(0, self.needed_bytes - self.memory_bytes - self.other_swap_bytes)


def areas(text: str | None = None) -> list[Area]:
    """All swap areas; `text` instead of /proc/swaps."""
    lines = (SWAPS.read_text() if text is None else text).splitlines()[1:]
    found = []
    for line in lines:
        # A file's name may have blanks, written \040; and one that is deleted says so behind it.
        words = line.split()
        path = words[0].encode().decode("unicode_escape")
        size_kb, used_kb, priority = words[-3:]
        found.append(Area(path, int(size_kb) << 10, int(used_kb) << 10, int(priority)))
    return found


def find(device: str) -> Area | None:
    """The area on this device, when it is on."""
    return next((area for area in areas() if area.path == device), None)


def room_to_return(area: Area, others: list[Area], meminfo: str | None = None) -> Room:
    """Whether what is out on `area` fits into memory and the other areas.

    Not counted is what a pool on this very machine gives back: that comes late, when whole
    clusters of pages have become free.
    """
    text = MEMINFO.read_text() if meminfo is None else meminfo
    kb = {line.split(":")[0]: int(line.split()[1]) for line in text.splitlines() if ":" in line}
    margin = max(MARGIN_BYTES_MIN, (kb["MemTotal"] << 10) // MARGIN_SHARE)
    in_memory_too = min(area.used_bytes, kb.get("SwapCached", 0) << 10)
    free = sum(other.size_bytes - other.used_bytes for other in others if other != area)
    return Room(area.used_bytes - in_memory_too, max(0, (kb["MemAvailable"] << 10) - margin), free)


def make(device: str) -> None:
    """mkswap.  Raises AttachError."""
    _run("mkswap", device)


def enable(device: str, priority: int) -> None:
    """swapon with discard (at once, and of what is freed later).  Raises AttachError."""
    _run("swapon", "--discard", "--priority", str(priority), device)


def disable(device: str, watch: Callable[[int], None]) -> None:
    """swapoff.  `watch` is told five times a second how many bytes are still out.

    KeyboardInterrupt ends it with the area on.  Raises AttachError, also when the kernel gave up.
    """
    child = subprocess.Popen(
        [_tool("swapoff"), device],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=_end_with_parent,
        text=True,
    )
    try:
        while child.poll() is None:
            if (area := find(device)) is not None:
                watch(area.used_bytes)
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(LOOK_S)
    except BaseException:
        child.send_signal(signal.SIGINT)
        child.wait()
        raise
    finally:
        said = child.stderr.read().strip() if child.stderr else ""
    if find(device) is None:
        return
    if WAITING in said:
        _wait_for_another(device, watch)
        return
    why = "the kernel ended it to get memory back" if child.returncode < 0 else said
    raise AttachError(f"{device} could not be switched off ({why}); it is still on")


def _wait_for_another(device: str, watch: Callable[[int], None]) -> None:
    """Somebody else's swapoff of it is at work: watch that one, as long as it moves."""
    least, moved_s = -1, time.monotonic()
    while (area := find(device)) is not None:
        watch(area.used_bytes)
        if least < 0 or area.used_bytes < least:
            least, moved_s = area.used_bytes, time.monotonic()
        elif time.monotonic() - moved_s > TOOL_S:
            raise AttachError(f"another swapoff of {device} does not end; look after that one")
        time.sleep(LOOK_S)


def _end_with_parent() -> None:
    """In the child: a `zcache down` that is killed must not leave a swapoff behind."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _tool(name: str) -> str:
    path = shutil.which(name, path=TOOLS_PATH)
    if path is None:
        raise AttachError(f"{name} is not installed; apt install util-linux")
    return path


def _run(name: str, *words: str) -> None:
    try:
        done = subprocess.run(
            [_tool(name), *words], capture_output=True, text=True, timeout=TOOL_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise AttachError(
            f"{name} {' '.join(words)} has not ended in {TOOL_S} s; look whether the server answers"
        ) from error
    if done.returncode:
        raise AttachError(f"{name} {' '.join(words)}: {done.stderr.strip()}")
