"""encrypt=yes on a real server: nothing readable on the disk, the key nowhere else."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.plugin_helpers import Server, remove_memory, run_nbdkit, wait_for
from tests.t7_disk import broken_pages, in_ram, kill
from zcache_core import memfile
from zcache_core.memfile import MemoryFile

PAGE = 4096
MIB = 1 << 20
SEGMENT = 1 << 18
NAME = f"t7-encrypt-{os.getpid()}"
SMALL = ("size=16M", "pool=4M", "disk_size=64M", "codec=none")
SECRET = b"correct horse battery staple "


def secrets(rng: random.Random, size_bytes: int = 2 * MIB) -> dict[int, bytes]:
    """Pages of which each holds the secret, among noise."""
    pages = {}
    for offset in range(0, size_bytes, PAGE):
        page = bytearray(rng.randbytes(PAGE))
        at = rng.randrange(PAGE - len(SECRET))
        page[at : at + len(SECRET)] = SECRET
        pages[offset] = bytes(page)
    return pages


def write_and_drain(server: Server, pages: dict[int, bytes], keep: bool = False) -> None:
    """Every page on the disk and none in RAM; `keep`: none stays there when it is read."""
    handle = server.connect()
    for offset, data in pages.items():
        handle.pwrite(data, offset)
    server.rpc("drain")
    wait_for("an empty RAM", lambda: in_ram(server) == 0)
    server.rpc("drain", keep)


def readable(disk: Path) -> int:
    """How often the secret stands on the disk."""
    return disk.read_bytes().count(SECRET)


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("ZCACHE_RUNTIME_DIR", str(tmp_path))
    yield tmp_path
    remove_memory(NAME)


def test_nothing_readable_on_the_disk(tmp_path: Path, rng: random.Random) -> None:
    pages = secrets(rng)
    for word, found in (("no", len(pages)), ("yes", 0)):
        folder = tmp_path / word
        folder.mkdir()
        with Server(folder, *SMALL, f"disk={folder / 'disk'}", f"encrypt={word}") as server:
            write_and_drain(server, pages)
            assert found <= readable(folder / "disk") <= 2 * found, word
            assert broken_pages(server.connect(), pages) == 0
            assert server.rpc("config")["encrypt"] == word
            stats = server.rpc("stats")
            assert stats["disk_pages"] == len(pages)
            head = 24 if word == "no" else 48
            assert stats["disk_live_bytes"] == len(pages) * (PAGE + head)


def test_every_kind_of_tampering_is_one_page(tmp_path: Path, rng: random.Random) -> None:
    disk = tmp_path / "disk"
    pages = secrets(rng, MIB)
    backwards = dict(reversed(pages.items()))  # so that nothing is read ahead, and kept
    with Server(tmp_path, *SMALL, f"disk={disk}", "encrypt=yes") as server:
        write_and_drain(server, pages, keep=True)
        handle = server.connect()
        size = PAGE + 48
        with open(disk, "r+b", buffering=0) as file:
            for part in (0, 10, 20, 24, 31, 32, 47, 48, 2000, size - 1):  # header ... last byte
                at = SEGMENT + rng.randrange(60) * size + part
                before = os.pread(file.fileno(), 1, at)
                os.pwrite(file.fileno(), bytes([before[0] ^ 1 << rng.randrange(8)]), at)
                os.fsync(file.fileno())
                wait_for("an empty RAM", lambda: in_ram(server) == 0)
                counted = server.rpc("stats")["disk_corrupt_pages"]
                assert broken_pages(handle, backwards) == 1, part
                assert server.rpc("stats")["disk_corrupt_pages"] == counted + 1
                os.pwrite(file.fileno(), before, at)
                os.fsync(file.fileno())
            assert broken_pages(handle, backwards) == 0


def test_key_is_in_the_memory_file_alone(runtime: Path, rng: random.Random) -> None:
    """Not on the disk, not in the log; the process gives no core, its pool is in none."""
    disk = runtime / "disk"
    with Server(runtime, *SMALL, f"disk={disk}", "encrypt=yes", f"memory={NAME}") as server:
        write_and_drain(server, secrets(rng, MIB))
        shmid = memfile.find(NAME)
        assert shmid is not None
        memory = MemoryFile.attach(shmid, with_keys=True)
        key = memory.peek(4096, 32)
        memory.close()
        assert len(set(key)) > 8
        assert key not in disk.read_bytes()
        assert "PR_SET_DUMPABLE" not in server.log()
        proc = Path(f"/proc/{server.pid}")
        limit = next(row for row in (proc / "limits").read_text().splitlines() if "core" in row)
        assert limit.split()[4:6] == ["0", "0"]
        maps = (proc / "smaps").read_text().split("VmFlags:")
        number = next(i for i, part in enumerate(maps) if "/SYSV" in part)
        assert "dd" in maps[number + 1].splitlines()[0].split(), "left out of core dumps"
        kill(server)
        remove_memory(NAME)


def test_encrypt_changed_at_a_restart(runtime: Path, rng: random.Random) -> None:
    """What is there stays readable, encrypted or not; what is written anew is as said now."""
    disk = runtime / "disk"
    words = (*SMALL, f"disk={disk}", f"memory={NAME}")
    first = secrets(rng, 2 * MIB)
    with Server(runtime, *words, "encrypt=yes") as server:
        write_and_drain(server, first)
        kill(server)
        assert readable(disk) == 0
        with Server(runtime, *words) as successor:
            second = {2 * MIB + offset: data for offset, data in secrets(rng, 2 * MIB).items()}
            write_and_drain(successor, second)
            assert readable(disk) >= len(second)
            assert broken_pages(successor.connect(), first | second) == 0
            kill(successor)
            with Server(runtime, *words, "encrypt=yes") as third:
                assert broken_pages(third.connect(), first | second) == 0
                assert third.rpc("stats")["lost_pages"] == 0
                kill(third)
        remove_memory(NAME)


def test_refused_words(tmp_path: Path) -> None:
    for words, says in (
        (("encrypt=yes",), "encrypt= means something only with disk=PATH"),
        (("encrypt=maybe", f"disk={tmp_path / 'd'}"), "encrypt=yes or encrypt=no"),
    ):
        code, _, log = run_nbdkit(
            tmp_path, "size=8M", "pool=4M", *words, options=("-U", str(tmp_path / "x.sock"))
        )
        assert code != 0
        assert says in log
