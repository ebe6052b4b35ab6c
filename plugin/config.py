"""Configuration: key=value words from nbdkit's command line, parsed once.

    [("size", "8G"), ("pool", "25%")]  --parse-->  Config (frozen)

`KEYS` is the one table: order, default, how a value is read, and its help; what
--dump-plugin prints and messages come from it.  Whatever cannot be meant is
refused at start, with one sentence that says what to write instead.

What it is not: a check of the machine (`fitness.py`) or of what is in use
(`wiring.py`).
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from cluster.addresses import read_address
from plugin.amounts import PAGE_BYTES, human, size_bytes, total_ram_bytes, whole_pages
from plugin.codeckeys import RECOMPRESS_AGE_S, read_age, read_codec, read_recompress
from plugin.instance import DEVICE_PATTERN
from plugin.peerkeys import (
    PEER_KEYS,
    check_lending,
    check_nbd_key,
    check_peer_keys,
    default_backup,
    read_nbd,
)
from zcache_core import PAGES_PER_FRAME
from zcache_core.diskfile import LEAST_BYTES as DISK_BYTES_MIN
from zcache_core.errors import ConfigError

DEVICE_BYTES_MAX = 1 << 44  # 2^32 pages, what the index can name, of all devices
DEVICES_MAX = 8  # rows of the memory file's table
POOL_BYTES_MIN = 1 << 20  # below, the reserve of frames would be the whole pool
ALLOCATORS = tuple(PAGES_PER_FRAME)
HIGH_PERCENT = 90
LOW_BELOW_HIGH_PERCENT = 10  # enough that writeback comes in long sequential runs
WRITEBACK_LIMIT_BYTES_MIN = 1 << 20
REALTIME = ("auto", "yes", "no")
AHEAD = (
    "with commit=ahead the pool grows when memory is short, and a machine that swaps onto itself "
    "may hang then; where this machine is the one that swaps, use commit=all ('zcache up' does)"
)
STANDBY = ("auto", "yes", "no")
PRESSURE = ("psi", "none")


@dataclass(frozen=True)
class Config:
    """What the server runs with.  Sizes are whole pages."""

    size_bytes: int
    pool_bytes: int
    commit: str = "ahead"  # or "all"
    allocator: str = "zbud"
    codec: str = "lz4"  # or "zstd:LEVEL", "none"
    recompress: str = "none"  # or "zstd:LEVEL": for pages that have gone cold
    recompress_age_s: int = RECOMPRESS_AGE_S
    disk: str | None = None  # absolute path; None: RAM is all there is
    disk_size_bytes: int | None = None  # None: all that is there
    disk_force: str | None = None  # the same path as `disk`: its content may be overwritten
    encrypt: str = "no"  # or "yes": what is written to the disk
    writeback_limit_bytes: int | None = None  # written to the disk a day; None: as many as need be
    high_percent: int = HIGH_PERCENT
    low_percent: int = HIGH_PERCENT - LOW_BELOW_HIGH_PERCENT
    pressure: str = "psi"  # or "none", or the absolute path of a pressure file
    peers: tuple[str, ...] = ()  # addresses of donors
    replicas: int = 2  # copies of a page on different donors
    backup: str = "none"  # or "disk": one of a page at a donor and one on the disk
    etcd: str | None = None  # URL where donors are registered
    listen: str | None = None  # where owners reach what this machine lends
    donate_bytes: int = 0
    tls: str | None = None  # absolute path of the folder with node.pem
    nbd: str | None = None  # HOST:PORT for other machines; None: a Unix socket
    control: str | None = None  # absolute path; None: beside the NBD socket
    metrics: str | None = None  # HOST:PORT for OpenMetrics and the web page
    memory: str | None = None  # None: private to the process
    realtime: str = "auto"  # or "yes", "no"
    standby: str = "auto"  # or "yes", "no": of a supervised server
    devices: tuple[tuple[str, int], ...] = ()  # (name, bytes) of several, size_bytes in all

    @property
    def has_peers(self) -> bool:
        """Whether pages may go to the RAM of others."""
        return bool(self.peers) or self.etcd is not None

    def as_dict(self) -> dict[str, Any]:
        """Plain values under the names of the keys, sizes in bytes."""
        values = asdict(self)
        return {KEY_OF_FIELD.get(name, name): value for name, value in values.items()}


class Key(NamedTuple):
    """One key: `read` turns the text into the value of the Config's `field`."""

    name: str
    field: str
    default: str
    help: str
    read: Callable[[str, int], Any]  # (text, bytes of RAM)


