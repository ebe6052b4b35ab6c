from zcache_core.store import Store
from zcache_core.tiers import Cooling

SYSTEM_WIDE: str
MEMINFO: str

class Steward:
    def __init__(
        self,
        store: Store,
        cooling: Cooling | None = None,
        command_fd: int = -1,
        pressure: str = "none",
        pace: int = 1,
        meminfo: str = MEMINFO,
    ) -> None: ...
    def start(self) -> None: ...
    def stop(self) -> None: ...
