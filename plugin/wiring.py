"""Puts the parts together, and takes them apart: the only place that knows them all.

    check    before the fork: everything that can be refused is refused here, while a
             person still reads the message; the disk is opened and locked
    start    after the fork: process fit for swap -> MemoryFile -> Store -> Cooling (what
             is below) -> Steward -> their threads -> Device -> node process
    stop     node process -> Steward -> Cooling -> Store -> MemoryFile -> disk, in that order

No Python runs in the server after `start`, except in nbdkit's callbacks that open
and close a connection, and when the node process has died.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import mmap
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import zcache_core
from cluster import addresses, peeraddress, unixsock
from plugin import logpipe, lower, messages
from plugin.amounts import PAGE_BYTES, human
from plugin.codeckeys import CODECS
from plugin.config import AHEAD, ALLOCATORS, KEYS, Config
from plugin.instance import Instance, parse_export
from plugin.keeper import Keeper
from plugin.logpipe import STDERR, LogPipe
from plugin.lone import Vigil
from plugin.messages import warn
from plugin.places import Listening, control_path, listening, own_command_line
from plugin.spawn import Program
from zcache_core import memfile, process, stacks
from zcache_core.device import Device
from zcache_core.diskfile import DiskFile
from zcache_core.errors import ConfigError
from zcache_core.memfile import MemoryFile
from zcache_core.peertier import PeerTier
from zcache_core.steward import Steward
from zcache_core.store import Store
from zcache_core.tiers import Cooling

ROOT = Path(__file__).resolve().parent.parent
# A thread that wants the GIL asks for it after this time instead of after 5 ms.
SWITCH_INTERVAL_S = 50e-6
# What a server takes of the heap from its turn on, connections included: measured 1.3 MiB.
STANDBY_HEAP_BYTES = 3 << 20
REHEARSAL_BYTES = 1 << 20
# Of a server: takeover, committer, tidying, recompression, crew, steward, cooling, reading ahead,
# peers, keeper, leave.
THREADS = 11
BELOW_BYTES = 10 << 20  # of any disk or peers; see "Costs of a disk" in docs/architecture.md
NODE_FDS = 3  # the first descriptor that the node process is given
PIPES_FROM_FD = 10  # ours, so that none is overwritten while the node's are laid out
SetError = Callable[[int], None]


class Before(NamedTuple):
    """What a standby has before its turn: its log, and the store on the file it is to take."""

    log: LogPipe | None = None
    store: Store | None = None
    ballast: mmap.mmap | None = None  # as much memory as the tiers below will take
    vigil: Vigil | None = None  # for when the supervisor is gone


class Checked(NamedTuple):
    """What `check` found free: where to listen, and the disk, opened, if there is one."""

    where: Listening
    disk: DiskFile | None
    supervised: bool = False
    before: Before = Before()


class Serving:
    """A running server: what nbdkit's callbacks are made from."""

    def __init__(self, config: Config, checked: Checked, set_error: SetError) -> None:
        self._where, self._disk, self._supervised, before = checked
        self._log = before.log
        where, disk = self._where, self._disk
        self._memory, self._store = open_store(config, disk, before.store)
        self.pool_is_locked = self._memory.stays_locked
        if before.ballast is not None:
            before.ballast.close()
        self._peers = PeerTier(self._memory) if config.has_peers else None
        self._cooling = self._below(config, disk) if disk is not None or self._peers else None
        read_fd, write_fd = os.pipe()  # both stay open: a node may be started anew
        self._command_fd = fcntl.fcntl(write_fd, fcntl.F_DUPFD_CLOEXEC, PIPES_FROM_FD)
        os.close(write_fd)
        self._ring_fds = [
            fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, PIPES_FROM_FD)
            for fd in ((self._peers.fd, self._peers.wake_fd) if self._peers is not None else ())
        ]
        self._steward = Steward(self._store, self._cooling, read_fd, config.pressure)
        self._store.start()
        if self._cooling is not None:
            self._cooling.start()
        self._steward.start()
        self.device = Device(self._store, set_error)
        inode = os.stat(where.unix).st_ino if where.unix is not None else 0
        self.unix_socket = where.unix, inode
        self._keeper: Keeper | None = None
        self._has_peers = config.has_peers or config.listen is not None

    def _below(self, config: Config, disk: DiskFile | None) -> Cooling:
        """What cools the store down to peers and onto the disk."""
        if disk is not None:
            disk.take(self._memory.epoch, self._memory.device_bytes)
        return Cooling(
            self._store,
            disk.fd if disk is not None else -1,
            disk.disk_bytes if disk is not None else 0,
            disk is not None and disk.preallocated,
            config.high_percent,
            config.low_percent,
            config.encrypt == "yes",
            config.writeback_limit_bytes or 0,
            self._peers,
            config.backup == "disk",
            disk.found_bytes if disk is not None and disk.is_cut else 0,
        )

    def start_node(self, control: str, told: Mapping[str, Any]) -> None:
        """The node process, and the log through it.  Nothing may fail after this."""
        words, env = ["--control", control, "--shmid", str(self._memory.shmid)], node_env()
        words += ["--server-pid", str(os.getpid()), "--config", json.dumps(dict(told))]
        if self._supervised:
            words += ["--take-control"]
        if told["metrics"] is not None:
            words += ["--metrics", told["metrics"]]
        if self._peers is not None and self._where.tcp_port is None:
            words += ["--understudy"]  # this machine may swap onto pages that only it brings back
            env["PYTHONMALLOC"] = "malloc"  # of the heap, which it has beforehand and keeps
        fds, free, say = {}, NODE_FDS, messages.say
        if self._log is None and logpipe.is_wanted(self._where.verbose):
            self._log = LogPipe()
        if self._log is not None:
            fds, say = {STDERR: self._log.log_fd, free: self._log.read_fd}, self._log.say
            words += ["--log-fd", str(free)]
            free += 1
        fds[free] = self._command_fd
        words += ["--command-fd", str(free)]
        for word, fd in zip(("--ring-fd", "--wake-fd"), self._ring_fds, strict=False):
            free += 1
            fds[free] = fd
            words += [word, str(free)]
        program = Program([python_path(), "-m", "cluster.node", *words], env, fds)
        self._keeper = Keeper("the node process", program, say)
        self._keeper.start()

    def open(self, export: str) -> object:
        """A connection's handle.  Raises ConfigError without such an export, InUseError."""
        wanted = parse_export(export)
        names = [name for name, *_ in self._memory.devices()]
        if wanted.device and wanted.device not in names:
            known = " or ".join(filter(None, names)) or "the empty name"
            raise ConfigError(f"there is no device {wanted.device!r}; ask for {known}")
        row = names.index(wanted.device) if wanted.device else 0
        return self.device.open(row, wanted.generation or 0)

    def before_leaving(self) -> None:
        """End the node process, which may be swapped out to us, while its pages can come back.

        Not one that brings pages from peers: it ends when it sees that we have.  The log stays
        what it is: the page of its file may be swapped out, too.
        """
        if not self._has_peers:
            self.stop_node()

    def stop_node(self) -> None:
        """End the node process; it is not started again."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.stop()

    def stop(self) -> None:
        """End everything.  A named memory file stays, for the next server."""
        if self._log is not None and self._keeper is not None:
            self._log.close()
        if self._peers is not None and self._memory.name is None:
            self._peers.end_for_good()  # no request comes any more, and the file goes with us
        self.stop_node()
        self._steward.stop()
        if self._cooling is not None:
            self._cooling.stop()
        self._store.stop()
        self._memory.close()
        if self._disk is not None:
            self._disk.close()
        unix, inode = self.unix_socket
        if unix is not None:  # nbdkit leaves it behind
            unixsock.remove(unix, inode)


def check_successor(config: Config) -> None:
    """What can be refused while the predecessor still serves.  Raises ZcacheError."""
    lower.refuse_memory(config, None, sizes_only=True)


def warm_up(config: Config) -> None:
    """What standbys are forked from: all that can be had before, when nothing may be had later.

    The program and its libraries are loaded and locked, the heap has what a start takes, and
    last comes the class: loading must not keep a server waiting that serves.
    """
    process.prepare(realtime=False, secret=config.encrypt == "yes")
    process.keep_heap(STANDBY_HEAP_BYTES)
    rehearse(config)
    process.load_files()
    gc.collect()
    gc.freeze()  # or the collector would touch, and so copy, in each fork what they share
    gc.disable()
    if wants_realtime(config, listening(own_command_line(), os.environ)):
        process.real_time()


def settle(config: Config) -> Before:
    """A standby, just forked: all memory that its turn needs; a lock is not inherited.

    When its predecessor is dead, there may be none: each page of which only the origin's copy was
    there, each thread's stack and the store's tables were waited for, inside the kernel, under the
    lock of this process's mappings (seen in the lab: nobody served any more).  So it has its own
    copy of all, the stacks, the tables, and the memory file mapped, though not to be written.

    Its log goes through the pipe from now on: the log file's page may be swapped out to the device
    that waits for us (measured: a standby hung in its first warning).
    """
    process.lock_memory(on_fault=True)
    process.load_files(copy=False)
    process.own_memory()
    stacks.keep(THREADS)
    where = listening(own_command_line(), os.environ)
    log = LogPipe() if logpipe.is_wanted(where.verbose) else None
    memory = MemoryFile.expect(config.memory) if config.memory is not None else None
    store = make_store(config, memory) if memory is not None else None
    has_below = config.disk is not None or config.has_peers
    ballast = process.hold_memory(below_bytes(config)) if has_below else None
    vigil = None
    if memory is not None and config.memory is not None:
        with contextlib.suppress(ConfigError, OSError):  # without it, it ends with the supervisor
            vigil = Vigil(Instance(config.memory), memory)
    return Before(log, store, ballast, vigil)


def below_bytes(config: Config) -> int:
    """About what tiers below a pool take of memory when they are made: buffers and tables."""
    frames, disk_mib = config.pool_bytes // PAGE_BYTES, (config.disk_size_bytes or 0) >> 20
    return BELOW_BYTES + 16 * frames + 50 * disk_mib


def rehearse(config: Config) -> None:
    """A store's life on a memory file of nobody's: what is only made when it is needed, is made."""
    memory = MemoryFile.create(None, REHEARSAL_BYTES, REHEARSAL_BYTES)
    store = Store(memory, allocator=config.allocator, codec=config.codec)
    try:
        store.start()
        device = Device(store, lambda number: None)
        handle, page = device.open(0, 0), bytearray(PAGE_BYTES)
        device.pwrite(handle, page, 0, 0)
        device.pread(handle, page, 0, 0)
    finally:
        store.stop()
        memory.close()


def check(config: Config, supervised: bool = False, before: Before | None = None) -> Checked:
    """Refuse what is in use, warn of what can happen.  Raises ConfigError, InUseError.

    `supervised`: the control socket's path is this instance's, so whoever still listens
    there is the node process of a killed predecessor, and may be too swapped out to end.
    """
    where = listening(own_command_line(), os.environ)
    if config.nbd is not None and not supervised:
        raise ConfigError(
            "nbd= is for 'zcache serve', which starts nbdkit; here write -i HOST -p PORT, before "
            "python"
        )
    if where.unix is not None:
        # A standby whose turn it is: the supervisor has seen its predecessor's end.
        dead = before is not None and before.store is not None
        key = "--name NAME" if supervised else "-U PATH"
        unixsock.claim(where.unix, "the NBD socket", key, dead)
    # A default with a process number in it is nobody's yet: the number is our child's.
    if not supervised and (config.control or where.unix or where.tcp_port):
        control = config.control or control_path(where, os.getpid())
        unixsock.claim(control, "the control socket", "control=PATH")
    # The node process will listen there; who is wrong hears it now.
    if not supervised and config.metrics is not None:
        addresses.listen("metrics", config.metrics).close()
    if not supervised and config.listen is not None:
        lower.refuse_listening(config.listen)
    if config.tls is not None:
        peeraddress.certificates_in(config.tls)  # who is wrong hears it now
    if (sentence := lower.too_few_peers(config)) is not None:
        warn(sentence)
    disk = lower.open_checked(config)
    if (sentence := lower.refusal_warning(config, disk.disk_bytes if disk else 0)) is not None:
        warn(sentence)
    elif disk is not None:
        messages.say(lower.promise(config, disk))
    if config.commit == "ahead" and wants_realtime(config, where):
        messages.say(f"zcache: {AHEAD}")
    return Checked(where, disk, supervised, before or Before())


def wants_realtime(config: Config, where: Listening) -> bool:
    """realtime=auto: yes where the machine that swaps may be this one, which TCP says it is not.

    Only a server that swapping can starve needs it.  It is not free: in a virtual machine
    with idle cores SCHED_FIFO was measured to cost about 15 us a request.
    """
    if config.realtime == "auto":
        return where.tcp_port is None
    return config.realtime == "yes"


def start(config: Config, checked: Checked, set_error: SetError) -> Serving:
    """Everything running.  Raises ZcacheError."""
    realtime = wants_realtime(config, checked.where)
    refused = process.prepare(realtime=realtime, secret=config.encrypt == "yes" or config.has_peers)
    control = config.control or control_path(checked.where, os.getpid())
    serving = Serving(config, checked, set_error)
    if not serving.pool_is_locked:
        refused.append("the pool is not locked in memory: give CAP_IPC_LOCK")
    if refused:
        warn(f"not fit for swapping under pressure: {'; '.join(refused)} (see 'zcache check')")
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    serving.start_node(control, told(config, checked, control, realtime, refused))
    # What exists now lives as long as the server, and no request makes a cycle.
    gc.collect()
    gc.freeze()
    gc.disable()
    return serving


def told(
    config: Config, checked: Checked, control: str, realtime: bool, refused: list[str]
) -> dict[str, Any]:
    """What the node process answers to `config`: the keys, as they turned out."""
    disk_bytes = checked.disk.disk_bytes if checked.disk is not None else None
    return config.as_dict() | {
        "control": control,
        "realtime": "yes" if realtime else "no",
        "disk_size": disk_bytes,
        "guaranteed": lower.guaranteed_bytes(config, disk_bytes or 0),
        "guaranteed_below": lower.guaranteed_below_bytes(config, disk_bytes or 0),
        "refused": refused,
    }


def make_store(config: Config, memory: MemoryFile) -> Store:
    """The store of this configuration; all its memory is had."""
    store = Store(memory, allocator=config.allocator, codec=config.codec, commit=config.commit)
    store.set_recompress(config.recompress, config.recompress_age_s)
    return store


def open_store(
    config: Config, disk: DiskFile | None, expecting: Store | None
) -> tuple[MemoryFile, Store]:
    """The memory file of that name if there is one, else a new one, and its store.

    `expecting`: the one that has waited for this file.  Raises ConfigError.
    """
    if config.memory is None or not memfile.exists(config.memory):
        memory = MemoryFile.create(
            config.memory, config.size_bytes, config.pool_bytes, config.devices
        )
        return memory, make_store(config, memory)
    if expecting is not None:
        memory = expecting.memory
        memory.take()
    else:
        memory = MemoryFile.open(config.memory)
    try:
        lower.refuse_mismatch(memory, config, disk)
    except BaseException:
        memory.close()
        raise
    if expecting is None:
        return memory, make_store(config, memory)
    expecting.begin()
    return memory, expecting


def node_env() -> dict[str, str]:
    """The server's environment, plus where our modules are."""
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def python_path() -> str:
    """An interpreter with our packages; never sys.executable, which is nbdkit's embedded one."""
    if wish := os.environ.get("ZCACHE_PYTHON"):
        return wish
    own = ROOT / ".venv/bin/python"
    return str(own) if own.exists() else "/usr/bin/python3"


def dump(out: TextIO) -> None:
    """What `nbdkit --dump-plugin` prints of us: key=value lines."""
    rows = {
        "zcache_version": zcache_core.__version__,
        "zcache_allocators": " ".join(ALLOCATORS),
        "zcache_codecs": " ".join(CODECS),
        "zcache_memory_format": memfile.FORMAT,
    }
    rows |= {f"zcache_key_{key.name}": f"{key.help} (default: {key.default})" for key in KEYS}
    for name, value in rows.items():
        print(f"{name}={value}", file=out)
    out.flush()  # C's stdio has a buffer of its own and ends the process


def description(config: Config) -> str:
    """One line about the export."""
    tiers = [f"{len(config.peers)} peers"] * bool(config.peers)
    tiers += ["peers that etcd names"] * bool(config.etcd) + [config.disk or ""]
    below = ", below it " + " and ".join(filter(None, tiers)) if any(tiers) else ""
    return (
        f"zcache swap device: {human(config.size_bytes)} in a pool of at most "
        f"{human(config.pool_bytes // PAGE_BYTES * PAGE_BYTES)}{below}, {config.allocator}, "
        f"{config.codec}"
    )
