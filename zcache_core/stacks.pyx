"""Stacks of threads to come, had beforehand.

    keep(n)    n threads begin at once, each touches its stack, and they end; the C library
               keeps their stacks, and the next n threads of this process get those

A new stack's pages are first written by the new thread, which then holds the lock of the process's
mappings and, when the machine has no memory, waits inside the kernel.  Who takes a killed
server's place must not wait for anything: its stacks are there before, and locked (a kept stack
keeps its pages only then; the C library gives back others).

Bound: what glibc keeps, 40 MiB.  What it is not: a pool of threads.
"""

from libc.stdint cimport uint32_t

from zcache_core.pthread cimport (
    lock_init, lock_take, pthread_join, pthread_mutex_t, pthread_mutex_unlock, pthread_t, thread_start_alike,
)

cdef enum:
    MOST = 32


cdef void *come_and_go(void *gate) noexcept nogil:
    lock_take(<pthread_mutex_t *>gate)
    pthread_mutex_unlock(<pthread_mutex_t *>gate)
    return NULL


def keep(uint32_t threads):
    """Have so many stacks; how many there are."""
    cdef pthread_t begun[MOST]
    cdef pthread_mutex_t gate
    cdef uint32_t n = 0
    cdef uint32_t i
    lock_init(&gate)
    with nogil:
        lock_take(&gate)            # nobody ends, and gives its stack to the next, before all have begun
        while n < min(threads, <uint32_t>MOST) and thread_start_alike(&begun[n], come_and_go, &gate, b"zc-stack") == 0:
            n += 1
        pthread_mutex_unlock(&gate)
        for i in range(n):
            pthread_join(begun[i], NULL)
    return n
