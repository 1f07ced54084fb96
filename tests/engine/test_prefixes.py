"""What the prefix cache finds, where it takes snapshots, and what has to go: on the fake device,
which checks that what is found is what was read."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmf_jax.engine import radix
from hmf_jax.engine.books import Ask
from hmf_jax.engine.radix import Tree, common
from tests.engine.fake_device import Driver
from tests.engine.test_scheduler import limits, prompt

MODES = ("off", "exact", "fast")
MANY = dict(device_bytes=400, slots=2)  # 100 snapshots


class Run(Driver):
    """Requests one after the other."""

    def ask(self, ids: list[int], new: int = 1, **more) -> int:
        """Runs a request alone; how many tokens of its prompt were cached."""
        id = len(self.asks)
        self.submit(id, Ask(ids, new, **more))
        self.run()
        self.check_books()
        self.check_stories()
        started = self.stories[id].started
        assert started is not None
        self.missed = started.missed
        return started.cached


def test_the_last_place_of_a_prompt_is_kept():
    run = Run(limits(mode="exact", **MANY))
    base = prompt(60)
    run.ask(base)
    assert run.ask([*base, *prompt(30, 1)]) == 48 and run.missed == "none"


def test_the_third_one_goes_on_from_where_the_first_two_part():
    for mode, place in (("exact", 32), ("fast", 40)):
        run = Run(limits(mode=mode, **MANY))
        base = prompt(40)
        assert run.ask(base + prompt(50, 1)) == 0 and run.missed == "none"
        assert run.ask(base + prompt(50, 2)) == 0 and run.missed == "no_snapshot"
        assert run.ask(base + prompt(50, 3)) == place


def test_the_second_one_where_the_caller_says_that_prompts_part():
    for mode, place in (("exact", 32), ("fast", 40)):
        run = Run(limits(mode=mode, **MANY))
        base = prompt(40)
        run.ask(base + prompt(50, 1), cuts=[40])
        assert run.ask(base + prompt(50, 2), cuts=[40]) == place


def test_short_questions_about_one_text():
    """The ends of such prompts are nearer to where they part than snapshots may be."""
    run = Run(limits(mode="fast", chunk=64, **MANY))
    base = prompt(40)
    cached = [run.ask(base + prompt(3, n), cuts=[40, 42]) for n in range(4)]
    assert cached == [0, 0, 40, 40]


def test_conversations_in_fast_mode():
    """The next message comes after the reply, or after the prompt if the reply is rewritten."""
    run = Run(limits(mode="fast", **MANY))
    ids = prompt(30)
    run.ask(ids, 20, cuts=[28])
    reply = run.stories[0].tokens
    assert len(reply) > 10  # else it is too near to be kept
    assert run.ask([*ids, *reply, *prompt(9, 1)]) == len(ids) + len(reply) - 1
    assert run.ask([*ids[:28], *prompt(20, 2)]) == 28


@pytest.mark.parametrize("mode", MODES)
def test_equal_prompts_are_read_once(mode):
    driver = Driver(limits(mode=mode, device_bytes=0))
    for id in range(9):
        driver.submit(id, Ask(prompt(50), 5))
    driver.run()
    driver.check_stories()
    driver.check_rest()
    assert sum(turn.chunk is not None for turn in driver.log) == 4
    assert [driver.stories[id].cached for id in range(9)] == [0] + [50] * 8
    assert not driver.scheduler.stats().entries["device"]  # there was room only until the last one


def test_a_prompt_that_comes_again_is_found_whole():
    run = Run(limits(mode="exact", **MANY))
    cached = [run.ask(prompt(50)) for _ in range(3)]
    assert cached == [0, 48, 50] and run.missed == ""


@pytest.mark.parametrize("mode", ("exact", "fast"))
def test_prompts_that_begin_alike_wait_for_the_first(mode):
    driver = Driver(limits(mode=mode, slots=8, device_bytes=400))
    base = prompt(70)
    for id in range(6):
        driver.submit(id, Ask(base + prompt(20, id), 5))
    driver.run()
    driver.check_stories()
    place = 64 if mode == "exact" else 70
    assert [driver.stories[id].cached for id in range(6)] == [0] + [place] * 5


def test_why_there_is_nothing():
    run = Run(limits(mode="exact", device_bytes=4, slots=2))
    base = prompt(60)
    assert run.ask(prompt(16, 1)) == 0 and run.missed == "short"
    assert run.ask(base) == 0 and run.missed == "none"
    assert run.ask(base, namespace="other") == 0 and run.missed == "namespace"
    assert run.ask(base) == 0 and run.missed == "evicted"  # there is room for one
    assert run.ask(base[:40] + prompt(30, 2)) == 0 and run.missed == "no_snapshot"
    stats = run.scheduler.stats()
    assert set(stats.missed) == {"short", "none", "namespace", "evicted", "no_snapshot"}
    assert stats.queries == sum(stats.missed.values()) and not stats.hits


def test_off_finds_nothing():
    run = Run(limits(mode="off", **MANY))
    assert [run.ask(prompt(60), cuts=[30]) for _ in range(3)] == [0, 0, 0]
    assert not run.scheduler.stats().pages["cached"]


def test_scored_prompts_are_read_whole():
    run = Run(limits(mode="fast", **MANY))
    run.ask(prompt(60))
    assert run.ask(prompt(60), new=0, scored=True) == 0
    assert len(run.stories[1].scores) == 59
    assert run.scheduler.stats().queries == 60


def test_snapshots_keep_their_distance():
    run = Run(limits(mode="fast", spacing=30, **MANY))
    run.ask(prompt(100), cuts=[40, 50, 95])
    lengths = [entry.length for entry in run.scheduler._slots.prefixes]
    assert lengths == [50, 95]  # not at 40, nor at 96, the last place on the grid
    run = Run(limits(mode="exact", every=32, **MANY))
    run.ask(prompt(100))
    assert [entry.length for entry in run.scheduler._slots.prefixes] == [32, 64, 96]


def test_pages_are_lent_to_one_row_and_copied_for_others():
    driver = Driver(limits(mode="exact", slots=3, device_bytes=400))
    base = prompt(50)
    driver.submit(0, Ask(base, 1))
    driver.run()
    driver.log.clear()
    driver.submit(1, Ask(base + prompt(20, 1), 40))
    driver.submit(2, Ask(base + prompt(20, 2), 40))
    driver.run()
    driver.check_stories()
    copies = [len(turn.copies) for turn in driver.log if turn.loads]
    assert copies == [0, 6]  # 48 tokens are six full pages


def test_what_has_to_go_moves_to_host_memory_and_comes_back():
    run = Run(limits(mode="exact", device_bytes=8, host_bytes=200, slots=1))
    prompts = [prompt(60, seed) for seed in range(6)]
    for ids in prompts:
        run.ask(ids)
    stats = run.scheduler.stats()
    assert stats.entries == {"device": 2, "host": 4}
    assert stats.prefix_bytes["host", "kv"] == 4 * 6 and stats.evictions == {"device": 4, "host": 0}
    assert [run.ask([*ids[:50], 1, 2, 3]) for ids in prompts] == [48] * 6
    assert run.scheduler.stats().entries == {"device": 2, "host": 4}
    assert run.scheduler.reset_prefixes() == 6
    run.run()
    assert not run.device.host and not run.device.away and not run.device.snapshots
    assert run.ask(prompts[0]) == 0


def test_shared_pages_take_host_memory_once():
    run = Run(limits(mode="exact", device_bytes=12, host_bytes=1000, slots=1))
    base = prompt(120)
    for end in (33, 65, 97):
        run.ask(base[:end])
    for seed in range(3):  # they push the others out
        run.ask(prompt(60, 10 + seed))
    stats = run.scheduler.stats()
    assert stats.entries == {"device": 3, "host": 3}
    assert stats.prefix_bytes["host", "kv"] == 12  # 96 tokens


def test_a_hit_keeps_what_comes_before_it():
    """Of a conversation that goes on nothing has to go; what nobody asks for again does."""
    run = Run(limits(mode="exact", device_bytes=16, slots=1))
    base, other = prompt(120), prompt(34, 1)
    run.ask(base[:34])
    run.ask(other)
    run.ask(base[:66])
    run.ask(base[:98])
    run.ask(prompt(60, 2))
    assert run.ask([*base[:40], 1, 2]) == 32
    assert run.ask([*other, 1, 2]) == 0 and run.missed == "evicted"


def test_what_a_failed_row_wrote_is_not_used_again():
    driver = Driver(limits(mode="fast", slots=1, pages=16, device_bytes=400))
    driver.device.fails[0] = 3
    driver.submit(0, Ask(prompt(50), 40, cuts=[30]))
    driver.submit(1, Ask(prompt(50) + prompt(9, 1), 40))
    driver.run()
    driver.check_stories()
    assert driver.stories[0].reason == "error" and driver.stories[1].cached == 0
    (zeroed,) = [turn.zeroed for turn in driver.log if turn.zeroed]
    assert len(zeroed) >= 7 and driver.stories[1].reason in ("eos", "length")


@pytest.mark.parametrize(("mode", "least"), [("exact", 0.85), ("fast", 0.95)])
def test_twenty_conversations_of_ten_turns(mode, least):
    """Of what earlier messages of a conversation have read most is found, as in production: 1024
    tokens per turn, chunks of 2048; all 64 times smaller."""
    sizes = dict(slots=8, capacity=256, pages=512, chunk=32, host_bytes=10_000)
    driver = Driver(limits(mode=mode, device_bytes=100, **sizes))
    texts = [prompt(17, 1000 + user) for user in range(20)]
    possible, total = 0, 0
    for turn in range(10):
        first = len(driver.asks)
        for user, ids in enumerate(texts):
            driver.submit(first + user, Ask(list(ids), 8, cuts=[len(ids) - 1]))
            possible += len(ids) - 17 if turn else 0
            total += len(ids)
        driver.run()
        for user, ids in enumerate(texts):
            reply = driver.stories[first + user].tokens
            ids += [*reply, *prompt(16 - len(reply), 100 * turn + user), 1]
    driver.check_stories()
    stats = driver.scheduler.stats()
    assert stats.queries == total and stats.hits >= least * possible * 15 / 17


WORDS = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), max_size=12)


@settings(max_examples=60, deadline=None)
@given(WORDS, st.lists(st.integers(0, 2), max_size=9), st.booleans())
def test_the_tree_knows_what_was_read(words, asked, tiny):
    before, radix.REMEMBERED = radix.REMEMBERED, 16 if tiny else 10**6
    try:
        tree = Tree()
        for i, word in enumerate(words):
            node = tree.reach("", array("i", word))
            assert node.end == len(word)
            node.entry = node.entry or (i % 3 == 0 or None)
        nodes, shared = tree.walk("", array("i", asked))
        known = max((common(array("i", w), array("i", asked)) for w in words), default=0)
        least = max((common(array("i", w), array("i", asked)) for w in words[::3]), default=0)
        assert least <= shared <= known and (tiny or shared == known)
        for node in nodes:
            assert asked[: node.end][-len(node.tokens) :] == node.tokens.tolist()
        assert tree.walk("other", array("i", asked)) == ([], 0)
    finally:
        radix.REMEMBERED = before


@given(st.lists(st.integers(0, 1)), st.lists(st.integers(0, 1)))
def test_common(a, b):
    n = common(array("i", a), array("i", b))
    assert a[:n] == b[:n] and (n == min(len(a), len(b)) or a[n] != b[n])
