"""Executes turns: everything that requests hold on the device, in slots and pages.

Together with `hmf_jax.engine.storage` this is all that knows how the memory of requests is laid
out. `enqueue` only hands work to the device; `collect` waits for what it produced.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from hmf_jax.engine.host import to_device, to_host
from hmf_jax.engine.programs import ALL, MOST_STEPS, power_of_two
from hmf_jax.engine.request import GREEDY, Request
from hmf_jax.engine.rows import RUNNING, STOPPED, as_dicts
from hmf_jax.engine.settings import MOST_LIKELY, Processor, Settings, stack_settings
from hmf_jax.engine.storage import MOST_PAGES, Call, Snapshot, Storage
from hmf_jax.engine.turn import Chunk, First, Load, Result, Save, Turn
from hmf_jax.memory import device_bytes
from hmf_jax.model import HybridLM

FEW = 8  # tokens per row that a GPU decodes in one program
_NOBODY = Request((), 1, GREEDY)


@dataclasses.dataclass(frozen=True)
class Ticket:
    """What a turn will have produced.

    Attributes:
      first: tokens, logprobs [B, n], reasons [B] and the most likely tokens there.
      slots: those that `first` is about.
      decode: the same of each program that decoded, one after the other.
      ids: whose each slot was.
      top: how many of the most likely tokens each slot asks for.
      scores: log-probabilities of the chunk's tokens, and the most likely ones there.
      scored: how many of them count.
      top_scores: how many of the most likely ones are asked for there.
    """

    first: tuple[Any, ...] | None
    slots: frozenset[int]
    decode: Sequence[tuple[Any, ...]]
    ids: Sequence[int]
    top: Sequence[int]
    scores: tuple[Any, ...] | None
    scored: int
    top_scores: int

    def wanted(self) -> tuple[Any, Any, Any]:
        """`first`, `decode` and `scores`, without the most likely tokens if nobody asks for any."""

        def found(arrays: tuple[Any, ...] | None, asked: bool) -> tuple[Any, ...] | None:
            return arrays if arrays is None or asked else (*arrays[:-1], None)

        top = any(self.top)
        scores = found(self.scores, self.top_scores > 0)
        return found(self.first, top), [found(one, top) for one in self.decode], scores


class Device:
    """Slots for rows, a pool of pages, and snapshots.

    Args:
      model: the model.
      slots: rows that can run at a time.
      capacity: most tokens a row may hold, prompt and new ones together.
      pages, page_size: pages of the pool, and tokens in each. If a mesh splits the slots into
        parts, it splits the pages into as many, and a row uses pages of its own part only.
      prefill_chunk: most tokens of a chunk.
      processor: changes the logits of all rows, see `hmf_jax.engine.settings`.
      solver: of GKA layers.
      fixed: one program for whatever requests ask for; otherwise quicker ones, each compiled when a
        request first asks for what it does.

    Attributes:
      page_bytes, snapshot_bytes: of one page of all layers, of one snapshot; on one device.

    Raises:
      ValueError: numbers that are too small; the mesh splits the slots, but not the pages.
    """

    def __init__(
        self,
        model: HybridLM,
        *,
        slots: int,
        capacity: int,
        pages: int,
        page_size: int,
        prefill_chunk: int,
        processor: Processor | None = None,
        solver: str = "chebyshev",
        fixed: bool = False,
    ) -> None:
        numbers = dict(
            slots=slots, capacity=capacity, pages=pages, page_size=page_size,
            prefill_chunk=prefill_chunk,
        )  # fmt: skip
        for name, value in numbers.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        self._all = Storage(model, **numbers, processor=processor, solver=solver)
        self.slots, self._config = slots, model.config
        self._processed, self._fixed = processor is not None, fixed
        self._loops = loops_without_waiting()
        self._ids, self._asked = [-1] * slots, [_NOBODY] * slots  # of the request of each slot
        self._settings: Settings | None = None
        self._all.count(self._counts())
        self.page_bytes, self.snapshot_bytes = self._all.page_bytes, self._all.snapshot_bytes
        self._snapshots: dict[int, Snapshot] = {}
        self._away: dict[int, Snapshot] = {}  # those in host memory
        self._host_pages: dict[int, Any] = {}
        self._ends: set[int] = set()  # slots whose rows are to stop at the next decode
        self._live: set[int] = set()  # slots whose rows run, as far as is known
        # Slots, and requests that are known to have ended in them: told by `collect`, which may run
        # in another thread, to `enqueue`.
        self._over: collections.deque[tuple[int, int]] = collections.deque()
        compilations()

    def enqueue(self, turn: Turn, asked: Mapping[int, Request]) -> Ticket:
        """Hands a turn to the device; `asked` has the requests that it names, by id."""
        while self._over:
            slot, id = self._over.popleft()
            if self._ids[slot] == id:  # else it is already another's
                self._ended(slot)
        if self._all.pool is None:  # no layer has anything in pages
            turn = turn._replace(pages_out=(), zeroed=(), pages_in=(), copies=())
        self._ends |= set(turn.ends)
        self._live -= set(turn.ends)
        self._move_out(turn)
        for pages in _batches(turn.zeroed):
            self._change(self._all.zero(pages))
        for save in turn.saves:
            self._save(save)
        self._move_in(turn)
        for pairs in _batches(turn.copies):
            self._change(self._all.copy(pairs))
        for load in turn.loads:
            self._load(load, asked[load.id])
        scores, scored, top_scores = None, 0, 0
        if (chunk := turn.chunk) is not None:
            request = asked[chunk.id]
            scores, scored = self._chunk(chunk, request)
            top_scores = request.prompt_logprobs or 0
        for save in turn.cuts:
            self._save(save)
        first = self._first(turn.firsts, asked) if turn.firsts else None
        decode = self._decode(turn) if turn.steps else ()
        slots = frozenset(one.slot for one in turn.firsts)
        top = [request.top_logprobs for request in self._asked]
        ticket = Ticket(first, slots, decode, (*self._ids,), top, scores, scored, top_scores)
        for array in jax.tree.leaves(ticket.wanted()):
            array.copy_to_host_async()
        return ticket

    def done(self, ticket: Ticket) -> bool:
        """Whether the device has done all that a turn asked for."""
        return all(array.is_ready() for array in jax.tree.leaves(ticket.wanted()))

    def collect(self, ticket: Ticket) -> Result:
        """Waits for what a turn has produced."""
        first, decode, scores = jax.device_get(ticket.wanted())
        tokens: list[list[int]] = [[] for _ in range(self.slots)]
        logprobs: list[list[float]] = [[] for _ in range(self.slots)]
        top: list[list[dict[int, float]]] = [[] for _ in range(self.slots)]
        reasons = [RUNNING] * self.slots
        for found, slots in ((first, ticket.slots), (_joined(decode), range(self.slots))):
            if found is None:
                continue
            new, values, ended, likely = found
            for slot in slots:
                count, n = int((new[slot] >= 0).sum()), ticket.top[slot]
                tokens[slot] += new[slot, :count].tolist()
                logprobs[slot] += values[slot, :count].tolist()
                if n and likely is not None:
                    top[slot] += as_dicts(*(x[slot, :count, :n] for x in likely))
                # That a row was stopped from outside is known there.
                reasons[slot] = RUNNING if ended[slot] == STOPPED else int(ended[slot])
        self._over += [(slot, ticket.ids[slot]) for slot, reason in enumerate(reasons) if reason]
        told, told_top = [], []
        if scores is not None:
            values, likely = scores
            told = values[0, : ticket.scored].tolist()
            if likely is not None:
                told_top = as_dicts(*(x[0, : ticket.scored, : ticket.top_scores] for x in likely))
        return Result(tokens, logprobs, reasons, top, told, told_top)

    def grow(self, capacity: int, pages: int) -> None:
        """Makes room for more tokens in every row, and for more pages."""
        self._all.grow(capacity, pages)

    def warm(self) -> None:
        """Compiles every program that can be needed, or finds it on disk."""
        self._all.compile(self._calls())

    def compiled(self) -> int:
        """How many programs this process has compiled since its first `Device` was made."""
        return len(compilations())

    def nbytes(self) -> int:
        """Bytes of all arrays that are held on one device, weights excepted."""
        return self._all.nbytes() + device_bytes(list(self._snapshots.values()))

    # What the parts of a turn are for the device.

    def _move_out(self, turn: Turn) -> None:
        for page, host in turn.pages_out:
            self._host_pages[host] = to_host(self._all.read(page)())
        for id in turn.snapshots_out:
            self._away[id] = to_host(self._snapshots.pop(id))
        for id in turn.dropped:
            self._snapshots.pop(id, None)
            self._away.pop(id, None)
        for host in turn.dropped_host:
            self._host_pages.pop(host, None)

    def _move_in(self, turn: Turn) -> None:
        for id in turn.snapshots_in:
            self._snapshots[id] = to_device(self._away.pop(id))
        for host, page in turn.pages_in:
            self._change(self._all.write(to_device(self._host_pages[host]), page))

    def _save(self, save: Save) -> None:
        self._snapshots[save.snapshot] = Snapshot(*self._all.save(save.slot, save.logits)())

    def _load(self, load: Load, request: Request) -> None:
        self._ask(load.slot, load.id, request)
        seen = np.zeros((1, self._config.vocab_size), bool)
        if request.sampling.repetition_penalty != 1 or self._processed:
            seen[0, list(request.prompt[: load.length])] = True
        last = request.prompt[load.length - 1 : load.length]
        token = np.array([last[0] if len(last) else 0], np.int32)
        held = self._snapshots[load.snapshot]
        call = self._all.load(held, load.slot, token, seen, load.resume)
        self._all.rows, self._all.logits = call()
        if load.resume:
            self._live.add(load.slot)

    def _chunk(self, chunk: Chunk, request: Request) -> tuple[Any, int]:
        """Reads it; log-probabilities of its tokens, if they were asked for, and how many count."""
        self._ask(chunk.slot, chunk.id, request)
        prompt = request.prompt[chunk.start : chunk.start + chunk.count + 1]
        widths = self._all.widths(chunk.start + chunk.count)
        width = next(width for width in widths if width >= chunk.width)
        tokens, targets = np.zeros((2, 1, width), np.int32)
        tokens[0, : chunk.count] = prompt[: chunk.count]
        targets[0, : len(prompt) - 1] = prompt[1:]
        iterations = self._iterations(request)
        self._all.rows, self._all.logits, hidden = self._all.prefill(
            chunk.slot, chunk.start, tokens, chunk.count, chunk.pages, iterations
        )()
        if request.prompt_logprobs is None:
            return None, 0
        top = self._most([request.prompt_logprobs])
        return self._all.score(hidden, targets, top)(), len(prompt) - 1

    def _first(self, firsts: Sequence[First], asked: Mapping[int, Request]) -> tuple[Any, ...]:
        starts, left = np.zeros(self.slots, bool), np.zeros(self.slots, np.int32)
        for one in firsts:
            self._ask(one.slot, one.id, asked[one.id])
            starts[one.slot], left[one.slot] = True, asked[one.id].max_new_tokens
            self._live.add(one.slot)
        allowed = self._allowed(one.slot for one in firsts)
        settings, top = self._settings_and_top()
        return self._change(self._all.first(starts, left, settings, top, allowed))

    def _decode(self, turn: Turn) -> Sequence[tuple[Any, ...]]:
        constrained = {slot for slot in self._live if self._asked[slot].constraint is not None}
        # A token that was chosen in this turn is not known to its constraint yet.
        waiting = constrained & {one.slot for one in turn.firsts}
        ends, waits = np.zeros(self.slots, bool), np.zeros(self.slots, bool)
        ends[list(self._ends)], waits[list(waiting)] = True, True
        steps = 1 if constrained else min(turn.steps, MOST_STEPS)
        settings, top = self._settings_and_top()
        allowed = self._allowed(constrained - waiting)
        ends, table, waits = self._shared(ends, self._all.table(turn.tables), waits)
        found = [
            self._change(self._all.decode(ends, n, settings, top, table, waits, allowed, most))
            for n, most in self._programs(steps)
        ]
        for slot in self._ends:
            self._ended(slot)
        self._ends = set()
        return found

    def _shared(self, *numbers: Any) -> Any:
        """On the device, if several programs get them."""
        return numbers if self._loops else jax.device_put(numbers, self._all.rows.reason.sharding)

    def _programs(self, steps: int) -> list[tuple[int | None, int]]:
        """`steps` and `most` of the programs that decode so many tokens together."""
        if self._loops:
            return [(steps, MOST_STEPS)]
        return [(None, FEW)] * (steps // FEW) + [(None, 1)] * (steps % FEW)

    def _change(self, call: Call) -> tuple[Any, ...]:
        """Runs a program that changes the rows; what else it returns."""
        found = call()
        self._all.rows, *others = (found,) if hasattr(found, "state") else found
        return tuple(others)

    # What slots were asked for.

    def _ask(self, slot: int, id: int, request: Request) -> None:
        """From now on the slot is this request's."""
        self._ends.discard(slot)
        if self._ids[slot] != id or self._asked[slot] is not request:
            self._live.discard(slot)
            self._ids[slot], self._asked[slot], self._settings = id, request, None
            self._all.count(self._counts())

    def _ended(self, slot: int) -> None:
        self._live.discard(slot)
        if self._fixed and self._asked[slot] is not _NOBODY:  # nothing is compiled again
            self._ids[slot], self._asked[slot], self._settings = -1, _NOBODY, None

    def _allowed(self, slots: Iterable[int]) -> Any:
        """The tokens that the constraints of these slots allow, see `programs.next_token`."""
        constraints = ((slot, self._asked[slot].constraint) for slot in slots)
        masks = {slot: one.mask() for slot, one in constraints if one is not None}
        if all(mask is None for mask in masks.values()):
            return self._all_allowed if self._fixed else None
        allowed = np.full(self._all_allowed.shape, ALL, np.uint32)
        for slot, mask in masks.items():
            if mask is not None:
                allowed[slot] = mask
        return jax.device_put(allowed, self._all_allowed.sharding)

    @functools.cached_property
    def _all_allowed(self) -> jax.Array:
        """On the device, so that it is not sent there again and again."""
        words = -(-self._config.vocab_size // 32)
        every = np.full((self.slots, words), ALL, np.uint32)
        return jax.device_put(every, self._all.rows.reason.sharding)

    def _counts(self) -> bool:
        """Whether it must be known how often each token was generated."""
        asked = [request.sampling for request in self._asked]
        penalised = any(one.presence_penalty or one.frequency_penalty for one in asked)
        return self._fixed or self._processed or penalised

    def _iterations(self, request: Request) -> np.ndarray | None:
        """Always an array where the model has GKA layers, so that the bits are the same whoever
        else asks for another number."""
        if not self._config.solves:
            return None
        given = request.num_iter
        return np.array([self._config.gka.num_iter if given is None else given], np.int32)

    def _most(self, asked: Sequence[int]) -> int:
        """How many of the most likely tokens a program tells."""
        if self._fixed and max(asked) <= MOST_LIKELY:
            return min(MOST_LIKELY, self._config.vocab_size)
        return min(power_of_two(max(asked)), self._config.vocab_size) if max(asked) else 0

    def _settings_and_top(self) -> tuple[Settings, int]:
        top = [request.top_logprobs for request in self._asked]
        if self._settings is None:
            found = stack_settings(
                None,
                [request.sampling for request in self._asked],
                [request.eos_ids for request in self._asked],
                [None] * self.slots,
                [request.min_new_tokens for request in self._asked],
                top if self._fixed else None,
            )
            iterations: Any = [self._iterations(request) for request in self._asked]
            if self._config.solves:
                found = dataclasses.replace(found, num_iter=np.concatenate(iterations))
            self._settings = jax.device_put(found, self._all.rows.reason.sharding)
        assert self._settings is not None
        return self._settings, self._most(top)

    def _calls(self) -> Iterator[Call]:
        """One call of each program, what is needed first at the beginning."""
        all, V = self._all, self._config.vocab_size
        none, zeros = np.zeros(self.slots, bool), np.zeros(self.slots, np.int32)
        settings, top = self._settings_and_top()
        allowed = self._allowed(())
        iterations, table = self._iterations(_NOBODY), all.table(())
        for n, most in dict.fromkeys(self._programs(FEW + 1)):
            ends, pages, waits = self._shared(none, table, none)
            yield all.decode(ends, n, settings, top, pages, waits, allowed, most)
        yield all.first(none, zeros, settings, top, allowed)
        for start in all.starts():
            for width in reversed(all.widths(start + 1)):
                tokens = np.zeros((1, width), np.int32)
                yield all.prefill(0, start, tokens, 1, (), iterations)
        seen, token = np.zeros((1, V), bool), np.zeros(1, np.int32)
        for logits in (False, True):
            yield (save := all.save(0, logits))
            held = Snapshot(*all.outcome(save))
            for resume in (False, True):
                yield all.load(held, 0, token, seen, resume)
        for width in all.widths():
            shape, dtype = (1, width, self._config.hidden_size), all.logits.dtype
            hidden: Any = jax.ShapeDtypeStruct(shape, dtype, sharding=all.logits.sharding)
            yield all.score(hidden, np.zeros((1, width), np.int32), self._most([0]))
        if all.pool is not None:
            yield all.copy([])
            yield all.zero([])
            yield (read := all.read(0))
            yield all.write(all.outcome(read), 0)


def loops_without_waiting() -> bool:
    """Whether the caller of a program can go on while it loops. GPUs ask the host after each step
    of a loop whose end is not known beforehand whether to go on, and keep the caller for that."""
    return jax.devices()[0].platform != "gpu"


def _joined(parts: Sequence[tuple[Any, ...]]) -> tuple[Any, ...] | None:
    """What several programs decoded, one after the other, as if one had."""
    if not parts:
        return None
    tokens, logprobs, reasons, top = zip(*parts, strict=True)

    def join(*arrays: np.ndarray) -> np.ndarray:
        return np.concatenate(arrays, axis=1)

    return join(*tokens), join(*logprobs), reasons[-1], jax.tree.map(join, *top)


def _batches(numbers: Sequence[Any]) -> Iterator[Sequence[Any]]:
    for start in range(0, len(numbers), MOST_PAGES):
        yield numbers[start : start + MOST_PAGES]


@functools.cache
def compilations() -> list[float]:
    """The seconds of each compilation of this process, which are heard of from now on."""
    found: list[float] = []

    def heard(event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            found.append(duration_secs)

    jax.monitoring.register_event_duration_secs_listener(heard)
    return found
