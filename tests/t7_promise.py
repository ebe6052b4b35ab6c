"""A real server with just the disk of which it says: no write is ever refused."""

from __future__ import annotations

import os
import random
from pathlib import Path

from tests.plugin_helpers import Server
from tests.t7_disk import MIB, PAGE, PIECE
from zcache_core.diskfile import promised_bytes


def test_promised_disk_takes_a_device_full_of_noise(tmp_path: Path, rng: random.Random) -> None:
    """Every page of the device random bytes, twice, in random order: the least disk will do."""
    size = 48 * MIB
    promised = promised_bytes(size)
    disk = tmp_path / "disk"
    words = (f"size={size}", "pool=4M", f"disk={disk}", f"disk_size={promised}")
    with Server(tmp_path, *words) as server:
        assert "no write is ever refused" in server.log()
        handle = server.connect()
        content = bytearray(size)
        offsets = list(range(0, size, PAGE))
        for _ in range(2):
            rng.shuffle(offsets)
            for offset in offsets:
                content[offset : offset + PAGE] = data = rng.randbytes(PAGE)
                handle.pwrite(data, offset)
        for offset in range(0, size, PIECE):
            assert handle.pread(PIECE, offset) == content[offset : offset + PIECE], offset
        stats = server.rpc("stats")
        assert stats["committed_frames_max"] <= 4 * MIB // PAGE
        assert stats["disk_written_bytes"] > size
        assert stats["disk_cleaned_bytes"] > 0, "the second time there was no room without it"
        for name in ("failed_stores", "failed_requests", "corrupt_loads", "disk_corrupt_pages"):
            assert stats[name] == 0, name
        assert os.stat(disk).st_blocks * 512 >= promised, "room that was promised was given away"
