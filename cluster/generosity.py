"""How much a donor may lend now: less when its own machine needs the memory.

    stalled for memory 10 % of a second   -> take nothing new; 5 % of the limit less, to 0
    calm for 10 s                         -> 2 % more, each second, until all is back

A step down first stops the offer, and what lies above the target is then asked back (recall)
in batches: the owner decides when a page goes, so nothing is lost, and nobody is hurried who
does not answer.  Measured as the steward does it (zcache_core/pressure.pyx): the kernel's PSI,
and where there is none, less than a sixteenth of the memory available.

Bound: one read of a small file a second.  No sockets, no clock: `look` is called each second.
"""

from __future__ import annotations

import contextlib
from pathlib import Path

PSI = Path("/proc/pressure/memory")
MEMINFO = Path("/proc/meminfo")
DOWN_PERMILLE, UP_PERMILLE = 50, 20
CALM_S = 10
STALL_SHARE = 10  # pressure: stalled more than one part in so many of the time
AVAILABLE_SHARE = 16


class Generosity:
    """`permille` of the limit may be used now; `is_short`: nothing new at the moment."""

    def __init__(self, psi: Path = PSI, meminfo: Path = MEMINFO) -> None:
        self._psi, self._meminfo = psi, meminfo
        self._stalled_us = self._read_stalled()
        self._calm_s = CALM_S
        self.permille = 1000

    @property
    def is_short(self) -> bool:
        return self._calm_s < CALM_S

    def look(self, seconds: float = 1.0) -> None:
        """Once a second (or after so many): what happened since the last look?"""
        if self._is_pressed(seconds):
            self._calm_s = 0
            self.permille = max(0, self.permille - DOWN_PERMILLE)
        elif self._calm_s < CALM_S:
            self._calm_s += 1
        else:
            self.permille = min(1000, self.permille + UP_PERMILLE)

    def _is_pressed(self, seconds: float) -> bool:
        before, self._stalled_us = self._stalled_us, self._read_stalled()
        if self._stalled_us is not None and before is not None:
            return self._stalled_us - before > seconds * 1e6 / STALL_SHARE
        return self._available_is_low()

    def _read_stalled(self) -> int | None:
        """Microseconds since the system's start in which some task stalled; None without PSI."""
        with contextlib.suppress(OSError, ValueError, IndexError):
            line = self._psi.read_text().partition("\n")[0]
            return int(line.rpartition("total=")[2])
        return None

    def _available_is_low(self) -> bool:
        with contextlib.suppress(OSError, ValueError, KeyError, IndexError):
            rows = dict(line.split(":", 1) for line in self._meminfo.read_text().splitlines())
            total, available = (int(rows[k].split()[0]) for k in ("MemTotal", "MemAvailable"))
            return available * AVAILABLE_SHARE < total
        return False
