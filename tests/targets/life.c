// SPDX-License-Identifier: Apache-2.0
// A program that lives: it forks, executes, loads modules, makes threads, takes signals and
// sleeps, while threads branch indirectly and check every result.
// Usage: life MODE [N]. Prints "ready", answers each line on standard input with one line, and
// at its end prints "wrong N rounds N"; it exits with 1 if N wrong is not 0.
// Modes (what N threads do beside the checking): spin, nanosleep, poll, epoll, short (make
// threads that end at once), spawn (posix_spawn and vfork), timer (SIGALRM at 1 kHz with a
// handler that branches too), jump (the same, the handler jumps out), alt (the same, on an
// alternate stack; blocks if told to), context (swapcontext inside a handler), tidy (as timer, but
// signal frames are wiped off the stack soon), armed (the same, signals only until one thread
// is where it shall block), rest (nothing).
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <pthread.h>
#include <semaphore.h>
#include <setjmp.h>
#include <signal.h>
#include <spawn.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <sys/wait.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

typedef uint64_t (*function)(uint64_t);
#define F(n) \
    static __attribute__((noinline)) uint64_t f##n(uint64_t x) { return x * (2 * n + 3) + n; }
F(0) F(1) F(2) F(3) F(4) F(5) F(6) F(7)
static const function functions[8] = {f0, f1, f2, f3, f4, f5, f6, f7};
static volatile uint64_t rounds, wrong;
static volatile int stopping;
static const char *mode;
static char **own_argv;
static int epoll;

static void fail(const char *what) {
    __atomic_add_fetch(&wrong, 1, __ATOMIC_RELAXED);
    fprintf(stderr, "life: %s: %s\n", what, strerror(errno));
}

static __attribute__((noinline)) uint64_t tail(function f, uint64_t x) { return f(x ^ 1); }

// A site that is never reached, for those who put breakpoints on sites.
__attribute__((noinline)) uint64_t cold(function f, uint64_t x) { return f(x) + 1; }

// Mostly f0 and f3; a share of others.
static void churn(unsigned n) {
    uint64_t x = (uint64_t)(uintptr_t)&n;
    for (unsigned i = 0; i < n; i++) {
        unsigned k = (i & 31) == 31 ? (i >> 5) & 7 : (i & 1) * 3;
        uint64_t y = functions[k](x);
        if (y != x * (2 * k + 3) + k) __atomic_add_fetch(&wrong, 1, __ATOMIC_RELAXED);
        uint64_t z = tail(functions[k], y);
        if (z != (y ^ 1) * (2 * k + 3) + k) __atomic_add_fetch(&wrong, 1, __ATOMIC_RELAXED);
        x = z;
    }
    __atomic_add_fetch(&rounds, 1, __ATOMIC_RELAXED);
}

// --- signal handlers

static sem_t released;
// Inverted, as they come: an address of a block that is kept would count as a way back into it.
static volatile uintptr_t not_block_start, not_block_end;
static volatile int is_blocked;
static __thread sigjmp_buf jump_buffer;
static __thread volatile int may_jump, was_blocked;
static ucontext_t aside_context, handler_context;
static char aside_stack[65536];

static int is_tidy(void) { return !strcmp(mode, "tidy") || !strcmp(mode, "armed"); }

static void set_timer(long microseconds) {
    struct itimerval every = {{0, microseconds}, {0, microseconds}};
    setitimer(ITIMER_REAL, &every, NULL);
}

// What is left of a signal frame looks like a context that the program keeps.
static __attribute__((noinline)) void wipe_stack(void) {
    volatile char bytes[32768];
    for (size_t i = 0; i < sizeof bytes; i += sizeof(long)) *(volatile long *)&bytes[i] = 0;
}

static void on_alarm(int number, siginfo_t *info, void *context) {
    (void)number, (void)info;
    int saved = errno;
    uintptr_t pc = (uintptr_t)((ucontext_t *)context)->uc_mcontext.gregs[REG_RIP];
    if (~pc <= not_block_start && ~pc > not_block_end && !__atomic_exchange_n(&is_blocked, 1, __ATOMIC_SEQ_CST)) {
        if (!strcmp(mode, "armed")) set_timer(0);
        if (!strcmp(mode, "context"))
            swapcontext(&handler_context, &aside_context);
        else
            while (sem_wait(&released) && errno == EINTR);
        was_blocked = 1;
    }
    churn(16);
    errno = saved;
    if (may_jump && !strcmp(mode, "jump")) siglongjmp(jump_buffer, 1);
}

// Where a thread goes whose handler switched away: it waits here, on another stack.
static void aside(void) {
    while (sem_wait(&released) && errno == EINTR);
    setcontext(&handler_context);
}

