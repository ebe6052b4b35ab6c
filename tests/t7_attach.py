"""Attaching and swapping, as far as they need no nbd module: words, tables, pages, the helper."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bench.servers import is_listening
from plugin import attach, genetlink, nbdnetlink, statepage, swaparea, swapping, upfile
from plugin.dialer import Generations, Target, dial
from plugin.instance import Instance
from plugin.mender import DeviceGoneError, Mender
from plugin.spare import Spare
from plugin.statepage import StatePage
from tests.plugin_helpers import wait_for
from zcache_core.errors import AttachError, ConfigError, InUseError

# ---- what people write ----------------------------------------------------------


def test_addresses_of_servers() -> None:
    unix = attach.parse_uri("nbd+unix:///swap1?socket=/run/z%20c/a.sock")
    assert (unix.unix, unix.device) == ("/run/z c/a.sock", "swap1")
    tcp = attach.parse_uri("nbd://127.0.0.1/")
    assert (tcp.unix, tcp.host, tcp.port, tcp.device) == ("", "127.0.0.1", 10809, "")
    six = attach.parse_uri("nbd://[::1]:2000/x")
    assert (six.host, six.port, six.device) == ("::1", 2000, "x")
    assert attach.parse_uri("nbd://localhost:5").host in ("127.0.0.1", "::1")
    assert six.export(17) == "x@17"
    assert six.export(None) == "x"
    assert attach.parse_uri("nbd://127.0.0.1/any thing", plain=True).export(17) == "any thing"


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("/run/zcache.sock", "no address"),
        ("http://host/", "no address"),
        ("nbd://", "no address"),
        ("nbd+unix:///", "names no socket"),
        ("nbd+unix://host/?socket=/x", "names no socket"),
        ("nbd://127.0.0.1:99999/", "no possible port"),
        ("nbd://127.0.0.1/swap0@5", "leave the generation out"),
    ],
)
def test_what_is_no_address_is_refused(uri: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        attach.parse_uri(uri)


def test_devices() -> None:
    assert [attach.parse_device(x) for x in ("/dev/nbd3", "nbd3", "3", None)] == [3, 3, 3, None]
    with pytest.raises(ConfigError, match="no network block device"):
        attach.parse_device("/dev/sda")


def test_options_win_over_the_file() -> None:
    document = {"size": "8G", "swap": {"priority": 7, "device": "nbd1"}}
    found = upfile.settings(document, {"priority": 9, "timeout": None})
    assert found == {"priority": 9, "device": "nbd1", "timeout": None, "dead_timeout": None}


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"prioriti": 1}, "did you mean priority"),
        ({"priority": "1"}, "is not a whole number"),
        ({"priority": True}, "is not a whole number"),
        ({"device": 0}, "is not a text"),
        (7, "is no table"),
    ],
)
def test_what_cannot_be_meant_is_refused(table: Any, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        upfile.settings({"swap": table}, {})


def test_a_size_that_its_pool_can_hold_by_default() -> None:
    assert "pool=25%" in swapping.default_words([])
    assert swapping.default_words(["pool=64M"]) == ["pool=64M", "size=128M"]
    assert swapping.default_words(["size=1G", "pool=64M"]) == ["size=1G", "pool=64M"]


# ---- tables of the kernel's -----------------------------------------------------

SWAPS = """\
Filename				Type		Size		Used		Priority
/dev/nbd0                               partition	524284		204800		100
/swap\\040file                           file		1048572		48572		-2
"""


def test_swap_areas_are_read() -> None:
    assert swaparea.areas(SWAPS) == [
        swaparea.Area("/dev/nbd0", 524284 << 10, 200 << 20, 100),
        swaparea.Area("/swap file", 1048572 << 10, 48572 << 10, -2),
    ]


@pytest.mark.parametrize(
    ("available_mib", "cached_mib", "other", "missing_mib"),
    [(300, 0, False, 0), (216, 0, False, 0), (150, 0, False, 66), (150, 66, False, 0),
     (150, 0, True, 0), (5, 0, False, 200)],
)  # fmt: skip
def test_what_comes_back_is_set_against_what_is_there(
    available_mib: int, cached_mib: int, other: bool, missing_mib: int
) -> None:
    """200 MiB are out on nbd0; 16 MiB of memory stay free in any case."""
    meminfo = (
        f"MemTotal: 524288 kB\nMemAvailable: {available_mib << 10} kB\n"
        f"SwapCached: {cached_mib << 10} kB\n"
    )
    areas = swaparea.areas(SWAPS)
    room = swaparea.room_to_return(areas[0], areas if other else areas[:1], meminfo)
    assert room.missing_bytes == missing_mib << 20


# ---- the state page -------------------------------------------------------------


def test_the_state_page_tells_what_was_said_last(tmp_path: Path) -> None:
    path = tmp_path / "x.attach"
    assert statepage.read(path) == {}
    fd = statepage.lock(path)
    assert statepage.read(path) == {}
    page = StatePage.create(fd, {"uri": "nbd://h/"})
    page.update(error="e" * 10_000)
    assert len(statepage.read(path)["error"]) == statepage.TEXT_BYTES_MAX
    page.update(state="dialing")
    page.mended(1.5, 77)
    page.mended(0.5, 78)
    found = statepage.read(path)
    assert found["uri"] == "nbd://h/"
    assert (found["state"], found["error"]) == ("connected", "")
    assert (found["mended"], found["last_outage_ms"], found["longest_outage_ms"]) == (2, 500, 1500)
    assert found["generation"] == 78
    assert path.stat().st_size == statepage.PAGE_BYTES
    again = StatePage.open(fd)
    assert again.values == found
    again.close()
    with pytest.raises(BlockingIOError):
        statepage.lock(path)
    os.close(fd)
    page.close()
    os.close(statepage.lock(path))


# ---- messages to the kernel -----------------------------------------------------


def test_the_message_that_hands_a_socket_over() -> None:
    """Golden bytes, on a little-endian machine: header, command, index, text, nested socket."""
    found = nbdnetlink.reconfigure_template(26, 3, "zcache:x", 3)
    assert found[:4] == len(found).to_bytes(4, "little")
    assert found[4:8] == b"\x1a\0\x05\0"  # family, REQUEST | ACK
    assert found[16:20] == b"\3\1\0\0"  # RECONFIGURE, version 1
    assert found[20:28] == b"\x08\0\1\0\3\0\0\0"
    assert found[28:44] == b"\x0d\0\x0a\0zcache:x\0\0\0\0"
    assert found[44:56] == b"\x0c\0\4\0\3\0\0\0\0\0\0\0"  # so that a taken socket shows it
    sockets, item, fd = found[56:60], found[60:64], found[64:]
    assert [int.from_bytes(head[2:4], "little") & 0x3FFF for head in (sockets, item, fd)] == [
        7,
        1,
        1,
    ]
    assert fd[4:] == b"\xff\xff\xff\x7f"


def test_a_request_without_pyroute2() -> None:
    """The same bytes, and the kernel takes such: its family of families is always there."""
    message = nbdnetlink._message(nbdnetlink.DISCONNECT, [("NBD_ATTR_INDEX", 7)])
    message.encode()
    body = genetlink.GENERIC.pack(nbdnetlink.DISCONNECT, nbdnetlink.VERSION, 0)
    assert bytes(message.data)[16:] == body + genetlink.attribute(nbdnetlink.ATTR_INDEX, 7)

    def ask(family: str, of: bytes) -> None:
        genetlink.call(family, genetlink.GETFAMILY, 1, genetlink.attribute(2, of + b"\0"))

    ask("nlctrl", b"nlctrl")
    for family, of in (("nosuchfamily", b"nlctrl"), ("nlctrl", b"nosuchfamily")):
        with pytest.raises(FileNotFoundError):
            ask(family, of)


# ---- the helper, with a kernel that is played ----------------------------------


class PlayedKernel:
    """Has one connection like the kernel's nbd: a dead one is replaced by what is offered."""

    def __init__(self) -> None:
        self._said, self.events = socket.socketpair()
        self.taken: socket.socket | None = None
        self.takes = 0
        self.offers = 0
        self.gone = False

    def lives(self) -> bool:
        """Whether the connection has not hung up."""
        if self.taken is None:
            return False
        watch = select.poll()
        watch.register(self.taken, select.POLLRDHUP)
        return not watch.poll(0)

    def offer(self, sock: socket.socket) -> bool:
        self.offers += 1
        if self.gone:
            raise DeviceGoneError("Invalid argument")
        if self.lives():
            return False
        if self.taken is not None:
            self.taken.close()
        self.taken = sock.dup()
        self.takes += 1
        return True

    def heard_of_death(self) -> bool:
        heard = False
        while select.select([self.events], [], [], 0)[0]:
            heard = bool(self.events.recv(100))
        return heard

    def close(self) -> None:
        for sock in (self._said, self.events, self.taken):
            if sock is not None:
                sock.close()

    def say_link_dead(self) -> None:
        self._said.send(b"dead")


