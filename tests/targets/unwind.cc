// SPDX-License-Identifier: Apache-2.0
// What unwinds the stack, through indirect calls and tail calls, checking itself.
//
// unwind: a thread throws and catches through chains of calls over and over. Prints
// "ready". Commands on standard input, each answered with one line:
//   frames N   "frames ADDR...": what backtrace() says in a callee of chain N, 0 or 1
//   cancel N   N threads, one after another, are cancelled in a callee: "cancelled N" if each
//              ran its cleanup handler and all destructors
//   exit       "exited": a thread calls pthread_exit in a callee
// At its end prints "wrong N rounds N" and exits with 1 if N wrong is not 0.
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <execinfo.h>
#include <pthread.h>
#include <stdexcept>
#include <string>
#include <unistd.h>

#define NOINLINE __attribute__((noinline, noclone))

static std::atomic<bool> stopping;
static std::atomic<unsigned long> rounds, wrong;
static thread_local unsigned depth;
static thread_local unsigned unwound;

struct Guard {
	Guard() { depth++; }
	~Guard() { depth--; unwound++; }
};

struct Error : std::runtime_error {
	uint64_t value;
	explicit Error(uint64_t v) : std::runtime_error("value " + std::to_string(v)), value(v) {}
};

typedef uint64_t (*function)(uint64_t);

// --- callees

enum { NOTHING = -1 };
static std::atomic<int> wants_frames = NOTHING;	// of which chain
static thread_local int now_in;
static void *frames[64];
static int n_frames;

static NOINLINE uint64_t plain(uint64_t x) { return x * 3 + 1; }

static NOINLINE uint64_t throws(uint64_t x)
{
	if ((x & 7) == 0)
		throw Error(x);
	return x * 3 + 1;
}

static NOINLINE uint64_t throws_deep(uint64_t x)
{
	Guard guard;
	uint64_t y = throws(x);
	return y;
}

static NOINLINE uint64_t looks(uint64_t x)
{
	if (wants_frames == now_in) {
		n_frames = backtrace(frames, 64);
		wants_frames = NOTHING;
	}
	return x * 3 + 1;
}

static NOINLINE uint64_t waits(uint64_t x)
{
	if (x == ~0ul)
		for (;;)
			pause();	// a cancellation point
	return x * 3 + 1;
}

static NOINLINE uint64_t exits(uint64_t x)
{
	if (x == ~0ul)
		pthread_exit((void *)0x77);
	return x * 3 + 1;
}

// --- the chain: a call, a call from a frame with a destructor, a tail call

static NOINLINE uint64_t tail(function f, uint64_t x) { return f(x); }

typedef uint64_t (*through)(function, uint64_t);

static NOINLINE uint64_t guarded(function f, uint64_t x)
{
	Guard guard;
	uint64_t y = f(x);
	return y;
}

static volatile through links[2] = {tail, guarded};

static NOINLINE uint64_t outer(unsigned link, function f, uint64_t x)
{
	Guard guard;
	uint64_t y = links[link](f, x);
	return y;
}

static function const functions[] = {plain, throws, throws_deep, looks, waits, exits};
enum { N_HOT = 5 };

static void check(bool right)
{
	if (!right)
		wrong++;
}

static NOINLINE void call_once(unsigned link, function f, uint64_t x)
{
	now_in = link;
	bool may_throw = (f == throws || f == throws_deep) && (x & 7) == 0;
	unsigned before = depth;
	try {
		uint64_t y = outer(link, f, x);
		check(!may_throw && y == x * 3 + 1);
	} catch (const Error &error) {
		check(may_throw && error.value == x);
		check(error.what() == "value " + std::to_string(x));
	}
	check(depth == before);
}

static void *work(void *)
{
	for (uint64_t x = 1; !stopping; x++) {
		for (unsigned link = 0; link < 2; link++)
			for (unsigned f = 0; f < N_HOT; f++)
				for (unsigned i = 0; i < 8; i++)
					call_once(link, functions[f], x & 63);
		rounds++;
	}
	return nullptr;
}

// --- cancellation and exit

static thread_local unsigned cleaned;
static std::atomic<unsigned> last_cleaned, last_unwound, last_depth;

static void clean(void *)
{
	cleaned++;
	last_cleaned = cleaned;
	last_unwound = unwound;
	last_depth = depth;
}

static void *be_ended(void *f)
{
	pthread_cleanup_push(clean, nullptr);
	for (uint64_t x = 0; x < 1000; x++)
		call_once(x & 1, (function)f, x);
	unwound = 0;
	outer(1, (function)f, ~0ul);	// two guards
	check(false);
	pthread_cleanup_pop(0);
	return nullptr;
}

static bool end_one(function f, bool cancels)
{
	pthread_t thread;
	void *result;
	last_cleaned = 0;
	last_unwound = 0;
	last_depth = 99;
	if (pthread_create(&thread, nullptr, be_ended, (void *)f))
		return false;
	if (cancels)
		pthread_cancel(thread);
	pthread_join(thread, &result);
	return result == (cancels ? PTHREAD_CANCELED : (void *)0x77) && last_cleaned == 1 &&
	       last_unwound == 2 && last_depth == 0;
}

int main()
{
	pthread_t worker;
	void *warm[4];
	backtrace(warm, 4);	// loads libgcc_s now, not in the middle
	pthread_create(&worker, nullptr, work, nullptr);
	setvbuf(stdout, nullptr, _IOLBF, 0);
	puts("ready");
	char line[64];
	while (fgets(line, sizeof line, stdin)) {
		if (!strncmp(line, "frames", 6)) {
			wants_frames = atoi(line + 6);
			while (wants_frames != NOTHING)
				usleep(100);
			printf("frames");
			for (int i = 0; i < n_frames; i++)
				printf(" %lx", (unsigned long)frames[i]);
			printf("\n");
		} else if (!strncmp(line, "cancel", 6)) {
			unsigned n = atoi(line + 6), n_right = 0;
			for (unsigned i = 0; i < n; i++)
				n_right += end_one(waits, true);
			printf("cancelled %u\n", n_right);
		} else if (!strncmp(line, "exit", 4)) {
			printf("exited %d\n", (int)end_one(exits, false));
		} else {
			printf("what?\n");
		}
	}
	stopping = true;
	pthread_join(worker, nullptr);
	printf("wrong %lu rounds %lu\n", wrong.load(), rounds.load());
	return wrong != 0;
}
