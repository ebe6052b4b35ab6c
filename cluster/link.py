"""Sockets around a session: the asyncio server and client, and a blocking client.

    Server --- connection 1: Session + reader task + at most `in_flight` answers
           \\-- connection 2: ...
           (at most `connections`; one more is closed at once)

Every wait has an end: a peer that sends nothing, half a message, or does not
read its answers loses its own connection and nothing else.  A method that takes
too long is answered with an error.

What it is not: it knows no method; those come in as one async function.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.connections import Connections
from cluster.session import DONE, PAUSED, Session
from cluster.wire import (
    DEFAULT_LIMITS,
    NEED_DATA,
    EncodeError,
    Limits,
    Notification,
    Request,
    Response,
    WireError,
)
from zcache_core.errors import ControlError

READ_BYTES = 64 * 1024
log = logging.getLogger("zcache.link")


class RpcError(ControlError):
    """A method's own failure, as it goes over the wire: a code word and a sentence."""

    def __init__(self, code: str, sentence: str) -> None:
        super().__init__(code, sentence)
        self.code, self.sentence = code, sentence

    def __str__(self) -> str:
        return self.sentence

    def as_wire(self) -> dict[str, str]:
        return {"code": self.code, "message": self.sentence}

    @classmethod
    def from_wire(cls, error: Any) -> RpcError:
        """Any error object, also of a server that is not ours."""
        if isinstance(error, dict) and isinstance(error.get("message"), str):
            return cls(str(error.get("code", "error")), error["message"])
        return cls("error", str(error))


@dataclass(frozen=True)
class LinkOptions:
    """Bounds of a server.  Times in seconds."""

    limits: Limits = field(default=DEFAULT_LIMITS)
    connections: int = 32
    in_flight: int = 16  # of one connection
    idle_s: float = 300.0  # without a message, and nothing owed
    frame_s: float = 10.0  # from the first byte of a message to its last
    answer_s: float = 10.0  # for a method
    write_s: float = 10.0  # until the peer has taken an answer


Dispatch = Callable[[str, list[Any]], Awaitable[Any]]


class Server(Connections):
    """Answers RPC on a listening socket; `dispatch(method, params)` gives the result."""

    def __init__(self, dispatch: Dispatch, options: LinkOptions | None = None) -> None:
        super().__init__()
        self._dispatch = dispatch
        self._options = options or LinkOptions()
        self.refused_connections = 0
        self.dropped_connections = 0  # for a broken rule or a missed deadline

    async def start(self, sock: socket.socket) -> None:
        """Serve on this listening socket until `stop`."""
        self._server = await asyncio.start_unix_server(self._accept, sock=sock, limit=READ_BYTES)

    @property
    def connections(self) -> int:
        return len(self._tasks)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._tasks) >= self._options.connections:
            self.refused_connections += 1
            writer.close()
            return
        self._run(self._serve(reader, writer))

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await _Conversation(self._dispatch, self._options, reader, writer).run()
        except (WireError, TimeoutError, OSError) as error:
            self.dropped_connections += 1
            log.debug("connection dropped: %s", error)
        finally:
            if writer.transport.get_write_buffer_size():
                writer.transport.abort()  # the peer does not read: nothing to wait for
            else:
                writer.close()


