// SPDX-License-Identifier: Apache-2.0
// Threads that check, each in its own way, that nobody disturbed them.
//
// calls MODE N ROUNDS: N threads run MODE over and over; every thread adds to its
// counter per round. Prints "ready", then runs until standard input is closed and
// prints "ok ROUNDS" or has printed "bad: ..." before. Links with -pthread -lm.
#define _GNU_SOURCE
#include <errno.h>
#include <immintrin.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

static atomic_ulong rounds;
static atomic_int stopping;
static atomic_ulong n_signals;

static void bad(const char *what, long value)
{
	printf("bad: %s %ld errno %d\n", what, value, errno);
	fflush(stdout);
	_exit(1);
}

static long now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000L + t.tv_nsec;
}

// All of the vector registers and callee-saved ones hold a pattern across a loop
// that makes no call; any change shows.
static void check_registers(void)
{
	double x[16];
	unsigned long flags;
	for (int i = 0; i < 16; i++)
		x[i] = i * 1.25 + 3;
	unsigned long left = 200000, sum = 0;
	double out[16];
	__asm__ volatile(
		"vmovupd (%[x]), %%ymm0\n vmovupd 32(%[x]), %%ymm1\n"
		"vmovupd 64(%[x]), %%ymm14\n vmovupd 96(%[x]), %%ymm15\n"
		"mov $0x1234567, %%r11\n mov $0x7654321, %%rcx\n"
		// The red zone is ours as well.
		"movq $0x5a5a5a5a, -8(%%rsp)\n movq $0x3c3c3c3c, -128(%%rsp)\n"
		"stc\n"
		"1: lea -1(%[left]), %[left]\n"
		"   inc %[left]\n"		// keeps the carry flag
		"   dec %[left]\n"
		"   jnz 1b\n"
		"pushfq\n pop %[flags]\n"
		"lea -128(%%rsp), %%rax\n"
		"add %%r11, %[sum]\n add %%rcx, %[sum]\n"
		"vmovupd %%ymm0, (%[o])\n vmovupd %%ymm1, 32(%[o])\n"
		"vmovupd %%ymm14, 64(%[o])\n vmovupd %%ymm15, 96(%[o])\n"
		: [left] "+r"(left), [sum] "+r"(sum), [flags] "=&r"(flags)
		: [x] "r"(x), [o] "r"(out)
		: "r11", "rcx", "rax", "xmm0", "xmm1", "xmm14", "xmm15", "memory", "cc");
	if (sum != 0x1234567 + 0x7654321)
		bad("integer registers", sum);
	if (memcmp(x, out, sizeof(x)))
		bad("vector registers", 0);
	if (!(flags & 1))
		bad("carry flag", flags);
	if (flags & 0x100)
		bad("trap flag", flags);
}

static void check_elapsed(const char *what, long start, long at_least_ns)
{
	long took = now_ns() - start;
	if (took < at_least_ns)
		bad(what, took);
}

#define MS 1000000L

static void run_once(const char *mode, int *fds)
{
	long start = now_ns();
	if (!strcmp(mode, "spin")) {
		check_registers();
	} else if (!strcmp(mode, "nanosleep")) {
		struct timespec t = {0, 20 * MS};
		if (nanosleep(&t, NULL))
			bad("nanosleep", 0);
		check_elapsed("nanosleep", start, 20 * MS);
	} else if (!strcmp(mode, "poll")) {
		int n = poll(NULL, 0, 20);
		if (n)
			bad("poll", n);
		check_elapsed("poll", start, 20 * MS);
	} else if (!strcmp(mode, "epoll")) {
		struct epoll_event event;
		int n = epoll_wait(fds[2], &event, 1, 20);
		if (n)
			bad("epoll_wait", n);
		check_elapsed("epoll_wait", start, 20 * MS);
	} else if (!strcmp(mode, "futex")) {
		static int word;
		struct timespec t = {0, 20 * MS};
		long n = syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &t, NULL, 0);
		if (n != -1 || errno != ETIMEDOUT)
			bad("futex", n);
		check_elapsed("futex", start, 20 * MS);
	} else if (!strcmp(mode, "rcvtimeo")) {
		char c;
		long n = recv(fds[0], &c, 1, 0);
		if (n != -1 || errno != EAGAIN)
			bad("recv", n);
		check_elapsed("recv", start, 19 * MS);
	} else if (!strcmp(mode, "semop")) {
		struct sembuf op = {0, -1, 0};
		struct timespec t = {0, 20 * MS};
		long n = semtimedop(fds[0], &op, 1, &t);
		if (n != -1 || errno != EAGAIN)
			bad("semtimedop", n);
	} else if (!strcmp(mode, "read")) {
		char c;
		long n = read(fds[0], &c, 1);	// woken at the end only
		if (n != 1)
			bad("read", n);
	} else if (!strcmp(mode, "short")) {
		usleep(100);
	} else {
		bad("no such mode", 0);
	}
}

