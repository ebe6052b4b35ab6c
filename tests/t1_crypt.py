"""Encryption: published vectors, every change refused, no nonce twice, no allocation."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.core_helpers import PAGE, run_counting_malloc
from zcache_core.crypt import CIPHER_NAMES, Sealer, aead
from zcache_core.memfile import MemoryFile

SEAL = 24  # counter 8, tag 16
AES, CHACHA = 1, 2
FIELDS = {
    "epoch": 2**64 - 1,
    "version": 2**52 - 1,
    "page": 2**32 - 1,
    "length_codec": 0xFFFF,
    "device": 15,
    "purpose": 2,
}

# The GCM submission to NIST (McGrew, Viega), test cases 13 to 16, and RFC 8439, 2.8.2.
GCM_KEY = "feffe9928665731c6d6a8f9467308308" * 2
GCM_NONCE = "cafebabefacedbaddecaf888"
GCM_PLAIN = (
    "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
    "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b391aafd255"
)
GCM_CIPHER = (
    "522dc1f099567d07f47f37a32a84427d643a8cdcbfe5c0c97598a2bd2555d1aa"
    "8cb08e48590dbb3da7b08b1056828838c5f61e6393ba7a0abcc9f662898015ad"
)
SUNSCREEN = (
    b"Ladies and Gentlemen of the class of '99: If I could offer you only one tip for the "
    b"future, sunscreen would be it."
)
VECTORS = {
    "gcm-13": (AES, "00" * 32, "00" * 12, "", "", "", "530f8afbc74536b9a963b4f1c4cb738b"),
    "gcm-14": (
        AES, "00" * 32, "00" * 12, "", "00" * 16,
        "cea7403d4d606b6e074ec5d3baf39d18", "d0d1c8a799996bf0265b98b5d48ab919",
    ),
    "gcm-15": (
        AES, GCM_KEY, GCM_NONCE, "", GCM_PLAIN, GCM_CIPHER, "b094dac5d93471bdec1a502270e3cc6c",
    ),
    "gcm-16": (
        AES, GCM_KEY, GCM_NONCE, "feedfacedeadbeeffeedfacedeadbeefabaddad2",
        GCM_PLAIN[:120], GCM_CIPHER[:120], "76fc6ece0f4e1768cddf8853bb2d551b",
    ),
    "rfc8439": (
        CHACHA, bytes(range(0x80, 0xA0)).hex(), "070000004041424344454647",
        "50515253c0c1c2c3c4c5c6c7", SUNSCREEN.hex(),
        "d31a8d34648e60db7b86afbc53ef7ec2a4aded51296e08fea9e2b5a736ee62d6"
        "3dbea45e8ca9671282fafb69da92728b1a71de0a9e060b2905d6a5b67ecd3b36"
        "92ddbd7f2d778b8c9803aee328091b58fab324e4fad675945585808b4831d7bc"
        "3ff4def08e4b7a9de576d26586cec64b6116",
        "1ae10b594f09e26a7e902ecbd0600691",
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def memory() -> Iterator[MemoryFile]:
    memory = MemoryFile.create(None, PAGE, PAGE)
    yield memory
    memory.close()


@pytest.mark.parametrize("name", VECTORS)
def test_published_vectors(name: str) -> None:
    cipher, *words = VECTORS[name]
    key, nonce, about, plain, ciphertext, tag = (bytes.fromhex(str(word)) for word in words)
    assert aead(int(cipher), key, nonce, about, plain) == (ciphertext, tag)
    assert aead(int(cipher), key, nonce, about, ciphertext, tag) == plain
    assert aead(int(cipher), key, nonce, about + b"x", ciphertext, tag) is None


def test_the_sealed_bytes_are_the_documented_ones(memory: MemoryFile) -> None:
    """counter (8), tag (16), ciphertext; nonce and associated data put together by hand."""
    key = memory.peek(4096, 32)
    for cipher in CIPHER_NAMES:
        sealed = Sealer(memory, cipher).seal(b"a page", **{n: v - 1 for n, v in FIELDS.items()})
        about = bytes.fromhex("feffffffffffffff feffffffffff0f00 feffffff feff 0e 01")
        opened = aead(cipher, key, sealed[:8] + b"\1\0\0\0", about, sealed[24:], sealed[8:24])
        assert opened == b"a page"


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_whatever_is_changed_is_refused(memory: MemoryFile, data: st.DataObject) -> None:
    cipher = data.draw(st.sampled_from(sorted(CIPHER_NAMES)))
    sealer = Sealer(memory, cipher)
    about = {name: data.draw(st.integers(0, most)) for name, most in FIELDS.items()}
    plain = data.draw(st.binary(min_size=1, max_size=PAGE))
    sealed = sealer.seal(plain, **about)
    assert len(sealed) == len(plain) + SEAL
    assert sealer.open(sealed, **about) == plain
    at = data.draw(st.integers(0, len(sealed) - 1))
    flip = data.draw(st.integers(1, 255))
    changed = sealed[:at] + bytes([sealed[at] ^ flip]) + sealed[at + 1 :]
    assert sealer.open(changed, **about) is None
    name = data.draw(st.sampled_from(sorted(FIELDS)))
    other = data.draw(st.integers(0, FIELDS[name]).filter(lambda value: value != about[name]))
    assert sealer.open(sealed, **{**about, name: other}) is None
    assert sealer.open(sealed[:-1], **about) is None
    assert sealer.open(sealed, 3 - cipher, **about) is None


def test_another_file_or_purpose_has_another_key(memory: MemoryFile) -> None:
    other = MemoryFile.create(None, PAGE, PAGE)
    sealed = Sealer(memory).seal(b"secret")
    assert Sealer(other).open(sealed) is None
    assert Sealer(memory, for_peers=True).open(sealed) is None
    assert Sealer(memory).open(sealed) == b"secret"
    keys = [file.peek(at, 32) for file in (memory, other) for at in (4096, 4128)]
    assert len({*keys, bytes(32)}) == 5
    other.close()


def test_no_nonce_twice(memory: MemoryFile) -> None:
    """By threads, by several sealers of one file, and after each of them is gone."""
    counters: list[int] = []

    def work(sealer: Sealer) -> None:
        counters.extend(int.from_bytes(sealer.seal(b"x")[:8], "little") for _ in range(2000))

    for _ in range(3):
        sealers = [Sealer(memory), Sealer(memory)]
        threads = [threading.Thread(target=work, args=(s,)) for s in sealers * 2]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(set(counters)) == len(counters) == 24_000
    assert max(counters) < int.from_bytes(memory.peek(96, 8), "little"), "reserved before use"


def test_a_range_that_ends(memory: MemoryFile) -> None:
    sealer = Sealer(memory)
    before = int.from_bytes(sealer.seal(b"x")[:8], "little")
    other = int.from_bytes(Sealer(memory).seal(b"x")[:8], "little")
    sealer.seal(b"x", (1 << 20) - 1)  # all that were left of its range
    after = int.from_bytes(sealer.seal(b"x")[:8], "little")
    assert after > other > before
    assert after == int.from_bytes(memory.peek(96, 8), "little") - (1 << 20)


COUNTED = """
import ctypes
from zcache_core.crypt import Sealer, time_seal
from zcache_core.memfile import MemoryFile
calls = ctypes.CDLL(None).malloc_calls
calls.restype = ctypes.c_ulong
memory = MemoryFile.create(None, 4096, 4096)
for cipher in (1, 2):
    sealer = Sealer(memory, cipher)
    time_seal(sealer, bytes(4096), 10)
    spent = []
    for rounds in (10, 5000):
        before = calls()
        time_seal(sealer, bytes(4096), rounds)
        spent.append(calls() - before)
    assert spent[0] > 0, "the counter counts nothing"
    assert abs(spent[1] - spent[0]) < 10, spent
memory.close()
"""


def test_nothing_is_allocated_for_a_blob(tmp_path: Path) -> None:
    """As many calls of malloc for 5000 blobs as for 10."""
    run_counting_malloc(tmp_path, COUNTED)
