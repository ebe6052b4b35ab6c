"""Donors registered in a real etcd, which is killed and started again while pages are at them."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import http.server
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import certificates, members
from cluster.etcdurl import EtcdUrl
from cluster.members import Member, chosen
from cluster.roll import WHOLE_EVERY, Roll
from tests.lender_helpers import PAGES, Lender, Model, live, stats
from tests.plugin_helpers import ROOT, WAIT_S, Server, environment, run_nbdkit, wait_for
from zcache_core import memfile
from zcache_core.errors import ConfigError

ETCD = ROOT / "build/unpacked/usr/bin/etcd"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
        return port


class Etcd:
    """One member, one cluster; killed, it comes back with what it had.

    `ca`: a folder of certificates, of which `etcd` is its own; `wants`: one of the other side, too.
    """

    def __init__(self, folder: Path, ca: Path | None = None, wants: bool = False) -> None:
        self.folder = folder / "etcd"
        self.folder.mkdir()
        self.wants = wants
        self.port, self.peer_port = free_port(), free_port()
        self.url = f"http{'s' if ca else ''}://127.0.0.1:{self.port}"
        self._more: list[str] = []
        if ca:
            own = str(ca / "etcd" / "node.pem")
            self._more = ["--cert-file", own, "--key-file", own, "--trusted-ca-file"]
            self._more += [str(ca / "ca.pem"), *(["--client-cert-auth"] if wants else [])]
        self.process: subprocess.Popen[bytes] | None = None
        self.start()

    def start(self) -> None:
        peer = f"http://127.0.0.1:{self.peer_port}"
        words = ["--data-dir", str(self.folder / "data"), "--listen-client-urls", self.url]
        words += ["--advertise-client-urls", self.url, "--listen-peer-urls", peer]
        words += ["--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}"]
        words += self._more
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen([str(ETCD), *words], stdout=log, stderr=log)
        wait_for("etcd", self.answers)

    def answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.folder / "log").read_text()[-2000:]
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
            return True
        return False

    def kill(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.wait(WAIT_S)
            self.process = None


class Registered(Lender):
    """A lender that says in etcd that it is there."""

    def __init__(self, folder: Path, name: str, etcd: str) -> None:
        self.etcd = etcd
        super().__init__(folder, name)

    def start(self) -> None:
        words = ["--listen", self.address, "--donate", str(24 << 20), "--etcd", self.etcd]
        words += ["--control", str(self.folder / "ctl")]
        with open(self.folder / "log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "cluster.lending", *words],
                env=environment(self.folder) | {"PYTHONPATH": os.getcwd()},
                stdout=log,
                stderr=log,
            )
        wait_for("the donor's socket", Path(self.address).exists)


@pytest.fixture(params=["users", "certificates"])
def guarded(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Etcd]:
    """One with certificates, in `ca`; `owner` is who asks.  It has users, or wants certificates.

    (Not both: etcd's gateway takes the name in etcd's own certificate for the user then.)
    """
    if not ETCD.exists():
        pytest.skip("make test unpacks etcd")
    certificates.init(tmp_path / "ca")
    certificates.add(tmp_path / "ca", "etcd", addresses=["127.0.0.1"])
    certificates.add(tmp_path / "ca", "owner")
    made = Etcd(tmp_path, tmp_path / "ca", request.param == "certificates")
    yield made
    made.kill()


@pytest.fixture
def etcd(tmp_path: Path) -> Iterator[Etcd]:
    if not ETCD.exists():
        pytest.skip("make test unpacks etcd")
    made = Etcd(tmp_path)
    yield made
    made.kill()


def listed(server: Server) -> int:
    """Donors that may be given new pages."""
    return sum(peer["listed"] and peer["state"] == "up" for peer in server.rpc("peers"))


@pytest.mark.timeout(300)
def test_etcd_is_killed_and_comes_back(tmp_path: Path, etcd: Etcd, rng: random.Random) -> None:
    donors = [Registered(tmp_path, f"d{i}", etcd.url) for i in range(2)]
    try:
        with Server(tmp_path, "size=16M", "pool=2M", f"etcd={etcd.url}") as server:
            wait_for("the donors", lambda: listed(server) == 2)
            wait_for("room", lambda: stats(server)["remote_room_bytes"] > 0)
            model = Model(server, rng)
            for page in range(PAGES // 2):
                model.write(page)
            assert stats(server)["pers_pages_remoted"] > 300
            # a third one comes: it is found without anybody being told
            donors.append(Registered(tmp_path, "d2", etcd.url))
            wait_for("the third", lambda: listed(server) == 3)
            etcd.kill()
            wait_for("no new placements", lambda: listed(server) == 0)
            assert live(server) == 3
            wait_for("no room", lambda: stats(server)["remote_room_bytes"] == 0)
            assert "etcd has not answered" in str(server.rpc("health"))
            before = stats(server)["remote_pers_pages_succ_put"]
            model.check()  # who has pages goes on
            # also with a node that is started while etcd is gone
            os.kill(server.node_pid, signal.SIGKILL)
            model.check()
            wait_for("its donors again", lambda: server.ping() and live(server) == 3)
            assert stats(server)["remote_pers_pages_succ_put"] == before
            etcd.start()
            wait_for("placements again", lambda: listed(server) == 3)
            assert "etcd has not answered" not in str(server.rpc("health"))
            wait_for("room", lambda: stats(server)["remote_room_bytes"] > 0)
            server.node_pid = server.ping()["pid"]
            for page in range(PAGES):
                model.write(page)
            assert stats(server)["remote_pers_pages_succ_put"] > before
            # one ends in order: its lease is given back at once, its pages go elsewhere
            donors[0].signal(signal.SIGTERM)
            wait_for("it is not listed", lambda: listed(server) == 2)
            wait_for("copies are renewed", lambda: not stats(server)["remote_short_pages"])
            wait_for("it is forgotten", lambda: len(server.rpc("peers")) == 2)
            model.check()
            now = stats(server)
            assert now["lost_pages"] == now["failed_requests"] == 0
    finally:
        for donor in donors:
            donor.kill()


def read_by(url: str, tls: str | None) -> set[str] | None:
    """The donors that an owner finds there; None: it was refused."""
    talker = members.Watching(EtcdUrl.read(url), tls, asyncio.new_event_loop(), lambda _: None)
    try:
        return set(talker._read(talker._client()))
    except Exception:  # whatever the library raises
        return None
    finally:
        talker._loop.close()


def make_users(url: str, tls: str) -> None:
    """`rack`, with p@ss, who may only touch what begins with /mine/."""
    nobody = Member("", "h:1", 0, 0)
    client = members.Registration(EtcdUrl.read(url), tls, nobody)._client()
    first, end = (base64.b64encode(key).decode() for key in (b"/mine/", b"/mine0"))
    perm = {"permType": "READWRITE", "key": first, "range_end": end}
    asked: list[tuple[str, dict[str, object]]] = [
        ("user/add", {"name": "root", "password": "r"}),
        ("role/add", {"name": "root"}),
        ("user/grant", {"user": "root", "role": "root"}),
        ("user/add", {"name": "rack", "password": "p@ss"}),
        ("role/add", {"name": "rack"}),
        ("role/grant", {"name": "rack", "perm": perm}),
        ("user/grant", {"user": "rack", "role": "rack"}),
        ("enable", {}),
    ]
    for path, what in asked:
        client.post(client.get_url(f"/auth/{path}"), json=what)


def test_certificates_and_users(tmp_path: Path, guarded: Etcd) -> None:
    """Over https: with both sides' certificates, or as a user who may only touch one prefix."""
    tls, url = str(tmp_path / "ca" / "owner"), f"{guarded.url}/mine"
    if not guarded.wants:
        make_users(url, tls)
        url = url.replace("://", "://rack:p%40ss@")
    (tmp_path / "url").write_text(url)
    asked = EtcdUrl.read(str(tmp_path / "url"))
    registration = members.Registration(asked, tls, Member("d", "h:1", 5, 7))
    registration.start()
    wait_for("it is registered", lambda: read_by(url, tls) == {"d"})
    assert read_by(url, None) is None
    if not guarded.wants:
        assert read_by(url.replace("p%40ss", "wrong"), tls) is None
        assert read_by(url.replace("/mine", "/other"), tls) is None
        assert read_by(guarded.url, tls) is None
    registration.stop()
    wait_for("it is gone", lambda: read_by(url, tls) == set())


