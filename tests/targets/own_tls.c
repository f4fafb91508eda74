// SPDX-License-Identifier: Apache-2.0
// A thread that no C library has made, with a page of its own behind %fs: what lies where others
// have their restartable sequences registered is unmapped. It sleeps for 5 ms, branches indirectly,
// and so on, while a thread of the C library branches all the time.
// Prints "ready"; at the end of its input "wrong N rounds M", M rounds of that thread's own.
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { PAGE = 4096, STACK = 1 << 16 };

typedef uint64_t (*function)(uint64_t);
static __attribute__((noinline)) uint64_t f0(uint64_t x) { return x * 3 + 1; }
static __attribute__((noinline)) uint64_t f1(uint64_t x) { return x * 5 + 2; }
static const function functions[2] = {f0, f1};
static volatile uint64_t wrong, rounds;

static void branch(unsigned n) {
    uint64_t x = n;
    for (unsigned i = 0; i < n; i++) {
        uint64_t y = functions[i & 1](x);
        if (y != (i & 1 ? x * 5 + 2 : x * 3 + 1)) wrong++;
        x = y;
    }
}

static void *work(void *unused) {
    for (;;) branch(4096);
    return unused;
}

// Calls nothing of the C library: that would look for its own behind %fs.
static int work_alone(void *unused) {
    struct timespec pause = {0, 5000000};
    (void)unused;
    for (;;) {
        long result;
        asm volatile("syscall" : "=a"(result) : "0"(SYS_nanosleep), "D"(&pause), "S"(0)
                     : "rcx", "r11", "memory");
        branch(64);
        rounds++;
    }
}

int main(void) {
    int flags = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM;
    int prot = PROT_READ | PROT_WRITE, anonymous = MAP_PRIVATE | MAP_ANONYMOUS;
    char *stack = mmap(NULL, STACK, prot, anonymous, -1, 0);
    char *page = mmap(NULL, 2 * PAGE, prot, anonymous, -1, 0);
    char *own = page + PAGE / 2, line[8];
    pthread_t thread;
    munmap(page + PAGE, PAGE);
    *(char **)own = own;
    pthread_create(&thread, NULL, work, NULL);
    if (clone(work_alone, stack + STACK, flags | CLONE_SETTLS, NULL, NULL, own, NULL) < 0) return 3;
    printf("ready\n");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) continue;
    printf("wrong %lu rounds %lu\n", wrong, rounds);
    fflush(stdout);
    _exit(wrong != 0 || !rounds);
}
