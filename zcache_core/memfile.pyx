"""The memory file: one System V segment that holds all that must outlive a server.

    +------------+-------+----------+----------------------+-----------+----------------+----------- - -
    | superblock | keys  | counters | index: 16 B per page | frame map | frame headers  | arena: frames
    | 4 KiB      | 4 KiB | 160 KiB  | of the device        | a bit per | 24 B per frame | of 4 KiB
    +------------+-------+----------+----------------------+-----------+----------------+----------- - -

Who only reads (the node, which talks to the network) has the page of keys not in its address space.

A System V segment, not a file and not anonymous memory, because of what happens
when its owner dies: memory locked with mlock becomes evictable at that moment
(and may be swapped to the very device that waits for it), a segment under
SHM_LOCK stays where it is with nobody attached.  It is addressed by offset only,
holds no lock word, and its holes are punched with MADV_REMOVE; that is refused
inside an mlocked mapping, so the mapping is munlocked again after every
mlockall (`unlock_mapping`).

A standby maps the file beforehand, without the right to write (`expect`), and gets that right
when the owner is gone (`take`): then mapping costs nothing, when memory may not be had.

A private file (no name) is removed by the kernel at the last detach, whatever
ended its owner.  A named one is found again through the owner's lock file
(`owner.py`), which holds its segment number; a successor maps it for writing
only after the lock is free and the old owner's process is gone.

What it is not: durable.  It does not survive a reboot, and is not meant to.
"""

import os
import struct
import time
import zlib

from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from zcache_core.geometry cimport map_ahead, map_bytes
from zcache_core.layout cimport (
    COUNTER_CELLS, COUNTER_SHARDS, DEVICE_NAME_BYTES, FORMAT_VERSION, KEY_BYTES, MAX_DEVICES,
    HEADER_BYTES, NAME_BYTES, PAGE_BYTES, PAGE_SHIFT, ST_DISK, ST_EMPTY, ST_LOST, ST_PEER, ST_RAM_EPHEMERAL, BlobHeader,
    Entry, Keys, Superblock, header_is_sound, header_lower, header_page, header_version, is_backed, length_of,
    lower_state, state_of, version_of, where_of,
)

from zcache_core.counters import HISTOGRAM_CELL, STORED
from zcache_core.errors import MemoryFileError
from zcache_core.geometry import check_sizes, geometry_of
from zcache_core.inventory import (  # noqa: F401
    MAGIC, exists, find, is_memory_file, leftovers, remove, segment_name,
)
from zcache_core.owner import EXIT_WAIT_S, OwnerLock, start_ticks

cdef extern from "<sys/ipc.h>" nogil:
    enum: IPC_PRIVATE, IPC_CREAT, IPC_EXCL, IPC_RMID

cdef extern from "<sys/shm.h>" nogil:
    enum: SHM_LOCK, SHM_RDONLY, SHM_NORESERVE
    int shmget(int key, size_t size, int flags)
    void *shmat(int shmid, const void *addr, int flags)
    int shmdt(const void *addr)
    int shmctl(int shmid, int cmd, void *buf)

cdef extern from "<sys/random.h>" nogil:
    ssize_t getrandom(void *buf, size_t length, unsigned int flags)

cdef extern from "<sys/mman.h>" nogil:
    enum: MADV_DONTDUMP, PROT_NONE, PROT_READ, PROT_WRITE
    int madvise(void *addr, size_t length, int advice)
    int mprotect(void *addr, size_t length, int rights)
    int munlock(const void *addr, size_t length)

FORMAT = FORMAT_VERSION
KEYS_OFFSET = PAGE_BYTES
FOREIGN_DEVICE = "(foreign)"     # the only device of a file that holds pages of others (donation.pyx)
# Which cell means what; another table's cells are not to be read as ours.
COUNTERS_ID = zlib.crc32(" ".join([*(c.name for c in STORED), *HISTOGRAM_CELL]).encode()) + 1


