"""Going back in a row: it then holds what a fresh row would hold, with every kind of layer."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from hmf_jax.engine import Engine, New, Request
from hmf_jax.mixers import KINDS
from hmf_jax.model import HybridLM
from hmf_jax.sampling import SamplingParams
from tests.util import random_model, tiny_config

# The penalty acts on every token of the row: forgotten tokens must not count.
PENALTY = SamplingParams(repetition_penalty=1.3)


SOME = ("*", "SWA", "M2")  # an array per token, a ring, recurrent state and convolutions


@pytest.fixture(scope="module", params=[SOME, pytest.param(tuple(KINDS), marks=pytest.mark.slow)])
def model(request) -> HybridLM:
    return random_model(tiny_config(request.param), jnp.float32)


def make(model: HybridLM, together: bool = True) -> Engine:
    return Engine(model, 1, capacity=128, prefill_chunk=64, together=together)


def answer(engine: Engine, request: Request) -> tuple[int, list[int], list[float]]:
    id, tokens, logprobs = engine.add(request), [], []
    while engine.busy:
        for event in engine.step():
            if isinstance(event, New):
                tokens += event.tokens
                logprobs += event.logprobs
    return id, tokens, logprobs


def words(seed: int, n: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 64, n).tolist()


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("new", [1, 12])
def test_a_row_that_went_back_is_like_a_fresh_one(model, together, new):
    """Marks in the middle and at the end of prompts, gone back to in any order."""
    engine, first = make(model, together), words(0, 30)
    ask: dict[str, Any] = dict(max_new_tokens=new, sampling=PENALTY, keep=True)
    id, _, _ = answer(engine, Request(first, marks=(9, 21), **ask))
    assert engine.marks(id) == [9, 21]
    steps = [  # back to, what is read there, marks from then on, what the row begins with
        (21, words(1, 12), (9, 21, 33), first[:21]),
        (21, words(2, 5), (9, 25), first[:21]),
        (9, words(3, 20), (), first[:9]),
    ]
    for back_to, prompt, marks, start in steps:
        request = Request(prompt, after=id, back_to=back_to, marks=marks, **ask)
        id, tokens, logprobs = answer(engine, request)
        _, expected, scores = answer(make(model), Request([*start, *prompt], **ask))
        assert tokens == expected
        np.testing.assert_allclose(logprobs, scores, atol=2e-4)
        assert engine.context(id) == [*start, *prompt, *tokens[:-1]]
        assert engine.marks(id) == sorted(marks)


def test_only_what_has_a_fixed_size_is_copied(model):
    engine = make(model)
    answer(engine, Request(words(0, 30), 1, keep=True, marks=(9,)))
    (mark,) = engine._buffers._marks[0].values()
    state = model.init_state(1, 128)
    kinds = model.config.layer_kinds
    for symbol, kept, whole in zip(kinds, mark.state.layers, state.layers, strict=True):
        for name in KINDS[symbol].appends:
            assert getattr(kept, name).size == 0 and getattr(whole, name).shape[1] == 128
    assert mark.state.nbytes() < state.nbytes()


def test_marks_that_a_row_does_not_have(model):
    with pytest.raises(ValueError, match="marks are for requests whose rows are kept"):
        Request([1, 2], marks=(1,))
    with pytest.raises(ValueError, match="back_to=1 needs after="):
        Request([1, 2], back_to=1)
    engine = make(model)
    with pytest.raises(ValueError, match="a mark at 3 is not in the prompt"):
        engine.add(Request([1, 2], keep=True, marks=(3,)))
    id, _, _ = answer(engine, Request(words(0, 30), 1, keep=True, marks=(9, 21)))
    with pytest.raises(ValueError, match=r"back_to=8 is not one of the marks \[9, 21\]"):
        engine.add(Request([1], after=id, back_to=8))
    with pytest.raises(ValueError, match="a mark at 21 is not in the prompt"):
        engine.add(Request([1], after=id, back_to=9, keep=True, marks=(21,)))
    with pytest.raises(ValueError, match="less than the 128 there is"):
        engine.grow(64)
    with pytest.raises(ValueError, match="max_position_embeddings=512"):
        engine.grow(1024)
    engine.release(id)
    assert engine._buffers._marks == [{}]
