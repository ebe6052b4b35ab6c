from typing import Any

class FaultyTier:
    capsule: Any
    def __init__(self, below: Any, seed: int = 0) -> None: ...
    def set(
        self,
        *,
        put_fail: int = 0,
        put_errno: int = 5,
        get_fail: int = 0,
        get_errno: int = 5,
        put_delay_us: int = 0,
        get_delay_us: int = 0,
        spoil: int = 0,
        lose: int = 0,
        many_delay_us: int = 0,
        adopt_delay_us: int = 0,
    ) -> None: ...
    def counts(self) -> dict[str, int]: ...
    def lost(self) -> dict[int, int]: ...
