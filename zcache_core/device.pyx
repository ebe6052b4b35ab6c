"""The device: byte ranges of a block device as pages of the store.

The one place of the core that crosses the GIL (with callbacks.h).  What it hands
out are compiled functions with the very signatures that nbdkit's Python plugins
have; they are assigned as the callbacks, and no bytecode runs for a request:

    nbdkit thread -> GIL -> pread (callbacks.h) -> the buffer's pointer
        -> (GIL released when the request is long enough to pay)
        -> request_read: slot -> pages -> slot back

A range that starts or ends inside a page is a read-modify-write of that page,
under the page's lock, and onto exactly the entry that was read: a full write of
the page that comes in between makes it start again.

Several devices may share one index, pool and store: each is a stretch of it.  What a
connection sees is its handle: a stretch, and the generation that it was opened with.
Opening a newer generation of a device fences the older ones:

    generation in the memory file := N     requests that come now and are older fail
    slots_quiesce                          those that are inside have ended, or are
                                           parked and will look again before they change
                                           anything (slot_is_fenced)

so a write that a dead connection's worker still holds, and that the kernel has sent
again meanwhile, is never applied late.  It costs a request one load of a shared word.

What it does not know: sockets, nbdkit (errors go to a callable that it is given).
"""

from libc.errno cimport EINVAL, ENOSPC
from libc.stdint cimport uint8_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

from zcache_core.core cimport PAGE_LOCKS, RAN_OUT, WOULD_BLOCK, Core
from zcache_core.counter_ids cimport (
    C_FAILED_REQUESTS, C_FENCED_REQUESTS, C_FLUSH_REQUESTS, C_PARTIAL_WRITES, C_READ_REQUESTS, C_TRIM_REQUESTS,
    C_WRITE_REQUESTS, C_ZERO_REQUESTS,
)
from zcache_core.crew cimport crew_close, crew_collect, crew_offer
from zcache_core.index cimport entry_load, versions_take
from zcache_core.layout cimport (
    MAX_DEVICES, PAGE_BYTES, PAGE_SHIFT, ST_EMPTY, ST_SAME, DeviceRow, Entry, entry_is_sound, state_of,
)
from zcache_core.native cimport zc_cas64, zc_load32, zc_load64
from zcache_core.pthread cimport lock_take, pthread_mutex_unlock
from zcache_core.slots cimport (
    Slot, count, slot_is_fenced, slot_park, slot_release, slot_take, slot_unpark, slots_quiesce,
)
from zcache_core.store cimport Store
from zcache_core.ramtier cimport (
    store_expect, store_get, store_invalidate, store_put, store_replace, store_wait_ready,
)

from zcache_core.errors import InUseError

cdef extern from "callbacks.h":
    ctypedef int (*zc_request)(void *core, const void *handle, void *data, uint64_t length, uint64_t offset, uint32_t flags) noexcept nogil
    enum: ZC_PREAD, ZC_PWRITE, ZC_TRIM, ZC_ZERO, ZC_CACHE, ZC_FLUSH, ZC_REQUESTS, ZC_HOLDS_GIL, ZC_AGAIN
    object zc_new_handle(const void *handle, size_t bytes)
    const void *zc_handle_at(object handle)
    object zc_new_device(void *core, object whole, const zc_request *run, const uint64_t *release_bytes, object set_error, object owner)
    object zc_callback(object capsule, int what)

cdef extern from "<errno.h>":
    enum: ESHUTDOWN

# What a connection sees of the index.
ctypedef struct Handle:
    uint64_t first_byte
    uint64_t size_bytes
    const uint64_t *fence       # the device's newest generation, in the memory file
    uint64_t generation         # this connection's; 0: fenced by nobody

