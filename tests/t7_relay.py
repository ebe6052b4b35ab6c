"""The TLS relay: every byte through it, who is refused, what is killed, and no page fault.

played kernel ── relay ── TLS ── nbdkit        real relays, real certificates, real nbdkit
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import random
import signal
import socket
import struct
import subprocess
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.servers import is_listening
from cluster import certificates
from cluster.peeraddress import PEM_CERTIFICATE
from plugin import attach, statepage, tlsfiles
from plugin.dialer import Generations, Link, Target, dial, explain
from plugin.mender import DeviceGoneError, Mender
from plugin.relays import PROGRAM, Relay, Relays, sentence
from plugin.statepage import StatePage
from tests.plugin_helpers import wait_for
from tests.serve_helpers import kill, served
from tests.t7_attach import NoSpare, PlayedKernel
from zcache_core.errors import AttachError, ConfigError

DEVICE_BYTES = 8 << 20
READ, WRITE = 0, 1


@pytest.fixture(scope="module")
def ca(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cluster of `host` and `guest`, and the files of both as nbdkit reads them."""
    folder = tmp_path_factory.mktemp("cluster") / "ca"
    certificates.init(folder)
    certificates.add(folder, "host", addresses=["127.0.0.1"])
    certificates.add(folder, "guest")
    certificates.add(folder, "old", days=-1)
    for name in ("host", "old"):
        tlsfiles.lay_out(str(folder / name), folder / f"{name}.tls")
    return folder


class TlsServer:
    """nbdkit's RAM disk behind TLS, on a Unix socket."""

    def __init__(self, ca: Path, folder: Path, who: str = "host") -> None:
        self.socket = folder / f"{who}.sock"
        self._command = [
            "nbdkit", "-f", "-U", str(self.socket), "--tls=require", "--tls-verify-peer",
            f"--tls-certificates={ca / f'{who}.tls'}", "memory", str(DEVICE_BYTES),
        ]  # fmt: skip
        self.target = Target(str(self.socket), tls="host")
        self.start()

    def start(self) -> None:
        self.socket.unlink(missing_ok=True)
        self.process = subprocess.Popen(self._command, stderr=subprocess.DEVNULL)
        wait_for("nbdkit's socket", lambda: is_listening(self.socket))

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture
def server(ca: Path, tmp_path: Path) -> Iterator[TlsServer]:
    it = TlsServer(ca, tmp_path)
    yield it
    it.kill()


@pytest.fixture
def relays(ca: Path) -> Iterator[Relays]:
    made = Relays(tlsfiles.message(str(ca / "guest")))
    made.fill()
    pids = [relay.pid for relay in made]
    assert len(pids) == 2
    yield made
    pids += [relay.pid for relay in made]
    made.close()
    for pid in set(pids):  # they end by themselves
        with contextlib.suppress(ChildProcessError):
            reap(pid)


def reap(pid: int) -> None:
    """A child that ends by itself."""
    wait_for("its end", lambda: os.waitpid(pid, os.WNOHANG)[0])


def lives_again(kernel: Any, takes: int) -> bool:
    return bool(kernel.takes == takes + 1 and kernel.lives())


def ask(kind: int, handle: int, at: int, length: int, data: bytes = b"") -> bytes:
    return struct.pack(">IHHQQI", 0x25609513, 0, kind, handle, at, length) + data


def answer(sock: socket.socket, lengths: dict[int, int]) -> tuple[int, bytes]:
    """(handle, data) of one answer; lengths: of those that were asked for."""
    head = sock.recv(16, socket.MSG_WAITALL)
    magic, error, handle = struct.unpack(">IIQ", head)
    assert (magic, error) == (0x67446698, 0)
    length = lengths[handle]
    return handle, sock.recv(length, socket.MSG_WAITALL) if length else b""


