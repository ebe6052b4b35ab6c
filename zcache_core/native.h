/* What Cython cannot say: atomics, two checks, a vectorised page test.
 *
 * Only static inline functions over compiler builtins and two header-only uses of
 * well-kept libraries (xxHash, glibc's memcmp).  No state, no system call.
 *
 * The 16-byte compare-and-swap is the one instruction the index stands on
 * (cmpxchg16b on x86-64, casp on aarch64; build flags in setup.py).  The __sync
 * builtin is used because GCC turns __atomic_*_16 into a library call that may
 * take a lock, and a lock word has no place in memory that outlives its owner.
 */
#ifndef ZCACHE_NATIVE_H
#define ZCACHE_NATIVE_H

#include <stdint.h>
#include <string.h>

/* XXH3 over a blob: twice as fast with AVX2, which the build's baseline (x86-64-v2)
 * lacks.  So the header-only variant is compiled for AVX2 alone, and other machines
 * call the shared library. */
#if defined(__x86_64__)
#pragma GCC push_options
#pragma GCC target("avx2")
#endif
#define XXH_INLINE_ALL
#include <xxhash.h>
static uint64_t zc_xxh3(const void *data, size_t length_bytes) { return XXH3_64bits(data, length_bytes); }
#if defined(__x86_64__)
#pragma GCC pop_options
extern uint64_t zc_xxh3_shared(const void *data, size_t length_bytes) __asm__("XXH3_64bits");
#endif

static inline uint64_t zc_hash(const void *data, size_t length_bytes)
{
#if defined(__x86_64__)
    if (!__builtin_cpu_supports("avx2"))
        return zc_xxh3_shared(data, length_bytes);
#endif
    return zc_xxh3(data, length_bytes);
}

/* ---- atomics ------------------------------------------------------------ */

static inline int zc_cas16(void *p, uint64_t old_lo, uint64_t old_hi,
                           uint64_t new_lo, uint64_t new_hi)
{
    unsigned __int128 old = ((unsigned __int128)old_hi << 64) | old_lo;
    unsigned __int128 new = ((unsigned __int128)new_hi << 64) | new_lo;
    return __sync_bool_compare_and_swap((unsigned __int128 *)p, old, new);
}

static inline uint64_t zc_load64(const uint64_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline void zc_store64(uint64_t *p, uint64_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
static inline uint64_t zc_add64(uint64_t *p, uint64_t v) { return __atomic_fetch_add(p, v, __ATOMIC_RELAXED); }
static inline uint32_t zc_load32(const uint32_t *p) { return __atomic_load_n(p, __ATOMIC_ACQUIRE); }
static inline void zc_store32(uint32_t *p, uint32_t v) { __atomic_store_n(p, v, __ATOMIC_RELEASE); }
static inline uint32_t zc_add32(uint32_t *p, uint32_t v) { return __atomic_fetch_add(p, v, __ATOMIC_ACQ_REL); }
static inline int zc_cas64(uint64_t *p, uint64_t old, uint64_t new)
{
    return __sync_bool_compare_and_swap(p, old, new);
}
static inline int zc_cas32(uint32_t *p, uint32_t old, uint32_t new)
{
    return __atomic_compare_exchange_n(p, &old, new, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED);
}
/* Orders the loads of a blob before the second look at its entry. */
static inline void zc_acquire_fence(void) { __atomic_thread_fence(__ATOMIC_ACQUIRE); }
/* Everything written to the blob before the entry that makes it reachable. */
static inline void zc_release_fence(void) { __atomic_thread_fence(__ATOMIC_RELEASE); }
static inline void zc_full_fence(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

static inline int zc_ctz64(uint64_t v) { return __builtin_ctzll(v); }
static inline unsigned zc_bits64(uint64_t v) { return v ? 64 - (unsigned)__builtin_clzll(v) : 0; }
static inline void zc_prefetch(const void *p) { __builtin_prefetch(p); }

/* ---- checks --------------------------------------------------------------- */

/* Eight check bits over the 120 other bits of an index entry: the extended Hamming
 * code (128,120), whose distance of four means that every flip of one, two or three
 * bits is found (t2_index tries them).  The seven masks are the bits of the 120
 * numbers below 128 that are no power of two, dealt to the data bits in order; the
 * eighth bit makes the parity of the whole entry even.  All zeros is a code word:
 * fresh memory is a valid index of empty pages. */
#define ZC_CHECK_FIELD ((uint64_t)0xFF0)
#define ZC_CHECK_BIT(k, loc_mask, ver_mask) \
    check |= (uint32_t)__builtin_parityll((location & (loc_mask)) ^ (version_word & (ver_mask))) << (k)

static inline uint32_t zc_entry_check(uint64_t location, uint64_t version_word)
{
    uint32_t check = 0;
    ZC_CHECK_BIT(0, 0xAB55555556AAAD5Bull, 0xAAAAAAAAAAAAA00Aull);
    ZC_CHECK_BIT(1, 0xCD9999999B33366Dull, 0xCCCCCCCCCCCCC00Cull);
    ZC_CHECK_BIT(2, 0xF1E1E1E1E3C3C78Eull, 0xF0F0F0F0F0F0F000ull);
    ZC_CHECK_BIT(3, 0x01FE01FE03FC07F0ull, 0xFF00FF00FF00F00Full);
    ZC_CHECK_BIT(4, 0x01FFFE0003FFF800ull, 0xFFFF0000FFFF0000ull);
    ZC_CHECK_BIT(5, 0x01FFFFFFFC000000ull, 0xFFFFFFFF00000000ull);
    ZC_CHECK_BIT(6, 0xFE00000000000000ull, 0xFFFFFFFFFFFFF00Full);
    uint64_t rest = location ^ (version_word & ~ZC_CHECK_FIELD) ^ check;
    return check | (uint32_t)__builtin_parityll(rest) << 7;
}

/* 32-bit checksum of a blob, bound to the identity words of its header. */
static inline uint32_t zc_blob_checksum(const void *data, uint64_t length_bytes,
                                        uint64_t identity, uint64_t place)
{
    uint64_t h = zc_hash(data, (size_t)length_bytes);
    h ^= identity * 0x9E3779B97F4A7C15ull;
    h ^= (place + 0x632BE59BD9B4E019ull) * 0xD6E8FEB86659FD93ull;
    h ^= h >> 32;
    h *= 0xD6E8FEB86659FD93ull;
    return (uint32_t)(h >> 32);
}

/* ---- same-filled pages ------------------------------------------------------ */

/* A page equals itself shifted by one word exactly when it repeats one word:
 * libc's memcmp then does the vector work, and leaves at the first difference. */
static inline int zc_same_filled(const void *page, uint64_t *word)
{
    const unsigned char *p = page;
    memcpy(word, p, 8);
    if (memcmp(p, p + 8, 56) != 0)
        return 0;
    return memcmp(p, p + 8, 4096 - 8) == 0;
}

static inline void zc_fill_words(void *page, uint64_t word)
{
    if (word == 0) {
        memset(page, 0, 4096);
        return;
    }
    unsigned char *p = page;
    for (int i = 0; i < 4096; i += 8)
        memcpy(p + i, &word, 8);
}

#endif
