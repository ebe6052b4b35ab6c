"""The connections of one listening server: a task each, ended all at once."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any


class Connections:
    """What every server has; a subclass listens (`_server`) and says what a connection does."""

    def __init__(self) -> None:
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def _run(self, conversation: Coroutine[Any, Any, None]) -> None:
        """One connection more, until this ends."""
        task = asyncio.get_running_loop().create_task(conversation)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def stop(self) -> None:
        """Close the socket and every connection; answers under way are lost."""
        if self._server is not None:
            self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
