"""grouped_matmul: values and gradients of every implementation against the oracle."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmf_jax.pallas_kernels import grouped_matmul
from hmf_jax.pallas_kernels.ops.grouped_matmul import mosaic
from hmf_jax.pallas_kernels.ops.grouped_matmul.chunked import grouped_matmul_chunked
from tests.util import rel

SIZES = [5, 0, 9, 1], [0, 0, 17, 3], [0, 0, 0, 0], [20, 0, 0, 0]


@functools.cache
def value_and_gradients(op):
    """One program for all sizes of groups: y and the gradients of x and of weights."""

    @jax.jit
    def both(x, weights, d_y, sizes):
        y, vjp = jax.vjp(lambda x, w: op(x, w, sizes), x, weights)
        return y, *vjp(d_y)

    return both


OPS = {n: functools.partial(grouped_matmul, impl=n) for n in ("reference", "chunked", "xla")}


def run(impl: str, dtype, sizes: list[int]):
    """y and its gradients for 20 rows; those of no group are NaN."""
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (20, 8), dtype).at[sum(sizes) :].set(jnp.nan)
    weights = jax.random.normal(keys[1], (4, 8, 6), dtype)
    d_y = jax.random.normal(keys[2], (20, 6), dtype)
    return value_and_gradients(OPS[impl])(x, weights, d_y, jnp.asarray(sizes))


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


# Rows, sides of the matrices, sizes of groups: one tile and several, high and low, of one and of
# two warpgroups; groups that are empty, end inside a tile, or leave rows behind them.
MOSAIC = {
    "one row": (1, 64, 64, [0, 0, 1]),
    "low": (20, 128, 64, [3, 0, 9, 1, 4]),
    "middle": (70, 64, 192, [30, 0, 33]),
    "high": (300, 128, 128, [130, 0, 129]),
}
BIG = {
    "decode": (8, 512, 384, [1, 0, 2, 0, 0, 5] + [0] * 122),
    "batch": (1024, 768, 512, [8, 0, 24, 1, 7] * 25 + [24, 0, 0]),
    "prompt": (9000, 512, 768, [5000, 0, 127, 128, 129, 1, 3000, 64]),
    "many groups": (4097, 512, 512, [2, 1, 0, 7] * 64),
}


def check_mosaic(rows, K, N, sizes, interpret: bool) -> None:
    """Values and gradients are those of float32; rows of no group hold NaN, and give zeros."""
    rng, some = np.random.default_rng(0), sum(sizes)
    x, d_y = (rng.standard_normal((rows, n), np.float32) for n in (K, N))
    weights = rng.standard_normal((len(sizes), K, N), np.float32) / K**0.5
    x, weights, d_y = (jnp.asarray(a, jnp.bfloat16) for a in (x, weights, d_y))
    counts = jnp.asarray(sizes, jnp.int32)
    wide = (a.astype(jnp.float32) for a in (x, weights, d_y))
    expected = value_and_gradients(grouped_matmul_chunked)(*wide, counts)
    x, d_y = (a.at[some:].set(jnp.nan) for a in (x, d_y))
    op = functools.partial(mosaic.grouped_matmul_mosaic, interpret=interpret)
    got = value_and_gradients(op)(x, weights, d_y, counts)
    y, d_x, d_weights = (np.asarray(a, np.float32) for a in got)
    assert rel(y[:some], expected[0][:some]) < 3e-3
    assert rel(d_x[:some], expected[1][:some]) < 3e-3
    assert rel(d_weights, expected[2]) < 3e-3
    assert not y[some:].any() and not d_x[some:].any()
    for g, size in enumerate(sizes):
        assert size or not d_weights[g].any()


def test_mosaic_forward_in_the_interpreter(monkeypatch):
    monkeypatch.setattr(mosaic, "multiprocessors", lambda: 2)
    rng, sizes = np.random.default_rng(0), jnp.asarray([3, 0, 9], jnp.int32)
    x = jnp.asarray(rng.standard_normal((14, 64)), jnp.bfloat16)
    weights = jnp.asarray(rng.standard_normal((3, 64, 64)) / 8, jnp.bfloat16)
    y = jax.jit(functools.partial(mosaic.products, interpret=True))(x, weights, sizes)
    expected = grouped_matmul(x, weights, sizes, impl="reference")
    assert rel(y[:12], expected[:12]) < 3e-3 and not y[12:].any()


@pytest.mark.slow
@pytest.mark.parametrize("name", MOSAIC)
def test_mosaic_in_the_interpreter(monkeypatch, name):
    monkeypatch.setattr(mosaic, "multiprocessors", lambda: 2)  # a CTA makes several tiles
    check_mosaic(*MOSAIC[name], interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*MOSAIC, *BIG])
def test_mosaic_on_gpu(name):
    check_mosaic(*(MOSAIC | BIG)[name], interpret=False)


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
