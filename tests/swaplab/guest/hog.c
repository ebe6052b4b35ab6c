/*
 * hog: fills more memory than the guest has with real page content, and never trusts a page again.
 *
 *      hog --mib 192 --corpus pages.bin --sequential 10 --random 20
 *
 *      memory   | page 0 | page 1 | ...                          |  anonymous, swappable
 *      sums     | 8 B    | 8 B    | ...                          |  locked: what each page must hash to
 *
 * Phases: fill (every page from the corpus, or noise), sequential and random touches for so many
 * seconds each, then an audit that reads every page once more (or as many as fit into --audit
 * seconds, from a random one on).  A touch reads the page's first word
 * with a clock around it (that is the fault), hashes the whole page, compares, and for some touches
 * changes one word, so that an old version of the page is as wrong as another page: the page's
 * number is in the hash, the sums are outside of swap's reach, content stays what was captured.
 *
 * Output: one JSON object.  Exit: 0 all pages right, 1 usage, 2 a page came back wrong, 3 a page
 * could not be brought back at all (SIGBUS: the swap device answered with an error).
 *
 * Bound: N MiB, and 1/512 of that and the program itself, which are locked.  A touch's clock is the cycle counter, because reading
 * the clock is a slow system call in User Mode Linux; whether a fault was a major one is asked
 * (getrusage) only after touches that took longer than a mapped page could have.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <signal.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#define PAGE_BYTES 4096
#define PAGE_WORDS (PAGE_BYTES / 8)
#define STEPS 16 /* histogram steps per doubling: 4.4 % apart */
#define SLOW_US 1.0
#define CHUNK_PAGES 256 /* the corpus is read, and dropped from the page cache, in pieces of 1 MiB */
#define BAD_SHOWN 8

struct histogram {
    uint64_t count[64 * STEPS];
    uint64_t total, max_cycles;
};

struct phase {
    const char *name;
    double seconds;
    uint64_t touches, writes, bad, major, minor;
    struct histogram every, major_faults;
};

static struct phase phases[4];
static int phase_count;
static uint64_t *memory, *sums;
static uint64_t page_count, bad_shown_count;
static struct {
    uint64_t page, expected, got;
    bool zeros;
} bad_shown[BAD_SHOWN];
static volatile uint64_t touched_page; /* for the SIGBUS handler */
static double cycles_per_us;
static long majors_before, minors_before; /* this process's faults when they were last asked for */

static double now_s(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec / 1e9;
}

static inline uint64_t cycles(void)
{
#if defined(__x86_64__)
    uint32_t low, high;
    __asm__ volatile("rdtscp" : "=a"(low), "=d"(high) : : "rcx", "memory");
    return (uint64_t)high << 32 | low;
#else
    return (uint64_t)(now_s() * 1e9);
#endif
}

static void calibrate(void)
{
    double start_s = now_s(), end_s;
    uint64_t start = cycles();

    while ((end_s = now_s()) - start_s < 0.05)
        ;
    cycles_per_us = (double)(cycles() - start) / ((end_s - start_s) * 1e6);
}

static uint64_t next_random(uint64_t *state) /* splitmix64 */
{
    uint64_t z = *state += 0x9E3779B97F4A7C15u;

    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
}

static uint64_t page_sum(const uint64_t *page, uint64_t number)
{
    uint64_t a = number + 1, b = ~number, c = 0x9E3779B97F4A7C15u, d = 0xD6E8FEB86659FD93u;

    for (int i = 0; i < PAGE_WORDS; i += 4) {
        a = (a ^ page[i]) * 0xFF51AFD7ED558CCDu;
        b = (b ^ page[i + 1]) * 0xC4CEB9FE1A85EC53u;
        c = (c ^ page[i + 2]) * 0x9FB21C651E98DF25u;
        d = (d ^ page[i + 3]) * 0xD6E8FEB86659FD93u;
        a ^= a >> 29;
        b ^= b >> 31;
        c ^= c >> 30;
        d ^= d >> 28;
    }
    a ^= b * 3 ^ c * 5 ^ d * 7;
    a = (a ^ (a >> 33)) * 0xFF51AFD7ED558CCDu;
    return a ^ (a >> 33);
}

/* ---- histograms ---- */

static void add(struct histogram *h, uint64_t value)
{
    int top = value ? 63 - __builtin_clzll(value) : 0;
    int step = top >= 4 ? (int)(value >> (top - 4)) & (STEPS - 1) : (int)(value << (4 - top)) & (STEPS - 1);

    h->count[top * STEPS + step]++;
    h->total++;
    if (value > h->max_cycles)
        h->max_cycles = value;
}

