"""Builds the compiled parts of feste.

`feste/_ops.pyx` is compiled once per instruction set, each under its own module name and from its own build
directory; `feste/ops.py` picks one when it is imported. Environment:

    FESTE_ISA_BUILD=native      build only the best variant this machine can run (the edit loop)
    FESTE_ISA_BUILD=NAME,...    build the named variants
    FESTE_ISA_BUILD=none        compile nothing at all (an editable install beside `build_ext --inplace`)
    FESTE_SANITIZE=1            build with AddressSanitizer and UndefinedBehaviorSanitizer
"""

import os
import platform
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy
from Cython.Build import cythonize
from setuptools import Extension, setup

MACHINE = platform.machine().lower()
X86, ARM = MACHINE in ("x86_64", "amd64", "x64"), MACHINE in ("aarch64", "arm64")

# -O3: at -O2 the register tiles of the GEMM are not unrolled and run at a third of the speed.
# -fno-math-errno and -fno-trapping-math drop errno and floating-point exception flags, which nothing here reads; NaN,
# Inf and signed zeros keep their meaning, unlike under -ffast-math.
CFLAGS = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-Wno-unused-function"]

# What is inlined is what the source says: gcc's own choice differs from one edit to the next, by 5 % of attention. (To
# clang the same words mean that nothing is inlined at all.)
# -falign-loops: where the register tile's loop begins is otherwise luck, worth 5 %.
# -fno-schedule-insns: gcc's first scheduling, on by default for AArch64, hoists loads until accumulators spill.
GCC_FLAGS = ["-fno-inline-functions", "-fno-inline-small-functions", "-fno-inline-functions-called-once",
             "-falign-loops=64", "-fno-schedule-insns"]

# Instruction set -> flags. The order is from best to plainest; ops.py names them in the same words.
ISA_FLAGS = {
    "avx512": ["-march=x86-64-v4", "-mavx512bf16", "-mprefer-vector-width=512"],
    "avx2": ["-march=x86-64-v3"],
    "neon": [],  # every AArch64 has it
    "generic": [],
}

SANITIZE = ["-fsanitize=address,undefined", "-fno-omit-frame-pointer", "-g", "-O1"]

OPENMP_PROBE = """
#include <Python.h>
#include <omp.h>
int main(void) { return omp_get_max_threads() < 1; }
"""


class Compiler:
    """The C compiler that the extensions will be built with, and what it accepts."""

    def __init__(self) -> None:
        self.command = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()
        self.include = sysconfig.get_path("include")

    def runs(self) -> bool:
        try:
            return subprocess.run([*self.command, "--version"], capture_output=True).returncode == 0
        except OSError:
            return False

    def compiles(self, text: str, flags: Sequence[str] = ()) -> bool:
        with tempfile.TemporaryDirectory() as folder:
            source, made = Path(folder, "probe.c"), Path(folder, "probe.o")
            source.write_text(text)
            command = [*self.command, *flags, f"-I{self.include}", "-c", str(source), "-o", str(made)]
            return subprocess.run(command, capture_output=True).returncode == 0

    @cached_property
    def openmp(self) -> tuple[list[str], list[str]] | None:
        """The flags of the compiler and of the linker for OpenMP: those of gcc and clang, or of Apple's clang with
        Homebrew's libomp. None if there is none."""
        libomp = os.environ.get("LIBOMP", "/opt/homebrew/opt/libomp")
        for found in ((["-fopenmp"], ["-fopenmp"]),
                      (["-Xpreprocessor", "-fopenmp", f"-I{libomp}/include"], [f"-L{libomp}/lib", "-lomp"])):
            if self.compiles(OPENMP_PROBE, found[0]):
                return found
        return None

    @cached_property
    def flags(self) -> list[str]:
        """CFLAGS, with those for gcc if that is what the compiler is."""
        clang = self.compiles("#ifndef __clang__\n#error\n#endif\nint main(void) { return 0; }")
        return CFLAGS if clang else [*CFLAGS, *GCC_FLAGS]

    def require_all(self) -> None:
        """Exit with one clear message when the compiler, OpenMP or Python's headers are missing."""
        name = " ".join(self.command)
        if not self.runs():
            sys.exit(f"feste needs a C compiler and found none ({name!r} does not run). "
                     "Install one, for example: apt install gcc, dnf install gcc, xcode-select --install")
        if self.openmp:
            return
        if not self.compiles("#include <Python.h>\nint main(void) { return 0; }"):
            sys.exit(f"feste needs Python's C headers and found none in {self.include}. "
                     "Install them, for example: apt install python3-dev, dnf install python3-devel")
        sys.exit(f"feste needs a C compiler with OpenMP, and {name!r} -fopenmp does not compile <omp.h>. "
                 "Install gcc, or libomp for clang (brew install libomp; LIBOMP=DIR if it is elsewhere), or name "
                 "another compiler with CC=...")