def parse(pairs: Iterable[tuple[str, str]], ram_bytes: int | None = None) -> Config:
    """The Config of these words, in any order.  Raises ConfigError.

    `ram_bytes` is what percentages are of: this machine's RAM when it is None.
    """
    ram_bytes = total_ram_bytes() if ram_bytes is None else ram_bytes
    values: dict[str, Any] = {"pool_bytes": _pool("20%", ram_bytes)}
    given: set[str] = set()
    for name, text in pairs:
        key = _key(name)
        if name in given:
            raise ConfigError(f"{name} is given twice; write {name}= once")
        given.add(name)
        values[key.field] = key.read(text, ram_bytes)
    if "devices" in given:
        if "size" in given:
            raise ConfigError(
                "size= and devices= are two ways to say the same; leave one of them out"
            )
        values["size_bytes"] = sum(size for _, size in values["devices"])
    elif "size" not in given:
        raise ConfigError("size is missing; write size=8G for a swap device of 8 GiB")
    if "high" in given and "low" not in given:
        values["low_percent"] = max(1, values["high_percent"] - LOW_BELOW_HIGH_PERCENT)
    if values.get("commit") == "all" and values.setdefault("pressure", "none") != "none":
        raise ConfigError(
            "commit=all keeps the whole pool and pressure= gives it back; leave one of them out"
        )
    if "backup" not in given:
        values["backup"] = default_backup(
            bool(values.get("peers") or values.get("etcd")), values.get("disk"), given
        )
    config = Config(**values)
    _check_disk_keys(config, given)
    check_nbd_key(config.nbd, config.tls)
    check_peer_keys(
        *(config.peers, config.tls, config.disk, config.backup, config.listen, config.etcd),
        given - ({"tls"} if config.nbd else set()),
    )
    check_lending(config.listen, config.donate_bytes, config.tls, config.pool_bytes, ram_bytes)
    return config


def _check_disk_keys(config: Config, given: set[str]) -> None:
    """What keys of the disk mean only together.  Raises ConfigError."""
    if config.disk is None:
        of_disk = ["disk_size", "disk_force", "encrypt", "writeback_limit"]
        for name in of_disk if config.has_peers else [*of_disk, "high", "low"]:
            if name in given:
                raise ConfigError(
                    f"{name}= means something only with disk=PATH; add it, or leave {name}= out"
                )
    if config.low_percent > config.high_percent:
        raise ConfigError(
            f"low={config.low_percent} is above high={config.high_percent}; "
            f"write low={config.high_percent} or less, or a larger high="
        )
    if config.disk_force is not None and config.disk_force != config.disk:
        raise ConfigError(
            f"disk_force={config.disk_force} is another path than disk={config.disk}; repeat that "
            f"path if nothing on it is needed, or leave disk_force= out"
        )


def _key(name: str) -> Key:
    for key in KEYS:
        if key.name == name:
            return key
    near = difflib.get_close_matches(name, [key.name for key in KEYS], n=1, cutoff=0.5)
    names = ", ".join(key.name for key in KEYS)
    hint = f"did you mean {near[0]}=?  The keys are" if near else "use one of"
    raise ConfigError(f"there is no key {name}; {hint} {names}")


# ---- one reader for each kind of value ------------------------------------------


def _size(text: str, ram_bytes: int) -> int:
    if text.strip().endswith("%"):
        raise ConfigError(
            f"size={text} is no size of a device; write a number and K, M, G or T: size=8G "
            f"(only pool= takes a percentage)"
        )
    size = size_bytes("size", text, "size=8G")
    if size == 0:
        raise ConfigError("size=0 is no device; write size=8G")
    if size % PAGE_BYTES:
        raise ConfigError(
            f"size={text} is no multiple of {PAGE_BYTES}, the size of a page; "
            f"write size={whole_pages(size)}"
        )
    if size > DEVICE_BYTES_MAX:
        raise ConfigError(f"size={text} is more than a device can have; write at most size=16T")
    return size


def _devices(text: str, ram_bytes: int) -> tuple[tuple[str, int], ...]:
    devices: list[tuple[str, int]] = []
    for part in text.split(","):
        name, colon, size = part.partition(":")
        if not colon or not re.fullmatch(DEVICE_PATTERN, name, re.ASCII):
            raise ConfigError(
                f"devices={text} is no list of devices; write name:size of each (up to 16 letters, "
                f"digits, dashes and underscores), like devices=a:4G,b:2G"
            )
        if name in dict(devices):
            raise ConfigError(f"devices={text} has two devices {name}; give each its own name")
        devices.append((name, _size(size, ram_bytes)))
    if len(devices) > DEVICES_MAX:
        raise ConfigError(
            f"devices= takes at most {DEVICES_MAX} devices; start another server for more"
        )
    if sum(size for _, size in devices) > DEVICE_BYTES_MAX:
        raise ConfigError(
            f"devices={text} is more than a server can have; write at most 16T in all"
        )
    return tuple(devices)


