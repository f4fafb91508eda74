// SPDX-License-Identifier: Apache-2.0
/* Threads count in rows of cells, one row for each CPU, as learning blocks do, but with critical
 * sections of their own writing: an independent check of who takes counts out meanwhile.
 *
 * rows THREADS [MOVE_USEC]   With MOVE_USEC, another thread moves them from CPU to CPU that often.
 *
 * On standard input: "where" answers "FD ADDRESS"; "go" answers "going" and lets them count until
 * "halt", which answers how often each of the N_SINGLE cells was counted and each of the N_TARGETS
 * targets was seen, all threads together. A row is ROW_SIZE bytes, row 0 is shared:
 *   N_SINGLE counts, then N_SLOTS pairs of target and count, then a pair for those without a slot.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/rseq.h>
#include <unistd.h>

enum { ROW_SHIFT = 12, ROW_SIZE = 1 << ROW_SHIFT, MAX_THREADS = 16 };
enum { N_SINGLE = 8, N_SLOTS = 4, N_TARGETS = 3 };

static char *rows;
static atomic_int running, n_going;
static uint64_t singles[MAX_THREADS][N_SINGLE], targets[MAX_THREADS][N_TARGETS];
static pthread_t threads[MAX_THREADS];
static int n_threads, n_cpus, move_usec;

/* begin: rseq_cs = descriptor; rax = address of this CPU's row. %[r] is the area's offset. */
#define SECTION_BEGIN                                                                  \
    ".pushsection __rseq_cs, \"aw\"\n\t.balign 32\n3:\n\t.long 0, 0\n\t"               \
    ".quad 1f, 2f - 1f, 4f\n\t.popsection\n\t"                                         \
    "lea 3b(%%rip), %%rax\n\tmov %%rax, %%fs:8(%[r])\n1:\n\t"                          \
    "mov %%fs:(%[r]), %%eax\n\tcmp %%eax, %%fs:4(%[r])\n\tjne %l[aborted]\n\t"         \
    "shl %[shift], %%rax\n\tadd %[first], %%rax\n\t"
#define SECTION_END                                                                    \
    "\n2:\n\tmovq $0, %%fs:8(%[r])\n\t"                                                \
    ".pushsection __rseq_failure, \"ax\"\n\t.byte 0x0f, 0xb9, 0x3d\n\t"                \
    ".long 0x53053053\n4:\n\tjmp %l[aborted]\n\t.popsection"

static void count_single(int cell)
{
    asm volatile goto(SECTION_BEGIN "incq (%%rax, %[off])" SECTION_END
             : : [r] "r"(__rseq_offset), [shift] "i"(ROW_SHIFT), [first] "r"(rows + ROW_SIZE),
                 [off] "r"(8L * cell) : "rax", "memory", "cc" : aborted);
    return;
aborted:
    atomic_fetch_add((_Atomic uint64_t *)(rows + 8L * cell), 1);
}

static void count_target(uint64_t target)
{
    long n = N_SLOTS;
    asm volatile goto(SECTION_BEGIN "add %[off], %%rax\n"
             "5:\tcmp %[t], (%%rax)\n\tje 6f\n\tcmpq $0, (%%rax)\n\tje 6f\n\t"
             "add $16, %%rax\n\tdec %%rcx\n\tjnz 5b\n"
             "6:\tmov %[t], (%%rax)\n\tincq 8(%%rax)" SECTION_END
             : "+c"(n) : [r] "r"(__rseq_offset), [shift] "i"(ROW_SHIFT),
                 [first] "r"(rows + ROW_SIZE), [off] "i"(8 * N_SINGLE), [t] "r"(target)
             : "rax", "memory", "cc" : aborted);
    return;
aborted:;
    _Atomic uint64_t *slot = (_Atomic uint64_t *)(rows + 8 * N_SINGLE);
    for (int i = 0; i < N_SLOTS; i++, slot += 2) {
        uint64_t found = atomic_load(slot);
        if (found == target ||
            (!found && !(atomic_fetch_or(&slot[1], 1UL << 63) >> 63) &&
             (atomic_store(slot, target), 1))) {
            atomic_fetch_add(&slot[1], 1);
            return;
        }
    }
    atomic_store(slot, target);
    atomic_fetch_add(&slot[1], 1);
}

static void *work(void *argument)
{
    long self = (long)argument;
    uint64_t random = 88172645463325252u + self;
    for (;;) {
        while (!atomic_load(&running))
            usleep(100);
        atomic_fetch_add(&n_going, 1);
        while (atomic_load_explicit(&running, memory_order_relaxed)) {
            random ^= random << 13, random ^= random >> 7, random ^= random << 17;
            int cell = random % N_SINGLE, target = (random >> 32) % N_TARGETS;
            count_single(cell);
            singles[self][cell]++;
            count_target(target + 1);
            targets[self][target]++;
        }
        atomic_fetch_sub(&n_going, 1);
    }
    return NULL;
}

static void *move(void *unused)
{
    for (unsigned turn = 0;; turn++) {
        usleep(move_usec);
        for (int i = 0; i < n_threads; i++) {
            cpu_set_t set;
            CPU_ZERO(&set);
            CPU_SET((turn + i) % n_cpus, &set);
            pthread_setaffinity_np(threads[i], sizeof set, &set);
        }
    }
    return unused;
}

int main(int argc, char **argv)
{
    n_threads = atoi(argv[1]);
    move_usec = argc > 2 ? atoi(argv[2]) : 0;
    n_cpus = sysconf(_SC_NPROCESSORS_CONF);
    int fd = memfd_create("rows", MFD_CLOEXEC);
    size_t size = (size_t)(1 + n_cpus) << ROW_SHIFT;
    if (n_threads < 1 || n_threads > MAX_THREADS || fd < 0 || ftruncate(fd, size))
        return 1;
    rows = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    for (long i = 0; i < n_threads; i++)
        pthread_create(&threads[i], NULL, work, (void *)i);
    pthread_t mover;
    if (move_usec)
        pthread_create(&mover, NULL, move, NULL);
    char line[64];
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("ready");
    while (fgets(line, sizeof line, stdin)) {
        if (!strcmp(line, "where\n")) {
            printf("%d %lu\n", fd, (unsigned long)rows);
        } else if (!strcmp(line, "go\n")) {
            atomic_store(&running, 1);
            while (atomic_load(&n_going) < n_threads)
                usleep(100);
            puts("going");
        } else if (!strcmp(line, "halt\n")) {
            atomic_store(&running, 0);
            while (atomic_load(&n_going))
                usleep(100);
            for (int cell = 0; cell < N_SINGLE + N_TARGETS; cell++) {
                uint64_t sum = 0;
                for (int i = 0; i < n_threads; i++)
                    sum += cell < N_SINGLE ? singles[i][cell] : targets[i][cell - N_SINGLE];
                printf("%lu%c", sum, cell < N_SINGLE + N_TARGETS - 1 ? ' ' : '\n');
            }
        }
    }
    puts("ok");
    return 0;
}
