"""`zcache serve`, `stop`, `upgrade`: starting the supervisor and talking to it.

    start    words checked here -> the supervisor, in front or in the background
    stop     SIGTERM to the supervisor: the server finishes its requests and ends;
             then the memory file goes, because nobody needs its pages any more
    upgrade  SIGHUP: the supervisor runs itself anew and replaces the server

Whoever asks waits for the answer in NAME.serve (servestate.py) or on a pipe, bounded.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from cluster import unixsock
from plugin import config, lower, servestate, tlsfiles
from plugin.instance import Instance
from plugin.leave import LEAVE
from plugin.servestate import State, attached, is_alive
from plugin.standby import end_lone
from zcache_core import memfile
from zcache_core.errors import ConfigError, InUseError, MemoryFileError, ZcacheError

ROOT = Path(__file__).resolve().parent.parent
START_S = 60.0  # a disk may have to be allocated first
STOP_S = 30.0
NODE_S = 5.0  # it is a moment later than the server, and not needed for pages
UPGRADE_S = 60.0
LOOK_S = 0.01
LOG_BYTES_MAX = 1 << 20
PERCENT = re.compile(r"pool=.*%")
PATHS = ("disk", "disk_force", "tls")  # keys whose relative paths are the caller's


def start(instance: Instance, words: Sequence[str], detach: bool = True) -> None:
    """Start the supervisor.  In the background: returns when the NBD socket answers.

    In front (`detach` False) it becomes the supervisor and does not return.
    `words` are key=value; without any the last ones of this instance are taken.
    Raises ZcacheError with the server's one sentence of why not.
    """
    words = [_absolute(word) for word in words] or _last_words(instance)
    words = with_fixed_pool(instance, words)
    settings = config.parse([split(word) for word in words])
    with contextlib.suppress(MemoryFileError):  # of another version: its server may live
        lower.refuse_memory(replace(settings, memory=instance.name), None, sizes_only=True)
    given = {word.partition("=")[0] for word in words}
    if settings.nbd and settings.tls:
        tlsfiles.lay_out(settings.tls, instance.tls)  # who is wrong hears it now
    for name in given & {"memory", "control"}:
        raise ConfigError(
            f"{name}= follows from the name of a supervised server; write --name instead"
        )
    # Its class is the server's, which on TCP is an ordinary one unless realtime= says otherwise.
    elsewhere = settings.nbd is not None and settings.realtime == "auto"
    realtime = "no" if settings.realtime == "no" or elsewhere else "yes"
    command = [sys.executable, "-m", "plugin.supervisor", "--name", instance.name]
    command += ["--realtime", realtime]
    if not detach:
        os.chdir("/")
        os.execve(command[0], [*command, "--", *words], environment())
    _start_behind(instance, command, words)


def with_fixed_pool(instance: Instance, words: Sequence[str]) -> list[str]:
    """A pool that is a part of RAM, in bytes: RAM may have another size when a server dies, and
    its memory file has not."""
    return [_fixed(instance, word) if PERCENT.fullmatch(word) else word for word in words]


def _fixed(instance: Instance, word: str) -> str:
    if (shmid := memfile.find(instance.name)) is not None:
        with contextlib.suppress(MemoryFileError):  # of another version
            memory = memfile.MemoryFile.attach(shmid)
            try:
                return f"pool={memory.pool_bytes}"
            finally:
                memory.close()
    return f"pool={config.parse([('size', '1G'), split(word)]).pool_bytes}"


def _start_behind(instance: Instance, command: list[str], words: list[str]) -> None:
    path = log_path(instance)
    fd, tell_fd = os.pipe()
    with open(path, "ab") as log, open(fd, "rb") as answer:
        if os.fstat(log.fileno()).st_size > LOG_BYTES_MAX:
            os.ftruncate(log.fileno(), 0)
        process = subprocess.Popen(
            [*command, "--tell-fd", str(tell_fd), "--", *words],
            env=environment(), cwd="/", stdin=subprocess.DEVNULL, stdout=log, stderr=log,
            start_new_session=True, pass_fds=[tell_fd],
        )  # fmt: skip
        os.close(tell_fd)
        if not select.select([answer], [], [], START_S)[0]:
            raise ZcacheError(
                f"the server {instance.name} has not come up in {START_S:.0f} s, and goes on "
                f"trying; see {path}"
            )
        told = answer.readline().decode(errors="replace").strip()
    code, _, sentence = told.partition(" ")
    if code == "0":
        process.returncode = 0  # it goes on, and is not ours to wait for
        with contextlib.suppress(ZcacheError):  # whoever asks next wants the node process too
            _wait(lambda: unixsock.is_alive(instance.control) or None, NODE_S, "")
        return
    process.wait()
    if not code.isdigit():
        raise ZcacheError(f"the supervisor ended before it served; see {path}")
    raise error_of(int(code), sentence)


def stop(instance: Instance, force: bool = False, keep: bool = False) -> bool:
    """End server and supervisor; False when there was nothing to end.

    Raises InUseError while a kernel device is attached, unless `force`; then, or with
    `keep`, the memory file stays, so that the next server finds the pages.
    """
    device, name = next(iter(attached(instance)), (None, ""))
    if device is not None and not force:
        down = "down" if name == instance.name else f"down --name {name}"
        raise InUseError(
            f"{device} is attached to the server {instance.name}; 'zcache {down}' takes it away in "
            f"safe order, 'zcache stop --force' takes the device's pages with it"
        )
    state = servestate.read(instance)
    found = False
    if state is not None and state.is_supervised:
        _end(state.supervisor_pid, state.supervisor_ticks, signal.SIGTERM, "the supervisor")
        found = True
    end_lone(instance, servestate.read(instance))  # before its server: it would succeed it
    if (owner := _owner(instance.name)) is not None:
        _end(*owner, LEAVE, "the server")
        found = True
    if device is None and not keep:
        say_bye, shmid = None, memfile.find(instance.name)
        if shmid is not None:
            say_bye = _farewell(instance, shmid)
            _remove(shmid)  # whoever is refused here, and asks again, still finds what follows
            instance.memory_lock.unlink(missing_ok=True)
            noted_members(instance).unlink(missing_ok=True)
        state = servestate.read(instance)
        if state is None or not state.is_supervised:  # nobody has started it again meanwhile
            instance.serve.unlink(missing_ok=True)
            shutil.rmtree(instance.tls, ignore_errors=True)
        if say_bye is not None:
            say_bye()  # the name is free by now: it ends this epoch and no other
    return found


def noted_members(instance: Instance) -> Path:
    """Where its node notes the donors that etcd= has named."""
    return Path(f"{instance.control}.members")


def _farewell(instance: Instance, shmid: int) -> Callable[[], object]:
    """What tells the donors that the memory file is gone; to be called when it is."""
    given = dict(word.partition("=")[::2] for word in _last_words(instance))
    tls = given.get("tls")
    peers = [word for word in given.get("peers", "").split(",") if word]
    with contextlib.suppress(OSError, ValueError, TypeError):
        peers += [str(address) for address in json.loads(noted_members(instance).read_text())]
    if not peers:
        return lambda: None
    from cluster import farewell
    from cluster.peerring import owner_name

    memory = memfile.MemoryFile.attach(shmid)
    try:
        leaver = farewell.Leaver(owner_name(tls, memory), memory.epoch)
    finally:
        memory.close()
    return lambda: farewell.say_from_outside(leaver, peers, tls)


def _remove(shmid: int) -> None:
    """Remove the memory file; the server's node process has it mapped a moment longer."""

    def is_free() -> bool | None:
        return shmid in {row.shmid for row in memfile.leftovers()} or None

    with contextlib.suppress(ZcacheError):
        _wait(is_free, NODE_S, "")
    memfile.remove(shmid)


