"""An event loop whose clock is simulated: what would wait, jumps.

    select(timeout) -> the clock is timeout later, at once

Everything that runs in it is one thread and asks this clock, so a run from a seed is the
same run every time, and an hour takes as long as what happens in it.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Jump(selectors.SelectSelector):
    """Never waits; tells the loop how far it would have."""

    loop: SimLoop

    def select(self, timeout: float | None = None) -> list[Any]:
        if timeout is None:
            raise RuntimeError("the simulation waits for something that never comes")
        self.loop.now_s += max(0.0, timeout)
        return []


class SimLoop(asyncio.SelectorEventLoop):
    """`now_s` is the simulated time, from 0."""

    def __init__(self) -> None:
        self.now_s = 0.0
        selector = _Jump()
        selector.loop = self
        super().__init__(selector)

    def time(self) -> float:
        return self.now_s


def run(work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, on a loop of its own; an error in any task of it is an error."""
    loop = SimLoop()
    errors: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _, context: errors.append(context))
    try:
        result = loop.run_until_complete(work)
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()
    assert not errors, errors
    return result
