"""A donor that lies: `zcache node` whose answers to get have a bit flipped, or are exchanged."""

from __future__ import annotations

import sys
from typing import Any

from cluster import lending
from cluster.donor import OwnerEnd
from cluster.peerwire import Hello, sealed_bytes, unpack

honest = OwnerEnd.request


def lie(self: OwnerEnd, method: str, params: list[Any]) -> Any:
    """What is answered to one request."""
    result = honest(self, method, params)
    if method != "get" or not result[2]:
        return result
    offer, codes, payload = result
    lengths = [sealed_bytes(page.length_codec) for page in unpack(params[0])]
    if len(lengths) > 1 and lengths[0] == lengths[1] and not any(codes[:2]):
        n = lengths[0]  # two pages of one length change places
        payload = payload[n : 2 * n] + payload[:n] + payload[2 * n :]
    else:
        payload = payload[:-1] + bytes([payload[-1] ^ 1])
    return [offer, codes, payload]


def welcome(self: OwnerEnd, row: int, said: Hello) -> None:
    """Its lane is not told: everything it is asked is answered above."""
    self.row, self.epoch, self.owner, self.turn = row, said.epoch, said.owner, said.turn


if __name__ == "__main__":
    OwnerEnd.request = lie  # type: ignore[method-assign]
    OwnerEnd.welcome = welcome  # type: ignore[method-assign]
    sys.exit(lending.main())
