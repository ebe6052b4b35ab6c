"""nbdkit's entry: callbacks that only forward.  Everything is assembled in `wiring`.

    nbdkit -f -U /run/zcache.sock python plugin/zcache_plugin.py size=8G pool=2G

The data callbacks (pread, pwrite, ...) are the compiled Device's own methods, put
into this module after the fork; nbdkit 1.32 looks a callback up at every call, so
no Python runs between it and them.  The `def`s below stand in until then, because
nbdkit wants to see the names when it loads this file.
"""

from __future__ import annotations

import sys
from pathlib import Path

# nbdkit runs this file as __main__ and puts no folder of it on the path.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import nbdkit

try:
    from plugin import config as _config
    from plugin import leave, liaison, messages, places, wiring
except ImportError as error:
    sys.exit(f"zcache: {error}; run 'make setup', which builds the core for nbdkit's own Python")

API_VERSION = 2
MAXIMUM_BLOCK_BYTES = 32 << 20
DATA_CALLBACKS = ("pread", "pwrite", "trim", "zero", "extents", "cache", "flush")

messages.install()
_supervisor = liaison.Liaison.from_environment()
_words: list[tuple[str, str]] = []
_settings: _config.Config
_checked: wiring.Checked
_serving: wiring.Serving


def thread_model() -> int:
    # One request of a connection after the other, in the connection's own thread, and
    # connections in parallel: each hand-over to another worker costs more than a page
    # does (docs/performance.md).  Who writes -t N wants N requests of a connection at once.
    if places.threads_chosen(places.own_command_line()):
        return int(nbdkit.THREAD_MODEL_PARALLEL)
    return int(nbdkit.THREAD_MODEL_SERIALIZE_REQUESTS)


def dump_plugin() -> None:
    wiring.dump(sys.stdout)


def config(key: str, value: str) -> None:
    _words.append((key, value))


def config_complete() -> None:
    global _settings
    with _supervisor.reporting():
        _settings = _config.parse(_words)


def get_ready() -> None:
    global _checked
    before = wiring.Before()
    with _supervisor.reporting():
        if _supervisor.is_standby:
            wiring.check_successor(_settings)
            wiring.warm_up(_settings)
            _supervisor.be_forked()
            before = wiring.settle(_settings)
            _supervisor.wait_turn(before.vigil)
        _checked = wiring.check(_settings, _supervisor.is_supervised, before)


def after_fork() -> None:
    global _serving
    leave.prepare()
    with _supervisor.reporting():
        _serving = wiring.start(_settings, _checked, nbdkit.set_error)
    globals().update((name, getattr(_serving.device, name)) for name in DATA_CALLBACKS)
    leave.watch(*_serving.unix_socket, _serving.before_leaving)
    _supervisor.serving()


def cleanup() -> None:
    _serving.stop()


def open(readonly: bool) -> object:
    return _serving.open(nbdkit.export_name())


def close(h: object) -> None:
    pass


def get_size(h: object) -> int:
    return _serving.device.size_of(h)


def export_description(h: object) -> str:
    return wiring.description(_settings)


def block_size(h: object) -> tuple[int, int, int]:
    return (1, 4096, MAXIMUM_BLOCK_BYTES)


def is_rotational(h: object) -> bool:
    return False


def can_multi_conn(h: object) -> bool:
    return True


def can_write(h: object) -> bool:
    return True


def can_flush(h: object) -> bool:
    return True


def can_fua(h: object) -> int:
    return int(nbdkit.FUA_NATIVE)


def can_trim(h: object) -> bool:
    return True


def can_zero(h: object) -> bool:
    return True


def can_fast_zero(h: object) -> bool:
    return True


def can_extents(h: object) -> bool:
    return True


def can_cache(h: object) -> int:
    return int(nbdkit.CACHE_NATIVE)


def _not_yet(*_: object) -> None:
    raise RuntimeError("nbdkit asked for data before after_fork")


pread = pwrite = trim = zero = extents = cache = flush = _not_yet
