"""What is served at metrics=: metrics, the state as JSON, and the web page's files.

    /            the page, cluster/web/index.html, and its files beside it
    /metrics     OpenMetrics
    /api/state   the answers of ping, stats, config, health, peers and owners, as one object
    /api/counters  what each counter means: name, unit, kind, help
    /healthz     200 when ok or degraded, 503 when critical; the status in words

The files are read once, at the start: a handful, a few tens of kilobytes.

What it is not: a way to change anything.  The control socket is.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from cluster import addresses, metrics
from cluster.reasons import CRITICAL
from cluster.webserver import Answer, Get, WebServer
from zcache_core.counters import COUNTERS
from zcache_core.errors import ZcacheError

FOLDER = Path(__file__).resolve().parent / "web"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
JSON = "application/json"
RETRY_FIRST_S, RETRY_MAX_S = 1.0, 60.0
log = logging.getLogger("zcache.web")

Look = Callable[[], Awaitable[Mapping[str, Any]]]  # the answers, by method


class WebPages:
    """Answers questions; `look` asks the node's own methods."""

    def __init__(self, look: Look) -> None:
        self._look = look
        self._files = {
            f"/{file.name}": Answer(file.read_bytes(), TYPES[file.suffix])
            for file in sorted(FOLDER.iterdir())
            if file.suffix in TYPES
        }
        self._files["/"] = self._files["/index.html"]
        self._counters = Answer(json.dumps([c._asdict() for c in COUNTERS]).encode(), JSON)

    async def answer(self, get: Get) -> Answer | None:
        """For the web server."""
        match get.path:
            case "/metrics":
                body, kind = metrics.exposition(await self._look(), get.headers.get("accept", ""))
                return Answer(body, kind)
            case "/api/state":
                return Answer(json.dumps(await self._look()).encode(), JSON)
            case "/api/counters":
                return self._counters
            case "/healthz":
                status = (await self._look())["health"]["status"]
                return Answer(f"{status}\n".encode(), status=503 if status == CRITICAL else 200)
        return self._files.get(get.path)


async def serve(address: str, look: Look, bound: Callable[[str], None]) -> None:
    """All of it at HOST:PORT until cancelled; `bound` is told where that is.

    Who else listens there is waited for: the control socket matters more than this.
    """
    wait_s = RETRY_FIRST_S
    while True:
        try:
            sock = addresses.listen("metrics", address)
            break
        except ZcacheError as error:
            log.warning("%s; it is tried again in %.0f s", error, wait_s)
            await asyncio.sleep(wait_s)
            wait_s = min(2 * wait_s, RETRY_MAX_S)
    bound(addresses.bound_address(sock))
    server = WebServer(WebPages(look).answer)
    await server.start(sock)
    try:
        await asyncio.Event().wait()
    finally:
        await server.stop()
