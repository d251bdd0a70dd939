"""Single operations of NumPy's BLAS and of PyTorch."""

from __future__ import annotations

import numpy as np

from ..shapes import time_operations

RNG = np.random.default_rng(0)


def measure(program: str, seconds: float, shapes: dict, threads: int) -> dict:
    """program: numpy, torch-fp32 or torch-bf16. GFLOP/s, or ns for each element."""
    library, _, precision = program.partition("-")
    return time_operations(_NumPy() if library == "numpy" else _Torch(precision, threads), shapes, seconds)


def _normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape, dtype=np.float32)


class _NumPy:
    """NumPy with the BLAS it brings."""

    def gemm(self, M, N, K, trans_a, trans_b):
        a = _normal(*((K, M) if trans_a else (M, K)))
        b = _normal(*((N, K) if trans_b else (K, N)))
        a, b, c = a.T if trans_a else a, b.T if trans_b else b, np.empty((M, N), np.float32)
        return lambda: np.matmul(a, b, out=c)

    def attention(self, B, T, H, D):
        return None

    def elementwise(self):
        n = 4_194_304
        x, y = _normal(n), np.empty(n, np.float32)
        yield "gelu forward", lambda: np.multiply(0.5 * x, 1 + np.tanh(0.79788456 * (x + 0.044715 * x**3)), out=y), n


class _Torch:
    def __init__(self, precision: str, threads: int) -> None:
        import torch
        self.torch, self.bf16 = torch, precision == "bf16"
        torch.set_num_threads(threads)

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
