"""A small HTTP server for asyncio: GET and HEAD, one answer a connection, every wait bounded.

    connection -> head (at most HEAD_BYTES, within HEAD_S) -> answer(Get) -> Answer -> close

It exists so that metrics and the web page need neither threads nor a framework in the
node process.  What it cannot read is answered with 400, another method with 405, a path
that `answer` does not know with 404, and one connection too many with 503.

Bound: CONNECTIONS at once; each ends HEAD_S + ANSWER_S + WRITE_S after it came.

Source: RFC 9112 (HTTP/1.1).  What it is not: for other machines than those who may know
how the server is doing; it has no TLS and no passwords, and changes nothing.
"""

from __future__ import annotations

import asyncio
import http
import logging
import re
import socket
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from cluster.connections import Connections

CONNECTIONS = 32
HEAD_BYTES = 8192
HEAD_S, ANSWER_S, WRITE_S = 5.0, 10.0, 10.0
HEADERS = {
    "Connection": "close",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data:; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
REQUEST = re.compile(r"([A-Z]{1,20}) (/[!-~]{0,2000}) HTTP/1\.[01]")
log = logging.getLogger("zcache.web")


@dataclass(frozen=True)
class Get:
    """A question: the path without what follows a '?', and its header fields in small letters."""

    path: str
    headers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """`body` as it is sent; `content_type` with its charset."""

    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    status: int = 200


Answerer = Callable[[Get], Awaitable[Answer | None]]  # None: there is nothing at that path


class WebServer(Connections):
    """Answers on one listening socket, through `answer`."""

    def __init__(self, answer: Answerer) -> None:
        super().__init__()
        self._answer = answer

    async def start(self, sock: socket.socket) -> None:
        """Serve on this socket until `stop`."""
        self._server = await asyncio.start_server(self._accept, sock=sock, limit=HEAD_BYTES)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        serve = self._serve if len(self._tasks) < CONNECTIONS else self._turn_away
        self._run(serve(reader, writer))

    async def _turn_away(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _write(writer, _error(503), False)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(HEAD_S):
                head = await reader.readuntil(b"\r\n\r\n")
        except (TimeoutError, OSError, asyncio.IncompleteReadError):
            writer.transport.abort()
            return
        except asyncio.LimitOverrunError:
            await _write(writer, _error(431), False)
            return
        method, get = read_head(head)
        await _write(writer, await self._found(method, get), method == "HEAD")

    async def _found(self, method: str, get: Get | None) -> Answer:
        if get is None:
            return _error(400)
        if method not in ("GET", "HEAD"):
            return _error(405)
        try:
            async with asyncio.timeout(ANSWER_S):
                return await self._answer(get) or _error(404)
        except Exception:  # ours to mend, not the asker's to see
            log.exception("no answer to %s", get.path)
            return _error(500)


def read_head(head: bytes) -> tuple[str, Get | None]:
    """Method and question of a request's head; None when it is no HTTP."""
    first, *rest = head.decode("latin-1").split("\r\n")
    match = REQUEST.fullmatch(first)
    if match is None:
        return "", None
    fields = (line.partition(":") for line in rest if line)
    headers = {name.strip().lower(): value.strip() for name, _, value in fields}
    return match[1], Get(match[2].partition("?")[0], headers)


def _error(status: int) -> Answer:
    return Answer(f"{status} {http.HTTPStatus(status).phrase}\n".encode(), status=status)


async def _write(writer: asyncio.StreamWriter, answer: Answer, head_only: bool) -> None:
    """Send an answer and close; who does not read it loses the connection."""
    headers = {
        "Content-Type": answer.content_type,
        "Content-Length": str(len(answer.body)),
        **HEADERS,
    }
    lines = [f"HTTP/1.1 {answer.status} {http.HTTPStatus(answer.status).phrase}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    writer.write("\r\n".join([*lines, "", ""]).encode() + (b"" if head_only else answer.body))
    try:
        async with asyncio.timeout(WRITE_S):
            await writer.drain()
            writer.close()
            await writer.wait_closed()
    except (TimeoutError, OSError):
        writer.transport.abort()
