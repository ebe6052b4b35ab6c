/*
 * agent: PID 1 of the lab's guest.
 *
 * The harness on the host drives the guest through one serial line.  It sends a command a line, the
 * agent answers each with one line, and tells by itself when a program has ended and, once asked to,
 * what /proc/vmstat counts:
 *
 *      host                          guest (this file)
 *      7 run hog stress-ng --vm 1  ->  fork, exec, output to SHARE/hog.out and SHARE/hog.err
 *      7 ok 123                    <-
 *      ! vm 18250 pswpin=12 ...    <-  every so often, from a timer
 *      ! exit hog 123 0 ...        <-  the program has ended: wait status, CPU, faults
 *
 * Why it looks the way it does: the guest exists to run out of memory.  A PID 1 whose pages are on
 * the swap device that has just been lost takes the kernel with it, so this one is static, locked,
 * and allocates nothing: every buffer below is fixed.  The serial line needs neither the network
 * nor a file system, and the kernel's own log has a line of its own (the console).
 *
 * Words are separated by one space; within a word, bytes that are no plain ASCII are written %XX.
 *
 * Bound: JOBS programs at once, WORDS words a command, LINE_BYTES a line.  A command beyond that is
 * refused with a sentence.  It is not an init for people: no shell, no services, no signals.
 */
#define _GNU_SOURCE
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/mount.h>
#include <sys/prctl.h>
#include <sys/reboot.h>
#include <sys/resource.h>
#include <sys/signalfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <termios.h>
#include <time.h>
#include <unistd.h>

#define LINE_BYTES 32768
#define TEXT_BYTES 10000 /* most that `get` answers; three times that fits a line */
#define WORDS 128
#define JOBS 64
#define NAME_BYTES 32
#define SHARE "/mnt"

#ifndef PR_SET_IO_FLUSHER
#define PR_SET_IO_FLUSHER 57
#endif

struct job {
    pid_t pid; /* 0: free */
    char name[NAME_BYTES];
};

static struct job jobs[JOBS];
static int line_fd = -1;   /* the serial line */
static int vmstat_fd = -1; /* kept open: opening allocates */
static int meminfo_fd = -1;
static int sysrq_fd = -1;
static char in_buf[LINE_BYTES], out_buf[LINE_BYTES], word_buf[LINE_BYTES], text_buf[TEXT_BYTES];
static size_t in_used;

/* ---- words and lines ---- */

static size_t escape(char *to, size_t room, const char *from, size_t bytes)
{
    static const char hex[] = "0123456789ABCDEF";
    size_t used = 0;

    for (size_t i = 0; i < bytes && used + 4 < room; i++) {
        unsigned char c = (unsigned char)from[i];
        if (c > ' ' && c < 127 && c != '%') {
            to[used++] = (char)c;
        } else {
            to[used++] = '%';
            to[used++] = hex[c >> 4];
            to[used++] = hex[c & 15];
        }
    }
    to[used] = '\0';
    return used;
}

/* In place: a word never grows. */
static void unescape(char *word)
{
    char *to = word;

    for (; *word; word++) {
        if (word[0] == '%' && isxdigit((unsigned char)word[1]) && isxdigit((unsigned char)word[2])) {
            char two[3] = {word[1], word[2], '\0'};
            *to++ = (char)strtol(two, NULL, 16);
            word += 2;
        } else {
            *to++ = *word;
        }
    }
    *to = '\0';
}

static void send_bytes(const char *bytes, size_t count)
{
    while (count > 0) {
        ssize_t sent = write(line_fd, bytes, count);
        if (sent < 0 && (errno == EINTR || errno == EAGAIN))
            continue;
        if (sent <= 0)
            return; /* the harness is gone: the read side will see it and power off */
        bytes += sent;
        count -= (size_t)sent;
    }
}

__attribute__((format(printf, 1, 2))) static void say(const char *format, ...)
{
    va_list args;
    int used;

    va_start(args, format);
    used = vsnprintf(out_buf, sizeof out_buf - 1, format, args);
    va_end(args);
    if (used < 0 || used > (int)sizeof out_buf - 2)
        used = (int)sizeof out_buf - 2;
    out_buf[used++] = '\n';
    send_bytes(out_buf, (size_t)used);
}

static void answer_errno(const char *number, const char *what)
{
    char word[512];

    escape(word, sizeof word, what, strlen(what));
    say("%s error %s:%%20%s", number, word, strerrorname_np(errno));
}

