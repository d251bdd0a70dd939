"""The gradients of reference.py against central differences, in float64."""

import numpy as np
import pytest

from feste import reference
from feste.transformer import rotations

RNG = np.random.default_rng(1)
STEP = 1e-5


def normal(*shape):
    return RNG.standard_normal(shape)


def numeric_gradient(loss, x: np.ndarray) -> np.ndarray:
    gradient = np.empty_like(x)
    flat, out = x.reshape(-1), gradient.reshape(-1)
    for i in range(flat.size):
        kept = flat[i]
        flat[i] = kept + STEP
        above = loss()
        flat[i] = kept - STEP
        out[i] = (above - loss()) / (2 * STEP)
        flat[i] = kept
    return gradient


def check(loss, analytic: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """analytic: name -> (variable, its gradient); equal to central differences to 1e-6 of the gradient's size."""
    for name, (variable, gradient) in analytic.items():
        numeric = numeric_gradient(loss, variable)
        error = np.abs(numeric - gradient).max() / max(np.abs(numeric).max(), 1e-2)
        assert error < 1e-6, f"{name}: relative error {error:.2g}"


@pytest.mark.parametrize(("rows", "K", "N"), [(1, 1, 1), (3, 5, 2), (4, 3, 7)])
def test_linear(rows, K, N):
    x, weight, bias, residual, upstream = normal(rows, K), normal(K, N), normal(N), normal(rows, N), normal(rows, N)

    def loss():
        out = np.empty((rows, N))
        reference.linear_forward(out, x, weight, bias, residual, rows, K, N)
        return (out * upstream).sum()

    dx, dweight, dbias = np.empty_like(x), np.zeros_like(weight), np.zeros_like(bias)
    reference.linear_backward_input(dx, upstream, weight, rows, K, N)
    reference.linear_backward_weight(dweight, dbias, upstream, x, rows, K, N)
    check(loss, {"x": (x, dx), "weight": (weight, dweight), "bias": (bias, dbias), "residual": (residual, upstream)})


def test_embedding():
    B, T, C, V = 2, 5, 3, 4
    wte, wpe, upstream = normal(V, C), normal(T + 1, C), normal(B, T, C)
    ids = RNG.integers(0, V, (B, T))

    def loss():
        out = np.empty((B, T, C))
        reference.embedding_forward(out, ids, wte, wpe, B, T, C)
        return (out * upstream).sum()

    dwte, dwpe = np.zeros_like(wte), np.zeros_like(wpe)
    reference.embedding_backward(dwte, dwpe, upstream, ids, B, T, C)
    check(loss, {"wte": (wte, dwte), "wpe": (wpe, dwpe)})


@pytest.mark.parametrize("C", [2, 7])
@pytest.mark.parametrize("with_residual", [False, True])
def test_layernorm(C, with_residual):
    rows = 3
    x, weight, bias, upstream, straight = normal(rows, C), normal(C), normal(C), normal(rows, C), normal(rows, C)
    out, mean, rstd = np.empty((rows, C)), np.empty(rows), np.empty(rows)

    def loss():
        reference.layernorm_forward(out, mean, rstd, x, weight, bias, rows, C)
        return (out * upstream).sum() + ((x * straight).sum() if with_residual else 0.0)

    loss()
    dx, dweight, dbias = np.empty_like(x), np.zeros(C), np.zeros(C)
    reference.layernorm_backward(dx, dweight, dbias, upstream, x, weight, mean.copy(), rstd.copy(),
                                 straight if with_residual else None, rows, C)
    check(loss, {"x": (x, dx), "weight": (weight, dweight), "bias": (bias, dbias)})


@pytest.mark.parametrize("C", [1, 7])
@pytest.mark.parametrize("with_residual", [False, True])
def test_rmsnorm(C, with_residual):
    rows = 3
    x, weight, upstream, straight = normal(rows, C), normal(C), normal(rows, C), normal(rows, C)
    out, rstd = np.empty((rows, C)), np.empty(rows)

    def loss():
        reference.rmsnorm_forward(out, rstd, x, weight, rows, C)
        return (out * upstream).sum() + ((x * straight).sum() if with_residual else 0.0)

    loss()
    dx, dweight = np.empty_like(x), np.zeros(C)
    reference.rmsnorm_backward(dx, dweight, upstream, x, weight, rstd.copy(), straight if with_residual else None,
                               rows, C)
    check(loss, {"x": (x, dx), "weight": (weight, dweight)})


@pytest.mark.parametrize(("B", "T", "H", "D", "position"), [(1, 1, 1, 2, 0), (2, 5, 2, 6, 0), (1, 3, 2, 4, 2)])
def test_rope(B, T, H, D, position):
    qkv, upstream, angles = normal(B, T, 3 * H * D), normal(B, T, 3 * H * D), normal(T + position, D // 2)
    cosine, sine = np.cos(angles), np.sin(angles)

    def loss():
        rotated = qkv.copy()
        reference.rope_forward(rotated, cosine, sine, B, T, H, D, position)
        return (rotated * upstream).sum()

    dqkv = upstream.copy()
    reference.rope_backward(dqkv, cosine[position:], sine[position:], B, T, H, D)
    check(loss, {"qkv": (qkv, dqkv)})


def test_rotated_scores_know_distances_only():
    """What rotary positions are for: q . k depends on how far apart they stand, not on where."""
    T, D = 9, 6
    cosine, sine = (np.float64(table) for table in rotations(T, D))
    q, k = normal(D), normal(D)
    qkv = np.tile(np.concatenate([q, k, k]), (1, T, 1))
    reference.rope_forward(qkv, cosine, sine, 1, T, 1, D)
    scores = qkv[0, :, :D] @ qkv[0, :, D:2 * D].T
    for distance in range(T):
        assert np.ptp(np.diagonal(scores, -distance)) < 1e-6
    assert abs(scores[0, 0] - q @ k) < 1e-12
    assert np.ptp(scores[-1]) > 0.01


@pytest.mark.parametrize("activation", ["gelu", "relu2"])
def test_activation(activation):
    forward, backward = (getattr(reference, f"{activation}_{way}") for way in ("forward", "backward"))
    x, upstream = normal(50) * 2, normal(50)

    def loss():
        out = np.empty(50)
        forward(out, x, 50)
        return (out * upstream).sum()

    dx, again, out = np.empty(50), np.empty(50), np.empty(50)
    backward(dx, again, upstream, x, 50)
    forward(out, x, 50)
    assert np.array_equal(again, out)
    check(loss, {"x": (x, dx)})


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize(("B", "T", "H", "D"), [(1, 1, 1, 1), (2, 5, 2, 3), (1, 7, 1, 4)])
def test_attention(B, T, H, D, p):
    C, key = H * D, 11
    qkv, upstream = normal(B, T, 3 * C), normal(B, T, C)
    out, lse = np.empty((B, T, C)), np.empty((B, H, T))

    def loss():
        reference.attention_forward(out, lse, qkv, B, T, H, D, p, key)
        return (out * upstream).sum()

    loss()
    dqkv = np.empty_like(qkv)
    reference.attention_backward(dqkv, upstream, qkv, out.copy(), lse.copy(), B, T, H, D, p, key)
    check(loss, {"qkv": (qkv, dqkv)})


def test_attention_is_causal():
    B, T, H, D = 1, 6, 2, 3
    qkv, out, lse = normal(B, T, 3 * H * D), np.empty((B, T, H * D)), np.empty((B, H, T))
    reference.attention_forward(out, lse, qkv, B, T, H, D)
    before = out.copy()
    qkv[:, 4:] = normal(B, T - 4, 3 * H * D)
    reference.attention_forward(out, lse, qkv, B, T, H, D)
    assert np.array_equal(out[:, :4], before[:, :4])
    assert not np.allclose(out[:, 4:], before[:, 4:])


def test_decode_continues_attention():
    B, T, H, D = 2, 6, 2, 3
    qkv, out, lse = normal(B, T, 3 * H * D), np.empty((B, T, H * D)), np.empty((B, H, T))
    reference.attention_forward(out, lse, qkv, B, T, H, D)
    keys, values, step = np.zeros((B, H, T, D)), np.zeros((B, H, T, D)), np.empty((B, H * D))
    for t in range(T):
        reference.attention_decode(step, keys, values, qkv[:, t:t + 1], B, H, D, t, T)
        np.testing.assert_allclose(step, out[:, t], rtol=1e-12)


def test_cross_entropy():
    rows, V, scale = 4, 6, 0.3
    logits, targets = normal(rows, V), RNG.integers(0, V, rows)
    losses, lse = np.empty(rows), np.empty(rows)

    def loss():
        reference.cross_entropy_forward(losses, lse, logits, targets, rows, V)
        return scale * losses.sum()

    loss()
    dlogits = np.empty_like(logits)
    reference.cross_entropy_backward(dlogits, logits, targets, lse.copy(), scale, rows, V)
    check(loss, {"logits": (logits, dlogits)})


def test_dropout_keeps_its_share_and_its_mean():
    n, p = 200_000, 0.3
    mask = reference._dropout_mask(p, 12345, 0, n)
    assert set(np.unique(mask)) == {0.0, 1 / 0.7}
    assert abs((mask == 0).mean() - p) < 5 * np.sqrt(p * (1 - p) / n)
    assert np.array_equal(mask[1000:1010], reference._dropout_mask(p, 12345, 1000, 10))
    assert not np.array_equal(mask, reference._dropout_mask(p, 12346, 0, n))
    x, out = normal(100), np.empty(100)
    reference.dropout_backward(out, x, p, 12345, 100)
    assert np.array_equal(out, x * mask[:100])


def test_round_bf16():
    """Ties to even, overflow to infinity, NaN kept, subnormals to zero."""
    x = np.array([1.0, 1.00390625, 1.01171875, -1.00390625, 3.3961775e38, np.nan, np.inf, 1e-40, -0.0, 0.1], np.float32)
    out = np.empty_like(x)
    reference.round_bf16(out, x, x.size)
    expected = np.array([1.0, 1.0, 1.015625, -1.0, np.inf, np.nan, np.inf, 0.0, -0.0, 0.10009765625], np.float32)
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize(("K", "N"), [(1, 1), (4, 7), (7, 4), (6, 6)])
def test_muon_moves_at_the_same_rate_in_all_directions(K, N):
    """The singular values of the update are one, within 15 %, and its directions the gradient's."""
    param, m, grad = np.zeros(K * N), np.zeros(K * N), normal(K * N)
    reference.muon_update(param, m, grad, np.array([[0, K, N, N, 0]]), 1.0, 0.5, 0.0, False, 1.0, False, 1, K * N,
                          K * N)
    lengths = np.linalg.svd(param.reshape(K, N) / max(1.0, N / K) ** 0.5, compute_uv=False)
    assert lengths.min() > 0.85 and lengths.max() < 1.15
    u, _, v = np.linalg.svd(grad.reshape(K, N), full_matrices=False)
    along = -u.T @ param.reshape(K, N) @ v.T
    assert np.allclose(along, np.diag(np.diag(along)), atol=1e-9) and np.diag(along).min() > 0


def test_muon_takes_a_matrix_out_of_a_larger_one_and_leaves_the_rest():
    param, m, grad = normal(40), np.zeros(40), normal(40)
    before = param.copy()
    reference.muon_update(param, m, grad, np.array([[3, 4, 2, 9, 3]]), 0.1, 0.9, 0.0, False, 1.0, True, 1, 40,
                          40)
    inside = {3 + 9 * i + j for i in range(4) for j in range(2)}
    for i in range(40):
        assert (param[i] != before[i]) == (m[i] != 0.0) == (grad[i] == 0.0) == (i in inside)


def test_cautious_decay_by_hand():
    """Only what the update makes smaller decays: the first of the two, whose gradient has its own sign."""
    param, grad = np.array([1.0, 1.0]), np.array([0.5, -0.5])
    reference.adamw_update(param, np.zeros(2), np.zeros(2), grad, 0.1, 0.9, 0.95, 0.0, 0.5, True, 1.0, 1, False, 2)
    assert param == pytest.approx([1.0 - 0.1 * (1.0 + 0.5), 1.0 + 0.1])


def test_adamw_by_hand():
    """Two steps of one parameter, worked out by the formulas of the paper."""
    param, m, v = np.array([1.0]), np.zeros(1), np.zeros(1)
    for t, gradient in enumerate([0.5, -0.25], 1):
        grad = np.array([gradient])
        reference.adamw_update(param, m, v, grad, 0.1, 0.9, 0.95, 1e-8, 0.01, False, 1.0, t, True, 1)
        assert grad[0] == 0.0
    first = 1.0 - 0.1 * (0.01 * 1.0 + 1.0)
    m2, v2 = 0.9 * 0.05 - 0.1 * 0.25, 0.95 * 0.05 * 0.25 + 0.05 * 0.0625
    second = first - 0.1 * (0.01 * first + (m2 / 0.19) / (np.sqrt(v2 / (1 - 0.95**2)) + 1e-8))
    assert param[0] == pytest.approx(second, rel=1e-7)
