// SPDX-License-Identifier: Apache-2.0
// Threads that branch through changing pointers, and check every result.
//
// calls THREADS SIGNALS_HZ [SEED]: each thread makes batches of indirect calls, tail jumps
// and computed gotos, and does the same arithmetic once more without any: the two must
// agree. Which targets are hot changes every 100 to 300 ms. Signals come all the time;
// their handlers branch through the same sites, block, siglongjmp out, run on alternate
// stacks, and swapcontext away, so that what they interrupted waits on a stack that no
// thread is on. Prints "ready"; answers "counts" and "mark", with "idle" for the threads
// that did nothing since the last mark; ends with status 0 when standard input is closed
// and no result was wrong. Build with -pthread -Wl,-z,now.
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

#define N_TARGETS 64
#define N_OPS 16
#define N_LABELS (N_OPS + 1)
#define N_CALLS 32	// sites per kind
#define N_TABLE 16
#define N_TAILS 24
#define N_LOOPS 4
#define N_SITES (N_CALLS + N_TABLE + N_TAILS + N_LOOPS)
#define LOOP_LENGTH 24
#define REPEATS 3
#define STACK_SIZE (128 * 1024)
#define MAX_THREADS 64
#define MS 1000000L
#define NOIPA __attribute__((noipa))

typedef uint64_t (*target_fn)(uint64_t);

enum counter {
	BRANCHES, WRONG, SIGNALS, SENT, BLOCKED, JUMPS, SWITCHES, ALT_STACK, PHASES, N_COUNTERS
};
static const char *const counter_names[N_COUNTERS] = {
	"branches", "wrong", "signals", "sent", "blocked", "jumps", "switches", "alt_stack", "phases"
};
// One line each, so that threads do not wait for each other's counting.
static struct { _Alignas(64) _Atomic uint64_t n; } counters[N_COUNTERS];

static void count(enum counter which, uint64_t n)
{
	atomic_fetch_add_explicit(&counters[which].n, n, memory_order_relaxed);
}

// Running results, by way of pointers and without any. A batch fills the pair that is not
// in use and changes over with one store: a handler that jumps out of it leaves a true pair.
struct lane {
	uint64_t x[2], y[2];
	volatile int now;
};

struct worker {
	pthread_t thread;
	pid_t tid;
	uint64_t random, handler_random;
	struct lane main_lane, fiber_lane;
	_Atomic uint64_t n_batches;
	uint64_t marked;		// batches when last marked
	sigjmp_buf main_env, fiber_env;
	sigjmp_buf *volatile env;	// where a handler may jump to, if anywhere
	volatile int depth;		// handlers within handlers
	volatile int in_fiber;
	volatile int waits;		// handlers that wait for a byte
	int bytes[2];
	ucontext_t main_context, fiber_context;
	long fiber_until_ns;
	char *fiber_stack, *signal_stack;
};

static struct worker workers[MAX_THREADS];
static int n_workers;
static _Atomic uint64_t phase;
static _Atomic int stopping, sender_done;
static __thread struct worker *self;

static long now_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000L + t.tv_nsec;
}

static uint64_t next_random(uint64_t *state)
{
	uint64_t x = *state;
	x ^= x << 13;
	x ^= x >> 7;
	x ^= x << 17;
	return *state = x;
}

// --- targets: each does arithmetic of its own, one to one, so that no wrong step is lost

#define MULTIPLIER(i) (0x9e3779b97f4a7c15ull + 2 * (uint64_t)(i) * 0x10001)
#define ADDEND(i) (0x632be59bd9b4e019ull ^ ((uint64_t)(i) << 20))
#define SITE_MARK(i) (0xbf58476d1ce4e5b9ull * ((uint64_t)(i) + 1))

