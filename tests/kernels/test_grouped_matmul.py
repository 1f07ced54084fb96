"""grouped_matmul: values and gradients of every implementation against the oracle."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmf_jax.pallas_kernels import grouped_matmul
from tests.util import rel

SIZES = [5, 0, 9, 1], [0, 0, 17, 3], [0, 0, 0, 0], [20, 0, 0, 0]


def run(impl: str, dtype, sizes: list[int]):
    """y and its gradients for 20 rows; those of no group are NaN."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (20, 8), dtype).at[sum(sizes) :].set(jnp.nan)
    weights = jax.random.normal(keys[1], (4, 8, 6), dtype)
    d_y = jax.random.normal(keys[2], (20, 6), dtype)

    @jax.jit
    def both(x, weights, sizes, d_y):
        y, vjp = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, impl=impl), x, weights)
        return y, *vjp(d_y)

    return both(x, weights, jnp.asarray(sizes), d_y)


@pytest.mark.parametrize(
    ("impl", "dtype", "tolerance"),
    [
        ("chunked", jnp.float32, 1e-6),
        pytest.param("chunked", jnp.bfloat16, 1e-2, marks=pytest.mark.slow),
        pytest.param("xla", jnp.float32, 1e-6, marks=pytest.mark.gpu),
        pytest.param("xla", jnp.bfloat16, 1e-2, marks=pytest.mark.gpu),
    ],
)
def test_implementations_agree(impl, dtype, tolerance):
    for sizes in SIZES:
        got, expected = run(impl, dtype, sizes), run("reference", dtype, sizes)
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == b.dtype == dtype and rel(a, b) <= tolerance
        np.testing.assert_array_equal(got[0][sum(sizes) :], 0)
        np.testing.assert_array_equal(got[1][sum(sizes) :], 0)


def test_bad_arguments():
    x, weights, sizes = jnp.ones((3, 4)), jnp.ones((2, 4, 5)), jnp.array([1, 2])
    with pytest.raises(ValueError, match=r"expected \[M, K\] and \[G, K, N\]"):
        grouped_matmul(x[0], weights, sizes)
    with pytest.raises(ValueError, match=r"weights has shape \(2, 5, 4\)"):
        grouped_matmul(x, weights.swapaxes(1, 2), sizes)
    with pytest.raises(ValueError, match="x is float32, weights are bfloat16"):
        grouped_matmul(x, weights.astype(jnp.bfloat16), sizes)
    with pytest.raises(ValueError, match=r"expected integers \[2\]"):
        grouped_matmul(x, weights, jnp.array([1.0, 2.0]))
    with pytest.raises(ValueError, match="multiplies every row by every matrix"):
        grouped_matmul(x, weights, sizes, impl="xla")
