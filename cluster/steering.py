"""Changing a running server: the methods `set` and `drain`.

    client -- RPC --> node: checked here -- 16 bytes, pipe --> server's steward
           <- answer - node: sees it in the counters <-- memory file --

The server obeys at once and says so in its counters (high_percent, low_percent,
draining, pool_set_frames, writeback_limit_bytes, allocator, recompress_level,
refused_commands); the answer is given when it has, so what an answer says holds.
What is set is the server's, not ours: a node that is started anew reads it again.  A
smaller pool is reached as pages go down: until then pool_limit_frames is above
pool_set_frames, and `health` says so.

Bound: ANSWER_S for the server to obey; a full pipe is an error at once.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from cluster.link import RpcError
from zcache_core import PAGES_PER_FRAME, commands

ANSWER_S = 3.0  # below a client's patience
LOOK_S = 0.02
PAGE_BYTES = 4096
POOL_BYTES_MIN = 1 << 20  # as pool= at the start
WRITEBACK_LIMIT_BYTES_MIN = 1 << 20  # as writeback_limit= at the start
ALLOCATORS = tuple(PAGES_PER_FRAME)
SETTABLE = (
    "allocator", "recompress", "recompress_age", "pool", "high", "low", "writeback_limit",
)  # fmt: skip
RECOMPRESS = re.compile(r"none|zstd:(1?[0-9])", re.ASCII)
RECOMPRESS_LEVEL_MAX = 19
RECOMPRESS_AGE_S_MAX = 7 * 86400
NO_DISK = (
    "this server has no disk below its pool, so pages have nowhere else to go; "
    "start it with disk=PATH"
)

Stats = Mapping[str, int]


class Steering:
    """`fd` is the pipe's end for writing; `read` reads the counters, `config` is the server's."""

    def __init__(
        self, fd: int | None, read: Callable[[], Stats], config: Mapping[str, Any]
    ) -> None:
        self._fd, self._read, self._config = fd, read, config
        self._changing = asyncio.Lock()  # one change at a time: its answer is its own
        if fd is not None:
            os.set_blocking(fd, False)

    def effective(self) -> dict[str, Any]:
        """What can be changed, under the keys' names, as it is now, and what follows from it."""
        stats = self._read()
        pool = stats["pool_set_frames"] * PAGE_BYTES
        found: dict[str, Any] = {"allocator": ALLOCATORS[stats["allocator"]], "pool": pool}
        level = stats["recompress_level"]
        found["recompress"] = f"zstd:{level}" if level else "none"
        found["recompress_age"] = stats["recompress_age_s"]
        if self._has_disk(stats):
            found |= {"high": stats["high_percent"], "low": stats["low_percent"]}
            found["writeback_limit"] = stats["writeback_limit_bytes"] or None
        if "guaranteed_below" in self._config:
            size = stats["device_pages"] * PAGE_BYTES
            below = 0 if stats["writeback_limit_bytes"] else self._config["guaranteed_below"]
            found["guaranteed"] = min(size, max(pool, below))
        return found

    async def set(self, params: list[Any]) -> dict[str, Any]:
        """set({"pool": bytes, "high": percent, "low": percent, "writeback_limit": bytes or nil}).

        Or some of them, and "allocator": its name, "recompress": zstd:LEVEL or none,
        "recompress_age": seconds; what holds then.

        Watermarks first, then the pool: what cannot be done is refused before anything is.
        Raises RpcError.
        """
        if len(params) != 1 or not isinstance(params[0], dict) or not params[0]:
            raise RpcError("bad_params", 'set takes one map, like {"high": 85, "low": 70}')
        wanted: dict[str, Any] = params[0]
        if unknown := [str(key) for key in wanted if key not in SETTABLE]:
            raise RpcError(
                "bad_params",
                f"{unknown[0]} cannot be set while the server runs; set {', '.join(SETTABLE[:-1])} "
                f"or {SETTABLE[-1]}",
            )
        async with self._changing:
            stats = self._read()
            if "high" in wanted or "low" in wanted:
                marks = self._checked_marks(stats, wanted)
            if "pool" in wanted:
                frames = self._checked_pool(stats, wanted["pool"])
            if "allocator" in wanted:
                number = self._checked_allocator(wanted["allocator"])
            if "recompress" in wanted or "recompress_age" in wanted:
                cold = self._checked_recompress(stats, wanted)
            if "writeback_limit" in wanted:
                limit = self._checked_limit(stats, wanted["writeback_limit"])
                await self._send(
                    commands.writeback_limit(limit),
                    lambda stats: stats["writeback_limit_bytes"] == limit,
                )
            if "high" in wanted or "low" in wanted:
                await self._send(
                    commands.watermarks(*marks),
                    lambda stats: (stats["high_percent"], stats["low_percent"]) == marks,
                )
            if "pool" in wanted:
                await self._send(
                    commands.pool(frames), lambda stats: stats["pool_set_frames"] == frames
                )
            if "allocator" in wanted:
                await self._send(
                    commands.allocator(number), lambda stats: stats["allocator"] == number
                )
            if "recompress" in wanted or "recompress_age" in wanted:
                await self._send(
                    commands.recompress(*cold),
                    lambda stats: (stats["recompress_level"], stats["recompress_age_s"]) == cold,
                )
            holds = self.effective()
            return {key: holds[key] for key in SETTABLE if key in holds}

    def _checked_allocator(self, name: Any) -> int:
        """Its number."""
        if name not in ALLOCATORS:
            raise RpcError(
                "bad_params",
                f"allocator={name} is none; use {', '.join(ALLOCATORS[:-1])} or {ALLOCATORS[-1]}",
            )
        return ALLOCATORS.index(name)

    def _checked_recompress(self, stats: Stats, wanted: Mapping[str, Any]) -> tuple[int, int]:
        """zstd's level (0: none) and the age in seconds."""
        level, age_s = stats["recompress_level"], stats["recompress_age_s"]
        if "recompress" in wanted:
            text = wanted["recompress"]
            match = RECOMPRESS.fullmatch(text) if isinstance(text, str) else None
            level = int(match.group(1) or 0) if match else -1
            if match is None or (match.group(1) and not 1 <= level <= RECOMPRESS_LEVEL_MAX):
                raise RpcError(
                    "bad_params",
                    f"recompress={text} is not possible; use zstd:1 to zstd:{RECOMPRESS_LEVEL_MAX} "
                    f"or none",
                )
        age_s = wanted.get("recompress_age", age_s)
        if type(age_s) is not int or not 1 <= age_s <= RECOMPRESS_AGE_S_MAX:
            raise RpcError(
                "bad_params",
                f"recompress_age={age_s} is no age; use 1 to {RECOMPRESS_AGE_S_MAX} seconds",
            )
        return level, age_s

    def _checked_limit(self, stats: Stats, limit: Any) -> int:
        """Bytes a day, 0 for none."""
        self._need_disk(stats)
        if limit is None:
            return 0
        if type(limit) is not int or not WRITEBACK_LIMIT_BYTES_MIN <= limit < 1 << 63:
            raise RpcError(
                "bad_params",
                f"writeback_limit={limit} is no limit; use at least {WRITEBACK_LIMIT_BYTES_MIN} "
                f"bytes a day, or nil for none",
            )
        return limit

    def _checked_marks(self, stats: Stats, wanted: Mapping[str, Any]) -> tuple[int, int]:
        self._need_disk(stats)
        high = wanted.get("high", stats["high_percent"])
        low = wanted.get("low", stats["low_percent"])
        if type(high) is not int or type(low) is not int or not 0 < low <= high <= 100:
            raise RpcError(
                "bad_params",
                f"high={high} and low={low} are no watermarks; use 0 < low <= high <= 100",
            )
        return high, low

    def _checked_pool(self, stats: Stats, pool: Any) -> int:
        """Frames of a pool limit that can be had; the server decides again, at its moment."""
        most = int(self._config["pool"])
        if type(pool) is not int or pool % PAGE_BYTES or not POOL_BYTES_MIN <= pool <= most:
            raise RpcError(
                "bad_params",
                f"pool={pool} is not possible; use whole pages of {PAGE_BYTES} bytes, from "
                f"{POOL_BYTES_MIN} to {most}, which is the room of the memory file (a larger pool "
                f"needs a restart with a larger pool=)",
            )
        frames = pool // PAGE_BYTES
        persistent = stats["pers_pageframes"]
        if persistent <= frames:
            return frames
        if not self._has_disk(stats):
            raise RpcError("in_use", _in_use(stats))
        if stats["disk_degraded"]:
            raise RpcError(
                "disk_fails",
                f"{(persistent - frames) * PAGE_BYTES} bytes of pages would have to leave RAM, "
                f"and the disk fails ({os.strerror(stats['disk_errno'])}); see to the disk first",
            )
        leaving = stats["pers_zbytes"] * (persistent - frames) // persistent
        room = stats["disk_limit_bytes"] - stats["disk_bytes"]
        if leaving > room:
            raise RpcError(
                "disk_full",
                f"{leaving} bytes of pages would have to leave RAM, and the disk has room for "
                f"{room}; use a larger pool",
            )
        return frames

    async def drain(self, params: list[Any]) -> dict[str, Any]:
        """drain() or drain(true) begins, drain(false) ends; how much is left.  Raises RpcError."""
        if len(params) > 1 or not all(type(value) is bool for value in params):
            raise RpcError("bad_params", "drain takes nothing, true or false")
        on = params[0] if params else True
        self._need_disk(self._read())
        async with self._changing:
            stats = await self._send(commands.drain(on), lambda stats: stats["draining"] == on)
        return {
            "draining": on,
            "pages": stats["pers_zpages"] + stats["eph_zpages"],
            "frames": stats["pers_pageframes"] + stats["eph_pageframes"],
        }

    def _has_disk(self, stats: Stats) -> bool:
        return stats["disk_limit_bytes"] > 0

    def _need_disk(self, stats: Stats) -> None:
        if not self._has_disk(stats):
            raise RpcError("no_disk", NO_DISK)

    async def _send(self, command: bytes, done: Callable[[Stats], bool]) -> Stats:
        """Write a command and wait until the counters show that it was obeyed, or was not."""
        if self._fd is None:
            raise RpcError("no_pipe", "this node was started without a way to its server")
        refused = self._read()["refused_commands"]
        try:
            os.write(self._fd, command)
        except OSError as error:
            raise RpcError("busy", f"the server takes no command now ({error.strerror})") from None
        try:
            async with asyncio.timeout(ANSWER_S):
                while not done(stats := self._read()):
                    if stats["refused_commands"] != refused:
                        raise RpcError("in_use", _in_use(stats))
                    await asyncio.sleep(LOOK_S)
        except TimeoutError:
            raise RpcError(
                "busy", f"the server has not obeyed within {ANSWER_S:.0f} s; it will when it can"
            ) from None
        return stats


def _in_use(stats: Stats) -> str:
    used = (stats["pers_pageframes"] + stats["eph_pageframes"]) * PAGE_BYTES
    return (
        f"{used} bytes of the pool are in use and there is no disk for their pages to go to; use "
        f"at least that"
    )
