"""The checkers must notice what they are there to notice."""

import numpy as np
import pytest
from bounds import assert_within, gemm_bound, relative_bound

RNG = np.random.default_rng(0)
A, B = RNG.standard_normal((9, 40)), RNG.standard_normal((40, 11))


@pytest.mark.parametrize("corrupt", [
    lambda c: c.__setitem__((3, 4), np.nan),
    lambda c: c.__setitem__((3, 4), c[3, 4] * (1 + 1e-4)),
    lambda c: c.__setitem__((8, 10), 0.0),
    lambda c: c.__setitem__(slice(None), c + A[:, :1] @ B[:1] * 1e-3),
], ids=["nan", "one part in 10,000", "unwritten corner", "a thousandth of one product"])
def test_planted_corruption_is_found(corrupt):
    good = (A @ B).astype(np.float32)
    assert_within(good, A @ B, gemm_bound(A, B))
    bad = good.copy()
    corrupt(bad)
    with pytest.raises(AssertionError):
        assert_within(bad, A @ B, gemm_bound(A, B))


def test_a_dropped_summand_is_found():
    x = RNG.standard_normal(500)
    assert_within(np.float32(x.sum()), x.sum(), relative_bound(x.sum(), 500, np.abs(x).max()))
    with pytest.raises(AssertionError):
        assert_within(x[:-1].sum(), x.sum(), relative_bound(x.sum(), 500, np.abs(x).max()))
