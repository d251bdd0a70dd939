"""Error bounds derived from the arithmetic, and the comparison that uses them.

A sum of n float32 products, in whatever order, differs from the exact one by at most n u sum|a||b| with
u = 2^-24 (Higham, Accuracy and Stability of Numerical Algorithms, 3.5). Rounding errors of independent signs make
that about sqrt(n) u in practice; SAFETY sqrt(n) u keeps a factor of ten over what is typical and stays far below
the worst case for all but the smallest n.
"""

import numpy as np

U = 2.0**-24
SAFETY = 10.0


def gemm_bound(a: np.ndarray, b: np.ndarray, start: np.ndarray | float = 0.0) -> np.ndarray:
    """Elementwise bound for start + a (M, K) @ b (K, N) in float32."""
    K = a.shape[1]
    return SAFETY * np.sqrt(K + 1) * U * (np.abs(a) @ np.abs(b) + np.abs(start))


def relative_bound(expected: np.ndarray, terms: int, scale: np.ndarray | float | None = None) -> np.ndarray:
    """Bound for a result of `terms` additions whose summands are of the size of `scale` (default: the largest)."""
    size = np.abs(expected).max() if scale is None else scale
    return SAFETY * np.sqrt(terms) * U * (np.abs(expected) + size)


def assert_within(actual: np.ndarray, expected: np.ndarray, bound: np.ndarray | float, what: str = "") -> None:
    """Every element of actual is finite and within its bound of expected."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape} instead of {expected.shape}"
    excess = np.abs(actual - expected) - bound
    if not (excess <= 0).all():  # also catches NaN
        worst = np.unravel_index(np.nanargmax(np.where(np.isnan(excess), np.inf, excess)), excess.shape)
        raise AssertionError(f"{what}: at {worst} got {actual[worst]!r}, expected {expected[worst]!r}, off by more "
                             f"than {np.broadcast_to(bound, excess.shape)[worst]:.3g}")
