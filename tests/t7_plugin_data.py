"""All of NBD that moves data, against a real nbdkit and a plain bytearray as the model."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nbd
import pytest

from tests.plugin_helpers import Server, resident_bytes

PAGE = 4096
DEVICE_BYTES = 4 << 20
HOLE, ZERO = nbd.STATE_HOLE, nbd.STATE_ZERO


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Server(tmp_path, f"size={DEVICE_BYTES}", "pool=8M") as server:
        yield server


def content(rng: random.Random, length: int) -> bytes:
    """Bytes of every kind a page can have: compressible, noise, one word, zeros, mixed."""
    kind = rng.randrange(5)
    if kind == 0:
        return bytes(length)
    if kind == 1:
        return rng.randbytes(length)
    if kind == 2:
        return (rng.randbytes(8) * (length // 8 + 1))[:length]
    if kind == 3:
        return (b"the quick brown page %d " % rng.randrange(10**6) * (length // 20 + 1))[:length]
    words = [rng.randbytes(rng.randrange(1, 64)) for _ in range(8)]
    return b"".join(rng.choices(words, k=length // 20 + 64))[:length].ljust(length, b"x")


def place(rng: random.Random) -> tuple[int, int]:
    """Offset and length: half of them as a kernel asks, the others anywhere."""
    if rng.random() < 0.5:
        pages = rng.choice((1, 1, 1, 8, 32))
        offset = rng.randrange(DEVICE_BYTES // PAGE - pages + 1) * PAGE
        return offset, pages * PAGE
    length = rng.choice((1, 512, 4095, 4097, rng.randrange(1, 3 * PAGE), rng.randrange(1, 300_000)))
    return rng.randrange(DEVICE_BYTES - length + 1), length


def extents(handle: Any, offset: int, length: int, flags: int = 0) -> list[tuple[int, int, int]]:
    """[(offset, length, type)] of base:allocation."""
    found: list[tuple[int, int, int]] = []

    def take(_context: str, start: int, entries: list[int], _error: int) -> int:
        for size, kind in zip(entries[::2], entries[1::2], strict=True):
            found.append((start, size, kind))
            start += size
        return 0

    handle.block_status(length, offset, take, flags)
    return found


def test_any_request_against_the_model(server: Server, rng: random.Random) -> None:
    model = bytearray(DEVICE_BYTES)
    handles = [server.connect() for _ in range(3)]
    for _ in range(1500):
        handle = rng.choice(handles)  # what one connection wrote, the others read at once
        offset, length = place(rng)
        end = offset + length
        match rng.choices(("read", "write", "trim", "zero", "other"), (40, 40, 6, 8, 6))[0]:
            case "read":
                assert handle.pread(length, offset) == model[offset:end], (offset, length)
            case "write":
                data = content(rng, length)
                handle.pwrite(data, offset, rng.choice((0, nbd.CMD_FLAG_FUA)))
                model[offset:end] = data
            case "trim":
                handle.trim(length, offset, rng.choice((0, nbd.CMD_FLAG_FUA)))
                first, last = -(-offset // PAGE) * PAGE, end // PAGE * PAGE
                if first < last:
                    model[first:last] = bytes(last - first)
            case "zero":
                flags = rng.choice((0, nbd.CMD_FLAG_NO_HOLE)) | rng.choice((0, nbd.CMD_FLAG_FUA))
                handle.zero(length, offset, flags | rng.choice((0, nbd.CMD_FLAG_FAST_ZERO)))
                model[offset:end] = bytes(length)
            case "other":
                handle.cache(length, offset)
                handle.flush()
    assert handles[0].pread(DEVICE_BYTES, 0) == model
    at = 0
    for start, size, kind in extents(handles[1], 0, DEVICE_BYTES):
        assert start == at
        at += size
        if kind & ZERO:
            assert not any(model[start : start + size]), (start, size)
    assert at == DEVICE_BYTES
    stats = server.rpc("stats")
    assert stats["corrupt_loads"] == stats["failed_requests"] == stats["failed_stores"] == 0
    handles[0].trim(DEVICE_BYTES, 0)
    stats = server.rpc("stats")
    assert stats["pers_zpages"] == stats["same_filled_pages"] == stats["pers_pageframes"] == 0


def test_sectors_of_one_page_from_many_connections(server: Server, seed: int) -> None:
    """Eight connections, each with one 512-byte sector of the same page: none loses a write."""
    errors: list[str] = []
    last: dict[int, bytes] = {}

    def writer(sector: int) -> None:
        rng = random.Random(f"{seed} {sector}")
        handle = server.connect()
        for _ in range(250):
            last[sector] = data = content(rng, 512)
            handle.pwrite(data, PAGE + sector * 512)
            if handle.pread(512, PAGE + sector * 512) != data:
                errors.append(f"sector {sector}")

    threads = [threading.Thread(target=writer, args=(sector,)) for sector in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    page = server.connect().pread(3 * PAGE, 0)
    assert page == bytes(PAGE) + b"".join(last[sector] for sector in range(8)) + bytes(PAGE)
    assert server.rpc("stats")["partial_writes"] == 8 * 250


def test_page_writes_race_with_sector_writes(server: Server, seed: int) -> None:
    """Whole-page writes of one byte value race with a sector's: no sector is ever torn."""
    stop = threading.Event()
    errors: list[str] = []

    def whole_pages() -> None:
        handle, rng = server.connect(), random.Random(seed)
        while not stop.is_set():
            handle.pwrite(bytes([rng.randrange(256)]) * PAGE, 0)

    def sector() -> None:
        handle, rng = server.connect(), random.Random(seed + 1)
        while not stop.is_set():
            handle.pwrite(bytes([rng.randrange(256)]) * 512, 1024)

    threads = [threading.Thread(target=target) for target in (whole_pages, sector, sector)]
    handle = server.connect()
    for thread in threads:
        thread.start()
    for _ in range(500):
        page = handle.pread(PAGE, 0)
        around = page[:1024] + page[1536:]
        if len(set(around)) > 1 or len(set(page[1024:1536])) > 1:
            errors.append(page.hex())
            break
    stop.set()
    for thread in threads:
        thread.join()
    assert not errors


