"""SSD (Mamba-2): laws, the worked example, hard decays, golden tensors."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmf_jax.pallas_kernels import ssd, ssd_step
from hmf_jax.pallas_kernels.ops.ssd.inputs import Inputs
from hmf_jax.pallas_kernels.ops.ssd.jla import ssd as jla_ssd
from tests.goldens import expected, golden
from tests.kernels.recurrent_laws import RecurrentLaws, normal
from tests.util import rel


class TestSSD(RecurrentLaws):
    per_token = ("x", "B", "C", "dt")
    op = ssd
    step = ssd_step

    def draw(self, rng, B, T, H, K):
        P, N = 6, 8
        arrays = {
            "x": normal(rng, B, T, K, P),
            "B": normal(rng, B, T, K, N),
            "C": normal(rng, B, T, H, N),
            "dt": np.abs(normal(rng, B, T, H)) * 0.5,
            "A": -np.exp(0.3 * normal(rng, H)),
            "D": normal(rng, H),
        }
        return arrays, normal(rng, B, H, P, N)

    def test_no_skip(self):
        arrays, state = self.arguments()
        with_skip, final = self.run(arrays, state)
        without, final_without = self.run({**arrays, "D": None}, state)
        skip = arrays["D"][:, None] * jnp.repeat(arrays["x"], 2, axis=2)
        assert rel(without + skip, with_skip) < 1e-6
        np.testing.assert_array_equal(final, final_without)

    def test_strong_decay(self):
        """A token that erases the state leaves no trace in later sums, forward or backward."""
        arrays, state = self.arguments()
        hard = {**arrays, "dt": arrays["dt"].at[:, ::7].set(1e4)}
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
        y, state = jax.jit(ssd)(
            jnp.asarray([(1, 2), (-1, 0.5), (0.25, 3)], f)[None, :, None],
            jnp.asarray([(0.6, 0.8), (1, 0), (0.8, -0.6)], f)[None, :, None],
            jnp.asarray([(1, 0), (0.6, 0.8), (0, 1)], f)[None, :, None],
            jax.nn.softplus(jnp.asarray([0.1, -0.3, 0.5], f) - 1)[None, :, None],
            -jnp.exp(jnp.asarray([0.2], f)),
            jnp.asarray([0.7], f),
        )
    expected = [(0.904692, 1.809385), (-0.590445, 0.930623), (0.217841, 1.474567)]
    np.testing.assert_allclose(y[0, :, 0], expected, atol=1e-6)
    expected = [(0.04521, 0.042841), (1.376249, -0.625433)]
    np.testing.assert_allclose(state[0, 0], expected, atol=1e-6)


def test_golden():
    case = expected(golden("op_ssd"))
    case = {name: jnp.asarray(x, jnp.float32) for name, x in case.items()}
    names = ("x", "B", "C", "dt", "dt_bias", "A", "D")

    def op(x, B, C, dt, dt_bias, A, D):
        return ssd(x, B, C, jax.nn.softplus(dt + dt_bias), A, D, impl="chunked")

    @jax.jit
    def run(do, *arguments):
        (y, state), vjp = jax.vjp(op, *arguments)
        return y, state, vjp((do, jnp.zeros_like(state)))

    y, state, gradients = run(case["do"], *(case[name] for name in names))
    assert rel(y, case["y"]) < 1e-5
    assert rel(state[:1], case["final_state"]) < 1e-5
    for name, gradient in zip(names, gradients, strict=True):
        golden_gradient = case[f"d{name}"]  # row 0 only where there is a batch axis
        assert rel(gradient[: golden_gradient.shape[0]], golden_gradient) < 1e-5, name


def test_jla_adapter_maps_the_arguments():
    """The package's portable implementation through the adapter, packed documents."""
    pytest.importorskip("jla.ops")
    arrays, state = TestSSD().arguments(T=70)
    doc = jnp.asarray([[0] * 30 + [1] * 40, [0] * 10 + [1] * 50 + [2] * 10])
    y, final = jla_ssd(Inputs(**arrays, state=state, doc=doc), kernel="chunked")
    expected = ssd(**arrays, initial_state=state, segment_ids=doc + 1, impl="chunked")
    assert rel(y, expected[0]) < 1e-4
    assert rel(final, expected[1]) < 1e-4


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("group", "P"), [(2, 128), (1, 64), (3, 128), (5, 64), (6, 128), (7, 64), (7, 128), (16, 128)]
)
def test_jla_kernels(group, P):
    """The Hopper kernels against the chunked operator, forward and backward."""
    pytest.importorskip("jla.ops")
    rng = np.random.default_rng(0)
    batch, T, H, K = 2, 200, 2 * group, 2
    bf16 = jnp.bfloat16
    x = jnp.asarray(normal(rng, batch, T, K, P), bf16)
    B, C = (jnp.asarray(normal(rng, batch, T, n, P) * P**-0.25, bf16) for n in (K, H))
    dt = jnp.asarray(np.abs(normal(rng, batch, T, H)) * 0.1, jnp.float32)
    A, D = -jnp.exp(jnp.linspace(-1, 1, H)), jnp.linspace(0.5, 1.5, H)
    state = jnp.asarray(normal(rng, batch, H, P, P), jnp.float32)
    segment_ids = jnp.asarray([[1] * 90 + [2] * 110, [0] * 7 + [1] * 180 + [0] * 13])
    results = []
    for impl in ("jla", "chunked"):

        def loss(x, B, C, dt, A, D, state, impl=impl):
            y, final = ssd(
                x, B, C, dt, A, D, initial_state=state, segment_ids=segment_ids, impl=impl
            )
            valid = (segment_ids != 0)[..., None, None]
            return jnp.sum(jnp.where(valid, y.astype(jnp.float32), 0) ** 2) + jnp.sum(final), y

        results.append(
            jax.jit(jax.value_and_grad(loss, argnums=range(7), has_aux=True))(
                x, B, C, dt, A, D, state
            )
        )
    for a, b in zip(jax.tree.leaves(results[0][1]), jax.tree.leaves(results[1][1]), strict=True):
        assert rel(a.astype(jnp.float32), b.astype(jnp.float32)) < 2e-2