def _pool(text: str, ram_bytes: int) -> int:
    if match := re.fullmatch(r"(\d{1,3})(\.\d{1,3})?\s*%", text.strip()):
        percent = float(match.group(1) + (match.group(2) or ""))
        if not 0 < percent <= 90:
            raise ConfigError(
                f"pool={text} leaves too little RAM for the pool or for the rest; write 1% to 90%, "
                f"like pool=20%"
            )
        return max(POOL_BYTES_MIN, int(ram_bytes * percent / 100) // PAGE_BYTES * PAGE_BYTES)
    if "%" in text:
        raise ConfigError(f"pool={text} is no percentage; write it like pool=20%")
    pool = size_bytes("pool", text, "pool=2G or pool=20%")
    if pool < POOL_BYTES_MIN:
        raise ConfigError(f"pool={text} is too small to work; write at least pool=1M")
    if pool % PAGE_BYTES:
        raise ConfigError(
            f"pool={text} is no multiple of {PAGE_BYTES}, the size of a page; "
            f"write pool={whole_pages(pool)}"
        )
    if pool > ram_bytes:
        raise ConfigError(
            f"pool={text} is more than this machine's RAM ({ram_bytes >> 20} MiB); "
            f"write pool=20% or at most pool={ram_bytes * 9 // 10 >> 20}M"
        )
    return pool


def _path(name: str, example: str) -> Callable[[str, int], str]:
    def read(text: str, ram_bytes: int) -> str:
        if not text or "\0" in text:
            raise ConfigError(f"{name}= is no path; write {name}={example}, or leave it out")
        return os.path.abspath(text)

    return read


def _disk_size(text: str, ram_bytes: int) -> int:
    size = size_bytes("disk_size", text, "disk_size=16G")
    if size < DISK_BYTES_MIN:
        raise ConfigError(
            f"disk_size={text} is too small to work; write at least "
            f"disk_size={human(DISK_BYTES_MIN)}"
        )
    return size


def _writeback_limit(text: str, ram_bytes: int) -> int | None:
    if text == "none":
        return None
    limit = size_bytes("writeback_limit", text, "writeback_limit=20G")
    if limit < WRITEBACK_LIMIT_BYTES_MIN:
        raise ConfigError(
            f"writeback_limit={text} leaves no room for a single write; write at least "
            f"writeback_limit={human(WRITEBACK_LIMIT_BYTES_MIN)} (bytes a day), or leave it out"
        )
    return limit


def _percent(name: str, default: int) -> Callable[[str, int], int]:
    def read(text: str, ram_bytes: int) -> int:
        match = re.fullmatch(r"(\d{1,3})\s*%?", text.strip(), re.ASCII)
        if match is None or not 1 <= int(match.group(1)) <= 100:
            raise ConfigError(
                f"{name}={text} is no percentage; write 1 to 100, like {name}={default}"
            )
        return int(match.group(1))

    return read


def _pressure(text: str, ram_bytes: int) -> str:
    if text in PRESSURE:
        return text
    if not os.path.isabs(text):
        raise ConfigError(
            f"pressure={text} is not possible; write {_either('pressure', PRESSURE)}, or the path "
            f"of a cgroup's memory.pressure"
        )
    if not os.access(text, os.R_OK):
        raise ConfigError(
            f"pressure={text} is no pressure file that can be read; write pressure=psi for that of "
            f"the whole system"
        )
    return text


def _choice(name: str, *words: str) -> Callable[[str, int], str]:
    def read(text: str, ram_bytes: int) -> str:
        if text not in words:
            raise ConfigError(f"{name}={text} is not possible; write {_either(name, words)}")
        return text

    return read


def _allocator(text: str, ram_bytes: int) -> str:
    if text not in ALLOCATORS:
        raise ConfigError(f"there is no allocator {text}; write {_either('allocator', ALLOCATORS)}")
    return text


def _memory(text: str, ram_bytes: int) -> str:
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,60}", text):
        raise ConfigError(
            f"memory={text} is no usable name; write up to 60 letters, digits, dots, dashes or "
            f"underscores, like memory=swap0"
        )
    return text


def _either(name: str, words: tuple[str, ...]) -> str:
    return " or ".join(f"{name}={word}" for word in words)


