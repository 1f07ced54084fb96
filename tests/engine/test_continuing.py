"""Prompts that begin like earlier ones go on from there, and are answered as if from nothing."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from hmf_jax.engine import Engine, Finished, New, Request, Started
from hmf_jax.mixers import KINDS
from hmf_jax.model import HybridLM
from hmf_jax.sampling import SamplingParams
from tests.util import mesh_of, random_model, tiny_config

# The penalty acts on every token of the row: forgotten tokens must not count.
PENALTY = SamplingParams(repetition_penalty=1.3)
SOME = ("*", "SWA", "M2")  # an array per token, a ring, recurrent state and convolutions


@pytest.fixture(scope="module", params=[SOME, pytest.param(tuple(KINDS), marks=pytest.mark.slow)])
def model(request) -> HybridLM:
    return random_model(tiny_config(request.param), jnp.float32)


def make(model: HybridLM, slots: int = 1, **options: Any) -> Engine:
    usual = {"capacity": 128, "prefill_chunk": 64, "page_size": 64, "pages": 8 * slots}
    options = {**usual, "prefixes": "fast", "spacing": 4, **options}
    return Engine(model, slots, **options)


def answer(engine: Engine, *args: Any, **ask: Any) -> tuple[int, list[int], list[float]]:
    """How much was there already, the new tokens and their log-probabilities."""
    engine.add(Request(*args, **{"sampling": PENALTY, **ask}))
    cached, tokens, logprobs = 0, [], []
    while engine.busy:
        for event in engine.step():
            if isinstance(event, Started):
                cached = event.cached
            elif isinstance(event, New):
                tokens += event.tokens
                logprobs += event.logprobs
    return cached, tokens, logprobs


def words(seed: int, n: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, 64, n).tolist()


def check(model: HybridLM, engine: Engine, prompt: list[int], cached: int, **ask: Any) -> list[int]:
    """The answer is that of an engine that has read nothing before."""
    held, tokens, logprobs = answer(engine, prompt, 12, **ask)
    _, expected, scores = answer(make(model, prefixes="off"), prompt, 12)
    assert held == cached and tokens == expected
    np.testing.assert_allclose(logprobs, scores, atol=2e-4)
    return tokens


def test_going_back_and_going_on(model):
    """To cuts in the middle and at the end of prompts, in any order, and after an answer."""
    engine, first = make(model), words(0, 30)
    check(model, engine, first, 0, cuts=(9, 21))
    check(model, engine, [*first[:21], *words(1, 12)], 21)
    again = [*first[:21], *words(2, 5)]
    tokens = check(model, engine, again, 21, cuts=(25,))
    check(model, engine, [*first[:9], *words(3, 20)], 9)
    # The newest token of an answer has not been read.
    check(model, engine, [*again, *tokens, *words(4, 3)], len(again) + len(tokens) - 1)
    check(model, engine, again, 25)


def test_going_on_from_an_answer_that_was_ended(model):
    engine, prompt = make(model), words(5, 11)
    id = engine.add(Request(prompt, 50, cuts=(9,)))
    tokens: list[int] = []
    while len(tokens) < 6:
        tokens += [t for e in engine.step(5) if isinstance(e, New) for t in e.tokens]
    engine.abort(id)
    ends = [e for _ in range(3) for e in engine.step(5) if isinstance(e, Finished)]
    assert ends == [Finished(id, "stop")] and not engine.busy
    check(model, engine, [*prompt, *words(6, 7)], 9)


@pytest.mark.slow
def test_more_room(model):
    """What was read before stays."""
    engine, first = make(model, capacity=64), words(0, 30)
    answer(engine, first, 12, cuts=(21,))
    engine.grow(128)
    assert engine.capacity == 128
    check(model, engine, [*first[:21], *words(1, 60)], 21)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [dict(tp=2), dict(dp=2)], ids=["tp2", "dp2"])
def test_engines_of_a_mesh_go_back_and_grow(sizes):
    config = tiny_config(SOME)
    spread = HybridLM.init(config, dtype=jnp.float32, mesh=mesh_of(sizes))
    alone = HybridLM.init(config, dtype=jnp.float32)
    first, engine = words(0, 30), make(spread, capacity=64)
    answer(engine, first, 12, cuts=(9, 21))
    engine.grow(128)
    check(alone, engine, [*first[:21], *words(1, 12)], 21)
    with pytest.raises(ValueError, match="only with one group") if "dp" in sizes else nullcontext():
        make(spread, 2, capacity=64).grow(128)