def upgrade(instance: Instance) -> State:
    """Replace the server by the code that lies on the disk now.  Raises ZcacheError."""
    before = servestate.read(instance)
    if before is None or not before.is_supervised:
        raise ZcacheError(
            f"no supervisor of {instance.name} is running; 'zcache serve' starts one and takes "
            f"the server over"
        )
    if before.root != str(ROOT):
        raise ZcacheError(
            f"the server {instance.name} runs from {before.root}, this command from {ROOT}; "
            f"use the one that belongs to it"
        )
    os.kill(before.supervisor_pid, signal.SIGHUP)

    def answered() -> State | None:
        now = servestate.read(instance)
        if now is None or not now.is_supervised:
            raise ZcacheError(f"the supervisor ended meanwhile; see {log_path(instance)}")
        if now.upgrades > before.upgrades and now.phase == servestate.SERVING:
            return now
        if now.upgrades_asked > before.upgrades_asked and now.upgrade_error:
            raise ZcacheError(f"not upgraded, the server goes on as it was: {now.upgrade_error}")
        return None

    late = f"the upgrade takes too long; see {log_path(instance)}"
    after: State = _wait(answered, UPGRADE_S, late)
    return after


def address(instance: Instance) -> str:
    """Where its server is, as its supervisor was told."""
    given = dict(word.partition("=")[::2] for word in _last_words(instance))
    if "nbd" in given:
        return f"{'nbds' if 'tls' in given else 'nbd'}://{given['nbd']}/"
    return str(instance.socket)