cdef class MemoryFile:
    """One attached memory file; made by `create`, `open` or `attach`."""

    def __cinit__(self):
        self.base = NULL
        self.shmid = -1

    def __init__(self):
        raise TypeError("use MemoryFile.create, MemoryFile.open or MemoryFile.attach")

    @classmethod
    def create(cls, name, device_bytes, pool_bytes, devices=()):
        """A new, empty, locked segment; private to this process when `name` is None.

        `devices`: (name, bytes) of each of several that share it, `device_bytes` in all;
        none: one without a name.
        Raises MemoryFileError when sizes or name are wrong or the kernel refuses,
        InUseError when a living process owns the name.
        """
        check_sizes(device_bytes, pool_bytes)
        cdef MemoryFile self = cls.__new__(cls)
        self._name = name
        self._lock = OwnerLock.acquire(name) if name is not None else None
        if self._lock is not None and self._lock.shmid >= 0 and is_memory_file(self._lock.shmid):
            self._lock.release()
            raise MemoryFileError(
                f"a memory file named {name} exists already (segment {self._lock.shmid}); "
                f"open it, or remove it with 'zcache check --remove-leftovers {name}'"
            )
        geometry = geometry_of(device_bytes, pool_bytes, int.from_bytes(os.urandom(8), "little"))
        file_bytes = int.from_bytes(geometry[:8], "little")
        self.shmid = shmget(IPC_PRIVATE, file_bytes, IPC_CREAT | IPC_EXCL | 0o600 | SHM_NORESERVE)
        if self.shmid < 0:
            error = os.strerror(errno)
            self._release()
            raise MemoryFileError(
                f"the kernel refused a segment of {file_bytes} bytes ({error}); choose a smaller "
                f"size or pool, or raise kernel.shmmax and kernel.shmall"
            )
        try:
            self._attach(True)
        except MemoryFileError:
            shmctl(self.shmid, IPC_RMID, NULL)
            self._release()
            raise
        if name is None:
            shmctl(self.shmid, IPC_RMID, NULL)      # gone with the last detach, even after SIGKILL
        memcpy(self.super.magic, b"ZCACHEMF", 8)
        self.super.format_version = FORMAT_VERSION
        self.super.header_crc = zlib.crc32(geometry)
        memcpy(&self.super.file_bytes, <const char *>geometry, 64)
        self.super.created_s = int(time.time())
        encoded = (name or "").encode()
        memcpy(self.super.name, <const char *>encoded, len(encoded))
        self._map_parts()
        self._make_keys()       # now that a core dump leaves this mapping out
        self.fresh = True
        self._lay_out(devices or [("", device_bytes)])
        self.super.devices[0].versions_reserved = 1
        self._own()
        return self

    cdef object _make_keys(self):
        """Random keys, straight from the kernel into the file: no copy of them is anywhere else."""
        cdef ssize_t missing = 2 * KEY_BYTES
        missing -= getrandom(self.keys.disk_key, KEY_BYTES, 0)
        missing -= getrandom(self.keys.peer_key, KEY_BYTES, 0)
        if missing:
            shmctl(self.shmid, IPC_RMID, NULL)
            self._release()
            raise MemoryFileError("the kernel gave no random key; start again")

    @classmethod
    def open(cls, name):
        """The existing file of that name, for writing, once its last owner is gone.

        Raises InUseError while the owner lives, MemoryFileError when there is no
        such file or it cannot be read by this version.
        """
        cdef MemoryFile self = cls.__new__(cls)
        self._name = name
        self._lock = OwnerLock.acquire(name)
        if self._lock.shmid < 0 or not is_memory_file(self._lock.shmid):
            self._release()
            raise MemoryFileError(f"there is no memory file named {name}; start without one first")
        self.shmid = self._lock.shmid
        try:
            self._attach(False)
            self._check()
            if segment_name(self.shmid) != name:
                raise MemoryFileError(
                    f"segment {self.shmid} belongs to another memory file; remove {self._lock.path} and start anew"
                )
            self._lock.wait_for_exit(self.super.owner_pid, self.super.owner_start_ticks)
            self._detach()
            self._attach(True)
        except Exception:
            self.close()
            raise
        self._map_parts()
        self._own()
        return self

    @classmethod
    def expect(cls, name):
        """The file of that name whose owner still lives: all is had that can be had before `take`.

        Mapped where it will be written, but not to be written, with page tables for all that has
        memory.  None when there is no such file; MemoryFileError when it cannot be read.
        """
        cdef MemoryFile self = cls.__new__(cls)
        cdef uint64_t size
        shmid = find(name)
        if shmid is None or segment_name(shmid) != name:
            return None
        self.shmid = shmid
        self._attach(False)
        try:
            self._check()
            size = self.super.file_bytes
            self._detach()
            self._attach(True)
            if mprotect(self.base, size, PROT_READ):
                raise MemoryFileError(f"segment {shmid} cannot be protected ({os.strerror(errno)}); run without standby")
        except Exception:
            self.close()
            raise
        self._name = name
        self.writable = False
        self.expected = True
        self._map_parts()
        with nogil:
            map_ahead(self.base)
        return self

    def take(self, patience_s=EXIT_WAIT_S):
        """Of an expected file: its owner is gone, it is ours.  Raises as `open` does, after so long."""
        assert self.expected
        self._lock = OwnerLock.acquire(self._name, patience_s)
        if self._lock.shmid != self.shmid:
            raise MemoryFileError(f"the memory file {self._name} is another one now; start again")
        self._lock.wait_for_exit(self.super.owner_pid, self.super.owner_start_ticks)
        if mprotect(self.base, self.super.file_bytes, PROT_READ | PROT_WRITE):
            raise MemoryFileError(f"segment {self.shmid} cannot be written ({os.strerror(errno)}); start again")
        self.writable, self.expected = True, False
        self.unlock_mapping()       # an mlockall may have come since
        self._own()

    @classmethod
    def attach(cls, shmid, bint with_keys=False):
        """Any memory file, read-only, at any time; `with_keys`: its keys too, for forensics."""
        cdef MemoryFile self = cls.__new__(cls)
        self.shmid = shmid
        self._attach(False)
        try:
            self._check()
        except MemoryFileError:
            self.close()
            raise
        encoded = self.super.name[:NAME_BYTES].rstrip(b"\0")
        self._name = encoded.decode() or None
        self._map_parts()
        if not with_keys and mprotect(self.base + <size_t>KEYS_OFFSET, PAGE_BYTES, PROT_NONE) == 0:
            self.keys = NULL
        return self

    cdef object _attach(self, bint writable):
        cdef void *base = shmat(self.shmid, NULL, 0 if writable else SHM_RDONLY)
        if base == <void *>-1:
            raise MemoryFileError(
                f"segment {self.shmid} cannot be attached ({os.strerror(errno)}); "
                f"run as the user that made it"
            )
        self.base = <uint8_t *>base
        self.super = <Superblock *>base
        self.writable = writable

    cdef object _detach(self):
        shmdt(self.base)
        self.base = NULL

    cdef object _check(self):
        if self.super.magic[:8] != MAGIC:
            raise MemoryFileError(f"segment {self.shmid} is no zcache memory file; name another")
        if self.super.format_version != FORMAT_VERSION:
            raise MemoryFileError(
                f"the memory file has format {self.super.format_version}, this version reads "
                f"{FORMAT_VERSION}; swapoff with the version that made it, then start this one"
            )
        words = (<char *>&self.super.file_bytes)[:64]
        if zlib.crc32(words) != self.super.header_crc:
            raise MemoryFileError(
                f"the geometry of segment {self.shmid} is damaged; its pages cannot be found: "
                f"remove it with 'zcache check --remove-leftovers {self.shmid}'"
            )
        if self.super.devices_crc != self._devices_crc():
            raise MemoryFileError(
                f"the device table of segment {self.shmid} is damaged; its pages cannot be told "
                f"apart: remove it with 'zcache check --remove-leftovers {self.shmid}'"
            )

    cdef uint64_t _devices_crc(self):
        """Of each row's pages and index_offset, and of all names."""
        cdef int row
        words = [
            number for row in range(MAX_DEVICES)
            for number in (self.super.devices[row].pages, self.super.devices[row].index_offset)
        ]
        names = (<char *>self.super.device_names)[:MAX_DEVICES * DEVICE_NAME_BYTES]
        return zlib.crc32(struct.pack(f"<{len(words)}Q", *words) + names)

    def _lay_out(self, devices):
        """Divide the index among the devices, one after the other."""
        cdef uint64_t at = self.super.index_offset
        cdef int row
        assert sum(size for _, size in devices) == self.super.device_pages * PAGE_BYTES
        assert len(devices) <= MAX_DEVICES
        for row, (name, size) in enumerate(devices):
            encoded = name.encode()
            assert len(encoded) <= DEVICE_NAME_BYTES and size % PAGE_BYTES == 0
            memcpy(self.super.device_names[row], <const char *>encoded, len(encoded))
            self.super.devices[row].pages = size // PAGE_BYTES
            self.super.devices[row].index_offset = at
            at += self.super.devices[row].pages * sizeof(Entry)
        self.super.devices_crc = self._devices_crc()

    def _map_parts(self):
        cdef Superblock *s = self.super
        self.keys = <Keys *>(self.base + <size_t>KEYS_OFFSET)
        self.counters = <uint64_t *>(self.base + s.counters_offset)
        self.index = <Entry *>(self.base + s.index_offset)
        self.frame_map = <uint64_t *>(self.base + s.frame_headers_offset - map_bytes(s.pool_frames))
        self.frame_headers = <BlobHeader *>(self.base + s.frame_headers_offset)
        self.arena = self.base + s.arena_offset
        madvise(self.base, s.file_bytes, MADV_DONTDUMP)
        self.unlock_mapping()

    def _own(self):
        """Lock the segment in memory and write down whose it is."""
        self.stays_locked = shmctl(self.shmid, SHM_LOCK, NULL) == 0
        if self.super.counters_id != COUNTERS_ID:
            memset(self.counters, 0, COUNTER_CELLS * COUNTER_SHARDS * 8)
            self.super.counters_id = COUNTERS_ID
        self.super.owner_pid = os.getpid()
        self.super.owner_start_ticks = start_ticks(os.getpid())
        if self._lock is not None:
            self._lock.record(self.shmid)

    def unlock_mapping(self):
        """Undo mlock on the mapping (not SHM_LOCK): holes can be punched again."""
        munlock(self.base, self.super.file_bytes)

    def _release(self):
        if self._lock is not None:
            self._lock.release()

    def close(self):
        """Detach; a private file is gone with its last user, a named one stays."""
        if self.base != NULL:
            if self.writable and self.super.owner_pid == <uint64_t>os.getpid():
                self.super.owner_pid = 0        # an orderly end: nobody has to wait for our exit
            self._detach()
        self._release()

    def destroy(self):
        """Remove a named file for good (at an orderly end); then detach."""
        if self.base != NULL and self._name is not None and self.writable:
            shmctl(self.shmid, IPC_RMID, NULL)
            if self._lock is not None:
                self._lock.forget()
        self.close()

    def __dealloc__(self):
        if self.base != NULL:
            shmdt(self.base)

    @property
    def name(self):
        return self._name

    @property
    def device_bytes(self):
        return self._open_super().device_pages * PAGE_BYTES

    @property
    def pool_bytes(self):
        return self._open_super().pool_frames * PAGE_BYTES

    @property
    def size_bytes(self):
        return self._open_super().file_bytes

    @property
    def epoch(self):
        """Random 64-bit identity of this file's contents."""
        return self._open_super().epoch

    @property
    def owner_pid(self):
        return self._open_super().owner_pid

    @property
    def owner_start_ticks(self):
        """Its start in clock ticks since boot: which process, not which number."""
        return self._open_super().owner_start_ticks

    @property
    def overhead_bytes(self):
        """Superblock, counters, index and frame map: committed as long as the file lives."""
        return self._open_super().frame_headers_offset

    cdef Superblock *_open_super(self) except NULL:
        if self.base == NULL:
            raise MemoryFileError("the memory file is closed; open it again")
        return self.super

    cdef bint lower_of(self, uint64_t page, Entry e, uint64_t *lower) noexcept nogil:
        """Where an ephemeral page is below, by its blob's header; False: do not believe it."""
        cdef uint64_t at = where_of(e.location)
        cdef BlobHeader header
        lower[0] = 0
        if at >> PAGE_SHIFT >= self.super.pool_frames:
            return False
        if length_of(e.location) + HEADER_BYTES >= PAGE_BYTES:
            header = self.frame_headers[at >> PAGE_SHIFT]
        elif (at & (PAGE_BYTES - 1)) + HEADER_BYTES <= PAGE_BYTES:
            header = (<BlobHeader *>(self.arena + at))[0]
        else:
            return False
        lower[0] = header_lower(&header)
        return (
            header_is_sound(&header) and header_page(&header) == page
            and header_version(&header) == version_of(e.version)
        )

    def pages_on_disk(self):
        """(pages on a disk and not in RAM, pages there and in RAM), by one look at the whole index."""
        cdef uint64_t only = 0
        cdef uint64_t also = 0
        cdef uint64_t page, lower
        cdef Entry e
        cdef Superblock *s = self._open_super()
        with nogil:
            for page in range(s.device_pages):
                e = self.index[page]
                if state_of(e.version) == ST_RAM_EPHEMERAL:
                    if self.lower_of(page, e, &lower):
                        also += lower_state(lower) == ST_DISK or is_backed(lower)
                else:
                    only += state_of(e.version) == ST_DISK
                    only += state_of(e.version) == ST_PEER and is_backed(where_of(e.location))
        return only, also

    def pages_at_peers(self):
        """(pages with peers and not in RAM, of them: on the disk too), by one look at the whole index."""
        cdef uint64_t there = 0
        cdef uint64_t backed = 0
        cdef uint64_t page
        cdef Superblock *s = self._open_super()
        with nogil:
            for page in range(s.device_pages):
                if state_of(self.index[page].version) == ST_PEER:
                    there += 1
                    backed += is_backed(where_of(self.index[page].location))
        return there, backed

    def devices(self):
        """The devices that share this file: (name, bytes, generation, first page) of each."""
        cdef Superblock *s = self._open_super()
        cdef int row
        found = []
        for row in range(MAX_DEVICES):
            if s.devices[row].pages:
                name = s.device_names[row][:DEVICE_NAME_BYTES].rstrip(b"\0").decode(errors="replace")
                first = (s.devices[row].index_offset - s.index_offset) // sizeof(Entry)
                found.append((name, s.devices[row].pages * PAGE_BYTES, s.devices[row].generation, first))
        return found

    def stored_pages(self, uint64_t first, uint64_t n):
        """How many of the pages first .. first + n - 1 are stored somewhere, by a look at each entry."""
        cdef uint64_t stored = 0
        cdef uint64_t page
        cdef uint32_t state
        cdef Superblock *s = self._open_super()
        if first > s.device_pages or n > s.device_pages - first:
            raise ValueError("past the end of the index")
        with nogil:
            for page in range(first, first + n):
                state = state_of(self.index[page].version)
                stored += state != ST_EMPTY and state != ST_LOST
        return stored

    def counter_cells(self):
        """The counter shards as bytes: COUNTER_SHARDS rows of COUNTER_CELLS uint64."""
        self._open_super()
        return (<char *>self.counters)[: COUNTER_CELLS * COUNTER_SHARDS * 8]

    def peek(self, offset_bytes, length_bytes):
        """Raw bytes of the file (for tests and forensics)."""
        if offset_bytes < 0 or length_bytes < 0 or offset_bytes + length_bytes > self.size_bytes:
            raise ValueError("outside of the memory file")
        if self.keys == NULL and offset_bytes < KEYS_OFFSET + PAGE_BYTES and offset_bytes + length_bytes > KEYS_OFFSET:
            raise ValueError("who only reads has not the keys")
        return (<char *>self.base + <size_t>offset_bytes)[:length_bytes]

    def poke(self, offset_bytes, bytes data):
        """Overwrite raw bytes of the file: damage on purpose, for tests."""
        if offset_bytes < 0 or offset_bytes + len(data) > self.size_bytes or not self.writable:
            raise ValueError("outside of the memory file, or read-only")
        memcpy(self.base + <size_t>offset_bytes, <const char *>data, len(data))

    def offsets(self):
        """Where the parts lie, in bytes: counters, index, frame_map, frame_headers, arena."""
        cdef Superblock *s = self._open_super()
        return {
            "counters": s.counters_offset, "index": s.index_offset,
            "frame_map": s.frame_headers_offset - map_bytes(s.pool_frames),
            "frame_headers": s.frame_headers_offset, "arena": s.arena_offset,
        }
