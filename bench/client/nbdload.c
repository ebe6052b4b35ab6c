/* nbdload: one NBD server under a load that is said exactly, and what it answered how fast.
 *
 *   nbdload --socket PATH --data FILE [--fill] [--verify] [--region BYTES]
 *           [--op none|read|write|mix] [--block BYTES] [--depth N] [--connections N]
 *           [--order random|sequential] [--seconds S] [--seed N]
 *
 *     FILE (pages, mapped)          thread per connection            server
 *     +----+----+----+----+          +----+----+----+
 *     | p0 | p1 | p2 | .. |  ----->  | in flight: depth / connections |  ----->  Unix socket
 *     +----+----+----+----+          +----+----+----+
 *
 * Page n of the device starts as page n of FILE, modulo FILE's pages (--fill); a write of the run
 * takes a page-aligned piece of FILE, so that every byte that travels is a real page's.  Whoever
 * has an answer asks the next question at once: the load is closed, never more than `depth` open.
 *
 * Everything is allocated before the clock starts.  Latencies go into a histogram of SUB cells per
 * power of two, so a percentile is right to 1/SUB of itself; the mean is exact.  One JSON object on
 * standard output; any error ends the program with a sentence and code 1.
 *
 * It is no replacement for fio: only what is measured here, and the same client for every server.
 */
#include <errno.h>
#include <fcntl.h>
#include <getopt.h>
#include <libnbd.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>

enum { PAGE = 4096, SUB = 256, OCTAVES = 40, MOST_DEPTH = 256, MOST_CONNECTIONS = 64 };
enum { FILL_BLOCK = 1 << 17, FILL_DEPTH = 4 };
enum op { NONE, READ, WRITE, MIX };

struct load {
    enum op op;
    uint64_t block_bytes, region_bytes;
    int depth, random, verify;
    double seconds;          /* 0: one pass over the region, in order */
};

struct worker;
struct slot {                /* one request in flight */
    struct worker *worker;
    char *buffer;            /* reads end here; writes start in the mapped file */
    uint64_t offset, start_ns;
    int busy, done, is_read;
};

struct worker {              /* one connection, one thread */
    struct nbd_handle *nbd;
    const struct load *load;
    struct slot slots[MOST_DEPTH];
    uint64_t cursor, end, random, stop_ns;
    uint64_t requests, sum_ns, most_ns;
    uint64_t cells[OCTAVES * SUB];
    pthread_t thread;
};

static const char *data;
static uint64_t data_bytes;

