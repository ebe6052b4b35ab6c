"""Input and output on the disk: plain reads, and a ring of two writes under way.

    buffer 0 | flying ............. done        one thread fills and sends;
    buffer 1 | being filled | flying ....       done ones are looked at by their owner

A disk is faster when it has more than one write to do, and while it works the next buffer
is filled.  The kernel's own asynchronous I/O does it (io_submit(2)), without a thread; where that is not
to be had, or the file is not open O_DIRECT, a write is simply done when it is sent.

Bounds: WRITES buffers of WRITE_BYTES.  One thread at a time; reads by any.
"""

from libc.errno cimport EINTR, EIO, ENODATA, ENOENT, ENOTTY, EOPNOTSUPP, errno
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memset
from posix.mman cimport MAP_ANONYMOUS, MAP_FAILED, MAP_PRIVATE, PROT_READ, PROT_WRITE, mmap, munmap
from posix.time cimport nanosleep, timespec
from posix.types cimport off_t

cdef extern from "<linux/aio_abi.h>" nogil:
    struct io_event:
        uint64_t data
        int64_t res
    enum: IOCB_CMD_PWRITE

cdef extern from "<sys/syscall.h>" nogil:
    enum: SYS_io_setup, SYS_io_destroy, SYS_io_submit, SYS_io_getevents

cdef extern from "<unistd.h>" nogil:
    long syscall(long number, ...)
    int ftruncate(int fd, off_t length)
    ssize_t pread(int fd, void *data, size_t length, off_t offset)
    ssize_t pwrite(int fd, const void *data, size_t length, off_t offset)

cdef extern from "<fcntl.h>" nogil:
    enum: F_GETFL, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_KEEP_SIZE
    int fcntl(int fd, int command, ...)
    int fallocate(int fd, int mode, off_t offset, off_t length)

cdef extern from "<sys/stat.h>" nogil:
    ctypedef struct struct_stat "struct stat":
        unsigned int st_mode
        unsigned long st_nlink
        off_t st_size
    int fstat(int fd, struct_stat *about)
    bint S_ISREG(unsigned int mode)

cdef extern from "<sys/ioctl.h>" nogil:
    int ioctl(int fd, unsigned long request, ...)

cdef extern from "<linux/fs.h>" nogil:
    enum: BLKDISCARD

cdef extern from *:
    """
    #ifndef O_DIRECT
    #define O_DIRECT 040000         /* hidden without _GNU_SOURCE */
    #endif
    """
    enum: O_DIRECT

cdef extern from "<sys/mman.h>" nogil:
    enum: MAP_POPULATE


cdef int write_all(int fd, const uint8_t *data, uint64_t length, uint64_t offset) noexcept nogil:
    """0 or an errno; a short write that does not go on is EIO."""
    cdef ssize_t n
    while length:
        n = pwrite(fd, data, length, <off_t>offset)
        if n < 0:
            if errno == EINTR:
                continue
            return errno
        if n == 0 or n % BLOCK_BYTES and <uint64_t>n != length:
            return EIO
        data += n
        offset += <uint64_t>n
        length -= <uint64_t>n
    return 0


cdef int read_all(int fd, uint8_t *data, uint64_t length, uint64_t offset) noexcept nogil:
    """0 or an errno; the end of the file inside the range is EIO."""
    cdef ssize_t n
    while length:
        n = pread(fd, data, length, <off_t>offset)
        if n < 0:
            if errno == EINTR:
                continue
            return errno
        if n == 0:
            return EIO
        data += n
        offset += <uint64_t>n
        length -= <uint64_t>n
    return 0


cdef int medium_error(int fd, uint64_t bytes) noexcept nogil:
    """0; ENOENT: the file was removed, nobody will find it again; ENODATA: it was cut short."""
    cdef struct_stat about
    if fstat(fd, &about):
        return errno
    if not S_ISREG(about.st_mode):
        return 0                # a block device says by its errors what is the matter
    if about.st_nlink == 0:
        return ENOENT
    return ENODATA if <uint64_t>about.st_size < bytes else 0


cdef uint64_t medium_bytes(int fd) noexcept nogil:
    """How long the file is; 0 when that cannot be told."""
    cdef struct_stat about
    return 0 if fstat(fd, &about) else <uint64_t>about.st_size


