"""Pages of one put, as the wire has them: one thing from the ring to the donors.

    ring --records, payload--> Sheaf --the same bytes to each donor--> link

Nobody makes an object for a page on that way.  A sheaf is taken apart only when something is the
matter: some of its pages are refused, or are just being renewed.

Bound: BATCH_PAGES pages.  What it is not: it checks nothing; a donor does.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from cluster.frames import keys_of, put_of
from cluster.peerwire import BATCH_PAGES, RECORD_BYTES, Page, sealed_bytes, unpack

Part = tuple[int, int, int, bytes]  # page, version, length_codec, sealed


class Sheaf:
    """Records and payload (peerwire), BATCH_PAGES pages at most; `keys`: (page, version) each."""

    __slots__ = ("_keys", "payload", "records")

    def __init__(self, records: bytes, payload: bytes) -> None:
        self.records, self.payload = records, payload
        self._keys: set[tuple[int, int]] | None = None

    @classmethod
    def of(cls, parts: Sequence[Part]) -> Sheaf:
        """Raises ValueError when sealed bytes are not as long as length_codec says."""
        return cls(*put_of(parts))

    @property
    def keys(self) -> set[tuple[int, int]]:
        """Not to be changed."""
        if self._keys is None:
            self._keys = keys_of(self.records)
        return self._keys

    def __len__(self) -> int:
        return len(self.records) // RECORD_BYTES

    def pages(self) -> list[Page]:
        """Its records, taken apart."""
        return unpack(self.records)

    def __iter__(self) -> Iterator[Part]:
        at = 0
        for page in self.pages():
            end = at + sealed_bytes(page.length_codec)
            yield page.page, page.version, page.length_codec, self.payload[at:end]
            at = end

    def some(self, places: Sequence[int]) -> Sheaf:
        """Those of its pages; itself when that is all."""
        if len(places) == len(self):
            return self
        parts = list(self)
        return Sheaf.of([parts[i] for i in places])


def sheaves_of(parts: Sequence[Part]) -> list[Sheaf]:
    """Any number of pages, bound."""
    return [
        Sheaf.of(parts[first : first + BATCH_PAGES]) for first in range(0, len(parts), BATCH_PAGES)
    ]
