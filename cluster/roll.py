"""What stands below a prefix in etcd, kept by asking for what has changed since.

    all    the prefix                                  every row, their number, the store's revision
    news   the same, written after revision N only     few rows; the number of all there are

The rows that are known and the news are at least all there are: every row that was written since
is in the news.  If they are as many as there are, they are the ones.  Else some are gone, and all
are asked for again; so they are of another cluster, or of one whose revision went back.  (One that
was set back and is beyond our revision again is not known by that: so all are asked for after
each failure, and every WHOLE_EVERY-th time.)

    calm, 1,000 rows: an answer of 200 bytes instead of 270 kB

Bound: twice ROWS_MOST rows; where there are more than ROWS_MOST, the first of them are asked for
each time.
What it is not: what the rows mean (members.py).  Source: etcd's API, RangeRequest: `count` is of
all keys in the range, whatever min_mod_revision leaves out.
"""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

ROWS_MOST = 16384
WHOLE_EVERY = 75  # 10 min, at a quiet round of 8 s

Ask = Callable[[dict[str, Any]], dict[str, Any]]
"""A range request as JSON, keys and values in base64; its answer."""


class Roll:
    """`rows` below `prefix` (which ends with a slash), key to value, as of the last `ask`."""

    def __init__(self, prefix: str) -> None:
        end = prefix[:-1] + chr(ord(prefix[-1]) + 1)
        self._range = {"key": _to_base64(prefix), "range_end": _to_base64(end)}
        self._revision = 0
        self._cluster = ""
        self.rows: dict[bytes, bytes] = {}
        self.wholes = 0
        self._asked = 0

    def doubt(self) -> None:
        """All is asked for the next time."""
        self._revision = 0

    def ask(self, ask: Ask) -> dict[bytes, bytes]:
        """The rows as they are now.  Raises what `ask` raises, and ValueError and its like."""
        self._asked += 1
        if self._revision and self._asked % WHOLE_EVERY:
            news = {"min_mod_revision": self._revision + 1, "limit": ROWS_MOST}
            answer = ask(self._range | news)
            if self._are_news(answer):
                self.rows |= _rows(answer)
                if len(self.rows) == int(answer.get("count", 0)) <= ROWS_MOST:
                    self._revision = _revision(answer)
                    return self.rows
        self._revision = 0  # (an answer that can't be read is not believed in part)
        answer = ask(self._range | {"limit": ROWS_MOST})
        self.wholes += 1
        self.rows = _rows(answer)
        if len(self.rows) == int(answer.get("count", 0)):  # (else there are more than ROWS_MOST)
            self._revision, self._cluster = _revision(answer), _cluster(answer)
        return self.rows

    def forget(self, key: bytes) -> None:
        """It was seen to be deleted: the next answer need not be of all for that."""
        self.rows.pop(key, None)

    def _are_news(self, answer: dict[str, Any]) -> bool:
        return _cluster(answer) == self._cluster and _revision(answer) >= self._revision


def _rows(answer: dict[str, Any]) -> dict[bytes, bytes]:
    return {
        base64.b64decode(row["key"]): base64.b64decode(row.get("value", ""))
        for row in answer.get("kvs", ())
    }


def _revision(answer: dict[str, Any]) -> int:
    return int(answer.get("header", {}).get("revision", 0))


def _cluster(answer: dict[str, Any]) -> str:
    return str(answer.get("header", {}).get("cluster_id", ""))


def _to_base64(text: str) -> str:
    return base64.b64encode(text.encode()).decode()
