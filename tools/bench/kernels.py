"""Single operations: matrix products at the shapes of the four models, attention, elementwise, AdamW."""

from __future__ import annotations

import numpy as np

from feste import ops
from feste.ops import zeros
from tools.bench.clock import measured_peak, seconds_per_call
from tools.bench.sizes import SEQUENCES, SIZES, gemm_shapes, model_config

RNG = np.random.default_rng(0)
TRANSPOSES = {"NN": (False, False), "NT": (False, True), "TN": (True, False)}


def measure(contender: str, seconds: float = 0.15, sizes: tuple[str, ...] = SIZES) -> dict:
    """contender: feste-fp32, feste-bf16, numpy, torch-fp32 or torch-bf16. GFLOP/s, or ns for each element.

    feste's products are checked against NumPy before they are timed.
    """
    library, _, precision = contender.partition("-")
    bench = {"feste": _Feste, "numpy": _NumPy, "torch": _Torch}[library](precision)
    result: dict[str, float] = {}
    for size in sizes:
        for name, M, N, K in gemm_shapes(size):
            for form in TRANSPOSES:
                rate = 2.0 * M * N * K / seconds_per_call(bench.gemm(M, N, K, *TRANSPOSES[form]), seconds)
                result[f"{size} {name} {form} {M}x{N}x{K}"] = rate / 1e9
        c = model_config(size)
        calls = bench.attention(SEQUENCES, c.block_size, c.n_heads, c.head_size)
        if calls is not None:
            pairs = SEQUENCES * c.n_heads * c.block_size * (c.block_size + 1) / 2
            rate = 12 * pairs * c.head_size / seconds_per_call(calls, seconds)
            result[f"{size} attention forward + backward"] = rate / 1e9
    for name, call, n in bench.elementwise():
        result[f"{name} ns/element"] = 1e9 * seconds_per_call(call, seconds) / n
    if library == "feste":
        result["peak GFLOP/s"] = measured_peak(precision == "bf16") / 1e9
    return result


def _normal(*shape: int) -> np.ndarray:
    array = zeros(*shape)
    RNG.standard_normal(dtype=np.float32, out=array)
    return array


def _check(actual: np.ndarray, expected: np.ndarray, tolerance: float, what: str) -> None:
    error = np.abs(actual - expected).max() / np.abs(expected).max()
    if not error < tolerance:
        raise AssertionError(f"{what}: relative error {error:.2g}")


class _Feste:
    def __init__(self, precision: str) -> None:
        self.bf16 = precision == "bf16"

    def gemm(self, M, N, K, trans_a, trans_b):
        a = _normal(*((K, M) if trans_a else (M, K)))
        b = _normal(*((N, K) if trans_b else (K, N)))
        c = zeros(M, N)

        def call():
            ops.gemm(c, a, b, M, N, K, trans_a, trans_b, False, self.bf16)
        call()
        _check(c[:64], ((a.T if trans_a else a)[:64]) @ (b.T if trans_b else b), 2e-2 if self.bf16 else 1e-4, "gemm")
        return call

    def attention(self, B, T, H, D):
        if self.bf16:
            return None  # attention is computed in fp32 in either precision
        qkv, dout = _normal(B, T, 3 * H * D), _normal(B, T, H * D)
        out, lse, dqkv = zeros(B, T, H * D), zeros(B, H, T), zeros(B, T, 3 * H * D)

        def call():
            ops.attention_forward(out, lse, qkv, B, T, H, D)
            ops.attention_backward(dqkv, dout, qkv, out, lse, B, T, H, D)
        return call

    def elementwise(self):
        if self.bf16:
            return
        n, rows, C = 4_194_304, 4096, 768
        x, y, dx, upstream = _normal(n), zeros(n), zeros(n), _normal(n)
        yield "gelu forward", lambda: ops.gelu_forward(y, x, n), n
        yield "gelu backward", lambda: ops.gelu_backward(dx, y, upstream, x, n), n
        h, mean, rstd, w = _normal(rows, C), zeros(rows), zeros(rows), _normal(C)
        out, dw, db = zeros(rows, C), zeros(C), zeros(C)
        yield "layernorm forward", lambda: ops.layernorm_forward(out, mean, rstd, h, w, w, rows, C), h.size
        dout = _normal(rows, C)
        yield ("layernorm backward", lambda: ops.layernorm_backward(out, dw, db, dout, h, w, mean, rstd, None, rows, C),
               h.size)
        m, v = zeros(n), zeros(n)
        yield ("AdamW with clipping and zeroing",
               lambda: ops.adamw_update(y, m, v, dx, 1e-3, 0.9, 0.95, 1e-8, 0.1, 0.5, 10, True, n), n)


class _NumPy:
    """NumPy with the BLAS it brings."""

    def __init__(self, precision: str) -> None:
        pass

    def gemm(self, M, N, K, trans_a, trans_b):
        a = _normal(*((K, M) if trans_a else (M, K)))
        b = _normal(*((N, K) if trans_b else (K, N)))
        a, b, c = a.T if trans_a else a, b.T if trans_b else b, zeros(M, N)
        return lambda: np.matmul(a, b, out=c)

    def attention(self, B, T, H, D):
        return None

    def elementwise(self):
        n = 4_194_304
        x, y = _normal(n), zeros(n)
        yield "gelu forward", lambda: np.multiply(0.5 * x, 1 + np.tanh(0.79788456 * (x + 0.044715 * x**3)), out=y), n


class _Torch:
    def __init__(self, precision: str) -> None:
        import torch
        self.torch, self.bf16 = torch, precision == "bf16"
        torch.set_num_threads(ops.get_num_threads())

    def gemm(self, M, N, K, trans_a, trans_b):
        """In bf16 with the casts of its inputs, as under autocast."""
        torch = self.torch
        a = torch.from_numpy(_normal(*((K, M) if trans_a else (M, K))))
        b = torch.from_numpy(_normal(*((N, K) if trans_b else (K, N))))
        a, b = a.T if trans_a else a, b.T if trans_b else b
        if self.bf16:
            return lambda: a.bfloat16() @ b.bfloat16()
        c = torch.empty(M, N)
        return lambda: torch.matmul(a, b, out=c)

    def attention(self, B, T, H, D):
        torch = self.torch
        dtype = torch.bfloat16 if self.bf16 else torch.float32
        q, k, v = (torch.randn(B, H, T, D, dtype=dtype, requires_grad=True) for _ in range(3))
        upstream = torch.randn(B, H, T, D, dtype=dtype)

        def call():
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            torch.autograd.grad(out, (q, k, v), upstream)
        return call

    def elementwise(self):
        if self.bf16:
            return
        torch, n, rows, C = self.torch, 4_194_304, 4096, 768
        x, gelu = torch.randn(n), lambda x: torch.nn.functional.gelu(x, approximate="tanh")
        yield "gelu forward", lambda: gelu(x), n
        grad = torch.randn(n)
        yield "gelu backward", lambda: torch.ops.aten.gelu_backward(grad, x, approximate="tanh"), n
        h, w = torch.randn(rows, C), torch.randn(C)
        yield "layernorm forward", lambda: torch.nn.functional.layer_norm(h, (C,), w, w), h.numel()
        parameter = torch.nn.Parameter(torch.randn(n))
        parameter.grad = torch.randn(n)
        optimizer = torch.optim.AdamW([parameter], lr=1e-3, fused=True)

        def update():
            torch.nn.utils.clip_grad_norm_([parameter], 1.0)
            optimizer.step()
            parameter.grad.zero_()
        yield "AdamW with clipping and zeroing", update, n