static uint64_t now_ms(void)
{
    struct timespec t;

    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t)t.tv_sec * 1000 + (uint64_t)t.tv_nsec / 1000000;
}

/* ---- samples ---- */

static ssize_t read_from_start(int fd)
{
    ssize_t got = pread(fd, text_buf, sizeof text_buf - 1, 0);

    if (got >= 0)
        text_buf[got] = '\0';
    return got;
}

static unsigned long long number_after(const char *name)
{
    const char *at = text_buf;
    size_t length = strlen(name);

    for (; at; at = strchr(at, '\n')) {
        at += *at == '\n';
        if (strncmp(at, name, length) == 0 && !islower((unsigned char)at[length]))
            return strtoull(at + length + 1, NULL, 10);
    }
    return 0;
}

/* What moves while a guest swaps: pages in and out, major faults, memory left, swap in use. */
static void sample(void)
{
    unsigned long long in, out, major, oom, free_kb, swap_total_kb, swap_free_kb;

    if (read_from_start(vmstat_fd) < 0)
        return;
    in = number_after("pswpin");
    out = number_after("pswpout");
    major = number_after("pgmajfault");
    oom = number_after("oom_kill");
    if (read_from_start(meminfo_fd) < 0)
        return;
    free_kb = number_after("MemFree");
    swap_total_kb = number_after("SwapTotal");
    swap_free_kb = number_after("SwapFree");
    say("! vm %llu pswpin=%llu pswpout=%llu pgmajfault=%llu oom_kill=%llu free_kb=%llu swap_used_kb=%llu",
        (unsigned long long)now_ms(), in, out, major, oom, free_kb, swap_total_kb - swap_free_kb);
}

/* ---- programs ---- */

static struct job *job_named(const char *name)
{
    for (int i = 0; i < JOBS; i++)
        if (jobs[i].pid && strcmp(jobs[i].name, name) == 0)
            return &jobs[i];
    return NULL;
}

static void redirect(const char *name, const char *suffix, int fd)
{
    char path[128];
    int file;

    /* O_SYNC: what a program has said is on the host even if the guest hangs a moment later. */
    snprintf(path, sizeof path, SHARE "/%s.%s", name, suffix);
    file = open(path, O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_SYNC, 0644);
    if (file < 0 || dup2(file, fd) < 0)
        _exit(126);
}

/* run NAME OPTIONS ARGV...; options: "-" or a comma list of io_flusher, fifo=PRIORITY, stack=BYTES, oom=SCORE */
static void become(const char *name, char *options, char **argv)
{
    static char *const env[] = {"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/tmp",
                                "LANG=C.UTF-8", "TMPDIR=/tmp", NULL};
    sigset_t none;
    int null = open("/dev/null", O_RDONLY);

    setsid();
    sigemptyset(&none);
    sigprocmask(SIG_SETMASK, &none, NULL);
    if (null < 0 || dup2(null, 0) < 0)
        _exit(126);
    redirect(name, "out", 1);
    redirect(name, "err", 2);
    for (char *rest = options, *option; (option = strsep(&rest, ",")) != NULL;) {
        int failed = 0;
        if (strcmp(option, "io_flusher") == 0) {
            failed = prctl(PR_SET_IO_FLUSHER, 1, 0, 0, 0);
        } else if (strncmp(option, "fifo=", 5) == 0) {
            struct sched_param param = {.sched_priority = atoi(option + 5)};
            failed = sched_setscheduler(0, SCHED_FIFO, &param);
        } else if (strncmp(option, "stack=", 6) == 0) {
            struct rlimit limit = {strtoul(option + 6, NULL, 10), strtoul(option + 6, NULL, 10)};
            failed = setrlimit(RLIMIT_STACK, &limit);
        } else if (strncmp(option, "oom=", 4) == 0) {
            int file = open("/proc/self/oom_score_adj", O_WRONLY);
            failed = file < 0 || write(file, option + 4, strlen(option + 4)) < 0;
            close(file);
        } else if (strcmp(option, "-") != 0) {
            errno = EINVAL;
            failed = 1;
        }
        if (failed) {
            dprintf(2, "agent: option %s: %s\n", option, strerror(errno));
            _exit(125);
        }
    }
    execvpe(argv[0], argv, env);
    dprintf(2, "agent: %s: %s\n", argv[0], strerror(errno));
    _exit(127);
}

