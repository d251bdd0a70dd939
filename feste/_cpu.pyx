"""What this processor can do. Compiled without special flags, so that it runs anywhere."""

cdef extern from *:
    """
    #if (defined(__x86_64__) || defined(__i386__)) && defined(__GNUC__)
    static int cpu_avx2(void) { __builtin_cpu_init(); return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
    static int cpu_avx512(void) {
        __builtin_cpu_init();
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw")
            && __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq")
            && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
    }
    #else
    static int cpu_avx2(void) { return 0; }
    static int cpu_avx512(void) { return 0; }
    #endif
    """
    int cpu_avx2()
    int cpu_avx512()


def supported():
    """Names of the instruction sets this processor (and its operating system) can run, best first."""
    return ["avx512"] * bool(cpu_avx512()) + ["avx2"] * bool(cpu_avx2()) + ["generic"]
