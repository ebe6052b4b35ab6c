"""The disk below a server: opened and checked, and what is guaranteed with it.

    before the fork   disk free to be ours? -> room that is promised? -> is it the disk
                      of this memory file, and of no other? -> say what is guaranteed
    after the fork    the last question again, of the file as its last owner left it

A memory file whose pages lie on a disk means that disk and no other: without it those
pages answer EIO, and with another one a page in RAM would be believed safe there.  The
file's index says whether there are such pages, the disk's header (an epoch) whose they are.

What it is not: what moves pages; that is `zcache_core.tiers`.
"""

from __future__ import annotations

from cluster import addresses, unixsock
from cluster.peeraddress import PeerAddress
from plugin.amounts import PAGE_BYTES, human
from plugin.config import Config
from zcache_core import PAGES_PER_FRAME, memfile
from zcache_core.diskfile import PROMISE, RESERVE_BYTES, DiskFile, open_disk, promised_bytes
from zcache_core.errors import ConfigError, MemoryFileError
from zcache_core.memfile import MemoryFile

BACKUP_DISK_BYTES = 1 << 39  # zcache_core.layout, BACKED_BITS


def open_checked(config: Config) -> DiskFile | None:
    """The disk of this configuration, free to be taken; None without disk=.  Raises ConfigError."""
    disk = None
    if config.disk is not None:
        disk = open_disk(config.disk, config.disk_size_bytes, force=config.disk_force is not None)
    try:
        if disk is not None:
            refuse_disk_of_others(config, disk)
            refuse_large_backup(config, disk)
        refuse_memory(config, disk)
        if disk is not None:
            disk.allocate(config.size_bytes)
    except BaseException:
        if disk is not None:
            disk.abandon()
        raise
    return disk


def refuse_listening(address: str) -> None:
    """ConfigError, InUseError when somebody else listens there."""
    at = PeerAddress.read("listen", address)
    if at.path:
        unixsock.claim(at.path, "the socket of listen=", "listen=PATH")
    else:
        addresses.listen("listen", address).close()


def refuse_large_backup(config: Config, disk: DiskFile) -> None:
    """The address of a page with both copies has no more bits for the disk.  Raises ConfigError."""
    if config.backup == "disk" and disk.disk_bytes >= BACKUP_DISK_BYTES:
        raise ConfigError(
            f"backup=disk takes less than {human(BACKUP_DISK_BYTES)} of disk; write "
            f"disk_size=500G, or backup=none"
        )


def refuse_memory(config: Config, disk: DiskFile | None, sizes_only: bool = False) -> None:
    """Refuse a memory file of that name that is there and cannot be served.  Its owner may live.

    Raises ConfigError when sizes or disk are others, MemoryFileError when this version
    cannot read it.
    """
    shmid = memfile.find(config.memory) if config.memory is not None else None
    if shmid is None:
        return
    memory = MemoryFile.attach(shmid)
    try:
        refuse_sizes(memory, config)
        if not sizes_only:
            refuse_mismatch(memory, config, disk)
    finally:
        memory.close()


def refuse_sizes(memory: MemoryFile, config: Config) -> None:
    """Sizes are what this memory file was made with, or ConfigError says so."""
    for key, has, wanted in (
        ("size", memory.device_bytes, config.size_bytes),
        ("pool", memory.pool_bytes, config.pool_bytes),
    ):
        if has != wanted:
            raise ConfigError(
                f"the memory file {config.memory} was made with {key}={human(has)}; write that, "
                f"or remove the file with 'zcache check --remove-leftovers {config.memory}'"
            )
    has_parts = [(name, size) for name, size, *_ in memory.devices()]
    if has_parts != list(config.devices or [("", config.size_bytes)]):
        parts = ",".join(f"{name}:{human(size)}" for name, size in has_parts)
        was = f"devices={parts}" if has_parts[0][0] else f"size={human(memory.device_bytes)}"
        raise ConfigError(
            f"the memory file {config.memory} was made with {was}; write that, or remove the file "
            f"with 'zcache check --remove-leftovers {config.memory}'"
        )


def refuse_mismatch(memory: MemoryFile, config: Config, disk: DiskFile | None) -> None:
    """Sizes and disk are what this memory file was made with, or ConfigError says so."""
    refuse_sizes(memory, config)
    only_below, also_below = memory.pages_on_disk()
    at_peers, _ = memory.pages_at_peers()
    if at_peers and not config.has_peers:
        raise ConfigError(
            f"{at_peers} pages of the memory file {config.memory} are with the peers that its "
            f"last server had; write the same peers= again"
        )
    if disk is None:
        if only_below:
            raise ConfigError(
                f"{only_below} pages of the memory file {config.memory} lie on the disk that its "
                f"last server had; write the same disk= again"
            )
        return
    epoch, disk_bytes = disk.written_for()
    if only_below + also_below == 0:
        return
    if epoch != memory.epoch:
        raise ConfigError(
            f"{only_below + also_below} pages of the memory file {config.memory} lie on another "
            f"disk than disk={disk.path}; write the disk= that its last server had"
        )
    if disk.disk_bytes < disk_bytes:
        raise ConfigError(
            f"pages of the memory file {config.memory} may lie on all of {human(disk_bytes)} of "
            f"disk={disk.path}; write disk_size={human(disk_bytes)} or more"
        )


