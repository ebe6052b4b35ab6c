"""What is served at metrics=: HTTP by itself, then metrics and pages of a real server."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import socket
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families as plain_text

from cluster import addresses, metrics, webserver
from cluster.webserver import Answer, Get, WebServer
from plugin.config import parse
from tests.plugin_helpers import Server, run_nbdkit, wait_for
from zcache_core.counters import COUNTERS, HISTOGRAMS
from zcache_core.errors import ConfigError, InUseError

PAGE = 4096
OPENMETRICS = "application/openmetrics-text; version=1.0.0"


# ---- addresses -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("9469", "127.0.0.1:9469"),
        ("0.0.0.0:9469", "0.0.0.0:9469"),
        ("[::1]:80", "[::1]:80"),
        (" box-1.local:09469 ", "box-1.local:9469"),
        ("127.0.0.1:0", "127.0.0.1:0"),
    ],
)
def test_addresses(text: str, address: str) -> None:
    assert addresses.read_address("metrics", text) == address
    assert parse([("size", "1G"), ("metrics", text)]).metrics == address


@pytest.mark.parametrize("text", ["", "x", "1.2.3.4", "::1:80", "a:b", "127.0.0.1:70000", "a b:1"])
def test_what_is_no_address(text: str) -> None:
    with pytest.raises(ConfigError, match="metrics=9469 for this machine only"):
        addresses.read_address("metrics", text)


def test_an_address_that_cannot_be_listened_on() -> None:
    with pytest.raises(ConfigError, match="cannot be listened on"):
        addresses.listen("metrics", "192.0.2.1:9469")  # a documentation address, nobody's
    with addresses.listen("metrics", "127.0.0.1:0") as sock:
        taken = addresses.bound_address(sock)
        with pytest.raises(InUseError, match="write another address"):
            addresses.listen("metrics", taken)


# ---- HTTP ----------------------------------------------------------------------------


@contextlib.asynccontextmanager
async def web(answer: webserver.Answerer) -> AsyncIterator[int]:
    server = WebServer(answer)
    sock = addresses.listen("metrics", "127.0.0.1:0")
    port: int = sock.getsockname()[1]
    await server.start(sock)
    try:
        yield port
    finally:
        await server.stop()


async def raw(port: int, data: bytes) -> bytes:
    """Everything that comes back."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    found = await reader.read()
    writer.close()
    return found


async def echo(get: Get) -> Answer | None:
    if get.path == "/none":
        return None
    if get.path == "/broken":
        raise RuntimeError("meant")
    return Answer(f"{get.path} {get.headers.get('x-y', '')}".encode())


@pytest.mark.expect_log("no answer to /broken")
def test_requests_and_their_answers() -> None:
    cases = [
        (b"GET /a?b=c HTTP/1.1\r\nX-Y:  z \r\n\r\n", b" 200 OK", b"/a z"),
        (b"HEAD /a HTTP/1.1\r\n\r\n", b" 200 OK", b"\r\n\r\n"),
        (b"GET /none HTTP/1.0\r\n\r\n", b" 404 ", b"404 Not Found\n"),
        (b"GET /broken HTTP/1.1\r\n\r\n", b" 500 ", b"500 Internal Server Error\n"),
        (b"POST /a HTTP/1.1\r\n\r\n", b" 405 ", b"405 Method Not Allowed\n"),
        (b"hello\r\n\r\n", b" 400 ", b"400 Bad Request\n"),
        (b"GET a HTTP/1.1\r\n\r\n", b" 400 ", b""),
        (b"GET /\xff HTTP/1.1\r\n\r\n", b" 400 ", b""),
        (b"GET /a HTTP/1.1\r\n" + b"x: y\r\n" * 3000 + b"\r\n", b" 431 ", b""),
        (b"GET /" + b"a" * 3000 + b" HTTP/1.1\r\n\r\n", b" 400 ", b""),
    ]

    async def run() -> None:
        async with web(echo) as port:
            for data, status, end in cases:
                found = await raw(port, data)
                assert status in found.partition(b"\r\n")[0], data
                assert found.endswith(end), data
                assert b"default-src 'self'" in found

    asyncio.run(run())


def test_who_says_half_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webserver, "HEAD_S", 0.05)

    async def run() -> None:
        async with web(echo) as port:
            with contextlib.suppress(ConnectionResetError):
                assert await raw(port, b"GET / HT") == b""
            assert b"200 OK" in await raw(port, b"GET / HTTP/1.1\r\n\r\n")

    asyncio.run(run())


