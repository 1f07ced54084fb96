"""The scheduler alone: no model, no device; a fake device ends rows at random."""

from __future__ import annotations

import ast
import contextlib
import inspect
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmf_jax.engine import old_scheduler as module
from hmf_jax.engine.old_scheduler import Feed, Finished, New, Result, Scheduler, Started, Turn


def result(rows: int, ended: dict[int, int], produced: dict[int, list[int]]) -> Result:
    tokens = [produced.get(row, []) for row in range(rows)]
    return Result(tokens, [[0.0] * len(t) for t in tokens], [ended.get(r, 0) for r in range(rows)])


def test_first_come_first_served():
    now = 10.0
    scheduler = Scheduler(1, clock=lambda: now)
    scheduler.submit(7)
    scheduler.submit(8)
    now = 12.5
    turn = scheduler.plan(8)
    assert turn == Turn(Feed((7,), (0,), True, (False,)))
    assert scheduler.commit(turn, result(1, {}, {0: [5]})) == [Started(7, 2.5), New(7, [5], [0.0])]
    turn = scheduler.plan(8)
    assert turn == Turn(None, (), 8)
    events = scheduler.commit(turn, result(1, {0: 2}, {0: [1, 2]}))
    assert events == [New(7, [1, 2], [0.0, 0.0]), Finished(7, "length")]
    assert scheduler.plan(8) == Turn(Feed((8,), (0,), True, (False,)))


def test_together():
    scheduler = Scheduler(4, together=True)
    for id in range(3):
        scheduler.submit(id)
    assert scheduler.plan(1) == Turn(Feed((0, 1, 2), (0, 1, 2), False, (False,) * 3))


def test_cancel_everywhere():
    scheduler = Scheduler(2)
    scheduler.submit(0, keep=True)
    scheduler.submit(1)
    scheduler.cancel(1)  # in the queue
    turn = scheduler.plan(1)
    assert scheduler.commit(turn, result(2, {}, {0: [3]}))[0] == Finished(1, "stop")
    scheduler.cancel(0)  # running
    scheduler.cancel(0)  # once is enough
    assert scheduler.plan(1) is None
    assert scheduler.commit(None, None) == [Finished(0, "stop")]
    assert scheduler.held == {0: 0} and not scheduler.busy
    scheduler.cancel(0)  # ended
    assert not scheduler.busy
    scheduler.submit(2)
    assert scheduler.plan(1) == Turn(Feed((2,), (1,), True, (False,)))
    assert scheduler.plan(5) == Turn(None, (0,), 5)  # the device would still decode it
    assert scheduler.plan(5) == Turn(None, (), 5)


def test_a_row_that_is_fed_again_is_not_ended():
    scheduler = Scheduler(1)
    scheduler.submit(0)
    scheduler.plan(1)
    scheduler.cancel(0)
    scheduler.submit(1)
    assert scheduler.plan(1) == Turn(Feed((1,), (0,), True, (False,)))
    assert scheduler.plan(1) == Turn(None, (), 1)


def test_a_held_row_waits_for_its_successor():
    scheduler = Scheduler(1, held=[5])
    scheduler.submit(6)
    assert scheduler.plan(1) is None  # no row is free
    scheduler.submit(7, after=5)
    with pytest.raises(ValueError, match="request 5 is not held"):
        scheduler.submit(8, after=5)
    with pytest.raises(ValueError, match="in the queue comes after it"):
        scheduler.release(5)
    scheduler.cancel(7)
    scheduler.submit(9, after=5, keep=True)  # overtakes: nobody else can have its row
    assert scheduler.plan(1) == Turn(Feed((9,), (0,), True, (True,)))
    scheduler.commit(Turn(), result(1, {0: 1}, {}))
    scheduler.release(9)
    assert scheduler.plan(1) == Turn(Feed((6,), (0,), True, (False,)))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), rows=st.integers(1, 5), together=st.booleans())
def test_every_request_ends_exactly_once(seed: int, rows: int, together: bool):
    """And no row serves two requests at a time, whatever comes, is cancelled or follows what."""
    chance = random.Random(seed)
    scheduler = Scheduler(rows, together=together)
    owner: dict[int, int] = {}
    ended: dict[int, str] = {}
    cancelled: set[int] = set()
    submitted = 0
    while submitted < 30 or scheduler.busy:
        for _ in range(chance.randrange(4) if submitted < 30 else 0):
            held = list(scheduler.held)
            after = chance.choice(held) if held and chance.random() < 0.7 else None
            try:
                scheduler.submit(submitted, after=after, keep=chance.random() < 0.3)
            except ValueError:  # it has a successor already
                continue
            submitted += 1
        if submitted and chance.random() < 0.2:
            cancelled.add(id := chance.randrange(submitted))
            scheduler.cancel(id)
        if submitted >= 30:
            for id in scheduler.held:
                with contextlib.suppress(ValueError):  # one that comes after it waits
                    scheduler.release(id)
        turn = scheduler.plan(1)
        if turn is not None:
            for row in turn.ends:
                owner.pop(row, None)
            for id, row in zip(turn.feed.ids, turn.feed.rows, strict=True) if turn.feed else ():
                assert row not in owner or owner[row] in cancelled
                owner[row] = id
            assert turn.feed is None or not turn.steps
        fed = turn.feed.rows if turn and turn.feed else ()
        runs = [row for row in owner if row in fed or (turn and turn.steps)]
        done = {row: chance.randrange(1, 4) for row in runs if chance.random() < 0.4}
        got = None if turn is None else result(rows, done, {row: [1] for row in runs})
        for event in scheduler.commit(turn, got):
            if isinstance(event, Finished):
                assert event.id not in ended
                ended[event.id] = event.reason
        for row in done:
            del owner[row]
    assert sorted(ended) == list(range(submitted))


def test_it_is_plain_python():
    """Scheduling can be replayed and tested without a device."""
    tree = ast.parse(inspect.getsource(module))
    imported = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
    imported |= {n.module or "" for n in ast.walk(tree) if isinstance(n, ast.ImportFrom)}
    assert imported == {
        "__future__",
        "collections",
        "dataclasses",
        "time",
        "collections.abc",
        "typing",
        "hmf_jax.engine.turn",  # plain Python, too
    }