cdef enum:
    # Requests shorter than this keep the GIL: a 4 KiB read takes 2 us, handing the
    # GIL over and back to a waiting thread takes longer.
    RELEASE_READ_BYTES = 8192
    # Every write: it may have to wait for room, and part of a page for its fetch from below.
    RELEASE_WRITE_BYTES = 1
    FLAG_MAY_TRIM = 1           # nbdkit's values
    EXTENT_HOLE = 1
    EXTENT_ZERO = 2
    # Most extents in one answer: the client asks on; a page-by-page map of a large
    # device would be built in memory that a swap server must not need.
    MOST_EXTENTS = 4096


# ---- requests, without the GIL ----------------------------------------------------------

cdef int change_part(
    Core *core, Slot *slot, uint64_t page, uint32_t start, uint32_t n, const uint8_t *data
) noexcept nogil:
    """Replace n bytes of a page from `start` on (zeros when data is NULL); 0 or an errno."""
    cdef Entry seen
    cdef int error
    cdef uint32_t stripe = page % PAGE_LOCKS
    count(slot, C_PARTIAL_WRITES, 1)
    slot_park(slot)             # who has the lock may wait for a disk, or for the committer
    lock_take(&core.page_lock[stripe])
    slot_unpark(slot)
    while True:
        error = store_get(core, slot, page, slot.page, &seen, True)
        if error == 0 and slot_is_fenced(slot):     # meanwhile, while it was read from below
            error = ESHUTDOWN
        if error:
            break
        if data != NULL:
            memcpy(slot.page + start, data, n)
        else:
            memset(slot.page + start, 0, n)
        error = store_replace(core, slot, page, slot.page, versions_take(&core.index, 1), &seen)
        if error != RAN_OUT:
            break
    pthread_mutex_unlock(&core.page_lock[stripe])
    return error


cdef int read_range(
    Core *core, Slot *slot, uint64_t offset, uint64_t length, uint8_t *out, bint may_block
) noexcept nogil:
    cdef uint32_t start = offset & (PAGE_BYTES - 1)
    cdef uint64_t page = offset >> PAGE_SHIFT
    cdef uint64_t n
    cdef int error
    while length:
        if start + length > PAGE_BYTES:
            store_expect(core, page + 1)
        if start == 0 and length >= PAGE_BYTES:
            n = PAGE_BYTES
            error = store_get(core, slot, page, out, NULL, may_block)
        else:
            n = min(length, <uint64_t>(PAGE_BYTES - start))
            error = store_get(core, slot, page, slot.page, NULL, may_block)
            if error == 0:
                memcpy(out, slot.page + start, n)
        if error:
            return error
        out += n
        length -= n
        page += 1
        start = 0
    return 0


cdef int write_range(
    Core *core, Slot *slot, uint64_t offset, uint64_t length, const uint8_t *data
) noexcept nogil:
    """Write; `data` NULL writes zeros that are not holes."""
    cdef uint32_t start = offset & (PAGE_BYTES - 1)
    cdef uint64_t page = offset >> PAGE_SHIFT
    cdef uint64_t n
    cdef uint64_t version = versions_take(&core.index, (length >> PAGE_SHIFT) + 1)
    cdef uint32_t shared = 0        # pages of the stretch that the crew shares
    cdef uint32_t at = 0
    cdef int error = 0
    if data == NULL:
        memset(slot.page, 0, PAGE_BYTES)
    while length:
        if start == 0 and length >= PAGE_BYTES:
            n = PAGE_BYTES
            if at == shared and data != NULL:
                if shared:
                    crew_close(&core.crew)
                shared = crew_offer(&core.crew, data, length >> PAGE_SHIFT)
                at = 0
            if at < shared:
                crew_collect(&core.crew, slot, at)
                at += 1
            error = store_put(core, slot, page, data if data != NULL else slot.page, version)
            version += 1
        else:
            n = min(length, <uint64_t>(PAGE_BYTES - start))
            error = change_part(core, slot, page, start, <uint32_t>n, data)
            if data == NULL:
                memset(slot.page, 0, PAGE_BYTES)
        if error:
            break
        if data != NULL:
            data += n
        length -= n
        page += 1
        start = 0
    if shared:
        crew_close(&core.crew)
    return error


