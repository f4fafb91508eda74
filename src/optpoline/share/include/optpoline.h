/* SPDX-License-Identifier: Apache-2.0
 *
 * optpoline.h: calls and branches that optpoline can change while the program runs.
 *
 * One header for C11 and C++17, GCC and Clang, x86-64 ELF; nothing to link. What is declared here
 * works by itself; `optpoline sites FILE` lists it, a controller may change it from outside.
 *
 *   DYNAMIC_CALL_TABLE(handle, int, struct event *);      a table: its result and parameters
 *   dynamic_call(handle, event->handler, event)           an indirect call that it learns
 *
 *   DEFINE_STATIC_CALL(codec, codec_v1);                  a call whose target is set from outside
 *   static_call(codec)(buffer, size)
 *
 *   DEFINE_STATIC_KEY_FALSE(trace);                       a branch that costs one nop while off
 *   if (static_branch_unlikely(&trace)) ...
 *
 *   optpoline_read_begin(); ... optpoline_read_end();     one view over several of these
 *
 * Names of keys, static calls and tables are global to a module (program or shared library), in
 * C++ whatever their namespace. docs/dynamic-call.md, static-call.md and static-key.md say what each
 * compiles to and what it costs, docs/declared.md what they have in common.
 *
 * Define before including it, or with -D:
 *   OPTPOLINE_OUT_OF_LINE   static calls are changed at their trampoline, not at each call
 *   OPTPOLINE_DISABLE       none of it: plain calls, plain branches on variables, no notes
 */
#ifndef OPTPOLINE_H
#define OPTPOLINE_H

#pragma GCC system_header

#if !defined(__GNUC__) || !defined(__x86_64__) || !defined(__LP64__) || !defined(__ELF__)
#define OPTPOLINE_DISABLE
#endif

/* Version of the notes that this header writes. */
#define OPTPOLINE_NOTE_VERSION 1

#define OPTPOLINE_PASTE_(a, b) OPTPOLINE_PASTE2_(a, b)
#define OPTPOLINE_PASTE2_(a, b) a##b
#define OPTPOLINE_TEXT_(...) OPTPOLINE_TEXT2_(__VA_ARGS__)
#define OPTPOLINE_TEXT2_(...) #__VA_ARGS__

/* The n-th of several variants of a macro, by the number of its arguments (1 to 9). */
#define OPTPOLINE_COUNT_(...) OPTPOLINE_COUNT2_(__VA_ARGS__, 8, 7, 6, 5, 4, 3, 2, 1, 0, 0)
#define OPTPOLINE_COUNT2_(a, b, c, d, e, f, g, h, i, n, ...) n

#ifdef __cplusplus
#define OPTPOLINE_BOOL_ bool
#define OPTPOLINE_ASSERT_ static_assert
/* Whether a call may lead to a function: of its type, or of that and noexcept as well. */
template <typename Call> struct optpoline_takes_ {
    static char function(Call *);
    static long function(...);
};
#define OPTPOLINE_TAKES_(call, target)                                                             \
    (sizeof(optpoline_takes_<__typeof__(call)>::function(&(target))) == sizeof(char))
template <typename Type> using optpoline_type_ = Type; /* so that "type name" declares any type */
#define OPTPOLINE_TYPE_(type) optpoline_type_<type>
#define OPTPOLINE_PASS_(type, name) static_cast<optpoline_type_<type> &&>(name)
#else
#define OPTPOLINE_BOOL_ _Bool
#define OPTPOLINE_ASSERT_ _Static_assert
#define OPTPOLINE_TAKES_(call, target)                                                             \
    __builtin_types_compatible_p(__typeof__(call), __typeof__(target))
#define OPTPOLINE_TYPE_(type) __typeof__(type)
#define OPTPOLINE_PASS_(type, name) (name)
#endif

/* How many times a key is enabled, as the program may read it; the last member tells the
 * compiler what it began with. */
struct optpoline_key_false {
    unsigned enabled;
    unsigned char initial_[1];
};
struct optpoline_key_true {
    unsigned enabled;
    unsigned char initial_[2];
};

/* Whether a key is enabled now, read from memory: for code that is not in a hurry. */
#define static_key_enabled(key) (*(volatile unsigned *)&(key)->enabled != 0)

/* ---- tables of dynamic calls ----------------------------------------------------------------- */

