"""Laws that hold for every layer kind and for a model that mixes all six.

Padding leaves no trace, packed documents do not see each other, any cut of a sequence gives the
same result, decoding continues a prefill, rows of a batch do not know each other.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hmf_jax.config import BMojoConfig, GDNConfig, GKAConfig
from hmf_jax.model import HybridLM
from tests.util import random_model, rel, tiny_config

SIX = ("*", "GKA", "SWA", "GDN", "BMF", "M2")
BMF_W = 4
CASES = {
    **{kind: tiny_config((kind,) * 2) for kind in SIX},
    "BMF-m2": tiny_config(("BMF",) * 2, bmojo=BMojoConfig(4, True, "M2")),
    "all six": tiny_config(SIX),
    "all six, other options": tiny_config(
        SIX,
        bmojo=BMojoConfig(4, False, "GDN"),
        gka=GKAConfig(
            use_forgetting_gate_kk=False,
            use_v_conv=False,
            kv_proj_rank=4,
            kv_learnable_residual=True,
            conv_size=3,
            chunk_size=8,
        ),
        gdn=GDNConfig(use_short_conv=False),
    ),
}
T = 24  # six windows of B'MOJO-F
law = settings(
    max_examples=4,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],  # the model does not change
)
build = functools.cache(random_model)  # equal models also share their compiled programs


# Six layers in one model take as long to compile as all other cases together.
SLOW = ("BMF-m2", "all six, other options", "all six, float32")


@pytest.fixture(
    params=[c for c in CASES if c not in SLOW]
    + [pytest.param(c, marks=pytest.mark.slow) for c in SLOW]
)
def model(request) -> Iterator[HybridLM]:
    """float64, where a broken law cannot hide behind rounding; and the mix of all in float32."""
    name = request.param.removesuffix(", float32")
    with jax.enable_x64(name == request.param):
        yield build(CASES[name], jnp.float64 if name == request.param else jnp.float32)


def tol(model: HybridLM) -> float:
    return 1e-8 if model.dtype == jnp.float64 else 1e-4


def tokens_for(seed: int, rows: int = 2, length: int = T) -> jax.Array:
    return jax.random.randint(jax.random.key(seed), (rows, length), 0, 64)


def run(model, tokens, **kwargs):
    return model(tokens, **kwargs)[0]


def feed(model, tokens, state, lengths=None):
    """A call with a state, as `generate` makes it: how many tokens of each row are valid."""
    lengths = [tokens.shape[1]] * len(tokens) if lengths is None else lengths
    return model(tokens, lengths=jnp.asarray(lengths, jnp.int32), state=state)


@law
@given(seed=st.integers(0, 99), data=st.data())
def test_padding_leaves_no_trace(model, seed, data):
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=2 * T, max_size=2 * T)))
    mask = mask.reshape(2, T)
    mask[:, data.draw(st.integers(0, T - 1))] = True
    tokens = tokens_for(seed)
    ids = jnp.asarray(mask, jnp.int32)
    padded = run(model, tokens, segment_ids=ids)
    noise = jnp.where(mask, tokens, tokens_for(seed + 1))
    again = run(model, noise, segment_ids=ids)
    cached, state = model(tokens, segment_ids=ids, state=model.init_state(2, T))
    np.testing.assert_array_equal(state.length, mask.sum(1))
    # The same valid tokens at the front; causal, so what follows them does not matter.
    front = jnp.take_along_axis(tokens, jnp.argsort(~mask, axis=1, stable=True), axis=1)
    plain = run(model, front)
    for row in range(2):
        for result in (padded, again, cached):
            assert rel(result[row][mask[row]], plain[row, : mask[row].sum()]) < tol(model)


@law
@given(seed=st.integers(0, 99), cut=st.integers(1, T - 1), pad=st.integers(0, 3))
def test_packed_is_separate(model, seed, cut, pad):
    tokens = tokens_for(seed)
    pad = min(pad, T - cut - 1)
    ids = np.full((2, T), 7)
    ids[:, cut : cut + pad] = 0
    ids[:, cut + pad :] = 9
    packed = run(model, tokens, segment_ids=jnp.asarray(ids))
    second = jnp.roll(tokens, -(cut + pad), axis=1)
    assert rel(packed[:, :cut], run(model, tokens)[:, :cut]) < tol(model)
    assert rel(packed[:, cut + pad :], run(model, second)[:, : T - cut - pad]) < tol(model)


@law
@given(seed=st.integers(0, 99), sizes=st.permutations([1, 1, 11, 11]))
def test_any_cut_gives_the_same(model, seed, sizes):
    tokens = tokens_for(seed)
    whole = run(model, tokens)
    state, parts, done = model.init_state(2, T), [], 0
    for size in sizes:
        logits, state = feed(model, tokens[:, done : done + size], state)
        parts.append(logits)
        done += size
    assert rel(jnp.concatenate(parts, axis=1), whole) < tol(model)


@law
@given(seed=st.integers(0, 99), prompt=st.sampled_from([1, 11]))
def test_decoding_continues_a_prefill(model, seed, prompt):
    """Decodes more than two B'MOJO-F windows, with one row that pauses now and then."""
    tokens = tokens_for(seed)
    whole = run(model, tokens)
    logits, state = feed(model, tokens[:, :prompt], model.init_state(2, T))
    at = np.array([prompt, prompt])
    rng = np.random.default_rng(seed)
    while at.min() < T:
        active = (at < T) & np.array([True, rng.random() < 0.7])
        step = tokens[jnp.arange(2), jnp.minimum(at, T - 1)][:, None]
        logits, state = feed(model, step, state, active)
        for row in np.flatnonzero(active):
            assert rel(logits[row, 0], whole[row, at[row]]) < tol(model)
        at += active


