/* SPDX-License-Identifier: Apache-2.0 */
/* A thread loads and unloads a library without end, and calls it meanwhile. An empty line asks
 * whether that always computed what the library can compute. */
#include <dlfcn.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>

static atomic_ulong rounds, wrong;

static void *load(void *path)
{
    for (;;) {
        void *library = dlopen(path, RTLD_NOW);
        int (*run)(int) = library ? (int (*)(int))dlsym(library, "bracketed") : 0;
        if (!run || run(1) <= 0)
            atomic_fetch_add(&wrong, 1);
        if (library)
            dlclose(library);
        atomic_fetch_add(&rounds, 1);
    }
    return 0;
}

int main(int argc, char **argv)
{
    char line[16];
    pthread_t thread;
    pthread_create(&thread, 0, load, argv[argc - 1]);
    while (!atomic_load(&rounds))
        ;
    puts("ready");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        printf("%s %lu\n", atomic_load(&rounds) ? "ran" : "stuck", atomic_load(&wrong));
        fflush(stdout);
    }
    return 0;
}
