// SPDX-License-Identifier: Apache-2.0
// Programs that run on stacks of their own making, where they look like threads' own.
//
// stacks inside: a handler that interrupts block 1 in main() goes to a coroutine on an array
//     of main(), above the frames that it leaves.
// stacks below: the same with two coroutines in one mapping above one guard page; it leaves
//     the lower one.
// stacks moving: a handler that interrupts block 2 in one coroutine goes to another, where a
//     handler interrupts block 1; "g" lets that one go back to the first handler ("moved").
// stacks spin: the first thread is in block 1, another one answers.
// stacks neighbour MIB: eight threads sleep, one of them on a stack below an allocation.
// Each prints "ready"; "w" tells where block 1, block 2 and nap() are (inverted), "g" lets the program
// out of the block that it is in ("left"). Ends when standard input is closed.
#define _GNU_SOURCE
#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/time.h>
#include <time.h>
#include <ucontext.h>
#include <unistd.h>

enum { STACK_SIZE = 65536, PAGE_SIZE = 4096 };

// A block stands for one of ours that was retired: nothing leads there any more.
static volatile int is_in[3], may_leave[3];
#define BLOCK(n)                                                                  \
	extern char __start_code##n[], __stop_code##n[];                        \
	__attribute__((noinline, section("code" #n))) static void block##n(void) \
	{                                                                         \
		is_in[n] = 1;                                                     \
		while (!may_leave[n])                                             \
			__builtin_ia32_pause();                                   \
		is_in[n] = 0;                                                     \
	}
BLOCK(1)
BLOCK(2)

__attribute__((noinline, used)) static void nap(void)
{
	struct timespec ten = { 10, 0 };
	nanosleep(&ten, NULL);
}

static void say(const char *line)
{
	printf("%s\n", line);
	fflush(stdout);
}

// Inverted, and noted early: an address left on a stack would look like a saved PC.
static long places[5];

__attribute__((constructor)) static void note_places(void)
{
	places[0] = ~(long)__start_code1, places[1] = ~(long)__stop_code1;
	places[2] = ~(long)__start_code2, places[3] = ~(long)__stop_code2;
	places[4] = ~(long)nap;
}

// Answers until it is told to leave a block, or standard input is closed.
static void serve(int block)
{
	char line[16];
	while (read(0, line, sizeof line) > 0) {
		if (line[0] == 'g') {
			may_leave[block] = 1;
			return;
		}
		for (int i = 0; i < 5; i++)
			printf("%lx%c", places[i], i < 4 ? ' ' : '\n');
		fflush(stdout);
	}
	exit(0);
}

static void *serve_first(void *arg)
{
	serve(1);
	return arg;
}

static void *stay(void *arg)
{
	for (;;)
		pause();
	return arg;
}

// --- coroutines

static ucontext_t main_context, first, second;
static int phase;

// The two in the first handler's phase: where it leaves, and where it goes.
static ucontext_t *from, *to;

static void stop_timer(void)
{
	struct itimerval never = { { 0, 0 }, { 0, 0 } };
	setitimer(ITIMER_REAL, &never, NULL);
}

static void interrupt(int number)
{
	(void)number;
	if (phase == 0 && (is_in[1] || is_in[2])) {
		phase = 1;
		swapcontext(from, to);
		if (is_in[2]) {
			say("moved");
			serve(2);
		}
	} else if (phase == 1 && is_in[1] && is_in[2]) {
		phase = 2;
		stop_timer();
		say("ready");
		serve(1);
	}
}

static void start_timer(void)
{
	struct sigaction action = { .sa_handler = interrupt, .sa_flags = SA_NODEFER | SA_RESTART };
	struct itimerval often = { { 0, 5000 }, { 0, 5000 } };
	sigaction(SIGALRM, &action, NULL);
	setitimer(ITIMER_REAL, &often, NULL);
}

static void leave(void)
{
	stop_timer();
	say("left");
	serve(0);
}

static void make(ucontext_t *context, char *stack, void (*run)(void))
{
	getcontext(context);
	context->uc_stack.ss_sp = stack;
	context->uc_stack.ss_size = STACK_SIZE;
	makecontext(context, run, 0);
}

static char *map_guarded(size_t size)
{
	char *memory = mmap(NULL, PAGE_SIZE + size + PAGE_SIZE, PROT_NONE,
			    MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
	mprotect(memory + PAGE_SIZE, size, PROT_READ | PROT_WRITE);
	return memory + PAGE_SIZE;
}

static void run_above(void)
{
	stop_timer();
	say("ready");
	serve(1);
	swapcontext(to, from);
}

static void run_below(void)
{
	block1();
	leave();
}

__attribute__((noinline)) static void overwrite_stack(void)
{
	volatile char bytes[16384];
	for (size_t i = 0; i < sizeof bytes; i++)
		bytes[i] = 0;
}

static void run_first(void)
{
	block1();
	overwrite_stack();
	swapcontext(&first, &second);
}

static void run_second(void)
{
	block2();
	leave();
}

static void run_inside(void)
{
	char array[STACK_SIZE];
	from = &main_context, to = &first;
	make(&first, array, run_above);
	start_timer();
	block1();
	leave();
}

int main(int argc, char **argv)
{
	const char *mode = argc > 1 ? argv[1] : "";
	pthread_t thread;
	if (!strcmp(mode, "inside")) {
		run_inside();
	} else if (!strcmp(mode, "below")) {
		char *stacks = map_guarded(2 * STACK_SIZE);
		from = &first, to = &second;
		make(&first, stacks, run_below);
		make(&second, stacks + STACK_SIZE, run_above);
		start_timer();
		swapcontext(&main_context, &first);
	} else if (!strcmp(mode, "moving")) {
		from = &second, to = &first;
		make(&first, map_guarded(STACK_SIZE), run_first);
		make(&second, map_guarded(STACK_SIZE), run_second);
		start_timer();
		swapcontext(&main_context, &second);
	} else if (!strcmp(mode, "spin")) {
		pthread_create(&thread, NULL, serve_first, NULL);
		say("ready");
		block1();
		say("left");
		serve(0);
	} else if (argc > 2) {
		size_t size = strtoul(argv[2], NULL, 0) << 20;
		char *volatile memory = malloc(size);
		memset(memory, 1, size);
		for (int i = 0; i < 8; i++)
			pthread_create(&thread, NULL, stay, NULL);
		say("ready");
		serve(0);
	}
	return 0;
}
