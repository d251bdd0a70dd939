"""What this processor can do. Compiled without special flags, so that it runs anywhere."""

import time


cdef extern from *:
    """
    #if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
    static int cpu_x86(void) { return 1; }
    static int cpu_avx2(void) { __builtin_cpu_init(); return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
    static int cpu_avx512(void) {
        __builtin_cpu_init();
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
            && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq")
            && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
    }
    static int cpu_neon(void) { return 0; }
    #else
    static int cpu_x86(void) { return 0; }
    static int cpu_avx2(void) { return 0; }
    static int cpu_avx512(void) { return 0; }
    #if defined(__aarch64__)
    static int cpu_neon(void) { return 1; } /* every one has it */
    #else
    static int cpu_neon(void) { return 0; }
    #endif
    #endif
    """
    int cpu_x86()
    int cpu_avx2()
    int cpu_avx512()
    int cpu_neon()


cdef extern from *:
    """
    #include <stdint.h>
    /* Each line waits for the one before: a multiplication (3 cycles) and an addition (1). */
    #define LINK x = x * x + 1;
    static volatile uint64_t end_of_chain;
    static void chain(uint64_t x, long links) {
        for (long i = 0; i < links; i += 8) { LINK LINK LINK LINK LINK LINK LINK LINK }
        end_of_chain = x;
    }
    #undef LINK
    """
    void chain(unsigned long long x, long links) nogil

cdef enum:
    LINK_CYCLES = 4
    LINKS = 1 << 20


def supported():
    """Names of the instruction sets this processor (and its operating system) can run, best first."""
    able = {"avx512": cpu_avx512(), "avx2": cpu_avx2(), "neon": cpu_neon(), "generic": True}
    return [name for name, yes in able.items() if yes]


def clock_hertz():
    """The clock of this core as measured, or None where the latency of a multiplication is not known.

    On x86-64 it is 3 cycles (Intel since Nehalem, AMD since Zen; tables of uops.info).
    """
    if not cpu_x86():
        return None
    best = 0.0
    for _ in range(20):
        begun = time.perf_counter()
        chain(3, LINKS)
        best = max(best, LINKS * LINK_CYCLES / (time.perf_counter() - begun))
    return best
