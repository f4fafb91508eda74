// SPDX-License-Identifier: Apache-2.0
// A program that shuts itself in, then branches indirectly and checks every result with
// nothing but read() and write().
// Usage: confined HOW [DIRECTORY]. Prints "ready", answers each line on standard input with
// "rounds N", having moved its text to huge pages before if the line is "huge", and let go of
// its first thread if it is "leave"; at its end prints "wrong N rounds N" and exits with 1 if
// N wrong is not 0.
// HOW: free; strict (seccomp); kills (a filter that kills on memfd_create, mmap and munmap);
// refuses (the same with EPERM); half (as kills, but in a second thread only, which works
// while the first sleeps); mdwe (prctl); systemd (the filter of MemoryDenyWriteExecute=);
// root (chroot to DIRECTORY); nobody (another user); nodump; memlock (MCL_FUTURE with
// 256 KiB, as nobody); leader (the first thread exits); later (it exits when told);
// huge (text on huge pages).
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <grp.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#ifndef PR_SET_MDWE
#define PR_SET_MDWE 65
#define PR_MDWE_REFUSE_EXEC_GAIN 1
#endif
#define HUGE_SIZE (2ul << 20)

typedef uint64_t (*function)(uint64_t);
#define F(n) \
    static __attribute__((noinline)) uint64_t f##n(uint64_t x) { return x * (2 * n + 3) + n; }
F(0) F(1) F(2) F(3)
static const function functions[4] = {f0, f1, f2, f3};
static uint64_t rounds, wrong;

static void churn(unsigned n) {
    uint64_t x = rounds;
    for (unsigned i = 0; i < n; i++) {
        unsigned k = (i & 31) == 31 ? (i >> 5) & 3 : (i & 1) * 3;
        uint64_t y = functions[k](x);
        if (y != x * (2 * k + 3) + k) wrong++;
        x = y;
    }
    rounds++;
}

static void check(int is_good, const char *what) {
    if (is_good) return;
    perror(what);
    _exit(2);
}

// --- without the C library, which may use calls that are not allowed any more

static int is_strict;
static volatile int is_told_to_leave;
static void use_huge_pages(void);

static void say(const char *word, uint64_t number, char last) {
    char line[64], digits[24];
    size_t n = strlen(word), n_digits = 0;
    memcpy(line, word, n);
    do digits[n_digits++] = (char)('0' + number % 10);
    while (number /= 10);
    while (n_digits) line[n++] = digits[--n_digits];
    line[n++] = last;
    check(write(1, line, n) == (ssize_t)n, "write");
}

static void *work(void *unused) {
    char line[256];
    ssize_t n;
    while ((n = read(0, line, sizeof line)) != 0) {
        if (n >= 4 && !memcmp(line, "huge", 4)) use_huge_pages();
        if (n >= 5 && !memcmp(line, "leave", 5)) is_told_to_leave = 1;
        if (n > 0) say("rounds ", rounds, '\n');
        churn(4096);
    }
    say("wrong ", wrong, ' ');
    say("rounds ", rounds, '\n');
    syscall(is_strict ? SYS_exit : SYS_exit_group, wrong != 0);
    return unused;
}

// --- ways to be shut in

#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define RETURN(value) BPF_STMT(BPF_RET | BPF_K, value)
#define FORBID(name, value) \
    LOAD(nr), BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_##name, 0, 1), RETURN(value)
#define FORBID_IF(name, arg, bits, value)                                                  \
    LOAD(nr), BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_##name, 0, 4), LOAD(args[arg]),       \
        BPF_STMT(BPF_ALU | BPF_AND | BPF_K, bits),                                         \
        BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, bits, 0, 1), RETURN(value)

static void filter(unsigned action) {
    struct sock_filter code[] = {FORBID(memfd_create, action), FORBID(mmap, action),
                                 FORBID(munmap, action), RETURN(SECCOMP_RET_ALLOW)};
    struct sock_fprog program = {sizeof code / sizeof *code, code};
    check(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs");
    check(!syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program), "seccomp");
}