/* Declare a table: its name, the result and the types of up to eight parameters of what is called
 * through it. At file or namespace scope, also in a header; units and sites share what is learned.
 * The second form says how many branches its sites shall have at most. */
#define DYNAMIC_CALL_TABLE(table, ...) DYNAMIC_CALL_TABLE_BRANCHES(table, 0, __VA_ARGS__)
#define DYNAMIC_CALL_TABLE_BRANCHES(table, branches, ...)                                          \
    _Pragma("GCC diagnostic push") /* a void function that returns what a void function does */    \
    _Pragma("GCC diagnostic ignored \"-Wpedantic\"")                                               \
    OPTPOLINE_PASTE_(OPTPOLINE_TABLE_, OPTPOLINE_COUNT_(__VA_ARGS__))                              \
    (table, #__VA_ARGS__, __VA_ARGS__)                                                             \
    _Pragma("GCC diagnostic pop")                                                                  \
    enum { optpoline_branches_##table = (branches) }

#define OPTPOLINE_TABLE_TYPE_(table, text, result, parameters)                                     \
    __attribute__((unused)) static const char optpoline_type_##table[] = text;                     \
    typedef result(*optpoline_pointer_##table) parameters;                                         \
    __attribute__((always_inline, unused)) static inline result optpoline_dynamic_##table

/* C only warns of a pointer to a function of another type; here it is an error in C as well. */
#define OPTPOLINE_FIRST_(first, ...) first
#ifdef __cplusplus
#define OPTPOLINE_CHECK_POINTER_(table, pointer) (void)0
#else
#define OPTPOLINE_CHECK_POINTER_(table, pointer)                                                   \
    _Static_assert(                                                                                \
        __builtin_types_compatible_p(__typeof__(&*(pointer)), optpoline_pointer_##table),          \
        "the pointer is to functions of another type than the table " #table)
#endif

#define OPTPOLINE_P_(n, type) OPTPOLINE_TYPE_(type) optpoline_##n
#define OPTPOLINE_A_(n, type) OPTPOLINE_PASS_(type, optpoline_##n)

#define OPTPOLINE_TABLE_0(table, text, r)                                                          \
    OPTPOLINE_TABLE_TYPE_(table, text, r, (void))                                                  \
    (optpoline_pointer_##table optpoline_target)                                                   \
    { return optpoline_target(); }
#define OPTPOLINE_TABLE_1(table, text, r, a)                                                       \
    OPTPOLINE_TABLE_TYPE_(table, text, r, (a))                                                     \
    (optpoline_pointer_##table optpoline_target, OPTPOLINE_P_(1, a))                               \
    { return optpoline_target(OPTPOLINE_A_(1, a)); }
#define OPTPOLINE_TABLE_2(table, text, r, a, b)                                                    \
    OPTPOLINE_TABLE_TYPE_(table, text, r, (a, b))                                                  \
    (optpoline_pointer_##table optpoline_target, OPTPOLINE_P_(1, a), OPTPOLINE_P_(2, b))           \
    { return optpoline_target(OPTPOLINE_A_(1, a), OPTPOLINE_A_(2, b)); }
#define OPTPOLINE_TABLE_3(table, text, r, a, b, c)                                                 \
    OPTPOLINE_TABLE_TYPE_(table, text, r, (a, b, c))                                               \
    (optpoline_pointer_##table optpoline_target, OPTPOLINE_P_(1, a), OPTPOLINE_P_(2, b),           \
     OPTPOLINE_P_(3, c))                                                                           \
    { return optpoline_target(OPTPOLINE_A_(1, a), OPTPOLINE_A_(2, b), OPTPOLINE_A_(3, c)); }
#define OPTPOLINE_TABLE_4(table, text, r, a, b, c, d)                                              \
    OPTPOLINE_TABLE_TYPE_(table, text, r, (a, b, c, d))                                            \
    (optpoline_pointer_##table optpoline_target, OPTPOLINE_P_(1, a), OPTPOLINE_P_(2, b),           \
     OPTPOLINE_P_(3, c), OPTPOLINE_P_(4, d))                                                       \
    { return optpoline_target(OPTPOLINE_A_(1, a), OPTPOLINE_A_(2, b), OPTPOLINE_A_(3, c),          \
     OPTPOLINE_A_(4, d)); }
#define OPTPOLINE_TABLE_5(table, text, r, a, b, c, d, e)                                           \
    OPTPOLINE_TABLE_TYPE_(table, text, r, (a, b, c, d, e))                                         \
    (optpoline_pointer_##table optpoline_target, OPTPOLINE_P_(1, a), OPTPOLINE_P_(2, b),           \
     OPTPOLINE_P_(3, c), OPTPOLINE_P_(4, d), OPTPOLINE_P_(5, e))                                   \
    { return optpoline_target(OPTPOLINE_A_(1, a), OPTPOLINE_A_(2, b), OPTPOLINE_A_(3, c),          \
     OPTPOLINE_A_(4, d), OPTPOLINE_A_(5, e)); }
#define OPTPOLINE_TABLE_6(table, text, r, a, b, c, d, e, f)                                        \
    OPTPOLINE_TABLE_TYPE_(table, text, r, (a, b, c, d, e, f))                                      \
    (optpoline_pointer_##table optpoline_target, OPTPOLINE_P_(1, a), OPTPOLINE_P_(2, b),           \
     OPTPOLINE_P_(3, c), OPTPOLINE_P_(4, d), OPTPOLINE_P_(5, e), OPTPOLINE_P_(6, f))               \
    { return optpoline_target(OPTPOLINE_A_(1, a), OPTPOLINE_A_(2, b), OPTPOLINE_A_(3, c),          \
     OPTPOLINE_A_(4, d), OPTPOLINE_A_(5, e), OPTPOLINE_A_(6, f)); }
#define OPTPOLINE_TABLE_7(table, text, r, a, b, c, d, e, f, g)                                     \
    OPTPOLINE_TABLE_TYPE_(table, text, r, (a, b, c, d, e, f, g))                                   \
    (optpoline_pointer_##table optpoline_target, OPTPOLINE_P_(1, a), OPTPOLINE_P_(2, b),           \
     OPTPOLINE_P_(3, c), OPTPOLINE_P_(4, d), OPTPOLINE_P_(5, e), OPTPOLINE_P_(6, f),               \
     OPTPOLINE_P_(7, g))                                                                           \
    { return optpoline_target(OPTPOLINE_A_(1, a), OPTPOLINE_A_(2, b), OPTPOLINE_A_(3, c),          \
     OPTPOLINE_A_(4, d), OPTPOLINE_A_(5, e), OPTPOLINE_A_(6, f), OPTPOLINE_A_(7, g)); }
#define OPTPOLINE_TABLE_8(table, text, r, a, b, c, d, e, f, g, h)                                  \
    OPTPOLINE_TABLE_TYPE_(table, text, r, (a, b, c, d, e, f, g, h))                                \
    (optpoline_pointer_##table optpoline_target, OPTPOLINE_P_(1, a), OPTPOLINE_P_(2, b),           \
     OPTPOLINE_P_(3, c), OPTPOLINE_P_(4, d), OPTPOLINE_P_(5, e), OPTPOLINE_P_(6, f),               \
     OPTPOLINE_P_(7, g), OPTPOLINE_P_(8, h))                                                       \
    { return optpoline_target(OPTPOLINE_A_(1, a), OPTPOLINE_A_(2, b), OPTPOLINE_A_(3, c),          \
     OPTPOLINE_A_(4, d), OPTPOLINE_A_(5, e), OPTPOLINE_A_(6, f), OPTPOLINE_A_(7, g),               \
     OPTPOLINE_A_(8, h)); }

#ifndef OPTPOLINE_DISABLE

/* ---- notes ----------------------------------------------------------------------------------
 *
 * A note is an ELF note, owner "optpoline", type 0x706f, in an allocated section of notes, so it
 * lies in a PT_NOTE segment: found with and without section headers, in a file and in memory.
 * It belongs to the section of the code it speaks of (SHF_LINK_ORDER, and that one's group), and
 * goes where that goes. Every place is written relative to the field that holds it.
 */
#define OPTPOLINE_KIND_KEY_ "1"
#define OPTPOLINE_KIND_BRANCH_ "2"
#define OPTPOLINE_KIND_CALL_ "3"
#define OPTPOLINE_KIND_CALL_SITE_ "4"
#define OPTPOLINE_KIND_CALL_TARGET_ "5"
#define OPTPOLINE_KIND_DYNAMIC_SITE_ "6"
#define OPTPOLINE_KIND_READERS_ "7"

/* Flags: what a key or a branch begins with; whether a branch jumps while its key is off; which
 * form a static call has; whether a site is the next call from there on, not at that place. */
#define OPTPOLINE_FLAG_ON_ 1
#define OPTPOLINE_FLAG_INVERTED_ 2
#define OPTPOLINE_FLAG_OUT_OF_LINE_ 4
#define OPTPOLINE_FLAG_NEAR_ 8

#define OPTPOLINE_AT_(place) ".long " place " - .\n\t"
#define OPTPOLINE_NONE_ ".long 0\n\t"

/* Write a note; `fields` are site, object, target, name, type, each AT_ or NONE_. Operands: file,
 * line, argument. */
#define OPTPOLINE_NOTE_(kind, flags, length, of, fields)                                           \
    OPTPOLINE_NOTE_IN_("optpoline_notes,\"a?o\",@note," of, kind, flags, length, fields)
/* One that belongs to no code: it is kept, with what it speaks of. */
#define OPTPOLINE_ROOT_NOTE_(kind, flags, fields)                                                  \
    OPTPOLINE_NOTE_IN_("optpoline_roots,\"a\",@note", kind, flags, "0", fields)
#define OPTPOLINE_NOTE_IN_(section, kind, flags, length, fields)                                   \
    ".pushsection " section "\n\t"                                                                 \
    ".balign 4\n\t"                                                                                \
    ".long 10, 36, 0x706f\n\t"                                                                     \
    ".asciz \"optpoline\"\n\t"                                                                     \
    ".balign 4\n\t"                                                                                \
    ".byte " OPTPOLINE_TEXT_(OPTPOLINE_NOTE_VERSION) ", " kind ", " flags ", " length "\n\t"       \
    fields                                                                                         \
    OPTPOLINE_AT_("%c[file]")                                                                      \
    ".long %c[line], %c[argument]\n\t"                                                             \
    ".popsection\n\t"

#define OPTPOLINE_PLACE_(argument_)                                                                \
    [file] "i"(__FILE__), [line] "i"(__LINE__), [argument] "i"(argument_)

/* A function that is never called, to have a place outside of functions for assembly that names
 * C objects (an asm statement at file scope takes no operands before GCC 15). */
#define OPTPOLINE_OUTSIDE_(id)                                                                     \
    __attribute__((used, noinline, cold)) static void OPTPOLINE_PASTE_(optpoline_outside_, id)(void)

/* An operand that is the name of a function, wherever that is, and how to write it without @PLT.
 * "i" refuses functions of other units or modules in position-independent code, and so does GCC's
 * "s" and its %c. */
#ifdef __clang__
#define OPTPOLINE_FUNCTION_ "s"
#define OPTPOLINE_BARE_ "%c"
#else
#define OPTPOLINE_FUNCTION_ "X"
#define OPTPOLINE_BARE_ "%p"
#endif

/* Begin or end what unwinders are told of a trampoline. The assembler within Clang has one such
 * frame at a time for all sections, and that of the function around is open, so it is told none:
 * nothing can be thrown through a jump. */
#ifdef __clang__
#define OPTPOLINE_FRAME_(what)
#else
#define OPTPOLINE_FRAME_(what) ".cfi_" what "\n\t"
#endif

#define OPTPOLINE_HIDDEN_ __attribute__((visibility("hidden")))

/* ---- static keys --------------------------------------------------------------------------- */

#define OPTPOLINE_DECLARE_KEY_(state, name)                                                        \
    extern struct optpoline_key_##state name __asm__("optpoline.key." #name) OPTPOLINE_HIDDEN_

#define OPTPOLINE_DEFINE_KEY_(state, initial, name)                                                \
    OPTPOLINE_DECLARE_KEY_(state, name);                                                           \
    __attribute__((used, aligned(8), section(".data.optpoline.key." #name)))                       \
    struct optpoline_key_##state name = {initial, {0}};                                            \
    OPTPOLINE_OUTSIDE_(key_##name)                                                                 \
    {                                                                                              \
        __asm__ volatile(                                                                          \
            OPTPOLINE_ROOT_NOTE_(OPTPOLINE_KIND_KEY_, "%c[argument]",                              \
                OPTPOLINE_NONE_ OPTPOLINE_AT_("optpoline.key." #name) OPTPOLINE_NONE_              \
                OPTPOLINE_AT_("%c[name_]") OPTPOLINE_NONE_)                                        \
            : : [name_] "i"(#name), OPTPOLINE_PLACE_(initial));                                    \
    }                                                                                              \
    OPTPOLINE_DECLARE_KEY_(state, name)

/* Define a key, at file or namespace scope, in one unit; declare it in others. */
#define DEFINE_STATIC_KEY_FALSE(name) OPTPOLINE_DEFINE_KEY_(false, 0, name)
#define DEFINE_STATIC_KEY_TRUE(name) OPTPOLINE_DEFINE_KEY_(true, 1, name)
#define DECLARE_STATIC_KEY_FALSE(name) OPTPOLINE_DECLARE_KEY_(false, name)
#define DECLARE_STATIC_KEY_TRUE(name) OPTPOLINE_DECLARE_KEY_(true, name)

/* One instruction that falls through or jumps to `where`. Its last five bytes are changed: in
 * front of them are as many cs prefixes as bring them into one aligned word of eight bytes, so
 * that alignment costs no instruction. */
#define OPTPOLINE_BRANCH_(key, inverted, where)                                                    \
    __asm__ __inline__ goto(                                                                       \
        ".Loptpoline_site%=:\n\t"                                                                  \
        ".p2align 3, 0x2e, 4\n\t"                                                                  \
        ".if %c[on]\n\t"                                                                           \
        ".byte 0xe9\n\t"                                                                           \
        ".long %l[" #where "] - . - 4\n\t"                                                         \
        ".else\n\t"                                                                                \
        ".byte 0x0f, 0x1f, 0x44, 0x00, 0x00\n\t"                                                   \
        ".endif\n"                                                                                 \
        ".Loptpoline_end%=:\n\t"                                                                   \
        OPTPOLINE_NOTE_(OPTPOLINE_KIND_BRANCH_, "%c[flags]",                                       \
            ".Loptpoline_end%= - .Loptpoline_site%=", ".Loptpoline_site%=",                        \
            OPTPOLINE_AT_(".Loptpoline_site%=") OPTPOLINE_AT_("%c[object]")                        \
            OPTPOLINE_AT_("%l[" #where "]") OPTPOLINE_NONE_ OPTPOLINE_NONE_)                       \
        : : [object] "i"(key), [on] "i"(OPTPOLINE_JUMPS_(key, inverted)),                          \
          [flags] "i"(OPTPOLINE_JUMPS_(key, inverted) * OPTPOLINE_FLAG_ON_                         \
                      + inverted * OPTPOLINE_FLAG_INVERTED_),                                      \
          OPTPOLINE_PLACE_(0)                                                                      \
        : : where)

#define OPTPOLINE_JUMPS_(key, inverted) ((int)(sizeof((key)->initial_) - 1) ^ (inverted))

/* Whether a key is enabled. Unlikely: the code for "enabled" is moved out of the way, and a key
 * that is off costs one nop. Likely: the same for "disabled". Not for keys in arrays, structures
 * or behind pointers: which key it is must be known when the code is linked. */
#define static_branch_unlikely(key) __builtin_expect(OPTPOLINE_IS_ENABLED_(key, 0), 0)
#define static_branch_likely(key) __builtin_expect(OPTPOLINE_IS_ENABLED_(key, 1), 1)

#if defined(__clang__) && defined(__cplusplus)
/* Clang before 17 holds every label of a function for a target of every asm goto in it, and refuses
 * what then jumps over an initialization. So each is in a function of its own; not in a lambda,
 * whose labels count among those around it. */
#define OPTPOLINE_IS_ENABLED_(key, inverted)                                                       \
    __extension__({                                                                                \
        struct optpoline_branch {                                                                  \
            __attribute__((always_inline)) static bool is_enabled()                                \
            {                                                                                      \
                OPTPOLINE_BRANCH_(key, inverted, optpoline_jumped);                                \
                return inverted;                                                                   \
            optpoline_jumped:                                                                      \
                return !inverted;                                                                  \
            }                                                                                      \
        };                                                                                         \
        optpoline_branch::is_enabled();                                                            \
    })
#else
#define OPTPOLINE_IS_ENABLED_(key, inverted)                                                       \
    __extension__({                                                                                \
        __label__ optpoline_jumped, optpoline_done;                                                \
        OPTPOLINE_BOOL_ optpoline_is_on = inverted;                                                \
        OPTPOLINE_BRANCH_(key, inverted, optpoline_jumped);                                        \
        goto optpoline_done;                                                                       \
    optpoline_jumped:                                                                              \
        optpoline_is_on = !inverted;                                                               \
    optpoline_done:                                                                                \
        optpoline_is_on;                                                                           \
    })
#endif

/* ---- static calls -------------------------------------------------------------------------- */

#ifdef OPTPOLINE_OUT_OF_LINE
#define OPTPOLINE_FORM_ OPTPOLINE_FLAG_OUT_OF_LINE_
#else
#define OPTPOLINE_FORM_ 0
#endif

/* A symbol that link-time optimisation sees: calls name it, so that the unit that defines the
 * static call is taken from an archive. */
#define OPTPOLINE_DECLARE_DEFINED_(name)                                                           \
    extern const char optpoline_defined_##name __asm__("optpoline.defined." #name)                 \
        OPTPOLINE_HIDDEN_

/* Declare a static call that another unit of the module defines; `function` is any of its type. */
#define DECLARE_STATIC_CALL(name, function)                                                        \
    OPTPOLINE_DECLARE_DEFINED_(name);                                                              \
    extern __typeof__(function) optpoline_call_##name __asm__("optpoline.call." #name)             \
        OPTPOLINE_HIDDEN_

/* A trampoline: one jump with a 32-bit displacement, in a section of its own. */
#define OPTPOLINE_DEFINE_CALL_(name, function, also, jump, ...)                                    \
    DECLARE_STATIC_CALL(name, function);                                                           \
    const char optpoline_defined_##name = 0;                                                       \
    OPTPOLINE_OUTSIDE_(call_##name)                                                                \
    {                                                                                              \
        __asm__ volatile(                                                                          \
            also                                                                                   \
            ".pushsection .text.optpoline.call." #name ",\"ax\",@progbits\n\t"                     \
            ".balign 8\n\t"                                                                        \
            ".globl optpoline.call." #name "\n\t"                                                  \
            ".hidden optpoline.call." #name "\n\t"                                                 \
            ".type optpoline.call." #name ",@function\n"                                           \
            "optpoline.call." #name ":\n\t"                                                        \
            OPTPOLINE_FRAME_("startproc")                                                          \
            "%{disp32%} jmp " jump "\n\t"                                                          \
            "int3\n\t"                                                                             \
            OPTPOLINE_FRAME_("endproc")                                                            \
            ".size optpoline.call." #name ", . - optpoline.call." #name "\n\t"                     \
            OPTPOLINE_NOTE_(OPTPOLINE_KIND_CALL_, "%c[form]", "5", "optpoline.call." #name,        \
                OPTPOLINE_AT_("optpoline.call." #name) OPTPOLINE_AT_("optpoline.call." #name)      \
                OPTPOLINE_NONE_ OPTPOLINE_AT_("%c[name_]") OPTPOLINE_AT_("%c[type]"))              \
            ".popsection"                                                                          \
            : : [name_] "i"(#name), [type] "i"(#function), [form] "i"(OPTPOLINE_FORM_),            \
              OPTPOLINE_PLACE_(0) __VA_ARGS__);                                                    \
    }                                                                                              \
    DECLARE_STATIC_CALL(name, function)

/* A function of one or two instructions that every unit may define, and one of which is linked. */
#define OPTPOLINE_SHARED_(name, code)                                                              \
    ".ifndef optpoline." name "\n\t"                                                               \
    ".pushsection .text.optpoline." name ",\"axG\",@progbits,optpoline." name ",comdat\n\t"        \
    ".balign 8\n\t"                                                                                \
    ".weak optpoline." name "\n\t"                                                                 \
    ".hidden optpoline." name "\n\t"                                                               \
    ".type optpoline." name ",@function\n"                                                         \
    "optpoline." name ":\n\t"                                                                      \
    OPTPOLINE_FRAME_("startproc")                                                                  \
    code "\n\t"                                                                                    \
    OPTPOLINE_FRAME_("endproc")                                                                    \
    ".size optpoline." name ", . - optpoline." name "\n\t"                                         \
    ".popsection\n\t"                                                                              \
    ".endif\n\t"

/* Define a static call, at file or namespace scope. It calls `function`; or nothing, with `type`
 * any function of its type; or it returns zero (integers and pointers), likewise. */
#define DEFINE_STATIC_CALL(name, function)                                                         \
    OPTPOLINE_DEFINE_CALL_(name, function, "", "%P[first]", , [first] OPTPOLINE_FUNCTION_(function))
#define DEFINE_STATIC_CALL_NULL(name, type)                                                        \
    OPTPOLINE_DEFINE_CALL_(name, type, OPTPOLINE_SHARED_("nothing", "ret"), "optpoline.nothing", )
#define DEFINE_STATIC_CALL_RET0(name, type)                                                        \
    OPTPOLINE_DEFINE_CALL_(                                                                        \
        name, type, OPTPOLINE_SHARED_("zero", "xorl %%eax, %%eax\n\tret"), "optpoline.zero", )

/* Say that a static call may be given `function`; of another type it does not compile. At file or
 * namespace scope, once for each pair. A controller can always use what was said here. */
#define STATIC_CALL_TARGET(name, function)                                                         \
    OPTPOLINE_ASSERT_(OPTPOLINE_TAKES_(optpoline_call_##name, function),                           \
                      #function " has another type than the static call " #name);                  \
    OPTPOLINE_OUTSIDE_(target_##name##_##function)                                                 \
    {                                                                                              \
        __asm__ volatile(                                                                          \
            OPTPOLINE_ROOT_NOTE_(OPTPOLINE_KIND_CALL_TARGET_, "0",                                 \
                OPTPOLINE_NONE_ OPTPOLINE_AT_("optpoline.call." #name)                             \
                ".reloc ., R_X86_64_PLT32, " OPTPOLINE_BARE_ "[target]\n\t"                        \
                OPTPOLINE_NONE_                                                                    \
                OPTPOLINE_AT_("%c[name_]") OPTPOLINE_NONE_)                                        \
            : : [name_] "i"(#function), [target] OPTPOLINE_FUNCTION_(function),                    \
              OPTPOLINE_PLACE_(0));                                                                \
    }                                                                                              \
    OPTPOLINE_DECLARE_DEFINED_(name)

/* The function to call: static_call(name)(arguments). Its result is that of the target. */
#define static_call(name)                                                                          \
    (__extension__({                                                                               \
         __asm__ __volatile__ __inline__(                                                          \
             ".Loptpoline_site%=:\n\t"                                                             \
             OPTPOLINE_NOTE_(OPTPOLINE_KIND_CALL_SITE_, "8", "0", ".Loptpoline_site%=",            \
                 OPTPOLINE_AT_(".Loptpoline_site%=") OPTPOLINE_AT_("optpoline.call." #name)        \
                 OPTPOLINE_NONE_ OPTPOLINE_NONE_ OPTPOLINE_NONE_)                                  \
             : : [defined] "i"(&optpoline_defined_##name), OPTPOLINE_PLACE_(0));                   \
         (void)0;                                                                                  \
     }),                                                                                           \
     optpoline_call_##name)

/* ---- dynamic calls ------------------------------------------------------------------------- */

/* Call what `pointer` points at: dynamic_call(table, pointer, arguments). */
#define dynamic_call(table, ...)                                                                   \
    (__extension__({                                                                               \
         OPTPOLINE_CHECK_POINTER_(table, OPTPOLINE_FIRST_(__VA_ARGS__, 0));                        \
         __asm__ __volatile__ __inline__(                                                          \
             ".Loptpoline_site%=:\n\t"                                                             \
             OPTPOLINE_NOTE_(OPTPOLINE_KIND_DYNAMIC_SITE_, "8", "0", ".Loptpoline_site%=",         \
                 OPTPOLINE_AT_(".Loptpoline_site%=") OPTPOLINE_NONE_ OPTPOLINE_NONE_               \
                 OPTPOLINE_AT_("%c[name]") OPTPOLINE_AT_("%c[type]"))                              \
             : : [name] "i"(#table), [type] "i"(optpoline_type_##table),                           \
               OPTPOLINE_PLACE_(optpoline_branches_##table));                                      \
         (void)0;                                                                                  \
     }),                                                                                           \
     optpoline_dynamic_##table(__VA_ARGS__))

/* ---- one view over several sites ----------------------------------------------------------- */

/* A count of open brackets for each thread, one for each module, and a function that is never
 * called: its one instruction loads the count's offset from the thread pointer, for a controller
 * to read. */
#define OPTPOLINE_READERS_                                                                         \
    ".ifndef optpoline.readers\n\t"                                                                \
    ".pushsection .tbss.optpoline.readers,\"awTG\",@nobits,optpoline.readers,comdat\n\t"           \
    ".balign 4\n\t"                                                                                \
    ".weak optpoline.readers\n\t"                                                                  \
    ".hidden optpoline.readers\n\t"                                                                \
    ".type optpoline.readers,@object\n\t"                                                          \
    ".size optpoline.readers, 4\n"                                                                 \
    "optpoline.readers:\n\t"                                                                       \
    ".zero 4\n\t"                                                                                  \
    ".popsection\n\t"                                                                              \
    ".pushsection .text.optpoline.readers,\"axG\",@progbits,optpoline.readers,comdat\n"            \
    ".Loptpoline_readers%=:\n\t"                                                                   \
    "movq optpoline.readers@gottpoff(%%rip), %%rax\n\t"                                            \
    "ret\n\t"                                                                                      \
    OPTPOLINE_NOTE_(OPTPOLINE_KIND_READERS_, "0", "7", ".Loptpoline_readers%=",                    \
        OPTPOLINE_AT_(".Loptpoline_readers%=") OPTPOLINE_NONE_ OPTPOLINE_NONE_ OPTPOLINE_NONE_     \
        OPTPOLINE_NONE_)                                                                           \
    ".popsection\n\t"                                                                              \
    ".endif\n\t"

#if defined(__PIC__) && !defined(__PIE__)
#define OPTPOLINE_COUNT_READER_(change)                                                            \
    __extension__({                                                                                \
        unsigned long optpoline_offset;                                                            \
        __asm__ __volatile__ __inline__(                                                           \
            OPTPOLINE_READERS_                                                                     \
            "movq optpoline.readers@gottpoff(%%rip), %0\n\t" change " %%fs:(%0)"                   \
            : "=r"(optpoline_offset) : OPTPOLINE_PLACE_(0) : "memory", "cc");                      \
    })
#else
#define OPTPOLINE_COUNT_READER_(change)                                                            \
    __extension__({                                                                                \
        __asm__ __volatile__ __inline__(                                                           \
            OPTPOLINE_READERS_ change " %%fs:optpoline.readers@tpoff"                              \
            : : OPTPOLINE_PLACE_(0) : "memory", "cc");                                             \
    })
#endif

/* Between the two, which may be nested, no key, call or site is changed by a transaction. Leave
 * none open when the thread ends, and do not sleep in between: a controller waits for it. */
#define optpoline_read_begin() OPTPOLINE_COUNT_READER_("incl")
#define optpoline_read_end() OPTPOLINE_COUNT_READER_("decl")

#else /* OPTPOLINE_DISABLE: the same programs, without anything that can be changed from outside */

#define DECLARE_STATIC_KEY_FALSE(name) extern struct optpoline_key_false name
#define DECLARE_STATIC_KEY_TRUE(name) extern struct optpoline_key_true name
#define DEFINE_STATIC_KEY_FALSE(name) struct optpoline_key_false name = {0, {0}}
#define DEFINE_STATIC_KEY_TRUE(name) struct optpoline_key_true name = {1, {0, 0}}
#define static_branch_unlikely(key) __builtin_expect((key)->enabled != 0, 0)
#define static_branch_likely(key) __builtin_expect((key)->enabled != 0, 1)

__attribute__((unused)) static void optpoline_nothing(void) {}
__attribute__((unused)) static long optpoline_zero(void) { return 0; }

#define DECLARE_STATIC_CALL(name, function) extern __typeof__(&*(function)) optpoline_call_##name
#define DEFINE_STATIC_CALL(name, function) __typeof__(&*(function)) optpoline_call_##name = function
#define DEFINE_STATIC_CALL_NULL(name, type)                                                        \
    __typeof__(&*(type)) optpoline_call_##name = (__typeof__(&*(type)))(void *)optpoline_nothing
#define DEFINE_STATIC_CALL_RET0(name, type)                                                        \
    __typeof__(&*(type)) optpoline_call_##name = (__typeof__(&*(type)))(void *)optpoline_zero
#define STATIC_CALL_TARGET(name, function)                                                         \
    OPTPOLINE_ASSERT_(OPTPOLINE_TAKES_(*optpoline_call_##name, function),                          \
                      #function " has another type than the static call " #name)
#define static_call(name) (*optpoline_call_##name)

#define dynamic_call(table, ...)                                                                   \
    (__extension__({ OPTPOLINE_CHECK_POINTER_(table, OPTPOLINE_FIRST_(__VA_ARGS__, 0)); }),        \
     optpoline_dynamic_##table(__VA_ARGS__))

#define optpoline_read_begin() __asm__ __volatile__("" : : : "memory")
#define optpoline_read_end() __asm__ __volatile__("" : : : "memory")

#endif /* OPTPOLINE_DISABLE */
#endif /* OPTPOLINE_H */
