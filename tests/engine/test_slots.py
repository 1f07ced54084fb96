"""Many prompts in few rows: what each becomes does not depend on who shared the batch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmf_jax import HybridConfig, HybridLM, make_mesh
from hmf_jax.engine import generate
from hmf_jax.sampling import SamplingParams

VOCAB = 64
SIZES: dict[str, Any] = dict(capacity=128, prefill_chunk=64)
SLOTS: dict[str, Any] = dict(slots=3, **SIZES)  # shared, as programs are


@pytest.fixture(scope="module")
def model() -> HybridLM:
    config = HybridConfig.preset("tiny", layer_kinds=("GKA", "*"), vocab_size=VOCAB, hidden_size=32)
    return HybridLM.init(config, dtype=jnp.float32)


def test_slots_change_nothing(model: HybridLM) -> None:
    """Seven prompts of all lengths, limits, end tokens, num_iter and samplings in three rows."""
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB, n).tolist() for n in (5, 40, 1, 60, 17, 3, 64)]
    options: dict[str, Any] = dict(
        max_new_tokens=[9, 1, 64, 20, 70, 2, 33],
        sampling=[
            SamplingParams(temperature=t, seed=s) for s, t in enumerate([0, 1, 0, 1, 2, 0, 1])
        ],
        eos_ids=[[], [3], [], list(range(8)), [], [], [1, 2]],
        num_iter=[30, 30, 2, 30, 30, 5, 30],
        logprobs=True,
    )
    together = generate(model, prompts, **options, **SIZES)
    assert {g.finish_reason for g in together} == {"length", "eos"}
    in_slots = generate(model, prompts, **options, **SLOTS)
    assert [(g.tokens, g.finish_reason) for g in in_slots] == [
        (g.tokens, g.finish_reason) for g in together
    ]
    for a, b in zip(in_slots, together, strict=True):
        np.testing.assert_allclose(a.logprobs or [], b.logprobs or [], atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [dict(tp=2), dict(dp=2)], ids=["tp2", "dp2"])
def test_slots_of_a_mesh(model: HybridLM, sizes: dict[str, int]) -> None:
    mesh = make_mesh(**sizes, devices=jax.devices()[:2])
    spread = HybridLM.init(model.config, dtype=jnp.float32, mesh=mesh)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    options: dict[str, Any] = dict(max_new_tokens=8, capacity=128, prefill_chunk=64, eos_ids=())
    assert generate(spread, prompts, slots=2, **options) == generate(model, prompts, **options)


def test_alone_as_with_others(model: HybridLM) -> None:
    """Slots are there whether anybody uses them or not, so that not even a last bit differs."""
    options: dict[str, Any] = dict(SLOTS, logprobs=True, prompt_logprobs=2, eos_ids=())
    prompts = [[1, 2, 3], [9] * 70, [4, 5], [7] * 30]
    together = generate(model, prompts, max_new_tokens=[30, 9, 40, 11], **options)
    for prompt, expected in zip(prompts[:2], together, strict=False):
        count = len(expected.tokens)
        assert generate(model, [prompt], max_new_tokens=count, **options) == [expected]
    # Read as a prompt, an answer has the log-probabilities that it was made with.
    again = [*prompts[0], *together[0].tokens]
    (read,) = generate(model, [again], max_new_tokens=1, **options)
    assert read.prompt_logprobs is not None and read.prompt_top_logprobs is not None
    assert read.prompt_logprobs[0] is None and len(read.prompt_top_logprobs) == len(again)
    scores = read.prompt_logprobs[len(prompts[0]) :]
    np.testing.assert_allclose(scores, together[0].logprobs or [], atol=1e-4)  # type: ignore[arg-type]


def test_a_row_is_as_full_as_it_may_be(model: HybridLM) -> None:
    (one,) = generate(model, [[1] * 122], max_new_tokens=50, eos_ids=(), **SLOTS)
    assert (len(one.tokens), one.finish_reason) == (6, "capacity")


def test_bad_input(model: HybridLM) -> None:
    with pytest.raises(ValueError, match="slots=0"):
        generate(model, [[1]], slots=0)
    with pytest.raises(ValueError, match="Prompt 1 has 300 tokens"):
        generate(model, [[1], [1] * 300], slots=1, capacity=256)