def test_continuing_rows_of_different_lengths(model):
    """A second prefill with its own padding, on rows that hold different numbers of tokens."""
    tokens = tokens_for(5)
    whole = run(model, tokens)
    first, second = np.array([3, 11]), np.array([9, 4])
    index = np.arange(11)
    state = model.init_state(2, T)
    for start, count in ((0 * first, first), (first, second)):
        take = jnp.minimum(start[:, None] + index, T - 1)
        part = jnp.take_along_axis(tokens, take, axis=1)
        logits, state = feed(model, part, state, count)
        for row in range(2):
            expected = whole[row, start[row] : start[row] + count[row]]
            assert rel(logits[row, : count[row]], expected) < tol(model)


def test_last_only(model):
    tokens, mask = tokens_for(6), jnp.asarray(np.tri(2, T, T - 5) > 0, jnp.int32)
    logits = run(model, tokens, segment_ids=mask)
    last = run(model, tokens, segment_ids=mask, last_only=True)
    lengths = np.asarray(mask.sum(1))
    assert rel(last[:, 0], logits[jnp.arange(2), lengths - 1]) < 1e-6


def test_rows_do_not_know_each_other(model):
    tokens = tokens_for(7)
    logits = run(model, tokens)
    assert rel(run(model, tokens[::-1]), logits[::-1]) < tol(model)
    other = tokens.at[1].set(tokens_for(8)[1])
    assert rel(run(model, other)[0], logits[0]) < tol(model)


def test_num_iter_is_per_row_and_may_change_between_calls():
    with jax.enable_x64(True):
        model = build(CASES["GKA"], jnp.float64)
        tokens = tokens_for(8)
        mixed = run(model, tokens, num_iter=jnp.array([0, 7]))
        assert rel(mixed[0], run(model, tokens, num_iter=jnp.array([0, 0]))[0]) < 1e-8
        assert rel(mixed[1], run(model, tokens, num_iter=jnp.array([7, 7]))[1]) < 1e-8
        assert rel(mixed[0], mixed[1]) > 1e-3 and rel(mixed[0], run(model, tokens)[0]) > 1e-3
        # The key covariance of the first layer does not depend on num_iter, not even on 0, so a
        # later call may solve with it.
        states = [
            model(tokens, state=model.init_state(2, T), num_iter=jnp.array(n))[1]
            for n in ([0, 0], [7, 7])
        ]
        h_kk = [state.layers[0].h_kk for state in states]
        assert np.linalg.norm(h_kk[0]) > 0
        np.testing.assert_array_equal(*h_kk)


def test_state_is_float32_in_a_bfloat16_model():
    model = nnx.eval_shape(lambda: HybridLM(tiny_config(SIX), dtype=jnp.bfloat16))
    _, state = jax.eval_shape(
        lambda model: model(tokens_for(0), state=model.init_state(2, T)), model
    )
    gka, gdn, bmf, m2 = state.layers[1], state.layers[3], state.layers[4], state.layers[5]
    for a in (gka.h_kk, gka.h_kv, gdn.s, m2.s, m2.log_decay, bmf.inner.h_kk):
        assert a.dtype == jnp.float32
    for a in (state.layers[0].k, gka.conv_q, bmf.k):
        assert a.dtype == jnp.bfloat16
    for block in model.layers:
        for name in ("A_log", "dt_bias", "D"):
            p = getattr(block.mixer, name, None)
            assert p is None or p.dtype == jnp.float32


def test_reset_and_gather():
    with jax.enable_x64(True):
        model = build(CASES["all six"], jnp.float64)
        tokens = tokens_for(4)
        whole = run(model, tokens)
        _, state = feed(model, tokens[:, :11], model.init_state(2, T))
        state = state.reset(jnp.array([True, False]))
        again, state = feed(model, jnp.stack([tokens[0, :11], tokens[1, 11:22]]), state)
        assert rel(again[0], whole[0, :11]) < 1e-8
        assert rel(again[1], whole[1, 11:22]) < 1e-8
        swapped = state.gather(jnp.array([1, 0]))
        np.testing.assert_array_equal(swapped.length, [22, 11])
        next_token = jnp.stack([tokens[1, 22:23], tokens[0, 11:12]])
        logits, _ = feed(model, next_token, swapped)
        assert rel(logits[:, 0], jnp.stack([whole[1, 22], whole[0, 11]])) < 1e-8
        assert swapped.nbytes() == state.nbytes()


def test_bad_input():
    model = build(CASES["GKA"], jnp.float32)
    tokens = tokens_for(0)
    with pytest.raises(ValueError, match="num_iter=-1"):
        model(tokens, num_iter=-1)
    with pytest.raises(ValueError, match="integers"):
        model(tokens.astype(jnp.float32))
    with pytest.raises(ValueError, match="pass one of them"):
        model(tokens, segment_ids=tokens, lengths=jnp.array([1, 2]))
    with pytest.raises(ValueError, match="lengths has shape"):
        model(tokens, lengths=jnp.array([1]))
    with pytest.raises(ValueError, match="segment_ids has shape"):
        model(tokens, segment_ids=tokens[:, :-1])
    with pytest.raises(ValueError, match="init_state"):
        model(tokens, state=model.init_state(3, T))
    with pytest.raises(ValueError, match="must be an integer >= 1"):
        model.init_state(0, T)
    with pytest.raises(ValueError, match="must be an integer >= 1"):
        model.init_state(1, 0)
