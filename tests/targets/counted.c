// SPDX-License-Identifier: Apache-2.0
// Threads that make an exact number of indirect calls and jumps when they are told to.
// Usage: counted THREADS HOW. Prints "ready"; on a line N on standard input each thread
// calls N times through `by_call` and N times through `by_jump`, each through a pointer that
// keeps changing between 12; then it prints "done CALLS JUMPS", all threads' together. On a line
// "targets" it prints "made N0 .. N11 X": how many calls went to f0 .. f11 (as many jumps), and
// what all threads have computed so far.
// HOW: quiet; migrate (every thread is sent to another CPU each millisecond); signals (every
// thread takes a signal each millisecond, whose handler calls and jumps as well); both.
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef uint64_t (*function)(uint64_t);
#define F(n) \
    static __attribute__((noinline)) uint64_t f##n(uint64_t x) { return x * (2 * n + 3) + n; }
#define N_FUNCTIONS 12
F(0) F(1) F(2) F(3) F(4) F(5) F(6) F(7) F(8) F(9) F(10) F(11)
static function const functions[N_FUNCTIONS] = {
    f0, f1, f2, f3, f4, f5, f6, f7, f8, f9, f10, f11};
static volatile unsigned n_functions = N_FUNCTIONS;

#define MAX_THREADS 16
static int n_threads, n_cpus;
static unsigned long rounds;
static atomic_ulong extra;
static pthread_mutex_t disturbing = PTHREAD_MUTEX_INITIALIZER;
static int working;
static pthread_t threads[MAX_THREADS];
static pthread_barrier_t begin, end;
static volatile uint64_t sink;
static unsigned long made[MAX_THREADS][N_FUNCTIONS];
static uint64_t results[MAX_THREADS];

__attribute__((noinline)) uint64_t by_call(uint64_t x, unsigned k) {
    return functions[k](x) ^ k;
}

__attribute__((noinline)) uint64_t by_jump(uint64_t x, unsigned k) {
    return functions[k](x);
}

static void on_signal(int sig) {
    (void)sig;
    unsigned long n = atomic_fetch_add(&extra, 1);
    sink = by_jump(by_call(n, n % n_functions), (n + 1) % n_functions);
}

static void *work(void *arg) {
    uint64_t x = (uintptr_t)arg + 1;
    for (;;) {
        unsigned long here[N_FUNCTIONS] = {0};
        pthread_barrier_wait(&begin);
        for (unsigned long i = 0; i < rounds; i++) {
            // Three of four go to one of two, the rest to any.
            unsigned k = x >> 60;
            k = k < 12 ? k & 1 : (x >> 50) % n_functions;
            here[k]++;
            x = x * 6364136223846793005u + 1442695040888963407u;
            x ^= by_call(x, k) & 1;
            x ^= by_jump(x, k) & 1;
        }
        results[(uintptr_t)arg] = x;
        memcpy(made[(uintptr_t)arg], here, sizeof(here));
        pthread_barrier_wait(&end);
        // Two more: who comes to the second has taken what signals there were at the first.
        pthread_barrier_wait(&end);
        pthread_barrier_wait(&end);
    }
    return NULL;
}

static void *disturb(void *arg) {
    const char *how = arg;
    for (unsigned long turn = 0;; turn++) {
        usleep(1000);
        pthread_mutex_lock(&disturbing);
        for (int i = 0; i < n_threads && working; i++) {
            if (strcmp(how, "signals")) {
                cpu_set_t cpus;
                CPU_ZERO(&cpus);
                CPU_SET((turn + i) % n_cpus, &cpus);
                pthread_setaffinity_np(threads[i], sizeof(cpus), &cpus);
            }
            if (strcmp(how, "migrate"))
                pthread_kill(threads[i], SIGUSR1);
        }
        pthread_mutex_unlock(&disturbing);
    }
    return NULL;
}

static void set_working(int is_working) {
    pthread_mutex_lock(&disturbing);
    working = is_working;
    pthread_mutex_unlock(&disturbing);
}

int main(int argc, char **argv) {
    if (argc < 3 || (n_threads = atoi(argv[1])) < 1 || n_threads > MAX_THREADS) return 2;
    n_cpus = sysconf(_SC_NPROCESSORS_ONLN);
    struct sigaction action = {.sa_handler = on_signal, .sa_flags = SA_RESTART};
    sigaction(SIGUSR1, &action, NULL);
    pthread_barrier_init(&begin, NULL, n_threads + 1);
    pthread_barrier_init(&end, NULL, n_threads + 1);
    for (int i = 0; i < n_threads; i++)
        pthread_create(&threads[i], NULL, work, (void *)(uintptr_t)i);
    if (strcmp(argv[2], "quiet")) {
        pthread_t disturber;
        pthread_create(&disturber, NULL, disturb, argv[2]);
    }
    printf("ready\n");
    fflush(stdout);
    char line[64];
    while (fgets(line, sizeof(line), stdin)) {
        if (!strncmp(line, "targets", 7)) {
            printf("made");
            for (int k = 0; k < N_FUNCTIONS; k++) {
                unsigned long all = 0;
                for (int i = 0; i < n_threads; i++) all += made[i][k];
                printf(" %lu", all);
            }
            uint64_t result = 0;
            for (int i = 0; i < n_threads; i++) result = result * 31 + results[i];
            printf(" %lu\n", result);
            fflush(stdout);
            continue;
        }
        rounds = strtoul(line, NULL, 10);
        atomic_store(&extra, 0);
        set_working(1);
        pthread_barrier_wait(&begin);
        pthread_barrier_wait(&end);
        set_working(0);
        pthread_barrier_wait(&end);
        pthread_barrier_wait(&end);
        unsigned long all = rounds * n_threads + atomic_load(&extra);
        printf("done %lu %lu\n", all, all);
        fflush(stdout);
    }
    return 0;
}
