/* tcpecho: what a bare TCP exchange of given sizes costs on this machine, over loopback.
 *
 *   tcpecho ASK ANSWER SECONDS
 *
 *     asker --ASK bytes--> answerer        a process each, one exchange open at a time,
 *           <--ANSWER bytes--              TCP_NODELAY, blocking reads and writes
 *
 * Nothing is made of the bytes.  Everything is allocated before the clock starts; latencies are
 * kept one by one, so a percentile is exact.  One JSON object on standard output; any error ends
 * the program with a sentence and code 1.
 */
#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

enum { MOST_EXCHANGES = 1 << 21 };

static void fail(const char *what)
{
    perror(what);
    exit(1);
}

static uint64_t now_ns(void)
{
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}

/* 0 at the end of the stream. */
static int take(int fd, char *to, size_t bytes)
{
    while (bytes) {
        ssize_t n = read(fd, to, bytes);
        if (n <= 0)
            return 0;
        to += n;
        bytes -= (size_t)n;
    }
    return 1;
}

static int give(int fd, const char *from, size_t bytes)
{
    while (bytes) {
        ssize_t n = write(fd, from, bytes);
        if (n <= 0)
            return 0;
        from += n;
        bytes -= (size_t)n;
    }
    return 1;
}

static void no_delay(int fd)
{
    int yes = 1;
    if (setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes))
        fail("TCP_NODELAY");
}

static int by_size(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return (x > y) - (x < y);
}

static void answer(int listening, size_t ask, size_t reply, char *buffer)
{
    int fd = accept(listening, NULL, NULL);
    if (fd < 0)
        fail("accept");
    no_delay(fd);
    while (take(fd, buffer, ask) && give(fd, buffer, reply))
        ;
    exit(0);
}

int main(int argc, char **argv)
{
    if (argc != 4) {
        fprintf(stderr, "usage: tcpecho ASK ANSWER SECONDS\n");
        return 1;
    }
    size_t ask = strtoul(argv[1], NULL, 10), reply = strtoul(argv[2], NULL, 10);
    double seconds = strtod(argv[3], NULL);
    size_t room = ask > reply ? ask : reply;
    char *buffer = calloc(1, room ? room : 1);
    uint64_t *took = calloc(MOST_EXCHANGES, sizeof *took);
    struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t length = sizeof at;
    if (!buffer || !took || !ask || !reply || seconds <= 0) {
        fprintf(stderr, "tcpecho: sizes and seconds are larger than 0, and memory is needed\n");
        return 1;
    }
    signal(SIGPIPE, SIG_IGN);
    int listening = socket(AF_INET, SOCK_STREAM, 0);
    if (listening < 0 || bind(listening, (struct sockaddr *)&at, sizeof at) || listen(listening, 1) ||
        getsockname(listening, (struct sockaddr *)&at, &length))
        fail("listening on 127.0.0.1");
    pid_t child = fork();
    if (child < 0)
        fail("fork");
    if (child == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        answer(listening, ask, reply, buffer);
    }
    int fd = socket(AF_INET, SOCK_STREAM, 0);
    if (fd < 0 || connect(fd, (struct sockaddr *)&at, sizeof at))
        fail("connect");
    no_delay(fd);
    size_t n = 0;
    uint64_t end = now_ns() + (uint64_t)(seconds * 1e9), start = 0;
    for (uint64_t before = now_ns(); before < end && n < MOST_EXCHANGES; before = start) {
        if (!give(fd, buffer, ask) || !take(fd, buffer, reply))
            fail("the exchange");
        start = now_ns();
        took[n++] = start - before;
    }
    close(fd);
    waitpid(child, NULL, 0);
    qsort(took, n, sizeof *took, by_size);
    printf("{\"requests\": %zu, \"p50_us\": %.3f, \"p99_us\": %.3f}\n", n, took[n / 2] / 1e3,
           took[n - 1 - n / 100] / 1e3);
    return 0;
}
