/* SPDX-License-Identifier: Apache-2.0 */
/* Has the declared project mapped, as a library, until its standard input ends. */
#include <stdio.h>

int bracketed(int value);

int main(void)
{
    if (bracketed(1) != 95)
        return 1;
    puts("ready");
    fflush(stdout);
    getchar();
    return 0;
}
