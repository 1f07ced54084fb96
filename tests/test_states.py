"""States: whose they are, how full they are, and where their rows go on."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmf_jax.model import HybridLM
from tests.util import random_model, tiny_config

TOKEN = jnp.ones((2, 1), jnp.int32)


@pytest.fixture(scope="module")
def model() -> HybridLM:
    return random_model(tiny_config(("*", "GKA")), jnp.float32)


def other(kinds=("*", "GKA"), dtype=jnp.float32, **changes) -> HybridLM:
    return jax.eval_shape(lambda: HybridLM(tiny_config(kinds, **changes), dtype=dtype))


def test_bytes_of_a_state():
    """Keys and values have the model's dtype, recurrent states are float32."""
    for dtype in (jnp.float32, jnp.bfloat16):
        state = HybridLM.init(tiny_config(("*", "GKA")), dtype=dtype).init_state(2, 32)
        cache = 2 * 2 * 32 * 2 * 16 * jnp.dtype(dtype).itemsize  # keys and values
        assert state.layers[0].k.nbytes + state.layers[0].v.nbytes == cache
        assert state.nbytes() == sum(x.nbytes for x in jax.tree.leaves(state))


@pytest.mark.parametrize("loop", ["fori", "while", "scan"])
def test_a_state_is_a_carry_from_the_start(model, loop):
    def step(carry):
        token, state = carry
        logits, state = model(token, state=state, last_only=True)
        return jnp.argmax(logits, -1).astype(jnp.int32), state

    def run():
        carry = TOKEN, model.init_state(2, 8)
        if loop == "fori":
            return jax.lax.fori_loop(0, 5, lambda _, carry: step(carry), carry)
        if loop == "while":
            return jax.lax.while_loop(lambda carry: carry[1].length[0] < 5, step, carry)
        return jax.lax.scan(lambda carry, _: (step(carry), None), carry, None, length=5)[0]

    token, state = jax.eval_shape(run)
    assert token.shape == (2, 1)
    assert jax.tree.structure(state) == jax.tree.structure(model.init_state(2, 8))


def test_fresh_is_a_hint(model):
    """It is there where the state was made, and gone after any transformation."""
    state = model.init_state(2, 8)
    assert state.fresh and not jax.tree.map(lambda x: x, state).fresh
    assert model.embed(TOKEN, state=state)[1].fresh
    jax.eval_shape(lambda state: np.testing.assert_(not state.fresh), state)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda m: m.init_state(3, 8), "The state holds 3 rows, but tokens have 2"),
        (lambda m: other(("*",)).abstract_state(2, 8), "The state has 1 layers, but the model 2"),
        (
            lambda m: other(("GKA", "*")).abstract_state(2, 8),
            r"layer 0 is GKAState\(.*, but the model's is AttentionState\(k=float32\[2, 8, 2, 16\]",
        ),
        (lambda m: other(dtype=jnp.bfloat16).abstract_state(2, 8), "layer 0 is .*bfloat16"),
        (lambda m: other(head_dim=8).abstract_state(2, 8), r"layer 0 is .*\[2, 8, 2, 8\]"),
        (lambda m: dataclasses.replace(m.init_state(2, 8), capacity=9), r"init_state\(2, 9\)"),
        (lambda m: (TOKEN, m.init_state(2, 8)), "state is a tuple, not one from init_state"),
    ],
)
def test_a_state_of_something_else(model, make, message):
    with pytest.raises(ValueError, match=message):
        model(TOKEN, state=make(model))


def test_a_full_state(model):
    """Outside of jit the tokens that would be lost are an error; inside, where T says so."""
    full = dataclasses.replace(model.init_state(2, 8), length=jnp.array([3, 7]))
    six = jnp.ones((2, 6), jnp.int32)
    with pytest.raises(ValueError, match="Row 1 would hold 13 tokens, but.* capacity is 8"):
        model.embed(six, state=full)
    with pytest.raises(ValueError, match="Row 0 would hold 9 tokens"):
        model.embed(six, state=full, lengths=jnp.array([6, 0]))
    with pytest.raises(ValueError, match="Row 1 would hold 9 tokens"):
        model.embed(six, state=full, segment_ids=jnp.array([[0] * 6, [0, 1, 0, 1, 0, 0]]))
    model.embed(six, state=full, lengths=jnp.array([5, 1]))
    with pytest.raises(ValueError, match="would hold 9 tokens"):
        jax.eval_shape(lambda s: model(jnp.ones((2, 9), jnp.int32), state=s), full)
    windows = other(("GKA",))  # nothing of it has an entry per token
    jax.eval_shape(lambda m: m.embed(six, state=m.init_state(2, 1))[0], windows)


def test_positions_go_on_after_the_last_one(model):
    """Given positions move along with padding, and the next default follows them."""
    state = model.init_state(2, 32)
    tokens, positions = jnp.ones((2, 4), jnp.int32), jnp.array([[3, 9, 4, 7], [1, 2, 3, 4]])
    valid = jnp.array([[0, 1, 0, 1], [0, 0, 0, 0]])

    def after(**options) -> list[int]:
        position = model.embed(tokens, state=state, **options)[1].position
        assert position is not None
        return position.tolist()

    assert after() == [4, 4]
    assert after(positions=positions) == [8, 5]
    assert after(positions=positions, lengths=jnp.array([2, 0])) == [10, 0]
    assert after(positions=positions, segment_ids=valid) == [8, 0]
    moved = dataclasses.replace(state, position=jnp.array([20, 11]))
    one = model.embed(TOKEN, state=moved)[1]
    assert one.position is not None and one.position.tolist() == [21, 12]
    expected = model.embed(TOKEN, state=state, positions=jnp.array([[20], [11]]))[1]
    assert (one.rope[0] == expected.rope[0]).all() and (one.rope[1] == expected.rope[1]).all()
    padded = model.embed(tokens, state=state, positions=positions, segment_ids=valid)[1]
    packed = model.embed(tokens[:, :2], state=state, positions=positions[:, 1::2])[1]
    assert (padded.rope[0][0, :2] == packed.rope[0][0]).all()