def write_and_read(link: Link, rng: random.Random, count: int) -> None:
    """Requests of all sizes, many at once, against a plain model."""
    model = bytearray(DEVICE_BYTES)
    for first in range(0, count, 8):
        writes = []
        for _ in range(8):
            length = rng.choice((512, 4096, 32768, 131072, 1 << 20))
            at = rng.randrange(0, (DEVICE_BYTES - length) // 512) * 512
            writes.append((at, rng.randbytes(length)))
        for kind in (WRITE, READ):
            lengths = {first + i: len(d) if kind == READ else 0 for i, (_, d) in enumerate(writes)}
            words = [
                ask(kind, first + i, at, len(data), data if kind == WRITE else b"")
                for i, (at, data) in enumerate(writes)
            ]
            sender = threading.Thread(target=link.sock.sendall, args=(b"".join(words),))
            if kind == WRITE:  # one after the other, else those that overlap may end in any order
                for word in words:
                    link.sock.sendall(word)
                    answer(link.sock, lengths)
                for at, data in writes:
                    model[at : at + len(data)] = data
                continue
            sender.start()
            for _ in writes:
                handle, data = answer(link.sock, lengths)
                at, _ = writes[handle - first]
                assert data == model[at : at + len(data)]
            sender.join()


def test_every_byte_comes_through(server: TlsServer, relays: Relays, rng: random.Random) -> None:
    link = dial(server.target, Generations(), relays)
    with link.sock:
        assert link.size_bytes == DEVICE_BYTES
        write_and_read(link, rng, 160)


def faults(pid: int) -> tuple[int, int]:
    """(minor, major) page faults so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[7]), int(fields[9])


def status_kb(pid: int, name: str) -> int:
    text = Path(f"/proc/{pid}/status").read_text()
    return next(int(row.split()[1]) for row in text.splitlines() if row.startswith(name + ":"))


def waits_for_a_job(relay: Relay) -> bool:
    """It has taken its certificates, and sleeps."""
    (unread,) = struct.unpack("=i", fcntl.ioctl(relay.line, termios.TIOCOUTQ, bytes(4)))
    state = Path(f"/proc/{relay.pid}/stat").read_text().rpartition(")")[2].split()[0]
    return not unread and state == "S"


@pytest.mark.skipif(os.geteuid() != 0, reason="without CAP_IPC_LOCK its memory is not locked")
def test_it_needs_no_page(server: TlsServer, relays: Relays, rng: random.Random) -> None:
    """From its first handshake on: not one fault, not one page more, whatever goes through it."""
    for relay in relays:
        wait_for("its start", functools.partial(waits_for_a_job, relay))
    before = {relay.pid: (faults(relay.pid), status_kb(relay.pid, "VmData")) for relay in relays}
    for turn in range(6):
        link = dial(server.target, Generations(), relays)
        relays.keep()  # so that the other one is next
        with link.sock:
            write_and_read(link, rng, 24)
        assert len(list(relays)) == 2, turn
    after = {relay.pid: (faults(relay.pid), status_kb(relay.pid, "VmData")) for relay in relays}
    assert after == before
    assert all(status_kb(pid, "VmLck") < 12 << 10 for pid in after)


def test_one_that_is_killed_is_followed(server: TlsServer, relays: Relays) -> None:
    generations = Generations()
    for _ in range(4):
        link = dial(server.target, generations, relays)
        relays.keep()
        with link.sock:
            (busy, line), *_ = relays.told()
            assert line.fileno() >= 0
            os.kill(busy, signal.SIGKILL)
            assert link.sock.recv(1) == b"", "its end is the link's"
            os.waitpid(busy, 0)
            relays.bury()
            assert relays.missing
            with dial(server.target, generations, relays).sock:
                relays.fill()
                assert not relays.missing


def test_who_takes_them_over_uses_both(server: TlsServer, relays: Relays) -> None:
    """A spare goes on with the relays of the helper that was killed, whatever was said to them."""
    link = dial(server.target, Generations(), relays)
    relays.keep()
    told = relays.told()
    other = Relays(relays.certificates, [(pid, line.dup()) for pid, line in told])
    with link.sock:
        for _ in range(3):
            with dial(server.target, Generations(), other).sock:
                other.keep()
            assert {pid for pid, _ in other.told()} == {pid for pid, _ in told}, "one was killed"
    other.close()


def test_a_link_outlives_the_helper(server: TlsServer, ca: Path, rng: random.Random) -> None:
    """The relay goes on without a line, and ends with its link."""
    relays = Relays(tlsfiles.message(str(ca / "guest")))
    link = dial(server.target, Generations(), relays)
    pids = [relay.pid for relay in relays]
    relays.keep()
    (busy, _), *_ = relays.told()
    relays.close()
    with link.sock:
        write_and_read(link, rng, 16)
    for pid in pids:
        reap(pid)
    assert busy in pids


# ---- who is refused ---------------------------------------------------------------


def refusal(target: Target, certificates_in: Path) -> str:
    relays = Relays(tlsfiles.message(str(certificates_in)))
    try:
        dial(target, None, relays).sock.close()
    except (AttachError, OSError) as error:
        return str(explain(error, target))
    finally:
        pids = [relay.pid for relay in relays]
        relays.close()
        for pid in pids:
            os.waitpid(pid, 0)
    raise AssertionError("it was not refused")


def test_another_name_is_refused(server: TlsServer, ca: Path) -> None:
    said = refusal(Target(str(server.socket), tls="rack-7"), ca / "guest")
    assert "a certificate that is not rack-7's" in said
    said = refusal(Target(str(server.socket), tls="127.0.0.2"), ca / "guest")
    assert "a certificate that is not 127.0.0.2's" in said
    relays = Relays(tlsfiles.message(str(ca / "guest")))
    dial(Target(str(server.socket), tls="127.0.0.1"), None, relays).sock.close()
    relays.close()


def test_a_stranger_is_refused(server: TlsServer, ca: Path, tmp_path: Path) -> None:
    certificates.init(tmp_path / "other")
    certificates.add(tmp_path / "other", "guest")
    assert "our CA has not signed" in refusal(server.target, tmp_path / "other/guest")
    # it trusts the right CA, but its own certificate is another's
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    own, _ = tlsfiles.own_and_trusted(tmp_path / "other/guest")
    (mixed / "ca-cert.pem").write_text((ca / "ca.pem").read_text())
    (mixed / "client-cert.pem").write_text("\n".join(PEM_CERTIFICATE.findall(own)))
    (mixed / "client-key.pem").write_text(tlsfiles.PEM_KEY.findall(own)[0])
    assert "accept this machine's certificate" in refusal(server.target, mixed)
    assert "certificate" in refusal(server.target, ca / "ca.pem"), "and one without any"


def test_an_old_certificate_is_refused(ca: Path, tmp_path: Path, server: TlsServer) -> None:
    old = TlsServer(ca, tmp_path, "old")
    try:
        assert "out of date" in refusal(Target(str(old.socket), tls="old"), ca / "guest")
    finally:
        old.kill()
    assert "accept this machine's certificate" in refusal(server.target, ca / "old")


def test_tls_and_none_do_not_meet(server: TlsServer, ca: Path, tmp_path: Path) -> None:
    target = Target(str(server.socket))
    with pytest.raises(AttachError, match="wants TLS; attach nbds://"):
        dial(target, None)
    plain = tmp_path / "plain.sock"
    with subprocess.Popen(["nbdkit", "-f", "-U", str(plain), "memory", "1M"]) as process:
        wait_for("nbdkit's socket", lambda: is_listening(plain))
        assert "offers no TLS" in refusal(Target(str(plain), tls="host"), ca / "guest")
        process.kill()


@pytest.mark.parametrize(
    ("after", "said"), [(b"", "hangs up in TLS"), (b"HTTP/1.1 400 Bad\r\n\r\n", "TLS with")]
)
def test_what_is_no_tls_is_refused(after: bytes, said: str, ca: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.sock"

    def play() -> None:
        peer, _ = listening.accept()
        with peer:
            peer.sendall(b"NBDMAGICIHAVEOPT\0\3")
            peer.recv(4 + 16, socket.MSG_WAITALL)
            peer.sendall(struct.pack(">QIII", 0x3E889045565A9, 5, 1, 0))
            peer.recv(1)
            peer.sendall(after)
            peer.shutdown(socket.SHUT_WR)
            while peer.recv(4096):
                pass

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(path))
        listening.listen()
        player = threading.Thread(target=play)
        player.start()
        assert said in refusal(Target(str(path), tls="host"), ca / "guest")
        player.join()


def test_every_reason_is_a_sentence() -> None:
    for said in ("v10 x", "v18 x", "v62 x", "v7 bad signature", "a116", "a48", "a70", "s110",
                 "t", "e", "k", "xodd", ""):  # fmt: skip
        assert sentence(said, "@place", "rack").count("@place") == 1, said


# ---- what people write ------------------------------------------------------------


def test_addresses_with_tls(ca: Path) -> None:
    assert attach.parse_uri("nbds://127.0.0.1/").tls == "127.0.0.1"
    assert attach.parse_uri("nbds://127.0.0.1/", tls_name="rack").tls == "rack"
    assert attach.parse_uri("nbds://127.0.0.1/?tls-hostname=rack").tls == "rack"
    unix = attach.parse_uri("nbds+unix:///?socket=/x&tls-hostname=rack")
    assert (unix.unix, unix.tls) == ("/x", "rack")
    for uri, name, said in (
        ("nbd://127.0.0.1/", "rack", "without TLS"),
        ("nbds+unix:///?socket=/x", None, "--tls-name"),
    ):
        with pytest.raises(ConfigError, match=said):
            attach.parse_uri(uri, tls_name=name)


def test_folders_of_certificates(ca: Path, tmp_path: Path) -> None:
    own, trusted = tlsfiles.own_and_trusted(ca / "guest")
    assert tlsfiles.own_and_trusted(ca / "guest/node.pem") == (own, trusted)
    assert len(PEM_CERTIFICATE.findall(own)) == 1
    assert trusted.strip() == (ca / "ca.pem").read_text().strip()
    assert tlsfiles.own_and_trusted(ca / "ca.pem")[0] == ""
    laid = ca / "host.tls"
    assert tlsfiles.lay_out(str(laid), tmp_path / "x") == laid, "nbdkit can read it as it is"
    assert (laid / "server-key.pem").stat().st_mode & 0o077 == 0
    for folder, said in ((tmp_path, "has neither node.pem"), (tmp_path / "no", "cannot be read")):
        with pytest.raises(ConfigError, match=said):
            tlsfiles.own_and_trusted(folder)
    (tmp_path / "cut.pem").write_text((ca / "guest/node.pem").read_text()[:700])
    with pytest.raises(ConfigError, match="does not hold"):
        tlsfiles.own_and_trusted(tmp_path / "cut.pem")
    with pytest.raises(ConfigError, match="cannot be read"):
        tlsfiles.lay_out(str(tmp_path), tmp_path / "x")


# ---- the helper, and a supervised server ------------------------------------------


def test_the_helper_mends_through_relays(server: TlsServer, relays: Relays, tmp_path: Path) -> None:
    """Killed server, killed relay: a new link each time, and two relays again."""
    kernel: Any = PlayedKernel()
    fd = statepage.lock(tmp_path / "x.attach")
    page = StatePage.create(fd, {})
    os.close(fd)
    generations = Generations()
    link = dial(server.target, generations, relays)
    relays.keep()
    assert kernel.offer(link.sock)
    mender = Mender(
        kernel, server.target, generations, link.sock, page, 1 << 20, NoSpare(), relays
    )  # fmt: skip
    gone = threading.Event()
    pids: set[int] = set()

    def run() -> None:
        try:
            mender.run()
        except DeviceGoneError:
            gone.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    for turn in range(4):
        takes = kernel.takes
        if turn % 2:
            os.kill(relays.told()[0][0], signal.SIGKILL)
        else:
            server.kill()
            wait_for("it to see that", lambda: page.values.get("state") == "dialing")
            server.start()
        wait_for("a new link", functools.partial(lives_again, kernel, takes))
        wait_for("two relays", lambda: not relays.missing)
        pids.update(relay.pid for relay in relays)
    # the idle one: nobody would notice before it is needed
    takes, (_, (idle, _)) = kernel.takes, relays.told()
    os.kill(idle, signal.SIGKILL)
    wait_for("another one", lambda: idle not in [pid for pid, _ in relays.told()][1:])
    wait_for("two relays", lambda: not relays.missing)
    pids.update(relay.pid for relay in relays)
    assert kernel.takes == takes
    assert kernel.lives()
    kernel.gone = True
    kernel.taken.shutdown(socket.SHUT_RDWR)
    assert gone.wait(30)
    thread.join()
    assert len(pids) == 5, "each of the three that were killed has a successor"
    mender.close()
    for pid in pids:
        reap(pid)
    page.close()
    kernel.close()


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def test_a_supervised_server_for_others(
    ca: Path, relays: Relays, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """nbd= and tls=: killed and upgraded, it answers again, with the page it had."""
    monkeypatch.setenv("ZCACHE_RUNTIME_DIR", str(tmp_path))
    with served(tmp_path, f"t7-relay-{os.getpid()}") as one:
        port = free_port()
        words = (f"nbd=127.0.0.1:{port}", f"tls={ca / 'host'}")
        first = one.serve("size=16M", "pool=16M", "commit=all", *words)
        target, generations = Target("", "127.0.0.1", port, tls="127.0.0.1"), Generations()
        page = os.urandom(4096)
        with dial(target, generations, relays).sock as sock:
            sock.sendall(ask(WRITE, 1, 8192, 4096, page))
            answer(sock, {1: 0})
        with pytest.raises(AttachError, match="wants TLS"):
            dial(Target("", "127.0.0.1", port), None)
        kill(first.server_pid)
        second = one.serving(first.server_pid)
        one.zcache("upgrade")
        one.serving(second.server_pid)
        with dial(target, generations, relays).sock as sock:
            sock.sendall(ask(READ, 2, 8192, 4096))
            assert answer(sock, {2: 4096}) == (2, page)
        one.zcache("stop")
        assert not one.instance.tls.exists(), "no key is left"


def test_the_program_is_there() -> None:
    assert os.access(PROGRAM, os.X_OK), "setup.py builds it"
