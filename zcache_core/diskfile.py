"""Opening the disk: the file or block device that cold pages are written to.

    checks (nothing is written before all of them passed)
      a block device: not mounted, not in use as swap, not held open exclusively
      a file: not in use as swap, not below a loop device, not somebody else's lock
      its first 128 KiB: zeros, or ours; above all no file system's or swap's signature
      large enough; the file system has the room, if room is promised
    then the header block is written, and the tier has the rest

The header says whose pages lie here: the epoch of the memory file. A restart with the
same memory file goes on with them; any other start begins anew, because pages without
their index are rubbish.

    offset 0   "ZCACHEDK" | format 2 (4) | segment bytes (4) | epoch (8) | disk bytes (8)

`disk_size` of at least 1.05 times the device's size plus RESERVE_BYTES is a promise
that no write will ever be refused, so that much is allocated at once (fallocate) and
never given back.  Less is allocated as it is used.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import mmap
import os
import stat
import struct
from pathlib import Path

from zcache_core.errors import ConfigError

HEADER = struct.Struct("<8sIIQQ")
MAGIC = b"ZCACHEDK"
FORMAT = 2
SEGMENT_BYTES = 1 << 18  # as in segments.pxd
SIZE_UNIT_BYTES = 1 << 20  # a disk is used in whole MiB, because that is how sizes are told
BLOCK_BYTES = 4096
RESERVE_BYTES = 16 << 20  # header, segments being filled and cleaned
PROMISE = 1.05  # of the device's size: headers of 24 bytes a page, and room to clean in
LEAST_BYTES = 16 << 20
SWAPS, BLOCK_DEVICES = Path("/proc/swaps"), Path("/sys/block")
HEAD_BYTES = 128 * 1024  # looked at for signatures: the farthest is btrfs's

# (offset in bytes, bytes, what it is); util-linux's libblkid has the whole list
SIGNATURES = (
    (4086, b"SWAPSPACE2", "swap"),
    (4086, b"SWAP-SPACE", "swap"),
    (0x438, b"\x53\xef", "an ext2, ext3 or ext4 file system"),
    (0, b"XFSB", "an XFS file system"),
    (0x10040, b"_BHRfS_M", "a btrfs file system"),
    (0x218, b"LABELONE", "an LVM volume"),
    (0, b"LUKS\xba\xbe", "a LUKS volume"),
    (3, b"NTFS    ", "an NTFS file system"),
    (54, b"FAT", "a FAT file system"),
    (82, b"FAT32", "a FAT file system"),
    (0x400, b"\x10\x20\xf5\xf2", "an F2FS file system"),
    (4096, b"\xfc\x4e\x2b\xa9", "a RAID member"),
    (0x200, b"EFI PART", "a partition table"),
    (0, b"hsqs", "a squashfs"),
    (0x8001, b"CD001", "an ISO 9660 file system"),
)


class DiskFile:
    """The opened disk: `fd`, `disk_bytes` (whole MiB), `preallocated`, `direct`, `ours`.

    `found_bytes` is how long a file was, 0 for a device.  `ours` tells that it may hold pages of
    this memory file already.  `is_cut`: it was shorter than its header says, so pages are missing;
    it stays short until all that is in RAM is kept there (diskput.pyx), because its length is what
    tells the next server, should we end before that.
    """

    def __init__(self, path: str, fd: int, direct: bool) -> None:
        self.path, self.fd, self.direct = path, fd, direct
        self.disk_bytes = self.found_bytes = 0
        self.preallocated = False
        self.ours = False
        self.is_new = False
        self.is_cut = False

    def abandon(self) -> None:
        """Let go of it, and leave no file behind that was made for it."""
        if self.is_new and self.fd >= 0:
            with contextlib.suppress(OSError):
                os.unlink(self.path)
        self.close()

    def close(self) -> None:
        """Let go of it; harmless when done before."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def allocate(self, device_bytes: int) -> None:
        """Take the room that is promised to a device of that size, if any is.

        Raises ConfigError when it is missing.
        """
        self.preallocated = self.disk_bytes >= promised_bytes(device_bytes)
        if self.preallocated and not self.is_cut and stat.S_ISREG(os.fstat(self.fd).st_mode):
            try:
                os.posix_fallocate(self.fd, 0, self.disk_bytes)
            except OSError as error:
                raise ConfigError(
                    f"disk={self.path}: {self.disk_bytes} bytes cannot be allocated "
                    f"({error.strerror}); free some room or choose a smaller disk_size="
                ) from None

    def take(self, epoch: int, device_bytes: int) -> None:
        """Make it the disk of the memory file `epoch`.  Raises ConfigError when room is missing."""
        self.ours = self.written_for()[0] == epoch
        if self.is_cut and not self.ours:  # nothing that anybody needs was there
            self.is_cut = self.preallocated = False
            os.ftruncate(self.fd, self.disk_bytes)
        if not self.preallocated:
            self.allocate(device_bytes)
        header = HEADER.pack(MAGIC, FORMAT, SEGMENT_BYTES, epoch, self.disk_bytes)
        block = _aligned_block(header)
        try:
            os.pwrite(self.fd, block, 0)
            os.fdatasync(self.fd)
        except OSError as error:
            raise ConfigError(
                f"disk={self.path} cannot be written ({error.strerror}); choose another disk="
            ) from None

    def written_for(self) -> tuple[int, int]:
        """(epoch, disk bytes) of the memory file whose pages lie here; (0, 0): of none."""
        block = _aligned_block(b"")
        if os.preadv(self.fd, [block], 0) < HEADER.size:
            return 0, 0
        magic, form, segment, epoch, size = HEADER.unpack_from(block)
        if (magic, form, segment) != (MAGIC, FORMAT, SEGMENT_BYTES):
            return 0, 0
        return epoch, size


