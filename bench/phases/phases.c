// SPDX-License-Identifier: Apache-2.0
// Indirect calls whose targets follow a distribution that is changed while they run.
//
// Usage: phases THREADS. Prints "ready". Each line on standard input is a command:
//   go NAME      calls follow the distribution NAME from now on; prints "ok"
//   snap         prints "CALLS CPU_NANOSECONDS" of all threads so far
//   result       prints how many calls went to another function than they should: 0
// Ends at the end of its input.
#define _GNU_SOURCE
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

enum { TARGETS = 32, PERIOD = 4096, BATCH = PERIOD, MAX_THREADS = 16 };

typedef uint64_t target(uint64_t);

// Different constants, so that no two are folded into one, and a wrong one shows.
#define DEFINE(n) __attribute__((noinline)) static uint64_t f##n(uint64_t x) { return (x ^ n) * 5 + n; }
#define EACH(X)                                                                               \
	X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15) \
	X(16) X(17) X(18) X(19) X(20) X(21) X(22) X(23) X(24) X(25) X(26) X(27) X(28) X(29)   \
	X(30) X(31)
EACH(DEFINE)
#define NAME(n) f##n,
static target *volatile const functions[TARGETS] = { EACH(NAME) };

struct distribution {
	const char *name;
	int alternates;            // in turn instead of at random
	unsigned weights[TARGETS]; // of any sum
};

static const struct distribution distributions[] = {
	{ "one", 0, { [0] = 95, [1] = 5 } },
	{ "other", 0, { [8] = 95, [9] = 5 } },
	{ "weights", 0, { [0] = 5, [1] = 95 } },
	{ "many", 0, { [0] = 40, [1] = 20, [2] = 10, [3] = 10, [4] = 5, [5] = 5, [6] = 5, [7] = 5 } },
	{ "turned", 0, { [0] = 5, [1] = 5, [2] = 5, [3] = 5, [4] = 10, [5] = 10, [6] = 20, [7] = 40 } },
	{ "two", 1, { [3] = 1, [4] = 1 } },
	{ "three", 0, { [3] = 34, [4] = 33, [5] = 33 } },
};
enum { DISTRIBUTIONS = sizeof(distributions) / sizeof(*distributions) };

static unsigned char orders[DISTRIBUTIONS][PERIOD];
static _Atomic(const unsigned char *) order;

struct worker {
	_Alignas(128) _Atomic uint64_t calls;
	_Atomic uint64_t cpu_ns, wrong;
	pthread_t thread;
};
static struct worker workers[MAX_THREADS];

static uint64_t expected(unsigned n, uint64_t x)
{
	return (x ^ n) * 5 + n;
}

__attribute__((noinline)) static uint64_t run(const unsigned char *now, uint64_t x)
{
	for (int i = 0; i < PERIOD; i++)
		x = functions[now[i]](x);
	return x;
}

static uint64_t cpu_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
	return (uint64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static void *work(void *argument)
{
	struct worker *self = argument;
	for (uint64_t round = 0, x = 1;; round++) {
		const unsigned char *now = atomic_load_explicit(&order, memory_order_acquire);
		uint64_t y = run(now, x);
		if (round % 64 == 0) {
			uint64_t z = x;
			for (int i = 0; i < PERIOD; i++)
				z = expected(now[i], z);
			if (z != y)
				atomic_fetch_add(&self->wrong, 1);
		}
		x = y;
		atomic_fetch_add_explicit(&self->calls, BATCH, memory_order_relaxed);
		if (round % 16 == 0)
			atomic_store_explicit(&self->cpu_ns, cpu_ns(), memory_order_relaxed);
	}
	return NULL;
}

static void fill(void)
{
	uint64_t state = 88172645463325252u;
	for (int d = 0; d < DISTRIBUTIONS; d++) {
		const struct distribution *from = &distributions[d];
		unsigned total = 0, used = 0, ids[TARGETS];
		for (int i = 0; i < TARGETS; i++) {
			total += from->weights[i];
			if (from->weights[i])
				ids[used++] = i;
		}
		for (int i = 0; i < PERIOD; i++) {
			state ^= state << 13, state ^= state >> 7, state ^= state << 17;
			unsigned left = state % total, pick = 0;
			while (left >= from->weights[pick])
				left -= from->weights[pick++];
			orders[d][i] = from->alternates ? ids[i % used] : pick;
		}
	}
}

int main(int argc, char **argv)
{
	int threads = argc > 1 ? atoi(argv[1]) : 0;
	if (threads < 1 || threads > MAX_THREADS) {
		fprintf(stderr, "usage: phases THREADS (1 to %d)\n", MAX_THREADS);
		return 2;
	}
	setvbuf(stdout, NULL, _IOLBF, 0);
	fill();
	atomic_store(&order, orders[0]);
	for (int i = 0; i < threads; i++)
		if (pthread_create(&workers[i].thread, NULL, work, &workers[i]))
			return 1;
	puts("ready");
	char line[64];
	while (fgets(line, sizeof line, stdin)) {
		line[strcspn(line, "\n")] = 0;
		if (!strcmp(line, "snap")) {
			uint64_t calls = 0, cpu = 0;
			for (int i = 0; i < threads; i++) {
				calls += atomic_load(&workers[i].calls);
				cpu += atomic_load(&workers[i].cpu_ns);
			}
			printf("%llu %llu\n", (unsigned long long)calls, (unsigned long long)cpu);
		} else if (!strcmp(line, "result")) {
			uint64_t wrong = 0;
			for (int i = 0; i < threads; i++)
				wrong += atomic_load(&workers[i].wrong);
			printf("%llu\n", (unsigned long long)wrong);
		} else if (!strncmp(line, "go ", 3)) {
			int d = 0;
			while (d < DISTRIBUTIONS && strcmp(distributions[d].name, line + 3))
				d++;
			if (d < DISTRIBUTIONS)
				atomic_store_explicit(&order, orders[d], memory_order_release);
			puts(d < DISTRIBUTIONS ? "ok" : "no such distribution");
		} else {
			puts("unknown command");
		}
	}
	return 0;
}