static void die(const char *what, const char *why)
{
    fprintf(stderr, "nbdload: %s: %s\n", what, why);
    exit(1);
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

static uint64_t next_random(struct worker *w)      /* splitmix64 */
{
    uint64_t z = (w->random += 0x9e3779b97f4a7c15u);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}

static unsigned cell_of(uint64_t ns)
{
    unsigned shift = 0;
    while ((ns >> shift) >= 2 * SUB)
        shift++;
    unsigned cell = shift * SUB + (unsigned)(ns >> shift);
    return cell < OCTAVES * SUB ? cell : OCTAVES * SUB - 1;
}

static double cell_ns(unsigned cell)               /* the middle of a cell */
{
    unsigned shift = cell < 2 * SUB ? 0 : cell / SUB - 1;
    return ((double)(cell - shift * SUB) + 0.5) * (double)(1ull << shift);
}

/* Where in the file the bytes of a piece stand; a piece never wraps, the file is cut to fit. */
static const char *piece(uint64_t page, uint64_t length)
{
    uint64_t places = (data_bytes - length) / PAGE + 1;
    return data + page % places * PAGE;
}

/* What page `page` of the device holds after a fill. */
static const char *filled(uint64_t page)
{
    return data + page % (data_bytes / FILL_BLOCK * FILL_BLOCK / PAGE) * PAGE;
}

static void compare(const struct slot *s, uint64_t length)
{
    for (uint64_t at = 0; at < length; at += PAGE)
        if (memcmp(s->buffer + at, filled((s->offset + at) / PAGE), PAGE))
            die("verify", "a page is not what was written");
}

static int on_answer(void *user_data, int *error)
{
    struct slot *s = user_data;
    struct worker *w = s->worker;
    uint64_t took = now_ns() - s->start_ns;

    if (*error)
        die("the server answered", strerror(*error));
    w->requests++;
    w->sum_ns += took;
    if (took > w->most_ns)
        w->most_ns = took;
    w->cells[cell_of(took)]++;
    s->done = 1;
    return 1;
}

static void submit(struct worker *w, struct slot *s)
{
    const struct load *l = w->load;
    nbd_completion_callback then = { .callback = on_answer, .user_data = s };
    int64_t cookie;

    if (l->random) {
        s->offset = next_random(w) % (l->region_bytes / l->block_bytes) * l->block_bytes;
    } else {
        s->offset = w->cursor % l->region_bytes;
        w->cursor += l->block_bytes;
    }
    s->is_read = l->op == READ || (l->op == MIX && next_random(w) & 1);
    s->busy = 1;
    s->start_ns = now_ns();
    if (s->is_read) {
        cookie = nbd_aio_pread(w->nbd, s->buffer, l->block_bytes, s->offset, then, 0);
    } else {
        const char *from = l->seconds == 0 ? filled(s->offset / PAGE)
                                           : piece(next_random(w), l->block_bytes);
        cookie = nbd_aio_pwrite(w->nbd, from, l->block_bytes, s->offset, then, 0);
    }
    if (cookie == -1)
        die("cannot send", nbd_get_error());
}

static int more(const struct worker *w)
{
    return w->load->seconds == 0 ? w->cursor < w->end : now_ns() < w->stop_ns;
}

static void *run(void *user_data)
{
    struct worker *w = user_data;
    const struct load *l = w->load;
    int busy = 0;

    /* One at least, however late this thread was let run. */
    for (int i = 0; i < l->depth && (i == 0 || more(w)); i++, busy++)
        submit(w, &w->slots[i]);
    while (busy) {
        if (nbd_poll(w->nbd, -1) == -1)
            die("the connection broke", nbd_get_error());
        for (int i = 0; i < l->depth; i++) {
            struct slot *s = &w->slots[i];
            if (!s->busy || !s->done)
                continue;
            if (l->verify && s->is_read)
                compare(s, l->block_bytes);
            s->busy = s->done = 0;
            if (more(w))
                submit(w, s);
            else
                busy--;
        }
    }
    return NULL;
}

static struct worker *connect_all(const char *socket, int n, uint64_t seed)
{
    struct worker *all = calloc((size_t)n, sizeof *all);
    for (int c = 0; c < n; c++) {
        struct worker *w = &all[c];
        w->random = seed * 1000003 + (uint64_t)c;
        w->nbd = nbd_create();
        /* Reads need no zeroed buffer first; the client's own checks cost time. */
        if (!w->nbd || nbd_set_pread_initialize(w->nbd, false) || nbd_set_strict_mode(w->nbd, 0)
            || nbd_connect_unix(w->nbd, socket))
            die("cannot connect", nbd_get_error());
        for (int i = 0; i < MOST_DEPTH; i++)
            w->slots[i].worker = w;
    }
    return all;
}

/* Run `load` on n connections; nanoseconds from the first question to the last answer. */
static uint64_t drive(struct worker *all, int n, const struct load *load)
{
    uint64_t share = load->region_bytes / load->block_bytes / (uint64_t)n * load->block_bytes;
    uint64_t start;

    for (int c = 0; c < n; c++) {
        struct worker *w = &all[c];
        w->load = load;
        w->cursor = share * (uint64_t)c;
        w->end = c == n - 1 ? load->region_bytes : w->cursor + share;
        w->requests = w->sum_ns = w->most_ns = 0;
        memset(w->cells, 0, sizeof w->cells);
        for (int i = 0; i < load->depth; i++) {
            free(w->slots[i].buffer);
            w->slots[i].buffer = aligned_alloc(PAGE, load->block_bytes);
            if (!w->slots[i].buffer)
                die("no memory", "buffers");
            memset(w->slots[i].buffer, 1, load->block_bytes);
        }
    }
    start = now_ns();
    for (int c = 0; c < n; c++) {
        all[c].stop_ns = start + (uint64_t)(load->seconds * 1e9);
        if (pthread_create(&all[c].thread, NULL, run, &all[c]))
            die("no thread", "pthread_create");
    }
    for (int c = 0; c < n; c++)
        pthread_join(all[c].thread, NULL);
    return now_ns() - start;
}

static double percentile_us(const uint64_t *cells, uint64_t requests, double part)
{
    uint64_t seen = 0;
    for (unsigned cell = 0; cell < OCTAVES * SUB; cell++) {
        seen += cells[cell];
        if (seen && (double)seen >= part * (double)requests)
            return cell_ns(cell) / 1e3;
    }
    return 0;
}

static double cpu_s(void)
{
    struct rusage u;
    getrusage(RUSAGE_SELF, &u);
    return (double)(u.ru_utime.tv_sec + u.ru_stime.tv_sec)
         + (double)(u.ru_utime.tv_usec + u.ru_stime.tv_usec) / 1e6;
}

static void report(struct worker *all, int n, const struct load *l, uint64_t took_ns, double cpu)
{
    static uint64_t cells[OCTAVES * SUB];
    uint64_t requests = 0, sum = 0, most = 0;
    double seconds = (double)took_ns / 1e9;

    for (int c = 0; c < n; c++) {
        requests += all[c].requests;
        sum += all[c].sum_ns;
        most = all[c].most_ns > most ? all[c].most_ns : most;
        for (unsigned i = 0; i < OCTAVES * SUB; i++)
            cells[i] += all[c].cells[i];
    }
    printf("{\"requests\": %llu, \"seconds\": %.6f, \"requests_per_s\": %.1f, \"mb_per_s\": %.2f, "
           "\"mean_us\": %.3f, \"p50_us\": %.3f, \"p99_us\": %.3f, \"max_us\": %.3f, "
           "\"client_cpu_s\": %.4f}\n",
           (unsigned long long)requests, seconds, (double)requests / seconds,
           (double)(requests * l->block_bytes) / seconds / 1e6,
           (double)sum / (double)requests / 1e3, percentile_us(cells, requests, 0.50),
           percentile_us(cells, requests, 0.99), (double)most / 1e3, cpu);
}

static void map_data(const char *path)
{
    struct stat st;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0 || fstat(fd, &st))
        die(path, strerror(errno));
    data_bytes = (uint64_t)st.st_size / PAGE * PAGE;
    if (data_bytes < FILL_BLOCK)
        die(path, "holds less than 128 KiB of pages");
    /* Populated: no page fault may fall into the measurement. */
    data = mmap(NULL, data_bytes, PROT_READ, MAP_SHARED | MAP_POPULATE, fd, 0);
    if (data == MAP_FAILED)
        die(path, strerror(errno));
}

