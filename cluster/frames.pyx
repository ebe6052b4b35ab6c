"""Gets, puts and their answers as bytes, for compiled code: the shapes that our own side sends.

    94 00 msgid a3 "get" 91 records               [0, msgid, "get", [records]]
    94 00 msgid a3 "put" 92 records payload       [0, msgid, "put", [records, payload]]
    94 01 msgid c0 93 93 room held health codes payload     a get's answer
    94 01 msgid c0 92 93 room held health codes             a put's

Numbers and byte strings stand in the shortest form that MessagePack has for them, as msgpack
writes them.  Strictly so: what is in any other form, or breaks one of peerwire's rules, is
FRAME_ODD and goes as it came to the session, so that every rule, limit and sentence of
an error stays where it is (wire, session, peerwire).  What is accepted here is what
they accept, and means the same: tests/t2_frames.py holds the two side by side.

Bound: nothing is allocated and nothing is read beyond `have`.  A frame that is accepted has at most
FRAME_MOST bytes; where one that is not would have more, the answer is FRAME_ODD before they came.
What it is not: sockets (`lane`), or what a request means (`donorlane`).
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy

cdef enum:
    NIL = 0xC0
    BIN8 = 0xC4
    BIN16 = 0xC5
    BIN32 = 0xC6
    UINT8 = 0xCC
    UINT64 = 0xCF
    HEALTH_MOST = 2

ctypedef struct Cursor:
    const uint8_t *at
    uint64_t left
    int verdict                 # 1 so far, FRAME_MORE, FRAME_ODD


# ---- reading -------------------------------------------------------------------------

cdef inline void literal(Cursor *c, const uint8_t *wanted, uint32_t n) noexcept nogil:
    """These bytes, or as many of them as are there."""
    cdef uint32_t i
    if c.verdict != 1:
        return
    for i in range(n):
        if i >= c.left:
            c.verdict = FRAME_MORE
            return
        if c.at[i] != wanted[i]:
            c.verdict = FRAME_ODD
            return
    c.at += n
    c.left -= n


cdef inline uint64_t big_endian(Cursor *c, uint32_t n) noexcept nogil:
    """The number in the next n bytes, past which the cursor moves."""
    cdef uint64_t value = 0
    cdef uint32_t i
    if c.left < n:
        c.verdict = FRAME_MORE
        return 0
    for i in range(n):
        value = value << 8 | c.at[i]
    c.at += n
    c.left -= n
    return value


cdef inline uint64_t number(Cursor *c, uint32_t bytes_most) noexcept nogil:
    """An unsigned number of up to so many bytes, in the shortest form."""
    cdef uint32_t size
    cdef uint64_t value
    cdef uint8_t kind
    if c.verdict != 1:
        return 0
    if c.left == 0:
        c.verdict = FRAME_MORE
        return 0
    kind = c.at[0]
    c.at += 1
    c.left -= 1
    if kind < 0x80:
        return kind
    size = 1 << (kind - UINT8) if UINT8 <= kind <= UINT64 else 16
    if size > bytes_most:
        c.verdict = FRAME_ODD
        return 0
    value = big_endian(c, size)
    if c.verdict == 1 and (value < 0x80 if size == 1 else value >> (4 * size) == 0):
        c.verdict = FRAME_ODD
    return value


cdef inline uint64_t binary(Cursor *c, uint64_t least, uint64_t most) noexcept nogil:
    """How long a byte string is, in the shortest form; the cursor stands at its first byte."""
    cdef uint32_t size
    cdef uint64_t value
    if c.verdict != 1:
        return 0
    if c.left == 0:
        c.verdict = FRAME_MORE
        return 0
    if not BIN8 <= c.at[0] <= BIN32:
        c.verdict = FRAME_ODD
        return 0
    size = 1 << (c.at[0] - BIN8)
    c.at += 1
    c.left -= 1
    value = big_endian(c, size)
    if c.verdict == 1 and (not least <= value <= most or (size > 1 and value >> (4 * size) == 0)):
        c.verdict = FRAME_ODD
    return value


cdef inline const uint8_t *stretch(Cursor *c, uint64_t n) noexcept nogil:
    """The next n bytes."""
    cdef const uint8_t *begin = c.at
    if c.verdict != 1:
        return begin
    if c.left < n:
        c.verdict = FRAME_MORE
        return begin
    c.at += n
    c.left -= n
    return begin


cdef uint64_t sealed_in_all(const uint8_t *records, uint32_t n) noexcept nogil:
    """How many bytes of payload valid records have."""
    cdef uint64_t total = 0
    cdef uint32_t i
    for i in range(n):
        total += ((records[16 * i + 12] | <uint32_t>records[16 * i + 13] << 8) >> 4) + SEALED_LEAST
    return total


cdef inline const uint8_t *records_in(Cursor *c, uint32_t *n) noexcept nogil:
    """Records as peerwire has them: 1 to RECORDS_MOST, versions of 52 bits, last bytes 0."""
    cdef uint64_t length = binary(c, RECORD_BYTES, RECORDS_MOST * RECORD_BYTES)
    cdef const uint8_t *records
    cdef uint32_t i
    if c.verdict == 1 and length % RECORD_BYTES:
        c.verdict = FRAME_ODD
    records = stretch(c, length)
    n[0] = <uint32_t>(length // RECORD_BYTES)
    if c.verdict == 1:
        for i in range(n[0]):
            if records[16 * i + 15] or records[16 * i + 7] or records[16 * i + 6] >= 16:
                c.verdict = FRAME_ODD
                break
    return records


cdef int64_t read_asked(const uint8_t *bytes, uint64_t have, Asked *asked) noexcept nogil:
    """The length of the get or put that the bytes begin with; FRAME_MORE, FRAME_ODD."""
    cdef Cursor c = Cursor(bytes, have, 1)
    literal(&c, b"\x94\x00", 2)
    asked.msgid = <uint32_t>number(&c, 4)
    literal(&c, b"\xa3", 1)
    if c.verdict == 1 and c.left and c.at[0] == c"p":
        asked.what = ASKED_PUT
        literal(&c, b"put\x92", 4)
    else:
        asked.what = ASKED_GET
        literal(&c, b"get\x91", 4)
    asked.records = records_in(&c, &asked.n)
    asked.payload, asked.payload_bytes = NULL, 0
    if c.verdict == 1 and asked.what == ASKED_PUT:
        asked.payload_bytes = sealed_in_all(asked.records, asked.n)
        binary(&c, asked.payload_bytes, asked.payload_bytes)
        asked.payload = stretch(&c, asked.payload_bytes)
    return c.at - bytes if c.verdict == 1 else c.verdict


cdef inline void answer_in(Cursor *c, Answer *answer, const uint8_t *shape) noexcept nogil:
    """An answer up to its codes; `shape`: of its result."""
    cdef uint32_t i
    literal(c, b"\x94\x01", 2)
    answer.msgid = <uint32_t>number(c, 4)
    literal(c, shape, 3)
    for i in range(3):
        answer.offer[i] = number(c, 8)
    if c.verdict == 1 and answer.offer[2] > HEALTH_MOST:
        c.verdict = FRAME_ODD
    answer.n = <uint32_t>binary(c, 1, RECORDS_MOST)
    answer.codes = stretch(c, answer.n)
    answer.payload, answer.payload_bytes = NULL, 0


cdef int64_t read_answer(const uint8_t *bytes, uint64_t have, Answer *answer) noexcept nogil:
    """The length of the get's answer that the bytes begin with; FRAME_MORE, FRAME_ODD.

    Whether codes and payload fit what was asked, the caller must look.
    """
    cdef Cursor c = Cursor(bytes, have, 1)
    answer_in(&c, answer, b"\xc0\x93\x93")
    answer.payload_bytes = binary(&c, 0, PAYLOAD_MOST)
    answer.payload = stretch(&c, answer.payload_bytes)
    return c.at - bytes if c.verdict == 1 else c.verdict


cdef int64_t read_put_answer(const uint8_t *bytes, uint64_t have, Answer *answer) noexcept nogil:
    """The same of a put's."""
    cdef Cursor c = Cursor(bytes, have, 1)
    answer_in(&c, answer, b"\xc0\x92\x93")
    return c.at - bytes if c.verdict == 1 else c.verdict


