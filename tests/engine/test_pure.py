"""`sample` and `score`: pure functions that agree with each other and with `generate`."""

from __future__ import annotations

import functools
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import hmf_jax
from hmf_jax.engine import generate, pure, scores
from hmf_jax.mixers import KINDS
from hmf_jax.model import HybridLM
from hmf_jax.sampling import SamplingParams, stack_params
from tests.util import mesh_of, place, random_model, tiny_config

SLOW = pytest.mark.slow
SIX = tuple(KINDS)
STEPS = 6
HOT = SamplingParams(temperature=0.8, top_k=20)


@pytest.fixture(scope="module")
def model() -> HybridLM:
    return random_model(tiny_config(("*",)), jnp.float32)


def prompts_of(rows: int, length: int, seed: int = 0) -> jnp.ndarray:
    return jnp.array(np.random.default_rng(seed).integers(0, 64, (rows, length)), jnp.int32)


@functools.partial(jax.jit, static_argnames=("steps", "sampling", "eos_ids", "processor"))
def sample(model, tokens, lengths, key, steps=STEPS, **options):
    return hmf_jax.sample(model, tokens, lengths, key, steps=steps, **options)


PROMPTS, LENGTHS = prompts_of(2, 7), jnp.array([7, 4])


def joined(tokens, lengths, new, count):
    """Rows of prompts and what was added, without a gap, and their lengths."""
    rows = [[*t[:n], *a[:m]] for t, n, a, m in zip(tokens, lengths, new, count, strict=True)]
    width = max(map(len, rows))
    return jnp.array([r + [0] * (width - len(r)) for r in rows]), lengths + count


@jax.jit
def in_shard_map(model, tokens, lengths, keys):
    """Each device continues its own rows; the model has no mesh of its own."""
    rows, whole = PartitionSpec("dp"), PartitionSpec()
    options = dict(steps=STEPS, sampling=HOT, eos_ids=(1,))
    return jax.shard_map(
        lambda *args: hmf_jax.sample(*args, **options)[:3],
        mesh=mesh_of({"dp": 2}),
        in_specs=(whole, rows, rows, rows),
        out_specs=rows,
        check_vma=False,
    )(model, tokens, lengths, keys)


@pytest.mark.parametrize("kinds", [("*",), pytest.param(SIX, marks=SLOW)])
def test_sample_then_score(model, kinds):
    model = random_model(tiny_config(kinds), jnp.float32) if kinds == SIX else model
    new, logprobs, count, state = sample(model, PROMPTS, LENGTHS, jax.random.key(1), sampling=HOT)
    assert new.shape == logprobs.shape == (2, STEPS) and count.tolist() == [STEPS] * 2
    assert state.length.tolist() == (LENGTHS + STEPS - 1).tolist()
    rows, lengths = joined(PROMPTS, LENGTHS, new, count)
    scored = jax.jit(hmf_jax.score)(model, rows, lengths)
    assert scored.shape == (2, rows.shape[1] - 1) and scored.dtype == jnp.float32
    for i, n in enumerate(LENGTHS.tolist()):
        np.testing.assert_allclose(scored[i, n - 1 : n - 1 + STEPS], logprobs[i], atol=1e-5)
        assert (scored[i, int(lengths[i]) - 1 :] == 0).all()
    # The same with padding between the prompt and what follows.
    gap = jnp.concatenate([jnp.arange(7) < LENGTHS[:, None], jnp.ones((2, STEPS), bool)], axis=1)
    both, ids = jnp.concatenate([PROMPTS, new], axis=1), gap.astype(jnp.int32)
    apart = jax.jit(lambda m, t, ids: hmf_jax.score(m, t, segment_ids=ids))(model, both, ids)
    np.testing.assert_allclose(apart[:, 6:], logprobs, atol=1e-4)


@SLOW
def test_a_key_is_a_seed(model):
    """A row's key decides what it draws; one key for several rows is split."""
    seeds = (3, 8)
    keys = jax.vmap(jax.random.key)(jnp.array(seeds))
    new, *_ = sample(model, PROMPTS, LENGTHS, keys, sampling=HOT)
    rows = [row[:n].tolist() for row, n in zip(np.asarray(PROMPTS), LENGTHS.tolist(), strict=True)]
    params = [SamplingParams(temperature=0.8, top_k=20, seed=s) for s in seeds]
    expected = generate(model, rows, max_new_tokens=STEPS, sampling=params, eos_ids=())
    assert new.tolist() == [g.tokens for g in expected]
    one = jax.random.key(5)
    split, *_ = sample(model, PROMPTS, LENGTHS, one, sampling=HOT)
    assert (split == sample(model, PROMPTS, LENGTHS, jax.random.split(one), sampling=HOT)[0]).all()
    old = jax.random.PRNGKey(5)  # without a type
    assert (split == sample(model, PROMPTS, LENGTHS, old, sampling=HOT)[0]).all()


