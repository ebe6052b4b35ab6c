"""Is this machine able to boot a guest, and with which files?

One place that knows Debian's paths.  `missing()` answers in sentences that say what to do, so that
a test can fail (or a demo end) with something to act on; nothing here starts a guest.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from functools import cache
from pathlib import Path

from .errors import LabUnfitError

PACKAGES = {
    "linux": "user-mode-linux",
    "nbdkit": "nbdkit",
    "nbd-client": "nbd-client",
    "busybox": "busybox-static",
    "ip": "iproute2",
    "stress-ng": "stress-ng",
    "nbdinfo": "libnbd-bin",
    "gcc": "gcc",
    "nsenter": "util-linux",
    "setarch": "util-linux",
    "mkswap": "util-linux",
}
"""Command -> Debian package that has it."""

MODULES = Path("/usr/lib/uml/modules")
SYSTEM_PATH = os.pathsep.join(
    (os.environ.get("PATH", ""), "/usr/local/sbin", "/usr/sbin", "/sbin", "/usr/bin", "/bin")
)


def tool(name: str) -> str:
    """Full path of a command of PACKAGES.  Raises LabUnfitError if it is not there."""
    path = shutil.which(name, path=SYSTEM_PATH)
    if path is None:
        raise LabUnfitError(f"{name} is missing: apt-get install {PACKAGES.get(name, name)}")
    return path


def missing() -> list[str]:
    """What keeps this machine from running the lab, as sentences; empty when it can."""
    reasons = []
    absent = sorted({p for c, p in PACKAGES.items() if shutil.which(c, path=SYSTEM_PATH) is None})
    if absent:
        reasons.append(f"apt-get install {' '.join(absent)}")
    if os.geteuid() != 0:
        reasons.append("run as root: the lab makes a network namespace and a tap device")
    elif not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        reasons.append(
            "/dev/net/tun is missing or closed: modprobe tun, or start the container with it"
        )
    if not absent and not (MODULES / kernel_version()).is_dir():
        reasons.append(f"{MODULES / kernel_version()} is missing: reinstall user-mode-linux")
    return reasons


def require() -> None:
    """Raises LabUnfitError with everything `missing` found."""
    reasons = missing()
    if reasons:
        raise LabUnfitError("the swap lab cannot run here: " + "; ".join(reasons))


@cache
def kernel_version() -> str:
    """Version of the guest's kernel, e.g. 6.1.176."""
    run = subprocess.run([tool("linux"), "--version"], capture_output=True, text=True, check=True)
    return run.stdout.split()[0]


def module(name: str) -> Path:
    """The file of a module of the guest's kernel, e.g. "nbd" or "zram".  Raises LabUnfitError."""
    found = sorted((MODULES / kernel_version()).rglob(f"{name}.ko"))
    if not found:
        raise LabUnfitError(f"the guest's kernel {kernel_version()} has no module {name}")
    return found[0]