def test_only_what_has_changed_is_read(etcd: Etcd, rng: random.Random) -> None:
    """Rows written, again, and deleted at random; then an empty store: against a dict."""
    url = EtcdUrl.read(etcd.url)
    nobody = Member("", "h:1", 0, 0)
    roll, model = Roll(url.donors), dict[bytes, bytes]()
    asked: list[dict[str, Any]] = []

    def now() -> dict[bytes, bytes]:
        client = members.Registration(url, None, nobody)._client()

        def ask(what: dict[str, Any]) -> dict[str, Any]:
            asked.append(what)
            return members.Watching._range(client, what)

        return dict(roll.ask(ask))

    client = members.Registration(url, None, nobody)._client()
    for _ in range(WHOLE_EVERY - 1):
        wholes, unseen = roll.wholes, False
        for _ in range(rng.randrange(4)):
            key = url.donors + str(rng.randrange(8))
            if rng.random() < 0.6:
                model[key.encode()] = rng.randbytes(20)
                client.put(key, model[key.encode()])
            elif model.pop(key.encode(), None) is not None:
                client.delete(key)
                if rng.random() < 0.5:
                    roll.forget(key.encode())
                else:
                    unseen = True
        client.put(url.donors[:-1] + "0", b"of others")
        assert now() == model
        assert asked[0].get("min_mod_revision") or wholes == 0
        assert unseen or roll.wholes == max(1, wholes)
        asked.clear()
    assert 1 < roll.wholes < 60
    etcd.kill()
    shutil.rmtree(etcd.folder / "data")
    etcd.start()
    assert now() == {}
    client.put(url.donors + "1", b"one")
    assert now() == {url.donors.encode() + b"1": b"one"}