@SLOW
def test_over_keys_and_over_prompts(model):
    """vmap over keys and prompts, scan over prompts: each is what it is alone."""
    keys = jax.random.split(jax.random.key(0), 3)
    one = functools.partial(hmf_jax.sample, steps=STEPS, eos_ids=(1, 2), sampling=HOT)
    tokens = prompts_of(3, 7, 1)[:, None]

    @jax.jit
    def both(model, tokens, keys):
        mapped = jax.vmap(lambda t, k: one(model, t, None, k)[:3])(tokens, keys)
        scan = lambda _, x: (None, one(model, x[0], None, x[1])[:3])  # noqa: E731
        return mapped, jax.lax.scan(scan, None, (tokens, keys))[1]

    mapped, scanned = both(model, tokens, keys)
    for i in range(3):
        alone = sample(model, tokens[i], None, keys[i], eos_ids=(1, 2), sampling=HOT)
        for a, b, c in zip(mapped, scanned, alone[:3], strict=True):
            np.testing.assert_allclose(a[i], c, atol=1e-5)
            np.testing.assert_allclose(b[i], c, atol=1e-5)


@SLOW
def test_end_tokens_and_states(model):
    """What comes after an end token is zeros; a returned state can be continued."""
    key = jax.random.key(2)
    free, scores, _, state = sample(model, PROMPTS, LENGTHS, key)
    end = int(free[0, 2])
    assert end not in free[0, :2].tolist() + free[1].tolist()
    new, logprobs, count, _ = sample(model, PROMPTS, LENGTHS, key, eos_ids=(end,))
    assert count.tolist() == [3, STEPS] and new[0].tolist() == [*free[0, :3].tolist(), 0, 0, 0]
    assert (logprobs[0, 3:] == 0).all()
    np.testing.assert_allclose(logprobs[1], scores[1], atol=1e-5)
    # In two parts: the newest token is not in the state, so it is the next prompt.
    state = model.init_state(2, 7 + STEPS)
    half = hmf_jax.sample(model, PROMPTS, LENGTHS, jax.random.split(key), steps=3, state=state)
    rest = hmf_jax.sample(
        model, half[0][:, -1:], None, jax.random.split(key), steps=3, state=half[3]
    )
    assert jnp.concatenate([half[0], rest[0]], axis=1).tolist() == free.tolist()


def test_what_can_be_traced(model):
    """Without running: vmap over keys, scan over prompts, a traced temperature, shard_map."""
    keys, tokens = jax.random.split(jax.random.key(0), 2), prompts_of(2, 5)[:, None]
    one = functools.partial(hmf_jax.sample, model, steps=3)

    def cold(temperature, key):
        params = stack_params([HOT] * 2)._replace(temperature=jnp.full(2, temperature))
        return one(PROMPTS, LENGTHS, key, sampling=params)

    for found, shape in [
        (jax.eval_shape(jax.vmap(lambda k: one(PROMPTS, LENGTHS, k)), keys), (2, 2, 3)),
        (jax.eval_shape(jax.vmap(cold), jnp.ones(2), keys), (2, 2, 3)),
        (
            jax.eval_shape(
                lambda xs: jax.lax.scan(lambda _, x: (None, one(x[0], None, x[1])), None, xs)[1],
                (tokens, keys),
            ),
            (2, 1, 3),
        ),
    ]:
        assert found[0].shape == found[1].shape == shape and found[2].shape == shape[:-1]
    rows = jax.eval_shape(lambda m: in_shard_map(m, PROMPTS, LENGTHS, keys), model)
    assert rows[0].shape == (2, STEPS)


def test_keys_of_rows():
    """One key is split over rows, except for a single row; a row's key is its own."""
    key = jax.random.key(5)
    keys = jax.random.split(key)
    for given, rows, expected in [
        (key, 2, keys),
        (keys, 2, keys),
        (key, 1, key[None]),
        (jax.random.PRNGKey(5), 2, keys),
    ]:
        found = jax.random.key_data(pure._row_keys(given, rows))
        assert (found == jax.random.key_data(expected)).all()


