// SPDX-License-Identifier: Apache-2.0
// A ring of io_uring with a kernel worker, which is a thread of this process to look at.
// Usage: workers busy|idle|async run|wait. The worker polls the submission queue ("busy"), sleeps
// until it is woken for that ("idle"), or sleeps in a read of a pipe that nobody writes to
// ("async"). Prints "ready". The first thread then calls functions through sites ("run"), or sleeps
// in io_uring_enter ("wait"), until standard input ends. Prints "wrong N rounds N" at the end.
// The line "leave" lets every thread exit but the worker.
#define _GNU_SOURCE
#include <linux/io_uring.h>
#include <poll.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef uint64_t (*function)(uint64_t);
static __attribute__((noinline)) uint64_t triple(uint64_t x) { return x * 3 + 1; }
static __attribute__((noinline)) uint64_t negate(uint64_t x) { return ~x; }
static __attribute__((noinline)) uint64_t call(function f, uint64_t x) { return f(x) + 1; }

static uint64_t rounds, wrong;
static volatile int stopping, leaving;

static void run_once(void) {
    uint64_t x = rounds;
    for (unsigned i = 0; i < 1024; i++) {
        uint64_t y = i & 3 ? x * 3 + 1 : ~x;
        wrong += call(i & 3 ? triple : negate, x) != y + 1;
        x = y;
    }
    rounds++;
}

static void *read_lines(void *unused) {
    char line[64];
    while (fgets(line, sizeof line, stdin))
        if (!strcmp(line, "leave\n")) leaving = 1, syscall(SYS_exit, 0);
    stopping = 1;
    return unused;
}

static struct io_uring_params params;
static struct io_uring_sqe *entries;
static char *rings;
static int ring;

static void set_up(unsigned flags, unsigned idle_ms) {
    params.flags = flags;
    params.sq_thread_idle = idle_ms;
    ring = (int)syscall(SYS_io_uring_setup, 4, &params);
    size_t size = params.cq_off.cqes + params.cq_entries * sizeof(struct io_uring_cqe);
    const int protection = PROT_READ | PROT_WRITE;
    rings = mmap(NULL, size, protection, MAP_SHARED, ring, IORING_OFF_SQ_RING);
    size = params.sq_entries * sizeof *entries;
    entries = mmap(NULL, size, protection, MAP_SHARED, ring, IORING_OFF_SQES);
    if (ring < 0 || rings == MAP_FAILED || entries == MAP_FAILED) perror("io_uring"), exit(2);
}

static unsigned *word(unsigned offset) { return (unsigned *)(rings + offset); }

static void submit(struct io_uring_sqe entry) {
    unsigned *tail = word(params.sq_off.tail), at = *tail & *word(params.sq_off.ring_mask);
    entries[at] = entry;
    word(params.sq_off.array)[at] = at;
    __atomic_store_n(tail, *tail + 1, __ATOMIC_SEQ_CST);
    unsigned flags = params.flags & IORING_SETUP_SQPOLL ? IORING_ENTER_SQ_WAKEUP : 0;
    if (syscall(SYS_io_uring_enter, ring, 1, 0, flags, NULL, 0) != 1) wrong++;
}

static void wait_for_completion(void) {
    unsigned *head = word(params.cq_off.head), *tail = word(params.cq_off.tail);
    if (syscall(SYS_io_uring_enter, ring, 0, 1, IORING_ENTER_GETEVENTS, NULL, 0)) wrong++;
    if (__atomic_load_n(tail, __ATOMIC_ACQUIRE) != *head + 1) wrong++;
    __atomic_store_n(head, *head + 1, __ATOMIC_RELEASE);
}

int main(int argc, char **argv) {
    static char data[8];
    int ends[2];
    if (argc != 3 || pipe(ends)) return 2;
    if (strcmp(argv[1], "async")) {
        set_up(IORING_SETUP_SQPOLL, strcmp(argv[1], "busy") ? 1 : 3600000);
        submit((struct io_uring_sqe){.opcode = IORING_OP_NOP});  // it polls from the first one on
        wait_for_completion();
    } else {
        set_up(0, 0);
        submit((struct io_uring_sqe){.opcode = IORING_OP_READ, .flags = IOSQE_ASYNC, .fd = ends[0],
                                     .addr = (uintptr_t)data, .len = sizeof data});
    }
    setvbuf(stdout, NULL, _IOLBF, 0);
    pthread_t reader;
    int runs = !strcmp(argv[2], "run");
    if (runs) pthread_create(&reader, NULL, read_lines, NULL);
    puts("ready");
    if (runs) {
        while (!stopping && !leaving) run_once();
        if (leaving) syscall(SYS_exit, 0);
        pthread_join(reader, NULL);
    } else {
        submit((struct io_uring_sqe){.opcode = IORING_OP_POLL_ADD, .fd = 0, .poll32_events = POLLIN});
        wait_for_completion();
        run_once();
    }
    printf("wrong %lu rounds %lu\n", (unsigned long)wrong, (unsigned long)rounds);
    return wrong != 0;
}
