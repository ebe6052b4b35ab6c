"""Real sockets: many clients, bad clients, slow clients; each costs only itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import msgpack
import pytest

from cluster import unixsock
from cluster.link import BlockingClient, Client, LinkOptions, RpcError, Server
from cluster.wire import Limits, Request, encode
from zcache_core.errors import ConfigError, ControlError, InUseError

QUICK = LinkOptions(
    limits=Limits(frame_bytes=4096),
    connections=4,
    in_flight=3,
    idle_s=30.0,
    frame_s=0.2,
    answer_s=0.2,
    write_s=0.2,
)


class Methods:
    """What the server under test answers."""

    def __init__(self) -> None:
        self.running = self.most_running = 0
        self.gate = asyncio.Event()

    async def __call__(self, method: str, params: list[Any]) -> Any:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            return await getattr(self, method)(*params)
        finally:
            self.running -= 1

    async def echo(self, *params: Any) -> list[Any]:
        return list(params)

    async def refuse(self) -> None:
        raise RpcError("bad_params", "refuse refuses; ask for echo")

    async def crash(self) -> None:
        raise ZeroDivisionError

    async def endless(self) -> None:
        await asyncio.Event().wait()

    async def gated(self) -> str:
        await self.gate.wait()
        return "through"

    async def huge(self) -> bytes:
        return b"\0" * 5000

    async def unsendable(self) -> object:
        return object()


@contextlib.asynccontextmanager
async def serving(
    path: Path, options: LinkOptions = QUICK
) -> AsyncIterator[tuple[Server, Methods]]:
    methods = Methods()
    server = Server(methods, options)
    await server.start(unixsock.listen(path, "the test", "control=PATH", 64))
    try:
        yield server, methods
    finally:
        await server.stop()
        path.unlink()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "test.ctl"


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


@contextlib.asynccontextmanager
async def connected(path: Path) -> AsyncIterator[Client]:
    client = await Client.connect(path)
    try:
        yield client
    finally:
        await client.close()


@contextlib.asynccontextmanager
async def raw(path: Path) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_unix_connection(path)
    try:
        yield reader, writer
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def test_calls_and_errors(path: Path) -> None:
    async def test() -> None:
        async with serving(path), connected(path) as client:
            assert await client.call("echo", 1, "two", b"\3") == [1, "two", b"\3"]
            with pytest.raises(RpcError, match="refuse refuses") as caught:
                await client.call("refuse")
            assert caught.value.code == "bad_params"
            assert await client.call("echo") == []

    run(test)


@pytest.mark.expect_log("method crash failed")
def test_crashing_slow_and_oversized_methods_are_answered(path: Path) -> None:
    async def test() -> None:
        async with serving(path), connected(path) as client:
            for method, code in (
                ("crash", "internal"),
                ("endless", "timeout"),
                ("huge", "internal"),
                ("unsendable", "internal"),
            ):
                with pytest.raises(RpcError) as caught:
                    await client.call(method)
                assert caught.value.code == code
            assert await client.call("echo", 1) == [1]

    run(test)


def test_answers_come_in_any_order(path: Path) -> None:
    async def test() -> None:
        options = LinkOptions(answer_s=20)
        async with serving(path, options) as (_, methods), connected(path) as client:
            first = asyncio.create_task(client.call("gated"))
            assert await client.call("echo", 1) == [1]
            assert not first.done()
            methods.gate.set()
            assert await first == "through"

    run(test)


def test_in_flight_is_bounded(path: Path) -> None:
    """Five requests at once, three run; the others wait in the socket, then are answered."""

    async def test() -> None:
        options = LinkOptions(in_flight=3, answer_s=20)
        async with serving(path, options) as (_, methods), raw(path) as (reader, writer):
            for msgid in range(5):
                writer.write(encode(Request(msgid, "gated", [])))
            while methods.running < 3:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.05)
            assert methods.running == 3
            methods.gate.set()
            unpacker = msgpack.Unpacker()
            answers: list[list[Any]] = []
            while len(answers) < 5:
                unpacker.feed(await reader.read(1000))
                answers += list(unpacker)
            assert sorted(answer[1] for answer in answers) == [0, 1, 2, 3, 4]
            assert methods.most_running == 3

    run(test)


@pytest.mark.parametrize(
    "data",
    [
        b"\xc1",
        b"GET / HTTP/1.1\r\n\r\n",
        b"\x94\x01\x05\xc0\xc0",
        b"\x94\x00\x00\xa4echo\x91\xc6\x00\x00\x20\x00" + b"\0" * 5000,
        encode(Request(1, "gated", [])) * 2,
        b"\x94\x00\x00",
        b"",
    ],
    ids=["noise", "http", "answer", "too large", "number twice", "half a message", "silence"],
)
def test_bad_client_loses_only_its_own_connection(path: Path, data: bytes) -> None:
    async def test() -> None:
        async with serving(path, QUICK) as (server, _), connected(path) as good:
            assert await good.call("echo", 1) == [1]
            async with raw(path) as (reader, writer):
                writer.write(data)
                if not data:
                    writer.write_eof()
                while await reader.read(1000):
                    pass
            assert await good.call("echo", 2) == [2]
            while server.connections > 1:
                await asyncio.sleep(0.01)
            assert server.dropped_connections == (1 if data else 0)

    run(test)


def test_client_that_does_not_read_is_dropped(path: Path) -> None:
    async def test() -> None:
        options = LinkOptions(write_s=0.2, answer_s=5)
        async with serving(path, options) as (server, _), connected(path) as good:
            async with raw(path) as (reader, writer):
                reader._transport.pause_reading()  # type: ignore[attr-defined]
                question = encode(Request(0, "echo", ["x" * 100_000]))
                with contextlib.suppress(OSError, TimeoutError):
                    for msgid in range(200):
                        writer.write(question[:2] + bytes([msgid % 100]) + question[3:])
                        await asyncio.wait_for(writer.drain(), 2)
                while server.dropped_connections == 0:
                    await asyncio.sleep(0.01)
            assert await good.call("echo", 2) == [2]

    run(test)


def test_connections_are_bounded(path: Path) -> None:
    async def test() -> None:
        async with serving(path) as (server, _), contextlib.AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(connected(path)) for _ in range(4)]
            for client in clients:
                assert await client.call("echo", 1) == [1]
            async with raw(path) as (reader, _writer):
                assert await reader.read(10) == b""
            assert server.refused_connections == 1
            await clients.pop().close()
            while server.connections > 3:
                await asyncio.sleep(0.01)
            async with connected(path) as again:
                assert await again.call("echo", 1) == [1]

    run(test)


def test_idle_connection_is_closed(path: Path) -> None:
    async def test() -> None:
        async with serving(path, LinkOptions(idle_s=0.1)), raw(path) as (reader, _):
            assert await reader.read(10) == b""

    run(test)


def test_client_sees_the_server_go(path: Path) -> None:
    async def test() -> None:
        patient = LinkOptions(answer_s=20)
        async with serving(path, patient) as (server, methods), connected(path) as client:
            waiting = asyncio.create_task(client.call("gated"))
            while not methods.running:
                await asyncio.sleep(0.01)
            await server.stop()
            with pytest.raises(ControlError, match="connect again"):
                await waiting

    run(test)


def test_client_deadline(path: Path) -> None:
    async def test() -> None:
        patient = LinkOptions(answer_s=20)
        async with serving(path, patient) as (_, methods), connected(path) as client:
            with pytest.raises(ControlError, match=r"within 0\.1 s"):
                await client.call("gated", deadline_s=0.1)
            methods.gate.set()
            assert await client.call("echo", 1) == [1]  # the late answer was dropped

    run(test)


# ---- the blocking client, against a server in another thread -------------------------------


@pytest.fixture
def threaded(path: Path) -> Iterator[Path]:
    ready, stop = threading.Event(), threading.Event()

    async def serve() -> None:
        async with serving(path, QUICK):
            ready.set()
            while not stop.is_set():
                await asyncio.sleep(0.01)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    assert ready.wait(10)
    yield path
    stop.set()
    thread.join()


def test_blocking_client(threaded: Path) -> None:
    with BlockingClient(threaded) as client:
        assert client.call("echo", "a") == ["a"]
        with pytest.raises(RpcError, match="refuse refuses"):
            client.call("refuse")
        assert client.call("echo") == []


def test_blocking_client_without_a_server(path: Path) -> None:
    with pytest.raises(ControlError, match="No such file"):
        BlockingClient(path)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(path))
        silent.listen()
        with (
            BlockingClient(path, deadline_s=0.1) as client,
            pytest.raises(ControlError, match=r"did not answer ping within 0\.1 s"),
        ):
            client.call("ping")


# ---- the path ------------------------------------------------------------------------------


def test_socket_is_for_its_owner_only(path: Path) -> None:
    with unixsock.listen(path, "the test", "control=PATH", 1):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_path_in_use_is_refused_and_a_stale_one_taken(path: Path) -> None:
    with unixsock.listen(path, "the control socket", "control=PATH", 1):
        assert unixsock.is_alive(path)
        with pytest.raises(InUseError, match="in use by a running server") as caught:
            unixsock.listen(path, "the control socket", "control=PATH", 1)
        assert str(caught.value).count("\n") == 0
    assert path.exists()
    assert not unixsock.is_alive(path)
    unixsock.listen(path, "the control socket", "control=PATH", 1).close()


def test_full_backlog_is_alive(path: Path) -> None:
    with unixsock.listen(path, "x", "y", 0), contextlib.ExitStack() as stack:
        for _ in range(2):
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                sock.connect(str(path))
        assert unixsock.is_alive(path)


def test_what_is_no_socket_is_left_alone(path: Path) -> None:
    path.write_text("precious")
    with pytest.raises(ConfigError, match="is no socket; write another control=PATH"):
        unixsock.listen(path, "the control socket", "control=PATH", 1)
    assert path.read_text() == "precious"


@pytest.mark.parametrize(
    ("name", "words"), [("missing/x.ctl", "does not exist"), ("x" * 120, "a shorter control=PATH")]
)
def test_impossible_paths(tmp_path: Path, name: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        unixsock.listen(tmp_path / name, "the control socket", "control=PATH", 1)


def test_two_that_start_at_once(path: Path) -> None:
    """A stale socket, eight that want it: one gets it, seven are told."""
    unixsock.listen(path, "x", "y", 1).close()
    got: list[socket.socket] = []
    told: list[InUseError] = []
    barrier = threading.Barrier(8)

    def want() -> None:
        barrier.wait()
        try:
            got.append(unixsock.listen(path, "x", "y", 16))
        except InUseError as error:
            told.append(error)

    threads = [threading.Thread(target=want) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(got), len(told)) == (1, 7)
    got[0].close()


def test_only_the_own_socket_is_removed(path: Path) -> None:
    with unixsock.listen(path, "x", "y", 1):
        inode = os.stat(path).st_ino
    path.rename(path.with_suffix(".old"))  # keeps the first inode's number in use
    with unixsock.listen(path, "x", "y", 1):
        unixsock.remove(path, inode)
        assert path.exists()
        unixsock.remove(path, os.stat(path).st_ino)
        assert not path.exists()