def refuse_disk_of_others(config: Config, disk: DiskFile) -> None:
    """ConfigError when pages of another memory file, that waits for its server, lie there."""
    epoch, _ = disk.written_for()
    if epoch == 0 or config.disk_force is not None:
        return
    for row in memfile.leftovers():
        if row.name == (config.memory or ""):
            continue
        try:
            memory = MemoryFile.attach(row.shmid)
        except MemoryFileError:  # taken or removed meanwhile, or another user's
            continue
        try:
            theirs = memory.epoch == epoch and sum(memory.pages_on_disk()) > 0
        finally:
            memory.close()
        if theirs:
            raise ConfigError(
                f"disk={disk.path} holds pages of the memory file {row.name}, which waits for its "
                f"server; choose another disk, or repeat the path in disk_force={disk.path} if "
                f"they are not needed"
            )


# ---- what is guaranteed ----------------------------------------------------------------


def guaranteed_bytes(config: Config, disk_bytes: int) -> int:
    """So much of the device can be in use without a refused write, whatever its data."""
    below = guaranteed_below_bytes(config, disk_bytes)
    if config.writeback_limit_bytes is not None:
        below = 0  # the limit may be used up at any moment
    return min(config.size_bytes, max(config.pool_bytes, below))


def guaranteed_below_bytes(config: Config, disk_bytes: int) -> int:
    """The disk's part in that, whatever the pool's limit is, while writing is not limited."""
    if disk_bytes >= promised_bytes(config.size_bytes):
        return config.size_bytes
    return max(0, int((disk_bytes - RESERVE_BYTES) / PROMISE) // PAGE_BYTES * PAGE_BYTES)


def too_few_peers(config: Config) -> str | None:
    """What to know when peers= can never hold all copies of a page."""
    if config.etcd is not None or config.backup == "disk":
        return None  # others may come; one is enough
    if not config.peers or len(config.peers) >= config.replicas:
        return None
    return (
        f"peers= names {len(config.peers)} of the {config.replicas} donors that replicas= needs, "
        f"so no page goes to peers; name {config.replicas} donors or more"
    )


def refusal_warning(config: Config, disk_bytes: int = 0) -> str | None:
    """What to know when writes may be refused one day; None when none ever is."""
    guaranteed = guaranteed_bytes(config, disk_bytes)
    if guaranteed >= config.size_bytes:
        return None  # a page that does not compress takes one frame, or its room below
    if config.writeback_limit_bytes is not None:
        return (
            f"of size={human(config.size_bytes)}, {mib(guaranteed)} are safe from refused writes "
            f"(ENOSPC): when writeback_limit={human(config.writeback_limit_bytes)} is used up, "
            f"pages stay in RAM until midnight (UTC), and the pool can be full; leave "
            f"writeback_limit= out, or choose a larger pool="
        )
    if disk_bytes:
        return (
            f"of size={human(config.size_bytes)}, {mib(guaranteed)} are safe from refused writes "
            f"(ENOSPC) whatever the data; with more in use that compresses badly, pool and disk "
            f"can be full; write disk_size={needed_disk(config)} or more to have no write refused"
        )
    tier = "no disk (peers may be full or away)" if config.has_peers else "no lower tier"
    return (
        f"with size={human(config.size_bytes)}, pool={human(config.pool_bytes)} and {tier}, "
        f"writes are refused (ENOSPC) once {pool_full_when(config)}; give it a disk "
        f"(disk=PATH disk_size={needed_disk(config)}), keep other swap of lower priority beside "
        f"it, or choose a larger pool= or a smaller size="
    )


def pool_full_when(config: Config) -> str:
    """When a pool with nothing below it is full; an allocator's best sets a bound of its own."""
    ratio = config.size_bytes / config.pool_bytes
    best = PAGES_PER_FRAME[config.allocator]
    if ratio <= best:
        return f"the pool is full of pages that compress worse than {ratio:.1f} to 1"
    return (
        f"{human(best * config.pool_bytes)} of it are in use ({config.allocator} puts at most "
        f"{best} pages into 4 KiB, however well they compress), and sooner with pages that "
        f"compress worse than {best} to 1"
    )


def promise(config: Config, disk: DiskFile) -> str:
    """The sentence of a server with a disk that no write can fill."""
    return (
        f"zcache: no write is ever refused while the disk works: {mib(disk.disk_bytes)} of "
        f"{disk.path} have room for all of size={human(config.size_bytes)}, whatever the data"
    )


def needed_disk(config: Config) -> str:
    """disk_size= from which on no write is refused, in whole MiB."""
    return f"{-(-promised_bytes(config.size_bytes) >> 20)}M"


def mib(size_bytes: int) -> str:
    return f"{size_bytes >> 20} MiB"
