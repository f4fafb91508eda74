// SPDX-License-Identifier: Apache-2.0
// One thread for each call that a stop could be noticed in; each checks for itself.
//
// syscalls all SEED: every call. syscalls gentle SEED: only calls that may be woken from.
// Waiting threads ask for timeouts of 1 to 20 ms, one after the other, and note how late each
// ends, apart for "stops" and "control" (a wait that touches both belongs to "stops"). Others
// transfer more than a pipe or a socket holds. Three threads take queued signals that a child
// process sends, numbered. Two are busy with retpolined calls, 64 sites, on and off.
//
// Prints "ready". Lines on standard input: "stops" and "control" are answered with "ok",
// "counts" and "lateness" with name=number pairs; ends when standard input is closed.
#define _GNU_SOURCE
#include <errno.h>
#include <linux/futex.h>
#include <linux/io_uring.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/select.h>
#include <sys/sem.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define MS 1000000L
#define SECOND (1000 * MS)

static atomic_long n_eintr, n_short, n_wrong, n_early, n_transfers, n_taken_eintr, n_rounds;
static atomic_int in_stops, stopping;
static unsigned seed;

static long now_ns(clockid_t clock)
{
	struct timespec t;
	clock_gettime(clock, &t);
	return t.tv_sec * SECOND + t.tv_nsec;
}

static struct timespec timespec_of(long ns)
{
	return (struct timespec){.tv_sec = ns / SECOND, .tv_nsec = ns % SECOND};
}

static void complain(atomic_long *count, const char *what, long value)
{
	atomic_fetch_add(count, 1);
	fprintf(stderr, "%s: %ld\n", what, value);
}

static long result_of(long result)
{
	return result == -1 ? -errno : result;
}

static void must(int is_right, const char *what)
{
	if (!is_right) {
		perror(what);
		_exit(3);
	}
}

// --- signals: numbered by their sender, counted by whoever takes them

enum { IN_PWAIT, IN_SIGTIMEDWAIT, IN_USER_CODE, N_STREAMS };

struct stream {
	atomic_int tid;  // 0: nobody takes them
	atomic_long n_sent, n_taken, n_bad;
};

static struct shared {
	struct stream streams[N_STREAMS];
	atomic_int is_paused, is_asleep, is_over;
	int semaphore;
} *shared;

static pid_t sender_pid;
static _Thread_local struct stream *own_stream;

static int signal_of(int stream)
{
	return SIGRTMIN + 1 + stream;
}

static void take(struct stream *stream, const siginfo_t *info)
{
	long expected = atomic_load(&stream->n_taken);
	if (info->si_value.sival_int != (int)expected || info->si_code != SI_QUEUE ||
	    info->si_pid != sender_pid || info->si_uid != getuid()) {
		atomic_fetch_add(&stream->n_bad, 1);
		fprintf(stderr, "signal %d instead of %ld, code %d\n", info->si_value.sival_int,
			expected, info->si_code);
	}
	atomic_store(&stream->n_taken, expected + 1);
}

static void handle(int number, siginfo_t *info, void *context)
{
	int saved = errno;
	(void)number, (void)context;
	take(own_stream, info);
	errno = saved;
}

static void send_signals(pid_t pid)
{
	unsigned random = seed;
	while (getppid() == pid && !atomic_load(&shared->is_over)) {
		int is_paused = atomic_load(&shared->is_paused);
		for (int i = 0; i < N_STREAMS && !is_paused; i++) {
			struct stream *stream = &shared->streams[i];
			int tid = atomic_load(&stream->tid);
			long n_sent = atomic_load(&stream->n_sent);
			// Few enough for any limit on queued signals.
			if (!tid || n_sent - atomic_load(&stream->n_taken) >= 50)
				continue;
			siginfo_t info = {0};
			info.si_code = SI_QUEUE;
			info.si_pid = getpid();
			info.si_uid = getuid();
			info.si_value.sival_int = (int)n_sent;
			if (!syscall(SYS_rt_tgsigqueueinfo, pid, tid, signal_of(i), &info))
				atomic_store(&stream->n_sent, n_sent + 1);
		}
		atomic_store(&shared->is_asleep, is_paused);
		usleep(500 + rand_r(&random) % 3500);
	}
	semctl(shared->semaphore, 0, IPC_RMID);
	_exit(0);
}

