"""The scheduler on a device without arrays, which checks all that it is told to do."""

from __future__ import annotations

import random
import re

import pytest

from hmf_jax.engine.books import Ask, Limits, widths
from hmf_jax.engine.replay import Recorder, main, replay, turn_from_json, turn_to_json
from hmf_jax.engine.turn import Chunk, Finished, First, Load, New, Result, Save, Started, Turn
from tests.engine.fake_device import Driver, FakeDevice


def limits(**changes) -> Limits:
    sizes = dict(slots=4, pages=64, page_size=8, capacity=128, chunk=16, spacing=8)
    return Limits(**{**sizes, "page_bytes": 1, "snapshot_bytes": 4, **changes})


def prompt(length: int, seed: int = 0) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(1, 50) for _ in range(length)]


def at_random(seed: int, requests: int) -> Driver:
    """Everything that can happen, in pools that are too small."""
    chance = random.Random(seed)
    page, capacity, groups = chance.choice([4, 8, 16]), chance.choice([24, 60, 100]), 1
    groups = chance.choice([1, 1, 1, 2])
    row, each = -(-capacity // page), chance.choice([0, 1, 5])
    chunk = chance.choice([4, 8, 16, 64])
    driver = Driver(
        limits(
            slots=groups * chance.choice([1, 2, 3]),
            pages=groups * (row + chance.choice([0, 1, row, 3 * row])),
            page_size=page,
            capacity=capacity,
            chunk=chunk,
            page_bytes=chance.choice([0, 2]),
            snapshot_bytes=each,
            mode=chance.choice(["off", "exact", "fast"]),
            device_bytes=each * chance.choice([0, 1, 2, 5, 30]),
            host_bytes=chance.choice([0, 0, 20, 100, 1000]),
            groups=groups,
            spacing=chance.choice([1, 4, 8]),
            every=chance.choice([0, 0, chunk]),
            interleave=chance.choice([0, 1, 8]),
        ),
        seed,
        ahead=chance.random() < 0.8,
    )
    stems = [prompt(chance.randrange(1, capacity), seed + i) for i in range(4)]
    count = 0
    while count < requests or driver.busy:
        while count < requests and chance.random() < 0.5:
            count += submit_one(driver, chance, stems, count)
        if count and chance.random() < 0.15:
            driver.cancel(chance.randrange(max(0, count - 8), count))
        if chance.random() < 0.01:
            driver.scheduler.reset_prefixes()
        driver.step(chance.choice([1, 2, 8]))
        if chance.random() < 0.1:
            driver.check_books()
        assert driver.turns < 500 * requests, "it does not come to an end"
    driver.check_stories()
    driver.check_rest()
    return driver


def submit_one(driver: Driver, chance: random.Random, stems: list[list[int]], count: int) -> int:
    """A prompt that may be or continue an earlier one, one or several times."""
    capacity, kind = driver.limits.capacity, chance.random()
    tail = prompt(chance.randrange(1, 12), chance.randrange(10**6))
    other = chance.randrange(count) if count else 0
    if count and kind < 0.15:
        ids = list(driver.asks[other].prompt)
    elif count and kind < 0.3:
        ids = [*driver.asks[other].prompt, *driver.stories[other].tokens, *tail]
    elif kind < 0.8:
        stem = chance.choice(stems)
        ids = stem[: chance.randrange(1, len(stem) + 1)] + tail
    else:
        ids = prompt(chance.randrange(1, capacity), chance.randrange(10**6))
    ids = ids[: capacity - 1]
    scored, copies = chance.random() < 0.1, chance.choice([1, 1, 1, 1, 2, 4])
    for id in range(count, count + copies):
        ask = Ask(
            ids,
            chance.randrange(0 if scored else 1, 30),
            priority=chance.choice([0, 0, 0, 1, 2]),
            cuts=[chance.randrange(1, len(ids) + 1) for _ in range(chance.choice([0, 0, 1, 2]))],
            namespace=chance.choice(["", "", "a"]),
            scored=scored,
            constrained=chance.random() < 0.05,
        )
        if chance.random() < 0.03:
            driver.device.fails[id] = chance.randrange(5)
        driver.submit(id, ask)
    return copies


@pytest.mark.parametrize("seed", range(40))
def test_whatever_comes(seed: int):
    at_random(seed, 30)


@pytest.mark.slow
@pytest.mark.parametrize("part", range(10))
def test_whatever_comes_100_000_times(part: int):
    done = preemptions = hits = evictions = 0
    seed = 10_000 * (part + 1)
    while done < 10_000:
        driver = at_random(seed, 40)
        stats = driver.scheduler.stats()
        done, seed = done + len(driver.asks), seed + 1
        preemptions, hits = preemptions + stats.preemptions, hits + stats.hits
        evictions += sum(stats.evictions.values())
    assert min(preemptions, hits, evictions) > 100


def test_a_request_alone():
    driver = Driver(limits(slots=2), ahead=False)
    scheduler = driver.scheduler
    driver.asks[7] = Ask(prompt(20), 3)
    scheduler.submit(7, driver.asks[7])
    one, two = scheduler.plan(8), scheduler.plan(8)
    assert one == Turn(0, chunk=Chunk(7, 0, 0, 16, 16, (0, 1, 2), False))
    assert two == Turn(
        1,
        chunk=Chunk(7, 0, 16, 4, 16, (0, 1, 2), True),
        firsts=(First(7, 0),),
        tables=((0, 1, 2), ()),
        steps=2,
    )
    assert scheduler.plan(8) is None  # it has surely ended by then
    nothing = Result([[], []], [[], []], [0, 0])
    assert scheduler.commit(one, nothing) == [Started(7, 0.0, 0, "none")]
    events = scheduler.commit(two, Result([[5, 6, 7], []], [[-1.0, -2.0, -3.0], []], [2, 0]))
    assert events == [New(7, [5, 6, 7], [-1.0, -2.0, -3.0]), Finished(7, "length")]
    assert not scheduler.busy and scheduler.plan(8) is None


def test_chunks_come_in_few_sizes():
    assert widths(16) == (16,)
    assert widths(512) == (64, 256, 512)
    assert widths(2048) == (64, 256, 1024, 2048)


def test_one_long_prompt_and_fifty_short_ones():
    """The i-th of the short ones has its first token within 2 (i + 2) turns, and the long one gets
    every second chunk meanwhile."""
    driver = Driver(limits(slots=8, pages=256, capacity=1600))
    driver.submit(100, Ask(prompt(1500), 2))
    for i in range(50):
        driver.submit(i, Ask(prompt(10, i), 4))
    driver.run()
    for i in range(50):
        assert driver.stories[i].turn <= 2 * (i + 2), i
    chunks = [turn.chunk.id for turn in driver.log[:100] if turn.chunk]
    assert chunks.count(100) >= 49


def test_rows_decode_beside_prompts_in_proportion():
    """A whole chunk costs as much as some steps, a short one less; with 0 prompts go first."""
    for interleave, steps in ((8, {2048: 8, 1024: 4, 256: 1}), (0, {2048: 0, 1024: 0, 256: 0})):
        sizes = dict(slots=4, capacity=8192, pages=200, page_size=256, chunk=2048)
        driver = Driver(limits(interleave=interleave, **sizes))
        for id, length in enumerate((10, 4096, 1000, 200)):
            driver.submit(id, Ask(prompt(length, id), 300))
        driver.run(64)
        beside = {t.chunk.width: t.steps for t in driver.log[1:] if t.chunk}
        assert beside == steps
        assert max(turn.steps for turn in driver.log if not turn.chunk) == 64


def test_a_flood_does_not_delay_the_urgent():
    driver = Driver(limits(slots=2, pages=32))
    for i in range(30):
        driver.submit(i, Ask(prompt(60, i), 30, priority=1))
    for _ in range(10):
        driver.step()
    driver.submit(100, Ask(prompt(20, 100), 8, priority=0))
    begun = driver.turns
    while not driver.stories[100].reason:
        driver.step()
    assert driver.stories[100].turn - begun <= 3
    assert driver.scheduler.stats().preemptions == 1
    driver.run()
    driver.check_stories()  # the one that had to make room has lost nothing


def test_cancelled_rows_are_free_within_two_turns():
    driver = Driver(limits())
    for i in range(8):
        driver.submit(i, Ask(prompt(50, i), 60))
    for _ in range(9):
        driver.step()
    for i in range(8):  # some decode, one is being read, the others wait
        driver.cancel(i)
    driver.step()
    driver.step()
    assert not driver.busy
    driver.check_rest()
    assert {story.reason for story in driver.stories.values()} <= {"stop", "eos"}


def test_whoever_is_waited_for_may_go():
    """Several requests wait for a snapshot of one that is cancelled, or fails."""
    for end in ("cancel", "fail"):
        driver = Driver(limits(mode="exact", device_bytes=100))
        ids = prompt(100)
        for i in range(4):
            driver.submit(i, Ask(ids[: 90 + i], 5))
        driver.submit(4, Ask(ids[:90], 5))
        driver.step()
        assert driver.scheduler.stats().slots["prefill"] == 1
        if end == "cancel":
            driver.cancel(0)
        else:
            driver.device.fails[0] = 0
        driver.run()
        driver.check_stories()
        assert sum(turn.chunk.start == 0 for turn in driver.log if turn.chunk) <= 2


def test_a_failed_device():
    driver = Driver(limits(mode="fast", device_bytes=100))
    for i in range(6):
        driver.submit(i, Ask(prompt(50, i), 60))
    for _ in range(12):
        driver.step()
    ended = {id for id, story in driver.stories.items() if story.reason}
    events = driver.scheduler.fail()
    assert events == [Finished(id, "error") for id in range(6) if id not in ended]
    stats = driver.scheduler.stats()
    assert (stats.waiting, stats.running, stats.pages["free"]) == (0, 0, 64)
    driver.device, driver.under_way = FakeDevice(driver.limits, driver.asks), None
    driver._tell(events)
    driver.submit(6, Ask(prompt(50), 3))
    driver.run()
    assert driver.stories[6].reason == "length" and driver.stories[6].cached == 0


def test_growing():
    driver = Driver(limits(slots=1, pages=16))
    driver.submit(0, Ask(prompt(100), 100))
    driver.step()
    driver.scheduler.grow(256, 32)
    driver.limits = driver.device.limits = driver.scheduler.limits
    driver.device.pages += [[] for _ in range(16)]
    driver.run()
    driver.check_stories()
    assert driver.stories[0].reason != "capacity"
    with pytest.raises(ValueError, match="can only grow"):
        driver.scheduler.grow(128, 32)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(pages=15), "do not hold one row of capacity=128; 16 per group are needed"),
        (dict(slots=0), "slots=0 must be 1 or more"),
        (dict(slots=3, groups=2), "must be multiples of groups=2"),
        (dict(mode="on"), "mode='on' must be"),
        (dict(mode="exact", every=24), "every=24 must be a multiple of chunk=16"),
        (dict(host_bytes=-1), "host_bytes=-1 must be 0 or more"),
    ],
)
def test_limits_with_which_nothing_could_run(changes, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        limits(**changes)


def test_what_cannot_be_asked():
    scheduler = Driver(limits()).scheduler
    for ids in ([], prompt(128)):
        with pytest.raises(ValueError, match="does not fit: it must have 1 to 127 tokens"):
            scheduler.submit(0, Ask(ids, 1))
    with pytest.raises(ValueError, match="max_new_tokens=0"):
        scheduler.submit(0, Ask([1], 0))
    assert not scheduler.busy


def test_turns_are_lines():
    turn = Turn(
        3,
        ends=(1,),
        pages_out=((2, 0),),
        saves=(Save(1, 4),),
        loads=(Load(0, 4, 9, 16),),
        chunk=Chunk(9, 0, 16, 5, 64, (3, 4), True),
        firsts=(First(9, 0),),
        tables=((3, 4), ()),
        steps=8,
        waits=True,
    )
    assert turn_from_json(turn_to_json(turn)) == turn
    assert turn_to_json(Turn(0)) == '{"number": 0}'


def test_a_run_can_be_done_again(tmp_path, capsys):
    lines: list[str] = []
    sizes = limits(slots=2, pages=20, mode="fast", device_bytes=20, host_bytes=30)
    driver = Driver(sizes)
    driver.scheduler = Recorder(sizes, lines.append)
    chance, count = random.Random(0), 0
    while count < 40 or driver.busy:
        if count < 40:
            count += submit_one(driver, chance, [prompt(80)], count)
        if chance.random() < 0.2:
            driver.cancel(chance.randrange(count))
        driver.step()
    driver.scheduler.reset_prefixes()
    driver.run()
    assert replay(lines) == len(driver.log) > 40
    file = tmp_path / "run.jsonl"
    file.write_text("".join(lines))
    assert main([str(file)]) == 0 and capsys.readouterr().out.endswith("turns, the same\n")
    changed = [line.replace('"steps": 8', '"steps": 7') for line in lines]
    with pytest.raises(ValueError, match="the turn is now"):
        replay(changed)
    with pytest.raises(ValueError, match="line 2 is not one of a recording"):
        replay([lines[0], "{}"])
    assert main([]) == 2 and main([str(tmp_path / "none")]) == 1
