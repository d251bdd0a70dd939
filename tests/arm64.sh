#!/usr/bin/env bash
# Builds feste for AArch64 with a cross compiler and runs tests under emulation: tests/arm64.sh [pytest arguments]
#
# Needs Debian's gcc-aarch64-linux-gnu and qemu-user, and arm64 as a foreign architecture (dpkg --add-architecture arm64;
# apt update). Python and its libraries for arm64 are unpacked under build/arm64; nothing is installed on the system.
set -euo pipefail
cd "$(dirname "$0")/.."
home=$PWD/build/arm64
root=$home/root
packages="python3.11-minimal libpython3.11-minimal libpython3.11-stdlib libpython3.11-dev libc6 libgcc-s1 libstdc++6
          libgomp1 libexpat1 zlib1g libffi8 libbz2-1.0 liblzma5 libsqlite3-0 libssl3 libuuid1 libncursesw6 libtinfo6
          libreadline8 libcrypt1 libdb5.3"
python=${PYTHON:-python3}

for tool in aarch64-linux-gnu-gcc qemu-aarch64; do
    command -v $tool > /dev/null || { echo "$tool is missing: apt install gcc-aarch64-linux-gnu qemu-user" >&2; exit 2; }
done

if [ ! -e "$home/ready" ]; then
    rm -rf "$home" && mkdir -p "$home/packages" "$root"
    # shellcheck disable=SC2086
    (cd "$home/packages" && apt-get download -q $(printf '%s:arm64 ' $packages))
    for package in "$home"/packages/*.deb; do dpkg -x "$package" "$root"; done
    "$python" -m pip install --quiet --target "$home/site" --python-version 3.11 --only-binary=:all: \
        --platform manylinux_2_28_aarch64 --platform manylinux2014_aarch64 \
        "setuptools>=77" cython numpy safetensors textual pytest pytest-asyncio hypothesis tokenizers tiktoken regex
    # A child process is started by this script too, since the system cannot run the interpreter itself.
    printf '#!/bin/sh\nexec qemu-aarch64 -L %s -E PYTHONPATH=%s:%s %s/usr/bin/python3.11 "$@"\n' \
        "$root" "$home/site" "$PWD" "$root" > "$home/python"
    chmod +x "$home/python"
    printf 'import sys\n\nsys.executable = "%s/python"\n' "$home" > "$home/site/sitecustomize.py"
    touch "$home/ready"
fi

export CC="aarch64-linux-gnu-gcc -I$root/usr/include" LDSHARED="aarch64-linux-gnu-gcc -shared"
"$home/python" setup.py --quiet build_ext --inplace
if [ $# -eq 0 ]; then
    set -- tests/test_ops.py tests/test_bounds.py tests/test_reference.py tests/test_parity.py tests/test_model.py \
        tests/test_bpe_reference.py
fi
exec "$home/python" -m pytest -p no:cacheprovider -m "not long" "$@"