def test_extents_tell_holes_from_zeros_from_data(server: Server) -> None:
    handle = server.connect()
    assert extents(handle, 0, DEVICE_BYTES) == [(0, DEVICE_BYTES, HOLE | ZERO)]
    handle.pwrite(b"data" * 2048, 2 * PAGE)  # pages 2 and 3
    handle.zero(2 * PAGE, 5 * PAGE, nbd.CMD_FLAG_NO_HOLE)
    handle.pwrite(b"more" * 1024, 8 * PAGE)
    handle.zero(PAGE, 8 * PAGE)
    empty = HOLE | ZERO
    assert extents(handle, 0, 10 * PAGE) == [
        (0, 2 * PAGE, empty),
        (2 * PAGE, 2 * PAGE, 0),
        (4 * PAGE, PAGE, empty),
        (5 * PAGE, 2 * PAGE, ZERO),
        (7 * PAGE, 3 * PAGE, empty),
    ]
    ((start, size, kind),) = extents(handle, 2 * PAGE + 100, 50)
    assert (start, kind) == (2 * PAGE + 100, 0)
    assert size >= 50  # the last extent may reach further
    assert len(extents(handle, 0, 10 * PAGE, nbd.CMD_FLAG_REQ_ONE)) == 1
    handle.trim(2 * PAGE, 2 * PAGE)
    assert extents(handle, 0, 5 * PAGE) == [(0, 5 * PAGE, empty)]


def test_what_a_kernel_asks_before_it_swaps(server: Server) -> None:
    handle = server.connect()
    assert handle.get_size() == DEVICE_BYTES
    assert handle.get_block_size(nbd.SIZE_MINIMUM) == 1
    assert handle.get_block_size(nbd.SIZE_PREFERRED) == PAGE
    assert handle.get_block_size(nbd.SIZE_MAXIMUM) == 32 << 20
    yes = ("multi_conn", "fua", "flush", "trim", "zero", "fast_zero", "cache", "df")
    for question in yes:
        assert getattr(handle, f"can_{question}")(), question
    assert not handle.is_rotational()
    assert not handle.is_read_only()
    description = handle.get_export_description()
    for words in ("zcache", "4M", "8M", "zbud", "lz4"):
        assert words in description


def test_requests_outside_are_refused(server: Server) -> None:
    handle = server.connect()
    handle.set_strict_mode(0)
    requests: tuple[Callable[[], Any], ...] = (
        lambda: handle.pread(PAGE, DEVICE_BYTES),
        lambda: handle.pwrite(b"x", DEVICE_BYTES),
        lambda: handle.trim(PAGE, DEVICE_BYTES - 100),
        lambda: handle.zero(PAGE, DEVICE_BYTES - 100),
    )
    for request in requests:
        with pytest.raises(nbd.Error):
            request()
    handle.pwrite(b"x" * 100, DEVICE_BYTES - 100)
    assert handle.pread(100, DEVICE_BYTES - 100) == b"x" * 100


