// SPDX-License-Identifier: Apache-2.0
// Programs that exit, execute another program, vfork or filter their own calls.
//
// events exit USEC: eight spinning threads; exits with status 7 after USEC.
// events exec N USEC: four threads; executes itself N times, then prints "ok".
// events vfork: a vfork child spins in our memory until standard input is closed.
// events seccomp: getppid kills it from now on; "ok" when standard input is closed.
// Each prints "ready" (exec: only the first). Links with -pthread.
#define _GNU_SOURCE
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <poll.h>
#include <pthread.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static volatile unsigned long spins;

static void *spin(void *arg)
{
	(void)arg;
	for (;;)
		spins++;
}

static void spin_for(long usec)
{
	struct timespec begin, now;
	clock_gettime(CLOCK_MONOTONIC, &begin);
	do
		clock_gettime(CLOCK_MONOTONIC, &now);
	while ((now.tv_sec - begin.tv_sec) * 1000000L + (now.tv_nsec - begin.tv_nsec) / 1000 < usec);
}

static void start_threads(int n)
{
	pthread_t thread;
	for (int i = 0; i < n; i++)
		pthread_create(&thread, NULL, spin, NULL);
}

static void ready(void)
{
	printf("ready\n");
	fflush(stdout);
}

static void wait_for_end(void)
{
	char c;
	while (read(0, &c, 1) > 0)
		;
}

int main(int argc, char **argv)
{
	if (argc < 2)
		return 2;
	if (!strcmp(argv[1], "exit")) {
		start_threads(8);
		ready();
		spin_for(atol(argv[2]));
		_exit(7);
	}
	if (!strcmp(argv[1], "exec")) {
		int left = atoi(argv[2]);
		char number[16];
		if (argc == 4)
			ready();
		if (left == 0) {
			printf("ok\n");
			return 0;
		}
		start_threads(3);
		spin_for(atol(argv[3]));
		snprintf(number, sizeof(number), "%d", left - 1);
		execl("/proc/self/exe", argv[0], "exec", number, argv[3], "again", NULL);
		return 3;
	}
	if (!strcmp(argv[1], "vfork")) {
		ready();
		pid_t pid = vfork();
		if (pid == 0) {
			struct pollfd end = {.fd = 0, .events = POLLIN};
			while (poll(&end, 1, 0) == 0)
				spins++;
			_exit(0);
		}
		printf("ok\n");
		return pid < 0;
	}
	if (!strcmp(argv[1], "seccomp")) {
		struct sock_filter filter[] = {
			BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
			BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_getppid, 0, 1),
			BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_KILL_PROCESS),
			BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
		};
		struct sock_fprog program = {sizeof(filter) / sizeof(*filter), filter};
		if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) ||
		    prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program))
			return 4;
		ready();
		wait_for_end();
		printf("ok\n");
		return 0;
	}
	return 2;
}
