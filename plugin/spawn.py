"""posix_spawn without the GIL.

os.posix_spawn holds the GIL until the child has its new program: measured 2 to 5 ms
in a server of 200 MiB, and no page is served meanwhile.  So everything is prepared
beforehand here, and the one call goes through ctypes, which lets the GIL go.

    Program(argv, env, fds) -> spawn() -> pid, as often as wanted

The child starts with ordinary scheduling unless it is to have ours, the descriptors 0 to 2
and those it is given, no signal blocked and none ignored but SIGPIPE, whatever this thread has.  It
is spawned, not forked: a fork would copy the page tables of the whole pool.

What it is not: portable.  glibc 2.34 or later on Linux; the opaque structures get more room than
they have there (336 and 80 bytes).
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Mapping, Sequence

POSIX_SPAWN_SETPGROUP, POSIX_SPAWN_SETSIGDEF = 0x02, 0x04
POSIX_SPAWN_SETSIGMASK, POSIX_SPAWN_SETSCHEDULER = 0x08, 0x20
ROOM_BYTES = 1024  # for each of the C library's opaque structures
ENDING_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGQUIT, signal.SIGHUP, signal.SIGCHLD)

_libc = ctypes.CDLL(None, use_errno=True)


class Program:
    """A command that can be started again and again.

    `fds` maps a descriptor of the child to the one of ours that it gets there.
    `our_class`: it keeps the scheduling class of the thread that spawns it.  `own_group`: it leads
    a process group of its own, by which its children are found when it is gone.
    """

    def __init__(
        self,
        argv: Sequence[str],
        env: Mapping[str, str],
        fds: Mapping[int, int],
        our_class: bool = False,
        own_group: bool = False,
    ) -> None:
        self.path = argv[0]
        self._argv = _strings(argv)
        self._env = _strings([f"{name}={value}" for name, value in env.items()])
        self._actions = ctypes.create_string_buffer(ROOM_BYTES)
        self._attributes = ctypes.create_string_buffer(ROOM_BYTES)
        _check(_libc.posix_spawn_file_actions_init(self._actions))
        for its, ours in fds.items():
            _check(_libc.posix_spawn_file_actions_adddup2(self._actions, ours, its))
        # A client's socket kept open by the child would hide the server's death from it.
        above = max([2, *fds]) + 1
        _check(_libc.posix_spawn_file_actions_addclosefrom_np(self._actions, above))
        self._set_attributes(our_class, own_group)

    def _set_attributes(self, our_class: bool, own_group: bool) -> None:
        defaults, nothing = (ctypes.create_string_buffer(ROOM_BYTES) for _ in range(2))
        priority = ctypes.c_int(0)  # all of struct sched_param
        _libc.sigemptyset(defaults)
        _libc.sigemptyset(nothing)
        for number in ENDING_SIGNALS:
            _libc.sigaddset(defaults, int(number))
        a = self._attributes
        flags = POSIX_SPAWN_SETSIGDEF | POSIX_SPAWN_SETSIGMASK
        if not our_class:
            flags |= POSIX_SPAWN_SETSCHEDULER
        if own_group:
            flags |= POSIX_SPAWN_SETPGROUP  # number 0, which is the default: its own
        _check(_libc.posix_spawnattr_init(a))
        _check(_libc.posix_spawnattr_setflags(a, ctypes.c_short(flags)))
        _check(_libc.posix_spawnattr_setsigdefault(a, defaults))
        _check(_libc.posix_spawnattr_setsigmask(a, nothing))
        _check(_libc.posix_spawnattr_setschedpolicy(a, os.SCHED_OTHER))
        _check(_libc.posix_spawnattr_setschedparam(a, ctypes.byref(priority)))

    def spawn(self) -> int:
        """The new child's number.  Raises OSError."""
        pid = ctypes.c_int()
        _check(
            _libc.posix_spawn(
                ctypes.byref(pid), self._argv[0], self._actions, self._attributes,
                self._argv, self._env,
            )
        )  # fmt: skip
        return pid.value


def _strings(words: Sequence[str]) -> ctypes.Array[ctypes.c_char_p]:
    encoded = [os.fsencode(word) for word in words]
    return (ctypes.c_char_p * (len(encoded) + 1))(*encoded, None)


def _check(error: int) -> None:
    if error:
        raise OSError(error, os.strerror(error))
