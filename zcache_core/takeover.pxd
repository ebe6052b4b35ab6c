"""C face of the takeover."""

cdef void *takeover(void *core) noexcept nogil    # a thread's body; Core * as void *
