"""A tour of the kernels: what each computes, that it computes it, and how fast.

`feste/reference.py` says in plain NumPy what every operation is; `feste/_ops.pyx` does the same quickly. This
script runs both on the shapes of the medium model, compares them, and times the fast one against the plain one and
against what the machine can do at most (the register tile of the matrix product on data in L1: `ops.peak_flops`).
"""

import time

import numpy as np

from feste import ops, reference
from feste.ops import zeros

B, T, H, D, V = 8, 256, 4, 64, 1536  # sequences, tokens, heads, channels of a head, vocabulary
C, rows = H * D, B * T
RNG = np.random.default_rng(0)


def normal(*shape: int) -> np.ndarray:
    array = zeros(*shape)
    RNG.standard_normal(dtype=np.float32, out=array)
    return array


def best_time(call, repeats: int = 5) -> float:
    call()
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return min(times)


def show(title: str, name: str, outputs: list[np.ndarray], arguments: tuple, flops: float = 0.0) -> None:
    """Run a kernel and its twin on the same input; print how far apart they are and what each takes."""
    exact = [out.astype(np.float64) for out in outputs]
    begun = time.perf_counter()
    getattr(reference, name)(*exact, *arguments)
    slow = time.perf_counter() - begun
    kernel = getattr(ops, name)
    kernel(*outputs, *arguments)
    error = max(np.abs(a - b).max() / np.abs(b).max() for a, b in zip(outputs, exact, strict=True))
    fast = best_time(lambda: kernel(*outputs, *arguments))
    rate = f"{flops / fast / 1e9:5.0f} GFLOP/s, {flops / fast / PEAK:4.0%} of peak" if flops else ""
    print(f"{title}\n    {name:24} {1e3 * fast:8.3f} ms   NumPy {1e3 * slow:9.2f} ms   differs by {error:.1e}   "
          f"{rate}\n")


def empty(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    return [zeros(*shape) for shape in shapes]


PEAK = ops.peak_flops(50_000) / best_time(lambda: ops.peak_flops(50_000))
print(f"{ops.isa} ({ops.isa_reason}), {ops.get_num_threads()} threads, at most {PEAK / 1e9:.0f} GFLOP/s in float32\n")

ids = RNG.integers(0, V, (B, T)).astype(np.int32)
show("A token becomes the sum of two vectors: what it is, and where it stands.",
     "embedding_forward", empty((rows, C)), (ids, normal(V, C), normal(T, C), B, T, C))

x = normal(rows, C)
weight, bias = 1 + 0.1 * normal(C), 0.1 * normal(C)
out, mean, rstd = empty((rows, C), (rows,), (rows,))
show("Layer normalisation gives every token mean 0 and variance 1, then a learned scale and shift.",
     "layernorm_forward", [out, mean, rstd], (x, weight, bias, rows, C))

show("A linear layer: each of 3C outputs is a weighted sum of C inputs. This is where the time goes.",
     "linear_forward", empty((rows, 3 * C)), (x, normal(C, 3 * C), normal(3 * C), None, rows, C, 3 * C),
     2.0 * rows * C * 3 * C)

dout = normal(rows, 3 * C)
show("Backward, to its input: the same product with the weight transposed.",
     "linear_backward_input", empty((rows, C)), (dout, normal(C, 3 * C), rows, C, 3 * C), 2.0 * rows * C * 3 * C)
show("Backward, to its weight: input transposed times gradient, added to what is there.",
     "linear_backward_weight", empty((C, 3 * C), (3 * C,)), (dout, x, rows, C, 3 * C), 2.0 * rows * C * 3 * C)

qkv = normal(B, T, 3 * C)
pairs = B * H * T * (T + 1) / 2  # a query sees the keys up to its own
att, lse = empty((B, T, C), (B, H, T))
show("Attention: every token asks (q), every earlier token answers (k) with what it has to say (v).",
     "attention_forward", [att, lse], (qkv, B, T, H, D), 4 * pairs * D)
show("Backward, the weights of attention are made again rather than kept: memory grows with T, not T^2.",
     "attention_backward", empty((B, T, 3 * C)), (normal(B, T, C), qkv, att, lse, B, T, H, D), 8 * pairs * D)

h = normal(rows, 4 * C)
show("GELU, a soft switch: x times the chance that a normal number is below x.",
     "gelu_forward", empty((rows, 4 * C)), (h, h.size))

logits, targets = 3 * normal(512, V), RNG.integers(0, V, 512).astype(np.int32)
show("Cross-entropy: how surprised the model is by the token that came, in nats.",
     "cross_entropy_forward", empty((512,), (512,)), (logits, targets, 512, V))

n = 1_000_000
m, v = 0.01 * normal(n), np.abs(normal(n)) * 1e-4
show("AdamW: a step along the mean gradient, divided by its typical size; clipping and decay in the same pass.",
     "adamw_update", [normal(n), m, v, 0.01 * normal(n)], (1e-3, 0.9, 0.95, 1e-8, 0.1, False, 1.0, 10, False, n))
