import asyncio
from typing import Any

from cluster.lane import LaneEnd

class PutLane(LaneEnd):
    def begin_put(
        self, future: asyncio.Future[Any], records: bytes, payload: bytes
    ) -> int | None: ...
    def forget_put(self, msgid: int) -> None: ...
    def end_puts(self, error: Exception) -> None: ...
