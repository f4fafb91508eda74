// SPDX-License-Identifier: Apache-2.0
// One loop for each way to call a function or to ask for a switch, all alike but for that.
//
// Usage: calls                 Prints "ready"; then, for each line "FORM ROUNDS", CPU nanoseconds
//                              and the result; for "where FORM" the address of its loop.
//        calls FORM ROUNDS     Runs one loop, prints its result.
// Where loops and callees lie is said by macros: LOOP_OFFSET and CALLEE_OFFSET are theirs behind
// a multiple of 64, GAP is a stretch of nothing between the two. Compile with
// -fno-toplevel-reorder, without alignment, and with the plugin, which widens the plain dynamic
// call; calls that shall stay as they are say so.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "calls.h"

#define TEXT_OF(...) TEXT_OF2(__VA_ARGS__)
#define TEXT_OF2(...) #__VA_ARGS__
#define AT(offset)                                                                             \
	__asm__(".pushsection .text\n\t.p2align 6\n\t.skip " TEXT_OF(offset) ", 0xcc\n\t.popsection")

DYNAMIC_CALL_TABLE(handlers, unsigned long, unsigned long);
DEFINE_STATIC_CALL(chosen, first);
STATIC_CALL_TARGET(chosen, hot);
STATIC_CALL_TARGET(elsewhere, hot);
DEFINE_STATIC_KEY_FALSE(feature);
int is_off, is_on = 1;

#define RETPOLINE __attribute__((indirect_branch("thunk")))
#define PLAIN __attribute__((indirect_branch("keep")))
#define ALONE __attribute__((no_optpoline))

// What is done in each round is nothing that a compiler could foresee or leave out.
#define LOOP(name, attributes, ...)                                                            \
	AT(LOOP_OFFSET);                                                                       \
	__attribute__((noipa)) attributes static unsigned long name(                           \
		unsigned long rounds, unsigned long x, function *call)                         \
	{                                                                                      \
		(void)call;                                                                    \
		do {                                                                           \
			__VA_ARGS__;                                                           \
			__asm__ volatile("" : "+r"(x) : : "memory");                           \
		} while (--rounds);                                                            \
		return x;                                                                      \
	}

LOOP(empty, , x += 3)
LOOP(direct, , x = hot(x))
LOOP(pointer, PLAIN ALONE, x = call(x))
LOOP(retpoline, RETPOLINE ALONE, x = call(x))
LOOP(dynamic, RETPOLINE, x = dynamic_call(handlers, call, x))
LOOP(dynamic_plain, PLAIN, x = dynamic_call(handlers, call, x))
LOOP(static_inline, , x = static_call(chosen)(x))
LOOP(static_out_of_line, , x = static_call(elsewhere)(x))

// What a switch switches is one instruction, the same for each.
#define WORK __asm__ volatile("add $5, %0" : "+r"(x))
LOOP(key, , x += 3; if (static_branch_unlikely(&feature)) WORK)
LOOP(variable_off, , x += 3; if (__builtin_expect(is_off, 0)) WORK)
LOOP(variable_on, , x += 3; if (__builtin_expect(is_on, 0)) WORK)

__asm__(".pushsection .text\n\t.skip " TEXT_OF(GAP) ", 0xcc\n\t.popsection");
AT(CALLEE_OFFSET);
__attribute__((noipa)) unsigned long first(unsigned long x) { return x + 3; }
AT(CALLEE_OFFSET);
__attribute__((noipa)) unsigned long hot(unsigned long x) { return x + 3; }

static const struct {
	const char *name;
	unsigned long (*loop)(unsigned long, unsigned long, function *);
} forms[] = {
	{ "empty", empty },
	{ "direct", direct },
	{ "pointer", pointer },
	{ "retpoline", retpoline },
	{ "dynamic", dynamic },
	{ "dynamic_plain", dynamic_plain },
	{ "static_inline", static_inline },
	{ "static_out_of_line", static_out_of_line },
	{ "key", key },
	{ "variable_off", variable_off },
	{ "variable_on", variable_on },
};
enum { FORMS = sizeof(forms) / sizeof(*forms) };

static int find(const char *name)
{
	for (int i = 0; i < FORMS; i++)
		if (!strcmp(forms[i].name, name))
			return i;
	fprintf(stderr, "there is no form %s\n", name);
	exit(2);
}

static unsigned long long cpu_ns(void)
{
	struct timespec t;
	clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
	return (unsigned long long)t.tv_sec * 1000000000 + t.tv_nsec;
}

int main(int argc, char **argv)
{
	if (argc == 3) {
		printf("%lu\n", forms[find(argv[1])].loop(atol(argv[2]), 0, hot));
		return 0;
	}
	setvbuf(stdout, NULL, _IOLBF, 0);
	puts("ready");
	char line[64], name[32];
	unsigned long rounds;
	while (fgets(line, sizeof line, stdin)) {
		if (sscanf(line, "where %31s", name) == 1) {
			printf("%lx\n", (unsigned long)forms[find(name)].loop);
		} else if (sscanf(line, "%31s %lu", name, &rounds) == 2 && rounds) {
			int i = find(name);
			unsigned long long begin = cpu_ns();
			unsigned long result = forms[i].loop(rounds, 0, hot);
			printf("%llu %lu\n", cpu_ns() - begin, result);
		} else {
			puts("unknown command");
		}
	}
	return 0;
}