// Wait until every signal sent has been taken; those that are not by then are lost.
static long settle_signals(void)
{
	long n_missing = 0;
	atomic_store(&shared->is_paused, 1);
	while (!atomic_load(&shared->is_asleep))
		usleep(100);
	for (int i = 0; i < N_STREAMS; i++) {
		struct stream *stream = &shared->streams[i];
		for (int left = 20000; left > 0; left--) {
			if (atomic_load(&stream->n_taken) == atomic_load(&stream->n_sent))
				break;
			usleep(100);
		}
		n_missing += labs(atomic_load(&stream->n_sent) - atomic_load(&stream->n_taken));
	}
	atomic_store(&shared->is_paused, 0);
	return n_missing;
}

// --- waits: each returns 0 when its timeout ended it, else -errno

static long wait_epoll(int fd, long ns)
{
	struct epoll_event event;
	return result_of(epoll_wait(fd, &event, 1, ns / MS));
}

static long wait_epoll_pwait(int fd, long ns)
{
	struct epoll_event event;
	sigset_t mask;
	sigfillset(&mask);
	sigdelset(&mask, signal_of(IN_PWAIT));
	return result_of(epoll_pwait(fd, &event, 1, ns / MS, &mask));
}

static long wait_poll(int fd, long ns)
{
	struct pollfd end = {.fd = fd, .events = POLLIN};
	return result_of(poll(&end, 1, ns / MS));
}

static long wait_ppoll(int fd, long ns)
{
	struct pollfd end = {.fd = fd, .events = POLLIN};
	struct timespec timeout = timespec_of(ns);
	sigset_t mask;
	sigemptyset(&mask);
	return result_of(ppoll(&end, 1, &timeout, &mask));
}

static long wait_select(int fd, long ns)
{
	fd_set set;
	struct timeval timeout = {.tv_usec = ns / 1000};
	FD_ZERO(&set);
	FD_SET(fd, &set);
	// The call itself: the C library's select() makes another, pselect6.
	return result_of(syscall(SYS_select, fd + 1, &set, NULL, NULL, &timeout));
}

static long wait_pselect(int fd, long ns)
{
	fd_set set;
	struct timespec timeout = timespec_of(ns);
	sigset_t mask;
	FD_ZERO(&set);
	FD_SET(fd, &set);
	sigemptyset(&mask);
	return result_of(pselect(fd + 1, &set, NULL, NULL, &timeout, &mask));
}

static long wait_nanosleep(int fd, long ns)
{
	struct timespec timeout = timespec_of(ns);
	(void)fd;
	return result_of(nanosleep(&timeout, NULL));
}

static long wait_clock_nanosleep(int fd, long ns)
{
	struct timespec until = timespec_of(now_ns(CLOCK_MONOTONIC) + ns);
	(void)fd;
	return -clock_nanosleep(CLOCK_MONOTONIC, TIMER_ABSTIME, &until, NULL);
}

static long wait_sigtimedwait(int fd, long ns)
{
	struct timespec timeout = timespec_of(ns);
	siginfo_t info;
	sigset_t set;
	(void)fd;
	sigemptyset(&set);
	sigaddset(&set, signal_of(IN_SIGTIMEDWAIT));
	long result = result_of(sigtimedwait(&set, &info, &timeout));
	if (result == signal_of(IN_SIGTIMEDWAIT)) {
		take(own_stream, &info);
		return 1;
	}
	return result == -EAGAIN ? 0 : result;
}

static long wait_semtimedop(int fd, long ns)
{
	struct timespec timeout = timespec_of(ns);
	struct sembuf down = {.sem_op = -1};
	(void)fd;
	long result = result_of(semtimedop(shared->semaphore, &down, 1, &timeout));
	return result == -EAGAIN ? 0 : result;
}

static long wait_futex(int fd, long ns)
{
	static int word;
	struct timespec timeout = timespec_of(ns);
	(void)fd;
	long result = result_of(syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, 0, &timeout, 0, 0));
	return result == -ETIMEDOUT ? 0 : result;
}

static void set_receive_timeout(int fd, long ns)
{
	struct timeval timeout = {.tv_usec = ns / 1000};
	must(!setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof timeout), "SO_RCVTIMEO");
}

