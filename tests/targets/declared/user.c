/* SPDX-License-Identifier: Apache-2.0 */
/* Has the declared project mapped, as a library, until its standard input ends; tells what it
 * computes for each line. */
#include <stdio.h>

int bracketed(int value);

int main(void)
{
    int letter;
    if (bracketed(1) != 95)
        return 1;
    puts("ready");
    fflush(stdout);
    while ((letter = getchar()) != EOF) {
        if (letter == '\n')
            printf("%d\n", bracketed(1));
        fflush(stdout);
    }
    return 0;
}