cdef void drop_pages(Core *core, Slot *slot, uint64_t first, uint64_t end) noexcept nogil:
    cdef uint64_t page
    cdef uint64_t version = versions_take(&core.index, 1)
    for page in range(first, end):
        store_invalidate(core, slot, page, version)


cdef int zero_range(Core *core, Slot *slot, uint64_t offset, uint64_t length, bint may_trim) noexcept nogil:
    """Zeros: holes where whole pages may be trimmed, else same-filled pages."""
    cdef uint64_t first = (offset + PAGE_BYTES - 1) >> PAGE_SHIFT
    cdef uint64_t end = (offset + length) >> PAGE_SHIFT
    cdef int error
    if not may_trim or first >= end:
        return write_range(core, slot, offset, length, NULL)
    if offset & (PAGE_BYTES - 1):
        error = write_range(core, slot, offset, (first << PAGE_SHIFT) - offset, NULL)
        if error:
            return error
    drop_pages(core, slot, first, end)
    if (offset + length) & (PAGE_BYTES - 1):
        return write_range(core, slot, end << PAGE_SHIFT, offset + length - (end << PAGE_SHIFT), NULL)
    return 0


cdef uint32_t extent_type(Core *core, uint64_t page) noexcept nogil:
    cdef Entry e = entry_load(&core.index, page)
    if state_of(e.version) == ST_EMPTY and entry_is_sound(e.location, e.version):
        return EXTENT_HOLE | EXTENT_ZERO
    if state_of(e.version) == ST_SAME and e.location == 0 and entry_is_sound(e.location, e.version):
        return EXTENT_ZERO
    return 0


# ---- requests, as callbacks.h calls them ---------------------------------------------------

cdef inline bint inside(const Handle *h, uint64_t offset, uint64_t length) noexcept nogil:
    return offset <= h.size_bytes and length <= h.size_bytes - offset


cdef inline Slot *enter(Core *core, const Handle *h) noexcept nogil:
    """A slot for a request of this connection; NULL when it is fenced."""
    cdef Slot *slot = slot_take(&core.slots)
    slot.fence = h.fence
    slot.generation = h.generation
    if slot_is_fenced(slot):
        count(slot, C_FENCED_REQUESTS, 1)
        count(slot, C_FAILED_REQUESTS, 1)
        slot_release(slot)
        return NULL
    return slot


cdef inline int leave(Slot *slot, uint32_t cell, int error) noexcept nogil:
    count(slot, cell, 1)
    if error:
        count(slot, C_FAILED_REQUESTS, 1)
        if slot_is_fenced(slot):
            count(slot, C_FENCED_REQUESTS, 1)
    slot_release(slot)
    return error


cdef inline bint serving(Core *core) noexcept nogil:
    return zc_load32(&core.serving) != 0


cdef int request_read(
    void *core_argument, const void *handle, void *data, uint64_t length, uint64_t offset, uint32_t flags
) noexcept nogil:
    cdef Core *core = <Core *>core_argument
    cdef const Handle *h = <const Handle *>handle
    cdef Slot *slot = enter(core, h) if serving(core) else NULL
    cdef int error = EINVAL
    if slot == NULL:
        return ESHUTDOWN
    if inside(h, offset, length):
        error = read_range(core, slot, h.first_byte + offset, length, <uint8_t *>data, not flags & ZC_HOLDS_GIL)
        if error == WOULD_BLOCK:
            slot_release(slot)
            return ZC_AGAIN
    return leave(slot, C_READ_REQUESTS, error)


cdef Slot *enter_to_change(Core *core, const Handle *h) noexcept nogil:
    """As `enter`, but when a takeover is over; also NULL when the store is stopped."""
    if not serving(core):
        return NULL
    store_wait_ready(core)
    return enter(core, h)


