"""The laws every recurrent operator obeys, as a base class for its tests."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.util import rel

Arrays = dict[str, Any]


@functools.partial(jax.jit, static_argnames=("op", "impl", "chunk_size"))
def _forward(op, arrays, state, segment_ids, lengths=None, *, impl, chunk_size):
    return op(
        **arrays,
        initial_state=state,
        segment_ids=segment_ids,
        lengths=lengths,
        impl=impl,
        chunk_size=chunk_size,
    )


@functools.partial(jax.jit, static_argnames=("op", "impl", "chunk_size"))
def _with_gradient(
    op, arrays, state, segment_ids, d_out, d_state, lengths=None, *, impl, chunk_size
):
    def loss(arrays, state):
        out, final = _forward(
            op, arrays, state, segment_ids, lengths, impl=impl, chunk_size=chunk_size
        )
        return jnp.sum(out * d_out) + jnp.sum(final * d_state), (out, final)

    grads, results = jax.grad(loss, argnums=(0, 1), has_aux=True)(arrays, state)
    return results, grads


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return rng.standard_normal(shape)


def unit(x: np.ndarray) -> np.ndarray:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


GATES = ("alpha", "beta", "g", "dt", "A", "D")


class RecurrentLaws:
    """Subclasses set the operator, its step, and how to draw arguments.

    Laws that differentiate share two programs, of a row of 30 tokens with segment ids and of 10.

    `per_token` names the arguments with a time axis; `draw(rng, B, T, H, K)` returns all array
    arguments by name and an initial state, in float64.
    """

    per_token: tuple[str, ...]
    op: Any
    step: Any
    draw: Callable[..., tuple[dict[str, np.ndarray], np.ndarray]]

    # -- helpers --------------------------------------------------------------------------------

    def arguments(self, B=2, T=37, H=4, K=2, seed=0, dtype=jnp.float32) -> tuple[Arrays, jax.Array]:
        arrays, state = self.draw(np.random.default_rng(seed), B, T, H, K)
        return {n: jnp.asarray(x, dtype) for n, x in arrays.items()}, jnp.asarray(state, dtype)

    def run(
        self, arrays, state=None, segment_ids=None, impl="chunked", chunk_size=16, lengths=None
    ):
        op = type(self).op
        return _forward(op, arrays, state, segment_ids, lengths, impl=impl, chunk_size=chunk_size)

    def with_grad(
        self,
        arrays,
        state,
        segment_ids,
        d_out,
        d_state,
        impl="chunked",
        chunk_size=16,
        lengths=None,
    ):
        """(out, final state), (gradients by name, that of the state), all by one program."""
        op = type(self).op
        args = (op, arrays, state, segment_ids, d_out, d_state, lengths)
        return _with_gradient(*args, impl=impl, chunk_size=chunk_size)

    def grad(self, *args, **options):
        return self.with_grad(*args, **options)[1]

    def cut(self, arrays: Arrays, time: slice | np.ndarray) -> Arrays:
        return {n: x[:, time] if n in self.per_token else x for n, x in arrays.items()}

    def cotangents(self, arrays: Arrays, state: jax.Array, seed=7) -> tuple[jax.Array, jax.Array]:
        """Random ones of the results for these arguments."""
        rng = np.random.default_rng(seed)
        results = jax.eval_shape(self.run, arrays, state)
        return tuple(jnp.asarray(normal(rng, *x.shape), x.dtype) for x in results)  # type: ignore

    # -- laws -----------------------------------------------------------------------------------

    @pytest.mark.parametrize(
        ("T", "chunk_size", "H", "K"),
        [(1, 64, 4, 2), (37, 16, 4, 1), (32, 16, 2, 2)]
        + [
            pytest.param(*shape, marks=pytest.mark.slow) for shape in ((70, 64, 4, 4), (5, 1, 3, 1))
        ],
    )
    def test_chunked_equals_reference(self, T, chunk_size, H, K):
        arrays, state = self.arguments(T=T, H=H, K=K)
        out, final = self.run(arrays, state, chunk_size=chunk_size)
        out_ref, final_ref = self.run(arrays, state, impl="reference")
        assert rel(out, out_ref) < 2e-6
        assert rel(final, final_ref) < 2e-6

    def test_no_initial_state_is_zeros(self):
        arrays, state = self.arguments()
        for actual, expected in zip(
            self.run(arrays), self.run(arrays, jnp.zeros_like(state)), strict=True
        ):
            np.testing.assert_array_equal(actual, expected)

    def test_gradients_equal_reference(self):
        with jax.enable_x64(True):
            arrays, state = self.arguments(T=23, dtype=jnp.float64)
            segment_ids = jnp.asarray([[1] * 4 + [2] + [1] * 14 + [0] * 4, [0, 3, 0] + [4] * 20])
            d_out, d_state = self.cotangents(arrays, state)
            chunked = self.grad(arrays, state, segment_ids, d_out, d_state, chunk_size=8)
            reference = self.grad(arrays, state, segment_ids, d_out, d_state, impl="reference")
            for actual, expected in zip(
                jax.tree.leaves(chunked), jax.tree.leaves(reference), strict=True
            ):
                assert actual.dtype == jnp.float64
                assert np.linalg.norm(expected) > 0
                assert rel(actual, expected) < 1e-12

    @pytest.mark.parametrize("cut", [pytest.param(1, marks=pytest.mark.slow), 21])
    def test_split_anywhere(self, cut):
        arrays, state = self.arguments()
        out, final = self.run(arrays, state)
        first, middle = self.run(self.cut(arrays, slice(0, cut)), state)
        second, end = self.run(self.cut(arrays, slice(cut, None)), middle)
        assert rel(jnp.concatenate([first, second], axis=1), out) < 2e-6
        assert rel(end, final) < 2e-6

    def test_padding_is_a_no_op(self):
        arrays, state = self.arguments(T=10)
        where = np.sort(np.random.default_rng(3).permutation(30)[:10])
        segment_ids = np.zeros((2, 30), np.int32)
        segment_ids[:, where] = 5
        padded = dict(arrays)
        for name in self.per_token:
            x = arrays[name]
            wide = jnp.full((x.shape[0], 30, *x.shape[2:]), jnp.nan, x.dtype)
            padded[name] = wide.at[:, where].set(x)
        d_out, d_state = self.cotangents(arrays, state)
        d_out_pad = jnp.zeros((2, 30, *d_out.shape[2:]), d_out.dtype).at[:, where].set(d_out)
        (out, final), expected = self.with_grad(arrays, state, None, d_out, d_state)
        chunked, actual = self.with_grad(padded, state, segment_ids, d_out_pad, d_state)
        reference = self.run(padded, state, segment_ids, impl="reference")
        for out_pad, final_pad in (chunked, reference):
            assert np.isfinite(out_pad).all()
            assert rel(out_pad[:, where], out) < 2e-6
            assert rel(final_pad, final) < 2e-6

        for name in arrays:
            g = actual[0][name]
            if name in self.per_token:
                assert not np.delete(np.asarray(g), where, axis=1).any(), name
                g = g[:, where]
            assert rel(g, expected[0][name]) < 1e-5, name
        assert rel(actual[1], expected[1]) < 1e-5

    @pytest.mark.parametrize("impl", ["chunked", "reference"])
    def test_row_of_padding_keeps_the_state(self, impl):
        arrays, state = self.arguments(T=5)
        segment_ids = jnp.asarray([[0] * 5, [1] * 5])
        _, final = self.run(arrays, state, segment_ids, impl=impl)
        np.testing.assert_array_equal(final[0], state[0])
        assert rel(final[1], state[1]) > 0.01

    @pytest.mark.parametrize("lengths", [(0, 30), (2, 20)])
    @pytest.mark.parametrize("impl", ["chunked", pytest.param("reference", marks=pytest.mark.slow)])
    def test_lengths_equal_segment_ids(self, impl, lengths):
        """Rows without a token, with fewer than a convolution has taps, and full; from a state."""
        arrays, state = self.arguments(T=30)
        padding = np.arange(30) >= np.asarray(lengths)[:, None]
        for name in self.per_token:
            mask = padding.reshape(padding.shape + (1,) * (arrays[name].ndim - 2))
            arrays[name] = jnp.where(mask, jnp.nan, arrays[name])
        segment_ids = np.asarray(~padding, np.int32)
        d_out, d_state = self.cotangents(arrays, state)
        results, expected = self.with_grad(arrays, state, segment_ids, d_out, d_state, impl)
        (out, final), grads = self.with_grad(
            arrays, state, None, d_out, d_state, impl, lengths=np.asarray(lengths, np.int32)
        )
        for a, b in zip((out, final), results, strict=True):
            assert rel(a, b) < 1e-6
        if lengths[0] == 0:
            np.testing.assert_array_equal(final[0], state[0])
        assert not np.asarray(out)[padding].any()
        for name, grad in grads[0].items():
            assert rel(grad, expected[0][name]) < 1e-5, name
            if name in self.per_token:
                assert not np.asarray(grad)[padding].any(), name
        assert rel(grads[1], expected[1]) < 1e-5

    def test_lengths_beside_documents(self):
        """They say where padding is, and documents of one or two tokens are told apart."""
        arrays, state = self.arguments(T=30)
        lengths = np.asarray([26, 0], np.int32)
        documents = np.asarray([[3] * 2 + [1] + [3] * 12 + [2] * 15, [7] * 30], np.int32)
        padding = np.arange(30) >= lengths[:, None]
        expected = self.run(arrays, state, np.where(padding, 0, documents))
        for a, b in zip(self.run(arrays, state, documents, lengths=lengths), expected, strict=True):
            assert rel(a, b) < 1e-6

    def test_lengths_need_neither_sorts_nor_document_numbers(self):
        """Nor gathers, but for one where a convolution reads its last inputs."""
        arrays, state = self.arguments(T=20)
        options = dict(impl="chunked", chunk_size=16)

        def count(word, **padding):
            run = lambda x, s: type(self).op(**x, initial_state=s, **options, **padding)  # noqa: E731
            text = jax.jit(run).lower(arrays, state).as_text()
            return len(re.findall(rf"\"stablehlo.{word}\"", text))

        plain = dict(segment_ids=None, lengths=None)
        prefix = dict(segment_ids=None, lengths=jnp.asarray([20, 3]))
        packed = dict(segment_ids=jnp.ones((2, 20), jnp.int32), lengths=None)
        assert count("sort", **prefix) == count("sort", **plain) == 0
        assert count("gather", **plain) <= count("gather", **prefix) <= count("gather", **plain) + 1
        assert count("gather", **prefix) < count("gather", **packed)
        both = packed | {"lengths": prefix["lengths"]}
        assert count("sort", **both) == 0
        # Of a packed row, a convolution also reads which documents its last inputs are of.
        assert count("gather", **both) <= count("gather", **prefix) + 1

    def test_packed_equals_separate(self):
        lengths = [10, 10, 10]  # equal, so that all share one program
        arrays, state = self.arguments(T=sum(lengths))
        ends = np.cumsum(lengths)
        segment_ids = np.asarray([[3, 1, 3]] * 2, np.int32).repeat(lengths, axis=1)
        d_out, d_state = self.cotangents(arrays, state)
        (out, final), (grads, d_initial) = self.with_grad(
            arrays, state, segment_ids, d_out, d_state
        )
        fixed = {n: 0.0 for n in arrays if n not in self.per_token}
        for i, (start, end) in enumerate(zip(ends - lengths, ends, strict=True)):
            part = self.cut(arrays, slice(start, end))
            initial = state if i == 0 else jnp.zeros_like(state)
            last = end == ends[-1]
            (out_i, final_i), (grads_i, d_initial_i) = self.with_grad(
                part, initial, None, d_out[:, start:end], d_state if last else 0 * d_state
            )
            assert rel(out[:, start:end], out_i) < 2e-6
            if last:
                assert rel(final, final_i) < 2e-6
            for name in self.per_token:
                assert rel(grads[name][:, start:end], grads_i[name]) < 1e-5, name
            fixed = {n: total + grads_i[n] for n, total in fixed.items()}
            if i == 0:
                assert rel(d_initial, d_initial_i) < 1e-5
        for name, total in fixed.items():
            assert rel(grads[name], total) < 1e-5, name

    def test_step_equals_reference(self):
        arrays, state = self.arguments(T=6)
        out, final = self.run(arrays, state)
        step = jax.jit(type(self).step)
        outs = []
        for t in range(6):
            token = {n: x[:, t] if n in self.per_token else x for n, x in arrays.items()}
            o, state = step(**token, state=state)
            outs.append(o)
        assert rel(jnp.stack(outs, axis=1), out) < 2e-6
        assert rel(state, final) < 2e-6

    def test_all_zero_inputs_are_finite(self):
        arrays, state = self.arguments()
        zeros, zero_state = jax.tree.map(jnp.zeros_like, (arrays, state))
        out, final = self.run(zeros, zero_state)
        assert not out.any() and not final.any()
        grads = self.grad(zeros, zero_state, None, jnp.ones_like(out), jnp.ones_like(final))
        assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))

    @pytest.mark.parametrize("impl", ["chunked", "reference"])
    def test_bfloat16_in_and_out_float32_inside(self, impl):
        """To the bit: float32 arithmetic on the given numbers, rounded once at the end."""
        arrays, state = self.arguments(T=20)
        # As models do: gates and decays stay float32.
        low = {n: x if n in GATES else x.astype(jnp.bfloat16) for n, x in arrays.items()}
        out, final = self.run(low, state.astype(jnp.bfloat16), impl=impl)
        assert out.dtype == jnp.bfloat16 and final.dtype == jnp.float32
        high = {n: x.astype(jnp.float32) for n, x in low.items()}
        high_state = state.astype(jnp.bfloat16).astype(jnp.float32)
        out_high, final_high = self.run(high, high_state, impl=impl)
        np.testing.assert_array_equal(final, final_high)
        np.testing.assert_array_equal(out, out_high.astype(jnp.bfloat16))

    def test_a_bfloat16_step_rounds_once(self):
        arrays, state = self.arguments(T=1)
        low = {
            n: (x[:, 0] if n in self.per_token else x).astype(jnp.bfloat16)
            for n, x in arrays.items()
        }
        high = {n: x.astype(jnp.float32) for n, x in low.items()}
        state = state.astype(jnp.float32)
        step = jax.jit(type(self).step)
        (out, final), (out_high, final_high) = (step(**x, state=state) for x in (low, high))
        assert out.dtype == jnp.bfloat16 and final.dtype == jnp.float32
        np.testing.assert_array_equal(final, final_high)
        np.testing.assert_array_equal(out, out_high.astype(jnp.bfloat16))

    def test_bad_shapes_name_the_argument(self):
        arrays, state = jax.tree.map(np.asarray, self.arguments(T=3))  # so that nothing compiles
        for name in arrays:
            with pytest.raises(ValueError, match=name):
                self.run({**arrays, name: arrays[name][..., None]}, state)
            with pytest.raises(ValueError, match="expected|multiple"):
                self.run({**arrays, name: arrays[name][..., :-1]}, state)
            with pytest.raises(ValueError, match=f"{name} has dtype int32"):
                self.run({**arrays, name: arrays[name].astype(np.int32)}, state)
        with pytest.raises(ValueError, match="initial_state"):
            self.run(arrays, state[:, :-1])
        with pytest.raises(ValueError, match="segment_ids"):
            self.run(arrays, state, np.ones((2, 4), np.int32))
        with pytest.raises(ValueError, match="segment_ids"):
            self.run(arrays, state, np.ones((2, 3)))
        with pytest.raises(ValueError, match="lengths is int32"):
            self.run(arrays, state, lengths=np.ones((2, 1), np.int32))
        with pytest.raises(ValueError, match="chunk_size"):
            self.run(arrays, state, chunk_size=0)

    def test_named_implementation_never_falls_back(self):
        arrays, state = self.arguments(T=3)
        with pytest.raises(ValueError, match="unknown"):
            self.run(arrays, state, impl="fast")
        with pytest.raises(ValueError, match="has no implementation"):
            self.run(arrays, state, impl="cudnn")
        with pytest.raises(ValueError, match=r"hmf-jax\[jla\]|Hopper|bfloat16"):
            self.run(arrays, state, impl="jla")
