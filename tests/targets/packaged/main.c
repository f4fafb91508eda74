// SPDX-License-Identifier: Apache-2.0
// Check that all calls arrive: 0 if so.
#include "project.h"

int main(void)
{
    int sum = 0;
    for (int i = 0; i < 10; i++)
        sum += filter(i & 1 ? plain : doubled, i) + static_call(codec)(shapes(i));
    // 2 * (0 + 2 + 4 + 6 + 8), 1 + 3 + 5 + 7 + 9, a one for each; 4 and 5 by turns.
    return sum == 40 + 25 + 10 + 45 ? 0 : 1;
}