static void take_signals(void) {
    static char alternate[65536];
    stack_t stack = {.ss_sp = alternate, .ss_size = sizeof alternate};
    struct sigaction action = {.sa_sigaction = on_alarm, .sa_flags = SA_SIGINFO | SA_RESTART};
    if (!strcmp(mode, "alt")) {
        action.sa_flags |= SA_ONSTACK;
        if (sigaltstack(&stack, NULL)) fail("sigaltstack");
    }
    if (!strcmp(mode, "context")) {
        getcontext(&aside_context);
        aside_context.uc_stack.ss_sp = aside_stack;
        aside_context.uc_stack.ss_size = sizeof aside_stack;
        makecontext(&aside_context, aside, 0);
    }
    if (!strcmp(mode, "jump")) action.sa_flags |= SA_NODEFER;
    sigaction(SIGALRM, &action, NULL);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGALRM);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
    if (strcmp(mode, "armed")) set_timer(1000);
}

// --- what the threads do

static void *churn_once(void *unused) {
    churn(64);
    return unused;
}

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static void sleep_a_while(void) {
    struct timespec t = {0, 30000000};
    struct epoll_event event;
    double begin = now_s();
    int result = 0;
    if (!strcmp(mode, "nanosleep")) result = nanosleep(&t, NULL);
    if (!strcmp(mode, "poll")) result = poll(NULL, 0, 30);
    if (!strcmp(mode, "epoll")) {
        result = epoll_wait(epoll, &event, 1, 30);
    }
    if (result) fail(mode);
    if (now_s() - begin < 0.0299) fail("woke too early");
}

static void run_true(void) {
    pid_t pid;
    int status;
    char *argv[] = {"true", NULL}, *envp[] = {NULL};
    if (posix_spawn(&pid, "/bin/true", NULL, NULL, argv, envp)) fail("posix_spawn");
    else if (waitpid(pid, &status, 0) != pid || status) fail("posix_spawn status");
    pid = vfork();
    if (!pid) {
        churn(64);
        _exit(3);
    }
    if (waitpid(pid, &status, 0) != pid || WEXITSTATUS(status) != 3) fail("vfork status");
}

static void *work(void *unused) {
    int takes_signals = !strcmp(mode, "timer") || !strcmp(mode, "jump") || !strcmp(mode, "alt") ||
                        !strcmp(mode, "context") || is_tidy();
    if (takes_signals) take_signals();
    while (!stopping) {
        if (!strcmp(mode, "jump")) {
            sigsetjmp(jump_buffer, 0);
            may_jump = 1;
        }
        churn(4096);
        may_jump = 0;
        if (is_tidy()) {
            wipe_stack();
            if (was_blocked) was_blocked = is_blocked = 0;
        }
        if (!strcmp(mode, "short")) {
            pthread_t threads[4];
            for (int i = 0; i < 4; i++)
                if (pthread_create(&threads[i], NULL, churn_once, NULL)) fail("pthread_create");
            for (int i = 0; i < 4; i++) pthread_join(threads[i], NULL);
        }
        if (!strcmp(mode, "spawn")) run_true();
        if (!strcmp(mode, "nanosleep") || !strcmp(mode, "poll") || !strcmp(mode, "epoll"))
            sleep_a_while();
    }
    if (takes_signals) set_timer(0);
    return unused;
}

// --- commands

static void *plugin;
static volatile function plugin_work;
static volatile uint64_t plugin_rounds;
static volatile int plugin_stopping;
static pthread_t plugin_thread;

static void *work_in_plugin(void *unused) {
    while (!plugin_stopping) {
        wrong += plugin_work(4096);
        plugin_rounds++;
    }
    return unused;
}

static void open_plugin(const char *path) {
    plugin = dlopen(path, RTLD_NOW);
    if (!plugin) {
        printf("failed %s\n", dlerror());
        return;
    }
    plugin_work = (function)(uintptr_t)dlsym(plugin, "plugin_work");
    plugin_stopping = 0;
    pthread_create(&plugin_thread, NULL, work_in_plugin, NULL);
    printf("opened %p\n", (void *)(uintptr_t)plugin_work);
}

static void close_plugin(void) {
    plugin_stopping = 1;
    pthread_join(plugin_thread, NULL);
    dlclose(plugin);
    puts("closed");
}

