// SPDX-License-Identifier: Apache-2.0
// Under a seccomp filter that kills who calls restart_syscall, which nobody but the kernel does:
// to go on with a nap that was interrupted. One thread runs sites, three run some between naps
// of a millisecond, and the first naps until there is a line on standard input. Prints "ready",
// at its end "wrong N".
#define _GNU_SOURCE
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

typedef uint64_t (*function)(uint64_t);
static __attribute__((noinline)) uint64_t triple(uint64_t x) { return x * 3 + 1; }
static __attribute__((noinline)) uint64_t negate(uint64_t x) { return ~x; }
static __attribute__((noinline)) uint64_t plain(function f, uint64_t x) { return f(x) + 1; }

static volatile uint64_t wrong;
static void once(uint64_t x) {
    for (int i = 0; i < 1000; i++) {
        function f = i & 3 ? triple : negate;
        uint64_t y = x + (uint64_t)i;
        if (plain(f, y) != (i & 3 ? y * 3 + 1 : ~y) + 1) wrong++;
    }
}

static void *work(void *unused) {
    for (uint64_t x = 1;; x++) once(x);
    return unused;
}

static void *nap(void *unused) {
    for (uint64_t x = 1;; x++) poll(NULL, 0, 1), once(x);
    return unused;
}

int main(int argc, char **argv) {
    struct sock_filter code[] = {
        BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_restart_syscall, 0, 1),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
        BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
    };
    struct sock_fprog filter = {4, code};
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)) return 2;
    if (prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &filter)) return 2;
    setvbuf(stdout, NULL, _IOLBF, 0);
    pthread_t thread;
    int is_alone = argc > 1 && !strcmp(argv[1], "alone");
    for (int i = 0; i < 4 && !is_alone; i++) pthread_create(&thread, NULL, i ? nap : work, NULL);
    puts("ready");
    struct pollfd in = {0, POLLIN, 0};
    for (uint64_t x = 1; poll(&in, 1, 50) == 0; x++) once(x);
    printf("wrong %lu\n", (unsigned long)wrong);
    _exit(0);
}
