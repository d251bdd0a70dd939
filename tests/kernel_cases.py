"""Inputs for every kernel, and how far it may be from its twin.

A case names a kernel, its arguments in order, which of them are outputs, and the bound of each output, computed
from the float64 inputs and results. Shapes include 1, odd sizes, and sizes around the edges of tiles and blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from bounds import SAFETY, U, gemm_bound, relative_bound

from feste import reference

RNG = np.random.default_rng(7)


@dataclass
class Case:
    """bounds(args, results): output name -> elementwise bound, where args maps names to inputs in float64."""

    kernel: str
    args: dict
    outputs: tuple[str, ...]
    bounds: Callable[[dict, dict], dict]
    label: str = ""

    def __str__(self) -> str:
        return f"{self.kernel}-{self.label}"


def normal(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def indices(high: int, *shape: int) -> np.ndarray:
    return RNG.integers(0, high, shape).astype(np.int32)


def rounded(x: np.ndarray, bf16: bool) -> np.ndarray:
    return np.asarray(reference._operand(x, bf16), np.float64)


# ---- matrix products ---------------------------------------------------------------------------------------

GEMM_SHAPES = [(1, 1, 1), (1, 33, 70), (1, 200, 129), (3, 2, 5), (8, 32, 16), (9, 33, 17), (13, 65, 31), (97, 31, 1),
               (6, 16, 515), (100, 70, 1030), (40, 3100, 3)]


def gemm_cases() -> Iterator[Case]:
    for M, N, K in GEMM_SHAPES:
        for trans_a, trans_b, accumulate, bf16 in [(False, False, False, False), (False, True, True, False),
                                                   (True, False, True, False), (True, True, False, False),
                                                   (False, False, True, True), (False, True, False, True),
                                                   (True, False, True, True)]:
            a = normal(*((K, M) if trans_a else (M, K)))
            b = normal(*((N, K) if trans_b else (K, N)))

            def bounds(args, results, trans_a=trans_a, trans_b=trans_b, bf16=bf16, accumulate=accumulate):
                a, b = rounded(args["a"], bf16), rounded(args["b"], bf16)
                start = args["c"] if accumulate else 0.0
                return {"c": gemm_bound(a.T if trans_a else a, b.T if trans_b else b, start)}

            yield Case("gemm", {"c": normal(M, N), "a": a, "b": b, "M": M, "N": N, "K": K, "trans_a": trans_a,
                                "trans_b": trans_b, "accumulate": accumulate, "bf16": bf16}, ("c",), bounds,
                       f"{M}x{N}x{K}-{'NT'[trans_a]}{'NT'[trans_b]}{'+' * accumulate}{'-bf16' * bf16}")


def linear_cases() -> Iterator[Case]:
    # The last three have halves of two blocks and of one, in float32 and in bfloat16, by columns and by rows.
    for rows, K, N in [(1, 1, 1), (1, 70, 100), (5, 3, 7), (64, 64, 192), (67, 33, 65), (1050, 21, 33), (2100, 21, 33),
                       (1050, 43, 20)]:
        for bf16 in (False, True):
            label = f"{rows}x{K}x{N}{'-bf16' * bf16}"
            for residual, bias in ((None, normal(N)), (normal(rows, N), normal(N)), (normal(rows, N), None)):
                def forward(args, results, bf16=bf16):
                    start = sum(np.abs(args[name]) for name in ("bias", "residual") if args[name] is not None)
                    return {"out": gemm_bound(rounded(args["x"], bf16), rounded(args["weight"], bf16), start)}
                yield Case("linear_forward", {"out": normal(rows, N), "x": normal(rows, K), "weight": normal(K, N),
                                              "bias": bias, "residual": residual, "rows": rows, "K": K, "N": N,
                                              "bf16": bf16}, ("out",), forward, label)
            yield Case("linear_backward_input", {"dx": normal(rows, K), "dout": normal(rows, N),
                                                 "weight": normal(K, N), "rows": rows, "K": K, "N": N, "bf16": bf16},
                       ("dx",), lambda args, results, bf16=bf16: {
                           "dx": gemm_bound(rounded(args["dout"], bf16), rounded(args["weight"], bf16).T)}, label)
            yield Case("linear_backward_weight", {"dweight": normal(K, N), "dbias": normal(N), "dout": normal(rows, N),
                                                  "x": normal(rows, K), "rows": rows, "K": K, "N": N, "bf16": bf16},
                       ("dweight", "dbias"), lambda args, results, bf16=bf16: {
                           "dweight": gemm_bound(rounded(args["x"], bf16).T, rounded(args["dout"], bf16),
                                                 args["dweight"]),
                           "dbias": gemm_bound(np.ones((1, len(args["dout"]))), args["dout"], args["dbias"])[0]},
                       label)


# ---- embedding, layernorm, GELU, dropout -------------------------------------------------------------------


def embedding_cases() -> Iterator[Case]:
    for B, T, C, V, position in [(1, 1, 1, 1, 0), (2, 5, 3, 4, 2), (3, 7, 33, 11, 0), (8, 64, 64, 50, 0)]:
        block_size = position + T + 1
        yield Case("embedding_forward", {"out": normal(B, T, C), "ids": indices(V, B, T), "wte": normal(V, C),
                                         "wpe": normal(block_size, C), "B": B, "T": T, "C": C, "position": position},
                   ("out",), lambda args, results: {"out": 2 * U * np.abs(results["out"]) + U}, f"{B}x{T}x{C}")

        def backward(args, results):
            total, places = np.abs(args["dwte"]), np.abs(args["dwpe"])
            reference.embedding_backward(total, places, np.abs(args["dout"]), args["ids"], args["B"], args["T"],
                                         args["C"])
            terms = np.sqrt(args["ids"].size + 1)
            return {"dwte": SAFETY * terms * U * total, "dwpe": SAFETY * terms * U * places}
        yield Case("embedding_backward", {"dwte": normal(V, C), "dwpe": normal(block_size, C), "dout": normal(B, T, C),
                                          "ids": indices(V, B, T), "B": B, "T": T, "C": C}, ("dwte", "dwpe"), backward,
                   f"{B}x{T}x{C}")


def layernorm_cases() -> Iterator[Case]:
    for rows, C in [(1, 1), (2, 2), (5, 17), (3, 33), (130, 64), (65, 768)]:
        x, weight = normal(rows, C) + 3, normal(C)

        def forward(args, results):
            size = np.abs(args["x"]).max(axis=1, keepdims=True)
            unit = SAFETY * np.sqrt(args["C"] + 1) * U
            mean = unit * size[:, 0]
            # rstd^-2 = variance + eps; an error of mean moves the variance by its square only
            rstd = unit * results["rstd"] * (1 + results["rstd"]**2 * size[:, 0]**2 * unit)
            out = unit * (size * results["rstd"][:, None] * np.abs(args["weight"]) + np.abs(args["bias"]))
            return {"out": out, "mean": mean, "rstd": rstd}
        yield Case("layernorm_forward", {"out": normal(rows, C), "mean": normal(rows), "rstd": normal(rows), "x": x,
                                         "weight": weight, "bias": normal(C), "rows": rows, "C": C},
                   ("out", "mean", "rstd"), forward, f"{rows}x{C}")
        statistics = np.empty((rows, C)), np.empty(rows), np.empty(rows)
        reference.layernorm_forward(*statistics, x.astype(np.float64), weight, weight, rows, C)
        mean, rstd = statistics[1].astype(np.float32), statistics[2].astype(np.float32)
        for dresidual in (None, normal(rows, C)):
            def backward(args, results):
                unit = SAFETY * np.sqrt(args["C"] + args["rows"]) * U
                rstd = args["rstd"][:, None]
                # x - mean carries the rounding of x, however small the difference
                xhat = np.abs(args["x"] - args["mean"][:, None]) * rstd + np.abs(args["x"]) * rstd
                dout, weight = np.abs(args["dout"]), np.abs(args["weight"])
                dxhat = dout * weight
                dx = unit * rstd * (dxhat + dxhat.mean(axis=1, keepdims=True)
                                    + xhat * (dxhat * xhat).mean(axis=1, keepdims=True))
                dx = dx + (0 if args["dresidual"] is None else U * np.abs(args["dresidual"]))
                return {"dx": dx, "dweight": unit * ((dout * xhat).sum(axis=0) + np.abs(args["dweight"])),
                        "dbias": unit * (dout.sum(axis=0) + np.abs(args["dbias"]))}
            yield Case("layernorm_backward", {"dx": normal(rows, C), "dweight": normal(C), "dbias": normal(C),
                                              "dout": normal(rows, C), "x": x, "weight": weight, "mean": mean,
                                              "rstd": rstd, "dresidual": dresidual, "rows": rows, "C": C},
                       ("dx", "dweight", "dbias"), backward, f"{rows}x{C}{'-residual' * (dresidual is not None)}")


def rmsnorm_cases() -> Iterator[Case]:
    for rows, C in [(1, 1), (2, 2), (5, 17), (3, 33), (130, 64), (65, 768)]:
        x, weight = normal(rows, C), normal(C)

        def forward(args, results):
            unit = SAFETY * np.sqrt(args["C"] + 1) * U
            out = unit * np.abs(args["x"] * args["weight"]) * results["rstd"][:, None]
            return {"out": out, "rstd": unit * results["rstd"]}
        yield Case("rmsnorm_forward", {"out": normal(rows, C), "rstd": normal(rows), "x": x, "weight": weight,
                                       "rows": rows, "C": C}, ("out", "rstd"), forward, f"{rows}x{C}")
        statistics = np.empty((rows, C)), np.empty(rows)
        reference.rmsnorm_forward(*statistics, x.astype(np.float64), weight, rows, C)
        rstd = statistics[1].astype(np.float32)
        for dresidual in (None, normal(rows, C)):
            def backward(args, results):
                unit = SAFETY * np.sqrt(args["C"] + args["rows"]) * U
                rstd = args["rstd"][:, None]
                xhat, dout = np.abs(args["x"]) * rstd, np.abs(args["dout"])
                dxhat = dout * np.abs(args["weight"])
                dx = unit * rstd * (dxhat + xhat * (dxhat * xhat).mean(axis=1, keepdims=True))
                dx = dx + (0 if args["dresidual"] is None else U * np.abs(args["dresidual"]))
                return {"dx": dx, "dweight": unit * ((dout * xhat).sum(axis=0) + np.abs(args["dweight"]))}
            yield Case("rmsnorm_backward", {"dx": normal(rows, C), "dweight": normal(C), "dout": normal(rows, C),
                                            "x": x, "weight": weight, "rstd": rstd, "dresidual": dresidual,
                                            "rows": rows, "C": C}, ("dx", "dweight"), backward,
                       f"{rows}x{C}{'-residual' * (dresidual is not None)}")


def relu2_cases() -> Iterator[Case]:
    for n in (1, 15, 16, 17, 20_001):
        x = normal(n)
        yield Case("relu2_forward", {"out": normal(n), "x": x, "n": n}, ("out",),
                   lambda args, results: {"out": 2 * U * results["out"]}, str(n))
        yield Case("relu2_backward", {"dx": normal(n), "out": normal(n), "dout": normal(n), "x": x, "n": n},
                   ("dx", "out"), lambda args, results: {name: 2 * U * np.abs(results[name]) for name in ("dx", "out")},
                   str(n))


def rope_cases() -> Iterator[Case]:
    for B, T, H, D, position in [(1, 1, 1, 2, 0), (2, 5, 3, 6, 4), (1, 33, 2, 64, 0), (3, 7, 1, 34, 1)]:
        angles = normal(position + T + 1, D // 2)
        tables = {"cosine": np.cos(angles), "sine": np.sin(angles)}

        def bounds(args, results):
            name = "qkv" if "qkv" in args else "dqkv"
            halves = np.abs(args[name]).reshape(args["B"], args["T"], 3, args["H"], 2, args["D"] // 2)
            sizes = np.broadcast_to(halves.sum(axis=4, keepdims=True), halves.shape).copy()
            sizes[:, :, 2] = 0.0  # the values stay as they are
            return {name: 3 * U * sizes.reshape(args[name].shape)}
        sizes = {"B": B, "T": T, "H": H, "D": D}
        yield Case("rope_forward", {"qkv": normal(B, T, 3 * H * D), **tables, **sizes, "position": position}, ("qkv",),
                   bounds, f"{B}x{T}x{H}x{D}")
        yield Case("rope_backward", {"dqkv": normal(B, T, 3 * H * D), **tables, **sizes}, ("dqkv",), bounds,
                   f"{B}x{T}x{H}x{D}")


def gelu_cases() -> Iterator[Case]:
    """gate = 1 / (1 + e^-2u): an error of a few U in the exponent and of U |2u| in its argument."""
    def slack(x):
        u = reference.GELU_SCALE * (x + reference.GELU_CUBIC * x**3)
        return 8 * U * (1 + np.abs(2 * u) / np.cosh(np.minimum(np.abs(u), 50))) * (1 + np.abs(x))

    for n in (1, 2, 15, 16, 17, 100, 20_001):
        x = normal(n) * 4
        if n > 16:
            x[:4] = [-100.0, 100.0, 0.0, -0.0]
        yield Case("gelu_forward", {"out": normal(n), "x": x, "n": n}, ("out",),
                   lambda args, results: {"out": slack(args["x"])}, str(n))
        yield Case("gelu_backward", {"dx": normal(n), "out": normal(n), "dout": normal(n), "x": x, "n": n},
                   ("dx", "out"), lambda args, results: {
                       "dx": slack(args["x"]) * np.abs(args["dout"]) * (2 + np.abs(args["x"])),
                       "out": slack(args["x"])}, str(n))


def dropout_cases() -> Iterator[Case]:
    for n, p in [(1, 0.5), (17, 0.0), (1000, 0.1), (20_000, 0.9)]:
        key = 0x123456789ABCDEF + n
        for residual in (None, normal(n)):
            yield Case("dropout_forward", {"out": normal(n), "x": normal(n), "residual": residual, "p": p, "key": key,
                                           "n": n}, ("out",), lambda args, results: {
                "out": 4 * U * (np.abs(args["x"]) / (1 - args["p"]) + np.abs(results["out"]))}, f"{n}-{p}")
        yield Case("dropout_backward", {"dx": normal(n), "dout": normal(n), "p": p, "key": key, "n": n}, ("dx",),
                   lambda args, results: {"dx": 4 * U * np.abs(results["dx"])}, f"{n}-{p}")


# ---- attention ---------------------------------------------------------------------------------------------


def _attention_errors(args: dict) -> dict:
    """Sizes, and the relative error that float32 may leave in the attention weights."""
    B, T, H, D = (args[name] for name in "BTHD")
    q, k, v = reference._heads(args["qkv"], B, T, H, D)
    scores = np.abs(q) @ np.abs(np.swapaxes(k, 2, 3)) / np.sqrt(D)
    exact = q @ np.swapaxes(k, 2, 3) / np.sqrt(D)
    causal = np.tril(np.ones((T, T), bool))
    exact = np.where(causal, exact, -np.inf)
    weights = np.exp(exact - exact.max(axis=3, keepdims=True))
    weights /= weights.sum(axis=3, keepdims=True)
    score_error = SAFETY * np.sqrt(D) * U * np.where(causal, scores, 0).max(axis=3, keepdims=True)
    return {"q": np.abs(q), "k": np.abs(k), "v": np.abs(v), "weights": weights, "score_error": score_error,
            "weight_error": 2 * score_error + SAFETY * np.sqrt(T) * U, "T": T, "D": D}


def attention_forward_bounds(args, results):
    e = _attention_errors(args)
    p = args.get("p", 0.0)
    out = (e["weights"] * e["weight_error"]) @ e["v"] / (1 - p)
    lse = e["score_error"][..., 0] + SAFETY * np.sqrt(e["T"]) * U * (1 + np.abs(results["lse"].reshape(out.shape[:3])))
    return {"out": np.moveaxis(out, 1, 2).reshape(results["out"].shape), "lse": lse.reshape(results["lse"].shape)}


def attention_backward_bounds(args, results):
    e = _attention_errors(args)
    B, T, H, D = (args[name] for name in "BTHD")
    kept = 1 / (1 - args.get("p", 0.0))
    do = np.abs(np.moveaxis(args["dout"].reshape(B, T, H, D), 2, 1))
    out = np.abs(np.moveaxis(args["out"].reshape(B, T, H, D), 2, 1))
    unit = SAFETY * np.sqrt(D + T) * U
    dweights = do @ np.swapaxes(e["v"], 2, 3) * kept
    delta = (do * out).sum(axis=3, keepdims=True)
    dscores = e["weights"] * (dweights + delta)
    error = dscores * (e["weight_error"] + unit)
    dq = error @ e["k"] / np.sqrt(D)
    dk = np.swapaxes(error, 2, 3) @ e["q"] / np.sqrt(D)
    dv = np.swapaxes(e["weights"] * (e["weight_error"] + unit) * kept, 2, 3) @ do
    bound = np.stack([dq, dk, dv])  # (3, B, H, T, D) -> (B, T, 3, H, D)
    return {"dqkv": np.moveaxis(bound, (0, 2), (2, 3)).reshape(args["qkv"].shape)}


def attention_cases() -> Iterator[Case]:
    for B, T, H, D in [(1, 1, 1, 1), (1, 2, 1, 3), (2, 9, 3, 8), (1, 65, 2, 33), (2, 130, 1, 64), (1, 70, 2, 80)]:
        for p in (0.0, 0.2):
            qkv, label = normal(B, T, 3 * H * D), f"{B}x{T}x{H}x{D}-{p}"
            common = {"B": B, "T": T, "H": H, "D": D, "p": p, "key": 99}
            yield Case("attention_forward", {"out": normal(B, T, H * D), "lse": normal(B, H, T), "qkv": qkv, **common},
                       ("out", "lse"), attention_forward_bounds, label)
            out, lse = np.empty((B, T, H * D)), np.empty((B, H, T))
            reference.attention_forward(out, lse, qkv.astype(np.float64), B, T, H, D, p, 99)
            yield Case("attention_backward", {"dqkv": normal(B, T, 3 * H * D), "dout": normal(B, T, H * D), "qkv": qkv,
                                              "out": out.astype(np.float32), "lse": lse.astype(np.float32), **common},
                       ("dqkv",), attention_backward_bounds, label)


def decode_bounds(args, results):
    H, D, n = args["H"], args["D"], args["position"] + 1
    q, _, _ = reference._heads(args["qkv"], args["B"], 1, H, D)
    scores = (np.abs(q) @ np.abs(np.swapaxes(results["k_cache"][:, :, :n], 2, 3))).max() / np.sqrt(D)
    unit = SAFETY * U * (2 * np.sqrt(D) * scores + np.sqrt(n))
    return {"out": unit * np.abs(results["v_cache"][:, :, :n]).max(), "k_cache": 0.0, "v_cache": 0.0}


def decode_cases() -> Iterator[Case]:
    for B, H, D, position, block_size in [(1, 1, 1, 0, 1), (2, 3, 8, 4, 7), (1, 2, 33, 20, 21), (3, 4, 64, 300, 512)]:
        caches = {name: normal(B, H, block_size, D) for name in ("k_cache", "v_cache")}
        yield Case("attention_decode", {"out": normal(B, H * D), **caches, "qkv": normal(B, 3 * H * D), "B": B, "H": H,
                                        "D": D, "position": position, "block_size": block_size},
                   ("out", "k_cache", "v_cache"), decode_bounds, f"{B}x{H}x{D}-{position}")


# ---- loss and optimizer ------------------------------------------------------------------------------------


def row_cases() -> Iterator[Case]:
    for n, rows, C in [(1, 1, 1), (3, 7, 5), (40, 40, 16), (300, 1000, 65)]:
        index = RNG.permutation(rows)[:n].astype(np.int32)
        sizes = {"n": n, "rows": rows, "C": C}
        yield Case("gather_rows", {"out": normal(n, C), "x": normal(rows, C), "index": index} | sizes, ("out",),
                   lambda args, results: {"out": np.zeros_like(results["out"])}, f"{n}x{rows}x{C}")
        yield Case("scatter_rows", {"out": normal(rows, C), "x": normal(n, C), "index": index} | sizes, ("out",),
                   lambda args, results: {"out": np.zeros_like(results["out"])}, f"{n}x{rows}x{C}")


def cross_entropy_cases() -> Iterator[Case]:
    for rows, V in [(1, 1), (3, 2), (5, 61), (9, 512), (4, 1537)]:
        logits, targets = normal(rows, V) * 5, indices(V, rows)

        def forward(args, results):
            unit = SAFETY * np.sqrt(args["V"]) * U * (1 + np.abs(args["logits"]).max())
            return {"losses": unit, "lse": unit}
        yield Case("cross_entropy_forward", {"losses": normal(rows), "lse": normal(rows), "logits": logits,
                                             "targets": targets, "rows": rows, "V": V}, ("losses", "lse"), forward,
                   f"{rows}x{V}")
        lse = np.log(np.exp(logits.astype(np.float64)).sum(axis=1)).astype(np.float32)

        def backward(args, results):
            probability = np.exp(args["logits"] - args["lse"][:, None])
            return {"dlogits": args["scale"] * 8 * U * (1 + probability * (np.abs(args["logits"])
                                                                          + np.abs(args["lse"][:, None])))}
        yield Case("cross_entropy_backward", {"dlogits": normal(rows, V), "logits": logits, "targets": targets,
                                              "lse": lse, "scale": 0.125, "rows": rows, "V": V}, ("dlogits",), backward,
                   f"{rows}x{V}")


def optimizer_cases() -> Iterator[Case]:
    for n in (1, 15, 16, 17, 8193, 40_000):
        yield Case("sum_of_squares", {"x": normal(n), "n": n}, (), lambda args, results: {
            "return": relative_bound(results["return"], min(args["n"], 8192), 0.0)}, str(n))
        yield Case("tile_squares", {"out": np.ones(-(-n // reference.SUM_TILE)), "x": normal(n), "n": n}, ("out",),
                   lambda args, results: {"out": relative_bound(results["out"], min(args["n"], 8192), 0.0)}, str(n))
        for clear in (False, True):
            yield Case("add", {"out": normal(n), "x": normal(n), "clear": clear, "n": n},
                       ("out", "x") if clear else ("out",),
                       lambda args, results: {"out": U * np.abs(results["out"]), "x": 0.0}, f"{n}{'-clear' * clear}")
        for zero_grad in (False, True):
            hyper = {"learning_rate": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1,
                     "cautious": zero_grad, "grad_scale": 0.7, "t": 3, "zero_grad": zero_grad}

            def bounds(args, results):
                m, v = np.abs(args["m"]) + np.abs(args["grad"]), args["v"] + args["grad"]**2
                step = args["learning_rate"] * (m / np.sqrt(results["v"]) + 1)
                return {"param": 4 * U * np.abs(args["param"]) + 40 * U * step, "m": 8 * U * m, "v": 8 * U * v,
                        "grad": 0.0}
            yield Case("adamw_update", {"param": normal(n), "m": normal(n), "v": normal(n)**2, "grad": normal(n),
                                        **hyper, "n": n}, ("param", "m", "v", "grad"), bounds,
                       f"{n}{'-zero' * zero_grad}")


def muon_cases() -> Iterator[Case]:
    """Shapes around the edges of panels and strips, wide and high; one array with three matrices side by side."""
    shapes = [(1, 1), (3, 5), (5, 3), (64, 64), (17, 600), (600, 33), (100, 40)]
    for sides, parts in [*((shape, 1) for shape in shapes), ((48, 40), 3)]:
        (K, N), n = sides, 7 + sides[0] * sides[1] * parts
        matrices = np.array([[7 + part * N, K, N, parts * N, 3 + part * N] for part in range(parts)], np.int32)

        def bounds(args, results):
            """An inverse by Cholesky loses the condition in accuracy: Higham 2002, theorems 10.3 and 14.1."""
            worst = np.zeros(args["n"])
            for offset, K, N, ld, m_offset in args["matrices"]:
                within = np.arange(K)[:, None] * ld + np.arange(N)
                places = offset + within
                u = args["grad"][places] * args["grad_scale"] + results["m"][m_offset + within]
                x = u.T if N <= K else u
                gram = x @ x.T / np.linalg.norm(x)**2
                condition = np.linalg.cond(gram + reference.MUON_POLES[0][1] * np.eye(len(gram)))
                loss = SAFETY * np.sqrt(len(gram) + max(K, N)) * U * condition
                worst[places] = args["learning_rate"] * max(1, N / K) ** 0.5 * loss
            size = np.abs(args["m"])
            size[3:] += np.abs(args["grad"][7:])
            return {"param": worst + 4 * U * np.abs(args["param"]), "m": 8 * U * size, "grad": 0.0}
        yield Case("muon_update", {"param": normal(n), "m": normal(n - 4), "grad": normal(n), "matrices": matrices,
                                   "learning_rate": 1e-2, "momentum": 0.9, "weight_decay": 0.1, "cautious": parts > 1,
                                   "grad_scale": 0.7, "zero_grad": K > N, "count": parts, "n": n, "n_m": n - 4},
                   ("param", "m", "grad"), bounds, f"{K}x{N}{f'x{parts}' if parts > 1 else ''}")


def rounding_cases() -> Iterator[Case]:
    x = normal(1000) * np.float32(10.0) ** RNG.integers(-40, 38, 1000).astype(np.float32)
    x[:8] = [0.0, -0.0, np.inf, -np.inf, 1e-45, -1e-40, 3.0, 2**-126]
    yield Case("round_bf16", {"out": normal(1000), "x": x, "n": 1000}, ("out",), lambda args, results: {"out": 0.0})


def all_cases() -> list[Case]:
    makers = (gemm_cases, linear_cases, embedding_cases, layernorm_cases, rmsnorm_cases, gelu_cases, relu2_cases,
              dropout_cases, rope_cases, attention_cases, decode_cases, row_cases, cross_entropy_cases, optimizer_cases,
              muon_cases, rounding_cases)
    return [case for maker in makers for case in maker()]
