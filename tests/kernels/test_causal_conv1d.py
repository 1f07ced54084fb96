"""Short convolution: the laws of recurrent operators, a direct sum, edges of its history."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmf_jax.pallas_kernels import causal_conv1d
from tests.kernels.recurrent_laws import RecurrentLaws, normal
from tests.util import rel


def conv(*, x, weight, bias, chunk_size, **options):
    return causal_conv1d(x, weight, bias, **options)


def step(x, weight, bias, state):
    y, state = causal_conv1d(x[:, None], weight, bias, initial_state=state)
    return y[:, 0], state


class TestCausalConv1d(RecurrentLaws):
    per_token = ("x",)
    op = conv
    step = step

    def draw(self, rng, B, T, H, K):
        C = H * K
        arrays = {
            "x": normal(rng, B, T, C),
            "weight": normal(rng, 4, C),
            "bias": normal(rng, C),
        }
        return arrays, normal(rng, B, 3, C)

    def test_all_zero_inputs_are_finite(self):
        x, weight = jnp.zeros((1, 5, 2)), jnp.zeros((4, 2))
        y, vjp = jax.vjp(lambda x, w: causal_conv1d(x, w)[0], x, weight)
        assert not y.any() and not any(g.any() for g in vjp(jnp.ones_like(y)))

    def test_bfloat16_in_and_out_float32_inside(self):
        arrays, state = self.arguments(T=40)
        low, low_state = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (arrays, state))
        y, final = self.run(low, low_state)
        assert y.dtype == final.dtype == jnp.bfloat16
        np.testing.assert_array_equal(final, low["x"][:, -3:])
        high, high_state = jax.tree.map(lambda x: x.astype(jnp.float32), (low, low_state))
        y_high, _ = self.run(high, high_state)
        np.testing.assert_array_equal(y, y_high.astype(jnp.bfloat16))

    test_a_bfloat16_step_rounds_once: Any = None  # a step is a sequence of one token

    def test_bad_shapes_name_the_argument(self):
        arrays, state = jax.tree.map(np.asarray, self.arguments(T=3))  # so that nothing compiles
        for name in arrays:
            with pytest.raises(ValueError, match=name):
                self.run({**arrays, name: arrays[name][..., None]}, state)
            with pytest.raises(ValueError, match=f"{name} has dtype int32"):
                self.run({**arrays, name: arrays[name].astype(np.int32)}, state)
        for name in ("weight", "bias"):
            with pytest.raises(ValueError, match=f"{name} has shape .* expected"):
                self.run({**arrays, name: arrays[name][..., :-1]}, state)
        with pytest.raises(ValueError, match="T, K >= 1"):
            self.run({**arrays, "x": arrays["x"][:, :0]}, state)
        with pytest.raises(ValueError, match="initial_state has shape .* expected"):
            self.run(arrays, np.concatenate([state, state[:, :1]], axis=1))
        with pytest.raises(ValueError, match="segment_ids"):
            self.run(arrays, state, np.ones((2, 4), np.int32))
        with pytest.raises(ValueError, match="activation='relu'"):
            causal_conv1d(**arrays, activation="relu")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="channels='c'"):
            causal_conv1d(**arrays, channels="c")  # type: ignore[arg-type]

    def test_named_implementation_never_falls_back(self):
        arrays, state = self.arguments(T=3)
        with pytest.raises(ValueError, match="has no implementation"):
            self.run(arrays, state, impl="cudnn")

    @pytest.mark.parametrize(("K", "T"), [(1, 2), (3, 1), (4, 2), (4, 9)])
    @pytest.mark.parametrize("impl", ["chunked", pytest.param("reference", marks=pytest.mark.slow)])
    def test_equals_direct_sum(self, impl, K, T):
        """Against numpy, T shorter and longer than the taps; the last tap is the current token."""
        rng = np.random.default_rng(K)
        x, w, b = normal(rng, 2, T, 3), normal(rng, K, 3), normal(rng, 3)
        past = np.concatenate([np.zeros((2, K - 1, 3)), x], axis=1)
        expected = np.stack([(w * past[:, t : t + K]).sum(1) + b for t in range(T)], axis=1)
        x, w, b = (jnp.asarray(a, jnp.float32) for a in (x, w, b))

        @jax.jit
        def run(x, w, b):
            linear = causal_conv1d(x, w, b, activation=None, impl=impl)
            return linear, causal_conv1d(x, w, b, impl=impl)[0], causal_conv1d(x, w, impl=impl)[0]

        (y, state), silu, no_bias = run(x, w, b)
        assert rel(y, expected) < 1e-6
        np.testing.assert_array_equal(state, past[:, T:].astype(np.float32))
        assert rel(silu, expected / (1 + np.exp(-expected))) < 1e-6
        expected = expected - np.asarray(b)
        assert rel(no_bias, expected / (1 + np.exp(-expected))) < 1e-6

    @pytest.mark.parametrize("impl", ["chunked", "reference"])
    def test_state_is_the_last_document(self, impl):
        cases = {
            (1, 1, 1, 1, 1, 1, 1): [5, 6, 7],
            (1, 1, 1, 1, 1, 2, 2): [0, 6, 7],
            (1, 2, 0, 2, 0, 0, 0): [0, 2, 4],
            (0, 0, 4, 0, 0, 4, 0): [-1, 3, 6],
            (1, 1, 0, 0, 0, 0, 2): [0, 0, 7],
            (0, 0, 0, 0, 0, 0, 0): [-3, -2, -1],
        }
        x = jnp.arange(1.0, 8.0)[None, :, None].repeat(6, axis=0)
        past = jnp.asarray([-3.0, -2.0, -1.0])[None, :, None].repeat(6, axis=0)
        segment_ids = jnp.asarray(list(cases))
        arrays = {"x": x, "weight": jnp.ones((4, 1)), "bias": jnp.ones(1)}
        y, state = self.run(arrays, past, segment_ids, impl=impl)
        np.testing.assert_array_equal(state[..., 0], list(cases.values()))
        np.testing.assert_array_equal(y[segment_ids == 0], 0)