cdef int begins_answer(const uint8_t *bytes, uint64_t have, uint32_t *msgid) noexcept nogil:
    """1 when these bytes begin a response, and to which request; FRAME_MORE, FRAME_ODD."""
    cdef Cursor c = Cursor(bytes, have, 1)
    literal(&c, b"\x94\x01", 2)
    msgid[0] = <uint32_t>number(&c, 4)
    return c.verdict


# ---- writing -------------------------------------------------------------------------

cdef inline uint8_t *put_big_endian(uint8_t *to, uint64_t value, uint32_t n) noexcept nogil:
    cdef uint32_t i
    for i in range(n):
        to[i] = <uint8_t>(value >> (8 * (n - 1 - i)))
    return to + n


cdef inline uint8_t *put_number(uint8_t *to, uint64_t value) noexcept nogil:
    cdef uint32_t power = 0
    if value < 0x80:
        to[0] = <uint8_t>value
        return to + 1
    while power < 3 and value >> (8 << power):
        power += 1
    to[0] = <uint8_t>(UINT8 + power)
    return put_big_endian(to + 1, value, 1 << power)


cdef inline uint8_t *put_binary(uint8_t *to, uint64_t length) noexcept nogil:
    cdef uint32_t power = 0
    while power < 2 and length >> (8 << power):
        power += 1
    to[0] = <uint8_t>(BIN8 + power)
    return put_big_endian(to + 1, length, 1 << power)


