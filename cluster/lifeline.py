"""Whether somebody mends the connection of the device that is attached to this server.

    RUNTIME/NAME.attach    locked by the attach helper, and by its spare when that one is dead
    /sys/block/nbdN/backend  whose device it is, as the kernel says

Nothing is locked here, or who attaches just then would be refused: /proc/locks says whose it is.

What it is not: a proof that the helper does its work; and it knows of devices attached under the
server's own name on this machine, no others.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path

SYSFS = Path("/sys/block")
LOCKS = Path("/proc/locks")


def unmended(page: Path) -> str | None:
    """The attached device (/dev/nbdN) with neither helper nor spare; None: there is none such."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        with open(page, "rb") as file:
            about, text = os.fstat(file.fileno()), file.read()
        device = str(json.loads(text).get("device", ""))
        if _is_attached(device, page) and not _is_locked(about):
            return device
    return None


def _is_attached(device: str, page: Path) -> bool:
    folder = SYSFS / device.removeprefix("/dev/")
    backend = (folder / "backend").read_text().strip()
    return (folder / "pid").exists() and backend == f"zcache:{page.with_suffix('')}"


def _is_locked(about: os.stat_result) -> bool:
    device = f"{os.major(about.st_dev):02x}:{os.minor(about.st_dev):02x}:{about.st_ino}"
    lines = (line.split() for line in LOCKS.read_text().splitlines())
    return any("FLOCK" in words and device in words for words in lines)
