"""The build: what a compiler lacks is one line, and what it can do is built."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROBE = """
import sys
sys.argv = ["setup.py", "--version"]
sys.path.insert(0, {root!r})
import setup
compiler = setup.Compiler()
compiler.require_all()
print(",".join(setup.isa_variants(compiler)))
"""
pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="x86 has several instruction sets")


def variants(tmp_path, refused: str = "", **environment) -> subprocess.CompletedProcess:
    """What would be built with a compiler that does not know some flag, as gcc 10 does not know x86-64-v4."""
    compiler = tmp_path / "old-gcc"
    compiler.write_text(f"""#!/bin/sh
case "$*" in *"{refused or 'nothing at all'}"*) echo "cc1: error: bad value" >&2; exit 1;; esac
exec cc "$@"
""")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    return subprocess.run([sys.executable, "-c", PROBE.format(root=str(ROOT))], capture_output=True, text=True,
                          cwd=ROOT, env=os.environ | {"CC": str(compiler), "FESTE_ISA_BUILD": ""} | environment)


def test_a_compiler_without_the_flags_of_a_variant_builds_the_others(tmp_path):
    done = variants(tmp_path, "x86-64-v4")
    assert done.returncode == 0 and done.stdout == "avx2,generic\n"
    assert done.stderr.count("\n") == 1 and "no kernels for avx512" in done.stderr and "version 11" in done.stderr
    done = variants(tmp_path, "-march=")
    assert done.stdout == "generic\n" and done.stderr.count("\n") == 2
    assert variants(tmp_path).stdout == "avx512,avx2,generic\n"


def test_what_is_wanted_and_cannot_be_built_falls_back(tmp_path):
    done = variants(tmp_path, "-march=", FESTE_ISA_BUILD="avx2")
    assert done.stdout == "generic\n" and "no kernels for avx2" in done.stderr


def test_clang_is_not_told_what_gcc_may_inline():
    """The same flags forbid it to inline anything: the kernels would be twelve times as slow."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import setup; print(*setup.Compiler().flags)"
    for cc, inlined in (("cc", True), ("cc -D__clang__", False)):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT,
                              env=os.environ | {"CC": cc})
        assert ("-fno-inline-functions" in done.stdout) == inlined and "-O3" in done.stdout, done.stderr


@pytest.mark.parametrize(("refused", "said"), [
    ("fopenmp", "needs a C compiler with OpenMP"), ("-I", "needs Python's C headers"),
    ("--version", "found none (")])
def test_a_compiler_that_lacks_something_is_one_line(tmp_path, refused, said):
    done = variants(tmp_path, refused)
    assert done.returncode == 1 and said in done.stderr and done.stderr.count("\n") == 1


def test_an_unknown_variant_is_one_line(tmp_path):
    done = variants(tmp_path, FESTE_ISA_BUILD="avx9")
    assert done.returncode == 1 and "unknown instruction set 'avx9'" in done.stderr and done.stderr.count("\n") == 1