static uint64_t number(const char *name, const char *text, uint64_t least, uint64_t most)
{
    char *end;
    errno = 0;
    uint64_t value = strtoull(text, &end, 10);
    if (errno || *end || end == text || value < least || value > most)
        die(name, "is not a number that can be used here");
    return value;
}

static enum op op_of(const char *text)
{
    static const char *const names[] = { "none", "read", "write", "mix" };
    for (int i = 0; i < 4; i++)
        if (!strcmp(text, names[i]))
            return (enum op)i;
    die("--op", "none, read, write or mix");
    return NONE;
}

static const struct option OPTIONS[] = {
    { "socket", 1, NULL, 's' },  { "data", 1, NULL, 'd' },   { "fill", 0, NULL, 'f' },
    { "verify", 0, NULL, 'v' },  { "region", 1, NULL, 'r' }, { "op", 1, NULL, 'o' },
    { "block", 1, NULL, 'b' },   { "depth", 1, NULL, 'n' },  { "connections", 1, NULL, 'c' },
    { "order", 1, NULL, 'O' },   { "seconds", 1, NULL, 't' }, { "seed", 1, NULL, 'S' },
    { NULL, 0, NULL, 0 },
};

int main(int argc, char **argv)
{
    struct load load = { .op = NONE, .block_bytes = PAGE, .random = 1, .seconds = 1 };
    const char *socket = NULL, *path = NULL;
    int fill = 0, connections = 1, depth = 1, option;
    uint64_t seed = 1;

    while ((option = getopt_long(argc, argv, "", OPTIONS, NULL)) != -1)
        switch (option) {
        case 's': socket = optarg; break;
        case 'd': path = optarg; break;
        case 'f': fill = 1; break;
        case 'v': load.verify = 1; break;
        case 'r': load.region_bytes = number("--region", optarg, PAGE, UINT64_MAX / 2); break;
        case 'o': load.op = op_of(optarg); break;
        case 'b': load.block_bytes = number("--block", optarg, PAGE, 32u << 20); break;
        case 'n': depth = (int)number("--depth", optarg, 1, MOST_DEPTH); break;
        case 'c': connections = (int)number("--connections", optarg, 1, MOST_CONNECTIONS); break;
        case 'O': load.random = strcmp(optarg, "sequential") != 0; break;
        case 't': load.seconds = atof(optarg); break;
        case 'S': seed = number("--seed", optarg, 0, UINT64_MAX / 2); break;
        default: return 1;
        }
    if (!socket || !path || optind != argc)
        die("usage", "nbdload --socket PATH --data FILE [options]; see the head of nbdload.c");
    map_data(path);
    if (load.block_bytes % PAGE || load.block_bytes > data_bytes || load.seconds <= 0)
        die("--block, --seconds", "whole pages that FILE has, and some time");
    if (depth % connections)
        die("--depth", "is for all connections together: a multiple of their number");

    struct worker *all = connect_all(socket, connections, seed);
    if (!load.region_bytes)
        load.region_bytes = (uint64_t)nbd_get_size(all[0].nbd);
    load.region_bytes -= load.region_bytes % (load.block_bytes > FILL_BLOCK ? load.block_bytes : FILL_BLOCK);
    if (load.region_bytes < (uint64_t)connections * load.block_bytes || !load.region_bytes)
        die("--region", "is too small: 128 KiB at least");
    load.depth = depth / connections;

    if (fill) {
        struct load once = { .op = WRITE, .block_bytes = FILL_BLOCK, .depth = FILL_DEPTH,
                             .region_bytes = load.region_bytes };
        drive(all, 1, &once);
    }
    if (load.op != NONE) {
        double before = cpu_s();
        uint64_t took_ns = drive(all, connections, &load);
        report(all, connections, &load, took_ns, cpu_s() - before);
    }
    for (int c = 0; c < connections; c++) {
        nbd_shutdown(all[c].nbd, 0);
        nbd_close(all[c].nbd);
    }
    return 0;
}