cdef int request_write(
    void *core_argument, const void *handle, void *data, uint64_t length, uint64_t offset, uint32_t flags
) noexcept nogil:
    cdef Core *core = <Core *>core_argument
    cdef const Handle *h = <const Handle *>handle
    cdef Slot *slot = enter_to_change(core, h)
    cdef int error = ENOSPC
    if slot == NULL:
        return ESHUTDOWN
    if inside(h, offset, length):
        error = write_range(core, slot, h.first_byte + offset, length, <const uint8_t *>data)
    return leave(slot, C_WRITE_REQUESTS, error)


cdef int request_trim(
    void *core_argument, const void *handle, void *data, uint64_t length, uint64_t offset, uint32_t flags
) noexcept nogil:
    cdef Core *core = <Core *>core_argument
    cdef const Handle *h = <const Handle *>handle
    cdef Slot *slot = enter_to_change(core, h)
    cdef int error = EINVAL
    if slot == NULL:
        return ESHUTDOWN
    if inside(h, offset, length):
        offset += h.first_byte
        drop_pages(core, slot, (offset + PAGE_BYTES - 1) >> PAGE_SHIFT, (offset + length) >> PAGE_SHIFT)
        error = 0
    return leave(slot, C_TRIM_REQUESTS, error)


cdef int request_zero(
    void *core_argument, const void *handle, void *data, uint64_t length, uint64_t offset, uint32_t flags
) noexcept nogil:
    cdef Core *core = <Core *>core_argument
    cdef const Handle *h = <const Handle *>handle
    cdef Slot *slot = enter_to_change(core, h)
    cdef int error = ENOSPC
    if slot == NULL:
        return ESHUTDOWN
    if inside(h, offset, length):
        error = zero_range(core, slot, h.first_byte + offset, length, flags & FLAG_MAY_TRIM)
    return leave(slot, C_ZERO_REQUESTS, error)


cdef int request_cache(
    void *core, const void *handle, void *data, uint64_t length, uint64_t offset, uint32_t flags
) noexcept nogil:
    """Nothing to do while every page is in RAM; the range is checked."""
    return 0 if inside(<const Handle *>handle, offset, length) else EINVAL


cdef int request_flush(
    void *core_argument, const void *handle, void *data, uint64_t length, uint64_t offset, uint32_t flags
) noexcept nogil:
    """Nothing to do: an acknowledged write is where it will stay."""
    cdef Core *core = <Core *>core_argument
    cdef Slot *slot = enter(core, <const Handle *>handle) if serving(core) else NULL
    if slot == NULL:
        return ESHUTDOWN
    return leave(slot, C_FLUSH_REQUESTS, 0)


# ---- Python's view -----------------------------------------------------------------------------