static double quantile_us(const struct histogram *h, double share)
{
    uint64_t wanted = (uint64_t)((double)h->total * share), seen = 0;

    if (!h->total)
        return 0;
    for (int i = 0; i < 64 * STEPS; i++) {
        seen += h->count[i];
        if (seen > wanted) {
            double low = (double)(1ull << (i / STEPS));
            return low * (1 + (i % STEPS + 0.5) / STEPS) / cycles_per_us;
        }
    }
    return (double)h->max_cycles / cycles_per_us;
}

static void print_histogram(const char *name, const struct histogram *h)
{
    printf("\"%s\":{\"count\":%llu,\"p50\":%.2f,\"p90\":%.2f,\"p99\":%.2f,\"p999\":%.2f,\"max\":%.2f}", name,
           (unsigned long long)h->total, quantile_us(h, 0.5), quantile_us(h, 0.9), quantile_us(h, 0.99),
           quantile_us(h, 0.999), (double)h->max_cycles / cycles_per_us);
}

/* ---- the report ---- */

static uint64_t bad_pages(void)
{
    uint64_t bad = 0;

    for (int i = 0; i < phase_count; i++)
        bad += phases[i].bad;
    return bad;
}

static void report(long long lost_page)
{
    printf("{\"pages\":%llu,\"bad\":%llu,\"lost_page\":%lld,\"phases\":[", (unsigned long long)page_count,
           (unsigned long long)bad_pages(), lost_page);
    for (int i = 0; i < phase_count; i++) {
        struct phase *p = &phases[i];
        printf("%s{\"name\":\"%s\",\"seconds\":%.3f,\"touches\":%llu,\"writes\":%llu,\"bad\":%llu,"
               "\"major\":%llu,\"minor\":%llu,\"touches_per_s\":%.1f,",
               i ? "," : "", p->name, p->seconds, (unsigned long long)p->touches, (unsigned long long)p->writes,
               (unsigned long long)p->bad, (unsigned long long)p->major, (unsigned long long)p->minor,
               p->seconds > 0 ? (double)p->touches / p->seconds : 0);
        print_histogram("touch_us", &p->every);
        printf(",");
        print_histogram("major_us", &p->major_faults);
        printf("}");
    }
    printf("],\"bad_pages\":[");
    for (uint64_t i = 0; i < bad_shown_count; i++)
        printf("%s{\"page\":%llu,\"expected\":\"%016llx\",\"got\":\"%016llx\",\"zeros\":%s}", i ? "," : "",
               (unsigned long long)bad_shown[i].page, (unsigned long long)bad_shown[i].expected,
               (unsigned long long)bad_shown[i].got, bad_shown[i].zeros ? "true" : "false");
    printf("]}\n");
    fflush(stdout);
}

static void on_sigbus(int signal_number)
{
    (void)signal_number;
    report((long long)touched_page); /* nothing else runs in this process: stdio is safe enough here */
    _exit(3);
}

/* ---- touching ---- */

static void found_bad(struct phase *p, uint64_t number, const uint64_t *page, uint64_t got)
{
    p->bad++;
    if (bad_shown_count == BAD_SHOWN)
        return;
    bad_shown[bad_shown_count].page = number;
    bad_shown[bad_shown_count].expected = sums[number];
    bad_shown[bad_shown_count].got = got;
    bad_shown[bad_shown_count].zeros = true;
    for (int i = 0; i < PAGE_WORDS; i++)
        if (page[i])
            bad_shown[bad_shown_count].zeros = false;
    bad_shown_count++;
}

static void touch(struct phase *p, uint64_t number, bool write_it)
{
    volatile uint64_t *page = memory + number * PAGE_WORDS;
    uint64_t start, took, got;

    touched_page = number;
    start = cycles();
    (void)page[0];
    took = cycles() - start;
    add(&p->every, took);
    p->touches++;
    if ((double)took > SLOW_US * cycles_per_us) {
        struct rusage used;
        getrusage(RUSAGE_SELF, &used);
        if (used.ru_majflt != majors_before)
            add(&p->major_faults, took);
        p->major += (uint64_t)(used.ru_majflt - majors_before);
        p->minor += (uint64_t)(used.ru_minflt - minors_before);
        majors_before = used.ru_majflt;
        minors_before = used.ru_minflt;
    }
    got = page_sum((const uint64_t *)page, number);
    if (got != sums[number]) {
        found_bad(p, number, (const uint64_t *)page, got);
        sums[number] = got; /* told once */
    }
    if (write_it) {
        page[(number + p->writes) % PAGE_WORDS] = p->writes;
        p->writes++;
        sums[number] = page_sum((const uint64_t *)page, number);
    }
}

static struct phase *begin(const char *name)
{
    struct phase *p = &phases[phase_count++];
    struct rusage used;

    getrusage(RUSAGE_SELF, &used);
    majors_before = used.ru_majflt;
    minors_before = used.ru_minflt;
    p->name = name;
    p->seconds = now_s();
    fprintf(stderr, "%s\n", name);
    return p;
}

