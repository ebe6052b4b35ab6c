/* nbdkit's callbacks as plain C functions, because of three facts about nbdkit 1.32:
 *
 *  - An exception that leaves a callback is fetched and never released.  A new
 *    OSError with a traceback for each refused write is about 800 bytes lost each
 *    time, in locked memory, on the path that runs when memory is short.  So errors
 *    are one prepared exception for each errno, raised without a traceback; a
 *    function written in Cython would add one.
 *  - Its worker threads are unknown to Python, so that every callback would create
 *    and destroy a whole thread state.  The first call of a thread keeps it, a
 *    thread-exit destructor gives it back.
 *  - The arguments come by position, so a fast-call function needs no tuple.
 *
 * Each function unpacks its arguments, calls the compiled request, and crosses the
 * GIL where the request is long enough for that to pay.
 */
#ifndef ZCACHE_CALLBACKS_H
#define ZCACHE_CALLBACKS_H

#include <errno.h>
#include <pthread.h>
#include <stdint.h>
#include <string.h>

typedef int (*zc_request)(void *core, const void *handle, void *data, uint64_t length, uint64_t offset,
                          uint32_t flags);

enum { ZC_PREAD, ZC_PWRITE, ZC_TRIM, ZC_ZERO, ZC_CACHE, ZC_FLUSH, ZC_REQUESTS };

/* A short request runs under the GIL and is told so; one that would have to wait
 * answers ZC_AGAIN, and runs again without it. */
enum { ZC_HOLDS_GIL = 1 << 30, ZC_AGAIN = 0x7F000003 };

struct zc_device {
    void *core;
    const void *whole;              /* the handle of who has none: all of it, fenced by nobody */
    zc_request run[ZC_REQUESTS];
    PyObject *set_error;            /* nbdkit.set_error, or NULL */
    PyObject *whole_object;
    PyObject *owner;                /* the Device: lives as long as its callbacks */
    uint64_t release_bytes[ZC_REQUESTS];    /* release the GIL from this length on */
};

/* ---- thread states -------------------------------------------------------------- */

static pthread_key_t zc_state_key;
static pthread_once_t zc_state_once = PTHREAD_ONCE_INIT;

static void zc_drop_state(void *kept)
{
    /* A thread that Python made has taken its state down itself by now. */
    if (!Py_IsInitialized() || PyGILState_GetThisThreadState() != kept)
        return;
    PyGILState_STATE now = PyGILState_Ensure();
    PyGILState_Release(PyGILState_LOCKED);  /* the one that zc_keep_state took */
    PyGILState_Release(now);
}

static void zc_make_key(void) { pthread_key_create(&zc_state_key, zc_drop_state); }

/* The server's memory is locked when it is touched.  A stack that grew only when an error is
 * reported, under pressure, would ask for memory then: touch what a request needs at the first. */
enum { ZC_STACK_NEEDED = 48 * 1024 };

static __attribute__((noinline)) void zc_touch_needed(void)
{
    volatile char room[ZC_STACK_NEEDED];
    for (size_t i = sizeof room; i >= 1024; i -= 1024)
        room[i - 1024] = 0;
}

static void zc_settle_stack(void)
{
    pthread_attr_t attributes;
    void *lowest;
    size_t size_bytes;
    char here;
    if (pthread_getattr_np(pthread_self(), &attributes))
        return;
    if (pthread_attr_getstack(&attributes, &lowest, &size_bytes) == 0
        && (size_t)(&here - (char *)lowest) > 2 * ZC_STACK_NEEDED)
        zc_touch_needed();
    pthread_attr_destroy(&attributes);
}

static inline void zc_keep_state(void)
{
    static __thread int known;
    if (known)
        return;
    known = 1;
    zc_settle_stack();
    pthread_once(&zc_state_once, zc_make_key);
    PyGILState_Ensure();
    pthread_setspecific(zc_state_key, PyGILState_GetThisThreadState());
}

/* ---- errors ----------------------------------------------------------------------- */