def promised_bytes(device_bytes: int) -> int:
    """Disk bytes from which on no write to a device of that size is ever refused.

    Whole MiB, so that a disk of exactly that size has them all.
    """
    promised = int(device_bytes * PROMISE) + RESERVE_BYTES
    return -(-promised // SIZE_UNIT_BYTES) * SIZE_UNIT_BYTES


def _aligned_block(data: bytes) -> memoryview:
    """One block with `data` at its start, in memory that O_DIRECT takes (page-aligned)."""
    block = memoryview(mmap.mmap(-1, BLOCK_BYTES))
    block[: len(data)] = data
    return block


def open_disk(path: str, disk_bytes: int | None, force: bool = False) -> DiskFile:
    """Open and check `path`; a missing file is made.  `disk_bytes` None: all that is there.

    `force`: a foreign signature does not matter.  Raises ConfigError, one sentence.
    """
    block_device = Path(path).is_block_device()
    if block_device:
        _refuse_in_use(path)
    flags = os.O_RDWR | os.O_CLOEXEC | (os.O_EXCL if block_device else os.O_CREAT)
    is_new = not os.path.lexists(path)
    disk = DiskFile(path, *_open(path, flags))
    try:
        _lock(path, disk.fd)
        if not block_device:
            _refuse_file_in_use(path, disk.fd)
    except BaseException:
        disk.close()
        raise
    disk.is_new = is_new  # from here on it is ours alone
    try:
        disk.disk_bytes = _size(path, disk.fd, disk_bytes, block_device)
        if not force:
            _refuse_signature(path, disk.fd)
        if not block_device:
            disk.found_bytes = os.fstat(disk.fd).st_size
            disk.is_cut = disk.found_bytes < min(disk.written_for()[1], disk.disk_bytes)
            if disk.found_bytes < disk.disk_bytes and not disk.is_cut:
                os.ftruncate(disk.fd, disk.disk_bytes)
    except BaseException:
        disk.abandon()
        raise
    return disk


def _open(path: str, flags: int) -> tuple[int, bool]:
    try:
        return os.open(path, flags | os.O_DIRECT, 0o600), True
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise _refused(path, error) from None
    try:  # tmpfs and some others know no O_DIRECT
        return os.open(path, flags, 0o600), False
    except OSError as error:
        raise _refused(path, error) from None


def _refused(path: str, error: OSError) -> ConfigError:
    if error.errno == errno.EBUSY:
        return ConfigError(f"disk={path} is in use; unmount it or choose another")
    return ConfigError(f"disk={path} cannot be opened ({error.strerror}); choose another path")


def _lock(path: str, fd: int) -> None:
    if not stat.S_ISREG(os.fstat(fd).st_mode) and not stat.S_ISBLK(os.fstat(fd).st_mode):
        raise ConfigError(f"disk={path} is neither a file nor a block device; choose another path")
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(
            f"disk={path} is used by another server; give each server a disk of its own"
        ) from None


def _size(path: str, fd: int, wanted: int | None, block_device: bool) -> int:
    there = os.lseek(fd, 0, os.SEEK_END)
    if wanted is None:
        wanted = there
        if wanted < LEAST_BYTES and not block_device:
            raise ConfigError(
                f"disk={path} is a new or small file; say how large it may grow with disk_size="
            )
    if block_device and wanted > there:
        raise ConfigError(f"disk={path} has {there} bytes; choose disk_size= up to that")
    size = wanted // SIZE_UNIT_BYTES * SIZE_UNIT_BYTES
    if size < LEAST_BYTES:
        raise ConfigError(f"a disk of {wanted} bytes is too small; use at least {LEAST_BYTES}")
    return size


def _refuse_in_use(path: str) -> None:
    real = os.path.realpath(path)
    number = os.stat(real).st_rdev
    for table, column, what in (("/proc/self/mounts", 0, "mounted"), ("/proc/swaps", 0, "swap")):
        for line in Path(table).read_text().splitlines():
            other = line.split()[column]
            if not other.startswith("/") or not os.path.exists(other):
                continue
            if os.stat(other).st_rdev == number:
                raise ConfigError(
                    f"disk={path} is in use ({what}); take it out of use or choose another"
                )


def _refuse_file_in_use(path: str, fd: int) -> None:
    """No force helps: the kernel itself reads and writes that file, as swap or a loop device's."""
    swaps = SWAPS.read_text() if SWAPS.exists() else ""
    users = [(line.split()[0], "swap") for line in swaps.splitlines()[1:]]
    for backing in BLOCK_DEVICES.glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):  # it was let go of meanwhile
            users.append((backing.read_text().rstrip("\n"), f"/dev/{backing.parts[-3]}"))
    for other, what in users:
        with contextlib.suppress(OSError):  # of another mount namespace, or deleted
            if os.path.samestat(os.stat(other), os.fstat(fd)):
                raise ConfigError(
                    f"disk={path} is in use ({what}); take it out of use or choose another"
                )


def _refuse_signature(path: str, fd: int) -> None:
    start = memoryview(mmap.mmap(-1, HEAD_BYTES))
    n = os.preadv(fd, [start], 0)
    head = bytes(start[:n])
    if head[:8] == MAGIC:
        return
    for offset, magic, what in SIGNATURES:
        if head[offset : offset + len(magic)] == magic:
            raise ConfigError(
                f"disk={path} carries {what}; choose another, or repeat its path in "
                f"disk_force={path} if nothing on it is needed"
            )
    if any(head):
        raise ConfigError(
            f"disk={path} holds data that are not zcache's; choose another, or repeat its path "
            f"in disk_force={path} if nothing on it is needed"
        )
