"""Which memory files there are: by name, by segment, and those that nobody has any more.

    NAME.mem -> number of a segment -> is it there, readable, and a memory file?

A look attaches the segment for a moment, read-only.  What it is not: opening one (memfile.pyx).
"""

import os

from libc.errno cimport errno

from zcache_core.layout cimport NAME_BYTES, Superblock

from zcache_core.errors import InUseError, MemoryFileError
from zcache_core.owner import recorded_segment, unattached_segments

cdef extern from "<sys/ipc.h>" nogil:
    enum: IPC_RMID

cdef extern from "<sys/shm.h>" nogil:
    enum: SHM_RDONLY
    void *shmat(int shmid, const void *addr, int flags)
    int shmdt(const void *addr)
    int shmctl(int shmid, int cmd, void *buf)

MAGIC = b"ZCACHEMF"


def is_memory_file(int shmid):
    """Whether the segment exists, can be read by us, and is a zcache memory file."""
    cdef void *base = shmat(shmid, NULL, SHM_RDONLY)
    if base == <void *>-1:
        return False
    try:
        return (<char *>base)[:8] == MAGIC
    finally:
        shmdt(base)


def find(str name):
    """Segment of the memory file of that name (its owner may live), None when there is none."""
    shmid = recorded_segment(name)
    return shmid if shmid >= 0 and is_memory_file(shmid) else None


def exists(str name):
    """Whether a memory file of that name is there to be opened (its owner may live)."""
    return find(name) is not None


def segment_name(int shmid):
    """Name of the memory file in that segment, None when it is no memory file."""
    cdef void *base = shmat(shmid, NULL, SHM_RDONLY)
    if base == <void *>-1:
        return None
    try:
        if (<char *>base)[:8] != MAGIC:
            return None
        return (<Superblock *>base).name[:NAME_BYTES].rstrip(b"\0").decode(errors="replace")
    finally:
        shmdt(base)


def remove(int shmid):
    """Remove a memory file; its pages are lost.  Raises MemoryFileError."""
    if not is_memory_file(shmid):
        raise MemoryFileError(f"segment {shmid} is no zcache memory file; nothing removed")
    if not any(row.shmid == shmid for row in unattached_segments()):
        raise InUseError(f"segment {shmid} is attached by a running server; stop that one first")
    if shmctl(shmid, IPC_RMID, NULL) != 0:
        raise MemoryFileError(f"segment {shmid} cannot be removed ({os.strerror(errno)})")


def leftovers():
    """Memory files that nobody has attached, as a list of `owner.Leftover`."""
    found = []
    for row in unattached_segments():
        name = segment_name(row.shmid)
        if name is not None:
            found.append(row._replace(name=name))
    return found
