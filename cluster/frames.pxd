"""C face of the frames that two nodes exchange most: gets, puts and their answers."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

cdef enum:
    FRAME_MORE = 0              # so far it is one of them; the rest is missing
    FRAME_ODD = -1              # not one of them: for the session
    ASKED_GET = 1
    ASKED_PUT = 2
    RECORD_BYTES = 16
    RECORDS_MOST = 128          # peerwire.BATCH_PAGES
    SEALED_LEAST = 25           # seal and one byte
    PAYLOAD_MOST = RECORDS_MOST * (4096 + 24)
    FRAME_MOST = RECORDS_MOST * (4096 + 24 + RECORD_BYTES) + 1024     # peerwire.PEER_LIMITS
    HEAD_MOST = 256             # of an answer: all but a get's payload

ctypedef struct Asked:          # a request; pointers into the frame
    int what                    # ASKED_
    uint32_t msgid
    uint32_t n
    const uint8_t *records
    const uint8_t *payload
    uint64_t payload_bytes

ctypedef struct Answer:         # a get's; a put's has no payload
    uint32_t msgid
    uint64_t offer[3]
    uint32_t n
    const uint8_t *codes
    const uint8_t *payload
    uint64_t payload_bytes

cdef int64_t read_asked(const uint8_t *bytes, uint64_t have, Asked *asked) noexcept nogil
cdef int64_t read_answer(const uint8_t *bytes, uint64_t have, Answer *answer) noexcept nogil
cdef int64_t read_put_answer(const uint8_t *bytes, uint64_t have, Answer *answer) noexcept nogil
cdef int begins_answer(const uint8_t *bytes, uint64_t have, uint32_t *msgid) noexcept nogil
cdef uint32_t write_get(uint8_t *to, uint32_t msgid, uint32_t n) noexcept nogil
cdef uint32_t write_put(
    uint8_t *to, uint32_t msgid, const uint8_t *records, uint32_t n, uint64_t payload_bytes
) noexcept nogil
cdef uint32_t write_answer(
    uint8_t *to, uint32_t msgid, const uint64_t *offer, const uint8_t *codes, uint32_t n, int what,
    uint64_t payload_bytes
) noexcept nogil
cdef uint64_t sealed_in_all(const uint8_t *records, uint32_t n) noexcept nogil