@pytest.mark.parametrize(
    "answer", [{"kvs": [{}]}, {"kvs": [{"key": "?"}]}, {"count": "x"}, {"header": {"revision": []}}]
)
def test_an_answer_that_cannot_be_read_is_not_believed_in_part(answer: dict[str, Any]) -> None:
    good: dict[str, Any] = {
        "header": {"revision": "5"},
        "count": "1",
        "kvs": [{"key": "YQ==", "value": "Yg=="}],
    }
    roll, answers = Roll("/a/"), [good, answer | {"header": {"revision": "6"}} | answer, good]
    assert roll.ask(lambda _: answers.pop(0)) == {b"a": b"b"}
    with contextlib.suppress(ValueError, TypeError, KeyError):
        roll.ask(lambda _: answers.pop(0))
    assert roll.ask(lambda what: good if "limit" in what else {"count": "9"}) == {b"a": b"b"}


class Frozen(http.server.BaseHTTPRequestHandler):
    """An etcd that answers what is there, and is then frozen: its watches are never answered."""

    reads = 0
    ended = threading.Event()

    def do_GET(self) -> None:
        assert self.path == "/version"
        self._say(b'{"etcdserver": "3.4.23"}')

    def do_POST(self) -> None:
        if self.path.endswith("/watch"):
            self.ended.wait()
            return
        assert self.path.endswith("/kv/range")
        type(self).reads += 1
        self._say(b"{}")

    def _say(self, body: bytes) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing."""


def test_an_etcd_that_freezes_in_a_watch_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "POLL_S", 0.3)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Frozen)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = EtcdUrl.read(f"http://127.0.0.1:{server.server_port}")
    loop = asyncio.new_event_loop()
    watching = members.Watching(url, None, loop, lambda _: None)
    watching.start()
    try:
        wait_for("a second read", lambda: Frozen.reads > 1)
    finally:
        watching.stop()
        Frozen.ended.set()
        server.shutdown()
        server.server_close()
        loop.close()


def test_what_is_lent_is_gone_at_the_end_though_etcd_does_not_answer(tmp_path: Path) -> None:
    at = tmp_path / "lent"
    with socket.create_server(("127.0.0.1", 0)) as silent:  # nobody accepts
        etcd = f"etcd=http://127.0.0.1:{silent.getsockname()[1]}"
        words = ("size=16M", "pool=2M", f"listen={at}", "donate=24M", etcd)
        with Server(tmp_path, *words) as server:
            wait_for("it listens", at.exists)
            server.end()
            assert not [row for row in memfile.leftovers() if row.name == f"lent.{server.pid}"]


def test_a_thousand_donors_are_spread_evenly() -> None:
    """Each owner speaks to 64 of them; none of them to many more than others do; few changes."""
    members = {f"n{i}": Member(f"n{i}", f"10.0.0.1:{i}", 1 << 30, 1) for i in range(1000)}
    owners = [f"n{i}/swap" for i in range(1000)]
    links = {owner: {one.name for one in chosen(owner, members)} for owner in owners}
    assert all(len(found) == 64 for found in links.values())
    met = dict.fromkeys(members, 0)
    for found in links.values():
        for name in found:
            met[name] += 1
    assert max(met.values()) < 1.6 * 64
    del members["n7"]
    changed = 0
    for owner in owners:
        now = {one.name for one in chosen(owner, members)}
        changed += len(now - links[owner])
    assert changed == met["n7"]


def test_urls(tmp_path: Path) -> None:
    url = EtcdUrl.read("https://me:p%40ss@h1:2379,[::1]:1/rack-2")
    assert url.hosts == (("h1", 2379), ("::1", 1))
    assert (url.user, url.password, url.donors) == ("me", "p@ss", "/rack-2/donors/")
    for bad in ("", "h:1", "ftp://h:1", "http://", "http://u@h:1", "http://h:1/a/b", "http://h:x"):
        with pytest.raises(ConfigError, match="is no address of etcd; write etcd=http://HOST:2379"):
            EtcdUrl.read(bad)
    file = tmp_path / "etcd"
    file.write_text("https://me:p%40ss@h1:2379,[::1]:1/rack-2\nanything\n")
    assert EtcdUrl.read(str(file)) == url
    file.write_text("p%40ss\n")
    with pytest.raises(ConfigError, match=f"etcd={file} is no address of etcd"):
        EtcdUrl.read(str(file))
    assert Member.read("n", b'{"address": "h:1", "capacity_bytes": 5, "epoch": 7}') == Member(
        "n", "h:1", 5, 7
    )
    for value in (b"", b"[]", b"{}", b'{"address": 3, "capacity_bytes": 5, "epoch": 7}', b"\xff"):
        assert Member.read("n", value) is None


def test_refused(tmp_path: Path) -> None:
    """In one sentence that says what to write; never with a password in it."""
    for text, sentence in (
        ("etcd=10.0.0.1:2379", "write etcd=http://HOST:2379"),
        ("etcd=https://me:secret@10.0.0.1:2379", "needs certificates; write tls=FOLDER too"),
        ("etcd=/no/such/file", "etcd=/no/such/file cannot be read"),
        ("etcd=ftp://me:secret@h:1", "is no address of etcd"),
        ("etcd=http://me:secret@h:x", "write etcd=http://HOST:2379"),
    ):
        code, _, log = run_nbdkit(tmp_path, "size=16M", "pool=2M", text)
        assert code != 0
        assert sentence in log
        assert "secret" not in log
