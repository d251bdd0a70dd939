"""Single operations of feste: matrix products at the shapes of the four models, attention, elementwise, AdamW."""

from __future__ import annotations

import numpy as np

from feste import ops
from feste.ops import zeros
from feste.speed import measured_peak

from .shapes import time_operations

RNG = np.random.default_rng(0)

def measure(program: str, seconds: float, shapes: dict, **_) -> dict:
    """GFLOP/s, or ns for each element, of feste-fp32 or feste-bf16; products are checked before they are timed."""
    precision = program.partition("-")[2]
    result = time_operations(_Feste(precision), shapes, seconds)
    return result | {"peak GFLOP/s": measured_peak(precision == "bf16") / 1e9}


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
               lambda: ops.adamw_update(y, m, v, dx, 1e-3, 0.9, 0.95, 1e-8, 0.1, False, 0.5, 10, True, n), n)