static long wait_accept(int fd, long ns)
{
	set_receive_timeout(fd, ns);
	long result = result_of(accept(fd, NULL, NULL));
	return result == -EAGAIN ? 0 : result;
}

static long wait_recv(int fd, long ns)
{
	char byte;
	set_receive_timeout(fd, ns);
	long result = result_of(recv(fd, &byte, 1, 0));
	return result == -EAGAIN ? 0 : result;
}

static long wait_io_uring(int fd, long ns)
{
	struct __kernel_timespec timeout = {.tv_nsec = ns};
	struct io_uring_getevents_arg arg = {.ts = (uintptr_t)&timeout};
	unsigned flags = IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG;
	long result = result_of(syscall(SYS_io_uring_enter, fd, 0, 1, flags, &arg, sizeof arg));
	return result == -ETIME ? 0 : result;
}

// --- what the waits wait on: nothing ever comes

static int open_epoll(void)
{
	int ends[2], fd = epoll_create1(0);
	struct epoll_event event = {.events = EPOLLIN};
	must(fd >= 0 && !pipe(ends) && !epoll_ctl(fd, EPOLL_CTL_ADD, ends[0], &event), "epoll");
	return fd;
}

static int open_pipe(void)
{
	int ends[2];
	must(!pipe(ends), "pipe");
	return ends[0];
}

static int open_socket(void)
{
	int ends[2];
	must(!socketpair(AF_UNIX, SOCK_STREAM, 0, ends), "socketpair");
	return ends[0];
}

// At an address that the kernel chooses, in the abstract namespace.
static int open_listener(void)
{
	struct sockaddr_un addr = {.sun_family = AF_UNIX};
	int fd = socket(AF_UNIX, SOCK_STREAM, 0);
	must(fd >= 0 && !bind(fd, (void *)&addr, sizeof(sa_family_t)) && !listen(fd, 8), "listen");
	return fd;
}

static int open_nothing(void)
{
	return -1;
}

static int open_io_uring(void)
{
	struct io_uring_params params = {0};
	return syscall(SYS_io_uring_setup, 4, &params);
}

#define N_BUCKETS 25000
#define BUCKET_NS 20000

struct wait {
	const char *name;
	long (*wait)(int fd, long ns);
	int (*open)(void);
	int stream;      // whose signals it takes, or -1
	long early_ns;   // as the kernel's clock for it counts: how much too soon is right
	int is_gentle;   // may be woken from: begins again where it was
	int has_result;  // a result above 0 is one, else wrong
	int fd;
	uint32_t lateness[2][N_BUCKETS];
};

#define JIFFY (10 * MS)
static struct wait waits[] = {
	{"epoll_wait", wait_epoll, open_epoll, -1, 0, 0, 0, 0, {{0}}},
	{"epoll_pwait", wait_epoll_pwait, open_epoll, IN_PWAIT, 0, 0, 0, 0, {{0}}},
	{"poll", wait_poll, open_pipe, -1, 0, 1, 0, 0, {{0}}},
	{"ppoll", wait_ppoll, open_pipe, -1, 0, 0, 0, 0, {{0}}},
	{"select", wait_select, open_pipe, -1, 0, 1, 0, 0, {{0}}},
	{"pselect", wait_pselect, open_pipe, -1, 0, 0, 0, 0, {{0}}},
	{"nanosleep", wait_nanosleep, open_nothing, -1, 0, 1, 0, 0, {{0}}},
	{"clock_nanosleep", wait_clock_nanosleep, open_nothing, -1, 0, 1, 0, 0, {{0}}},
	{"sigtimedwait", wait_sigtimedwait, open_nothing, IN_SIGTIMEDWAIT, 0, 0, 1, 0, {{0}}},
	{"semtimedop", wait_semtimedop, open_nothing, -1, JIFFY, 0, 0, 0, {{0}}},
	{"futex", wait_futex, open_nothing, -1, 0, 1, 0, 0, {{0}}},
	{"accept", wait_accept, open_listener, -1, JIFFY, 0, 0, 0, {{0}}},
	{"recv", wait_recv, open_socket, -1, JIFFY, 0, 0, 0, {{0}}},
	{"io_uring_enter", wait_io_uring, open_io_uring, -1, 0, 0, 0, 0, {{0}}},
};
#define N_WAITS (sizeof waits / sizeof *waits)