static void run(const char *number, int count, char **words)
{
    struct job *free_job = NULL;
    pid_t pid;

    if (count < 3 || strlen(words[0]) >= NAME_BYTES || strchr(words[0], '/') || job_named(words[0])) {
        say("%s error run%%20wants%%20an%%20unused%%20name,%%20options%%20and%%20a%%20command", number);
        return;
    }
    for (int i = 0; i < JOBS && !free_job; i++)
        if (!jobs[i].pid)
            free_job = &jobs[i];
    if (!free_job) {
        say("%s error too%%20many%%20programs%%20at%%20once", number);
        return;
    }
    pid = fork();
    if (pid == 0)
        become(words[0], words[1], words + 2);
    if (pid < 0) {
        answer_errno(number, "fork");
        return;
    }
    free_job->pid = pid;
    strcpy(free_job->name, words[0]);
    say("%s ok %d", number, pid);
}

static void reap(void)
{
    struct rusage used;
    int status;
    pid_t pid;

    while ((pid = wait4(-1, &status, WNOHANG, &used)) > 0) {
        for (int i = 0; i < JOBS; i++) {
            if (jobs[i].pid != pid)
                continue;
            say("! exit %s %d %d user_ms=%ld system_ms=%ld major_faults=%ld peak_kb=%ld", jobs[i].name, pid, status,
                used.ru_utime.tv_sec * 1000 + used.ru_utime.tv_usec / 1000,
                used.ru_stime.tv_sec * 1000 + used.ru_stime.tv_usec / 1000, used.ru_majflt, used.ru_maxrss);
            jobs[i].pid = 0;
        }
    }
}

/* ---- the other commands ---- */

static void get(const char *number, const char *path)
{
    static char word[3 * TEXT_BYTES + 8];
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    size_t used = 0;
    ssize_t got = 0;

    if (fd < 0) {
        answer_errno(number, path);
        return;
    }
    while (used < sizeof text_buf && (got = read(fd, text_buf + used, sizeof text_buf - used)) > 0)
        used += (size_t)got;
    close(fd);
    if (got < 0) {
        answer_errno(number, path);
        return;
    }
    escape(word, sizeof word, text_buf, used);
    say("%s ok %s", number, word);
}

static void put(const char *number, const char *path, const char *text)
{
    int fd = open(path, O_WRONLY | O_CLOEXEC);

    if (fd < 0 || write(fd, text, strlen(text)) < 0)
        answer_errno(number, path);
    else
        say("%s ok", number);
    close(fd);
}

/* mount TYPE SOURCE TARGET DATA; the target and the folders above it are made where they can be */
static void mount_one(const char *number, char **words)
{
    char path[512];
    bool read_only = strncmp(words[3], "ro,", 3) == 0;

    snprintf(path, sizeof path, "%s", words[2]);
    for (char *slash = path + 1; *slash; slash++) {
        if (*slash != '/')
            continue;
        *slash = '\0';
        mkdir(path, 0755);
        *slash = '/';
    }
    mkdir(path, 0755);
    if (mount(words[1], words[2], words[0], read_only ? MS_RDONLY : 0, words[3] + (read_only ? 3 : 0)))
        answer_errno(number, words[2]);
    else
        say("%s ok", number);
}

static void set_timer(int timer_fd, long interval_ms)
{
    struct itimerspec when = {{interval_ms / 1000, interval_ms % 1000 * 1000000},
                              {interval_ms / 1000, interval_ms % 1000 * 1000000}};

    timerfd_settime(timer_fd, 0, &when, NULL);
}

static void kill_job(const char *number, const char *name, int signal_number)
{
    struct job *job = job_named(name);

    /* Its whole group: a program that was started here is the leader of one. */
    if (!job) {
        say("%s error no%%20such%%20program", number);
    } else if (kill(-job->pid, signal_number)) {
        answer_errno(number, name);
    } else {
        say("%s ok", number);
    }
}

