"""The convolution's kernels: against the oracle in float32, and what they leave to plain JAX.

On a CPU they run in the Mosaic interpreter.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmf_jax.pallas_kernels import L2Norm, causal_conv1d
from hmf_jax.pallas_kernels.ops.causal_conv1d import mosaic
from hmf_jax.pallas_kernels.ops.causal_conv1d.inputs import Inputs
from hmf_jax.pallas_kernels.ops.causal_conv1d.reference import causal_conv1d_reference
from tests.kernels.recurrent_laws import normal
from tests.util import rel

T, C = 10, 512
NAMES = ("x", "weight", "bias", "state")


@pytest.fixture
def short_walks(monkeypatch):
    """Blocks of four tokens: several of them, of which the last overlaps its neighbour."""
    monkeypatch.setattr(mosaic, "WALKS", ((4, 2), (4, 2)))


def draw(K: int, bias: bool, packed: bool) -> tuple[Inputs, jax.Array]:
    """Two rows, NaN at padding, and the gradient of y."""
    rng = np.random.default_rng(0)
    low = partial(jnp.asarray, dtype=jnp.bfloat16)
    x, lengths, segment_ids = normal(rng, 2, T, C), None, None
    if packed:
        x[0, 7:] = np.nan
        lengths, ids = jnp.asarray([7, T]), [[1, 1, 1, 2, 3, 3, 3, 0, 0, 0], [4] * 2 + [5] * 8]
        segment_ids = jnp.asarray(ids)
    weight, b, state = normal(rng, K, C), normal(rng, C), normal(rng, 2, K - 1, C)
    inputs = Inputs(low(x), low(weight), low(b) if bias else None, low(state), segment_ids, lengths)
    return inputs, low(normal(rng, 2, T, C))


def y_and_gradients(op, inputs: Inputs, dy: jax.Array):
    """y, the state behind it, and the gradients of both with respect to all arrays."""

    @jax.jit
    def run(arrays, dy):
        def f(*arrays):
            return op(Inputs(*arrays, *inputs[4:]))

        (y, state), vjp = jax.vjp(f, *arrays)
        return y, state, vjp((dy.astype(y.dtype), jnp.ones_like(state)))

    return run(inputs[:4], dy)


@pytest.mark.parametrize(
    ("K", "bias", "packed", "activation", "norm"),
    [
        (4, True, True, "silu", L2Norm(128)),
        (2, False, False, None, None),
        pytest.param(4, False, False, "silu", L2Norm(64, under_root=True), marks=pytest.mark.slow),
        pytest.param(3, True, True, "silu", None, marks=pytest.mark.slow),
    ],
)
def test_agrees_with_the_oracle(short_walks, K, bias, packed, activation, norm):
    inputs, dy = draw(K, bias, packed)
    options = {"activation": activation, "norm": norm}
    kernel = partial(mosaic.causal_conv1d_mosaic, interpret=True, **options)
    y, state, gradients = y_and_gradients(kernel, inputs, dy)
    wide = Inputs(*jax.tree.map(lambda a: a.astype(jnp.float32), inputs[:4]), *inputs[4:])
    oracle = partial(causal_conv1d_reference, **options)
    expected, last, derivatives = y_and_gradients(oracle, wide, dy)
    assert y.dtype == jnp.bfloat16 and rel(y, expected) < 4e-3
    np.testing.assert_array_equal(state, last)
    for name, found, exact in zip(NAMES, gradients, derivatives, strict=True):
        assert (found is None) == (exact is None)
        if found is not None:
            assert found.dtype == jnp.bfloat16 and rel(found, exact) < 4e-3, name


def test_frozen_weights_cost_nothing():
    """Their gradient is an output of the kernel only where somebody wants it."""
    inputs, dy = draw(4, False, False)

    def loss(x, weight):
        y, _ = mosaic.causal_conv1d_mosaic(inputs._replace(x=x, weight=weight), activation=None)
        return jnp.sum(y * dy)

    gradients = (jax.make_jaxpr(jax.grad(jax.jit(loss), n))(*inputs[:2]) for n in (0, 1))
    sums = f"f32[2,1,4,{C // 128},128]"  # of rows, blocks, taps
    assert [sums in str(jaxpr) for jaxpr in gradients] == [False, True]


def test_dispatch_says_why_not(monkeypatch):
    (inputs, _) = draw(4, True, True)
    why_not = partial(mosaic.why_not, norm=L2Norm(128), parts=1)
    assert "NVIDIA Hopper" in (why_not(inputs) or "")
    monkeypatch.setattr(mosaic, "why_no_hopper", lambda: None)
    assert "64 tokens and more, got 10" in (why_not(inputs) or "")
    monkeypatch.setattr(mosaic, "SHORTEST", 4)
    assert why_not(inputs) is None
    changed = {
        "float32": inputs._replace(x=inputs.x.astype(jnp.float32)),
        "2 to 4 taps, got 1": inputs._replace(weight=inputs.weight[:1]),
        "divisible by 512, got 256": inputs._replace(x=inputs.x[..., :256]),
        "padding at the end": inputs._replace(lengths=None),
    }
    for message, other in changed.items():
        assert message in (why_not(other) or ""), message
    assert "got 256" in (mosaic.why_not(inputs, None, 2) or "")
    assert "64 and 128 channels, got 256" in (mosaic.why_not(inputs, L2Norm(256), 1) or "")
    with pytest.raises(ValueError, match="head_dim must divide the 512 channels"):
        causal_conv1d(inputs.x, inputs.weight, norm=L2Norm(96))
