// SPDX-License-Identifier: Apache-2.0
// Threads that sleep in the kernel most of the time, and check every result between.
//
// sleepers THREADS: thread i sleeps its own way (nanosleep, poll, read from a pipe,
// epoll_wait, futex; every sixth does not sleep) and then branches through changing
// pointers, twice: the second time in arithmetic only. Prints "ready"; answers "counts" and
// "mark", with "idle" for the threads that did nothing since the last mark; ends with
// status 0 when standard input is closed and no result was wrong. Build with -pthread.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#define MAX_THREADS 64
#define N_TARGETS 12
#define N_CALLS 2000
#define MS 1000000L
#define NOIPA __attribute__((noipa))

typedef uint64_t (*target_fn)(uint64_t);

struct worker {
	pthread_t thread;
	int index, bytes[2], epoll;
	_Atomic uint64_t n_rounds;
	uint64_t marked;
};

static struct worker workers[MAX_THREADS];
static int n_workers;
static _Atomic uint64_t n_branches, n_wrong, n_eintr;
static _Atomic int stopping;

#define MULTIPLIER(i) (0x9e3779b97f4a7c15ull + 2 * (uint64_t)(i) * 0x10001)
#define TARGET(i) NOIPA static uint64_t target_##i(uint64_t x) { return x * MULTIPLIER(i) + i; }
TARGET(0) TARGET(1) TARGET(2) TARGET(3) TARGET(4) TARGET(5)
TARGET(6) TARGET(7) TARGET(8) TARGET(9) TARGET(10) TARGET(11)
static const target_fn targets[N_TARGETS] = {
	target_0, target_1, target_2, target_3, target_4, target_5,
	target_6, target_7, target_8, target_9, target_10, target_11,
};

NOIPA static uint64_t call(target_fn target, uint64_t x)
{
	return target(x) ^ 1;
}

NOIPA static uint64_t tail(uint64_t x, target_fn target)
{
	return target(x ^ 2);
}

static void check_calls(struct worker *w)
{
	uint64_t x = w->n_rounds * 12345 + w->index, y = x, r = x | 1;
	for (int n = 0; n < N_CALLS; n++) {
		r = r * 6364136223846793005ull + 1442695040888963407ull;
		int i = __builtin_ctzll(r >> 32 | 1 << 7) + w->n_rounds / 64 % 4;
		if (n & 1) {
			x = call(targets[i], x);
			y = (y * MULTIPLIER(i) + i) ^ 1;
		} else {
			x = tail(x, targets[i]);
			y = (y ^ 2) * MULTIPLIER(i) + i;
		}
	}
	n_branches += N_CALLS;
	n_wrong += x != y;
}

static void sleep_somehow(struct worker *w)
{
	static uint32_t word;
	struct timespec t = { 0, 3 * MS };
	struct pollfd fd = { .fd = w->bytes[0], .events = POLLIN };
	struct epoll_event event;
	char byte;
	long n = 0;
	switch (w->index % 6) {
	case 0:
		return;
	case 1:
		n = nanosleep(&t, NULL);
		break;
	case 2:
		n = poll(&fd, 1, 3);
		break;
	case 3:
		n = read(w->bytes[0], &byte, 1);	// the feeder's
		break;
	case 4:
		n = epoll_wait(w->epoll, &event, 1, 3);
		break;
	case 5:
		n = syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &t, NULL, 0);
		n = n == -1 && errno == ETIMEDOUT ? 0 : n;
		break;
	}
	// Nobody sends us signals: a controller that died in the middle of a stop may have.
	if (n < 0 && errno == EINTR)
		n_eintr++;
	else if (n < 0)
		n_wrong++;
}

static void *work(void *arg)
{
	struct worker *w = arg;
	while (!atomic_load(&stopping)) {
		sleep_somehow(w);
		check_calls(w);
		w->n_rounds++;
	}
	return NULL;
}

static void *feed(void *arg)
{
	(void)arg;
	while (!atomic_load(&stopping)) {
		usleep(3000);
		for (int i = 3; i < n_workers; i += 6)
			if (write(workers[i].bytes[1], "x", 1) < 0 && errno != EAGAIN)
				n_wrong++;
	}
	for (int i = 3; i < n_workers; i += 6)
		close(workers[i].bytes[1]);
	return NULL;
}

static void answer(void)
{
	int n_idle = 0;
	for (int i = 0; i < n_workers; i++)
		n_idle += workers[i].n_rounds == workers[i].marked;
	printf("branches=%llu wrong=%llu eintr=%llu idle=%d\n", (unsigned long long)n_branches,
	       (unsigned long long)n_wrong, (unsigned long long)n_eintr, n_idle);
	fflush(stdout);
}

int main(int argc, char **argv)
{
	n_workers = argc > 1 ? atoi(argv[1]) : 0;
	if (n_workers < 1 || n_workers > MAX_THREADS)
		return 2;
	pthread_t feeder;
	for (int i = 0; i < n_workers; i++) {
		workers[i].index = i;
		workers[i].epoll = epoll_create1(EPOLL_CLOEXEC);
		if (pipe2(workers[i].bytes, O_CLOEXEC) ||
		    fcntl(workers[i].bytes[1], F_SETFL, O_NONBLOCK))
			abort();
	}
	for (int i = 0; i < n_workers; i++)
		pthread_create(&workers[i].thread, NULL, work, &workers[i]);
	pthread_create(&feeder, NULL, feed, NULL);
	printf("ready\n");
	fflush(stdout);

	char line[80];
	while (fgets(line, sizeof(line), stdin)) {
		for (int i = 0; !strcmp(line, "mark\n") && i < n_workers; i++)
			workers[i].marked = workers[i].n_rounds;
		answer();
	}
	atomic_store(&stopping, 1);
	pthread_join(feeder, NULL);
	for (int i = 0; i < n_workers; i++)
		pthread_join(workers[i].thread, NULL);
	answer();
	return n_wrong != 0;
}
