"""Every kernel of every instruction set this CPU can run, against its twin in reference.py."""

import inspect
import itertools
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
from bounds import assert_within
from kernel_cases import Case, all_cases, normal

from feste import ops, reference

CASES = all_cases()
CANARY = np.float32(-7.25e11)
EDGE = 72  # bytes of canaries on either side: not the beginning of a cache line
MACHINE_ONLY = {"set_num_threads", "get_num_threads", "peak_flops", "Recording"}  # nothing to specify


@pytest.fixture(params=ops.available_isas)
def kernels(request):
    module = ops.load(request.param)
    yield module
    module.set_num_threads(0)


def guarded(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A copy of x between canaries, at an address that is aligned to its elements only."""
    lead = EDGE // x.itemsize
    room = np.full((x.nbytes + 2 * EDGE) // 4, CANARY, np.float32).view(x.dtype)
    inner = room[lead:lead + x.size]
    inner[:] = x.reshape(-1)
    return inner.reshape(x.shape), room


def run(module, case: Case, dtype: type) -> dict[str, np.ndarray]:
    """The outputs of a case; with float32, inputs and outputs lie between canaries, which must survive."""
    args, rooms = {}, {}
    for name, value in case.args.items():
        if not isinstance(value, np.ndarray):
            args[name] = value
        elif dtype is np.float32:
            args[name], rooms[name] = guarded(value)
        else:
            args[name] = value.copy() if value.dtype == np.int32 else value.astype(dtype)
    returned = getattr(module, case.kernel)(**args)
    for name, room in rooms.items():
        bytes_of = room.view(np.uint8)
        edge = np.concatenate([bytes_of[:EDGE], bytes_of[-EDGE:]]).view(np.float32)
        assert (edge == CANARY).all(), f"{case} wrote outside {name}"
        if name not in case.outputs:
            assert args[name].tobytes() == case.args[name].tobytes(), f"{case} changed its input {name}"
    outputs = {name: args[name] for name in case.outputs}
    return outputs if returned is None else outputs | {"return": np.asarray(returned)}


# ---- the two modules are twins -----------------------------------------------------------------------------


def public_functions(module) -> dict:
    return {name: f for name, f in vars(module).items()
            if not name.startswith(("_", "bpe_")) and getattr(f, "__module__", None) == module.__name__
            and name not in MACHINE_ONLY}


@pytest.mark.parametrize("isa", ops.available_isas)
def test_every_kernel_has_a_twin_of_the_same_signature(isa):
    kernels, twins = public_functions(ops.load(isa)), public_functions(reference)
    assert set(kernels) == set(twins)
    for name in kernels:
        expected = [(p.name, p.default) for p in inspect.signature(twins[name]).parameters.values()]
        actual = [(p.name, p.default) for p in inspect.signature(kernels[name]).parameters.values()]
        assert actual == expected, name


def test_every_kernel_is_tested():
    elsewhere = {"pack_weight", "packed_forward", "packed_size",
                 "quantize_weight", "quantized_forward", "quantized_size"}
    assert {case.kernel for case in CASES} | elsewhere == set(public_functions(reference))


def test_the_door_exports_every_kernel():
    for name in [*public_functions(reference), *MACHINE_ONLY]:
        assert getattr(ops, name) is getattr(ops.load(ops.isa), name)


# ---- what they compute -------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_is_within_its_bound(kernels, case):
    expected = run(reference, case, np.float64)
    actual = run(kernels, case, np.float32)
    inputs = {name: np.asarray(x, np.float64) if isinstance(x, np.ndarray) and x.dtype == np.float32 else x
              for name, x in case.args.items()}
    bounds = case.bounds(inputs, expected)
    for name, value in expected.items():
        if not np.isfinite(value).all():  # round_bf16 of infinities
            assert np.array_equal(actual[name], value.astype(np.float32))
            continue
        assert_within(actual[name], value, bounds[name], f"{case} {name}")


@pytest.mark.parametrize("case", [c for c in CASES if "M" not in c.args or c.args["K"] > 1], ids=str)
def test_any_number_of_threads_gives_the_same_bits(kernels, case):
    results = []
    for threads in (1, 2, 3, 7):
        kernels.set_num_threads(threads)
        results.append(run(kernels, case, np.float32))
    for name, first in results[0].items():
        for other in results[1:]:
            assert np.array_equal(first, other[name]), f"{case} {name}"


def rounds_after_each_addition(isa: str) -> bool:
    """Whether a pair's products are added odd one first and each sum is rounded, as Intel's manual has it.

    1 + 2**-24 is rounded to 1, and 1 + 1.5 * 2**-24 to 1 + 2**-23; rounded once, or the other way round, it is more.
    """
    sums, small = [], np.float32(2.0 ** -12)
    for even in (1.0, 1.5):
        a = np.array([[1, 0, even * small, small]], np.float32)
        b = np.array([[1, 0, small, small]], np.float32).T.copy()
        out = np.empty((1, 1), np.float32)
        ops.load(isa).gemm(out, a, b, 1, 1, 4, bf16=True)
        sums.append(float(out[0, 0]))
    return sums == [1.0, 1.0 + 2.0 ** -23]


def test_portable_bf16_rounds_after_each_addition():
    assert all(rounds_after_each_addition(isa) for isa in ops.available_isas if isa != "avx512")


@pytest.mark.parametrize("case", [c for c in CASES if c.args.get("bf16") or c.kernel == "round_bf16"], ids=str)
def test_bf16_has_the_same_bits_on_every_instruction_set(case):
    """On a CPU whose instruction adds as the manual says; any other is held to the bounds only."""
    name = case.outputs[0]
    isas = [isa for isa in ops.available_isas if case.kernel == "round_bf16" or rounds_after_each_addition(isa)]
    results = [run(ops.load(isa), case, np.float32)[name] for isa in isas]
    for other in results[1:]:
        assert np.array_equal(results[0], other)


@pytest.mark.parametrize(("rows", "K", "N"), [(1, 1, 1), (1, 65, 33), (1, 64, 512), (3, 70, 100), (9, 33, 31)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_packed_weights_give_the_bits_of_the_gemm(kernels, rows, K, N, transposed, with_bias):
    x, weight = normal(rows, K), normal(N, K) if transposed else normal(K, N)
    bias, residual = (normal(N), normal(rows, N)) if with_bias else (None, None)
    packed, out = np.empty(kernels.packed_size(K, N), np.int32), np.empty((rows, N), np.float32)
    kernels.pack_weight(packed, weight, K, N, transposed)
    kernels.packed_forward(out, x, packed, bias, residual, rows, K, N)
    expected, zero = np.empty((rows, N), np.float32), np.zeros(N, np.float32)
    straight = np.ascontiguousarray(weight.T) if transposed else weight
    kernels.linear_forward(expected, x, straight, bias if with_bias else zero, residual, rows, K, N, True)
    assert np.array_equal(out, expected)
    twin_packed, twin = np.empty(reference.packed_size(K, N), np.int32), np.empty((rows, N))
    reference.pack_weight(twin_packed, weight, K, N, transposed)
    reference.packed_forward(twin, x.astype(np.float64), twin_packed, bias, residual, rows, K, N)
    assert_within(out, twin, 1e-6 * (K + 1) * 10, "packed_forward")


@pytest.mark.parametrize(("rows", "K", "N"), [(1, 1, 1), (1, 65, 33), (1, 64, 1200), (3, 70, 100), (9, 96, 31)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_quantized_weights_are_q8_0_and_multiply_like_it(kernels, rows, K, N, transposed, with_bias):
    x, weight = normal(rows, K), normal(N, K) if transposed else normal(K, N)
    weight[..., :1] *= 1e-7  # scales that are subnormal in float16
    bias, residual = (normal(N), normal(rows, N)) if with_bias else (None, None)
    size = kernels.quantized_size(K, N)
    quantized, twin = np.empty(size, np.uint8), np.empty(reference.quantized_size(K, N), np.uint8)
    kernels.quantize_weight(quantized, weight, K, N, transposed)
    reference.quantize_weight(twin, weight, K, N, transposed)
    assert np.array_equal(quantized, twin)
    out, expected = np.empty((rows, N), np.float32), np.empty((rows, N))
    kernels.quantized_forward(out, x, quantized, bias, residual, rows, K, N)
    reference.quantized_forward(expected, x.astype(np.float64), twin, bias, residual, rows, K, N)
    assert_within(out, expected, 1e-6 * (K + 1) * 10, "quantized_forward")
    alone = np.empty((rows, N), np.float32)  # a row has the same bits, whatever rows are beside it
    for i in range(rows):
        kernels.quantized_forward(alone[i], x[i], quantized, bias, None if residual is None else residual[i], 1, K, N)
    assert np.array_equal(alone, out)


def test_quantized_weights_are_those_of_the_gguf_library(kernels):
    quants = pytest.importorskip("gguf.quants")
    constants = pytest.importorskip("gguf.constants")
    weight = np.concatenate([normal(40, 64), np.zeros((1, 64), np.float32), normal(3, 64) * 1e-6,
                             np.full((1, 64), 0.5, np.float32)])
    weight[0, :32] = np.arange(32) - 15.5  # halves
    quantized = np.empty(kernels.quantized_size(64, len(weight)), np.uint8)
    kernels.quantize_weight(quantized, weight, 64, len(weight), True)
    assert np.array_equal(quantized, quants.quantize(weight, constants.GGMLQuantizationType.Q8_0).reshape(-1))


@pytest.mark.parametrize("name", ["gelu_forward", "layernorm_forward", "cross_entropy_forward", "attention_forward",
                                  "linear_forward", "gemm"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_nan_and_inf_are_not_hidden(kernels, name, poison):
    case = next(c for c in reversed(CASES) if c.kernel == name)
    key = next(k for k in ("x", "logits", "qkv", "a") if k in case.args)
    poisoned = case.args[key].copy()
    poisoned.reshape(-1)[poisoned.size // 2] = poison
    outputs = run(kernels, Case(name, case.args | {key: poisoned}, case.outputs, case.bounds), np.float32)
    assert not all(np.isfinite(x).all() for x in outputs.values())


def test_adamw_keeps_nan_visible(kernels):
    arrays = [normal(20), np.zeros(20, np.float32), np.zeros(20, np.float32), normal(20)]
    arrays[3][5] = np.nan
    kernels.adamw_update(*arrays, 1e-3, 0.9, 0.95, 1e-8, 0.1, False, 1.0, 1, True, 20)
    assert np.isnan(arrays[0][5]) and np.isfinite(np.delete(arrays[0], 5)).all()


# ---- the door ----------------------------------------------------------------------------------------------


def broken(x: np.ndarray) -> dict[str, object]:
    """What an array argument must not be."""
    flat = np.zeros(2 * x.size + 4, x.dtype)
    unaligned = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype)[:x.size].reshape(x.shape)
    cases = {"another dtype": np.zeros(x.shape, np.int64), "too short": x.reshape(-1)[:-1], "empty": x.reshape(-1)[:0],
             "strided": flat[:2 * x.size:2].reshape(x.shape) if x.size > 1 else None, "unaligned": unaligned,
             "big-endian": x.astype(x.dtype.newbyteorder(">"))}
    if x.ndim == 2 and min(x.shape) > 1:
        cases |= {"Fortran order": np.asfortranarray(x), "transposed shape": np.ascontiguousarray(x.T)
                  if x.shape[0] != x.shape[1] else None}
    return {name: value for name, value in cases.items() if value is not None}


SMALLEST = [c for c in reversed(CASES) if c.args.get("rows") != 1 and c.args.get("n") != 1 and c.args.get("B") != 1]
ONE_OF_EACH = list({case.kernel: case for case in SMALLEST}.values())


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda c: c.kernel)
def test_bad_arrays_are_refused_by_name(kernels, case):
    for name, value in case.args.items():
        if not isinstance(value, np.ndarray):
            continue
        for what, bad in broken(value).items():
            if name in ("wte", "wpe", "dwte", "dwpe") and what == "too short":
                continue  # their number of rows is taken from the array; the indices are checked against it
            with pytest.raises(ValueError, match=r"must|lie"):
                getattr(kernels, case.kernel)(**(case.args | {name: bad}))
                pytest.fail(f"{case.kernel} took {name} that is {what}")
        with pytest.raises(TypeError):
            getattr(kernels, case.kernel)(**(case.args | {name: value.tolist()}))


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda c: c.kernel)
def test_read_only_outputs_are_refused(kernels, case):
    for name in case.outputs:
        read_only = case.args[name].copy()
        read_only.flags.writeable = False
        with pytest.raises(ValueError, match=f"{name} must be .*writeable"):
            getattr(kernels, case.kernel)(**(case.args | {name: read_only}))


# Outputs that may be an input, as their twins say.
MAY_BE = {("gelu_backward", "dx", "dout"), ("dropout_forward", "out", "x"), ("dropout_forward", "out", "residual"),
          ("dropout_backward", "dx", "dout"), ("layernorm_backward", "dx", "dresidual"),
          ("relu2_backward", "dx", "dout"), ("rmsnorm_backward", "dx", "dresidual"),
          ("cross_entropy_backward", "dlogits", "logits")}


@pytest.mark.parametrize("case", ONE_OF_EACH, ids=lambda c: c.kernel)
def test_overlapping_outputs_are_refused(kernels, case):
    arrays = {name: x for name, x in case.args.items() if isinstance(x, np.ndarray)}
    for output, other in itertools.product(case.outputs, arrays):
        if output == other or (case.kernel, output, other) in MAY_BE or (case.kernel, other, output) in MAY_BE:
            continue
        a, b = arrays[output], arrays[other]
        room = np.zeros(a.nbytes + b.nbytes, np.uint8)
        begin = a.nbytes - max(a.itemsize, b.itemsize)  # one element in common
        first, shifted = room[:a.nbytes].view(a.dtype), room[begin:begin + b.nbytes].view(b.dtype).reshape(b.shape)
        with pytest.raises(ValueError, match="overlap"):
            getattr(kernels, case.kernel)(**(case.args | {output: first.reshape(a.shape), other: shifted}))
            pytest.fail(f"{case.kernel} took {output} that overlaps {other}")


def test_indices_and_probabilities_out_of_range_are_refused(kernels):
    out, wte, wpe = np.zeros((1, 2, 3), np.float32), np.zeros((4, 3), np.float32), np.zeros((2, 3), np.float32)
    for bad in (-1, 4, 2**31 - 1):
        with pytest.raises(ValueError, match=rf"ids must lie in 0 \.\. 3, got {bad}"):
            kernels.embedding_forward(out, np.array([[0, bad]], np.int32), wte, wpe, 1, 2, 3)
    with pytest.raises(ValueError, match="positions"):
        kernels.embedding_forward(out, np.zeros((1, 2), np.int32), wte, wpe, 1, 2, 3, 1)
    x = np.zeros(3, np.float32)
    for p in (1.0, -0.1, np.nan):
        with pytest.raises(ValueError, match="dropout probability"):
            kernels.dropout_backward(x, x, p, 0, 3)
    with pytest.raises(ValueError, match="threads"):
        kernels.set_num_threads(-1)


# ---- life in a process -------------------------------------------------------------------------------------


def in_python(code: str, **env: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | env,
                          timeout=120)


@pytest.mark.parametrize("isa", ops.available_isas)
def test_an_instruction_set_can_be_forced(isa):
    done = in_python("from feste import ops; print(ops.isa, ops.isa_reason)", FESTE_ISA=isa)
    assert done.stdout.strip() == f"{isa} forced by FESTE_ISA", done.stderr


@pytest.mark.parametrize("isa", ops.available_isas)
def test_every_instruction_set_is_compiled_with_its_own_flags(isa):
    panel = ops.load(isa).packed_size(1, 1)  # two or three vectors wide; the width comes from the compiler's flags
    assert panel == {"avx512": 32, "avx2": 16, "neon": 12, "generic": 8}[isa]


def test_another_instruction_set_can_be_taken_later():
    done = in_python("from feste import ops\nops.set_num_threads(1)\nops.use('generic')\nKernel = type(ops.gemm)\n"
                     "kernels = [value for value in vars(ops).values() if type(value) is Kernel]\n"
                     "assert len(kernels) >= 40 and {k.__module__ for k in kernels} == {'feste._ops_generic'}\n"
                     "assert ops.get_num_threads() == 1 and ops.Recording.__module__ == 'feste._ops_generic'\n"
                     "print(ops.isa, ops.isa_reason)")
    assert done.stdout.strip() == "generic as asked for", done.stderr


def test_an_instruction_set_that_is_not_there_is_an_error():
    done = in_python("from feste import ops", FESTE_ISA="altivec")
    assert done.returncode == 1 and "FESTE_ISA=altivec is unknown; choose one of" in done.stderr
    lacking = in_python("from feste import _cpu\n_cpu.supported = lambda: ['generic']\nfrom feste import ops",
                        FESTE_ISA="avx512")
    assert lacking.returncode == 1 and "but this CPU supports only generic" in lacking.stderr


def test_import_leaves_the_floating_point_mode_alone():
    done = in_python("import numpy as np\nx = np.float32(1e-40)\nimport feste.ops\n"
                     "assert np.float32(1e-40) * np.float32(1) == x != 0 and np.float64(5e-324) != 0")
    assert done.returncode == 0, done.stderr


def test_kernels_run_in_threads_and_release_the_gil(kernels):
    shape, expected = (64, 96, 128), None
    a, b = normal(64, 128), normal(128, 96)
    expected = np.empty((64, 96), np.float32)
    kernels.gemm(expected, a, b, *shape)
    results = [np.empty((64, 96), np.float32) for _ in range(4)]

    def work(out):
        for _ in range(50):
            kernels.gemm(out, a, b, *shape)
    threads = [threading.Thread(target=work, args=(out,)) for out in results]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(np.array_equal(out, expected) for out in results)


FORK = """
import os, warnings
import numpy as np
from feste import ops
ops.set_num_threads(2)
a = np.ones((300, 300), np.float32)
out = np.empty_like(a)
ops.gemm(out, a, a, 300, 300, 300)
pid = os.fork()
if pid == 0:
    ops.gemm(out, a, a, 300, 300, 300)
    os._exit(0 if (out == 300).all() else 1)
assert os.waitpid(pid, 0)[1] == 0
"""


def test_a_forked_process_computes_and_says_that_it_has_one_thread():
    done = in_python(FORK)
    assert done.returncode == 0, done.stderr
    assert "one thread in a forked process" in done.stderr