// Block all signals but, in user code, those of a stream.
static void join_stream(int stream, int is_open)
{
	sigset_t set;
	sigfillset(&set);
	if (stream >= 0) {
		own_stream = &shared->streams[stream];
		if (is_open)
			sigdelset(&set, signal_of(stream));
	}
	pthread_sigmask(SIG_SETMASK, &set, NULL);
	if (stream >= 0)
		atomic_store(&own_stream->tid, (int)gettid());
}

static void *keep_waiting(void *arg)
{
	struct wait *wait = arg;
	unsigned random = seed + (unsigned)(wait - waits);
	join_stream(wait->stream, 0);
	while (!atomic_load(&stopping)) {
		long ns = (1 + rand_r(&random) % 20) * MS;
		long n_taken = own_stream ? atomic_load(&own_stream->n_taken) : 0;
		int phase = atomic_load(&in_stops);
		long begin = now_ns(CLOCK_MONOTONIC);
		long result = wait->wait(wait->fd, ns);
		long late = now_ns(CLOCK_MONOTONIC) - begin - ns;
		phase |= atomic_load(&in_stops);
		if (result == -EINTR) {
			if (own_stream && atomic_load(&own_stream->n_taken) != n_taken)
				atomic_fetch_add(&n_taken_eintr, 1);
			else
				complain(&n_eintr, wait->name, ns);
		} else if (result < 0 || (result > 0 && !wait->has_result)) {
			complain(&n_wrong, wait->name, result);
		} else if (result == 0) {
			if (late < -wait->early_ns)
				complain(&n_early, wait->name, late);
			long bucket = late < 0 ? 0 : late / BUCKET_NS;
			wait->lateness[phase][bucket < N_BUCKETS ? bucket : N_BUCKETS - 1]++;
		}
	}
	return NULL;
}

// --- transfers of more than a pipe or a socket holds

static void rest(long ns)
{
	struct timespec timeout = timespec_of(ns);
	if (nanosleep(&timeout, NULL))
		complain(&n_eintr, "rest", errno);
}

static void check_transfer(const char *name, long result, long size)
{
	atomic_fetch_add(&n_transfers, 1);
	if (result == -1 && errno == EINTR)
		complain(&n_eintr, name, size);
	else if (result == -1)
		complain(&n_wrong, name, -errno);
	else if (result != size)
		complain(&n_short, name, result);
}

#define WRITE_SIZE (1 << 20)
#define READ_SIZE (16 << 10)
static int pipe_ends[2];

static void *keep_writing(void *arg)
{
	static uint8_t data[WRITE_SIZE];
	uint8_t next = 0;
	join_stream(-1, 0);
	while (!atomic_load(&stopping)) {
		for (long i = 0; i < WRITE_SIZE; i++)
			data[i] = (uint8_t)(next + i);
		long result = write(pipe_ends[1], data, WRITE_SIZE);
		check_transfer("write", result, WRITE_SIZE);
		next += result > 0 ? (uint8_t)result : 0;
	}
	return arg;
}

static void *keep_reading(void *arg)
{
	static uint8_t data[READ_SIZE];
	unsigned random = seed + 100;
	uint8_t next = 0;
	join_stream(-1, 0);
	while (!atomic_load(&stopping)) {
		long n = read(pipe_ends[0], data, READ_SIZE);
		if (n <= 0)
			complain(errno == EINTR ? &n_eintr : &n_wrong, "read", errno);
		for (long i = 0; i < n; i++)
			if (data[i] != next++) {
				complain(&n_wrong, "content of the pipe", i);
				next = data[i] + 1;
			}
		if (rand_r(&random) % 3 == 0)
			rest(1000 * (100 + rand_r(&random) % 2000));
	}
	return arg;
}

#define ALL_SIZE (256 << 10)
static int all_ends[2];

static void *keep_receiving(void *arg)
{
	static uint8_t data[ALL_SIZE];
	join_stream(-1, 0);
	while (!atomic_load(&stopping))
		check_transfer("recv", recv(all_ends[0], data, ALL_SIZE, MSG_WAITALL), ALL_SIZE);
	return arg;
}

static void *keep_sending(void *arg)
{
	static uint8_t data[ALL_SIZE];
	unsigned random = seed + 101;
	join_stream(-1, 0);
	while (!atomic_load(&stopping)) {
		long size = ALL_SIZE >> (rand_r(&random) % 6);
		check_transfer("send", send(all_ends[1], data, size, 0), size);
		rest(1000 * (rand_r(&random) % 2000));
	}
	return arg;
}