static void command(char *line, int timer_fd)
{
    char *words[WORDS + 1], *rest = line, *word;
    int count = 0;

    while (count < WORDS && (word = strsep(&rest, " ")) != NULL)
        words[count++] = word;
    words[count] = NULL;
    for (int i = 0; i < count; i++)
        unescape(words[i]);
    if (count < 2)
        return;
    if (rest)
        say("%s error too%%20many%%20words", words[0]);
    else if (strcmp(words[1], "run") == 0)
        run(words[0], count - 2, words + 2);
    else if (strcmp(words[1], "get") == 0 && count == 3)
        get(words[0], words[2]);
    else if (strcmp(words[1], "put") == 0 && count == 4)
        put(words[0], words[2], words[3]);
    else if (strcmp(words[1], "mount") == 0 && count == 6)
        mount_one(words[0], words + 2);
    else if (strcmp(words[1], "kill") == 0 && count == 4)
        kill_job(words[0], words[2], atoi(words[3]));
    else if (strcmp(words[1], "signal") == 0 && count == 4) /* without a fork: there may be no memory */
        say("%s %s", words[0], kill(atoi(words[2]), atoi(words[3])) ? "error signal" : "ok");
    else if (strcmp(words[1], "sysrq") == 0 && count == 3)
        say("%s %s", words[0], write(sysrq_fd, words[2], 1) == 1 ? "ok" : "error sysrq");
    else if (strcmp(words[1], "sample") == 0 && count == 3) {
        set_timer(timer_fd, atol(words[2]));
        say("%s ok", words[0]);
    } else if (strcmp(words[1], "off") == 0) {
        sync();
        say("%s ok", words[0]);
        tcdrain(line_fd);
        reboot(RB_POWER_OFF);
    } else
        say("%s error unknown%%20command", words[0]);
}

static void take_input(int timer_fd)
{
    ssize_t got = read(line_fd, in_buf + in_used, sizeof in_buf - in_used);
    char *end;

    if (got <= 0 && errno != EINTR && errno != EAGAIN)
        reboot(RB_POWER_OFF); /* the harness is gone */
    if (got > 0)
        in_used += (size_t)got;
    while ((end = memchr(in_buf, '\n', in_used)) != NULL) {
        size_t length = (size_t)(end - in_buf);
        memcpy(word_buf, in_buf, length);
        word_buf[length] = '\0';
        in_used -= length + 1;
        memmove(in_buf, end + 1, in_used);
        command(word_buf, timer_fd);
    }
    if (in_used == sizeof in_buf)
        in_used = 0; /* a line beyond the bound */
}

static int open_line(void)
{
    struct termios raw;
    int fd = open("/dev/ttyS0", O_RDWR | O_NOCTTY | O_CLOEXEC);

    if (fd < 0 || tcgetattr(fd, &raw))
        return -1;
    cfmakeraw(&raw);
    return tcsetattr(fd, TCSANOW, &raw) ? -1 : fd;
}

int main(void)
{
    sigset_t child;
    int signal_fd, timer_fd;

    if (mlockall(MCL_CURRENT | MCL_FUTURE))
        perror("agent: mlockall");
    mount("proc", "/proc", "proc", 0, NULL);
    mount("sysfs", "/sys", "sysfs", 0, NULL);
    mount("devtmpfs", "/dev", "devtmpfs", 0, NULL); /* harmless when the kernel has done it */
    sigemptyset(&child);
    sigaddset(&child, SIGCHLD);
    sigprocmask(SIG_BLOCK, &child, NULL);
    signal(SIGPIPE, SIG_IGN);
    signal_fd = signalfd(-1, &child, SFD_CLOEXEC);
    timer_fd = timerfd_create(CLOCK_MONOTONIC, TFD_CLOEXEC);
    vmstat_fd = open("/proc/vmstat", O_RDONLY | O_CLOEXEC);
    meminfo_fd = open("/proc/meminfo", O_RDONLY | O_CLOEXEC);
    sysrq_fd = open("/proc/sysrq-trigger", O_WRONLY | O_CLOEXEC);
    line_fd = open_line();
    if (line_fd < 0 || vmstat_fd < 0 || meminfo_fd < 0 || signal_fd < 0 || timer_fd < 0) {
        perror("agent: cannot start");
        reboot(RB_POWER_OFF);
    }
    say("! ready %llu", (unsigned long long)now_ms());
    for (;;) {
        struct pollfd fds[3] = {{line_fd, POLLIN, 0}, {signal_fd, POLLIN, 0}, {timer_fd, POLLIN, 0}};
        struct signalfd_siginfo info;
        uint64_t ticks;

        poll(fds, 3, -1);
        if (fds[1].revents && read(signal_fd, &info, sizeof info) > 0)
            reap();
        if (fds[2].revents && read(timer_fd, &ticks, sizeof ticks) > 0)
            sample();
        if (fds[0].revents)
            take_input(timer_fd);
    }
}
