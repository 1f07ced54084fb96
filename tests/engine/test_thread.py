"""An engine in its own thread: every request ends once, whatever happens."""

from __future__ import annotations

import threading

import jax.numpy as jnp
import pytest

from hmf_jax import HybridConfig, HybridLM
from hmf_jax.engine import Engine, EngineThread, Finished, New, Request


class Heard:
    """Events by request."""

    def __init__(self):
        self.events, self.all = [], threading.Condition()

    def __call__(self, events):
        with self.all:
            self.events += events
            self.all.notify_all()

    def ends(self, ids):
        def done():
            return {e.id for e in self.events if isinstance(e, Finished)} >= set(ids)

        with self.all:
            assert self.all.wait_for(done, 60)
        return {e.id: e.reason for e in self.events if isinstance(e, Finished)}

    def tokens(self, id):
        return [t for e in self.events if isinstance(e, New) and e.id == id for t in e.tokens]


@pytest.fixture(scope="module")
def model():
    config = HybridConfig.preset("tiny", layer_kinds=("GKA", "*"), vocab_size=64, hidden_size=32)
    return HybridLM.init(config, dtype=jnp.float32)


def make(model, rows=2):
    heard = Heard()
    return EngineThread(Engine(model, rows, capacity=256, prefill_chunk=64), heard), heard


def test_answers_are_those_of_generate_and_each_ends_once(model):
    thread, heard = make(model)
    prompts = [[5, 6, 7], [8, 9], [3] * 20]
    ids = [thread.submit(Request(prompt, 6)) for prompt in prompts]
    thread.start()
    assert set(heard.ends(ids).values()) == {"length"}
    wanted = model.generate(prompts, max_new_tokens=6, slots=2, capacity=256, prefill_chunk=64)
    assert [heard.tokens(id) for id in ids] == [output.tokens for output in wanted]
    thread.cancel(ids[0])  # has ended: nothing happens
    assert thread.call(lambda engine: engine.busy).result(60) is False
    assert thread.stop(60) and not thread.alive
    assert len([e for e in heard.events if isinstance(e, Finished)]) == len(ids)


def test_what_has_not_ended_is_ended_by_stop(model):
    thread, heard = make(model, rows=1)
    ids = [thread.submit(Request([5, 6], 200)) for _ in range(3)]
    thread.cancel(ids[2])
    thread.start()
    assert heard.ends(ids[2:])[ids[2]] == "stop"
    assert thread.stop(60)
    assert heard.ends(ids) == dict.fromkeys(ids, "stop")
    with pytest.raises(RuntimeError, match="has stopped"):
        thread.submit(Request([5], 1))
    thread.cancel(ids[0])


def test_a_failed_turn_ends_its_requests_and_the_engine_starts_over(model, monkeypatch):
    thread, heard = make(model)
    step = thread.engine.step

    def once(steps):
        monkeypatch.setattr(thread.engine, "step", step)
        thread.engine._broken = "ZeroDivisionError: division by zero"
        return 1 / 0

    monkeypatch.setattr(thread.engine, "step", once)
    ids = [thread.submit(Request([5, 6], 4)) for _ in range(3)]
    thread.start()
    assert heard.ends(ids) == dict.fromkeys(ids, "error")
    first = next(e for e in heard.events if isinstance(e, Finished))
    assert "ZeroDivisionError" in str(first.error)
    more = thread.submit(Request([5, 6], 4))
    assert heard.ends([more])[more] == "length"
    assert thread.stop(60) and thread.error is None


def test_failures_again_and_again_end_the_thread(model, monkeypatch):
    thread, heard = make(model)
    monkeypatch.setattr(thread.engine, "step", lambda steps: 1 / 0)
    thread.start()
    for _ in range(3):
        id = thread.submit(Request([5, 6], 4))
        assert heard.ends([id])[id] == "error"
    assert thread.stop(60)
    assert isinstance(thread.error, ZeroDivisionError)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        thread.submit(Request([5], 1))


def test_bad_requests_are_refused_where_they_are_made(model):
    thread, _ = make(model)
    with pytest.raises(ValueError, match="outside the vocabulary"):
        thread.submit(Request([10**6], 1))
    with pytest.raises(ValueError, match="no room"):
        thread.submit(Request([1] * 256, 1))
