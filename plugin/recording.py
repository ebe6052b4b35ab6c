"""A file of looks at one server: appended to, bounded in size, read back as samples.

    {"zcache_record": 1, "t": 1700000000.0, "full": {counters}, "about": {...}, "health": {...}}
    {"t": 1700000001.0, "new": {"loads": 17}}                  what changed since the line before
    {"t": 1700000001.0, "new": {"put[11]": 3}, "peers": [...]} bucket 11 of a histogram; peers
    {"t": 1700000002.0, "silent": "why"}                       nobody answered
    ...                                                        a full line every FULL_EVERY

JSON, one look a line.  A file that has grown beyond its bound loses its older half, up to
a full line, which stands by itself.  A last line that was cut off (a full disk, a kill)
is removed at the next start and passed over by the reader.

Bound: `limit_bytes` and one line more; the reader keeps one sample at a time.
"""

from __future__ import annotations

import errno
import fcntl
import io
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from zcache_core.counters import BUCKETS, Histogram
from zcache_core.errors import ConfigError, InUseError

FORMAT = 1
FULL_EVERY = 100  # a full line is ten times as long as the others: a tenth more for the file
LIMIT_BYTES_MIN = 64 * 1024
LINE_BYTES_MAX = 1 << 20
ABOUT = ("ping", "config")


class Sample(NamedTuple):
    """One look: seconds since 1970; `stats` and the rest are empty when nobody answered.

    `stats` are the counters, and of each histogram the cells that are not 0 (`flat`).
    """

    time_s: float
    stats: Mapping[str, int]
    health: Mapping[str, Any]
    about: Mapping[str, Any]
    silent: str = ""
    peers: Sequence[Mapping[str, Any]] = ()


def flat(stats: Mapping[str, Any]) -> dict[str, int]:
    """The answer of `stats` as whole numbers by name: put[11] is bucket 11 of the histogram."""
    found = {name: n for name, n in stats.items() if isinstance(n, int)}
    for name, histogram in stats.get("histograms", {}).items():
        cells = [*enumerate(histogram["buckets"]), ("sum", histogram["sum"])]
        found |= {f"{name}[{at}]": n for at, n in cells if n}
    return found


def histogram(stats: Mapping[str, int], which: Histogram) -> dict[str, Any]:
    """One of a sample's, as `stats` answered it; an older recording has none: it is empty."""
    buckets = [stats.get(f"{which.name}[{at}]", 0) for at in range(BUCKETS)]
    total = stats.get(f"{which.name}[sum]", 0)
    return {"unit": which.unit, "count": sum(buckets), "sum": total, "buckets": buckets}


class Recorder:
    """Appends to the file at `path`, made if missing.  Raises ConfigError, InUseError."""

    def __init__(self, path: str | Path, limit_bytes: int) -> None:
        self._path, self._limit_bytes = Path(path), limit_bytes
        if limit_bytes < LIMIT_BYTES_MIN:
            raise ConfigError(f"a recording needs room; use a limit of {LIMIT_BYTES_MIN} or more")
        self._file = self._opened()
        self._last: Mapping[str, int] = {}
        self._health: Mapping[str, Any] = {}
        self._peers: Sequence[Mapping[str, Any]] = ()
        self._server: Any = None
        self._until_full = 0

    def _opened(self) -> io.FileIO:
        try:
            # No buffer: what could not be written is not tried again at the end.
            file = open(self._path, "a+b", buffering=0)  # noqa: SIM115
        except OSError as error:
            raise ConfigError(
                f"{self._path} cannot be written ({error.strerror}); name another file"
            ) from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise InUseError(
                f"another 'zcache record' writes to {self._path}; name another file"
            ) from None
        file.seek(0)
        first = file.read(64)
        if first and not _is_ours(first):
            file.close()
            raise ConfigError(f"{self._path} exists and is no recording of ours; name another file")
        _cut_torn_line(file)
        return file

    def add(self, sample: Sample) -> None:
        """Append it.  Raises ConfigError when the file system is full."""
        line: dict[str, Any] = {"t": round(sample.time_s, 3)}
        if sample.silent:
            line["silent"] = sample.silent
            self._until_full = 0
        elif self._until_full == 0 or self._is_another(sample):
            line = {"zcache_record": FORMAT, **line, "full": sample.stats}
            line |= {"about": sample.about, "health": sample.health}
            if sample.peers:
                line["peers"] = sample.peers
            self._until_full = FULL_EVERY
        else:
            line["new"] = {
                name: value for name, value in sample.stats.items() if self._last.get(name) != value
            }
            if sample.health != self._health:
                line["health"] = sample.health
            if sample.peers != self._peers:
                line["peers"] = sample.peers
        if not sample.silent:
            self._until_full -= 1
            self._last, self._health = sample.stats, sample.health
            self._peers = sample.peers
            self._server = sample.about.get("ping")
        try:
            data = json.dumps(line, separators=(",", ":")).encode() + b"\n"
            if self._file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            if self._file.seek(0, os.SEEK_END) > self._limit_bytes:
                self._forget_older_half()
        except OSError as error:
            raise ConfigError(
                f"{self._path} cannot be written any more ({error.strerror}); what is there stays"
            ) from None

    def _is_another(self, sample: Sample) -> bool:
        """A server that began anew, if with the old number: something it counted is gone."""
        return bool(
            sample.about.get("ping") != self._server or self._last.keys() - sample.stats.keys()
        )

    def _forget_older_half(self) -> None:
        rest = b""
        with open(self._path, "rb") as old:
            old.seek(self._limit_bytes // 2)
            old.readline()
            while line := old.readline():
                if line.startswith(b'{"zcache_record"'):
                    rest = line + old.read()
                    break
        fresh = self._path.with_name(self._path.name + ".new")
        with open(fresh, "wb") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            file.write(rest)
        os.replace(fresh, self._path)
        self._file.close()
        self._file = self._opened()
        if not rest:
            self._until_full = 0

    def close(self) -> None:
        """What was added stays."""
        self._file.close()


def samples(path: str | Path) -> Iterator[Sample]:
    """Every sample in order.  Raises ConfigError when it is no recording."""
    stats: Mapping[str, int] = {}
    health: Mapping[str, Any] = {}
    about: Mapping[str, Any] = {}
    peers: Sequence[Mapping[str, Any]] = ()
    try:
        with open(path, "rb") as file:
            number = 0
            while text := file.readline(LINE_BYTES_MAX):
                number += 1
                try:
                    line = json.loads(text)
                    time_s = float(line["t"])
                except (ValueError, KeyError, TypeError):
                    if number > 1 and not text.endswith(b"\n"):
                        return  # being written, or cut off
                    raise ConfigError(
                        f"line {number} of {path} is none of 'zcache record'; name a recording"
                    ) from None
                if "silent" in line:
                    yield Sample(time_s, {}, {}, about, line["silent"])
                    continue
                if "full" in line:
                    stats, peers = line["full"], ()
                else:
                    stats = {**stats, **line.get("new", {})}
                health, about = line.get("health", health), line.get("about", about)
                peers = tuple(line.get("peers", peers))
                yield Sample(time_s, stats, health, about, peers=peers)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); name a recording") from None


def _is_ours(first: bytes) -> bool:
    return first.startswith((b'{"zcache_record"', b'{"t":'))


def _cut_torn_line(file: io.FileIO) -> None:
    end = file.seek(0, os.SEEK_END)
    start = max(0, end - (1 << 20))
    file.seek(start)
    tail = file.read()
    if tail and not tail.endswith(b"\n"):
        file.truncate(start + tail.rfind(b"\n") + 1)
        file.seek(0, os.SEEK_END)