// Leave no room within 2 GiB of our text.
static void build_wall(void) {
    uintptr_t here = (uintptr_t)&build_wall, last = 65536, start, end, reach = 0x84000000;
    uintptr_t low = here > reach + last ? here - reach : last, high = here + reach;
    uintptr_t gaps[512][2];
    int n = 0;
    char line[512];
    FILE *maps = fopen("/proc/self/maps", "r");
    while (fgets(line, sizeof line, maps)) {
        if (sscanf(line, "%lx-%lx", &start, &end) != 2) continue;
        uintptr_t a = last > low ? last : low, b = start < high ? start : high;
        if (a < b && n < 512) gaps[n][0] = a & ~4095ul, gaps[n++][1] = b & ~4095ul;
        last = end;
    }
    fclose(maps);
    for (int i = 0; i < n; i++)
        if (mmap((void *)gaps[i][0], gaps[i][1] - gaps[i][0], PROT_NONE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0) == MAP_FAILED)
            printf("no wall at %lx-%lx: %s; ", gaps[i][0], gaps[i][1], strerror(errno));
    printf("wall of %d\n", n);
}

// A child that works until its pipe is closed, and says how it went.
static int child_stdin = -1, child_stdout = -1;
static void fork_child(void) {
    int to[2], from[2];
    if (pipe(to) || pipe(from)) fail("pipe");
    pid_t pid = fork();
    if (!pid) {
        close(to[1]), close(from[0]);
        rounds = wrong = 0;
        struct pollfd closed = {to[0], POLLIN, 0};
        while (poll(&closed, 1, 0) == 0) churn(4096);
        dprintf(from[1], "wrong %lu rounds %lu\n", (unsigned long)wrong, (unsigned long)rounds);
        _exit(wrong != 0);
    }
    close(to[0]), close(from[1]);
    child_stdin = to[1], child_stdout = from[0];
    printf("child %d\n", pid);
}

static void end_child(void) {
    char line[128] = "";
    int status;
    close(child_stdin);
    ssize_t n = read(child_stdout, line, sizeof line - 1);
    close(child_stdout);
    wait(&status);
    printf("status %d %s%s", status, line, n > 0 ? "" : "\n");
}

static void obey(char *line) {
    unsigned long a, b;
    line[strcspn(line, "\n")] = 0;
    if (!strncmp(line, "open ", 5)) open_plugin(line + 5);
    else if (!strcmp(line, "close")) close_plugin();
    else if (!strcmp(line, "wall")) build_wall();
    else if (!strcmp(line, "fork")) fork_child();
    else if (!strcmp(line, "join")) end_child();
    else if (!strcmp(line, "exit")) _exit(7);
    else if (!strcmp(line, "abort")) abort();
    else if (!strcmp(line, "exec")) execv("/proc/self/exe", own_argv);
    else if (sscanf(line, "block %lx %lx", &a, &b) == 2) {
        not_block_end = b, not_block_start = a;
        if (!strcmp(mode, "armed")) set_timer(1000);
        for (int i = 0; i < 5000 && !is_blocked; i++) usleep(1000);
        puts(is_blocked ? "blocked" : "not blocked");
    } else if (!strcmp(line, "release")) {
        not_block_start = not_block_end = 0;
        sem_post(&released);
        while (is_tidy() && is_blocked) usleep(100);
        puts("released");
    } else if (sscanf(line, "mprotect %lx %lx", &a, &b) == 2) {
        int result = mprotect((void *)a, b, PROT_READ | PROT_WRITE);
        printf("mprotect %d %d\n", result, result ? errno : 0);
    } else printf("rounds %lu plugin %lu\n", (unsigned long)rounds, (unsigned long)plugin_rounds);
}

int main(int argc, char **argv) {
    own_argv = argv;
    mode = argc > 1 ? argv[1] : "spin";
    int n_threads = argc > 2 ? atoi(argv[2]) : 1;
    pthread_t threads[64];
    sem_init(&released, 0, 0);
    sigset_t set;
    sigemptyset(&set);
    sigaddset(&set, SIGALRM);
    pthread_sigmask(SIG_BLOCK, &set, NULL);
    if (!strcmp(mode, "epoll")) epoll = epoll_create1(0);
    if (argc > 9) wrong += cold(functions[argc & 7], 0);
    if (!strcmp(mode, "rest")) churn(4096);
    else for (int i = 0; i < n_threads; i++) pthread_create(&threads[i], NULL, work, NULL);
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("ready");
    char line[512];
    while (fgets(line, sizeof line, stdin)) obey(line);
    if (ferror(stdin)) fail("fgets");
    stopping = 1;
    if (strcmp(mode, "rest"))
        for (int i = 0; i < n_threads; i++) pthread_join(threads[i], NULL);
    printf("wrong %lu rounds %lu\n", (unsigned long)wrong, (unsigned long)rounds);
    return wrong != 0;
}