KEYS: tuple[Key, ...] = (
    Key("size", "size_bytes", "required", "size of the swap device: 8G, 512M", _size),
    Key(
        "devices",
        "devices",
        "one of size",
        "several devices that share the pool: a:4G,b:2G; each is an export of that name",
        _devices,
    ),
    Key("pool", "pool_bytes", "20%", "most RAM for compressed pages: 2G, or 25% of RAM", _pool),
    Key(
        "commit",
        "commit",
        "ahead",
        "memory of the pool; ahead: a reserve is kept ready, all: the whole pool is taken at start",
        _choice("commit", "ahead", "all"),
    ),
    Key(
        "allocator",
        "allocator",
        "zbud",
        "how pages lie in the pool: zbud (two in a frame at most), z3fold (three) or zsmalloc",
        _allocator,
    ),
    Key(
        "codec",
        "codec",
        "lz4",
        "how pages are compressed: lz4, zstd, zstd:LEVEL (1 to 19) or none",
        read_codec,
    ),
    Key(
        "recompress",
        "recompress",
        "none",
        "compress pages that have gone cold anew, with spare CPU: zstd, zstd:LEVEL or none",
        read_recompress,
    ),
    Key(
        "recompress_age",
        "recompress_age_s",
        str(RECOMPRESS_AGE_S),
        "a page is cold when nobody has asked for it in so long: seconds, 5m, 2h",
        read_age,
    ),
    Key(
        "disk",
        "disk",
        "none",
        "file or block device for pages that leave RAM; a missing file is made",
        _path("disk", "/var/lib/zcache/disk"),
    ),
    Key(
        "disk_size",
        "disk_size_bytes",
        "all of it",
        "how much of the disk to use; from 1.05 times size and 16M on no write is ever refused",
        _disk_size,
    ),
    Key(
        "disk_force",
        "disk_force",
        "none",
        "the path of disk= once more: overwrite what is there, whatever it is",
        _path("disk_force", "/dev/sdb, the path of disk="),
    ),
    Key(
        "encrypt",
        "encrypt",
        "no",
        "encrypt what goes to the disk, with a key that is only in the memory file: yes or no",
        _choice("encrypt", "yes", "no"),
    ),
    Key(
        "writeback_limit",
        "writeback_limit_bytes",
        "none",
        "most bytes written to the disk a day (UTC), for disks that wear; then pages stay in RAM",
        _writeback_limit,
    ),
    Key(
        "high",
        "high_percent",
        "90",
        "writeback to the disk starts when more than this percentage of the pool is taken",
        _percent("high", 90),
    ),
    Key(
        "low",
        "low_percent",
        "80",
        "and stops at this one; when only high is given: 10 below it",
        _percent("low", 80),
    ),
    Key(
        "pressure",
        "pressure",
        "psi",
        "what makes the pool smaller for a while: psi, memory pressure on this machine; a path, "
        "that of a cgroup (its memory.pressure); none (the default with commit=all)",
        _pressure,
    ),
    *(Key(*row) for row in PEER_KEYS),
    Key(
        "tls",
        "tls",
        "none",
        "folder with node.pem (zcache cluster-add), for peers= and nbd= that others can reach",
        _path("tls", "/etc/zcache/cluster"),
    ),
    Key(
        "nbd",
        "nbd",
        "none",
        "with zcache serve: HOST:PORT where another machine attaches the device, in place of a "
        "Unix socket; with tls= encrypted, and only for machines of the cluster",
        read_nbd,
    ),
    Key(
        "control",
        "control",
        "beside the NBD socket",
        "Unix socket of the statistics and control RPC",
        _path("control", "/run/zcache.ctl"),
    ),
    Key(
        "metrics",
        "metrics",
        "none",
        "address of metrics and web page: 9469 for this machine only, or HOST:PORT",
        lambda text, ram_bytes: read_address("metrics", text),
    ),
    Key(
        "memory",
        "memory",
        "private",
        "name of the memory file, so that a restart finds its pages",
        _memory,
    ),
    Key(
        "realtime",
        "realtime",
        "auto",
        "serve in a real-time scheduling class, so that swapping cannot starve the server; "
        "auto: yes, but no on TCP, where another machine swaps (in a virtual machine with idle "
        "cores it costs about 15 us a request)",
        _choice("realtime", *REALTIME),
    ),
    Key(
        "standby",
        "standby",
        "auto",
        "with zcache serve and up: a second server waits, locked, and goes on when the first is "
        "killed, also without memory to start one; auto: while this machine has it attached",
        _choice("standby", *STANDBY),
    ),
)
KEY_OF_FIELD = {key.field: key.name for key in KEYS}