def test_one_connection_too_many_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(webserver, "CONNECTIONS", 2)

    async def run() -> None:
        async with web(echo) as port:
            open_ones = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2)]
            assert b" 503 " in await raw(port, b"")
            for _, writer in open_ones:
                writer.close()
                await writer.wait_closed()
            while b" 200 " not in await raw(port, b"GET / HTTP/1.1\r\n\r\n"):
                await asyncio.sleep(0.01)

    asyncio.run(run())


# ---- metrics -------------------------------------------------------------------------


HISTOGRAM = {
    "histograms": {
        h.name: {"unit": h.unit, "count": 6, "sum": 4_000_000, "buckets": [1, 0, 2, *[0] * 27, 3]}
        for h in HISTOGRAMS
    }
}


def answers(**stats: int) -> dict[str, Any]:
    return {
        "ping": {"version": "1.2", "server_started_seconds": 5, "node_started_seconds": 6},
        "stats": {counter.name: 0 for counter in COUNTERS} | HISTOGRAM | stats,
        "config": {"allocator": "zbud", "codec": "lz4"},
        "health": {"status": "degraded", "reasons": [{"what": "a", "do": "b"}]},
    }


def scraped(body: bytes) -> dict[str, float]:
    families = openmetrics(body.decode())  # type: ignore[no-untyped-call]
    return {sample.name: sample.value for family in families for sample in family.samples}


def test_every_counter_is_a_metric() -> None:
    body, kind = metrics.exposition(answers(), OPENMETRICS)
    assert kind.startswith("application/openmetrics-text")
    found = scraped(body)
    wanted = [metrics.sample(counter) for counter in COUNTERS]
    assert len(set(wanted)) == len(COUNTERS)
    assert set(wanted) <= found.keys()


def test_histograms() -> None:
    body, _ = metrics.exposition(answers(), OPENMETRICS)
    lines = dict(line.rsplit(" ", 1) for line in body.decode().splitlines())
    name = "zcache_pool_wait_duration_seconds"
    bounds = (("1e-06", 1), ("2e-06", 1), ("4e-06", 3), ("536.870912", 3), ("+Inf", 6))
    for bound, count in bounds:
        assert float(lines[f'{name}_bucket{{le="{bound}"}}']) == count
    assert float(lines[f"{name}_sum"]) == 4
    assert float(lines[f"{name}_count"]) == 6
    assert float(lines['zcache_put_duration_seconds_bucket{le="4e-09"}']) == 3  # nanoseconds
    assert float(lines["zcache_put_duration_seconds_sum"]) == 0.004


def test_peers() -> None:
    row = {"name": "x", "room_bytes": 5, "latency_us": 250, "wrong_copies": 1, "copies": 9}
    peers = [row | {"address": "a:1", "state": "up"}, row | {"address": "b:1", "state": "suspect"}]
    body, _ = metrics.exposition(answers() | {"peers": peers}, OPENMETRICS)
    lines = dict(line.rsplit(" ", 1) for line in body.decode().splitlines())
    found = {
        name: [float(lines[f'zcache_peer_{name}{{peer="{peer}"}}']) for peer in ("a:1", "b:1")]
        for name in ("up", "copies", "room_bytes", "latency_seconds", "wrong_copies")
    }
    assert found == {
        "up": [1, 0], "copies": [9, 9], "room_bytes": [5, 5], "latency_seconds": [0.00025] * 2,
        "wrong_copies": [1, 1],
    }  # fmt: skip


def test_values_and_units() -> None:
    body, _ = metrics.exposition(
        answers(succ_stores=7, pool_wait_us=2_500_000, high_percent=85, buddied_count=3,
                lost_pages=-1), OPENMETRICS,
    )  # fmt: skip
    found = scraped(body)
    assert found["zcache_succ_stores_total"] == 7
    assert found["zcache_pool_wait_seconds_total"] == 2.5
    assert found["zcache_high_ratio"] == 0.85
    assert found["zcache_buddied_frames"] == 3
    assert found["zcache_lost_pages"] == -1
    assert found["zcache_health_status"] == 1
    assert found["zcache_health_reasons"] == 1
    assert found["zcache_server_start_time_seconds"] == 5
    assert found["zcache_info"] == 1
    assert b'allocator="zbud"' in body