def test_largest_request(server: Server, rng: random.Random) -> None:
    data = content(rng, DEVICE_BYTES // 2) + rng.randbytes(DEVICE_BYTES // 2)
    handle = server.connect()
    handle.pwrite(data, 0)
    assert handle.pread(DEVICE_BYTES, 0) == data


def test_read_only_export(tmp_path: Path) -> None:
    with Server(tmp_path, "size=1M", "pool=1M", options=("-r",)) as server:
        handle = server.connect()
        assert handle.is_read_only()
        assert handle.pread(PAGE, 0) == bytes(PAGE)


@pytest.mark.parametrize("codec", ["none", "zstd", "zstd:19"])
def test_other_codecs(tmp_path: Path, rng: random.Random, codec: str) -> None:
    with Server(tmp_path, "size=1M", "pool=2M", f"codec={codec}", "commit=all") as server:
        handle = server.connect()
        data = b"".join(content(rng, 16 * PAGE) for _ in range(16))
        handle.pwrite(data, 0)
        assert handle.pread(len(data), 0) == data
        assert server.rpc("config")["codec"] == codec


def test_full_pool_refuses_and_keeps(tmp_path: Path, rng: random.Random) -> None:
    """ENOSPC once noise fills the pool; what was acknowledged stays; room comes back."""
    with Server(tmp_path, "size=8M", "pool=2M") as server:
        handle = server.connect()
        written: dict[int, bytes] = {}
        refused = 0
        for page in range(700):
            data = rng.randbytes(PAGE)
            try:
                handle.pwrite(data, page * PAGE)
                written[page] = data
            except nbd.Error as error:
                assert error.errno == "ENOSPC"  # noqa: PT017 (the write may also pass)
                refused += 1
        assert len(written) == 512
        assert refused == 700 - 512
        with pytest.raises(nbd.Error):  # an overwrite is refused too, and keeps the old content
            handle.pwrite(rng.randbytes(PAGE), 5 * PAGE)
        for page, data in written.items():
            assert handle.pread(PAGE, page * PAGE) == data
        stats, health = server.rpc("stats"), server.rpc("health")
        assert stats["failed_stores"] == refused + 1
        assert stats["pers_pageframes"] == stats["pool_limit_frames"] == 512
        assert health["status"] == "critical"
        assert "ENOSPC" in health["reasons"][0]["what"]
        handle.trim(100 * PAGE, 0)
        for page in range(700, 800):
            handle.pwrite(rng.randbytes(PAGE), page * PAGE)
        assert server.rpc("stats")["committed_frames"] <= 512


def test_pool_too_small_against_the_model(tmp_path: Path, seed: int) -> None:
    """Four clients in a pool that is always nearly full: a refused page is old or new, whole."""
    errors: list[str] = []
    part = DEVICE_BYTES // 4

    def client(server: Server, number: int) -> None:
        rng, handle = random.Random(f"{seed} {number}"), server.connect()
        base, model = number * part, bytearray(part)
        for _ in range(300):
            length = rng.choice((512, PAGE, 8 * PAGE, rng.randrange(1, 100_000)))
            at = rng.randrange(part - length + 1) // 512 * 512
            match rng.choices(("write", "read", "trim"), (5, 4, 1))[0]:
                case "write":
                    data = content(rng, length)
                    try:
                        handle.pwrite(data, base + at)
                        model[at : at + length] = data
                    except nbd.Error:
                        old, new = bytes(model), bytearray(model)
                        new[at : at + length] = data
                        now = handle.pread(part, base)
                        for page in range(0, part, PAGE):
                            is_now = now[page : page + PAGE]
                            if is_now not in (old[page : page + PAGE], new[page : page + PAGE]):
                                errors.append(f"client {number}: page at {page} is neither")
                        model[:] = now
                case "read":
                    if handle.pread(length, base + at) != model[at : at + length]:
                        errors.append(f"client {number}: read of {length} at {at}")
                case "trim":
                    handle.trim(length, base + at)
                    first, last = -(-at // PAGE) * PAGE, (at + length) // PAGE * PAGE
                    if first < last:
                        model[first:last] = bytes(last - first)
        if handle.pread(part, base) != model:
            errors.append(f"client {number}: at the end")

    with Server(tmp_path, f"size={DEVICE_BYTES}", "pool=1M") as server:
        threads = [threading.Thread(target=client, args=(server, number)) for number in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not errors, errors[:3]
        stats = server.rpc("stats")
        assert stats["failed_stores"] > 0
        assert stats["corrupt_loads"] == 0
        assert stats["pers_pageframes_max"] <= stats["pool_limit_frames"] == 256
        server.connect().trim(DEVICE_BYTES, 0)
        assert server.rpc("stats")["pers_pageframes"] == 0


def test_refused_writes_do_not_leak(tmp_path: Path, rng: random.Random) -> None:
    """nbdkit 1.32 drops no reference to an exception; ours must not be made anew each time."""
    with Server(tmp_path, "size=8M", "pool=1M") as server:
        handle = server.connect()
        noise = rng.randbytes(PAGE)
        page = 0
        while server.rpc("stats")["failed_stores"] == 0:
            try:
                handle.pwrite(noise, page * PAGE)
            except nbd.Error:
                break
            page += 1

        def refused(times: int) -> None:
            for _ in range(times):
                with pytest.raises(nbd.Error):
                    handle.pwrite(noise, page * PAGE)

        refused(500)
        before = resident_bytes(server.pid)
        refused(5000)
        assert resident_bytes(server.pid) - before < 256 << 10