struct worker {
	const char *mode;
	pthread_t thread;
	int fds[3];
};

static void *work(void *arg)
{
	struct worker *w = arg;
	do {
		run_once(w->mode, w->fds);
		atomic_fetch_add(&rounds, 1);
	} while (!atomic_load(&stopping) && strcmp(w->mode, "short"));
	return NULL;
}

static void open_fds(struct worker *w)
{
	if (!strcmp(w->mode, "rcvtimeo")) {
		struct timeval t = {0, 20000};
		if (socketpair(AF_UNIX, SOCK_STREAM, 0, w->fds) ||
		    setsockopt(w->fds[0], SOL_SOCKET, SO_RCVTIMEO, &t, sizeof(t)))
			bad("socketpair", 0);
	} else if (!strcmp(w->mode, "semop")) {
		w->fds[0] = semget(IPC_PRIVATE, 1, 0600);
		if (w->fds[0] < 0)
			bad("semget", 0);
	} else if (pipe(w->fds)) {
		bad("pipe", 0);
	}
	w->fds[2] = epoll_create1(0);
}

static void on_alarm(int sig)
{
	(void)sig;
	atomic_fetch_add(&n_signals, 1);
}

// A signal every millisecond, sent by a second thread of ours that counts, one at a
// time: each must arrive.
static void *send_signals(void *arg)
{
	pthread_t receiver = *(pthread_t *)arg;
	unsigned long sent = 0;
	while (!atomic_load(&stopping)) {
		pthread_kill(receiver, SIGUSR1);
		sent++;
		long start = now_ns();
		while (atomic_load(&n_signals) < sent)
			if (now_ns() - start > 5000 * MS)
				bad("a signal was lost", sent);
		usleep(300);
	}
	if (atomic_load(&n_signals) != sent)
		bad("signals", (long)n_signals - (long)sent);
	return NULL;
}

static void *wait_for_end(void *arg)
{
	(void)arg;
	char c;
	while (read(0, &c, 1) > 0)
		;
	atomic_store(&stopping, 1);
	return NULL;
}

int main(int argc, char **argv)
{
	if (argc < 3)
		return 2;
	const char *mode = argv[1];
	int n = atoi(argv[2]);
	struct worker *workers = calloc(n, sizeof(*workers));
	pthread_t end, sender, self = pthread_self();
	int with_timer = argc > 3 && !strcmp(argv[3], "timer");

	pthread_create(&end, NULL, wait_for_end, NULL);
	if (with_timer) {
		struct itimerval period = {{0, 1000}, {0, 1000}};
		struct sigaction action = {.sa_handler = on_alarm, .sa_flags = SA_RESTART};
		struct sigaction ignore = {.sa_handler = on_alarm, .sa_flags = SA_RESTART};
		sigaction(SIGUSR1, &action, NULL);
		ignore.sa_handler = SIG_IGN;
		sigaction(SIGALRM, &ignore, NULL);
		setitimer(ITIMER_REAL, &period, NULL);
		pthread_create(&sender, NULL, send_signals, &self);
	}
	for (int i = 0; i < n; i++) {
		workers[i].mode = mode;
		open_fds(&workers[i]);
	}
	if (!strcmp(mode, "short")) {
		printf("ready\n");
		fflush(stdout);
		while (!atomic_load(&stopping)) {
			for (int i = 0; i < n; i++)
				pthread_create(&workers[i].thread, NULL, work, &workers[i]);
			for (int i = 0; i < n; i++)
				pthread_join(workers[i].thread, NULL);
		}
	} else {
		for (int i = 1; i < n; i++)
			pthread_create(&workers[i].thread, NULL, work, &workers[i]);
		printf("ready\n");
		fflush(stdout);
		if (!strcmp(mode, "read")) {
			pthread_create(&workers[0].thread, NULL, work, &workers[0]);
			pthread_join(end, NULL);
			for (int i = 0; i < n; i++)
				if (write(workers[i].fds[1], "x", 1) != 1)
					bad("write", 0);
			pthread_join(workers[0].thread, NULL);
		} else {
			work(&workers[0]);
		}
		for (int i = 1; i < n; i++)
			pthread_join(workers[i].thread, NULL);
	}
	if (with_timer)
		pthread_join(sender, NULL);
	for (int i = 0; i < n; i++)
		if (!strcmp(mode, "semop"))
			semctl(workers[i].fds[0], 0, IPC_RMID);
	printf("ok %lu signals %lu\n", rounds, n_signals);
	return 0;
}
