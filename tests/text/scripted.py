"""Replies that are known beforehand, as if a model had generated them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import pytest

from hmf_jax.engine import Engine, Finished, New


def script(monkeypatch: pytest.MonkeyPatch, replies: Sequence[Sequence[int]]) -> None:
    """Makes engines "generate" given tokens, whatever the model says (what they keep included)."""
    add, step, rest = Engine.add, Engine.step, iter(replies)
    scripted: dict[int, tuple[list[int], Sequence[int]]] = {}

    def scripted_add(engine, request, id=None):
        reply = list(next(rest))
        # A prompt that goes on with reply[:-1] leaves an engine as generating the reply would.
        prompt = [*request.prompt, *reply[:-1]]
        id = add(engine, dataclasses.replace(request, prompt=prompt, max_new_tokens=1), id)
        scripted[id] = reply, request.eos_ids
        return id

    def scripted_step(engine, steps=64):
        out = []
        for event in step(engine, steps):
            reply, ends = scripted[event.id]
            if isinstance(event, New):
                event = New(event.id, reply, [0.0] * len(reply))
            elif isinstance(event, Finished):
                event = Finished(event.id, "eos" if reply[-1] in ends else "length")
            out.append(event)
        return out

    monkeypatch.setattr(Engine, "add", scripted_add)
    monkeypatch.setattr(Engine, "step", scripted_step)