// --- connections, without a timeout

static int listener;
static struct sockaddr_un listener_addr;
static socklen_t listener_size = sizeof listener_addr;

static void *keep_accepting(void *arg)
{
	join_stream(-1, 0);
	while (!atomic_load(&stopping)) {
		int fd = accept(listener, NULL, NULL);
		check_transfer("accept", fd < 0 ? -1 : 0, 0);
		close(fd);
	}
	return arg;
}

static void *keep_connecting(void *arg)
{
	unsigned random = seed + 102;
	join_stream(-1, 0);
	while (!atomic_load(&stopping)) {
		int fd = socket(AF_UNIX, SOCK_STREAM, 0);
		long result = connect(fd, (void *)&listener_addr, listener_size);
		check_transfer("connect", result, 0);
		close(fd);
		rest((1 + rand_r(&random) % 20) * MS);
	}
	return arg;
}

// --- the sites

typedef uint64_t (*function)(uint64_t);
#define FUNCTION(n) \
	static __attribute__((noinline)) uint64_t change_##n(uint64_t x) \
	{ \
		return x * (2 * n + 0x9E3779B97F4A7C15u) + n; \
	}
FUNCTION(0) FUNCTION(1) FUNCTION(2) FUNCTION(3)
static volatile function changes[] = {change_0, change_1, change_2, change_3};

static uint64_t change(unsigned n, uint64_t x)
{
	return x * (2 * n + 0x9E3779B97F4A7C15u) + n;
}

#define CALL(n) \
	which = x >> (n) & 3; \
	y = changes[which](x); \
	wrong += y != change(which, x); \
	x = y;
#define CALL4(n) CALL(n) CALL(n + 1) CALL(n + 2) CALL(n + 3)
#define CALL16(n) CALL4(n) CALL4(n + 4) CALL4(n + 8) CALL4(n + 12)

static uint64_t call_all(uint64_t x)
{
	uint64_t y, wrong = 0;
	unsigned which;
	CALL16(0) CALL16(12) CALL16(24) CALL16(36)
	if (wrong)
		complain(&n_wrong, "calls", (long)wrong);
	return x;
}

static void *keep_calling(void *arg)
{
	unsigned random = seed + 103 + (arg != NULL);
	uint64_t x = random;
	join_stream(arg ? IN_USER_CODE : -1, 1);
	while (!atomic_load(&stopping)) {
		long end = now_ns(CLOCK_MONOTONIC) + (20 + rand_r(&random) % 60) * MS;
		while (now_ns(CLOCK_MONOTONIC) < end) {
			for (int i = 0; i < 64; i++)
				x = call_all(x);
			atomic_fetch_add(&n_rounds, 64);
		}
		// In a lull nobody is there to be stopped but sleepers; it takes a handler's EINTR.
		struct timespec lull = timespec_of((10 + rand_r(&random) % 60) * MS);
		while (clock_nanosleep(CLOCK_MONOTONIC, 0, &lull, &lull) == EINTR)
			if (!arg)
				complain(&n_eintr, "lull", 0);
	}
	return NULL;
}

// --- answers

static void print_counts(void)
{
	long n_missing = settle_signals(), n_taken = 0, n_bad = 0;
	for (int i = 0; i < N_STREAMS; i++) {
		n_taken += atomic_load(&shared->streams[i].n_taken);
		n_bad += atomic_load(&shared->streams[i].n_bad);
	}
	printf("eintr=%ld short=%ld wrong=%ld early=%ld lost=%ld signals=%ld transfers=%ld "
	       "own_eintr=%ld rounds=%ld io_uring=%d\n",
	       n_eintr, n_short, n_wrong, n_early, n_missing + n_bad, n_taken, n_transfers,
	       n_taken_eintr, n_rounds, waits[N_WAITS - 1].fd >= 0);
}

