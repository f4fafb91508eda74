/* SPDX-License-Identifier: Apache-2.0 */
/* Indirect calls, tail calls and a computed goto, with many live values so that
 * the compiler uses many registers, high ones too. */

typedef long (*op_fn)(long, long);

static long add(long a, long b) { return a + b; }
static long mul(long a, long b) { return a * b; }

op_fn volatile table[2] = {add, mul};

long call_one(int i, long a, long b) { return table[i & 1](a, b) + 1; }

long tail_one(int i, long a, long b) { return table[i & 1](a, b); }

long call_many(int n, long a, long b)
{
    op_fn f0 = table[0], f1 = table[1], f2 = table[n & 1], f3 = table[(n >> 1) & 1];
    long sum = 0;
    for (int i = 0; i < n; i++) {
        sum += f0(a, i);
        sum ^= f1(b, sum);
        sum -= f2(sum, i);
        sum += f3(i, a);
    }
    return sum;
}

long interpret(const unsigned char *code, long acc)
{
    static void *const labels[] = {&&op_add, &&op_mul, &&op_neg, &&op_end};
    goto *labels[*code++];
op_add:
    acc += *code++;
    goto *labels[*code++];
op_mul:
    acc *= *code++;
    goto *labels[*code++];
op_neg:
    acc = -acc;
    goto *labels[*code++];
op_end:
    return acc;
}

#ifndef NO_MAIN
int main(int argc, char **argv)
{
    static const unsigned char code[] = {0, 3, 1, 7, 2, 3};
    (void)argv;
    return (int)(call_one(argc, 1, 2) + tail_one(argc, 3, 4) + call_many(argc, 5, 6) +
                 interpret(code, argc)) & 1;
}
#endif