def test_gradient_of_pieces(monkeypatch):
    """Positions in pieces, the last one partly filled: sums and gradients of the whole."""
    monkeypatch.setattr(scores, "POSITIONS", 8)
    rng = np.random.default_rng(0)
    hidden, kernel = (jnp.array(rng.normal(size=n), jnp.float32) for n in ((2, 7, 5), (5, 11)))
    targets = jnp.array(rng.integers(0, 11, (2, 7)))

    def pieces(hidden, kernel):
        model: Any = types.SimpleNamespace(head_kernel=lambda: kernel)
        return scores.of_tokens(model, hidden, targets)[0]

    def whole(hidden, kernel):
        logprobs = jax.nn.log_softmax(hidden @ kernel, -1)
        return jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]

    @jax.jit
    def both(*args):
        weights = jnp.arange(14.0).reshape(2, 7)
        return [jax.vjp(f, *args)[1](weights) + (f(*args),) for f in (pieces, whole)]

    for a, b in zip(*both(hidden, kernel), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@SLOW
def test_gradient_of_scores(model):
    tokens = prompts_of(2, 9, 4)

    def chosen(model):
        return jnp.sum(hmf_jax.score(model, tokens))

    def plain(model):
        logprobs = jax.nn.log_softmax(model(tokens)[0], -1)
        return jnp.sum(jnp.take_along_axis(logprobs[:, :-1], tokens[:, 1:, None], axis=-1))

    (a, da), (b, db) = (jax.jit(jax.value_and_grad(f))(model) for f in (chosen, plain))
    np.testing.assert_allclose(a, b, rtol=1e-5)
    for x, y in zip(jax.tree.leaves(da), jax.tree.leaves(db), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-4 * float(jnp.abs(y).max() + 1e-3))


@SLOW
def test_packed_documents_are_scored_apart(model):
    tokens, ids = prompts_of(1, 9, 5), jnp.array([[1, 1, 1, 1, 2, 2, 2, 0, 0]])
    scored = np.asarray(hmf_jax.score(model, tokens, segment_ids=ids))[0]
    for start, end in ((0, 4), (4, 7)):
        alone = hmf_jax.score(model, tokens[:, start:end])[0]
        np.testing.assert_allclose(scored[start : end - 1], alone, atol=1e-5)
    assert scored[[3, 6, 7]].tolist() == [0, 0, 0]


def test_logits_of_few_positions_exist_at_a_time(model):
    big = jax.eval_shape(lambda: jnp.zeros((1, 8192), jnp.int32))
    loss = jax.jit(jax.grad(lambda m, t: jnp.sum(hmf_jax.score(m, t))))
    assert "8191,64" not in loss.lower(model, big).as_text().replace("x", ",")


def test_a_row_that_fails(model):
    broken = jax.tree.map(lambda x: x, model)
    broken.embed_tokens.embedding[...] = broken.embed_tokens.embedding[...].at[63].set(jnp.nan)
    good, scores, *_ = sample(model, PROMPTS, LENGTHS, jax.random.key(1), sampling=HOT)
    tokens = PROMPTS.at[0, 2].set(63)
    new, logprobs, count, _ = sample(broken, tokens, LENGTHS, jax.random.key(1), sampling=HOT)
    assert count[0] == 0 and np.isnan(logprobs[0, 0]) and (logprobs[0, 1:] == 0).all()
    if 63 not in good[1]:
        assert (new[1] == good[1]).all() and (logprobs[1] == scores[1]).all()


@SLOW
def test_on_a_mesh(model):
    spread = place(model, model.config, mesh_of({"dp": 2, "tp": 2}))
    expected = sample(model, PROMPTS, LENGTHS, jax.random.key(1), sampling=HOT)
    found = sample(spread, PROMPTS, LENGTHS, jax.random.key(1), sampling=HOT)
    assert (found[0] == expected[0]).all()
    np.testing.assert_allclose(found[1], expected[1], atol=1e-4)
    scored = jax.jit(hmf_jax.score)(spread, PROMPTS, LENGTHS)
    np.testing.assert_allclose(scored, hmf_jax.score(model, PROMPTS, LENGTHS), atol=1e-4)


@SLOW
def test_in_shard_map(model):
    keys = jax.random.split(jax.random.key(4))
    expected = sample(model, PROMPTS, LENGTHS, keys, sampling=HOT, eos_ids=(1,))
    found = in_shard_map(model, PROMPTS, LENGTHS, keys)
    for a, b in zip(found, expected[:3], strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "steps=0 must be"),
        ({"sampling": SamplingParams(temperature=1, seed=3)}, r"pass key=jax.random.key\(3\)"),
        ({"sampling": {"temprature": 1.0}}, "did you mean 'temperature'"),
        ({"key": 0}, "must be a random key"),
        ({"key": jnp.zeros((5, 2), jnp.uint32)}, "one for each of 2 rows"),
        ({"num_iter": 3}, "this model has no GKA layers"),
        ({"tokens": jnp.zeros(3, jnp.int32)}, r"tokens must be \[B, T\]"),
        ({"state": "other"}, "The state holds 3 rows"),
    ],
)
def test_bad_arguments(model, options, message):
    settings = {"steps": 2, "tokens": PROMPTS, "key": jax.random.key(0)} | options
    if "state" in settings:
        settings["state"] = model.init_state(3, 16)
    with pytest.raises(ValueError, match=message):
        hmf_jax.sample(model, settings.pop("tokens"), None, settings.pop("key"), **settings)
