"""The operations that are timed one by one. Nothing of feste, for the peers time the same."""

from __future__ import annotations

from .clock import seconds_per_call

TRANSPOSES = {"NN": (False, False), "NT": (False, True), "TN": (True, False)}


def time_operations(library, shapes: dict, seconds: float) -> dict:
    """GFLOP/s of products and attention, ns for each element of the rest.

    shapes: size -> {"gemm": [(name, M, N, K)], "attention": (B, T, H, D)}. library: gemm(M, N, K, trans_a, trans_b) and
    attention(B, T, H, D) give a call, or None for what it does not have; elementwise() gives (name, call, elements).
    """
    result: dict[str, float] = {}
    for size, of_size in shapes.items():
        for name, M, N, K in of_size["gemm"]:
            for form, transposed in TRANSPOSES.items():
                rate = 2.0 * M * N * K / seconds_per_call(library.gemm(M, N, K, *transposed), seconds)
                result[f"{size} {name} {form} {M}x{N}x{K}"] = rate / 1e9
        B, T, H, D = of_size["attention"]
        call = library.attention(B, T, H, D)
        if call is not None:  # two products forward and four backward, of the causal half
            rate = 12 * B * H * T * (T + 1) / 2 * D / seconds_per_call(call, seconds)
            result[f"{size} attention forward + backward"] = rate / 1e9
    for name, call, n in library.elementwise():
        result[f"{name} ns/element"] = 1e9 * seconds_per_call(call, seconds) / n
    return result
