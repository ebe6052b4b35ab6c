"""C face of input and output on the disk: reads, and a ring of writes under way."""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t

cdef extern from "<linux/aio_abi.h>" nogil:
    struct iocb:
        uint64_t aio_data
        uint16_t aio_lio_opcode
        uint32_t aio_fildes
        uint64_t aio_buf
        uint64_t aio_nbytes
        int64_t aio_offset

cdef enum:
    BLOCK_BYTES = 4096          # of O_DIRECT: what every disk takes
    WRITES = 2                  # under way at a time
    WRITE_BYTES = 1 << 20       # most in one of them

cdef enum WriteState:
    WRITE_IDLE = 0
    WRITE_FLYING = 1
    WRITE_DONE = 2

ctypedef struct Write:
    uint8_t *buffer             # WRITE_BYTES, aligned
    uint64_t offset
    uint32_t length_bytes
    uint32_t first, end         # for its owner: pages of the batch that it carries
    uint32_t state
    int error                   # when it is done: 0 or an errno
    iocb control

ctypedef struct WriteRing:
    int fd
    unsigned long context       # of the kernel's asynchronous I/O; 0: none to be had
    Write write[WRITES]

cdef int ring_make(WriteRing *ring, int fd) noexcept nogil
cdef void ring_discard(WriteRing *ring) noexcept nogil
cdef Write *ring_idle(WriteRing *ring) noexcept nogil
cdef void ring_send(WriteRing *ring, Write *w) noexcept nogil
cdef void ring_wait(WriteRing *ring) noexcept nogil
cdef uint64_t medium_bytes(int fd) noexcept nogil
cdef int medium_error(int fd, uint64_t bytes) noexcept nogil
cdef int medium_mend(int fd, uint64_t bytes, bint allocate) noexcept nogil
cdef int punch(int fd, uint64_t offset, uint64_t length) noexcept nogil
cdef int read_all(int fd, uint8_t *data, uint64_t length, uint64_t offset) noexcept nogil
