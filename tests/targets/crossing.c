// SPDX-License-Identifier: Apache-2.0
// Sites whose displacement lies in two cache lines, and one in two pages. Prints "ready";
// from the line "sleep" on standard input until "wake" a thread sleeps in a call that must not
// be interrupted (a write to a full pipe, half done), from "receive" on in a recv() of a socket,
// from "gather" on in one that answers with eight bytes only; at its end "wrong N rounds N".
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef uint64_t (*function)(uint64_t);
static __attribute__((noinline)) uint64_t triple(uint64_t x) { return x * 3 + 1; }
static __attribute__((noinline)) uint64_t negate(uint64_t x) { return ~x; }
static __attribute__((noinline)) uint64_t plain(function f, uint64_t x) { return f(x) + 1; }

// call thunk, OFFSET bytes behind a multiple of ALIGN.
#define CALLER(name, align, offset) \
    uint64_t name(function, uint64_t); \
    __asm__(".text\n.balign " #align "\n.skip " #offset "-7, 0xcc\n" \
            ".globl " #name "\n.type " #name ",@function\n" #name ":\n" \
            "mov %rdi, %rax\nmov %rsi, %rdi\nnop\ncall __x86_indirect_thunk_rax\nret\n" \
            ".size " #name ",.-" #name "\n");
CALLER(in_one_line, 64, 16)
CALLER(over_line_1, 64, 61)
CALLER(over_line_3, 64, 60)
CALLER(over_page, 4096, 4093)

static volatile uint64_t rounds, wrong;
static volatile int stopping;

static void *work(void *unused) {
    static uint64_t (*const callers[])(function, uint64_t) = {in_one_line, over_line_1, over_line_3, over_page};
    uint64_t x = 1;
    while (!stopping) {
        for (unsigned i = 0; i < 1024; i++) {
            function f = i & 3 ? triple : negate;
            uint64_t y = i & 3 ? x * 3 + 1 : ~x;
            for (int c = 0; c < 4; c++) wrong += callers[c](f, x) != y;
            wrong += plain(f, x) != y + 1;
            x = y;
        }
        rounds++;
    }
    return unused;
}

static volatile pid_t sleeper;

static int ends[2];
static char data[1 << 20];
static void *write_all(void *unused) {
    sleeper = gettid();
    for (unsigned i = 0; i < sizeof data; i++) data[i] = (char)(i * 7);
    if (write(ends[1], data, sizeof data) != sizeof data) wrong++;
    return unused;
}

static pthread_t writer;
// Start a thread, and wait until it is asleep in a system call, as the kernel tells it.
static void fall_asleep_in(void *(*start)(void *), long nr) {
    char path[64];
    long in = -1;
    sleeper = 0;
    pthread_create(&writer, NULL, start, NULL);
    while (!sleeper) usleep(100);
    snprintf(path, sizeof path, "/proc/self/task/%d/syscall", (int)sleeper);
    while (in != nr) {
        FILE *file = fopen(path, "r");
        // "running" while it is on a CPU.
        if (!file || fscanf(file, "%ld", &in) != 1) in = -1;
        if (file) fclose(file);
        usleep(100);
    }
}

static void fall_asleep(void) {
    if (pipe(ends)) wrong++;
    fall_asleep_in(write_all, SYS_write);
}

static int sockets[2] = {-1, -1}, least;
static void *receive(void *unused) {
    char got[8];
    sleeper = gettid();
    if (recv(sockets[0], got, sizeof got, 0) != least) wrong++;
    return unused;
}

static void fall_asleep_receiving(int size) {
    least = size;
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, sockets)) wrong++;
    if (setsockopt(sockets[0], SOL_SOCKET, SO_RCVLOWAT, &least, sizeof least)) wrong++;
    if (size > 1 && write(sockets[1], "abc", 3) != 3) wrong++;
    fall_asleep_in(receive, SYS_recvfrom);
}

static void wake_receiver(void) {
    size_t size = least > 1 ? (size_t)least - 3 : 1;
    if (write(sockets[1], "defgh", size) != (ssize_t)size) wrong++;
    pthread_join(writer, NULL);
    close(sockets[0]), close(sockets[1]);
    sockets[0] = -1;
}

static void wake_up(void) {
    if (sockets[0] >= 0) {
        wake_receiver();
        return;
    }
    for (size_t n = 0; n < sizeof data;) {
        char got[4096];
        ssize_t size = read(ends[0], got, sizeof got);
        if (size <= 0 || memcmp(got, data + n, (size_t)size)) wrong++;
        n += (size_t)size;
    }
    pthread_join(writer, NULL);
    close(ends[0]), close(ends[1]);
}

int main(void) {
    pthread_t worker;
    pthread_create(&worker, NULL, work, NULL);
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("ready");
    char line[64];
    while (fgets(line, sizeof line, stdin)) {
        if (!strcmp(line, "sleep\n")) fall_asleep();
        if (!strcmp(line, "receive\n")) fall_asleep_receiving(1);
        if (!strcmp(line, "gather\n")) fall_asleep_receiving(8);
        if (!strcmp(line, "wake\n")) wake_up();
        printf("ok %lu\n", (unsigned long)rounds);
    }
    stopping = 1;
    pthread_join(worker, NULL);
    printf("wrong %lu rounds %lu\n", (unsigned long)wrong, (unsigned long)rounds);
    return wrong != 0;
}
