"""One thing that is the matter, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

OK, DEGRADED, CRITICAL = "ok", "degraded", "critical"


@dataclass(frozen=True)
class Reason:
    """`level` (degraded, critical), `what` is the matter, what to `do`: two sentences."""

    level: str
    what: str
    do: str


Stats = Mapping[str, int]
Config = Mapping[str, Any]
Rule = Callable[[Stats, Config], Reason | None]