cdef int medium_mend(int fd, uint64_t bytes, bint allocate) noexcept nogil:
    """Make a file that was cut short as long as it was; 0 or an errno.  What was cut off is gone."""
    if ftruncate(fd, <off_t>bytes) or allocate and fallocate(fd, 0, 0, <off_t>bytes):
        return errno
    return 0


cdef int punch(int fd, uint64_t offset, uint64_t length) noexcept nogil:
    """Give that room back: a hole in a file, discarded on a block device.  -1: it never can be."""
    cdef uint64_t[2] span
    if fallocate(fd, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, <off_t>offset, <off_t>length) == 0:
        return 0
    if errno != EOPNOTSUPP:
        return 0
    span[0], span[1] = offset, length
    if ioctl(fd, BLKDISCARD, &span[0]) == 0:
        return 0
    return -1 if errno == EOPNOTSUPP or errno == ENOTTY else 0


# ---- the ring ------------------------------------------------------------------------------

cdef int ring_make(WriteRing *ring, int fd) noexcept nogil:
    """-1 without memory."""
    cdef uint32_t i
    memset(ring, 0, sizeof(WriteRing))
    ring.fd = fd
    for i in range(WRITES):
        ring.write[i].buffer = <uint8_t *>mmap(
            NULL, WRITE_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0
        )
        if <void *>ring.write[i].buffer == MAP_FAILED:
            ring.write[i].buffer = NULL
            ring_discard(ring)
            return -1
    if fcntl(fd, F_GETFL) & O_DIRECT and syscall(SYS_io_setup, WRITES, &ring.context) != 0:
        ring.context = 0
    return 0


cdef void ring_discard(WriteRing *ring) noexcept nogil:
    cdef uint32_t i
    if ring.context:
        syscall(SYS_io_destroy, ring.context)
        ring.context = 0
    for i in range(WRITES):
        if ring.write[i].buffer != NULL:
            munmap(ring.write[i].buffer, WRITE_BYTES)
            ring.write[i].buffer = NULL


cdef Write *ring_idle(WriteRing *ring) noexcept nogil:
    """A buffer to fill, NULL when there is none: those that are done have to be looked at first."""
    cdef uint32_t i
    for i in range(WRITES):
        if ring.write[i].state == WRITE_IDLE:
            return &ring.write[i]
    return NULL


cdef void finish(WriteRing *ring, Write *w, int64_t result) noexcept nogil:
    """What the kernel did of it; the rest of a short one is written here."""
    if result < 0:
        w.error = <int>-result
    elif <uint64_t>result == w.length_bytes:
        w.error = 0
    elif result % BLOCK_BYTES:
        w.error = EIO
    else:
        w.error = write_all(ring.fd, w.buffer + result, w.length_bytes - <uint64_t>result, w.offset + <uint64_t>result)
    w.state = WRITE_DONE


cdef void ring_send(WriteRing *ring, Write *w) noexcept nogil:
    """Have length_bytes of its buffer written at its offset."""
    cdef iocb *control = &w.control
    w.state = WRITE_FLYING
    if ring.context:
        memset(control, 0, sizeof(iocb))
        control.aio_data = <uint64_t>w
        control.aio_lio_opcode = IOCB_CMD_PWRITE
        control.aio_fildes = <uint32_t>ring.fd
        control.aio_buf = <uint64_t>w.buffer
        control.aio_nbytes = w.length_bytes
        control.aio_offset = <int64_t>w.offset
        if syscall(SYS_io_submit, ring.context, 1, &control) == 1:
            return
    finish(ring, w, 0)          # not taken: written here, or its error found here


cdef uint32_t flying(const WriteRing *ring) noexcept nogil:
    cdef uint32_t i
    cdef uint32_t n = 0
    for i in range(WRITES):
        n += ring.write[i].state == WRITE_FLYING
    return n


cdef void ring_wait(WriteRing *ring) noexcept nogil:
    """Return when one more is done, at once when none is under way."""
    cdef io_event events[WRITES]
    cdef timespec nap
    cdef long n, i
    if flying(ring) == 0:
        return
    while True:
        n = syscall(SYS_io_getevents, ring.context, 1, WRITES, events, NULL)
        if n > 0:
            break
        nap.tv_sec, nap.tv_nsec = 0, 1000000
        if n == 0 or errno != EINTR:        # never seen: but buffers must not be touched meanwhile
            nanosleep(&nap, NULL)
    for i in range(n):
        finish(ring, <Write *>events[i].data, events[i].res)
