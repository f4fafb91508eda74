// SPDX-License-Identifier: Apache-2.0
// Many threads, all asleep or all busy with retpolined calls.
//
// threads idle N: N threads wait for the end; nothing runs but what answers.
// threads spin N: N threads call through changing pointers, checking each result; at a low
// priority, to leave the machine usable.
//
// Prints "ready" when all threads are there and busy. The line "gap" on standard input is answered with
// the longest time during which no thread got on, since the last such line, and how often a
// result was wrong: "gap_ns=N wrong=N rounds=N"; ends when standard input is closed.
#define _GNU_SOURCE
#include <limits.h>
#include <linux/futex.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define STACK_SIZE (64 << 10)
#define NICE 10

static atomic_long last_ns, gap_ns, n_wrong, n_rounds, n_there, n_busy;
static atomic_int is_open;
static int never[2];

static long now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000L + t.tv_nsec;
}

typedef uint64_t (*function)(uint64_t);
static __attribute__((noinline)) uint64_t triple(uint64_t x) { return x * 3 + 1; }
static __attribute__((noinline)) uint64_t negate(uint64_t x) { return ~x; }
static __attribute__((noinline)) uint64_t turn(uint64_t x) { return x << 7 | x >> 57; }
static volatile function functions[] = {triple, negate, turn};

static void *spin(void *arg)
{
	uint64_t x = (uintptr_t)arg;
	atomic_fetch_add(&n_there, 1);
	// Until all are there: thousands of busy ones would keep the rest from being made.
	while (!atomic_load(&is_open))
		syscall(SYS_futex, &is_open, FUTEX_WAIT_PRIVATE, 0, NULL, NULL, 0);
	atomic_fetch_add(&n_busy, 1);
	for (;;) {
		for (unsigned i = 0; i < 256; i++) {
			unsigned which = x % 7 < 4 ? 0 : x % 7 < 6 ? 1 : 2;
			uint64_t y = which == 0 ? x * 3 + 1 : which == 1 ? ~x : x << 7 | x >> 57;
			x = functions[which](x);
			if (x != y)
				atomic_fetch_add(&n_wrong, 1);
		}
		atomic_fetch_add(&n_rounds, 1);
		// Whoever comes first after a stop sees how long nobody came. One that lost its
		// CPU after it looked at the clock is behind the others, and says nothing.
		long now = now_ns(), last = atomic_load(&last_ns);
		while (last < now && !atomic_compare_exchange_weak(&last_ns, &last, now))
			;
		long gap = now - last, longest = atomic_load(&gap_ns);
		while (gap > longest && !atomic_compare_exchange_weak(&gap_ns, &longest, gap))
			;
	}
	return NULL;
}

static void *sleep_on(void *arg)
{
	char byte;
	(void)arg;
	atomic_fetch_add(&n_there, 1);
	return read(never[0], &byte, 1) ? NULL : NULL;
}

int main(int argc, char **argv)
{
	if (argc != 3 || pipe(never))
		return 2;
	int is_idle = !strcmp(argv[1], "idle");
	long n_threads = atol(argv[2]);
	pthread_attr_t attr;
	pthread_attr_init(&attr);
	pthread_attr_setstacksize(&attr, STACK_SIZE);
	// The first thread keeps its priority, so that it can answer.
	pid_t first = gettid();
	setpriority(PRIO_PROCESS, first, NICE);
	for (long i = 0; i < n_threads; i++) {
		pthread_t thread;
		if (pthread_create(&thread, &attr, is_idle ? sleep_on : spin, (void *)(i + 1))) {
			perror("pthread_create");
			_exit(3);
		}
	}
	setpriority(PRIO_PROCESS, first, 0);
	while (atomic_load(&n_there) < n_threads)
		usleep(1000);
	atomic_store(&last_ns, now_ns());
	atomic_store(&is_open, 1);
	syscall(SYS_futex, &is_open, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
	while (!is_idle && atomic_load(&n_busy) < n_threads)
		usleep(1000);
	printf("ready\n");
	fflush(stdout);
	char line[16];
	while (fgets(line, sizeof line, stdin)) {
		printf("gap_ns=%ld wrong=%ld rounds=%ld\n", atomic_exchange(&gap_ns, 0), n_wrong,
		       n_rounds);
		fflush(stdout);
	}
	_exit(0);
}
