"""The few pthread calls that the core's own threads and locks need.

Mutexes are made with priority inheritance: serving threads may run under
SCHED_FIFO, and a background thread that holds a lock they want must then run.
"""

from libc.stdint cimport int64_t
from posix.time cimport timespec


cdef extern from "<sched.h>" nogil:
    enum: SCHED_OTHER
    struct sched_param:
        int sched_priority

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_t:
        pass
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_mutexattr_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    ctypedef struct pthread_condattr_t:
        pass
    ctypedef struct pthread_attr_t:
        pass
    enum: PTHREAD_PRIO_INHERIT
    int pthread_attr_init(pthread_attr_t *)
    int pthread_attr_setstacksize(pthread_attr_t *, size_t)
    int pthread_setschedparam(pthread_t thread, int policy, const sched_param *param)
    int pthread_setname_np(pthread_t, const char *)
    int pthread_join(pthread_t, void **)
    int pthread_mutexattr_init(pthread_mutexattr_t *)
    int pthread_mutexattr_setprotocol(pthread_mutexattr_t *, int)
    int pthread_mutex_init(pthread_mutex_t *, const pthread_mutexattr_t *)
    int pthread_mutex_lock(pthread_mutex_t *)
    int pthread_mutex_trylock(pthread_mutex_t *)
    int pthread_mutex_unlock(pthread_mutex_t *)
    int pthread_condattr_init(pthread_condattr_t *)
    int pthread_condattr_setclock(pthread_condattr_t *, int)
    int pthread_cond_init(pthread_cond_t *, const pthread_condattr_t *)
    int pthread_cond_wait(pthread_cond_t *, pthread_mutex_t *)
    int pthread_cond_timedwait(pthread_cond_t *, pthread_mutex_t *, const timespec *)
    int pthread_cond_signal(pthread_cond_t *)
    int pthread_cond_broadcast(pthread_cond_t *)

cdef extern from "<time.h>" nogil:
    enum: CLOCK_MONOTONIC
    int clock_gettime(int, timespec *)

cdef extern from "<sched.h>" nogil:
    int sched_yield()
    int sched_getscheduler(int thread)
    int sched_getparam(int thread, sched_param *answer)


cdef inline void lock_init(pthread_mutex_t *lock) noexcept nogil:
    cdef pthread_mutexattr_t attributes
    pthread_mutexattr_init(&attributes)
    pthread_mutexattr_setprotocol(&attributes, PTHREAD_PRIO_INHERIT)
    pthread_mutex_init(lock, &attributes)

cdef extern from *:
    """
    #if defined(__x86_64__)
    #define zc_pause() __builtin_ia32_pause()
    #else
    #define zc_pause() ((void)0)
    #endif
    """
    void zc_pause() nogil

cdef enum:
    # Looks at a taken lock before sleeping.  Holders need 0.1 to 0.3 us, a sleep and
    # its wakeup 10 us and more: two threads that store 128 KiB each ran at 0.67 of
    # two bare compression loops without it.  Short enough to be nothing where the
    # holder cannot run (one CPU): then priority inheritance has to help.
    SPINS = 100

cdef inline void lock_take(pthread_mutex_t *lock) noexcept nogil:
    """Lock; spin a moment first."""
    cdef int i
    for i in range(SPINS):
        if pthread_mutex_trylock(lock) == 0:
            return
        zc_pause()
    pthread_mutex_lock(lock)

cdef inline void cond_init(pthread_cond_t *cond) noexcept nogil:
    """A condition whose deadlines are on the monotonic clock."""
    cdef pthread_condattr_t attributes
    pthread_condattr_init(&attributes)
    pthread_condattr_setclock(&attributes, CLOCK_MONOTONIC)
    pthread_cond_init(cond, &attributes)

cdef inline int64_t now_us() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <int64_t>t.tv_sec * 1000000 + t.tv_nsec // 1000

cdef inline int64_t now_ns() noexcept nogil:
    cdef timespec t
    clock_gettime(CLOCK_MONOTONIC, &t)
    return <int64_t>t.tv_sec * 1000000000 + t.tv_nsec

cdef inline timespec at_us(int64_t deadline_us) noexcept nogil:
    cdef timespec t
    t.tv_sec = deadline_us // 1000000
    t.tv_nsec = (deadline_us % 1000000) * 1000
    return t

cdef extern from *:
    """
    #ifndef ZC_STARTED
    #define ZC_STARTED
    #include <pthread.h>
    #include <sched.h>
    #include <stdlib.h>
    #include <string.h>

    /* Memory is locked when it is touched (MCL_ONFAULT).  A stack that grows while a machine
     * swaps onto us would ask for memory then: so as much of it as our threads use (the
     * cooling thread most, 20 KiB) is touched when a thread begins. */
    enum { ZC_STACK_TOUCHED = 96 * 1024 };
    static __attribute__((noinline)) void zc_touch_stack(void)
    {
        volatile char room[ZC_STACK_TOUCHED];
        for (size_t i = sizeof room; i >= 1024; i -= 1024)
            room[i - 1024] = 0;
    }

    struct zc_started { void *(*run)(void *); void *argument; int ordinary; };
    static void *zc_thread(void *made)
    {
        struct zc_started what = *(struct zc_started *)made;
        free(made);
        zc_touch_stack();
        /* Only now: a fault holds the lock of this process's mappings, and an ordinary thread
         * may wait for memory in it, when there is none, until a swap write is served.  Then
         * nobody here could map anything, and nobody serve. */
        if (what.ordinary) {
            struct sched_param none = { 0 };
            sched_setscheduler(0, SCHED_OTHER, &none);
        }
        return what.run(what.argument);
    }
    static int zc_thread_create(pthread_t *thread, const pthread_attr_t *attributes,
                                void *(*run)(void *), void *argument, int ordinary)
    {
        struct zc_started *what = malloc(sizeof *what);
        if (what == NULL)
            return 12;      /* ENOMEM */
        what->run = run;
        what->argument = argument;
        what->ordinary = ordinary;
        int error = pthread_create(thread, attributes, zc_thread, what);
        if (error)
            free(what);
        return error;
    }
    #endif
    """
    int zc_thread_create(
        pthread_t *, const pthread_attr_t *, void *(*)(void *) noexcept nogil, void *, int ordinary
    ) nogil

cdef enum:
    STACK_BYTES = 256 * 1024    # compression states live elsewhere

cdef inline int thread_start_as(
    pthread_t *thread, void *(*run)(void *) noexcept nogil, void *argument, const char *name, bint ordinary
) noexcept nogil:
    cdef pthread_attr_t attributes
    cdef int error
    pthread_attr_init(&attributes)
    pthread_attr_setstacksize(&attributes, STACK_BYTES)
    error = zc_thread_create(thread, &attributes, run, argument, ordinary)
    if error == 0:
        pthread_setname_np(thread[0], name)
    return error

cdef inline int thread_start_alike(
    pthread_t *thread, void *(*run)(void *) noexcept nogil, void *argument, const char *name
) noexcept nogil:
    """As thread_start, but of the caller's own scheduling class."""
    return thread_start_as(thread, run, argument, name, False)

cdef inline int thread_start(
    pthread_t *thread, void *(*run)(void *) noexcept nogil, void *argument, const char *name
) noexcept nogil:
    """A background thread called `name` (15 letters, as top -H shows it), with a small stack, resident from the start.

    Of the ordinary class from there on, also where serving threads are SCHED_FIFO: on one CPU they
    come first, and lend their priority to whoever holds a lock they want.
    """
    return thread_start_as(thread, run, argument, name, True)