static PyObject *zc_fail(struct zc_device *device, int error)
{
    static PyObject *prepared[256];
    PyObject **one = &prepared[error & 0xFF];
    if (*one == NULL) {
        *one = PyObject_CallFunction(PyExc_OSError, "is", error, strerror(error));
        if (*one == NULL)
            return NULL;
    }
    if (device->set_error != NULL) {
        PyObject *done = PyObject_CallFunction(device->set_error, "i", error);
        if (done == NULL)
            return NULL;
        Py_DECREF(done);
    }
    PyException_SetTraceback(*one, Py_None);
    PyErr_SetObject(PyExc_OSError, *one);
    return NULL;
}

/* ---- handles: what a connection is allowed to see --------------------------------- */

#define ZC_HANDLE "zcache.handle"

static void zc_free_handle(PyObject *capsule) { PyMem_Free(PyCapsule_GetPointer(capsule, ZC_HANDLE)); }

/* A copy of `bytes` bytes at `handle`, as an object for nbdkit to keep. */
static PyObject *zc_new_handle(const void *handle, size_t bytes)
{
    void *copy = PyMem_Malloc(bytes);
    if (copy == NULL)
        return PyErr_NoMemory();
    memcpy(copy, handle, bytes);
    return PyCapsule_New(copy, ZC_HANDLE, zc_free_handle);
}

/* NULL when it is none of ours. */
static inline const void *zc_handle_at(PyObject *handle)
{
    return PyCapsule_IsValid(handle, ZC_HANDLE) ? PyCapsule_GetPointer(handle, ZC_HANDLE) : NULL;
}

static inline const void *zc_handle_or_whole(struct zc_device *device, PyObject *handle)
{
    const void *found = zc_handle_at(handle);
    return found != NULL ? found : device->whole;
}

/* ---- the calls ----------------------------------------------------------------------- */

static PyObject *zc_run(struct zc_device *device, int what, PyObject *h, void *data, uint64_t length,
                        uint64_t offset, uint32_t flags)
{
    const void *handle = zc_handle_or_whole(device, h);
    int error = ZC_AGAIN;
    if (length < device->release_bytes[what])
        error = device->run[what](device->core, handle, data, length, offset, flags | ZC_HOLDS_GIL);
    if (error == ZC_AGAIN) {
        Py_BEGIN_ALLOW_THREADS
        error = device->run[what](device->core, handle, data, length, offset, flags);
        Py_END_ALLOW_THREADS
    }
    if (error)
        return zc_fail(device, error);
    Py_RETURN_NONE;
}

static struct zc_device *zc_device_of(PyObject *self, Py_ssize_t nargs, Py_ssize_t least)
{
    if (nargs < least || nargs > 4) {
        PyErr_SetString(PyExc_TypeError, "called with nbdkit's arguments: handle, buffer or length, offset, flags");
        return NULL;
    }
    zc_keep_state();
    return PyCapsule_GetPointer(self, NULL);
}

static int zc_number(PyObject *arg, uint64_t *value)
{
    *value = PyLong_AsUnsignedLongLong(arg);
    return *value == (uint64_t)-1 && PyErr_Occurred() ? -1 : 0;
}

static PyObject *zc_buffer_call(PyObject *self, PyObject *const *args, Py_ssize_t nargs, int what)
{
    struct zc_device *device = zc_device_of(self, nargs, 3);
    uint64_t offset;
    Py_buffer view;
    if (device == NULL || zc_number(args[2], &offset))
        return NULL;
    if (PyObject_GetBuffer(args[1], &view, what == ZC_PREAD ? PyBUF_CONTIG : PyBUF_CONTIG_RO))
        return NULL;
    PyObject *result = zc_run(device, what, args[0], view.buf, (uint64_t)view.len, offset, 0);
    PyBuffer_Release(&view);
    return result;
}

