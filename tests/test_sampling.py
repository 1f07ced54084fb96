"""Sampling: filters as Hugging Face defines them, one key per (seed, position), one program."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmf_jax.sampling import SamplingParams, _filter, adjust, choose, sample, stack_params

V = 23


def logits_of(rows: int, seed: int = 0, scale: float = 2.0) -> np.ndarray:
    return (scale * np.random.default_rng(seed).normal(size=(rows, V))).astype(np.float32)


def draw(logits, params, positions=None, seen=None):
    rows = len(logits)
    positions = np.zeros(rows, np.int32) if positions is None else np.asarray(positions, np.int32)
    seen = np.zeros(logits.shape, bool) if seen is None else seen
    token, logprob = sample(logits, stack_params(params), positions, seen)
    return np.asarray(token), np.asarray(logprob)


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x.astype(np.float64)
    return (
        x
        - x.max(-1, keepdims=True)
        - np.log(np.exp(x - x.max(-1, keepdims=True)).sum(-1))[..., None]
    )


def kept_tokens(scores: np.ndarray, p: SamplingParams) -> set[int]:
    """The surviving tokens of one row, filter after filter, from the definitions."""
    order = np.argsort(-scores, kind="stable")
    if p.top_k:
        order = order[: p.top_k]
    probs = np.exp(log_softmax(scores[order]))
    if p.top_p < 1:
        order = order[: int(np.searchsorted(np.cumsum(probs), p.top_p)) + 1]
        probs = np.exp(log_softmax(scores[order]))
    return {int(t) for t in order[probs >= p.min_p * probs[0] * (1 - 1e-6)]}


PARAMS = [
    SamplingParams(temperature=1.0, top_k=5),
    SamplingParams(temperature=0.7, top_p=0.8),
    SamplingParams(temperature=1.3, min_p=0.1),
    SamplingParams(temperature=0.6, top_k=20, top_p=0.95),
    SamplingParams(temperature=1.0, top_k=7, top_p=0.6, min_p=0.2),
    SamplingParams(temperature=1.0, top_k=10_000),
    SamplingParams(temperature=1.0, top_p=1e-6),
    SamplingParams(temperature=1.0, min_p=1.0),
]


@pytest.mark.parametrize("p", PARAMS)
def test_filters_keep_what_the_definitions_keep(p):
    scores = logits_of(16) / np.float32(p.temperature)
    scores -= scores.max(-1, keepdims=True)
    got = np.isfinite(np.asarray(_filter(jnp.asarray(scores), stack_params([p] * 16))))
    for row in range(16):
        assert set(np.flatnonzero(got[row])) == kept_tokens(scores[row], p)


@pytest.mark.parametrize("p", PARAMS[:5])
def test_frequencies_are_those_of_the_filtered_distribution(p):
    rows = 4096
    logits = np.repeat(logits_of(1), rows, 0)
    params = [SamplingParams(p.temperature, p.top_k, p.top_p, p.min_p, seed=s) for s in range(rows)]
    tokens, _ = draw(logits, params)
    scaled = logits[0] / p.temperature
    keep = sorted(kept_tokens(scaled, p))
    expected = np.zeros(V)
    expected[keep] = np.exp(log_softmax(scaled[keep]))
    counts = np.bincount(tokens, minlength=V) / rows
    sigma = np.sqrt(expected * (1 - expected) / rows)
    assert (np.abs(counts - expected) <= 5 * sigma + 1e-12).all()


def test_top_p_of_one_is_off_beside_other_filters():
    """Of tokens whose probability rounding hides from a sum that starts with the likely ones."""
    scores = np.zeros((1, V), np.float32)
    scores[0, 5:] = -40.0
    for p in (SamplingParams(temperature=1, top_k=20), SamplingParams(temperature=1, min_p=1e-20)):
        got = _filter(jnp.asarray(scores), stack_params([p]))
        assert np.isfinite(np.asarray(got)).sum() == V, p  # all that tie with the 20th


def test_same_filters_as_transformers():
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process as hf

    scores = logits_of(8, seed=3)
    p = SamplingParams(temperature=0.8, top_k=11, top_p=0.7, min_p=0.05, repetition_penalty=1.4)
    prompt = np.random.default_rng(4).integers(0, V, (8, 6))
    expected = torch.tensor(scores)
    for step in (
        hf.RepetitionPenaltyLogitsProcessor(p.repetition_penalty),
        hf.TemperatureLogitsWarper(p.temperature),
        hf.TopKLogitsWarper(p.top_k),
        hf.TopPLogitsWarper(p.top_p),
        hf.MinPLogitsWarper(p.min_p),
    ):
        expected = step(torch.tensor(prompt), expected)
    seen = np.zeros((8, V), bool)
    np.put_along_axis(seen, prompt, True, 1)
    ours = np.where(seen, np.where(scores > 0, scores / 1.4, scores * 1.4), scores) / 0.8
    ours = _filter(jnp.asarray(ours - ours.max(-1, keepdims=True)), stack_params([p] * 8))
    assert (np.isfinite(np.asarray(ours)) == np.isfinite(expected.numpy())).all()


def test_ties_with_the_kth_logit_are_kept():
    scores = np.array([[0, -1, -1, -1, -5]], np.float32)
    got = _filter(jnp.asarray(scores), stack_params([SamplingParams(temperature=1, top_k=2)]))
    assert np.isfinite(np.asarray(got)).tolist() == [[True, True, True, True, False]]


def test_greedy_and_logprob_of_the_raw_distribution():
    logits = logits_of(6)
    for temperature in (0.0, 1e-30):
        params = [SamplingParams(temperature=temperature, top_p=0.5, seed=9)] * 6
        token, logprob = draw(logits, params)
        assert token.tolist() == logits.argmax(-1).tolist()
    hot = SamplingParams(temperature=3.0, top_k=4, repetition_penalty=2.0)
    hot = [dataclasses.replace(hot, seed=s) for s in range(6)]
    token, logprob = draw(logits, hot, seen=np.ones((6, V), bool))
    np.testing.assert_allclose(logprob, log_softmax(logits)[np.arange(6), token], rtol=1e-5)


def test_repetition_penalty_acts_on_greedy_choice_and_on_both_signs():
    logits = np.array([[3.0, 2.9, -9, -9], [-1.0, -1.1, -9, -9]], np.float32)
    seen = np.array([[True, False, False, False]] * 2)
    token, _ = draw(logits, [SamplingParams(repetition_penalty=1.2)] * 2, seen=seen)
    assert token.tolist() == [1, 1]
    token, _ = draw(logits, [SamplingParams()] * 2, seen=seen)
    assert token.tolist() == [0, 0]


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(len(PARAMS))), st.integers(0, 2**32 - 1))
def test_a_row_does_not_depend_on_its_batch(order, seed):
    logits = logits_of(8, seed=5, scale=1.0)
    params = [SamplingParams(p.temperature, p.top_k, p.top_p, p.min_p, seed=seed) for p in PARAMS]
    params[0] = SamplingParams(temperature=1.0, seed=seed)  # no filter: the batch has some
    params[1] = SamplingParams()
    together, _ = draw(logits[order], [params[i] for i in order], np.arange(8)[order])
    for row, i in enumerate(order):
        alone, _ = draw(logits[i : i + 1], [params[i]], [i])
        assert alone[0] == together[row]


def test_seed_and_position_change_the_draw():
    logits = np.zeros((64, V), np.float32)
    hot = [SamplingParams(temperature=1.0, seed=1)] * 64
    by_position, _ = draw(logits, hot, np.arange(64))
    by_seed, _ = draw(logits, [SamplingParams(temperature=1.0, seed=s) for s in range(64)])
    again, _ = draw(logits, hot, np.arange(64))
    assert (by_position == again).all()
    assert len(set(by_position)) > V // 2 and len(set(by_seed)) > V // 2


def test_settings_do_not_compile_again():
    logits = logits_of(4)
    draw(logits, [SamplingParams()] * 4)
    jitted: Any = sample
    size = jitted._cache_size()
    draw(logits, PARAMS[:4])
    draw(logits, PARAMS[4:])
    assert jitted._cache_size() == size


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 2.0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-9),
        ("presence_penalty", 2.5),
        ("frequency_penalty", float("nan")),
        ("temperature", True),
        ("top_p", "0.9"),
        ("seed", -1),
        ("seed", 2**32),
    ],
)
def test_bad_settings(name, value):
    with pytest.raises(ValueError, match=f"{name}=.*must be"):
        SamplingParams(**{name: value})


def test_penalties_as_they_are_defined():
    """Biases, then the repetition penalty over the row, then OpenAI's over what was generated."""
    rng = np.random.default_rng(0)
    raw, seen = logits_of(3), rng.random((3, V)) < 0.5
    generated = rng.integers(0, 4, (3, V)).astype(np.int32)
    params = [
        SamplingParams(presence_penalty=0.5, frequency_penalty=-0.25),
        SamplingParams(logit_bias={3: 2.5, 7: -np.inf}, repetition_penalty=1.5),
        SamplingParams(),
    ]
    expected = raw.astype(np.float64)
    expected[1, 3] += 2.5
    expected[1, 7] = -np.inf
    punished = np.where(expected[1] > 0, expected[1] / 1.5, expected[1] * 1.5)
    expected[1] = np.where(seen[1], punished, expected[1])
    expected[0] -= 0.5 * (generated[0] > 0) - 0.25 * generated[0]
    got = jax.jit(adjust)(raw, stack_params(params), seen, generated)
    np.testing.assert_allclose(got, expected, rtol=1e-6)
    assert (np.asarray(got[2]) == raw[2]).all()


def test_nobody_pays_for_what_nobody_asks():
    plain = stack_params([SamplingParams(), SamplingParams(temperature=1, repetition_penalty=2)])
    assert plain.presence_penalty is plain.frequency_penalty is plain.logit_bias is None


def test_scores_that_are_not_finite():
    """NaN, +inf, or nothing left: that row only; some -inf are nothing wrong."""
    scores = logits_of(5)
    scores[0, 4], scores[1, 4], scores[2], scores[3, :-1] = np.nan, np.inf, -np.inf, -np.inf
    pick = jax.jit(choose)
    for temperature in (0.0, 1e-45, 1e-30, 1.0, 1e30, 1e300):
        params = stack_params([SamplingParams(temperature=temperature, top_k=3)] * 5)
        token, ok = pick(jnp.asarray(scores), params, jnp.arange(5))
        assert ok.tolist() == [False, False, False, True, True]
        assert token[3] == V - 1 and token[4] in np.argsort(-scores[4])[:3]


def test_settings_can_be_hashed_and_compared():
    one = SamplingParams(logit_bias={5: 1, 2: -np.inf})
    assert one == SamplingParams(logit_bias=((2, -np.inf), (5, 1.0)))
    assert len({one, dataclasses.replace(one)}) == 1
