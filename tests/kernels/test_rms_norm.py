"""RMSNorm: every form against numpy, the kernels against plain JAX in float32, dispatch.

On a CPU the kernels run in the Mosaic interpreter.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmf_jax.pallas_kernels import rms_norm
from hmf_jax.pallas_kernels.ops.rms_norm import mosaic
from hmf_jax.pallas_kernels.ops.rms_norm.chunked import rms_norm_chunked
from hmf_jax.pallas_kernels.ops.rms_norm.inputs import Inputs, Options
from tests.kernels.recurrent_laws import normal
from tests.util import rel

STATES, HEADS = (1, 6, 1024), (1, 3, 8, 128)


def draw(shape, residual: bool, gate: bool) -> tuple[Inputs, tuple[jax.Array, jax.Array]]:
    """Arrays, and the gradients of y and of the sum."""
    rng = np.random.default_rng(0)
    x, r, g, dy, ds = (jnp.asarray(normal(rng, *shape), jnp.bfloat16) for _ in range(5))
    weight = jnp.asarray(normal(rng, shape[-1]), jnp.bfloat16)
    return Inputs(x, weight, r if residual else None, g if gate else None), (dy, ds)


def test_every_form_equals_numpy():
    inputs, _ = draw((2, 3, 8), True, True)
    x, w, r, gate = (np.asarray(a, np.float64) for a in inputs)
    args = [jnp.asarray(a, jnp.float32) for a in (x, w)]

    def unit(s):
        return s / np.sqrt((s * s).mean(-1, keepdims=True) + 1e-2)

    run = partial(rms_norm, *args, eps=1e-2)
    y, total = run(residual=jnp.asarray(r, jnp.float32), cast_first=True)
    assert rel(y, unit(x + r) * w) < 1e-6 and rel(total, x + r) < 1e-6
    assert rel(run(zero_centered=True)[0], unit(x) * (1 + w)) < 1e-6
    gated, same = run(gate=jnp.asarray(gate, jnp.float32))
    assert rel(gated, unit(x) * w * gate / (1 + np.exp(-gate))) < 1e-6
    np.testing.assert_array_equal(same, args[0])


@pytest.mark.parametrize(
    ("shape", "residual", "gate", "options"),
    [
        (STATES, True, False, Options(1e-6, False, True)),
        (HEADS, False, True, Options(1e-6, False, False)),
        pytest.param(STATES, False, False, Options(1e-6, True, False), marks=pytest.mark.slow),
        pytest.param(
            (1, 6, 8, 64), False, False, Options(1e-6, False, True), marks=pytest.mark.slow
        ),
    ],
)
def test_kernels_agree_with_plain_jax(monkeypatch, shape, residual, gate, options):
    """The last of several blocks overlaps its neighbour."""
    blocks = dict.fromkeys(("forward", "backward", "trained"), (4, 2, 8 if len(shape) == 3 else 4))
    monkeypatch.setattr(mosaic, "BLOCKS", dict.fromkeys(("states", "heads"), blocks))
    check(shape, residual, gate, options, interpret=True)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("shape", "residual", "gate", "options"),
    [
        ((1, 519, 4096), True, False, Options(1e-6, False, True)),
        ((1, 519, 2048), False, False, Options(1e-6, True, False)),
        ((1, 67, 8, 128), False, True, Options(1e-6, False, False)),
        ((2, 67, 8, 64), False, True, Options(1e-6, False, False)),
    ],
)
def test_gpu_kernels_agree_with_plain_jax(shape, residual, gate, options):
    check(shape, residual, gate, options, interpret=False)


def check(shape, residual: bool, gate: bool, options: Options, *, interpret: bool) -> None:
    inputs, cotangents = draw(shape, residual, gate)

    def all_of(op, dtype):
        @jax.jit
        def run(inputs, cotangents):
            out, vjp = jax.vjp(lambda inputs: op(inputs, options), inputs)
            return jax.tree.leaves((out, vjp(cotangents)))

        return run(*jax.tree.map(lambda a: a.astype(dtype), (inputs, cotangents)))

    found = all_of(partial(mosaic.rms_norm_mosaic, interpret=interpret), jnp.bfloat16)
    expected = all_of(rms_norm_chunked, jnp.float32)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == jnp.bfloat16 and rel(a, b) < 4e-3


def test_frozen_weights_cost_nothing():
    """The sums for their gradient are made only where somebody wants it."""
    inputs, (dy, _) = draw(STATES, False, False)

    def loss(x, weight):
        y, _ = mosaic.rms_norm_mosaic(Inputs(x, weight, None, None), Options(1e-6, False, True))
        return jnp.sum(y * dy)

    gradients = (jax.make_jaxpr(jax.grad(jax.jit(loss), n))(*inputs[:2]) for n in (0, 1))
    assert ["f32[1,1024]" in str(jaxpr) for jaxpr in gradients] == [False, True]


def test_dispatch_says_why_not(monkeypatch):
    low = jnp.dtype(jnp.bfloat16)
    assert "NVIDIA Hopper" in (mosaic.why_not(low, (1, 512, 4096)) or "")
    monkeypatch.setattr(mosaic, "why_no_hopper", lambda: None)
    for shape in ((1, 512, 4096), (2, 16, 16, 128), (512, 1, 64)):
        assert mosaic.why_not(low, shape) is None
    assert "bfloat16, got float32" in (mosaic.why_not(jnp.dtype("float32"), (1, 512, 64)) or "")
    for shape in ((1, 512, 2000), (1, 512, 9216), (1, 511, 4096), (1, 513, 128), (8, 0, 4096)):
        assert "got" in (mosaic.why_not(low, shape) or "")


def test_bad_arguments_are_named():
    x: Any = np.ones((1, 2, 4), np.float32)
    w: Any = np.ones(4, np.float32)
    with pytest.raises(ValueError, match=r"\[B, T, d\]"):
        rms_norm(x[0], w, eps=0)
    with pytest.raises(ValueError, match="weight has shape"):
        rms_norm(x, w[:3], eps=0)
    with pytest.raises(ValueError, match="residual has shape"):
        rms_norm(x, w, eps=0, residual=x[:, :1])
    with pytest.raises(ValueError, match="eps=-1"):
        rms_norm(x, w, eps=-1)
    bad: Any = ({"residual": x}, {"zero_centered": True}, {"cast_first": True})
    for options in bad:
        with pytest.raises(ValueError, match="comes without"):
            rms_norm(x, w, eps=0, gate=x, **options)