static void end(struct phase *p)
{
    p->seconds = now_s() - p->seconds;
}

static void fill(int corpus, uint64_t noise_percent, uint64_t seed)
{
    struct phase *p = begin("fill");
    off_t corpus_pages = 0, at = 0;
    struct stat info;

    if (corpus >= 0 && fstat(corpus, &info) == 0)
        corpus_pages = info.st_size / PAGE_BYTES;
    for (uint64_t i = 0; i < page_count; i++) {
        uint64_t *page = memory + i * PAGE_WORDS;
        touched_page = i;
        if (!corpus_pages || next_random(&seed) % 100 < noise_percent) {
            for (int w = 0; w < PAGE_WORDS; w++)
                page[w] = next_random(&seed);
        } else {
            if (pread(corpus, page, PAGE_BYTES, at * PAGE_BYTES) != PAGE_BYTES) {
                perror("hog: corpus");
                exit(1);
            }
            if (++at % CHUNK_PAGES == 0 || at == corpus_pages)
                posix_fadvise(corpus, 0, 0, POSIX_FADV_DONTNEED);
            at %= corpus_pages;
        }
        sums[i] = page_sum(page, i);
        p->touches++;
    }
    end(p);
}

static void roam(const char *name, bool random, double seconds, uint64_t write_percent, uint64_t seed)
{
    struct phase *p = begin(name);
    uint64_t deadline = cycles() + (uint64_t)(seconds * 1e6 * cycles_per_us);

    for (uint64_t i = 0; cycles() < deadline; i++)
        touch(p, (random ? next_random(&seed) : i) % page_count, next_random(&seed) % 100 < write_percent);
    end(p);
}

/* Every page once, if `seconds` allow (0: they always do); the order is a random rotation. */
static void audit(double seconds, uint64_t seed)
{
    struct phase *p = begin("audit");
    uint64_t deadline = cycles() + (uint64_t)(seconds * 1e6 * cycles_per_us);
    uint64_t start = next_random(&seed) % page_count;

    for (uint64_t i = 0; i < page_count && (seconds <= 0 || cycles() < deadline); i++)
        touch(p, (start + i) % page_count, false);
    end(p);
}

static void *anonymous(size_t bytes)
{
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (at == MAP_FAILED) {
        perror("hog: mmap");
        exit(1);
    }
    return at;
}

int main(int argc, char **argv)
{
    static const struct option options[] = {
        {"mib", 1, NULL, 'm'},    {"corpus", 1, NULL, 'c'}, {"noise", 1, NULL, 'n'}, {"sequential", 1, NULL, 's'},
        {"random", 1, NULL, 'r'}, {"writes", 1, NULL, 'w'}, {"seed", 1, NULL, 'e'},  {"audit", 1, NULL, 'a'},
        {NULL, 0, NULL, 0}};
    double sequential_s = 5, random_s = 5, audit_s = 0;
    uint64_t noise = 0, writes = 25, seed = 1;
    int corpus = -1, option;

    while ((option = getopt_long(argc, argv, "", options, NULL)) != -1) {
        switch (option) {
        case 'm': page_count = strtoull(optarg, NULL, 10) << 8; break;
        case 'c': corpus = open(optarg, O_RDONLY); break;
        case 'n': noise = strtoull(optarg, NULL, 10); break;
        case 's': sequential_s = atof(optarg); break;
        case 'r': random_s = atof(optarg); break;
        case 'a': audit_s = atof(optarg); break;
        case 'w': writes = strtoull(optarg, NULL, 10); break;
        case 'e': seed = strtoull(optarg, NULL, 10); break;
        default: return 1;
        }
        if (option == 'c' && corpus < 0) {
            perror(optarg);
            return 1;
        }
    }
    if (!page_count || (corpus < 0 && noise < 100)) {
        fprintf(stderr, "hog: say --mib N and --corpus FILE, or --noise 100 to do without a corpus\n");
        return 1;
    }
    /* The program itself, but not what it maps from here on: it must live to tell. */
    if (mlockall(MCL_CURRENT))
        perror("hog: the program is not locked");
    memory = anonymous(page_count * PAGE_BYTES);
    sums = anonymous(page_count * sizeof *sums);
    if (mlock(sums, page_count * sizeof *sums))
        perror("hog: sums are not locked");
    signal(SIGBUS, on_sigbus);
    calibrate();
    fill(corpus, noise, seed);
    if (sequential_s > 0)
        roam("sequential", false, sequential_s, writes, seed + 1);
    if (random_s > 0)
        roam("random", true, random_s, writes, seed + 2);
    audit(audit_s, seed + 3);
    report(-1);
    return bad_pages() ? 2 : 0;
}