def test_the_older_format_for_who_asks_for_nothing() -> None:
    body, kind = metrics.exposition(answers(succ_stores=7), "*/*")
    assert kind.startswith("text/plain")
    names = {sample.name for f in plain_text(body.decode()) for sample in f.samples}
    assert "zcache_succ_stores_total" in names


# ---- a real server -------------------------------------------------------------------


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path, "size=16M", "pool=4M", "metrics=127.0.0.1:0") as running:
        yield running


def address(server: Server) -> str:
    found: str = wait_for("the web server", lambda: server.rpc("config")["metrics"])
    return found


def get(where: str, path: str, accept: str = "*/*") -> tuple[int, str, bytes]:
    """Status, content type, body."""
    connection = http.client.HTTPConnection(where, timeout=20)
    connection.request("GET", path, headers={"Accept": accept})
    answer = connection.getresponse()
    found = answer.status, answer.headers["Content-Type"], answer.read()
    connection.close()
    return found


def test_what_a_server_serves(server: Server) -> None:
    where = address(server)
    handle = server.connect()
    for page in range(30):
        handle.pwrite((b"page %4d " % page * 410)[:PAGE], page * PAGE)
    status, kind, body = get(where, "/metrics", OPENMETRICS)
    assert (status, kind.split(";")[0]) == (200, "application/openmetrics-text")
    assert scraped(body)["zcache_succ_stores_total"] == 30
    _, kind, body = get(where, "/api/state")
    assert kind == "application/json"
    state = json.loads(body)
    assert state["stats"] == server.rpc("stats") | {
        name: state["stats"][name] for name in ("server_resident_bytes", "server_locked_bytes")
    }
    assert state["ping"]["server_pid"] == server.pid
    assert state["config"]["metrics"] == where
    assert [c["name"] for c in json.loads(get(where, "/api/counters")[2])] == [
        c.name for c in COUNTERS
    ]
    assert get(where, "/healthz")[:2] == (200, "text/plain; charset=utf-8")
    for path, kind in (("/", "text/html"), ("/page.js", "text/javascript"), ("/style.css", "text")):
        status, found, body = get(where, path)
        assert (status, found.startswith(kind)) == (200, True)
        assert body
    for path in ("/nothing", "/../node.py", "/web/index.html", "/%2e%2e/node.py"):
        assert get(where, path)[0] == 404
    assert urllib.request.urlopen(f"http://{where}/healthz", timeout=20).status == 200


def test_pages_ask_nobody_else(server: Server) -> None:
    for name in ("index.html", "style.css", "page.js"):
        text = get(address(server), f"/{name}")[2].decode()
        rest = text.replace("http://www.w3.org/2000/svg", "")  # a namespace, not an address
        assert "://" not in rest, name
        assert "innerHTML" not in text


def test_pings_tell_when_it_was_started(server: Server) -> None:
    ping = server.rpc("ping")
    assert 0 <= ping["node_started_seconds"] - ping["server_started_seconds"] < 60
    state = json.loads(get(address(server), "/api/state")[2])
    assert state["ping"]["server_started_seconds"] == ping["server_started_seconds"]


def test_an_address_in_use_is_refused_at_the_start(server: Server, tmp_path: Path) -> None:
    code, _, log = run_nbdkit(
        tmp_path, "size=1M", "pool=1M", f"metrics={address(server)}",
        options=("-U", str(tmp_path / "other.sock")),
    )  # fmt: skip
    assert code != 0
    assert "write another address" in log


def test_a_new_node_listens_again_and_waits_for_who_is_in_its_place(tmp_path: Path) -> None:
    """The address is taken while the node is dead: control works, metrics come when it is free."""
    with addresses.listen("metrics", "127.0.0.1:0") as sock:
        where = addresses.bound_address(sock)
    host, _, port = where.rpartition(":")
    with Server(tmp_path, "size=1M", "pool=1M", f"metrics={where}") as server:
        wait_for("metrics", lambda: server.rpc("config")["metrics"] == where)
        os.kill(server.node_pid, signal.SIGSTOP)
        os.kill(server.node_pid, signal.SIGKILL)
        taken: list[socket.socket] = []

        def take() -> bool:
            with contextlib.suppress(OSError):
                taken.append(socket.create_server((host, int(port))))
            return bool(taken) or "tried again" in server.log()

        wait_for("the place to be taken", take)
        wait_for("the new node", server.ping)
        for sock in taken:
            sock.close()
        wait_for("metrics again", lambda: server.rpc("config")["metrics"] == where)
        assert get(where, "/metrics")[0] == 200
