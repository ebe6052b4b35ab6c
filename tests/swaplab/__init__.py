"""The swap lab: a real Linux (User Mode Linux) that really swaps onto a server under test.

    with Lab(limit_s=120) as lab:
        server = lab.serve(zcache(size="512M", pool="128M"))
        guest = lab.boot(GuestConfig(mem_mib=128))
        attach(guest, server)
        swap_on(guest)
        result = lab.watch(lambda: hog(guest, 192, corpus), server)
        assert not trouble(result.log)
        assert result.progress().kept_moving()

`lab` ties the parts together; each part stands alone: `network` (namespace, taps, cutting a link),
`servers` (recipes), `host_server` (start, kill, restart), `guest` (boot, run, read, write), `swap`
(attach, swapon, servers inside of the guest), `workloads` (stress-ng, hog), `vmstat` (progress),
`kernel_log` (what is bad news).  It needs root, /dev/net/tun and Debian's user-mode-linux; see
`fitness`.
"""

from . import fitness
from .errors import CommandFailedError, GuestDiedError, LabError, LabTimeoutError, LabUnfitError
from .guest import Guest, GuestConfig, Job
from .guest_link import Exit
from .host_server import HostServer
from .kernel_log import trouble
from .lab import Lab, Result
from .servers import Recipe, nbdkit_memory, stored_bytes, zcache
from .swap import (
    DEVICE,
    OTHER_DEVICE,
    SELF_SERVING_SYSCTL,
    InsideServer,
    attach,
    detach,
    serve_inside,
    swap_off,
    swap_on,
)
from .vmstat import Progress, Sample, progress
from .workloads import HogReport, StressReport, hog, read_hog, read_stress, stress_ng

__all__ = [
    "DEVICE",
    "OTHER_DEVICE",
    "SELF_SERVING_SYSCTL",
    "CommandFailedError",
    "Exit",
    "Guest",
    "GuestConfig",
    "GuestDiedError",
    "HogReport",
    "HostServer",
    "InsideServer",
    "Job",
    "Lab",
    "LabError",
    "LabTimeoutError",
    "LabUnfitError",
    "Progress",
    "Recipe",
    "Result",
    "Sample",
    "StressReport",
    "attach",
    "detach",
    "fitness",
    "hog",
    "nbdkit_memory",
    "progress",
    "read_hog",
    "read_stress",
    "serve_inside",
    "stored_bytes",
    "stress_ng",
    "swap_off",
    "swap_on",
    "trouble",
    "zcache",
]