#define TARGET(i) NOIPA static uint64_t target_##i(uint64_t x) \
	{ return x * MULTIPLIER(0##i - 0100) + ADDEND(0##i - 0100); }

// Octal names from 100 to 177: 64 of them.
#define EACH8(M, p) M(p##0) M(p##1) M(p##2) M(p##3) M(p##4) M(p##5) M(p##6) M(p##7)
#define EACH44(M) EACH8(M, 10) EACH8(M, 11) EACH8(M, 12) EACH8(M, 13) \
	EACH8(M, 14) EACH8(M, 15) EACH8(M, 16) EACH8(M, 17)
EACH44(TARGET)
#define NAME(i) target_##i,
static const target_fn targets[N_TARGETS] = { EACH44(NAME) };

static inline uint64_t step(uint64_t y, unsigned i)
{
	return y * MULTIPLIER(i) + ADDEND(i);
}

// --- sites: calls from a register, calls from a table, tail jumps, computed gotos

#define CALL(i) NOIPA static uint64_t call_##i(uint64_t x, target_fn target) \
	{ return target(x) ^ SITE_MARK(0##i); }
#define TABLE(i) NOIPA static uint64_t table_##i(uint64_t x, unsigned index) \
	{ return targets[index](x) ^ SITE_MARK(0##i); }
#define TAIL(i) NOIPA static uint64_t tail_##i(uint64_t x, target_fn target) \
	{ return target(x ^ SITE_MARK(0##i)); }
#define EACH16(M) EACH8(M, 10) EACH8(M, 11)
#define EACH24(M) EACH16(M) EACH8(M, 12)
#define EACH32(M) EACH24(M) EACH8(M, 13)
EACH32(CALL)
EACH16(TABLE)
EACH24(TAIL)

#define OP(i) op_##i: x = step(x, i); goto *labels[*code++];
#define LOOP(i) NOIPA static uint64_t loop_##i(uint64_t x, const uint8_t *code) \
{ \
	static const void *const labels[N_LABELS] = { \
		&&op_0, &&op_1, &&op_2, &&op_3, &&op_4, &&op_5, &&op_6, &&op_7, &&op_8, \
		&&op_9, &&op_10, &&op_11, &&op_12, &&op_13, &&op_14, &&op_15, &&end }; \
	goto *labels[*code++]; \
	OP(0) OP(1) OP(2) OP(3) OP(4) OP(5) OP(6) OP(7) \
	OP(8) OP(9) OP(10) OP(11) OP(12) OP(13) OP(14) OP(15) \
end:	return x ^ SITE_MARK(i); \
}
#define EACH4(M) M(0) M(1) M(2) M(3)
EACH4(LOOP)

// --- which targets are hot: one to five, unequally, at each site its own, new each phase

static uint64_t hot[N_SITES];	// read without locks: any value is as good

static void change_phase(uint64_t *random)
{
	uint64_t now = atomic_fetch_add(&phase, 1);
	for (int site = 0; site < N_SITES; site++)
		// Some sites keep their targets, so that not all change at once.
		if (((site + now) & 3) != 0)
			__atomic_store_n(&hot[site], next_random(random), __ATOMIC_RELAXED);
	count(PHASES, 1);
}

static unsigned pick(uint64_t *random, int site, unsigned n)
{
	uint64_t r = next_random(random), h = __atomic_load_n(&hot[site], __ATOMIC_RELAXED);
	if (!(r >> 56))
		return (r >> 8) % n;	// one in 256, any: these take the slow path
	unsigned n_hot = 1 + h % 5, k = __builtin_ctzll(r | 16);
	return ((h >> 16) + 7 * (k < n_hot ? k : n_hot - 1)) % n;
}

// --- batches

#define DO_CALL(i) k = pick(random, 0##i - 0100, N_TARGETS); \
	x = call_##i(x, targets[k]); y = step(y, k) ^ SITE_MARK(0##i);
#define DO_TABLE(i) k = pick(random, N_CALLS + 0##i - 0100, N_TARGETS); \
	x = table_##i(x, k); y = step(y, k) ^ SITE_MARK(0##i);
#define DO_TAIL(i) k = pick(random, N_CALLS + N_TABLE + 0##i - 0100, N_TARGETS); \
	x = tail_##i(x, targets[k]); y = step(y ^ SITE_MARK(0##i), k);
#define DO_LOOP(i) \
	for (int at = 0; at < LOOP_LENGTH; at++) { \
		code[at] = pick(random, N_SITES - N_LOOPS + i, N_OPS); \
		y = step(y, code[at]); \
	} \
	x = loop_##i(x, code); y ^= SITE_MARK(i);

static void complain(const char *what, struct worker *w)
{
	if (atomic_fetch_add(&counters[WRONG].n, 1) == 0) {
		char line[160];
		int n = snprintf(line, sizeof(line), "wrong result: %s, thread %d, in_fiber %d\n",
				 what, (int)w->tid, w->in_fiber);
		if (write(2, line, n) < 0)
			_exit(3);
	}
}

NOIPA static void run_batch(struct worker *w, struct lane *lane)
{
	int now = lane->now;
	uint64_t x = lane->x[now], y = lane->y[now], *random = &w->random;
	uint8_t code[LOOP_LENGTH + 1];
	unsigned k;
	code[LOOP_LENGTH] = N_OPS;
	for (int again = 0; again < REPEATS; again++) {
		EACH32(DO_CALL) EACH16(DO_TABLE) EACH24(DO_TAIL) EACH4(DO_LOOP)
	}
	if (x != y) {
		complain("in a batch", w);
		x = y;
	}
	lane->x[!now] = x;
	lane->y[!now] = y;
	atomic_signal_fence(memory_order_seq_cst);
	lane->now = !now;
	atomic_fetch_add_explicit(&w->n_batches, 1, memory_order_relaxed);
	count(BRANCHES, REPEATS * (N_CALLS + N_TABLE + N_TAILS + N_LOOPS * (LOOP_LENGTH + 1)));
}

// The same sites, from a handler, on its own numbers.
NOIPA static void run_in_handler(struct worker *w)
{
	uint64_t x = next_random(&w->handler_random), y = x, *random = &w->handler_random;
	uint8_t code[LOOP_LENGTH + 1];
	unsigned k;
	code[LOOP_LENGTH] = N_OPS;
	EACH16(DO_CALL) EACH8(DO_TABLE, 10) EACH16(DO_TAIL) DO_LOOP(0) DO_LOOP(1)
	if (x != y)
		complain("in a handler", w);
	count(BRANCHES, 40 + 2 * (LOOP_LENGTH + 1));
}

// --- signals

static int signal_numbers[3];	// plain, on the alternate stack, swapcontext
static sigset_t our_signals;

// In a handler: wait as long as the kind says, in one system call or another.
static void block(struct worker *w, uint64_t r)
{
	count(BLOCKED, 1);
	if (r % 4 == 0) {
		char byte;
		w->waits++;
		while (read(w->bytes[0], &byte, 1) < 0 && errno == EINTR)
			;
		w->waits--;
		return;
	}
	// Mostly shorter than a grace period, now and then longer than many.
	long ns = r % 32 == 1 ? 300 * MS : r % 8 == 2 ? 10 * MS : 100000;
	struct timespec t = { 0, ns };
	while (nanosleep(&t, &t) && errno == EINTR)
		;
}

static void run_fiber(void)
{
	struct worker *w = self;
	if (!sigsetjmp(w->fiber_env, 0))
		w->env = &w->fiber_env;
	w->depth = 0;
	w->waits = 0;
	sigset_t usual = our_signals;
	sigdelset(&usual, signal_numbers[2]);	// one fiber a thread
	sigprocmask(SIG_UNBLOCK, &usual, NULL);
	while (now_ns() < w->fiber_until_ns && !atomic_load(&stopping))
		run_batch(w, &w->fiber_lane);
	sigprocmask(SIG_BLOCK, &our_signals, NULL);
	w->env = NULL;
	setcontext(&w->main_context);
	_exit(4);
}

// Leave what was interrupted where it is, go on elsewhere, come back to it later.
static void switch_away(struct worker *w, uint64_t r)
{
	int depth = w->depth, waits = w->waits;
	count(SWITCHES, 1);
	w->env = NULL;
	w->in_fiber = 1;
	w->fiber_until_ns = now_ns() + (r % 8 == 0 ? 500 * MS : (5 + r % 60) * MS);
	getcontext(&w->fiber_context);
	w->fiber_context.uc_stack.ss_sp = w->fiber_stack;
	w->fiber_context.uc_stack.ss_size = STACK_SIZE;
	w->fiber_context.uc_link = NULL;
	sigaddset(&w->fiber_context.uc_sigmask, signal_numbers[0]);
	sigaddset(&w->fiber_context.uc_sigmask, signal_numbers[1]);
	makecontext(&w->fiber_context, run_fiber, 0);
	swapcontext(&w->main_context, &w->fiber_context);
	w->depth = depth;
	w->in_fiber = 0;
	w->waits = waits;
	w->env = &w->main_env;
}

static void on_signal(int number, siginfo_t *info, void *context)
{
	(void)info;
	(void)context;
	struct worker *w = self;
	int saved = errno;
	uint64_t r = next_random(&w->handler_random) >> 8;
	count(SIGNALS, 1);
	w->depth++;
	run_in_handler(w);
	if (number == signal_numbers[1])
		count(ALT_STACK, 1);
	if (number == signal_numbers[2]) {
		switch_away(w, r);
		run_in_handler(w);
	} else if (w->depth < 3 && r % 4 < 2) {
		block(w, r >> 4);
		run_in_handler(w);
	} else if (w->env != NULL && r % 4 == 2) {
		count(JUMPS, 1);
		siglongjmp(*w->env, 1);
	}
	w->depth--;
	errno = saved;
}

// Dying, say where: the bytes below a trap tell poison from a stray one.
static void on_fault(int number, siginfo_t *info, void *context)
{
	char line[200];
	ucontext_t *at = context;
	int n = snprintf(line, sizeof(line), "signal %d code %d at rip %#llx rsp %#llx\n", number,
			 info->si_code, (unsigned long long)at->uc_mcontext.gregs[REG_RIP],
			 (unsigned long long)at->uc_mcontext.gregs[REG_RSP]);
	if (write(2, line, n) < 0)
		_exit(3);
	signal(number, SIG_DFL);
	raise(number);	// dies when this handler returns
}

static void *send_signals(void *arg)
{
	long hz = (long)arg, next = now_ns();
	uint64_t random = 0x2545f4914f6cdd1dull, n = 0;
	while (!atomic_load(&stopping)) {
		struct timespec pause = { 0, 500000 };
		nanosleep(&pause, NULL);
		for (; hz && next < now_ns(); next += 1000000000L / hz, n++) {
			uint64_t r = next_random(&random);
			// One in twenty switches stacks, half of the others take the alternate one.
			int which = (r >> 8) % 20 == 0 ? 2 : (r >> 16) & 1;
			int to = (r >> 24) % n_workers;
			if (!syscall(SYS_tgkill, getpid(), workers[to].tid, signal_numbers[which]))
				count(SENT, 1);
			struct worker *w = &workers[n % n_workers];
			if (w->waits && write(w->bytes[1], "x", 1) < 0 && errno != EAGAIN)
				complain("write to a pipe", w);
		}
	}
	// Nobody is left waiting in a handler.
	while (!atomic_load(&sender_done)) {
		for (int i = 0; i < n_workers; i++)
			if (workers[i].waits && write(workers[i].bytes[1], "x", 1) < 0 && errno != EAGAIN)
				complain("write to a pipe", &workers[i]);
		usleep(1000);
	}
	return NULL;
}

static void *change_phases(void *arg)
{
	uint64_t random = (uint64_t)arg;
	while (!atomic_load(&stopping)) {
		struct timespec pause = { 0, (100 + next_random(&random) % 200) * MS };
		nanosleep(&pause, NULL);
		change_phase(&random);
	}
	return NULL;
}

static void *work(void *arg)
{
	struct worker *w = self = arg;
	stack_t stack = { .ss_sp = w->signal_stack, .ss_size = STACK_SIZE };
	sigaltstack(&stack, NULL);
	w->tid = gettid();
	// The mask is not for siglongjmp to restore: it would while still on the alternate stack.
	if (!sigsetjmp(w->main_env, 0))
		w->env = &w->main_env;
	w->depth = 0;
	w->waits = 0;
	pthread_sigmask(SIG_UNBLOCK, &our_signals, NULL);
	while (!atomic_load(&stopping))
		run_batch(w, &w->main_lane);
	return NULL;
}

static void set_up_signals(void)
{
	struct sigaction action = { .sa_sigaction = on_signal, .sa_flags = SA_SIGINFO | SA_RESTART };
	struct sigaction fault = { .sa_sigaction = on_fault, .sa_flags = SA_SIGINFO | SA_ONSTACK };
	static const int faults[] = { SIGTRAP, SIGSEGV, SIGILL, SIGBUS };
	sigemptyset(&our_signals);
	for (int i = 0; i < 3; i++) {
		// Real-time ones: they queue, so that none is merged with another.
		signal_numbers[i] = SIGRTMIN + i;
		sigaddset(&our_signals, signal_numbers[i]);
	}
	sigaction(signal_numbers[0], &action, NULL);
	// Nobody switches away from the alternate stack: the next signal would overwrite it.
	action.sa_flags |= SA_ONSTACK;
	sigaddset(&action.sa_mask, signal_numbers[2]);
	sigaction(signal_numbers[1], &action, NULL);
	action.sa_flags &= ~SA_ONSTACK;
	action.sa_mask = our_signals;
	sigaction(signal_numbers[2], &action, NULL);
	for (int i = 0; i < 4; i++)
		sigaction(faults[i], &fault, NULL);
	pthread_sigmask(SIG_BLOCK, &our_signals, NULL);	// for the threads that take none
}

static char *new_stack(void)
{
	char *stack = mmap(NULL, STACK_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
			   -1, 0);
	if (stack == MAP_FAILED)
		abort();
	return stack;
}

static void answer(void)
{
	int n_idle = 0;
	for (int i = 0; i < n_workers; i++)
		n_idle += workers[i].n_batches == workers[i].marked;
	for (int i = 0; i < N_COUNTERS; i++)
		printf("%s=%llu ", counter_names[i], (unsigned long long)counters[i].n);
	printf("idle=%d\n", n_idle);
	fflush(stdout);
}

int main(int argc, char **argv)
{
	if (argc < 3)
		return 2;
	n_workers = atoi(argv[1]);
	if (n_workers < 1 || n_workers > MAX_THREADS)
		return 2;
	uint64_t random = argc > 3 ? strtoull(argv[3], NULL, 0) * 2 + 1 : 12345;
	pthread_t sender, phases;

	for (int i = 0; i < 10; i++)
		next_random(&random);
	for (int site = 0; site < N_SITES; site++)
		hot[site] = next_random(&random);
	set_up_signals();
	for (int i = 0; i < n_workers; i++) {
		struct worker *w = &workers[i];
		w->random = next_random(&random);
		w->handler_random = next_random(&random);
		w->main_lane.x[0] = w->main_lane.y[0] = next_random(&random);
		w->fiber_lane.x[0] = w->fiber_lane.y[0] = next_random(&random);
		w->fiber_stack = new_stack();
		w->signal_stack = new_stack();
		if (pipe2(w->bytes, O_CLOEXEC) || fcntl(w->bytes[1], F_SETFL, O_NONBLOCK))
			abort();
		pthread_create(&w->thread, NULL, work, w);
	}
	for (int i = 0; i < n_workers; i++)
		while (!*(volatile pid_t *)&workers[i].tid)
			usleep(100);
	pthread_create(&sender, NULL, send_signals, (void *)(long)atoi(argv[2]));
	pthread_create(&phases, NULL, change_phases, (void *)next_random(&random));
	printf("ready\n");
	fflush(stdout);

	char line[80];
	while (fgets(line, sizeof(line), stdin)) {
		for (int i = 0; !strcmp(line, "mark\n") && i < n_workers; i++)
			workers[i].marked = workers[i].n_batches;
		answer();
	}
	atomic_store(&stopping, 1);
	for (int i = 0; i < n_workers; i++)
		pthread_join(workers[i].thread, NULL);
	atomic_store(&sender_done, 1);
	pthread_join(sender, NULL);
	pthread_join(phases, NULL);
	answer();
	return counters[WRONG].n != 0;
}
