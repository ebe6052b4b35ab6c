"""Puts the parts together, and takes them apart: the only place that knows them all.

    check    before the fork: everything that can be refused is refused here, while a
             person still reads the message
    start    after the fork: process fit for swap -> MemoryFile -> Store (threads) ->
             Device -> node process
    stop     node process -> Store -> MemoryFile, in that order

No Python runs in the server after `start`, except in nbdkit's callbacks that open
and close a connection, and when the node process has died.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

import zcache_core
from cluster import unixsock
from plugin import logpipe, messages
from plugin.config import ALLOCATORS, CODECS, KEYS, PAGE_BYTES, Config, human
from plugin.keeper import Keeper
from plugin.logpipe import STDERR, LogPipe
from plugin.messages import warn
from plugin.places import Listening, control_path, listening, own_command_line
from plugin.spawn import Program
from zcache_core import memfile, process
from zcache_core.device import Device
from zcache_core.errors import ConfigError
from zcache_core.memfile import MemoryFile
from zcache_core.store import Store

ROOT = Path(__file__).resolve().parent.parent
# A thread that wants the GIL asks for it after this time instead of after 5 ms.
SWITCH_INTERVAL_S = 50e-6
NODE_LOG_FD = 3
SetError = Callable[[int], None]


class Serving:
    """A running server: what nbdkit's callbacks are made from."""

    def __init__(self, config: Config, where: Listening, set_error: SetError) -> None:
        self._where = where
        self._memory = open_memory(config)
        self.pool_is_locked = self._memory.stays_locked
        self._store = Store(
            self._memory, allocator=config.allocator, codec=config.codec, commit=config.commit
        )
        self._store.start()
        self.device = Device(self._store, set_error)
        self._socket_inode = os.stat(where.unix).st_ino if where.unix is not None else 0
        self._log: LogPipe | None = None
        self._keeper: Keeper | None = None

    def start_node(self, control: str, told: Mapping[str, Any]) -> None:
        """The node process, and the log through it.  Nothing may fail after this."""
        words = ["--control", control, "--shmid", str(self._memory.shmid)]
        words += ["--server-pid", str(os.getpid()), "--config", json.dumps(dict(told))]
        fds, say = {}, messages.say
        if logpipe.is_wanted(self._where.verbose):
            self._log = LogPipe()
            fds, say = {STDERR: self._log.log_fd, NODE_LOG_FD: self._log.read_fd}, self._log.say
            words += ["--log-fd", str(NODE_LOG_FD)]
        program = Program([python_path(), "-m", "cluster.node", *words], node_env(), fds)
        self._keeper = Keeper("the node process", program, say)
        self._keeper.start()

    def stop(self) -> None:
        """End everything.  A named memory file stays, for the next server."""
        if self._log is not None:
            self._log.close()
        if self._keeper is not None:
            self._keeper.stop()
        self._store.stop()
        self._memory.close()
        if self._where.unix is not None:  # nbdkit leaves it behind
            unixsock.remove(self._where.unix, self._socket_inode)


def check(config: Config) -> Listening:
    """Refuse what is in use, warn of what can happen.  Raises ConfigError, InUseError."""
    where = listening(own_command_line(), os.environ)
    if where.unix is not None:
        unixsock.claim(where.unix, "the NBD socket", "-U PATH")
    # A default with a process number in it is nobody's yet: the number is our child's.
    if config.control or (where.unix or where.tcp_port):
        control = config.control or control_path(where, os.getpid())
        unixsock.claim(control, "the control socket", "control=PATH")
    if (sentence := refusal_warning(config)) is not None:
        warn(sentence)
    return where


def refusal_warning(config: Config) -> str | None:
    """What to know when the pool can fill with nothing below it; None when it cannot."""
    if config.size_bytes <= config.pool_bytes:
        return None  # a page that does not compress takes one frame: all of them fit
    ratio = config.size_bytes / config.pool_bytes
    return (
        f"with size={human(config.size_bytes)}, pool={human(config.pool_bytes)} and no lower "
        f"tier, writes are refused (ENOSPC) once the pool is full of pages that compress worse "
        f"than {ratio:.1f} to 1; keep other swap of lower priority beside it, or choose a larger "
        f"pool= or a smaller size="
    )


def start(config: Config, where: Listening, set_error: SetError) -> Serving:
    """Everything running.  Raises ZcacheError."""
    refused = process.prepare(realtime=config.realtime)
    control = config.control or control_path(where, os.getpid())
    serving = Serving(config, where, set_error)
    if not serving.pool_is_locked:
        refused.append("the pool is not locked in memory: give CAP_IPC_LOCK")
    if refused:
        warn(f"not fit for swapping under pressure: {'; '.join(refused)} (see 'zcache check')")
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    serving.start_node(control, config.as_dict() | {"control": control, "refused": refused})
    # What exists now lives as long as the server, and no request makes a cycle.
    gc.collect()
    gc.freeze()
    gc.disable()
    return serving


def open_memory(config: Config) -> MemoryFile:
    """The memory file of that name if there is one, else a new one."""
    if config.memory is None:
        return MemoryFile.create(None, config.size_bytes, config.pool_bytes)
    if not memfile.exists(config.memory):
        return MemoryFile.create(config.memory, config.size_bytes, config.pool_bytes)
    memory = MemoryFile.open(config.memory)
    for key, has, wanted in (
        ("size", memory.device_bytes, config.size_bytes),
        ("pool", memory.pool_bytes, config.pool_bytes),
    ):
        if has != wanted:
            memory.close()
            raise ConfigError(
                f"the memory file {config.memory} was made with {key}={human(has)}; write that, "
                f"or remove the file with 'zcache check --remove-leftovers'"
            )
    return memory


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
    return (
        f"zcache swap device: {human(config.size_bytes)} in a pool of at most "
        f"{human(config.pool_bytes // PAGE_BYTES * PAGE_BYTES)}, {config.allocator}, {config.codec}"
    )
