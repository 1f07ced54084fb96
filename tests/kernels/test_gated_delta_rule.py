"""Gated delta rule: laws, the worked example, hard decays and keys, golden tensors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmf_jax.pallas_kernels import gated_delta_rule, gated_delta_rule_step
from hmf_jax.pallas_kernels.ops.gated_delta_rule.inputs import Inputs
from hmf_jax.pallas_kernels.ops.gated_delta_rule.jla import gated_delta_rule as jla_gated_delta_rule
from tests.goldens import expected, golden
from tests.kernels.recurrent_laws import RecurrentLaws, normal, unit
from tests.util import rel


class TestGatedDeltaRule(RecurrentLaws):
    per_token = ("q", "k", "v", "g", "beta")
    op = gated_delta_rule
    step = gated_delta_rule_step

    def draw(self, rng, B, T, H, K):
        D, V = 8, 6
        arrays = {
            "q": unit(normal(rng, B, T, H, D)),
            "k": unit(normal(rng, B, T, K, D)),
            "v": normal(rng, B, T, K, V),
            "g": -np.abs(normal(rng, B, T, H)) * 0.3,
            "beta": rng.uniform(0.1, 2.0, (B, T, H)),
        }
        return arrays, normal(rng, B, H, D, V)

    def test_repeated_keys_and_beta_two(self):
        """beta = 2 on one and the same key reflects the state: the system is as far from the
        identity as it gets, and nothing decays."""
        arrays, state = self.arguments(T=128)
        k = jnp.broadcast_to(arrays["k"][:, :1], arrays["k"].shape)
        beta = jnp.full_like(arrays["beta"], 2.0)
        hard = {**arrays, "k": k, "beta": beta, "g": jnp.zeros_like(beta)}
        out, final = self.run(hard, state, chunk_size=64)
        out_ref, final_ref = self.run(hard, state, impl="reference")
        assert rel(out, out_ref) < 2e-5
        assert rel(final, final_ref) < 2e-5

    def test_strong_decay(self):
        """A token that erases the state leaves no trace in later sums, forward or backward."""
        arrays, state = self.arguments()
        hard = {**arrays, "g": arrays["g"].at[:, ::7].set(-1e4)}
        d_out, d_state = self.cotangents(arrays, state)
        (out, final), actual = self.with_grad(hard, state, None, d_out, d_state)
        (out_ref, final_ref), expected = self.with_grad(
            hard, state, None, d_out, d_state, impl="reference"
        )
        assert rel(out, out_ref) < 2e-6
        assert rel(final, final_ref) < 2e-6
        for a, b in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
            assert rel(a, b) < 1e-5


def test_worked_example():
    with jax.enable_x64(True):
        f = jnp.float64
        o, state = jax.jit(gated_delta_rule)(
            jnp.asarray([(1, 0), (0.6, 0.8), (0, 1)], f)[None, :, None],
            jnp.asarray([(0.6, 0.8), (1, 0), (0.8, -0.6)], f)[None, :, None],
            jnp.asarray([(1, 2), (-1, 0.5), (0.25, 3)], f)[None, :, None],
            jnp.asarray([-0.1, -0.2, -0.05], f)[None, :, None],
            jnp.asarray([0.5, 0.9, 0.7], f)[None, :, None],
        )
    expected = [(0.212132, 0.424264), (-0.186159, 0.582275), (-0.107328, -0.448616)]
    np.testing.assert_allclose(o[0, :, 0], expected, atol=1e-6)
    expected = [(-0.215003, 2.151421), (-0.151784, -0.634439)]
    np.testing.assert_allclose(state[0, 0], expected, atol=1e-6)


@pytest.mark.parametrize("prefix", ["", "h0."])
def test_golden(prefix):
    case = expected(golden("op_gdn"))
    case = {name: jnp.asarray(x, jnp.float32) for name, x in case.items()}
    rows = slice(0, 1) if prefix else slice(None)
    arguments = [case[name][rows] for name in ("q", "k", "v", "g", "beta")]
    names = ["q", "k", "v", "g", "beta"]
    if prefix:
        arguments.append(case["h0.h0"])
        names.append("h0")

    def op(q, k, v, g, beta, h0=None):
        q, k = (x * jax.lax.rsqrt(jnp.sum(x * x, -1, keepdims=True) + 1e-6) for x in (q, k))
        return gated_delta_rule(q, k, v, g, beta, initial_state=h0, impl="chunked")

    @jax.jit
    def run(do, *arguments):
        (o, state), vjp = jax.vjp(op, *arguments)
        return o, state, vjp((do, jnp.zeros_like(state)))

    o, state, gradients = run(case["do"][rows], *arguments)
    assert rel(o, case[prefix + "o"]) < 1e-5
    assert rel(state[:1], case[prefix + "final_state"]) < 1e-5
    compared = 0
    for name, gradient in zip(names, gradients, strict=True):
        if f"{prefix}d{name}" in case:
            assert rel(gradient[:1], case[f"{prefix}d{name}"]) < 1e-5, name
            compared += 1
    assert compared >= 2


def test_jla_adapter_maps_the_arguments():
    """The package's portable implementation through the adapter, packed documents and padding."""
    pytest.importorskip("jla.ops")
    arrays, state = TestGatedDeltaRule().arguments(T=70)
    doc = jnp.asarray([[0] * 30 + [1] * 40, [0] * 10 + [1] * 50 + [2] * 10])
    o, final = jla_gated_delta_rule(
        Inputs(**arrays, state=state, doc=doc), scale=0.3, kernel="chunked"
    )
    expected = gated_delta_rule(
        **arrays, initial_state=state, segment_ids=doc + 1, scale=0.3, impl="chunked"
    )
    assert rel(o, expected[0]) < 1e-4
    assert rel(final, expected[1]) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("group", "D"), [(2, 128), (1, 64), (3, 128), (5, 64), (6, 128), (7, 64), (7, 128), (16, 128)]
)
def test_jla_kernels(group, D):
    """The Hopper kernels against the chunked operator, forward and backward."""
    pytest.importorskip("jla.ops")
    rng = np.random.default_rng(0)
    B, T, H, K = 2, 200, 2 * group, 2
    bf16 = jnp.bfloat16
    q, k = (jnp.asarray(unit(normal(rng, B, T, n, D)), bf16) for n in (H, K))
    v = jnp.asarray(normal(rng, B, T, K, D), bf16)
    g = jnp.asarray(-np.abs(normal(rng, B, T, H)) * 0.1, jnp.float32)
    beta = jnp.asarray(rng.uniform(0.1, 1.0, (B, T, H)), jnp.float32)
    state = jnp.asarray(normal(rng, B, H, D, D), jnp.float32)
    segment_ids = jnp.asarray([[1] * 90 + [2] * 110, [0] * 7 + [1] * 180 + [0] * 13])
    results = []
    for impl in ("jla", "chunked"):

        def loss(q, k, v, g, beta, state, impl=impl):
            o, final = gated_delta_rule(
                q, k, v, g, beta, initial_state=state, segment_ids=segment_ids, impl=impl
            )
            valid = (segment_ids != 0)[..., None, None]
            return jnp.sum(jnp.where(valid, o.astype(jnp.float32), 0) ** 2) + jnp.sum(final), o

        results.append(
            jax.jit(jax.value_and_grad(loss, argnums=range(6), has_aux=True))(
                q, k, v, g, beta, state
            )
        )
    for a, b in zip(jax.tree.leaves(results[0][1]), jax.tree.leaves(results[1][1]), strict=True):
        assert rel(a.astype(jnp.float32), b.astype(jnp.float32)) < 2e-2
