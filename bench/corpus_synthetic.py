"""Pages that look like memory, made from a seed: where no live process can be captured.

Every page is of one kind; kinds come in runs of RUN_PAGES, as neighbouring heap pages do:

    kind       share  what it holds                                      LZ4 leaves of it
    objects     40 %  heap objects: pointers, types, reference counts,   0.26 to 0.39
                      small sizes, short strings; some heaps more alike
    records     16 %  arrays of structs of small integers and pointers   0.20 to 0.44
    text        14 %  lines of words and of phrases that come again      0.60 to 0.72
    json        14 %  documents of one shape                             0.42 to 0.46
    sparse       7 %  mostly zeros, a few short runs of data             0.02 to 0.11
    numbers      5 %  measured values as doubles                         0.36 to 0.71
    noise        3 %  already compressed or encrypted                    1.00
    same         1 %  one repeated 8-byte word, not zero                 0.01

Page by page, LZ4 leaves 0.40 of the whole, and 3 % of the pages do not compress at all.  Captured
live programs (corpus_programs.py) were measured beside it: python3 0.31, compiler 0.31, node 0.36,
redis 0.53, 0.38 in the mean, and below 0.4 % that do not compress.  It is no stand-in for a
measurement on captured pages: dictionaries and cross-page effects follow the generator, not a
program.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator

PAGE_BYTES = 4096
RUN_PAGES = 32
VOWELS, CONSONANTS = "aeiou", "bcdfghklmnprstvw"


class _Maker:
    """Makes one page of each kind; all state comes from the seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.heap = 0x7F00_0000_0000 + self.rng.randrange(1 << 30) * 4096
        self.types = [self.heap - self.rng.randrange(1 << 20) * 16 for _ in range(24)]
        self.words = sorted({self._word() for _ in range(3000)})
        self.phrases = [
            " ".join(self._some_word() for _ in range(self.rng.randrange(2, 6))) for _ in range(400)
        ]
        self.next_id = 1000
        self.begin_run()

    def begin_run(self) -> None:
        self.repetition = self.rng.random()

    def _word(self) -> str:
        rng = self.rng
        return "".join(
            rng.choice(CONSONANTS) + rng.choice(VOWELS) + rng.choice(("", "", "n", "s", "r"))
            for _ in range(rng.choice((1, 2, 2, 3, 3, 4)))
        )

    def _some_word(self) -> str:
        """Few words are frequent, most are rare."""
        return self.words[int(len(self.words) * self.rng.random() ** 2)]

    def _some_phrase(self) -> str:
        return self.phrases[int(len(self.phrases) * self.rng.random() ** 4)]

    def objects(self) -> bytes:
        """repetition: how many of the objects are alike, which differs from heap to heap."""
        rng, parts, size = self.rng, [], 0
        near = self.heap + rng.randrange(1 << 14) * 4096
        while size < PAGE_BYTES:
            kind = self.types[int(len(self.types) * rng.random() ** 3)]
            if rng.random() < self.repetition:
                body = struct.pack("<QQQQ", 1, kind, near + size, 0)
            elif rng.random() < 0.35:
                text = self._some_word().encode()
                body = struct.pack("<QQQ", 1, kind, len(text))
                body += text + bytes(-len(text) % 16 + 8)
            else:
                fields = [near + rng.randrange(256) * 16 for _ in range(rng.choice((1, 2, 3)))]
                fields += [0] * rng.choice((1, 1, 2, 3)) + [rng.randrange(64)]
                body = struct.pack(f"<QQ{len(fields)}Q", rng.choice((1, 1, 2)), kind, *fields)
            parts.append(body)
            size += len(body)
        return b"".join(parts)[:PAGE_BYTES]

    def records(self) -> bytes:
        rng = self.rng
        base = self.heap + rng.randrange(1 << 20) * 64
        first = rng.randrange(1 << 16)
        return b"".join(
            struct.pack(
                "<IHHQIIQ",
                first + i,
                rng.choice((1, 1, 2, 5)),
                0,
                base + (0 if rng.random() < self.repetition else i * 64),
                0 if rng.random() < self.repetition else rng.randrange(1 << 9),
                0,
                rng.choice((0, 0, 0, base)),
            )
            for i in range(PAGE_BYTES // 32)
        )

    def text(self) -> bytes:
        """Phrases come again, as in logs and sources."""
        rng, out, size = self.rng, [], 0
        while size < PAGE_BYTES:
            words = [self._some_phrase() for _ in range(rng.randrange(1, 4))]
            words.insert(rng.randrange(len(words) + 1), self._some_word())
            out.append(rng.choice(("", "    ", "        ")) + " ".join(words) + "\n")
            size += len(out[-1])
        return "".join(out).encode()[:PAGE_BYTES]

    def json(self) -> bytes:
        rng, out, size = self.rng, [], 0
        while size < PAGE_BYTES:
            self.next_id += rng.randrange(1, 9)
            document = {
                "id": self.next_id,
                "name": f"{self._some_word()} {self._some_word()}",
                "created": 1_700_000_000 + rng.randrange(10**7),
                "score": round(rng.random(), 4),
                "tags": [self._some_word() for _ in range(rng.randrange(4))],
                "active": rng.random() < 0.5,
            }
            out.append(json.dumps(document) + ("\0" * 8))
            size += len(out[-1])
        return "".join(out).encode()[:PAGE_BYTES]

    def sparse(self) -> bytes:
        page = bytearray(PAGE_BYTES)
        for _ in range(self.rng.randrange(4, 24)):
            data = self.rng.randbytes(self.rng.randrange(4, 20))
            at = self.rng.randrange(PAGE_BYTES - 32)
            page[at : at + len(data)] = data
        return bytes(page)

    def numbers(self) -> bytes:
        """Measured values: a few decimal places, as doubles."""
        mean, steps = self.rng.random() * 100, self.rng.choice((4, 16, 100, 1000))
        values = (round(self.rng.gauss(mean, 1 + mean / 10) * steps) / steps for _ in range(512))
        return struct.pack("<512d", *values)

    def noise(self) -> bytes:
        return self.rng.randbytes(PAGE_BYTES)

    def same(self) -> bytes:
        return struct.pack("<Q", self.rng.choice((1, 0x0101_0101_0101_0101, self.heap))) * 512


SHARES: tuple[tuple[Callable[[_Maker], bytes], int], ...] = (
    (_Maker.objects, 40),
    (_Maker.records, 16),
    (_Maker.text, 14),
    (_Maker.json, 14),
    (_Maker.sparse, 7),
    (_Maker.numbers, 5),
    (_Maker.noise, 3),
    (_Maker.same, 1),
)
"""Kind -> per cent of the runs."""


def runs(pages: int, seed: int) -> Iterator[bytes]:
    """`pages` pages in runs of RUN_PAGES of one kind; the same for the same seed, for ever."""
    assert sum(share for _, share in SHARES) == 100
    maker = _Maker(seed)
    kinds = [kind for kind, share in SHARES for _ in range(share)]
    order: list[Callable[[_Maker], bytes]] = []
    while pages > 0:
        if not order:  # a shuffled deck rather than dice: any 100 runs have the shares
            order = kinds.copy()
            maker.rng.shuffle(order)
        kind, count = order.pop(), min(RUN_PAGES, pages)
        maker.begin_run()
        yield b"".join(kind(maker) for _ in range(count))
        pages -= count