def isa_variants(compiler: Compiler) -> list[str]:
    """The instruction sets to build for: those that are wanted and that the compiler has flags for."""
    wanted = os.environ.get("FESTE_ISA_BUILD", "")
    if not X86:
        return ["neon"] if ARM else ["generic"]
    if wanted == "native":
        flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
        names = ["avx512" if "avx512_bf16" in flags else "avx2" if "avx2" in flags and "fma" in flags else "generic"]
    else:
        names = [name for name in wanted.split(",") if name] or [name for name in ISA_FLAGS if name != "neon"]
    for name in names:
        if name not in ISA_FLAGS:
            sys.exit(f"FESTE_ISA_BUILD={wanted}: unknown instruction set {name!r}, known are {', '.join(ISA_FLAGS)}")
    able = [name for name in names if compiler.compiles("int main(void) { return 0; }", ISA_FLAGS[name])]
    for name in set(names) - set(able):
        print(f"feste: no kernels for {name}, whose flags {' '.join(ISA_FLAGS[name])} this compiler does not know; "
              "gcc has them from version 11 on", file=sys.stderr)
    return able or ["generic"]


def extension(compiler: Compiler, module: str, source: str, flags: list[str] = (),
              depends: list[str] = ()) -> Extension:
    """One extension, translated in a build directory of its own, so that variants never share a C file.

    It gets its compiler flags only then: cythonize remembers those of a source file, and would hand the flags of one
    variant on to the next.
    """
    bare = Extension(f"feste.{module}", [f"feste/{source}"], depends=[f"feste/{name}" for name in depends])
    [ext] = cythonize([bare], build_dir=f"build/cython/{module}", quiet=True, compiler_directives={
        "language_level": 3, "boundscheck": False, "wraparound": False, "cdivision": True,
        "initializedcheck": False, "embedsignature": True,
    })
    sanitize = SANITIZE if os.environ.get("FESTE_SANITIZE") else []
    ext.include_dirs = [numpy.get_include(), "feste"]
    ext.define_macros = [("NPY_NO_DEPRECATED_API", "NPY_1_7_API_VERSION")]
    # The runtime of OpenMP reads its settings once, when it is loaded, and ops.py makes them: no one else may load it.
    compile_openmp, link_openmp = (compiler.openmp or ([], [])) if source == "_ops.pyx" else ([], [])
    ext.extra_compile_args = [*compiler.flags, *compile_openmp, *flags, *sanitize]
    ext.extra_link_args = [*link_openmp, *sanitize[:1]]
    return ext


def extensions(compiler: Compiler) -> list[Extension]:
    if os.environ.get("FESTE_ISA_BUILD") == "none":
        return []
    included = sorted(path.name for pattern in ("*.pxi", "*.h") for path in Path("feste").glob(pattern))
    tokenizer = [name for name in included if name.startswith("_bpe")]
    kernels = [name for name in included if name not in tokenizer]
    variants = [extension(compiler, f"_ops_{isa}", "_ops.pyx", ISA_FLAGS[isa], depends=kernels)
                for isa in isa_variants(compiler)]
    return [*variants, extension(compiler, "_bpe", "_bpe.pyx", depends=tokenizer),
            extension(compiler, "_cpu", "_cpu.pyx")]


if __name__ == "__main__":
    compiler = Compiler()
    if not {"sdist", "egg_info", "clean", "--version", "dist_info"} & set(sys.argv[1:]):
        compiler.require_all()
    setup(ext_modules=extensions(compiler), options={"build_ext": {"parallel": os.cpu_count()}})