cdef uint32_t write_get(uint8_t *to, uint32_t msgid, uint32_t n) noexcept nogil:
    """All of a get but its n records; how many bytes (at most HEAD_MOST)."""
    cdef uint8_t *at = to
    memcpy(at, b"\x94\x00", 2)
    at = put_number(at + 2, msgid)
    memcpy(at, b"\xa3get\x91", 5)
    return <uint32_t>(put_binary(at + 5, n * RECORD_BYTES) - to)


cdef uint32_t write_put(
    uint8_t *to, uint32_t msgid, const uint8_t *records, uint32_t n, uint64_t payload_bytes
) noexcept nogil:
    """All of a put but its payload; how many bytes (at most HEAD_MOST, and the records)."""
    cdef uint8_t *at = to
    memcpy(at, b"\x94\x00", 2)
    at = put_number(at + 2, msgid)
    memcpy(at, b"\xa3put\x92", 5)
    at = put_binary(at + 5, n * RECORD_BYTES)
    memcpy(at, records, n * RECORD_BYTES)
    return <uint32_t>(put_binary(at + n * RECORD_BYTES, payload_bytes) - to)


cdef uint32_t write_answer(
    uint8_t *to, uint32_t msgid, const uint64_t *offer, const uint8_t *codes, uint32_t n, int what,
    uint64_t payload_bytes
) noexcept nogil:
    """All of an answer but a get's payload; how many bytes (at most HEAD_MOST)."""
    cdef uint8_t *at = to
    cdef uint32_t i
    memcpy(at, b"\x94\x01", 2)
    at = put_number(at + 2, msgid)
    at[0] = NIL
    at[1] = 0x93 if what == ASKED_GET else 0x92
    at[2] = 0x93
    at += 3
    for i in range(3):
        at = put_number(at, offer[i])
    at = put_binary(at, n)
    memcpy(at, codes, n)
    at += n
    if what == ASKED_GET:
        at = put_binary(at, payload_bytes)
    return <uint32_t>(at - to)


