/* SPDX-License-Identifier: Apache-2.0 */
/* Waits for a line in one of the calls that may take a signal mask, without one; then tells what
 * the call returned, 100 more if a key is enabled. "masked": with one. "stopped":
 * does not wait, but is stopped by a signal in the call that sends it. */
#define _GNU_SOURCE
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/select.h>

#include "optpoline.h"

DEFINE_STATIC_KEY_FALSE(trace);

static int wait_in(const char *call)
{
    struct timespec limit = {20, 0};
    struct timeval time = {20, 0};
    struct pollfd input = {0, POLLIN, 0};
    struct epoll_event event = {EPOLLIN, {0}};
    sigset_t mask;
    fd_set inputs;
    int epoll = epoll_create1(0);
    FD_ZERO(&inputs);
    FD_SET(0, &inputs);
    sigemptyset(&mask);
    epoll_ctl(epoll, EPOLL_CTL_ADD, 0, &event);
    if (!strcmp(call, "select"))
        return select(1, &inputs, 0, 0, &time);
    if (!strcmp(call, "ppoll"))
        return ppoll(&input, 1, &limit, 0);
    if (!strcmp(call, "epoll_pwait"))
        return epoll_pwait(epoll, &event, 1, -1, 0);
    if (!strcmp(call, "stopped"))
        return raise(SIGSTOP) + 1;
    return ppoll(&input, 1, &limit, &mask);
}

int main(int argc, char **argv)
{
    char line[16];
    int returned;
    puts("ready");
    fflush(stdout);
    for (;;) {
        returned = wait_in(argv[argc - 1]);
        if (!fgets(line, sizeof line, stdin))
            return 0;
        if (static_branch_unlikely(&trace))
            returned += 100;
        printf("%d\n", returned);
        fflush(stdout);
    }
}
