// SPDX-License-Identifier: Apache-2.0
// A program that shares its memory with another process, or loads and unloads a module over
// and over, while it branches indirectly and checks every result.
// Usage: kin clone | kin orphan | kin sibling | kin reload MODULE. The child is one's own, or
// one whose parent has exited, or one's parent's. Prints "ready" and "child N"; answers each
// line on standard input with "rounds N child N": rounds of its own and of the child, or
// of the module. At its end prints "wrong N rounds N"; it exits with 1 if N wrong is not 0.
// The line "leave" makes it exit at once and leave the child alone, which ends after "wrong N
// rounds N" when its standard input is closed.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <poll.h>
#include <sched.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/wait.h>
#include <unistd.h>

typedef uint64_t (*function)(uint64_t);
#define F(n) \
    static __attribute__((noinline)) uint64_t f##n(uint64_t x) { return x * (2 * n + 3) + n; }
F(0) F(1) F(2) F(3)
static const function functions[4] = {f0, f1, f2, f3};
static volatile uint64_t rounds, kin_rounds, wrong;
static volatile int stopping, is_left, is_over;

static void churn(volatile uint64_t *count) {
    uint64_t x = *count;
    for (unsigned i = 0; i < 4096; i++) {
        unsigned k = (i & 31) == 31 ? (i >> 5) & 3 : (i & 1) * 3;
        uint64_t y = functions[k](x);
        if (y != x * (2 * k + 3) + k) __atomic_add_fetch(&wrong, 1, __ATOMIC_RELAXED);
        x = y;
    }
    ++*count;
}

static void say(const char *format, uint64_t a, uint64_t b) {
    char line[128];
    int n = snprintf(line, sizeof line, format, (unsigned long)a, (unsigned long)b);
    if (write(1, line, (size_t)n) != n) _exit(3);
}

static void *work(void *unused) {
    while (!stopping) churn(&rounds);
    return unused;
}

// Runs in the parent's memory, with a stack of its own.
static int run_child(void *unused) {
    struct pollfd closed = {0, POLLIN, 0};
    (void)unused;
    while (!stopping) {
        churn(&kin_rounds);
        if (is_left && poll(&closed, 1, 0)) {
            say("wrong %lu rounds %lu\n", wrong, kin_rounds);
            _exit(wrong != 0);
        }
    }
    is_over = 1;
    _exit(0);
}

// A stack like a thread's, above a guard page.
static char *make_stack(void) {
    size_t size = 1 << 16, guard = 4096;
    char *stack = mmap(NULL, guard + size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mprotect(stack + guard, size, PROT_READ | PROT_WRITE)) _exit(3);
    return stack + guard + size;
}

// Starts the child and exits.
static int run_middle(void *child) {
    *(volatile pid_t *)child = clone(run_child, make_stack(), CLONE_VM | SIGCHLD, NULL);
    _exit(0);
}

static void *reload(void *path) {
    while (!stopping) {
        void *module = dlopen(path, RTLD_NOW);
        function run = module ? (function)(uintptr_t)dlsym(module, "plugin_work") : NULL;
        if (!run || run(256)) wrong++;
        if (module) dlclose(module);
        kin_rounds++;
    }
    return NULL;
}

int main(int argc, char **argv) {
    pthread_t thread, reloader;
    static volatile pid_t child;
    int is_own = argc > 1 && !strcmp(argv[1], "clone");
    int is_reload = argc > 2 && !strcmp(argv[1], "reload"), status = 0;
    pthread_create(&thread, NULL, work, NULL);
    say("ready\n", 0, 0);
    if (is_reload) {
        pthread_create(&reloader, NULL, reload, argv[2]);
    } else {
        int is_orphan = argc > 1 && !strcmp(argv[1], "orphan");
        if (is_orphan) {
            pid_t middle = clone(run_middle, make_stack(), CLONE_VM | SIGCHLD, (void *)&child);
            if (waitpid(middle, &status, 0) != middle || status) wrong++;
        } else {
            child = clone(run_child, make_stack(), CLONE_VM | (is_own ? 0 : CLONE_PARENT) | SIGCHLD, NULL);
        }
        say("child %lu\n", (uint64_t)child, 0);
    }
    char line[64];
    ssize_t n;
    while ((n = read(0, line, sizeof line - 1)) > 0) {
        line[n] = 0;
        if (!strncmp(line, "leave", 5)) {
            is_left = 1;
            say("left %lu of %lu\n", (uint64_t)child, rounds);
            _exit(0);
        }
        say("rounds %lu child %lu\n", rounds, kin_rounds);
    }
    stopping = 1;
    pthread_join(thread, NULL);
    if (is_reload) pthread_join(reloader, NULL);
    else if (is_own && (waitpid(child, &status, 0) != child || status)) wrong++;
    else while (!is_over) usleep(1000);
    say("wrong %lu rounds %lu\n", wrong, rounds);
    return wrong != 0;
}
