"""Which engine a request goes to, with engines that do nothing."""

from concurrent.futures import Future
from typing import Any

import pytest

from hmf_jax.engine import Request
from hmf_jax.engine.turn import Finished, New, Started
from hmf_jax.serving.router import BLOCK, SLACK, Router


class Nobody:
    """A thread of an engine in which everything waits until `finish`."""

    def __init__(self, deliver):
        self.deliver, self.engine, self.error, self.alive = deliver, object(), None, True
        self.requests: list[Request] = []
        self.cancelled: list[int] = []
        self.beat, self.started = 0.0, False

    def start(self):
        self.started = True

    def submit(self, request):
        if request.num_iter == 1000:
            raise ValueError("no such layers")
        self.requests.append(request)
        return len(self.requests) - 1

    def cancel(self, id):
        self.cancelled.append(id)

    def call(self, function):
        future: Future[Any] = Future()
        future.set_result(function(self.engine))
        return future

    def stop(self, timeout=None):
        self.alive = False
        return True

    def finish(self, *ids):
        self.deliver([Finished(id, "eos") for id in ids])


def router(count=2):
    events: list[Any] = []
    made = Router([Nobody] * count, events.append)
    threads: list[Any] = list(made.threads)
    return made, threads, events


def prompt(start, blocks=4, more=0):
    return Request([start + i for i in range(blocks * BLOCK + more)])


def test_requests_spread_and_events_carry_the_ids_of_submit():
    door, (a, b), events = router()
    ids = [door.submit(prompt(10_000 * i)) for i in range(4)]
    assert len(set(ids)) == 4 and door.loads == [2, 2]
    a.deliver([Started(0, 0.1), New(0, [7], [-1.0])])
    b.deliver([Started(0, 0.2)])
    b.finish(1)
    assert [[e.id for e in turn] for turn in events] == [[ids[0]] * 2, [ids[1]], [ids[3]]]
    assert door.loads == [2, 1]
    door.cancel(ids[3])
    assert (a.cancelled, b.cancelled) == ([], [1])


def test_a_conversation_stays_where_its_beginning_was_read():
    door, (a, b), _ = router()
    door.submit(prompt(0, 1))  # keeps the first engine busy
    conversation = door.submit(prompt(50_000))
    assert conversation % 2 == 1
    b.finish(0)
    for turn in range(1, 4):
        assert door.submit(prompt(50_000, 4 + turn)) % 2 == 1  # also while it is the busier one
    assert door.loads == [1, 3]


def test_not_where_there_is_much_more_to_do():
    door, _, _ = router()
    chosen = [door.submit(prompt(0)) % 2 for _ in range(40)]
    assert chosen[: SLACK + 1] == [0] * (SLACK + 1) and 1 in chosen
    low, high = sorted(door.loads)
    assert high <= 1.5 * low + SLACK + 1


def test_the_longest_beginning_counts_and_others_do_not():
    door, (a, b), _ = router()
    door.submit(prompt(0, 1))
    door.submit(Request([*range(BLOCK), *range(90_000, 90_000 + BLOCK)]))  # same first block
    assert door.loads == [2, 0]
    door.submit(prompt(70_000, 1))
    assert door.loads == [2, 1]
    a.finish(0, 1)
    door.submit(Request(prompt(70_000, 1).prompt, namespace="salt"))  # read by nobody: idle engine
    assert door.loads == [1, 1]
    assert len(b.requests) == 1


def test_a_refused_request_is_no_load():
    door, _, _ = router()
    with pytest.raises(ValueError, match="layers"):
        door.submit(Request([1, 2], num_iter=1000))
    assert door.loads == [0, 0]


def test_forgetting_and_the_life_of_threads():
    door, (a, b), _ = router()
    door.start()
    assert a.started and b.started and door.alive
    door.submit(prompt(0))
    door.submit(prompt(0))
    door.forget()
    assert door.submit(prompt(0)) % 2 == 1  # the least loaded one
    assert [f.result() for f in door.call(id)] == [id(a.engine), id(b.engine)]
    a.beat, b.beat, b.error = 5.0, 3.0, OSError("gone")
    assert door.beat == 3.0 and isinstance(door.error, OSError)
    b.alive = False
    assert not door.alive
    assert door.stop(1.0)