static PyObject *zc_length_call(PyObject *self, PyObject *const *args, Py_ssize_t nargs, int what)
{
    struct zc_device *device = zc_device_of(self, nargs, 3);
    uint64_t length, offset, flags = 0;
    if (device == NULL || zc_number(args[1], &length) || zc_number(args[2], &offset))
        return NULL;
    if (nargs == 4 && zc_number(args[3], &flags))
        return NULL;
    return zc_run(device, what, args[0], NULL, length, offset, (uint32_t)flags);
}

static PyObject *zc_pread(PyObject *s, PyObject *const *a, Py_ssize_t n) { return zc_buffer_call(s, a, n, ZC_PREAD); }
static PyObject *zc_pwrite(PyObject *s, PyObject *const *a, Py_ssize_t n) { return zc_buffer_call(s, a, n, ZC_PWRITE); }
static PyObject *zc_trim(PyObject *s, PyObject *const *a, Py_ssize_t n) { return zc_length_call(s, a, n, ZC_TRIM); }
static PyObject *zc_zero(PyObject *s, PyObject *const *a, Py_ssize_t n) { return zc_length_call(s, a, n, ZC_ZERO); }
static PyObject *zc_cache(PyObject *s, PyObject *const *a, Py_ssize_t n) { return zc_length_call(s, a, n, ZC_CACHE); }

static PyObject *zc_flush(PyObject *self, PyObject *const *args, Py_ssize_t nargs)
{
    struct zc_device *device = zc_device_of(self, nargs, 1);
    return device == NULL ? NULL : zc_run(device, ZC_FLUSH, args[0], NULL, 0, 0, 0);
}

static PyMethodDef zc_methods[] = {
    {"pread", (PyCFunction)(void (*)(void))zc_pread, METH_FASTCALL,
     "pread(h, buf, offset, flags): fill buf from byte `offset`; OSError EIO when a page is lost or damaged"},
    {"pwrite", (PyCFunction)(void (*)(void))zc_pwrite, METH_FASTCALL,
     "pwrite(h, buf, offset, flags): write buf at byte `offset`; OSError ENOSPC when there is no room"},
    {"trim", (PyCFunction)(void (*)(void))zc_trim, METH_FASTCALL,
     "trim(h, length, offset, flags): forget all whole pages in the range; they read as zeros"},
    {"zero", (PyCFunction)(void (*)(void))zc_zero, METH_FASTCALL,
     "zero(h, length, offset, flags): make the range zeros; with FLAG_MAY_TRIM whole pages become holes"},
    {"cache", (PyCFunction)(void (*)(void))zc_cache, METH_FASTCALL,
     "cache(h, length, offset, flags): nothing to do while every page is in RAM; the range is checked"},
    {"flush", (PyCFunction)(void (*)(void))zc_flush, METH_FASTCALL,
     "flush(h, flags): nothing to do: an acknowledged write is where it will stay"},
};

static void zc_free_device(PyObject *capsule)
{
    struct zc_device *device = PyCapsule_GetPointer(capsule, NULL);
    Py_XDECREF(device->set_error);
    Py_XDECREF(device->owner);
    Py_XDECREF(device->whole_object);
    PyMem_Free(device);
}

/* A capsule around a device; steals nothing, keeps `owner`, `whole` and `set_error` alive. */
static PyObject *zc_new_device(void *core, PyObject *whole, const zc_request *run,
                               const uint64_t *release_bytes, PyObject *set_error, PyObject *owner)
{
    struct zc_device *device = PyMem_Calloc(1, sizeof *device);
    if (device == NULL)
        return PyErr_NoMemory();
    device->core = core;
    device->whole_object = Py_NewRef(whole);
    device->whole = zc_handle_at(whole);
    memcpy(device->run, run, sizeof device->run);
    memcpy(device->release_bytes, release_bytes, sizeof device->release_bytes);
    device->set_error = set_error == Py_None ? NULL : Py_NewRef(set_error);
    device->owner = Py_NewRef(owner);
    return PyCapsule_New(device, NULL, zc_free_device);
}

static PyObject *zc_callback(PyObject *capsule, int what) { return PyCFunction_New(&zc_methods[what], capsule); }

#endif
