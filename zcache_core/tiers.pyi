from collections.abc import Callable
from typing import Any, TypeVar

from zcache_core.peertier import PeerTier
from zcache_core.store import Store

W = TypeVar("W")

class Cooling:
    def __init__(
        self,
        store: Store,
        fd: int = -1,
        disk_bytes: int = 0,
        preallocated: bool = False,
        high: int = 90,
        low: int = 80,
        encrypt: bool = False,
        writeback_limit: int = 0,
        peers: PeerTier | None = None,
        backup: bool = False,
        found_bytes: int = 0,
    ) -> None: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...
    def wrap_disk(self, wrapper: Callable[[Any], W]) -> W: ...
    def wrap(self, wrapper: Callable[[Any], W]) -> W: ...
    def set_watermarks(self, high: int, low: int) -> None: ...
    def drain(self, on: bool = True) -> None: ...
    @property
    def reason(self) -> int: ...