def put_of(parts):
    """(records, payload) of a put of (page, version, length_codec, sealed bytes) each.

    Raises ValueError when the bytes are not as long as length_codec says, TypeError when they are no bytes.
    """
    cdef uint64_t total = 0
    cdef uint64_t version
    cdef uint32_t page, length_codec
    cdef uint8_t *at
    cdef char *to
    for part in parts:
        total += <uint64_t>len(<bytes?>part[3])
    records = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>(RECORD_BYTES * len(parts)))
    payload = PyBytes_FromStringAndSize(NULL, <Py_ssize_t>total)
    at, to = <uint8_t *>PyBytes_AS_STRING(records), PyBytes_AS_STRING(payload)
    for page, version, length_codec, sealed in parts:
        if length_codec >> 16 or <uint64_t>len(<bytes?>sealed) != (length_codec >> 4) + SEALED_LEAST:
            raise ValueError(f"page {page} has {len(sealed)} sealed bytes, and should not")
        memcpy(at, &version, 8)
        memcpy(at + 8, &page, 4)
        memcpy(at + 12, &length_codec, 2)
        at[14] = at[15] = 0     # pages are numbered through all devices
        at += RECORD_BYTES
        memcpy(to, PyBytes_AS_STRING(sealed), len(<bytes>sealed))
        to += len(<bytes>sealed)
    return records, payload


def keys_of(bytes records not None):
    """The (page, version) of valid records, as a set."""
    cdef const uint8_t *at = <const uint8_t *>PyBytes_AS_STRING(records)
    cdef uint64_t version
    cdef uint32_t page
    cdef Py_ssize_t i
    keys = set()
    for i in range(len(records) // RECORD_BYTES):
        memcpy(&version, at + RECORD_BYTES * i, 8)
        memcpy(&page, at + RECORD_BYTES * i + 8, 4)
        keys.add((page, version))
    return keys


# ---- as Python sees them, for tests ------------------------------------------------------

def asked(bytes data not None):
    """(length, msgid, method, records, payload) of the request that `data` begins with; or FRAME_*."""
    cdef Asked found
    cdef int64_t length = read_asked(data, len(data), &found)
    if length <= 0:
        return length
    return (
        length, found.msgid, "put" if found.what == ASKED_PUT else "get",
        (<const char *>found.records)[: found.n * RECORD_BYTES],
        (<const char *>found.payload)[: found.payload_bytes] if found.what == ASKED_PUT else None,
    )


def answer(bytes data not None):
    """(length, msgid, offer, codes, payload) of the get's answer that `data` begins with; or FRAME_*."""
    cdef Answer found
    cdef int64_t length = read_answer(data, len(data), &found)
    if length <= 0:
        return length
    return (
        length, found.msgid, (found.offer[0], found.offer[1], found.offer[2]),
        (<const char *>found.codes)[: found.n], (<const char *>found.payload)[: found.payload_bytes],
    )


def put_answer(bytes data not None):
    """(length, msgid, offer, codes) of the put's answer that `data` begins with; or FRAME_*."""
    cdef Answer found
    cdef int64_t length = read_put_answer(data, len(data), &found)
    if length <= 0:
        return length
    return (
        length, found.msgid, (found.offer[0], found.offer[1], found.offer[2]),
        (<const char *>found.codes)[: found.n],
    )


def put_bytes(uint32_t msgid, bytes records not None, bytes payload not None):
    """A put."""
    cdef uint8_t head[HEAD_MOST + RECORDS_MOST * RECORD_BYTES]
    cdef uint32_t n = <uint32_t>(len(records) // RECORD_BYTES)
    assert n <= RECORDS_MOST
    n = write_put(head, msgid, <const uint8_t *><const char *>records, n, len(payload))
    return (<char *>head)[:n] + payload


def get_bytes(uint32_t msgid, bytes records not None):
    """A get."""
    cdef uint8_t head[HEAD_MOST]
    cdef uint32_t n = write_get(head, msgid, <uint32_t>(len(records) // RECORD_BYTES))
    return (<char *>head)[:n] + records


def answer_bytes(uint32_t msgid, offer, bytes codes not None, payload=None):
    """An answer: a get's with a payload, a put's without."""
    cdef uint8_t head[HEAD_MOST]
    cdef uint64_t numbers[3]
    cdef uint32_t n
    numbers[0], numbers[1], numbers[2] = offer
    n = write_answer(
        head, msgid, numbers, <const uint8_t *><const char *>codes, <uint32_t>len(codes),
        ASKED_PUT if payload is None else ASKED_GET, len(payload or b""),
    )
    return (<char *>head)[:n] + (payload or b"")
