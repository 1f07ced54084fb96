"""The engine with everything on: prefixes, few pages, priorities. What a request becomes is always
what it becomes alone."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from hmf_jax import HybridConfig, HybridLM
from hmf_jax.engine import Engine, Finished, New, Request, Scored, Started, device
from hmf_jax.engine.replay import replay
from hmf_jax.sampling import SamplingParams

VOCAB, CHUNK, CAPACITY = 64, 64, 256
SIZES: dict[str, Any] = dict(capacity=CAPACITY, pages=24, prefill_chunk=CHUNK, page_size=32)


@pytest.fixture(scope="module")
def model() -> HybridLM:
    config = HybridConfig.preset("tiny", layer_kinds=("GKA", "*"), vocab_size=VOCAB, hidden_size=32)
    return HybridLM.init(config, dtype=jnp.float32)


def words(seed: int, n: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, n).tolist()


def run(engine: Engine, asked: list[Request], steps: int = 8) -> list[dict[str, Any]]:
    """What becomes of these requests, in order."""
    ids = [engine.add(request) for request in asked]
    found: dict[int, dict[str, Any]] = {
        id: dict(tokens=[], logprobs=[], ends=[], cached=None, scores=[]) for id in ids
    }
    while engine.busy:
        for event in engine.step(steps):
            one = found[event.id]
            if isinstance(event, Started):
                one["cached"] = event.cached
            elif isinstance(event, New):
                one["tokens"] += event.tokens
                one["logprobs"] += event.logprobs
            elif isinstance(event, Scored):
                one["scores"] += event.logprobs
            elif isinstance(event, Finished):
                one["ends"].append(event.reason)
    assert all(len(one["ends"]) == 1 for one in found.values())
    return [found[id] for id in ids]


def same(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> None:
    for one, other in zip(a, b, strict=True):
        assert one["tokens"] == other["tokens"] and one["logprobs"] == other["logprobs"]
        assert one["ends"] == other["ends"]


def mixture() -> list[Request]:
    """Prompts that share beginnings, some equal; greedy and sampled, short and long."""
    shared, rng = words(0, 150), np.random.default_rng(1)
    prompts = [
        shared[: rng.integers(1, 150)] + words(i, int(rng.integers(1, 40))) for i in range(12)
    ]
    prompts += [shared[:140], shared[:140], shared[:128], shared[:129]]
    asked = []
    for i, prompt in enumerate(prompts):
        long = 60 * (i in (3, 9, 10))
        hot = SamplingParams(temperature=i % 3 / 2, seed=i, repetition_penalty=1 + i % 2 / 5)
        asked.append(Request(prompt, 1 + 5 * (i % 5) + long, hot, num_iter=(None, 3)[i % 4 == 3]))
    return asked


@pytest.fixture(scope="module")
def alone(model):
    """The mixture, each request by itself in an engine that keeps nothing."""
    engine = Engine(model, 3, **SIZES)
    return [run(engine, [request])[0] for request in mixture()]


@pytest.mark.parametrize("prefixes", ["off", "exact"])
def test_load_and_prefixes_change_no_bit(model, alone, prefixes) -> None:
    engine = Engine(model, 3, prefixes=prefixes, spacing=1, **SIZES)
    same(run(engine, mixture()), alone)
    again = run(engine, mixture())
    same(again, alone)
    stats = engine.stats()
    assert stats.running == stats.waiting == stats.swapped == 0
    hits = sum(one["cached"] > 0 for one in again)
    assert hits > 5 if prefixes == "exact" else not any(stats.entries.values())


def test_few_pages_and_host_memory_change_no_bit(model, alone, monkeypatch) -> None:
    """Rows are swapped out, and prefixes go to host memory and come back; and a recording of all
    that leads to the same turns again. As on a GPU, programs decode a number of tokens that is
    known when they are compiled."""
    monkeypatch.setattr(device, "loops_without_waiting", lambda: False)
    lines: list[str] = []
    few: dict[str, Any] = {**SIZES, "pages": 9}
    engine = Engine(
        model, 3, prefixes="exact", prefix_bytes=10**6, host_bytes=10**9, spacing=1,
        record=lines.append, threaded=True, **few,
    )  # fmt: skip
    asked = [dataclasses.replace(r, priority=i % 3) for i, r in enumerate(mixture())]
    for _ in range(2):
        same(run(engine, asked), alone)
    stats = engine.stats()
    assert stats.preemptions > 0 and stats.evictions["device"] > 0
    engine.reset_prefixes()
    while engine.busy:
        engine.step()
    stats = engine.stats()
    assert stats.pages["free"] == 9 and not any(stats.entries.values())
    assert replay(lines) > 50


def test_fast_prefixes_hit_anywhere(model, alone) -> None:
    engine = Engine(model, 3, prefixes="fast", spacing=1, **SIZES)
    run(engine, mixture())
    found = run(engine, mixture())
    for one, other in zip(found, alone, strict=True):
        assert one["tokens"] == other["tokens"]
        np.testing.assert_allclose(one["logprobs"], other["logprobs"], atol=2e-4)
    prompt = words(7, 50)
    (first,) = run(engine, [Request(prompt, 5)])
    (more,) = run(engine, [Request(prompt + first["tokens"] + [3, 4], 5)])
    assert more["cached"] == len(prompt) + 4  # all but the newest token of the reply


def test_namespaces_share_nothing(model) -> None:
    engine = Engine(model, 3, prefixes="fast", spacing=1, **SIZES)
    prompt = words(3, 130)
    run(engine, [Request(prompt, 2)])
    others: list[dict[str, Any]] = [dict(namespace="b"), dict(num_iter=2)]
    for other in others:
        (found,) = run(engine, [Request([*prompt, 1], 2, **other)])
        assert found["cached"] == 0
    (found,) = run(engine, [Request([*prompt, 1], 2)])
    assert found["cached"] >= 128


def test_scores_of_prompts_and_none_of_new_tokens(model) -> None:
    engine = Engine(model, 3, prefixes="exact", spacing=1, **SIZES)
    prompts = [words(1, 130), words(2, 64), [5]]
    found = run(engine, [Request(p, 0, prompt_logprobs=0) for p in prompts])
    wanted = model.generate(prompts, max_new_tokens=1, prompt_logprobs=True)
    for one, output in zip(found, wanted, strict=True):
        np.testing.assert_allclose(one["scores"], output.prompt_logprobs[1:], atol=1e-5)
        assert one["tokens"] == [] and one["ends"] == ["length"]


class Only:
    """A constraint: the tokens of a list, one after the other, then anything."""

    def __init__(self, tokens: list[int]):
        self.left = list(tokens)

    def mask(self):
        if not self.left:
            return None
        bits = np.zeros(VOCAB, np.uint8)
        bits[self.left[0]] = 1
        return np.packbits(bits, bitorder="little").view(np.uint32)

    def accept(self, tokens):
        self.left = self.left[len(tokens) :]


def test_constraints_decide_token_by_token(model, alone) -> None:
    engine = Engine(model, 3, **SIZES)
    asked = mixture()
    wanted = [9, 8, 7, 6, 5]
    bound = Request(asked[3].prompt, 8, constraint=Only(wanted))
    found = run(engine, [*asked[:3], bound, *asked[3:6]])
    assert found[3]["tokens"][:5] == wanted and len(found[3]["tokens"]) == 8
    same(found[:3] + found[4:], alone[:6])


def test_cancelled_requests_free_everything(model, alone) -> None:
    engine = Engine(model, 3, prefixes="exact", spacing=1, **SIZES)
    asked = [dataclasses.replace(request, max_new_tokens=60) for request in mixture()[:8]]
    rng, ids, ended = np.random.default_rng(0), [engine.add(r) for r in asked], []
    while engine.busy:
        ended += [e for e in engine.step(4) if isinstance(e, Finished)]
        if rng.random() < 0.4:
            engine.abort(int(rng.choice(ids)))
    assert sorted(e.id for e in ended) == ids
    stats = engine.stats()
    assert stats.pages["held"] == 0 and stats.slots["free"] == 3
    same(run(engine, mixture()), alone)


def test_growing_keeps_what_was_read(model) -> None:
    engine = Engine(model, 3, prefixes="fast", spacing=1, **SIZES)
    prompt = words(5, 100)
    (first,) = run(engine, [Request(prompt, 5)])
    engine.grow(288)
    longer = prompt + first["tokens"] + words(6, 160)
    (found,) = run(engine, [Request(longer, 5)])
    assert found["cached"] == 104
    assert found["tokens"] == model.generate([longer], max_new_tokens=5)[0].tokens
    with pytest.raises(ValueError, match="less than"):
        engine.grow(64)


def test_after_an_exception_it_starts_over(model, monkeypatch) -> None:
    engine = Engine(model, 3, **SIZES)
    ids = [engine.add(Request([1, 2], 3)) for _ in range(3)]
    assert engine.tokens(ids[0]) == [1, 2]
    monkeypatch.setattr(engine._device, "enqueue", lambda *a: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        engine.step()
    with pytest.raises(RuntimeError, match=r"ZeroDivisionError.*recover"):
        engine.step()
    ended = engine.recover()
    assert [(e.id, e.reason) for e in ended if isinstance(e, Finished)] == [
        (i, "error") for i in ids
    ]
    (found,) = run(engine, [Request([1, 2], 3)])
    assert found["ends"] == ["length"]
