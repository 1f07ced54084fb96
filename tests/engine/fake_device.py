"""A device without arrays: it remembers which tokens every page, slot and snapshot holds, and
checks at every turn that what it is told to do makes sense."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence

from hmf_jax.engine.books import Ask, Limits, widths
from hmf_jax.engine.scheduler import Scheduler
from hmf_jax.engine.turn import REASONS, Chunk, Event, Finished, New, Result, Scored, Started, Turn

EOS, LENGTH, CAPACITY, ERROR = (
    REASONS.index(name) for name in ("eos", "length", "capacity", "error")
)


def next_token(tokens: Sequence[int], seed: int, scale: int = 50) -> int:
    """What a row makes of all tokens so far."""
    return zlib.crc32(repr(tuple(tokens[-40:])).encode(), len(tokens) + seed) % scale


@dataclasses.dataclass
class Held:
    """What a slot or a snapshot holds: tokens fed, and the books of the row."""

    id: int = -1
    tokens: tuple[int, ...] = ()
    newest: int | None = None
    made: int = 0
    reason: int | None = None  # None: not begun
    logits: bool = False


class FakeDevice:
    """Does turns.

    Args:
      limits: of the scheduler.
      asks: of all requests; read, never written.
      seed: of the tokens.
      fail: requests whose rows fail, and at which new token.
    """

    def __init__(self, limits: Limits, asks: dict[int, Ask], seed: int = 0) -> None:
        self.limits, self.asks, self.seed = limits, asks, seed
        self.fails: dict[int, int] = {}
        self.slots = [Held() for _ in range(limits.slots)]
        self.pages: list[list[tuple[int, int] | None]] = [[] for _ in range(limits.pages)]
        self.dirty: dict[int, int] = {}  # pages of rows that failed -> in which turn
        self.snapshots: dict[int, Held] = {}
        self.away: dict[int, Held] = {}
        self.host: dict[int, list[tuple[int, int] | None]] = {}
        self.number = -1
        self.first_turn: dict[int, int] = {}

    def run(self, turn: Turn) -> Result:
        assert turn.number > self.number, "turns come in order"
        self.number = turn.number
        for slot in turn.ends:
            if self.slots[slot].reason == 0:
                self.slots[slot].reason = REASONS.index("stop")
        self._move_out(turn)
        for save in turn.saves:
            self._save(save)
        for snapshot in turn.snapshots_in:
            self.snapshots[snapshot] = self.away.pop(snapshot)
        for host, page in turn.pages_in:
            self.pages[page] = list(self.host[host])
        for source, target in turn.copies:
            # That the turn before has spoiled it could not be known yet.
            assert self.dirty.get(source, turn.number) >= turn.number - 1
            self.pages[target] = list(self.pages[source])
        for load in turn.loads:
            self._load(load)
        scores: list[float] = []
        if turn.chunk:
            scores = self._chunk(turn.chunk)
        for save in turn.cuts:
            self._save(save)
        new: list[list[int]] = [[] for _ in self.slots]
        for first in turn.firsts:
            held = self.slots[first.slot]
            ask = self.asks[first.id]
            assert held.id == first.id and held.logits and held.tokens == tuple(ask.prompt)
            assert held.reason is None and not held.made
            held.reason = 0
            self._choose(held, new[first.slot])
        self._decode(turn, new)
        reasons = [held.reason or 0 for held in self.slots]
        return Result(new, [[float(-t) for t in row] for row in new], reasons, (), scores)

    def _move_out(self, turn: Turn) -> None:
        for page, host in turn.pages_out:
            assert host not in self.host, "a page of host memory that is in use"
            self.host[host] = list(self.pages[page])
        for snapshot in turn.snapshots_out:
            self.away[snapshot] = self.snapshots.pop(snapshot)
        for snapshot in turn.dropped:
            if snapshot in self.away:
                del self.away[snapshot]
            else:
                del self.snapshots[snapshot]
        for host in turn.dropped_host:
            del self.host[host]
        for page in turn.zeroed:
            self.pages[page] = []
            self.dirty.pop(page, None)

    def _save(self, save) -> None:
        held = self.slots[save.slot]
        assert save.snapshot not in self.snapshots and save.snapshot not in self.away
        assert held.logits or not save.logits
        self.snapshots[save.snapshot] = dataclasses.replace(held, logits=save.logits)

    def _load(self, load) -> None:
        held, ask = self.snapshots[load.snapshot], self.asks[load.id]
        assert self.slots[load.slot].reason != 0, "a row runs there"
        assert len(held.tokens) == load.length
        if load.resume:
            assert held.id == load.id and held.newest is not None
            self.slots[load.slot] = dataclasses.replace(held, reason=0)
            return
        assert held.tokens == tuple(ask.prompt[: load.length]), "a wrong hit"
        if not ask.scored:
            own = held.id == load.id
            grid = load.length % self.limits.chunk == 0
            whole = load.length == len(ask.prompt) and held.logits
            assert self.limits.mode == "fast" or grid or whole or own
        self.slots[load.slot] = Held(load.id, held.tokens, logits=held.logits)

    def _write(self, pages: Sequence[int], at: int, token: int, id: int) -> None:
        page = self.pages[pages[at // self.limits.page_size]]
        place = at % self.limits.page_size
        assert len(page) >= place, "a gap before it"
        del page[place:]
        page.append((at, token))

    def _reads(self, held: Held, pages: Sequence[int]) -> None:
        """Every key and value that attention looks at is that of the row's own tokens."""
        size, group = self.limits.page_size, None
        for i in range(-(-len(held.tokens) // size)):
            tokens = held.tokens[i * size : (i + 1) * size]
            want = [(i * size + j, token) for j, token in enumerate(tokens)]
            assert self.pages[pages[i]][: len(want)] == want, f"page {pages[i]} of {held.id}"
            assert pages[i] not in self.dirty, "not finite"
            group = pages[i] * self.limits.groups // self.limits.pages
            assert group == pages[0] * self.limits.groups // self.limits.pages

    def _chunk(self, chunk: Chunk) -> list[float]:
        ask, limits = self.asks[chunk.id], self.limits
        if chunk.start == 0:
            assert self.slots[chunk.slot].reason != 0, "a row runs there"
            self.slots[chunk.slot] = Held(chunk.id)
        held = self.slots[chunk.slot]
        assert held.id == chunk.id and len(held.tokens) == chunk.start and held.reason is None
        assert chunk.width in widths(limits.chunk) and chunk.count <= chunk.width
        assert chunk.width == next(w for w in widths(limits.chunk) if w >= chunk.count)
        end = chunk.start + chunk.count
        assert chunk.start // limits.chunk == (end - 1) // limits.chunk, "it leaves the grid"
        if limits.mode != "fast":
            assert chunk.start % limits.chunk == 0
            assert chunk.last or chunk.count == limits.chunk
        assert chunk.last == (end == len(ask.prompt)) and chunk.count > 0
        self._reads(held, chunk.pages)
        for at in range(chunk.start, end):
            self._write(chunk.pages, at, ask.prompt[at], chunk.id)
        held.tokens += tuple(ask.prompt[chunk.start : end])
        held.logits = True
        self._reads(held, chunk.pages)
        if not ask.scored:
            return []
        return [float(-token) for token in ask.prompt[max(chunk.start, 1) : end]]

    def _choose(self, held: Held, new: list[int]) -> None:
        ask = self.asks[held.id]
        if self.fails.get(held.id) == held.made:
            held.reason = ERROR
            return
        held.newest = next_token(held.tokens, self.seed)
        held.made += 1
        held.logits = False
        new.append(held.newest)
        if held.newest == 0:
            held.reason = EOS
        elif held.made >= ask.max_new_tokens:
            held.reason = LENGTH
        elif len(held.tokens) + 1 >= self.limits.capacity:
            held.reason = CAPACITY

    def _decode(self, turn: Turn, new: list[list[int]]) -> None:
        users = dict.fromkeys(turn.chunk.pages, turn.chunk.slot) if turn.chunk else {}
        for slot, pages in enumerate(turn.tables):
            for page in pages:
                assert users.setdefault(page, slot) == slot, "two running rows share a page"
                assert page * self.limits.groups // self.limits.pages == self.limits.group_of(slot)
        runs = [slot for slot, held in enumerate(self.slots) if held.reason == 0]
        if not turn.steps:
            assert not turn.tables
            return
        assert len(turn.tables) == self.limits.slots
        for slot in runs:
            held, pages = self.slots[slot], turn.tables[slot]
            if self.asks[held.id].constrained:
                assert turn.waits and turn.steps == 1
                if new[slot]:  # its first token has yet to be told to its constraint
                    assert not pages
                    continue
            assert pages, f"slot {slot} runs without pages"
            self._reads(held, pages)
            for _ in range(turn.steps):
                if held.reason == 0:
                    assert held.newest is not None
                    self._write(pages, len(held.tokens), held.newest, held.id)
                    held.tokens += (held.newest,)
                    self._choose(held, new[slot])
            self._reads(held, pages)
            if held.reason == ERROR:
                self.dirty[pages[(len(held.tokens) - 1) // self.limits.page_size]] = turn.number


@dataclasses.dataclass
class Story:
    """What became of a request."""

    tokens: list[int] = dataclasses.field(default_factory=list)
    scores: list[float] = dataclasses.field(default_factory=list)
    reason: str = ""
    started: Started | None = None
    turn: int = -1  # in which its first token came

    @property
    def cached(self) -> int:
        assert self.started is not None
        return self.started.cached


class Driver:
    """Runs a scheduler on the fake device as the engine does: one turn ahead."""

    def __init__(
        self, limits: Limits, seed: int = 0, ahead: bool = True, device=FakeDevice
    ) -> None:
        self.limits, self.ahead = limits, ahead
        self.asks: dict[int, Ask] = {}
        self.scheduler = Scheduler(limits, clock=lambda: float(self.turns))
        self.device = device(limits, self.asks, seed)
        self.stories: dict[int, Story] = {}
        self.under_way: tuple[Turn, Result] | None = None
        self.turns = 0
        self.log: list[Turn] = []
        self.cancelled: set[int] = set()

    def submit(self, id: int, ask: Ask) -> None:
        self.asks[id] = ask
        self.stories[id] = Story()
        self.scheduler.submit(id, ask)

    def cancel(self, id: int) -> None:
        self.cancelled.add(id)
        self.scheduler.cancel(id)

    @property
    def busy(self) -> bool:
        return self.scheduler.busy or self.under_way is not None

    def step(self, steps: int = 8) -> None:
        """Plans a turn, then commits the one before."""
        waits = not self.ahead or (self.under_way is not None and self.under_way[0].waits)
        if waits:
            self._commit()
        turn = self.scheduler.plan(steps)
        result = None
        if turn is not None:
            assert turn.steps <= steps
            self.log.append(turn)
            result = self.device.run(turn)
        before, self.under_way = self.under_way, None
        self._tell(self.scheduler.commit(*(before or (None, None))))
        if turn is not None and result is not None:
            self.under_way = turn, result
        assert turn is not None or before is not None or waits or not self.busy, "it stands still"
        self.turns += 1

    def _commit(self) -> None:
        if self.under_way is not None:
            before, self.under_way = self.under_way, None
            self._tell(self.scheduler.commit(*before))

    def run(self, steps: int = 8, most: int = 10**6) -> None:
        while self.busy:
            self.step(steps)
            assert self.turns < most, "it does not come to an end"

    def _tell(self, events: list[Event]) -> None:
        for event in events:
            story = self.stories[event.id]
            assert not story.reason, f"{event} after its end"
            if isinstance(event, Started):
                assert story.started is None
                story.started = event
            elif isinstance(event, New):
                assert story.started is not None and event.tokens
                if not story.tokens:
                    story.turn = self.turns
                story.tokens += event.tokens
            elif isinstance(event, Scored):
                story.scores += event.logprobs
            else:
                assert isinstance(event, Finished) and event.reason
                story.reason = event.reason

    def check_books(self) -> None:
        """Entries of the prefix cache are what they say, and take what they may."""
        limits, slots = self.limits, self.scheduler._slots
        for entry in slots.prefixes:
            held = (self.device.away if entry.away else self.device.snapshots)[entry.snapshot]
            path: tuple[int, ...] = ()
            for node in (entry.node, *entry.node.before()):
                path = (*node.tokens, *path)
            assert held.tokens == path and len(path) == entry.length == entry.node.end
            assert held.logits >= entry.logits and entry.node.entry is entry
            for i in range(limits.pages_of(entry.length)):
                page = self.device.host[entry.host[i]] if entry.away else []
                page = page or self.device.pages[entry.pages[i]]
                start = i * limits.page_size
                own = list(enumerate(path[start : start + limits.page_size], start))
                assert page[: len(own)] == own, f"page {i} of an entry of {entry.length} tokens"
        stays = [entry for entry in slots.prefixes if not entry.away and entry.key is None]
        assert len(stays) * limits.snapshot_bytes <= limits.device_bytes
        stats = self.scheduler.stats()
        away = stats.prefix_bytes["host", "snapshot"] + stats.prefix_bytes["host", "kv"]
        assert away <= limits.host_bytes
        assert sum(stats.pages.values()) == limits.pages
        assert sum(stats.slots.values()) + len(self.scheduler._replies) == limits.slots

    def check_rest(self) -> None:
        """When nothing runs, only the prefix cache holds anything."""
        stats, device = self.scheduler.stats(), self.device
        assert stats.running == stats.waiting == stats.swapped == stats.pages["held"] == 0
        assert stats.slots["free"] == self.limits.slots
        assert stats.hits + sum(stats.missed.values()) == stats.queries
        assert len(device.snapshots) == stats.entries["device"]
        assert len(device.away) == stats.entries["host"]
        assert len(device.host) * self.limits.page_bytes == stats.prefix_bytes["host", "kv"]
        assert self.limits.mode != "off" or not device.snapshots

    def check_stories(self) -> None:
        """Everything has ended once, with the very tokens that the prompt alone would give."""
        for id, story in self.stories.items():
            ask = self.asks[id]
            tokens, made = list(ask.prompt), []
            reason = "" if ask.max_new_tokens else "length"
            while not reason:
                if self.device.fails.get(id) == len(made):
                    reason = "error"
                    break
                made.append(next_token(tokens, self.device.seed))
                tokens.append(made[-1])
                if made[-1] == 0:
                    reason = "eos"
                elif len(made) >= ask.max_new_tokens:
                    reason = "length"
                elif len(tokens) >= self.limits.capacity:
                    reason = "capacity"
            if id in self.cancelled and story.reason == "stop":
                assert story.tokens == made[: len(story.tokens)]
                continue
            assert (story.tokens, story.reason) == (made, reason), (id, story, made, reason)
            if ask.scored:
                assert story.scores == [float(-token) for token in ask.prompt[1:]]
