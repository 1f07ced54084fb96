"""The laws of slots and pages: what a row becomes does not depend on where it lies, or beside whom.

One model with the options of all families, one device; what is compiled for it serves all tests.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmf_jax.engine import Request, sample, storage
from hmf_jax.engine.device import Device
from hmf_jax.engine.rows import map_appended
from hmf_jax.engine.scores import score_prompts
from hmf_jax.engine.turn import REASONS, Chunk, First, Load, Result, Save, Turn
from hmf_jax.options import RopeConfig
from hmf_jax.sampling import SamplingParams
from tests.util import mesh_of, place, random_model, tiny_config

QUICK, ALL = ("GKA", "*", "SWA"), ("GKA", "*", "GDN", "*", "M2", "BMF", "SWA")
CHUNK, PAGE, CAPACITY, SLOTS, PAGES = 16, 8, 64, 3, 24
ROPE = RopeConfig(llama_4_scaling_beta=0.1, original_max_position_embeddings=8)
RNG = np.random.default_rng(0)
LONG, SHORT = (RNG.integers(0, 64, n).tolist() for n in (37, 11))
RANDOM = SamplingParams(temperature=1.0, seed=3)
HOT = Request(LONG, max_new_tokens=9, sampling=RANDOM, prompt_logprobs=2, num_iter=3)
COLD = Request(SHORT, max_new_tokens=12)


@pytest.fixture(scope="module", params=[QUICK, pytest.param(ALL, marks=pytest.mark.slow)], ids=len)
def model(request):
    config = tiny_config(request.param, output_gate=True, qkv_bias=True, rope=ROPE)
    return random_model(config, jnp.float32)


def device_of(model, **changes: Any) -> Device:
    sizes = dict(slots=SLOTS, capacity=CAPACITY, pages=PAGES, page_size=PAGE, prefill_chunk=CHUNK)
    return Device(model, **{**sizes, **changes})


@pytest.fixture(scope="module")
def device(model) -> Device:
    return device_of(model)


class Play:
    """Turns of a device, and the books that a scheduler would keep."""

    def __init__(self, device: Device, page: int = PAGE, chunk: int = CHUNK) -> None:
        self.device, self.page, self.chunk = device, page, chunk
        self.asked: dict[int, Request] = {}
        self.tables: list[tuple[int, ...]] = [()] * device.slots
        self.tokens: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[float]] = {}
        self.scores: dict[int, list[float]] = {}
        self.ids: dict[int, int] = {}  # slot -> request that decodes there
        self.reasons: dict[int, str] = {}

    def turn(self, **parts: Any) -> Result:
        turn = Turn(0, tables=tuple(self.tables), **parts)
        for first in turn.firsts:
            self.ids[first.slot] = first.id
        result = self.device.collect(self.device.enqueue(turn, self.asked))
        for slot, id in list(self.ids.items()):
            self.tokens.setdefault(id, []).extend(result.tokens[slot])
            self.logprobs.setdefault(id, []).extend(result.logprobs[slot])
            if result.reasons[slot]:
                self.reasons[id] = REASONS[result.reasons[slot]]
                del self.ids[slot]
        if turn.chunk is not None and result.scores:
            self.scores.setdefault(turn.chunk.id, []).extend(result.scores)
        return result

    def read(self, id: int, request: Request, slot: int, pages: tuple[int, ...], upto=None, at=0):
        """Reads a prompt, or a part of it; if all of it, chooses the first token."""
        self.asked[id], self.tables[slot] = request, pages
        length = len(request.prompt)
        for start in range(at, length if upto is None else upto, self.chunk):
            count = min(self.chunk, length - start)
            last = start + count == length
            self.turn(
                chunk=Chunk(id, slot, start, count, self.chunk, pages, last),
                firsts=(First(id, slot),) if last else (),
            )

    def finish(self, steps: int = 5) -> Play:
        for _ in range(20):
            if not self.ids:
                return self
            self.turn(steps=steps)
        raise AssertionError(f"still running: {self.ids}")


def told(play: Play, id: int) -> tuple[Any, ...]:
    return play.tokens[id], play.logprobs[id], play.reasons[id]


def everything(device: Device, slot: int) -> list[np.ndarray]:
    """All leaves of a slot outside of pages."""
    return [np.asarray(x) for x in jax.tree.leaves(device._all.save(slot, True)())]


def pools(device: Device) -> list[np.ndarray]:
    layers = zip(device._all.rows.state.layers, device._all.appends, strict=True)
    return [np.asarray(getattr(layer, name)) for layer, names in layers for name in names]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return len(one) == len(other) and all(map(np.array_equal, one, other))


@pytest.fixture(scope="module")
def alone(device: Device) -> Play:
    """Both requests, one after the other, in pages in their order."""
    play = Play(device)
    play.read(0, HOT, 0, tuple(range(8)))
    play.finish()
    play.read(1, COLD, 1, tuple(range(8, 16)))
    return play.finish()


def test_equals_a_whole_forward_pass(model, alone: Play) -> None:
    """Greedy tokens and log-probabilities, those of the prompt included."""

    @jax.jit
    def logprobs(tokens, num_iter):
        return jax.nn.log_softmax(model(tokens, num_iter=num_iter)[0].astype(jnp.float32))[0]

    for id, request in ((0, HOT), (1, COLD)):
        row = [*request.prompt, *alone.tokens[id]]
        padded = np.zeros((1, 48), np.int32)
        padded[0, : len(row)] = row
        found = np.asarray(logprobs(padded, np.int32(request.num_iter or 30)))
        start = len(request.prompt) - 1
        scores = found[np.arange(len(row) - 1), row[1:]]
        np.testing.assert_allclose(alone.logprobs[id], scores[start:], atol=2e-4)
        if request is COLD:
            assert alone.tokens[id] == found[start : len(row) - 1].argmax(-1).tolist()
        else:
            np.testing.assert_allclose(alone.scores[id], scores[:start], atol=2e-4)
    assert alone.reasons == {0: "length", 1: "length"}


def test_neither_neighbours_nor_the_order_of_pages_matter(device: Device, alone: Play) -> None:
    order = np.random.default_rng(1).permutation(PAGES).tolist()
    play = Play(device)
    play.read(1, COLD, 2, tuple(order[:4]))
    play.read(2, dataclasses.replace(HOT, num_iter=30), 0, tuple(order[4:11]))
    play.turn(steps=2)
    play.read(0, HOT, 1, tuple(order[11:18]))
    play.finish(steps=3)
    assert [told(play, id) for id in (0, 1)] == [told(alone, id) for id in (0, 1)]
    assert told(play, 2)[1] != told(play, 0)[1]


def test_a_prefill_and_a_decode_leave_other_slots_alone(device: Device) -> None:
    play = Play(device)
    play.read(0, HOT, 0, tuple(range(7)), upto=32)
    before, pages = everything(device, 0), [pool[:7].copy() for pool in pools(device)]
    play.read(1, COLD, 1, tuple(range(8, 12)))
    play.finish()
    assert same(before, everything(device, 0))
    assert same(pages, [pool[:7] for pool in pools(device)])


def test_a_snapshot_brings_everything_back(device: Device, alone: Play) -> None:
    """Into another slot, through host memory, in other pages; in the middle of decoding, too."""
    play = Play(device)
    play.read(0, HOT, 0, tuple(range(7)), upto=32)
    play.turn(saves=(Save(0, 5, logits=True),))
    before = everything(device, 0)
    play.read(1, COLD, 0, tuple(range(8, 12)))  # takes the slot
    play.turn(loads=(Load(1, 5, 0, 32),), copies=((1, 20), (0, 21)))
    layers = len(jax.tree.leaves(device._all.save(1, True)()[0].state))
    assert same(before[:layers], everything(device, 1)[:layers])  # books begin anew
    play.read(0, HOT, 1, (21, 20, 2, 3, 4, 5, 6), at=32)
    play.turn(steps=2)
    pages, slot_of = (21, 20, 2, 3, 4, 5, 6), {0: 1, 1: 0}
    full = everything(device, 1)[:-1]  # without logits
    play.turn(
        ends=(1,), pages_out=tuple((page, 100 + i) for i, page in enumerate(pages)),
        saves=(Save(1, 6),),
    )  # fmt: skip
    assert play.ids.pop(slot_of[0]) == 0
    play.turn(snapshots_out=(6,), zeroed=pages)
    assert not any(pool[list(pages)].any() for pool in pools(device))
    play.read(2, COLD, 1, (20, 21, 2, 3))  # others take the slot and the pages
    play.turn(steps=1)
    new = (12, 13, 14, 15, 16, 17, 18)
    play.turn(
        snapshots_in=(6,), pages_in=tuple((100 + i, page) for i, page in enumerate(new)),
        loads=(Load(2, 6, 0, 40, resume=True),), dropped=(5,),
    )  # fmt: skip
    assert same(full, everything(device, 2)[:-1])
    play.ids[2], play.tables[2] = 0, new
    play.finish()
    assert told(play, 0) == told(alone, 0)
    assert told(play, 1) == told(play, 2) == told(alone, 1)


def test_equal_prompts_share_one_reading(device: Device, alone: Play) -> None:
    """A snapshot with logits needs no token more; each choice has its own seed."""
    play = Play(device)
    play.read(0, HOT, 0, tuple(range(7)), upto=32)
    play.turn(
        chunk=Chunk(0, 0, 32, 5, CHUNK, tuple(range(7)), True), cuts=(Save(0, 7, logits=True),),
        firsts=(First(0, 0),), steps=4,
    )  # fmt: skip
    other = dataclasses.replace(HOT, sampling=dataclasses.replace(RANDOM, seed=4))
    play.asked |= {1: HOT, 2: other}
    play.tables[1:] = [(8, 9, 10, 11, 12, 13), (14, 15, 16, 17, 18, 19)]
    copies = tuple((i, start + i) for start in (8, 14) for i in range(5))
    play.turn(
        copies=copies, loads=(Load(1, 7, 1, 37), Load(2, 7, 2, 37)),
        firsts=(First(1, 1), First(2, 2)), steps=4,
    )  # fmt: skip
    play.finish()
    assert told(play, 0) == told(play, 1) == told(alone, 0)
    assert told(play, 2)[0] != told(play, 1)[0]


def test_what_is_not_a_rows_never_reaches_it(device: Device, alone: Play) -> None:
    """NaN in all other pages, and in its own behind its tokens; a failed row fails alone."""
    rows = device._all.rows
    try:
        play = Play(device)
        poisoned = map_appended(
            lambda x: jax.device_put(jnp.full_like(x, jnp.nan), x.sharding),
            jax.tree.map(jnp.copy, rows),
            device._all.appends,
        )
        device._all.rows = poisoned
        play.read(0, HOT, 0, tuple(range(7)))
        play.read(1, COLD, 1, tuple(range(8, 12)))
        play.finish()
        assert [told(play, id) for id in (0, 1)] == [told(alone, id) for id in (0, 1)]
        play.turn(zeroed=tuple(range(PAGES)))
        assert not any(pool.any() for pool in pools(device))
    finally:
        play.turn(zeroed=tuple(range(PAGES)))


def test_ends_and_limits(device: Device, alone: Play) -> None:
    play = Play(device)
    ends = dataclasses.replace(COLD, eos_ids=alone.tokens[1][:1])
    full = dataclasses.replace(COLD, max_new_tokens=100)
    play.read(0, ends, 0, (0, 1))
    play.read(1, full, 1, tuple(range(8, 16)))
    play.read(2, full, 2, tuple(range(16, 24)))
    assert play.reasons == {0: "eos"} and len(play.tokens[0]) == 1
    play.turn(steps=3, ends=(2,))
    assert play.ids.pop(2) == 2 and len(play.tokens[2]) == 1
    play.finish(20)
    assert play.reasons[1] == "capacity" and len(play.tokens[1]) == CAPACITY - len(SHORT)


def test_settings_are_told(model) -> None:
    with pytest.raises(ValueError, match="page_size=0 must be at least 1"):
        device_of(model, page_size=0)


class Even:
    """Allows even tokens; an odd step allows all."""

    def __init__(self) -> None:
        self.taken: list[int] = []

    def mask(self) -> np.ndarray | None:
        return None if len(self.taken) % 2 else np.array([0x55555555] * 2, np.uint32)

    def accept(self, tokens) -> None:
        self.taken += tokens


@pytest.mark.slow
@pytest.mark.parametrize(("page", "read"), [(16, 16), (64, 16), (16, 2)])
def test_pages_equal_buffers(monkeypatch, model, alone: Play, page: int, read: int) -> None:
    """Whatever the size of a page, and however much of a row attention reads."""
    monkeypatch.setattr(storage, "READ", read)
    device = device_of(model, pages=SLOTS * CAPACITY // page, page_size=page)
    assert len(device._all.starts()) == (1 if read == 16 else 2)
    play, each = Play(device, page), CAPACITY // page
    play.read(1, COLD, 2, tuple(range(each)))
    play.read(0, HOT, 0, tuple(range(each, 2 * each)))
    play.finish()
    for id in (0, 1):
        assert told(play, id)[0] == told(alone, id)[0]
        np.testing.assert_allclose(
            told(play, id)[1], told(alone, id)[1], atol=0 if read == 16 else 1e-5
        )
    tokens, logprobs, *_ = sample(
        model, jnp.array([SHORT]), None, jax.random.key(0), steps=12, sampling={"temperature": 0}
    )
    assert tokens[0].tolist() == alone.tokens[1]
    np.testing.assert_allclose(logprobs[0], alone.logprobs[1], atol=1e-5)
    scores: Any
    ((scores, _),) = score_prompts(
        model, [HOT], top=0, capacity=CAPACITY, chunk=CHUNK, state=None, solver="chebyshev"
    )
    np.testing.assert_allclose(scores[1:], alone.scores[0], atol=1e-6)


@pytest.mark.slow
def test_one_program_for_everything(model, alone: Play) -> None:
    """After `warm` nothing is compiled, whatever is asked for; and the bits are those of others."""
    device = device_of(model, fixed=True)
    device.warm()
    compiled = device.compiled()
    play = Play(device)
    sampling = SamplingParams(
        temperature=0.7, top_k=5, seed=1, repetition_penalty=1.2, presence_penalty=0.5,
        logit_bias={5: -100.0, 6: 2.0},
    )  # fmt: skip
    extra = dataclasses.replace(
        COLD, sampling=sampling, min_new_tokens=3, top_logprobs=4, eos_ids=(1, 2), num_iter=2
    )
    even = dataclasses.replace(COLD, constraint=Even(), max_new_tokens=6)
    play.read(0, HOT, 0, tuple(range(7)))
    play.read(1, extra, 1, tuple(range(8, 12)))
    play.read(2, even, 2, tuple(range(12, 16)))
    assert isinstance(even.constraint, Even)
    for _ in range(8):
        even.constraint.taken = list(play.tokens[2])
        result = play.turn(steps=4)
        assert len(result.tokens[2]) <= 1
    assert all(token % 2 == 0 for token in play.tokens[2][::2]) and len(play.tokens[2]) == 6
    play.finish()
    assert told(play, 0) == told(alone, 0) and 5 not in play.tokens[1]
    # A turn that tells again that a row has ended, collected when the slot is another's.
    late = device.enqueue(Turn(0, tables=tuple(play.tables), steps=1), play.asked)
    play.asked[3], play.tables[0] = COLD, tuple(range(7))
    chunk = Chunk(3, 0, 0, len(SHORT), CHUNK, play.tables[0], True)
    turn = Turn(1, chunk=chunk, firsts=(First(3, 0),), tables=tuple(play.tables), steps=4)
    new = device.enqueue(turn, play.asked)
    assert device.collect(late).reasons[0] and device._asked[0] is COLD
    play.tokens[3] = list(device.collect(new).tokens[0])
    assert play.tokens[3] == alone.tokens[1][:5]
    play.read(3, COLD, 0, tuple(range(7)))
    play.tokens[3] = play.tokens[3][5:]
    play.turn(saves=(Save(0, 0, True), Save(0, 1)), ends=(0,), steps=2)
    play.ids.clear()
    play.turn(snapshots_out=(0,), pages_out=((1, 1),), copies=((0, 1),), zeroed=(3,))
    play.turn(snapshots_in=(0,), pages_in=((1, 2),), loads=(Load(1, 0, 3, 11), Load(2, 1, 3, 11)))
    assert device.compiled() == compiled
    result = play.turn(firsts=(First(3, 1),))
    assert result.tokens[1] == play.tokens[3][:1]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [dict(tp=2), dict(dp=2)], ids=["tp2", "dp2"])
def test_a_mesh(model, alone: Play, sizes: dict[str, int]) -> None:
    """Keys and values are split by heads, or pages like rows: slot 0 has the first half of them."""
    mesh = mesh_of(sizes)
    device = device_of(place(model, model.config, mesh), slots=4)
    play = Play(device)
    play.read(0, HOT, 0, tuple(range(7)))
    play.read(1, COLD, 3, tuple(range(12, 19)))
    play.turn(steps=2)
    play.turn(ends=(3,), saves=(Save(3, 0),), pages_out=tuple((12 + i, i) for i in range(7)),
              snapshots_out=())  # fmt: skip
    play.turn(snapshots_out=(0,))
    play.turn(snapshots_in=(0,), pages_in=tuple((i, 17 + i) for i in range(7)),
              loads=(Load(2, 0, 1, 11, resume=True),))  # fmt: skip
    play.ids[2] = play.ids.pop(3)
    play.tables[2], play.tables[3] = tuple(range(17, 24)), ()
    play.finish()
    for id in (0, 1):
        assert told(play, id)[0] == told(alone, id)[0]
        np.testing.assert_allclose(told(play, id)[1], told(alone, id)[1], atol=1e-4)


@pytest.mark.slow
def test_growing_keeps_everything(model, alone: Play) -> None:
    device = device_of(model, capacity=40, pages=10)
    play = Play(device)
    play.read(0, HOT, 0, tuple(range(5)))
    play.read(1, COLD, 1, tuple(range(5, 8)), upto=0)
    play.turn(saves=(Save(0, 0),))
    device.grow(CAPACITY, 30)
    play.turn(ends=(0,), loads=(Load(2, 0, 0, 37, resume=True),))
    play.ids[2] = play.ids.pop(0)
    play.tables[0], play.tables[2] = (), (0, 1, 2, 3, 4, 25)
    play.finish()
    assert told(play, 0)[0] == told(alone, 0)[0]
    np.testing.assert_allclose(told(play, 0)[1], told(alone, 0)[1], atol=1e-5)