class NoSpare(Spare):
    """A test must not be forked."""

    def fork(self) -> None:
        return None


class Helper:
    """A Mender in a thread, between a played kernel and nbdkit."""

    def __init__(self, folder: Path, adopted: bool, living: bool = False) -> None:
        """adopted: without a copy of the kernel's socket; living: which it has all the same."""
        self.socket = folder / "nbd.sock"
        self.must_dial = adopted and not living
        self.kernel = PlayedKernel()
        fd = statepage.lock(folder / "x.attach")
        self.page = StatePage.create(fd, {})
        os.close(fd)
        self.generations = Generations()
        target = Target(str(self.socket))
        self.server: subprocess.Popen[bytes] | None = None
        self.start_server()
        sock = None
        if living or not adopted:
            sock = dial(target, self.generations).sock
            assert self.kernel.offer(sock)
        if living and sock is not None:
            sock.close()
            sock = None
        self.gone = threading.Event()
        played: Any = self.kernel
        self.mender = self.mender_with(
            played, target, self.generations, sock, self.page, 1 << 20, NoSpare()
        )
        self.thread = threading.Thread(target=self._run)
        self.thread.start()

    def mender_with(self, *words: Any) -> Mender:
        return Mender(*words)

    def has_begun(self) -> bool:
        """Whether the first link lives: of an adopted device not the one of the helper's look."""
        return self.kernel.lives() and not (self.must_dial and "mended" not in self.page.values)

    def _run(self) -> None:
        try:
            self.mender.run()
        except DeviceGoneError:
            self.gone.set()

    def start_server(self, size: str = "1M") -> None:
        self.socket.unlink(missing_ok=True)
        self.server = subprocess.Popen(["nbdkit", "-f", "-U", str(self.socket), "memory", size])
        wait_for("nbdkit's socket", lambda: is_listening(self.socket))

    def kill_server(self) -> None:
        assert self.server
        self.server.kill()
        self.server.wait()

    def end(self) -> None:
        self.kernel.gone = True
        self.kernel.say_link_dead()
        if self.kernel.taken is not None:
            self.kernel.taken.shutdown(socket.SHUT_RDWR)
        if self.server and self.server.poll() is not None:
            self.start_server()
        assert self.gone.wait(30)
        self.thread.join()
        self.mender.close()
        self.page.close()
        self.kernel.close()
        self.kill_server()