cdef class Device:
    """The block devices over one started store.

    `pread(h, buf, offset, flags)`, `pwrite`, `trim(h, length, offset, flags)`, `zero`,
    `cache` and `flush(h, flags)` are compiled functions, to be assigned as nbdkit's
    callbacks as they are.  `set_error` (nbdkit.set_error) is called with the errno
    before OSError is raised.  The handle `h` comes from `open`; any other object means
    the whole index, fenced by nobody.
    """

    cdef Core *core
    cdef Store store
    cdef readonly uint64_t size_bytes
    cdef readonly object pread, pwrite, trim, zero, cache, flush
    cdef object whole

    def __cinit__(self, Store store not None, set_error=None):
        cdef zc_request[6] run
        cdef uint64_t[6] release_bytes
        cdef Handle whole
        self.store = store
        self.core = &store.core
        self.size_bytes = store.core.index.pages << PAGE_SHIFT
        run[<int>ZC_PREAD] = request_read
        run[<int>ZC_PWRITE] = request_write
        run[<int>ZC_TRIM] = request_trim
        run[<int>ZC_ZERO] = request_zero
        run[<int>ZC_CACHE] = request_cache
        run[<int>ZC_FLUSH] = request_flush
        for what in range(6):
            release_bytes[what] = 0
        release_bytes[<int>ZC_PREAD] = RELEASE_READ_BYTES
        release_bytes[<int>ZC_PWRITE] = RELEASE_WRITE_BYTES
        release_bytes[<int>ZC_CACHE] = release_bytes[<int>ZC_FLUSH] = <uint64_t>-1
        whole.first_byte, whole.size_bytes = 0, self.size_bytes
        whole.fence, whole.generation = NULL, 0
        self.whole = zc_new_handle(&whole, sizeof(Handle))
        capsule = zc_new_device(self.core, self.whole, run, release_bytes, set_error, store)
        self.pread = zc_callback(capsule, ZC_PREAD)
        self.pwrite = zc_callback(capsule, ZC_PWRITE)
        self.trim = zc_callback(capsule, ZC_TRIM)
        self.zero = zc_callback(capsule, ZC_ZERO)
        self.cache = zc_callback(capsule, ZC_CACHE)
        self.flush = zc_callback(capsule, ZC_FLUSH)

    def open(self, uint32_t row, uint64_t generation=0):
        """A connection's handle for the device in that row of the memory file's table.

        `generation` 0 is fenced by nobody and fences nobody.  Another one returns when no
        request of an older one can change anything any more.  Raises InUseError when a
        newer one was there, IndexError without such a device.
        """
        cdef Handle h
        cdef DeviceRow *device = &self.store.memory.super.devices[min(row, <uint32_t>(MAX_DEVICES - 1))]
        if row >= MAX_DEVICES or device.pages == 0:
            raise IndexError(f"there is no device {row}")
        h.first_byte = (device.index_offset - self.store.memory.super.index_offset) // sizeof(Entry) << PAGE_SHIFT
        h.size_bytes = device.pages << PAGE_SHIFT
        h.fence, h.generation = &device.generation, generation
        if generation:
            newest = self.fence(&device.generation, generation)
            if newest > generation:
                raise InUseError(
                    f"generation {generation} is over: {newest} has the device; attach it anew"
                )
        return zc_new_handle(&h, sizeof(Handle))

    cdef uint64_t fence(self, uint64_t *newest, uint64_t generation):
        """Make it the newest, and wait for what is older; the newest there is."""
        cdef uint64_t now
        with nogil:
            while True:
                now = zc_load64(newest)
                if now >= generation or zc_cas64(newest, now, generation):
                    break
            # Also when it was the newest already: who made it so may still be waiting.
            slots_quiesce(&self.core.slots)
            now = zc_load64(newest)
        return now

    def size_of(self, h):
        """Bytes of the device that the handle opened."""
        cdef const Handle *handle = <const Handle *>zc_handle_at(h)
        return self.size_bytes if handle == NULL else handle.size_bytes

    def extents(self, h, uint64_t length, uint64_t offset, flags=0):
        """[(offset, length, type)] in bytes: hole and zero, zero, or data (0)."""
        cdef const Handle *handle = <const Handle *>zc_handle_at(self.whole if zc_handle_at(h) == NULL else h)
        cdef uint64_t base = handle.first_byte >> PAGE_SHIFT
        cdef uint64_t page = base + (offset >> PAGE_SHIFT)
        cdef uint64_t end = base + ((offset + length + PAGE_BYTES - 1) >> PAGE_SHIFT)
        cdef uint64_t first
        cdef uint32_t kind
        if not inside(handle, offset, length):
            raise OSError(EINVAL, "the range is past the end of the device")
        found = []
        while page < end and len(found) < MOST_EXTENTS:
            first = page
            kind = extent_type(self.core, page)
            with nogil:
                while page < end and extent_type(self.core, page) == kind:
                    page += 1
            if page == first:       # it changed between the two looks
                continue
            found.append((first - base << PAGE_SHIFT, (page - first) << PAGE_SHIFT, kind))
        return found
