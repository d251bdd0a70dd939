"""The operations of a GPT-2 style transformer and their gradients, in plain NumPy.

This page is the specification: every function here has a twin of the same signature in `_ops.pyx`, and the
tests hold the twin to it. It is written to be read, and it computes in the precision of the arrays it is
given: float64 for the gradient checks, float32 where the kernels' bits are of interest.

The calling convention, here and in `_ops.pyx`:

- outputs first, then inputs, then saved statistics, then sizes;
- `d` prefixes a gradient: `dx` is the derivative of the loss with respect to `x`;
- gradients of parameters are added to (`+=`), because several mini-batches may contribute to one step;
  gradients of activations are written (`=`);
- arrays are C-contiguous; rows is the number of tokens, B * T, where the operation does not care which is which.

Shapes: B sequences, T tokens each, C channels, H heads of D = C / H channels, V tokens in the vocabulary.

At the end stands byte-pair encoding by its definition, which the tests hold the tokenizer to.
"""

import re
import unicodedata
from collections import Counter
from itertools import pairwise

import numpy as np

GELU_SCALE = np.sqrt(2.0 / np.pi)  # the tanh form of GELU: Hendrycks and Gimpel 2016, arXiv:1606.08415
GELU_CUBIC = 0.044715
LAYERNORM_EPS = 1e-5
RMSNORM_EPS = 1e-5
SUM_TILE = 8192  # elements whose squares are added up before they join a sum
MUON_POLES = ((0.04471, 0.0004537), (0.99472, 0.2245848))  # (w, p): the least largest error of s from 1e-4 to 1


# ---- matrix products ---------------------------------------------------------------------------------------


def round_bf16(out, x, n):
    """out (n) = x (n) rounded to bfloat16, ties to even, kept as float32. Subnormals become zero, as in hardware."""
    bits = np.ascontiguousarray(x, np.float32).reshape(-1).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    exponent = bits & np.uint32(0x7F800000)
    rounded = np.where(exponent == 0, bits & np.uint32(0x80000000), rounded)
    is_nan = (exponent == 0x7F800000) & ((bits & np.uint32(0x007FFFFF)) != 0)
    rounded = np.where(is_nan, (bits & np.uint32(0xFFFF0000)) | np.uint32(0x00400000), rounded)
    out.reshape(-1)[:] = rounded.astype(np.uint32).view(np.float32)


def _operand(x, bf16):
    """A matrix-product input: as it is, or rounded to bfloat16."""
    if not bf16:
        return x
    rounded = np.empty(x.shape, np.float32)
    round_bf16(rounded, x, x.size)
    return rounded.astype(x.dtype)


def gemm(c, a, b, M, N, K, trans_a=False, trans_b=False, accumulate=False, bf16=False):
    """c (M, N) = op(a) @ op(b), or += with accumulate; op(a) is (M, K), op(b) is (K, N), transposed as asked."""
    a = a.reshape((K, M) if trans_a else (M, K))
    b = b.reshape((N, K) if trans_b else (K, N))
    product = (_operand(a, bf16).T if trans_a else _operand(a, bf16)) @ (
        _operand(b, bf16).T if trans_b else _operand(b, bf16))
    if accumulate:
        c.reshape(M, N)[:] += product
    else:
        c.reshape(M, N)[:] = product


def linear_forward(out, x, weight, bias, residual, rows, K, N, bf16=False):
    """out (rows, N) = x (rows, K) @ weight (K, N) + bias (N) + residual (rows, N); bias and residual may be None."""
    gemm(out, x, weight, rows, N, K, bf16=bf16)
    if bias is not None:
        out.reshape(rows, N)[:] += bias
    if residual is not None:
        out.reshape(rows, N)[:] += residual.reshape(rows, N)


def linear_backward_input(dx, dout, weight, rows, K, N, bf16=False):
    """dx (rows, K) = dout (rows, N) @ weight (K, N)^T."""
    gemm(dx, dout, weight, rows, K, N, trans_b=True, bf16=bf16)


def linear_backward_weight(dweight, dbias, dout, x, rows, K, N, bf16=False):
    """dweight (K, N) += x (rows, K)^T @ dout (rows, N);  dbias (N), which may be None, += the column sums of dout."""
    gemm(dweight, x, dout, K, N, rows, trans_a=True, accumulate=True, bf16=bf16)
    if dbias is not None:
        dbias += dout.reshape(rows, N).sum(axis=0)