// What systemd installs for MemoryDenyWriteExecute=yes.
static void filter_as_systemd(void) {
    unsigned action = SECCOMP_RET_ERRNO | EPERM;
    struct sock_filter code[] = {
        FORBID_IF(mmap, 2, PROT_EXEC | PROT_WRITE, action),
        FORBID_IF(mprotect, 2, PROT_EXEC, action),
        FORBID_IF(pkey_mprotect, 2, PROT_EXEC, action),
        FORBID_IF(shmat, 2, 0100000, action),  // SHM_EXEC
        RETURN(SECCOMP_RET_ALLOW),
    };
    struct sock_fprog program = {sizeof code / sizeof *code, code};
    check(!prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs");
    check(!syscall(SYS_seccomp, SECCOMP_SET_MODE_FILTER, 0, &program), "seccomp");
}

static void become_nobody(void) {
    check(!setgroups(0, NULL) && !setresgid(65534, 65534, 65534), "setresgid");
    check(!setresuid(65534, 65534, 65534), "setresuid");
}

static void lock_memory(void) {
    struct rlimit limit = {256 << 10, 256 << 10};
    check(!setrlimit(RLIMIT_MEMLOCK, &limit), "setrlimit");
    become_nobody();
    check(!mlockall(MCL_FUTURE), "mlockall");
}

// Copy our text to a huge page and put that in its place, as some servers do.
static void use_huge_pages(void) {
    extern const char __etext;
    uintptr_t start = (uintptr_t)&use_huge_pages & -HUGE_SIZE;
    size_t size = (uintptr_t)&__etext - start;
    char *room = mmap(NULL, 2 * HUGE_SIZE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    check(room != MAP_FAILED, "mmap");
    char *copy = (char *)(((uintptr_t)room + HUGE_SIZE - 1) & -HUGE_SIZE);
    check(!madvise(copy, HUGE_SIZE, MADV_HUGEPAGE), "madvise");
    memcpy(copy, (void *)start, size);
    check(!mprotect(copy, HUGE_SIZE, PROT_READ | PROT_EXEC), "mprotect");
    check(mremap(copy, HUGE_SIZE, HUGE_SIZE, MREMAP_MAYMOVE | MREMAP_FIXED, start) == (void *)start,
          "mremap");
}

static void *work_filtered(void *unused) {
    filter(SECCOMP_RET_KILL_PROCESS);
    return work(unused);
}

static pthread_t begin_thread(void *(*run)(void *)) {
    pthread_t thread;
    check(!pthread_create(&thread, NULL, run, NULL), "pthread_create");
    return thread;
}

// The first pthread_exit loads a library; let that be over before anybody looks.
static void *exit_at_once(void *unused) {
    (void)unused;
    pthread_exit(NULL);
}

int main(int argc, char **argv) {
    const char *how = argc > 1 ? argv[1] : "free";
    if (argc > 2 && !strcmp(how, "root")) check(!chroot(argv[2]) && !chdir("/"), "chroot");
    if (!strcmp(how, "nobody")) become_nobody();
    if (!strcmp(how, "nodump")) check(!prctl(PR_SET_DUMPABLE, 0, 0, 0, 0), "PR_SET_DUMPABLE");
    if (!strcmp(how, "memlock")) lock_memory();
    if (!strcmp(how, "mdwe"))
        check(!prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0), "PR_SET_MDWE");
    if (!strcmp(how, "huge")) use_huge_pages();
    if (!strcmp(how, "later")) pthread_join(begin_thread(exit_at_once), NULL);
    check(!fcntl(0, F_SETFL, O_NONBLOCK) && write(1, "ready\n", 6) == 6, "fcntl");
    if (!strcmp(how, "systemd")) filter_as_systemd();
    if (!strcmp(how, "refuses")) filter(SECCOMP_RET_ERRNO | EPERM);
    if (!strcmp(how, "kills")) filter(SECCOMP_RET_KILL_PROCESS);
    if (!strcmp(how, "strict")) {
        is_strict = 1;
        check(!prctl(PR_SET_SECCOMP, SECCOMP_MODE_STRICT), "PR_SET_SECCOMP");
    }
    if (!strcmp(how, "half") || !strcmp(how, "leader") || !strcmp(how, "later"))
        begin_thread(!strcmp(how, "half") ? work_filtered : work);
    if (!strcmp(how, "half"))
        for (;;) pause();
    while (!strcmp(how, "later") && !is_told_to_leave) usleep(1000);
    if (!strcmp(how, "leader") || !strcmp(how, "later")) pthread_exit(NULL);
    work(NULL);
}