@pytest.fixture(params=[False, True], ids=["connected", "adopted"])
def helper(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Helper]:
    made = Helper(tmp_path, adopted=request.param)
    yield made
    made.end()


def test_a_late_word_of_death_does_not_end_a_living_link(tmp_path: Path) -> None:
    """To dial would open a new generation, and the server would fence the link that lives."""
    helper = Helper(tmp_path, adopted=True, living=True)
    try:
        last, offers = helper.generations.last, helper.kernel.offers
        helper.kernel.say_link_dead()
        wait_for("a look", lambda: helper.kernel.offers > offers)
        assert helper.kernel.lives()
        helper.kernel.say_link_dead()
        wait_for("another", lambda: helper.kernel.offers > offers + 1)
        assert (helper.generations.last, helper.kernel.takes) == (last, 1)
        assert helper.page.values["state"] == "connected"
    finally:
        helper.end()


def test_a_device_is_attached_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under another name the second link would fence the first, which nobody would mend."""
    monkeypatch.setenv("ZCACHE_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setattr(nbdnetlink, "SYSFS", tmp_path)
    one, two = Instance("one"), Instance("two")
    fd = statepage.lock(one.attach)
    told = {"uri": "nbd://127.0.0.1:10809/a", "device": "/dev/nbd3"}
    page = StatePage.create(fd, told)
    page.close()
    os.close(fd)
    attach.refuse_second(two, attach.parse_uri(told["uri"]))  # it is connected no more
    (tmp_path / "nbd3").mkdir()
    (tmp_path / "nbd3/backend").write_text(attach.backend(one) + "\n")
    (tmp_path / "nbd3/pid").write_text("1\n")
    with pytest.raises(InUseError, match="as one on /dev/nbd3"):
        attach.refuse_second(two, attach.parse_uri("nbd://127.0.0.1/a"))
    attach.refuse_second(two, attach.parse_uri("nbd://127.0.0.1/b"))
    attach.refuse_second(one, attach.parse_uri(told["uri"]))


def test_detach_ends_no_helper_of_a_device_in_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another `attach` comes when the first helper has ended, and its device is swap at once."""
    monkeypatch.setenv("ZCACHE_RUNTIME_DIR", str(tmp_path))
    helpers, ended = [11, 12], []
    monkeypatch.setattr(attach, "mender_pid", lambda state: helpers[0] if helpers else 0)
    monkeypatch.setattr(attach, "look", lambda instance: attach.Attached(3, helpers[0]))

    def end(pid: int) -> None:
        ended.append(helpers.pop(0))

    def refuse(found: attach.Attached) -> None:
        if found.mender_pid == 12:
            raise InUseError("it is swap")

    monkeypatch.setattr(attach, "_end", end)
    monkeypatch.setattr(attach, "refuse_if_in_use", refuse)
    with pytest.raises(InUseError):
        attach.detach(Instance("one"), print)
    assert ended == [11]