# ---- packed weights ----------------------------------------------------------------------------------------


def packed_size(K, N):
    """Elements of the int32 array that holds a packed weight (K, N). Its layout is the module's own business."""
    return K * N


def pack_weight(packed, weight, K, N, transposed=False):
    """packed = weight (K, N), or its transpose, rounded to bfloat16 and laid out for packed_forward."""
    rounded = _operand(weight.astype(np.float32).reshape((N, K) if transposed else (K, N)), True)
    packed[:] = (rounded.T if transposed else rounded).reshape(-1).view(np.int32)


def packed_forward(out, x, packed, bias, residual, rows, K, N):
    """linear_forward in bf16 with a packed weight; bias and residual may be None."""
    linear_forward(out, x, packed.view(np.float32), bias, residual, rows, K, N, bf16=True)


# ---- weights of 8 bits -------------------------------------------------------------------------------------

Q8_BLOCK = 32  # weights that share a scale


def quantized_size(K, N):
    """Bytes of a quantised weight (K, N): blocks of a float16 scale and Q8_BLOCK integers."""
    return N * -(-K // Q8_BLOCK) * (2 + Q8_BLOCK)


def quantize_weight(quantized, weight, K, N, transposed=False):
    """quantized = weight (K, N), or its transpose, in blocks along K: scale = max |w| / 127 as float16, then w / scale.

    Q8_0 of llama.cpp and GGUF: [N][ceil(K / 32)] blocks, zero beyond K; halves are rounded away from zero.
    """
    rows = weight.astype(np.float32).reshape((N, K) if transposed else (K, N))
    blocks = np.zeros((N, -(-K // Q8_BLOCK) * Q8_BLOCK), np.float32)
    blocks[:, :K] = rows if transposed else rows.T
    blocks = blocks.reshape(-1, Q8_BLOCK)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale > 0)
    x = blocks * inverse
    q = np.trunc(x) + np.trunc(2 * (x - np.trunc(x)))
    out = quantized.reshape(-1, 2 + Q8_BLOCK)
    out[:, :2], out[:, 2:] = scale.astype(np.float16).view(np.uint8), q.astype(np.int8).view(np.uint8)


def quantized_forward(out, x, quantized, bias, residual, rows, K, N):
    """linear_forward with a quantised weight; bias and residual may be None."""
    blocks = quantized.reshape(-1, 2 + Q8_BLOCK)
    scale, q = blocks[:, :2].copy().view(np.float16), blocks[:, 2:].copy().view(np.int8)
    weight = (scale.astype(np.float64) * q).reshape(N, -1)[:, :K].T
    linear_forward(out, x, weight, bias, residual, rows, K, N)


# ---- embedding ---------------------------------------------------------------------------------------------


def embedding_forward(out, ids, wte, wpe, B, T, C, position=0):
    """out (B, T, C) = wte[ids] (V, C) + wpe[position + t] (block_size, C); ids (B, T). wpe may be None."""
    out.reshape(B, T, C)[:] = wte[ids.reshape(B, T)] + (0 if wpe is None else wpe[position:position + T])


def embedding_backward(dwte, dwpe, dout, ids, B, T, C):
    """dwte[ids] += dout (B, T, C), one addition per occurrence of a token;  dwpe[t] += dout summed over B.

    dwpe may be None.
    """
    dout = dout.reshape(B, T, C)
    np.add.at(dwte, ids.reshape(B, T), dout)
    if dwpe is not None:
        dwpe[:T] += dout.sum(axis=0)


# ---- layer normalisation -----------------------------------------------------------------------------------


def layernorm_forward(out, mean, rstd, x, weight, bias, rows, C):
    """out = (x - mean) * rstd * weight + bias, each row on its own. Ba et al. 2016, arXiv:1607.06450."""
    x = x.reshape(rows, C)
    mean[:] = x.mean(axis=1)
    rstd[:] = 1.0 / np.sqrt(x.var(axis=1) + LAYERNORM_EPS)
    out.reshape(rows, C)[:] = (x - mean[:, None]) * rstd[:, None] * weight + bias


def layernorm_backward(dx, dweight, dbias, dout, x, weight, mean, rstd, dresidual, rows, C):
    """Backward of layernorm_forward; dresidual (rows, C), if not None, is added to dx (and may be dx itself).

    With xhat = (x - mean) * rstd and dxhat = dout * weight:
    dx = rstd * (dxhat - mean(dxhat) - xhat * mean(dxhat * xhat)), because mean and rstd depend on x too.
    """
    x, dout = x.reshape(rows, C), dout.reshape(rows, C)
    xhat = (x - mean[:, None]) * rstd[:, None]
    dxhat = dout * weight
    dweight += (dout * xhat).sum(axis=0)
    dbias += dout.sum(axis=0)
    result = rstd[:, None] * (dxhat - dxhat.mean(axis=1, keepdims=True)
                              - xhat * (dxhat * xhat).mean(axis=1, keepdims=True))
    if dresidual is not None:
        result = dresidual.reshape(rows, C) + result
    dx.reshape(rows, C)[:] = result


def rmsnorm_forward(out, rstd, x, weight, rows, C):
    """out = x * rstd * weight, each row on its own. Zhang and Sennrich 2019, arXiv:1910.07467."""
    x = x.reshape(rows, C)
    rstd[:] = 1.0 / np.sqrt(np.square(x).mean(axis=1) + RMSNORM_EPS)
    out.reshape(rows, C)[:] = x * rstd[:, None] * weight


def rmsnorm_backward(dx, dweight, dout, x, weight, rstd, dresidual, rows, C):
    """Backward of rmsnorm_forward; dresidual (rows, C), if not None, is added to dx (and may be dx itself).

    With xhat = x * rstd and dxhat = dout * weight: dx = rstd * (dxhat - xhat * mean(dxhat * xhat)).
    """
    x, dout = x.reshape(rows, C), dout.reshape(rows, C)
    xhat = x * rstd[:, None]
    dxhat = dout * weight
    dweight += (dout * xhat).sum(axis=0)
    result = rstd[:, None] * (dxhat - xhat * (dxhat * xhat).mean(axis=1, keepdims=True))
    if dresidual is not None:
        result = dresidual.reshape(rows, C) + result
    dx.reshape(rows, C)[:] = result


# ---- GELU --------------------------------------------------------------------------------------------------


def gelu_forward(out, x, n):
    """out (n) = 0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))."""
    out[:] = 0.5 * x * (1.0 + np.tanh(GELU_SCALE * (x + GELU_CUBIC * x**3)))


def gelu_backward(dx, out, dout, x, n):
    """dx (n) = dout * gelu'(x), and out = gelu(x) once more: the next step needs it and it is not kept.

    dx may be dout itself.
    """
    u = GELU_SCALE * (x + GELU_CUBIC * x**3)
    du = GELU_SCALE * (1.0 + 3.0 * GELU_CUBIC * x**2)
    tanh = np.tanh(u)
    out[:] = 0.5 * x * (1.0 + tanh)
    dx[:] = dout * (0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh**2) * du)


def relu2_forward(out, x, n):
    """out (n) = max(x, 0)^2. So et al. 2021, arXiv:2109.08668."""
    out[:] = np.square(np.maximum(x, 0.0))


def relu2_backward(dx, out, dout, x, n):
    """dx (n) = dout * 2 max(x, 0), and out = max(x, 0)^2 once more. dx may be dout itself."""
    positive = np.maximum(x, 0.0)
    out[:] = np.square(positive)
    dx[:] = dout * 2.0 * positive


# ---- dropout -----------------------------------------------------------------------------------------------


def _dropout_mask(p, key, first, n):
    """The factors of dropout for the elements first .. first + n: 0 with probability p, else 1 / (1 - p).

    A counter-based generator: the factor of an element depends on (key, its index) alone, so any thread can
    make any part of the mask, and the backward pass makes it again. The hash is the finaliser of SplitMix64
    (Steele, Lea and Flood 2014) over key + index * golden ratio; its upper 32 bits are compared with p * 2^32.
    """
    with np.errstate(over="ignore"):
        z = np.uint64(key) + np.arange(first, first + n, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    keep = (z >> np.uint64(32)) >= np.uint64(int(p * 2**32))
    return np.where(keep, 1.0 / (1.0 - p), 0.0)


def dropout_forward(out, x, residual, p, key, n):
    """out (n) = residual (n) + x (n) * mask; residual may be None, and out may be x or residual itself."""
    dropped = x.reshape(-1) * _dropout_mask(p, key, 0, n)
    out.reshape(-1)[:] = dropped if residual is None else residual.reshape(-1) + dropped


def dropout_backward(dx, dout, p, key, n):
    """dx (n) = dout (n) * mask; dx may be dout itself."""
    dropout_forward(dx, dout, None, p, key, n)


# ---- rotary positions --------------------------------------------------------------------------------------


def rope_forward(qkv, cosine, sine, B, T, H, D, position=0):
    """Rotate the queries and keys in qkv (B, T, 3C), in place. Su et al. 2021, arXiv:2104.09864.

    Channels j and j + D / 2 of a head are a point that is turned by the angle of position p and channel j, whose cosine
    and sine stand in row p of the tables (block_size, D / 2).
    """
    halves = qkv.reshape(B, T, 3, H, 2, D // 2)[:, :, :2]
    c, s = (table[position:position + T, None, None] for table in (cosine, sine))
    first, second = halves[..., 0, :].copy(), halves[..., 1, :].copy()
    halves[..., 0, :], halves[..., 1, :] = first * c - second * s, second * c + first * s


def rope_backward(dqkv, cosine, sine, B, T, H, D):
    """The gradient of rope_forward, in place: the rotation back."""
    rope_forward(dqkv, cosine, -sine, B, T, H, D)


# ---- attention ---------------------------------------------------------------------------------------------


def _heads(qkv, B, T, H, D):
    """q, k, v, each (B, H, T, D), from qkv (B, T, 3, H, D)."""
    return np.moveaxis(qkv.reshape(B, T, 3, H, D), (2, 3), (0, 2))


def _attention_mask(p, key, B, T, H):
    """Dropout factors of the attention weights (B, H, T, T), element index ((b * H + h) * T + i) * T + j."""
    return _dropout_mask(p, key, 0, B * H * T * T).reshape(B, H, T, T) if p else 1.0


def attention_forward(out, lse, qkv, B, T, H, D, p=0.0, key=0):
    """Causal multi-head attention: out (B, T, C) from qkv (B, T, 3C); C = H * D.

    scores = q k^T / sqrt(D) for keys up to the query's own position, weights = softmax(scores) with dropout
    p, out = weights v. lse (B, H, T) keeps log(sum(exp(scores))), all the backward pass needs to make the
    weights again. Vaswani et al. 2017, arXiv:1706.03762; Dao et al. 2022, arXiv:2205.14135.
    """
    q, k, v = _heads(qkv, B, T, H, D)
    scores = q @ np.swapaxes(k, 2, 3) / np.sqrt(D)
    scores[:, :, np.triu(np.ones((T, T), bool), 1)] = -np.inf
    peak = scores.max(axis=3, keepdims=True)
    lse.reshape(B, H, T)[:] = (peak + np.log(np.exp(scores - peak).sum(axis=3, keepdims=True)))[..., 0]
    weights = np.exp(scores - lse.reshape(B, H, T, 1)) * _attention_mask(p, key, B, T, H)
    out.reshape(B, T, H, D)[:] = np.moveaxis(weights @ v, 1, 2)


def attention_backward(dqkv, dout, qkv, out, lse, B, T, H, D, p=0.0, key=0):
    """dqkv (B, T, 3C) from dout (B, T, C).

    dv = weights^T dout;  dweights = dout v^T;  dscores = weights * (dweights - delta) with
    delta = sum(dout * out) over a head's channels, which equals sum(weights * dweights) over the keys;
    dq = dscores k / sqrt(D);  dk = dscores^T q / sqrt(D).
    """
    q, k, v = _heads(qkv, B, T, H, D)
    do = np.moveaxis(dout.reshape(B, T, H, D), 2, 1)
    delta = (do * np.moveaxis(out.reshape(B, T, H, D), 2, 1)).sum(axis=3, keepdims=True)
    scores = q @ np.swapaxes(k, 2, 3) / np.sqrt(D)
    weights = np.exp(scores - lse.reshape(B, H, T, 1))
    weights[:, :, np.triu(np.ones((T, T), bool), 1)] = 0.0
    mask = _attention_mask(p, key, B, T, H)
    dscores = weights * (do @ np.swapaxes(v, 2, 3) * mask - delta)
    dq, dk, dv = _heads(dqkv, B, T, H, D)
    dq[:] = dscores @ k / np.sqrt(D)
    dk[:] = np.swapaxes(dscores, 2, 3) @ q / np.sqrt(D)
    dv[:] = np.swapaxes(weights * mask, 2, 3) @ do


def attention_decode(out, k_cache, v_cache, qkv, B, H, D, position, block_size):
    """One token per sequence: store its k and v at `position` of the caches, attend to 0 .. position.

    out (B, C) from qkv (B, 3C); k_cache and v_cache are (B, H, block_size, D).
    """
    q, k, v = _heads(qkv, B, 1, H, D)
    k_cache.reshape(B, H, block_size, D)[:, :, position] = k[:, :, 0]
    v_cache.reshape(B, H, block_size, D)[:, :, position] = v[:, :, 0]
    keys = k_cache.reshape(B, H, block_size, D)[:, :, :position + 1]
    values = v_cache.reshape(B, H, block_size, D)[:, :, :position + 1]
    scores = (q @ np.swapaxes(keys, 2, 3))[:, :, 0] / np.sqrt(D)
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    weights /= weights.sum(axis=2, keepdims=True)
    out.reshape(B, H, D)[:] = (weights[:, :, None] @ values)[:, :, 0]


# ---- softmax cross-entropy ---------------------------------------------------------------------------------


def gather_rows(out, x, index, n, rows, C):
    """out (n, C) = x (rows, C)[index (n)]."""
    out.reshape(n, C)[:] = x.reshape(rows, C)[index.reshape(-1)]


def scatter_rows(out, x, index, n, rows, C):
    """out (rows, C) = 0, but out[index (n)] = x (n, C): the gradient of gather_rows where no row is named twice."""
    out = out.reshape(rows, C)
    out[:] = 0.0
    out[index.reshape(-1)] = x.reshape(n, C)


def cross_entropy_forward(losses, lse, logits, targets, rows, V):
    """losses (rows) = lse - logits[target], in nats; lse (rows) = log(sum(exp(logits))), logits (rows, V)."""
    logits = logits.reshape(rows, V)
    peak = logits.max(axis=1)
    lse[:] = peak + np.log(np.exp(logits - peak[:, None]).sum(axis=1))
    losses[:] = lse - logits[np.arange(rows), targets.reshape(-1)]


def cross_entropy_backward(dlogits, logits, targets, lse, scale, rows, V):
    """dlogits (rows, V) = scale * (softmax(logits) - onehot(targets)); dlogits may be logits itself."""
    probabilities = np.exp(logits.reshape(rows, V) - lse[:, None])
    probabilities[np.arange(rows), targets.reshape(-1)] -= 1.0
    dlogits.reshape(rows, V)[:] = scale * probabilities


# ---- the optimizer -----------------------------------------------------------------------------------------


def add(out, x, clear, n):
    """out (n) += x (n), which is zeroed on the way if clear."""
    out += x
    if clear:
        x[:] = 0.0


def tile_squares(out, x, n):
    """out (ceil(n / SUM_TILE)) = the sum of the squares of each tile of x (n)."""
    out[:] = np.add.reduceat(np.square(x.reshape(-1), dtype=np.float64), np.arange(0, n, SUM_TILE))


def sum_of_squares(x, n):
    """The sum of x (n) squared, in float64: the square of its norm."""
    return float(np.sum(np.square(x.reshape(-1), dtype=np.float64)))


def adamw_update(param, m, v, grad, learning_rate, beta1, beta2, eps, weight_decay, cautious, grad_scale, t, zero_grad,
                 n):
    """One AdamW update of param (n) in place. Loshchilov and Hutter 2019, arXiv:1711.05101.

    The gradient is multiplied by grad_scale first (clipping) and zeroed afterwards if zero_grad.
    t counts updates from 1 and corrects the bias of the two moments m and v, which start at zero.
    If cautious, only what the update makes smaller decays: Chen et al. 2025, arXiv:2510.12402.
    """
    g = grad * grad_scale
    m[:] = beta1 * m + (1.0 - beta1) * g
    v[:] = beta2 * v + (1.0 - beta2) * g * g
    m_hat = m / (1.0 - beta1**t)
    v_hat = v / (1.0 - beta2**t)
    update = m_hat / (np.sqrt(v_hat) + eps)
    param[:] = param - learning_rate * (weight_decay * _decaying(param, update, cautious) + update)
    if zero_grad:
        grad[:] = 0.0


def _decaying(param, update, cautious):
    """The part of param that decays: all of it, or what becomes smaller when update is taken from it."""
    return np.where(param * update > 0, param, 0.0) if cautious else param


def muon_update(param, m, grad, matrices, learning_rate, momentum, weight_decay, cautious, grad_scale, zero_grad, count,
                n, n_m):
    """One Muon update, in place, of the matrices in param (n), with their momentum in m (n_m). Jordan et al. 2024.

    matrices (count, 5): where each begins, its rows K and columns N, the length of a row of the array that it is a part
    of, and where its momentum begins. X is the momentum with the gradient once more (Nesterov), with its shorter side
    first and of norm one; the update is (X X^T)^-1/2 X, nearly orthogonal, where s^-1/2 is taken to be the sum of
    w / (s + p) over MUON_POLES.
    """
    for offset, K, N, ld, m_offset in matrices.reshape(count, 5):
        within = np.arange(K)[:, None] * ld + np.arange(N)
        places, m_places = offset + within, m_offset + within
        g = (1.0 - momentum) * grad_scale * grad[places]
        m[m_places] = momentum * m[m_places] + g
        u = momentum * m[m_places] + g
        x = u.T if N <= K else u
        x = x / (np.linalg.norm(x) or 1.0)
        gram, one = x @ x.T, np.eye(len(x))
        x = sum(w * np.linalg.inv(gram + p * one) for w, p in MUON_POLES) @ x
        update = (x.T if N <= K else x) * max(1.0, N / K) ** 0.5
        decaying = _decaying(param[places], update, cautious)
        param[places] -= learning_rate * (weight_decay * decaying + update)
        if zero_grad:
            grad[places] = 0.0


# ---- byte-pair encoding ------------------------------------------------------------------------------------

# Sennrich, Haddow and Birch 2016, arXiv:1508.07909; bytes and words as in GPT-2, Radford et al. 2019. Token i < 256 is
# the byte BPE_BYTES[i]: first those that print in Latin-1, then the others. Token 256 + k is what merge k makes.
_PRINTABLE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BPE_BYTES = bytes(_PRINTABLE + sorted(set(range(256)) - set(_PRINTABLE)))

# GPT-2's pattern, 's|'t|'re|'ve|'m|'ll|'d| ?letters| ?numbers| ?others|spaces not before a non-space|spaces, over the
# classes of the characters: L letter, N number, S space, O other; what the pattern names stands for itself.
_WORD = re.compile(r"'(?:s|t|re|ve|m|ll|d)| ?[Lstrevmld]+| ?N+| ?[O']+|[ S]+(?![^ S])|[ S]+")


def _bpe_class(character):
    if character in " 'strevmld":
        return character
    if character.isspace() and not "\x1c" <= character <= "\x1f":  # which Unicode does not call white space
        return "S"
    return {"L": "L", "N": "N"}.get(unicodedata.category(character)[0], "O")


def bpe_words(text):
    """The words of a text, as bytes; no token reaches across two of them."""
    classes = "".join(map(_bpe_class, text))
    return [text[match.start():match.end()].encode() for match in _WORD.finditer(classes)]


def bpe_merge(symbols, pair, token):
    """The symbols with every occurrence of the pair replaced by the token, from left to right."""
    merged = []
    for symbol in symbols:
        if merged and (merged[-1], symbol) == pair:
            merged[-1] = token
        else:
            merged.append(symbol)
    return merged


def bpe_train(texts, vocab_size):
    """The merges learned from some texts: again and again the pair that occurs most often, of equals the smallest."""
    counts = Counter(word for text in texts for word in bpe_words(text))
    words = {word: [BPE_BYTES.index(byte) for byte in word] for word in counts}
    merges = []
    while len(merges) < vocab_size - 256:
        pairs = Counter()
        for word, symbols in words.items():
            for pair in pairwise(symbols):
                pairs[pair] += counts[word]
        if not pairs:
            break
        merges.append(min(pairs, key=lambda pair: (-pairs[pair], pair)))
        words = {word: bpe_merge(symbols, merges[-1], 255 + len(merges)) for word, symbols in words.items()}
    return merges


def bpe_encode(text, merges):
    """The ids of a text: in each word the pair of the earliest merge is merged first, until none is left."""
    rank, ids = {pair: k for k, pair in enumerate(merges)}, []
    for word in bpe_words(text):
        symbols = [BPE_BYTES.index(byte) for byte in word]
        while found := [rank[pair] for pair in pairwise(symbols) if pair in rank]:
            symbols = bpe_merge(symbols, merges[min(found)], 256 + min(found))
        ids += symbols
    return ids
