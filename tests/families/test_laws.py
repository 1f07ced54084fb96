"""The laws of test_laws.py for the models of every base family, and their way to disk and back.

One test per family runs all laws, so that each program is compiled once: one for whole rows with
segment ids, one for single tokens, and in slow tests one for pieces of six tokens with a state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmf_jax.config import HybridConfig
from hmf_jax.loading import from_pretrained, save_pretrained
from hmf_jax.model import HybridLM
from hmf_jax.parameters import flat_params
from tests.families.tiny import FAMILIES, SIX, tiny_family
from tests.util import random_model, rel

T, PIECE = 24, 6
# The family that differs most; all families with all six kinds are slow.
QUICK = {"qwen3_next": ("*",)}
# The scale of queries (ministral3) is float32 in any model. Programs of other shapes round its
# logarithm in other ways, and GKA layers enlarge that.
TOL = {"ministral3": 1e-6}
TOKENS = np.random.default_rng(0).integers(0, 64, (2, T))


def tolerance(model: HybridLM) -> float:
    return TOL.get(model.config.family, 1e-8)


@jax.jit
def whole_rows(model: HybridLM, tokens, ids):
    return model(tokens, segment_ids=ids)[0]


@jax.jit
def next_tokens(model: HybridLM, tokens, counts, state):
    return model(tokens, lengths=counts, state=state)


def forward(model: HybridLM, tokens, ids=None) -> np.ndarray:
    ids = np.ones((2, T), np.int32) if ids is None else ids
    return np.asarray(whole_rows(model, tokens, ids))


@pytest.fixture(
    params=[*QUICK.items()]
    + [
        pytest.param((name, SIX), marks=pytest.mark.slow, id=f"{name}, all six")
        for name in FAMILIES
    ],
    ids=lambda case: case[0],
)
def model(request) -> Iterator[HybridLM]:
    """float64, where a broken law cannot hide behind rounding."""
    with jax.enable_x64(True):
        yield random_model(tiny_family(*request.param), jnp.float64)


def test_laws(model):
    whole = forward(model, TOKENS)
    padding_leaves_no_trace(model, whole)
    packed_is_separate(model, whole)
    rows_do_not_know_each_other(model, whole)
    pieces_are_the_whole(model, whole)


def padding_leaves_no_trace(model: HybridLM, whole: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    mask = rng.random((2, T)) < 0.6
    tokens = rng.integers(0, 64, (2, T))  # at padding, anything
    for row in range(2):
        tokens[row, mask[row]] = TOKENS[row, : mask[row].sum()]
    padded = forward(model, tokens, mask.astype(np.int32))
    for row in range(2):
        assert rel(padded[row, mask[row]], whole[row, : mask[row].sum()]) < tolerance(model)


def packed_is_separate(model: HybridLM, whole: np.ndarray) -> None:
    cut, pad = 9, 2
    ids = np.repeat([[7, 0, 9]] * 2, [cut, pad, T - cut - pad], axis=1).astype(np.int32)
    tokens = TOKENS.copy()
    tokens[:, cut + pad :] = TOKENS[:, : T - cut - pad]
    packed = forward(model, tokens, ids)
    assert rel(packed[:, :cut], whole[:, :cut]) < tolerance(model)
    assert rel(packed[:, cut + pad :], whole[:, : T - cut - pad]) < tolerance(model)


def rows_do_not_know_each_other(model: HybridLM, whole: np.ndarray) -> None:
    assert rel(forward(model, TOKENS[::-1]), whole[::-1]) < tolerance(model)
    other = TOKENS.copy()
    other[1] = (other[1] + 1) % 64
    assert rel(forward(model, other)[0], whole[0]) < tolerance(model)


def pieces_are_the_whole(model: HybridLM, whole: np.ndarray) -> None:
    """A prefill in pieces, of which each row takes its own number of tokens, then single tokens, of
    which a row may take none."""
    state = dataclasses.replace(model.init_state(2, T), fresh=False)
    at = np.zeros(2, int)

    def feed(counts, length: int) -> None:
        nonlocal state, at
        index = np.minimum(at[:, None] + np.arange(length), T - 1)
        tokens = np.take_along_axis(TOKENS, index, axis=1)
        logits, state = next_tokens(model, tokens, counts.astype(np.int32), state)
        logits = np.asarray(logits)
        for row, count in enumerate(counts):
            assert rel(logits[row, :count], whole[row, at[row] : at[row] + count]) < tolerance(
                model
            )
        at = at + counts

    if model.config.layer_kinds == SIX:
        for counts in ([6, 2], [1, 6], [6, 0]):
            feed(np.asarray(counts), PIECE)
    rng = np.random.default_rng(2)
    while at.min() < T:
        feed(np.minimum(rng.random(2) < 0.8, at < T).astype(int), 1)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_comes_back(family):
    config = tiny_family(family)
    again = HybridConfig.from_dict(config.to_dict())
    assert dataclasses.replace(again, extra=config.extra) == config


@pytest.mark.slow  # tests of the rows that checkpoints have are quick
@pytest.mark.parametrize("family", FAMILIES)
def test_saved_and_loaded(tmp_path, family):
    """All six kinds; of Qwen3-Next and Qwen3.5 the original would not read that."""
    model = random_model(tiny_family(family), jnp.float32)
    save_pretrained(model, tmp_path, for_original=False, progress=False)
    before = flat_params(model)
    after = flat_params(from_pretrained(tmp_path, dtype=jnp.float32, progress=False))
    assert before.keys() == after.keys()
    for path, x in before.items():
        np.testing.assert_array_equal(after[path], x, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_text_in_a_batch_is_that_alone(family):
    model = random_model(tiny_family(family), jnp.float32, seed=3)
    prompts = [list(range(3, 14)), [7, 1, 60, 5], [9]]
    options = dict(max_new_tokens=8, prefill_chunk=8, eos_ids=())
    together = model.generate(prompts, **options)
    for prompt, found in zip(prompts, together, strict=True):
        (alone,) = model.generate([prompt], **options)
        assert list(alone.tokens) == list(found.tokens)
    assert len({token for found in together for token in found.tokens}) > 2