def log_path(instance: Instance) -> Path:
    """Where a server in the background writes its log."""
    return instance.serve.with_suffix(".log")


def read_toml(path: str) -> dict[str, Any]:
    """A configuration file, as tables.  Raises ConfigError."""
    try:
        with open(path, "rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}); name another file") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f'{path} is no TOML file: {error}; write lines like size = "8G"'
        ) from None


def words_of(table: dict[str, Any], given: Sequence[str]) -> list[str]:
    """key=value of a file's top level, and what was given beside it, which wins."""
    mine = {word.partition("=")[0] for word in given}
    words = []
    for key, value in table.items():
        if isinstance(value, dict) or key in mine:
            continue  # a table is somebody else's
        if isinstance(value, bool):
            value = "yes" if value else "no"
        if not isinstance(value, str | int | float):
            raise ConfigError(f'{key} in the file is a list; write one value, like size = "8G"')
        words.append(f"{key}={value}")
    return [*words, *given]


def own_machine_words(words: Sequence[str]) -> list[str]:
    """The whole pool from the start, unless commit= or pressure= says otherwise.

    This machine swaps onto it: a pool that has to grow when there is no memory may never do so.
    """
    given = dict(map(split, words))
    return list(words) + ([] if {"commit", "pressure"} & given.keys() else ["commit=all"])


def split(word: str) -> tuple[str, str]:
    """key and value of a word.  Raises ConfigError."""
    key, equals, value = word.partition("=")
    if not equals:
        raise ConfigError(f"{word} is no key=value; write it like size=8G")
    return key, value


def environment() -> dict[str, str]:
    """For the supervisor: ours, plus where our modules are."""
    paths = [str(ROOT), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "ZCACHE_PYTHON": sys.executable}


def _absolute(word: str) -> str:
    """A path as it is meant here: the server's folder is another one."""
    key, value = split(word)
    return f"{key}={os.path.abspath(value)}" if key in PATHS and value else word


def error_of(code: int, sentence: str) -> ZcacheError:
    """The error with that exit code, saying that sentence."""
    kinds = {kind.exit_code: kind for kind in ZcacheError.__subclasses__()}
    return kinds.get(code, ZcacheError)(sentence)


def _last_words(instance: Instance) -> list[str]:
    state = servestate.read(instance)
    return state.words if state is not None else []


def _owner(name: str) -> tuple[int, int] | None:
    """(pid, start) of the server that has the memory file now."""
    shmid = memfile.find(name)
    if shmid is None:
        return None
    memory = memfile.MemoryFile.attach(shmid)
    try:
        owner = memory.owner_pid, memory.owner_start_ticks
    finally:
        memory.close()
    return owner if is_alive(*owner) else None


def _end(pid: int, ticks: int, number: int, what: str) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
    _wait(
        lambda: not is_alive(pid, ticks) or None,
        STOP_S,
        f"{what} (process {pid}) does not end; its log may say why",
    )


def _wait(look: Callable[[], Any], limit_s: float, sentence: str) -> Any:
    """The first answer of `look` that is not None.  Raises ZcacheError after the limit."""
    deadline_s = time.monotonic() + limit_s
    while (answer := look()) is None:
        if time.monotonic() > deadline_s:
            raise ZcacheError(sentence)
        time.sleep(LOOK_S)
    return answer
