"""Index entries: every small damage is found, and fields come back as they went in."""

from __future__ import annotations

import itertools
import random

from zcache_core.index import pack_entry, pack_place, unpack_entry


def test_every_flip_of_one_two_or_three_bits_is_found(rng: random.Random) -> None:
    """The code is linear: it is enough to look at the syndromes of one code word."""
    location, word = pack_entry(2, rng.getrandbits(52), rng.getrandbits(64))
    assert unpack_entry(location, word)["sound"]
    flips = [(1 << i, 0) for i in range(64)] + [(0, 1 << i) for i in range(64)]
    for a, b in itertools.combinations_with_replacement(flips, 2):
        if a == b:
            b = (0, 0)
        assert not unpack_entry(location ^ a[0] ^ b[0], word ^ a[1] ^ b[1])["sound"]
    for _ in range(20000):
        bad = (location, word)
        for flip in rng.sample(flips, 3):
            bad = (bad[0] ^ flip[0], bad[1] ^ flip[1])
        assert not unpack_entry(*bad)["sound"]


def test_fields_come_back(rng: random.Random) -> None:
    for _ in range(2000):
        state, version = rng.randrange(7), rng.getrandbits(52)
        where, length, codec = rng.getrandbits(48), rng.randrange(1, 4097), rng.randrange(3)
        entry = unpack_entry(*pack_entry(state, version, pack_place(where, length, codec)))
        assert entry == {
            "state": state, "version": version, "sound": True,
            "where": where, "length": length, "codec": codec,
        }  # fmt: skip


def test_fresh_memory_is_an_index_of_empty_pages() -> None:
    assert unpack_entry(0, 0)["sound"]
    assert unpack_entry(0, 0)["state"] == 0


def test_golden_words() -> None:
    """Words that stand in memory files: by hand, from docs/memory-format.md."""
    assert pack_entry(0, 0, 0) == (0, 0)
    assert pack_place(0x123456789AB, 1200, 1) == 0x123456789AB << 16 | 1199 << 4 | 1
    location, word = pack_entry(2, 5, pack_place(4096, 100, 1))
    assert location == 4096 << 16 | 99 << 4 | 1
    assert word & ~0xFF0 == 5 << 12 | 2
