#!/bin/sh
# The test suite with kernels and tokenizer under AddressSanitizer and UndefinedBehaviorSanitizer.
#
#   sh tests/sanitize.sh PYTHON [PYTEST ARGUMENTS]
#
# Builds a copy of the repository in a temporary directory and runs its tests there (all, or those named).
# Uses the packages of .venv if there is one, else of a new environment made with PYTHON. Any report is a failure.
set -eu

root=$(cd "$(dirname "$0")/.." && pwd)
python=${1:-python3}
[ $# -gt 0 ] && shift
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT INT TERM

mkdir "$scratch/feste" "$scratch/reports"
(cd "$root" && tar cf - --exclude='*.so' --exclude='__pycache__' setup.py pyproject.toml README.md CHANGELOG.md Makefile LICENSE \
    feste tests tools examples docs) | (cd "$scratch/feste" && tar xf -)

if [ -x "$root/.venv/bin/python" ] && "$root/.venv/bin/python" -c 'import Cython, hypothesis, numpy' 2>/dev/null; then
    python=$root/.venv/bin/python
else
    "$python" -m venv "$scratch/venv"
    python=$scratch/venv/bin/python
    "$python" -m pip install --quiet "setuptools>=77" "cython>=3.1" "numpy>=2.0" safetensors textual pytest \
        pytest-asyncio hypothesis pexpect tokenizers tiktoken regex matplotlib shtab tensorboardX gguf
fi

cd "$scratch/feste"
echo "building with -fsanitize=address,undefined"
FESTE_SANITIZE=1 "$python" setup.py --quiet build_ext --inplace --parallel 2
for library in feste/_ops_*.so feste/_bpe.*.so; do
    grep -q __asan_ "$library" && grep -q __ubsan_ "$library" || { echo "$library is not instrumented" >&2; exit 1; }
done

[ $# -eq 0 ] && set -- tests

status=0
# Memory that Python keeps to its end is no leak of feste, hence no leak check. A hostile test may ask numpy for too
# much: that is a MemoryError, as without the sanitizer, and the one line it leaves in the log is no report.
LD_PRELOAD="$(gcc -print-file-name=libasan.so) $(gcc -print-file-name=libubsan.so)" PYTHONPATH="$scratch/feste" \
ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=1:log_path=$scratch/reports/asan" \
UBSAN_OPTIONS="print_stacktrace=1:log_path=$scratch/reports/ubsan" \
    "$python" -m pytest -m "not long" -p no:cacheprovider "$@" || status=$?

for report in "$scratch"/reports/*; do
    [ -f "$report" ] && grep -v 'WARNING: AddressSanitizer failed to allocate' "$report" >&2 && status=1
done
[ $status -eq 0 ] && echo "no report of a sanitizer"
exit $status