def test_the_helper_mends_what_a_killed_server_leaves(helper: Helper) -> None:
    wait_for("the first connection", helper.has_begun)
    for _ in range(3):
        takes, generation = helper.kernel.takes, helper.generations.last
        helper.kill_server()
        wait_for("it to see that", lambda: helper.page.values.get("state") == "dialing")
        wait_for(
            "it to say why", lambda: "no NBD server answers" in helper.page.values.get("error", "")
        )
        helper.start_server()
        wait_for("a new connection", lambda: helper.page.values.get("state") == "connected")
        assert helper.kernel.lives()
        assert helper.kernel.takes == takes + 1
        assert helper.generations.last > generation
        assert helper.page.values["error"] == ""


def test_a_smaller_device_is_not_handed_over(helper: Helper) -> None:
    wait_for("the first connection", helper.has_begun)
    helper.kill_server()
    helper.start_server("512K")
    wait_for("it to say so", lambda: "smaller now" in helper.page.values.get("error", ""))
    assert not helper.kernel.lives()
    helper.kill_server()
    helper.start_server("2M")
    wait_for("a new connection", helper.kernel.lives)


def test_a_late_notice_disturbs_no_living_link(helper: Helper) -> None:
    """LINK_DEAD of a connection that has been replaced meanwhile."""
    wait_for("the first connection", helper.has_begun)
    for _ in range(3):
        takes = helper.kernel.takes
        helper.kill_server()
        wait_for("it to see that", lambda: helper.page.values.get("state") == "dialing")
        helper.start_server()
        wait_for("a new connection", lambda: helper.page.values.get("state") == "connected")
        helper.kernel.say_link_dead()
        assert helper.kernel.takes == takes + 1
        assert helper.kernel.lives()


def test_down_imports_little() -> None:
    """It runs where memory is short, and what it takes is missing for the pages that come back."""
    code = "import sys, plugin.cli as c, plugin.swapping; c.build_parser(); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"pyroute2", "asyncio", "ssl", "rich", "msgpack", "http", "matplotlib"}
    assert not heavy & {name.split(".")[0] for name in done.stdout.split()}


def test_the_helper_imports_next_to_nothing() -> None:
    """Every module is locked memory: what it needs was measured at 18 MB in all."""
    root = str(attach.MENDER.parent.parent)
    script = (
        f"import sys, json; sys.path.insert(0, {root!r}); import plugin.mender; "
        f"print(json.dumps(sorted(sys.modules)))"
    )
    command = [attach.PYTHON, "-I", "-S", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    modules = json.loads(done.stdout)
    heavy = {"pyroute2", "asyncio", "subprocess", "typing", "dataclasses", "rich", "msgpack"}
    assert not heavy & set(modules)
    assert len(modules) < 100


def test_up_without_nbd_starts_no_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that nobody can swap onto would keep a pool's memory."""
    monkeypatch.setattr(nbdnetlink, "MODULE", tmp_path / "none")
    monkeypatch.setattr(nbdnetlink, "MODPROBE", ("false",))
    started: list[Any] = []
    monkeypatch.setattr("plugin.serve.start", lambda *words: started.append(words))
    plan = swapping.Plan(Instance("none"), ("pool=1M",), 100, None, nbdnetlink.Timeouts(3, 60))
    with pytest.raises(AttachError, match="no nbd module"):
        swapping.up(plan, print)
    assert not started
