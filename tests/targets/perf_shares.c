// SPDX-License-Identifier: Apache-2.0
// Threads that spend known shares of their work in two functions.
//
// perf_shares N_BUSY N_ASLEEP [alone]: N_BUSY threads do 7 parts of work in
// "heavy" and 3 in "light", over and over; N_ASLEEP threads sleep; with "alone"
// the first thread exits and leaves the process to the others. Prints "ready",
// runs until standard input is closed, prints "ok". Links with -pthread.
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

// A round takes about a microsecond, less than a timer's jitter: samples cannot
// keep in step with it.
enum { PART = 100 };

#define WORK(n)                                                        \
	do {                                                           \
		for (unsigned long left = (n) * (unsigned long)PART; left; left--) \
			__asm__ volatile("imul $3, %0, %0" : "+r"(value)); \
		return value;                                          \
	} while (0)

__attribute__((noinline, noclone, noipa)) unsigned long heavy(unsigned long value)
{
	WORK(7);
}

__attribute__((noinline, noclone, noipa)) unsigned long light(unsigned long value)
{
	WORK(3);
}

static void *work(void *arg)
{
	unsigned long value = (unsigned long)arg + 1;
	for (;;)
		value = light(heavy(value));
	return NULL;
}

static void *rest(void *arg)
{
	(void)arg;
	for (;;)
		pause();
	return NULL;
}

static void *wait_for_end(void *arg)
{
	(void)arg;
	char byte;
	while (read(0, &byte, 1) > 0)
		;
	puts("ok");
	exit(0);
}

static void start(void *(*body)(void *), long index)
{
	pthread_t thread;
	if (pthread_create(&thread, NULL, body, (void *)index)) {
		perror("pthread_create");
		exit(1);
	}
}

int main(int argc, char **argv)
{
	if (argc < 3)
		return 2;
	// The busy ones last: the lowest thread ids are then not those to be chosen.
	for (long i = 0; i < atol(argv[2]); i++)
		start(rest, i);
	for (long i = 0; i < atol(argv[1]); i++)
		start(work, i);
	puts("ready");
	fflush(stdout);
	if (argc > 3) {
		start(wait_for_end, 0);
		pthread_exit(NULL);
	}
	wait_for_end(NULL);
}
