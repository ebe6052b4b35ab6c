"""C face of a connection that has a compiled thread of its own, and of what it sends."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

from cluster.tls cimport Tls
from zcache_core.pthread cimport pthread_cond_t, pthread_mutex_t, pthread_t

cdef enum:
    LANE_MORE = 0               # what a handler says: the rest of the frame is missing
    LANE_ODD = -1               # not for us: the session has it
    LANE_OVER = -2              # the connection is of no use any more

ctypedef struct Piece:
    const uint8_t *at
    uint64_t bytes

ctypedef struct Lane:
    int fd
    int wake_fd                 # an eventfd: there is something for Python
    void *about                 # the handler's own
    int64_t (*handle)(Lane *lane, const uint8_t *bytes, uint64_t have) noexcept nogil
    void (*ended)(Lane *lane) noexcept nogil    # by the thread, when nothing comes any more; or NULL
    pthread_t thread
    uint8_t *room               # what came: `begin` to `end` is not done with.  The thread's alone,
    uint64_t begin              # but while it is handed over
    uint64_t end
    bint passing                # inside of a frame that is the session's: so is all that comes
    uint32_t closing            # atomic: stop as soon as you can
    # atomics, monotonic clock; 0: nothing of the kind
    int64_t heard_us            # the last whole frame that was ours
    int64_t partial_us          # since when a frame of ours is half there
    int64_t stuck_us            # since when the peer does not read
    pthread_mutex_t lock        # guards the rest; a leaf
    pthread_cond_t turned
    bint handed                 # it is Python's turn
    bint again                  # and will be once more, when what it wrote is sent
    bint sending                # somebody sends, without the lock
    bint over                   # the thread reads no more
    int why                     # and its errno; 0: the peer has closed
    uint8_t *out                # bytes that could not be sent yet
    uint64_t out_bytes
    uint64_t out_room
    Tls tls                     # ssl NULL: plain.  Its wire belongs to who sends

cdef uint64_t unsent(const Lane *lane) noexcept nogil
cdef bint send_wire(Lane *lane) noexcept nogil
cdef int64_t send_now(Lane *lane, const uint8_t *bytes, uint64_t n) noexcept nogil
cdef bint flush_kept(Lane *lane) noexcept nogil
cdef bint lane_send(Lane *lane, Piece *pieces, uint32_t n) noexcept nogil
cdef bint lane_send_pieces(Lane *lane, const Piece *pieces, uint32_t n) noexcept nogil
cdef bint lane_send_or_keep(Lane *lane, const uint8_t *bytes, uint64_t n) noexcept nogil
