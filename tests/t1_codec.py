"""Codecs against the Python bindings of the same libraries, and against damage."""

from __future__ import annotations

import random

import lz4.block
import pytest
import zstandard

from tests.core_helpers import PAGE, make_page
from zcache_core import codec as codecs
from zcache_core.codec import Codec


@pytest.fixture(params=["lz4", "zstd", "zstd:1", "zstd:19"])
def text(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def oracle(text: str, blob: bytes) -> bytes:
    """The page, by somebody else's reading of the blob."""
    if text == "lz4":
        return bytes(lz4.block.decompress(blob, uncompressed_size=PAGE))
    reader = zstandard.ZstdDecompressor(format=zstandard.FORMAT_ZSTD1_MAGICLESS)
    return reader.decompress(blob, max_output_size=PAGE)


def test_round_trip_and_oracle(text: str, rng: random.Random) -> None:
    codec = Codec(text)
    shrunk = 0
    for _ in range(300):
        page = make_page(rng)
        blob = codec.compress(page)
        if blob is not None:
            shrunk += 1
            assert codec.decompress(blob) == page
            assert oracle(text, blob) == page
    assert shrunk > 200


def test_room_is_kept(text: str, rng: random.Random) -> None:
    codec = Codec(text)
    for _ in range(200):
        page = make_page(rng)
        room = rng.randrange(1, PAGE + 1)
        blob = codec.compress(page, room)
        assert blob is None or len(blob) <= room


def test_noise_does_not_compress(text: str, rng: random.Random) -> None:
    assert Codec(text).compress(rng.randbytes(PAGE), PAGE - 88) is None


def test_damaged_blobs_never_crash(text: str, rng: random.Random) -> None:
    """Bytes flipped, cut off or made up: a page of 4096 bytes or ValueError, nothing else."""
    codec = Codec(text)
    found = 0
    for _ in range(2000):
        blob = bytearray(codec.compress(make_page(rng)) or rng.randbytes(500))
        for _ in range(rng.randrange(1, 4)):
            blob[rng.randrange(len(blob))] = rng.randrange(256)
        damaged = bytes(blob[: rng.randrange(1, len(blob) + 1)])
        try:
            assert len(codec.decompress(damaged)) == PAGE
        except ValueError:
            found += 1
    assert found > 500


GOLDEN = [  # bytes that stand in memory files and on disks must be readable for ever
    ("lz4", bytes(PAGE), "1f000100fffffffffffffffffffffffffffffff6500000000000"),
    (
        "lz4",
        (b"zcache" * 700)[:PAGE],
        "6f7a63616368650600" + "ff" * 15 + "f150657a636163",
    ),
    ("zstd", bytes(PAGE), "00104d00001000000100fbf70116"),
    ("zstd", (b"zcache" * 700)[:PAGE], "00106d0000307a63616368650100f78f5f8a"),
]


@pytest.mark.parametrize(("name", "page", "blob"), GOLDEN)
def test_golden_blobs(name: str, page: bytes, blob: str) -> None:
    assert Codec(name).decompress(bytes.fromhex(blob)) == page


@pytest.mark.parametrize("text", ["gzip", "lz4:3", "zstd:0", "zstd:20", "zstd:x", ""])
def test_unknown_codecs_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="use "):
        codecs.parse(text)
