"""Changing a running server: the methods `set` and `drain`.

    client -- RPC --> node: checked here -- 16 bytes, pipe --> server's cooling thread
           <- answer - node: sees it in the counters <-- memory file --

The server obeys within about 0.1 s and says so in its counters (high_percent,
low_percent, draining); the answer is given when it has, so what an answer says holds.
What is set is the server's, not ours: a node that is started anew reads it again.

Bound: ANSWER_S for the server to obey; a full pipe is an error at once.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping
from typing import Any

from cluster.link import RpcError
from zcache_core import commands

ANSWER_S = 3.0  # below a client's patience; a disk that stalls keeps the server from its pipe
LOOK_S = 0.02
NO_DISK = (
    "this server has no disk below its pool, so pages have nowhere else to go; "
    "start it with disk=PATH"
)

Stats = Mapping[str, int]


class Steering:
    """`fd` is the pipe's end for writing, None without a disk; `read` reads the counters."""

    def __init__(self, fd: int | None, read: Callable[[], Stats]) -> None:
        self._fd, self._read = fd, read
        if fd is not None:
            os.set_blocking(fd, False)

    def effective(self) -> dict[str, Any]:
        """What can be changed, under the keys' names, as it is now; nothing without a disk."""
        if self._fd is None:
            return {}
        stats = self._read()
        return {"high": stats["high_percent"], "low": stats["low_percent"]}

    async def set(self, params: list[Any]) -> dict[str, Any]:
        """set({"high": percent, "low": percent}), or one of them; what holds then.  RpcError."""
        if len(params) != 1 or not isinstance(params[0], dict) or not params[0]:
            raise RpcError("bad_params", 'set takes one map, like {"high": 85, "low": 70}')
        self._need_disk()
        wanted = self.effective() | params[0]
        if unknown := [str(key) for key in wanted if key not in ("high", "low")]:
            raise RpcError(
                "bad_params", f"{unknown[0]} cannot be set while the server runs; set high or low"
            )
        high, low = wanted["high"], wanted["low"]
        if type(high) is not int or type(low) is not int or not 0 < low <= high <= 100:
            raise RpcError(
                "bad_params",
                f"high={high} and low={low} are no watermarks; use 0 < low <= high <= 100",
            )
        await self._send(
            commands.watermarks(high, low),
            lambda stats: (stats["high_percent"], stats["low_percent"]) == (high, low),
        )
        return self.effective()

    async def drain(self, params: list[Any]) -> dict[str, Any]:
        """drain() or drain(true) begins, drain(false) ends; how much is left.  Raises RpcError."""
        if len(params) > 1 or not all(type(value) is bool for value in params):
            raise RpcError("bad_params", "drain takes nothing, true or false")
        on = params[0] if params else True
        self._need_disk()
        stats = await self._send(commands.drain(on), lambda stats: stats["draining"] == on)
        return {
            "draining": on,
            "pages": stats["pers_zpages"] + stats["eph_zpages"],
            "frames": stats["pers_pageframes"] + stats["eph_pageframes"],
        }

    def _need_disk(self) -> None:
        if self._fd is None:
            raise RpcError("no_disk", NO_DISK)

    async def _send(self, command: bytes, done: Callable[[Stats], bool]) -> Stats:
        """Write a command and wait until the counters show that it was obeyed."""
        assert self._fd is not None
        try:
            os.write(self._fd, command)
        except OSError as error:
            raise RpcError("busy", f"the server takes no command now ({error.strerror})") from None
        try:
            async with asyncio.timeout(ANSWER_S):
                while not done(stats := self._read()):
                    await asyncio.sleep(LOOK_S)
        except TimeoutError:
            raise RpcError(
                "busy",
                f"the server has not obeyed within {ANSWER_S:.0f} s, its disk may stall; it will "
                f"when it can",
            ) from None
        return stats