class _Conversation:
    """One connection of the server."""

    def __init__(
        self,
        dispatch: Dispatch,
        options: LinkOptions,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self._dispatch, self._options = dispatch, options
        self._reader, self._writer = reader, writer
        self._session = Session(options.limits, max_owed=options.in_flight)
        self._answers: set[asyncio.Task[None]] = set()
        self._frame_end: float | None = None  # when the message now arriving must be whole

    async def run(self) -> None:
        try:
            while (event := self._session.next_event()) is not DONE:
                if event is NEED_DATA:
                    await self._read()
                elif event is PAUSED:
                    await self._one_answer()
                elif isinstance(event, Request):
                    task = asyncio.get_running_loop().create_task(self._answer(event))
                    self._answers.add(task)
                # Notifications mean nothing here yet; responses cannot come, we ask nothing.
            while self._answers:
                await self._one_answer()
        finally:
            for task in self._answers:
                task.cancel()
            await asyncio.gather(*self._answers, return_exceptions=True)

    async def _read(self) -> None:
        """Some bytes, within the deadline that applies; answers may finish meanwhile."""
        now = asyncio.get_running_loop().time()
        if self._session.partial_bytes == 0:
            self._frame_end = None
        elif self._frame_end is None:
            self._frame_end = now + self._options.frame_s
        end = self._frame_end if self._frame_end is not None else now + self._options.idle_s
        async with asyncio.timeout_at(end):
            data = await self._reader.read(READ_BYTES)
        self._raise_failed()
        self._session.receive(data)

    async def _one_answer(self) -> None:
        await asyncio.wait(self._answers, return_when=asyncio.FIRST_COMPLETED)
        self._raise_failed()

    def _raise_failed(self) -> None:
        """Collect finished answers; one that could not be written ends the connection."""
        for task in [task for task in self._answers if task.done()]:
            self._answers.remove(task)
            task.result()

    async def _answer(self, request: Request) -> None:
        try:
            async with asyncio.timeout(self._options.answer_s):
                result = await self._dispatch(request.method, request.params)
            data = self._session.respond(request.msgid, result)
        except RpcError as error:
            data = self._session.refuse(request.msgid, error.as_wire())
        except TimeoutError:
            sentence = f"{request.method} took more than {self._options.answer_s} s; try again"
            data = self._session.refuse(request.msgid, RpcError("timeout", sentence).as_wire())
        except EncodeError as error:
            data = self._session.refuse(request.msgid, RpcError("internal", str(error)).as_wire())
        except Exception:
            log.exception("method %s failed", request.method)
            sentence = f"{request.method} failed inside the node process; its log says why"
            data = self._session.refuse(request.msgid, RpcError("internal", sentence).as_wire())
        self._writer.write(data)
        try:
            async with asyncio.timeout(self._options.write_s):
                await self._writer.drain()
        except (TimeoutError, OSError):
            self._writer.transport.abort()  # also ends the read that the connection waits in
            raise


class Client:
    """An asyncio connection that may have several calls open at once."""

    def __init__(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, limits: Limits
    ) -> None:
        self._reader, self._writer = reader, writer
        self._session = Session(limits)
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._reading = asyncio.get_running_loop().create_task(self._read())

    @classmethod
    async def connect(
        cls, path: str | Path, limits: Limits = DEFAULT_LIMITS, deadline_s: float = 5.0
    ) -> Client:
        """Raises ControlError when nobody answers at `path` in time."""
        try:
            async with asyncio.timeout(deadline_s):
                reader, writer = await asyncio.open_unix_connection(path, limit=READ_BYTES)
        except (OSError, TimeoutError) as error:
            raise _unreachable(path, error) from error
        return cls(reader, writer, limits)

    async def call(self, method: str, *params: Any, deadline_s: float = 10.0) -> Any:
        """The result.  Raises RpcError (the method's), ControlError (the connection's)."""
        msgid, data = self._session.call(method, *params)
        future = self._waiting[msgid] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(deadline_s):
                self._writer.write(data)
                await self._writer.drain()
                return await future
        except TimeoutError:
            raise ControlError(f"no answer to {method} within {deadline_s} s; try again") from None
        except OSError as error:
            raise ControlError(f"the connection broke ({error}); connect again") from error
        finally:
            self._session.forget(msgid)
            self._waiting.pop(msgid, None)

    async def close(self) -> None:
        self._reading.cancel()
        await asyncio.gather(self._reading, return_exceptions=True)
        self._fail(ControlError("the connection was closed; connect again"))
        self._writer.close()
        with contextlib.suppress(OSError):
            await self._writer.wait_closed()

    async def _read(self) -> None:
        try:
            while (event := self._session.next_event()) is not DONE:
                if isinstance(event, Response):
                    _settle(self._waiting.pop(event.msgid, None), event)
                elif isinstance(event, Request):
                    error = RpcError("unknown_method", "this side answers no requests")
                    self._writer.write(self._session.refuse(event.msgid, error.as_wire()))
                elif event is NEED_DATA:
                    self._session.receive(await self._reader.read(READ_BYTES))
            self._fail(ControlError("the server closed the connection; connect again"))
        except (WireError, OSError) as error:
            self._fail(ControlError(f"the connection broke ({error}); connect again"))
            self._writer.transport.abort()

    def _fail(self, error: ControlError) -> None:
        while self._waiting:
            _, future = self._waiting.popitem()
            if not future.done():
                future.set_exception(error)


def _settle(future: asyncio.Future[Any] | None, response: Response) -> None:
    if future is None or future.done():
        return
    if response.error is not None:
        future.set_exception(RpcError.from_wire(response.error))
    else:
        future.set_result(response.result)


class BlockingClient:
    """For programs without an event loop: one call at a time, each with a deadline."""

    def __init__(self, path: str | Path, deadline_s: float = 5.0) -> None:
        self._path, self._deadline_s = path, deadline_s
        self._session = Session()
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._sock.settimeout(deadline_s)
        try:
            self._sock.connect(str(path))
        except OSError as error:
            self._sock.close()
            raise _unreachable(path, error) from error

    def __enter__(self) -> BlockingClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """The next call would fail."""
        self._sock.close()

    def call(self, method: str, *params: Any) -> Any:
        """The result.  Raises RpcError (the method's), ControlError (the connection's)."""
        end = time.monotonic() + self._deadline_s
        msgid, data = self._session.call(method, *params)
        try:
            self._sock.settimeout(self._deadline_s)
            self._sock.sendall(data)
            response = self._answer_to(msgid, end)
        except TimeoutError:
            raise ControlError(
                f"{self._path} did not answer {method} within {self._deadline_s} s; "
                f"is the node process stopped?"
            ) from None
        except (OSError, WireError) as error:
            raise ControlError(f"the connection to {self._path} broke ({error})") from error
        if response.error is not None:
            raise RpcError.from_wire(response.error)
        return response.result

    def _answer_to(self, msgid: int, end: float) -> Response:
        while True:
            event = self._session.next_event()
            if isinstance(event, Response) and event.msgid == msgid:
                return event
            if event is DONE:
                raise ControlError(f"{self._path} closed the connection; try again")
            if event is NEED_DATA:
                left = end - time.monotonic()
                if left <= 0:
                    raise TimeoutError
                self._sock.settimeout(left)
                self._session.receive(self._sock.recv(READ_BYTES))
            elif not isinstance(event, (Notification, Response)):
                raise ControlError(f"{self._path} asks instead of answering; is it zcache?")


def _unreachable(path: str | Path, error: Exception) -> ControlError:
    why = str(error.strerror if isinstance(error, OSError) and error.strerror else "no answer")
    return ControlError(
        f"nobody serves the control socket {path} ({why}); is the server running, and as your user?"
    )
