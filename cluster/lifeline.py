"""Whether somebody mends the connection of the device that is attached to this server.

    RUNTIME/NAME.attach      the attach helper's page: who it is, and its spare
    /sys/block/nbdN/backend  whose device it is, as the kernel says

Nothing is locked here, or who attaches just then would be refused.

What it is not: a proof that the helper does its work; and it knows of devices attached under the
server's own name on this machine, no others.  In the moment in which a spare goes on it may say
that nobody is there.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

from zcache_core.owner import start_ticks

SYSFS = Path("/sys/block")


def unmended(page: Path) -> str | None:
    """The attached device (/dev/nbdN) with neither helper nor spare; None: there is none such."""
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        said = json.loads(page.read_bytes())
        device = str(said.get("device", ""))
        if _is_attached(device, page) and not _is_mended(said):
            return device
    return None


def backend(page: Path) -> str:
    """The text by which the kernel knows whose a device is."""
    return f"zcache:{page.with_suffix('')}"


def mender_pid(said: dict[str, Any]) -> int:
    """The helper's process, if the one that the page tells of is still it; else 0."""
    pid = int(said.get("pid", 0))
    return pid if pid and start_ticks(pid) == said.get("start_ticks") else 0


def _is_attached(device: str, page: Path) -> bool:
    folder = SYSFS / device.removeprefix("/dev/")
    is_ours = (folder / "backend").read_text().strip() == backend(page)
    return is_ours and (folder / "pid").exists()


def _is_mended(said: dict[str, Any]) -> bool:
    spare = int(said.get("spare_pid", 0))
    return bool(mender_pid(said)) or (spare > 0 and Path(f"/proc/{spare}").exists())