// Of some waits in a phase: how many, and how late the latest of every thousand.
static void print_lateness(const char *name, const struct wait *first, size_t n, int phase)
{
	static const char *const phases[] = {"control", "stops"};
	uint64_t total = 0, seen = 0, most = 0;
	long at[2] = {-1, -1}, last = 0;
	for (size_t w = 0; w < n; w++)
		for (long i = 0; i < N_BUCKETS; i++)
			total += first[w].lateness[phase][i];
	for (long i = 0; i < N_BUCKETS; i++) {
		for (size_t w = 0; w < n; w++)
			seen += most = first[w].lateness[phase][i], last = most ? i : last;
		if (at[0] < 0 && seen * 2 >= total)
			at[0] = i;
		if (at[1] < 0 && seen * 1000 >= total * 999)
			at[1] = i;
	}
	printf("%s.%s.n=%lu %s.%s.p50_us=%ld %s.%s.p999_us=%ld %s.%s.max_us=%ld ",
	       name, phases[phase], total, name, phases[phase], at[0] * BUCKET_NS / 1000,
	       name, phases[phase], at[1] * BUCKET_NS / 1000,
	       name, phases[phase], last * BUCKET_NS / 1000);
}

static void print_all_lateness(void)
{
	for (int phase = 0; phase < 2; phase++) {
		print_lateness("all", waits, N_WAITS, phase);
		for (size_t i = 0; i < N_WAITS; i++)
			print_lateness(waits[i].name, &waits[i], 1, phase);
	}
	printf("\n");
}

static void answer_lines(void)
{
	char line[64];
	size_t size = 0;
	// Not stdio, which may return early for a reason of its own.
	for (long n; (n = read(0, line + size, 1)) != 0;) {
		if (n < 0) {
			complain(errno == EINTR ? &n_eintr : &n_wrong, "read", errno);
			continue;
		}
		if (line[size] != '\n') {
			size = size + 2 < sizeof line ? size + 1 : size;
			continue;
		}
		line[size] = 0;
		size = 0;
		if (!strcmp(line, "counts")) {
			print_counts();
		} else if (!strcmp(line, "lateness")) {
			print_all_lateness();
		} else {
			atomic_store(&in_stops, !strcmp(line, "stops"));
			printf("ok\n");
		}
		fflush(stdout);
	}
}

static void start(void *(*run)(void *), void *arg)
{
	pthread_t thread;
	must(!pthread_create(&thread, NULL, run, arg), "pthread_create");
}

int main(int argc, char **argv)
{
	if (argc != 3)
		return 2;
	int is_gentle = !strcmp(argv[1], "gentle");
	seed = (unsigned)strtoul(argv[2], NULL, 10);
	shared = mmap(NULL, sizeof *shared, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS,
		      -1, 0);
	must(shared != MAP_FAILED, "mmap");
	shared->semaphore = semget(IPC_PRIVATE, 1, 0600);
	must(shared->semaphore >= 0, "semget");
	pid_t pid = getpid();
	sender_pid = fork();
	must(sender_pid >= 0, "fork");
	if (!sender_pid)
		send_signals(pid);
	struct sigaction action = {.sa_sigaction = handle, .sa_flags = SA_SIGINFO | SA_RESTART};
	sigfillset(&action.sa_mask);
	for (int i = 0; i < N_STREAMS; i++)
		must(!sigaction(signal_of(i), &action, NULL), "sigaction");
	join_stream(-1, 0);
	for (size_t i = 0; i < N_WAITS; i++) {
		waits[i].fd = waits[i].open();
		int is_there = waits[i].fd >= 0 || waits[i].open == open_nothing;
		if (is_there && (waits[i].is_gentle || !is_gentle))
			start(keep_waiting, &waits[i]);
	}
	listener = open_listener();
	must(!getsockname(listener, (void *)&listener_addr, &listener_size), "getsockname");
	start(keep_accepting, NULL);
	start(keep_connecting, NULL);
	if (!is_gentle) {
		must(!pipe(pipe_ends), "pipe");
		must(!socketpair(AF_UNIX, SOCK_STREAM, 0, all_ends), "socketpair");
		start(keep_writing, NULL);
		start(keep_reading, NULL);
		start(keep_receiving, NULL);
		start(keep_sending, NULL);
	}
	start(keep_calling, NULL);
	start(keep_calling, "takes signals");
	printf("ready\n");
	fflush(stdout);
	answer_lines();
	atomic_store(&stopping, 1);
	// It removes the semaphore, and does so too when we are killed.
	atomic_store(&shared->is_over, 1);
	while (waitpid(sender_pid, NULL, 0) < 0 && errno == EINTR)
		;
	_exit(0);
}
