/* Memory for zstd's contexts: mapped, not of the heap, so that what is given back is really free.

   zstd asks for a few large pieces, aligned as malloc does it; each has its length in front. */
#ifndef ZC_MAPPED_H
#define ZC_MAPPED_H

#include <stddef.h>
#include <sys/mman.h>
#include <zstd.h>

enum { ZC_HEAD = 64 };

static void *zc_map(void *opaque, size_t length)
{
    void *at = mmap(NULL, length + ZC_HEAD, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

    (void)opaque;
    if (at == MAP_FAILED)
        return NULL;
    *(size_t *)at = length + ZC_HEAD;
    return (char *)at + ZC_HEAD;
}

static void zc_unmap(void *opaque, void *at)
{
    (void)opaque;
    if (at != NULL)
        munmap((char *)at - ZC_HEAD, *(size_t *)((char *)at - ZC_HEAD));
}

static const ZSTD_customMem zc_mapped = { zc_map, zc_unmap, NULL };

#endif
