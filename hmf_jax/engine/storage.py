"""The arrays that requests live in, slots and a pool of pages, and the calls that change them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from hmf_jax.engine import paged, programs
from hmf_jax.engine.rows import Layout, Rows, map_appended
from hmf_jax.engine.settings import Processor, Settings
from hmf_jax.memory import device_bytes
from hmf_jax.model import HybridLM
from hmf_jax.packed import PackedModel
from hmf_jax.sharding import row_parts
from hmf_jax.stored import Call, compiled

STEP = 4  # from one width of chunks to the next
# Chunks that attention reads up to, and the next step from there. Each size is a program that takes
# seconds to trace; reading 32K tokens that are not there takes 1% of the time of a chunk of 2048.
READ = 16
# Tokens of a page, unless told otherwise. Attention takes 2% longer than from pages of 2048 and
# from buffers, a decode step as long (benchmarks/results); half a page per row is lost.
PAGE_SIZE = 1024
MOST_PAGES = 64  # that one call copies, or fills with zeros
# What `Storage.compile` has made, for all storages of this process that are alike.
_programs: dict[Any, jax.stages.Compiled] = {}
_kinds: dict[Any, int] = {}  # numbers of models that share programs: comparing these is free


class Snapshot(NamedTuple):
    """What a slot held outside of pages: `rows` of one, without pools; and logits [1, V]."""

    rows: Rows
    logits: jax.Array | None


def is_abstract(tree: Any) -> bool:
    """Whether there are no numbers in it, only their shapes: what compiling needs."""
    return any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(tree))


class Storage:
    """Arguments as in `hmf_jax.engine.device.Device`; an abstract model makes abstract arrays.

    Attributes:
      rows, logits: the arrays; whoever runs a `Call` that changes them puts the result here.
      pool: (P, page), or None if no layer has keys and values to keep in pages.
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
        processor: Processor | None,
        solver: str,
    ) -> None:
        self.config, self.slots, self.capacity = model.config, slots, capacity
        self.page_size, self.prefill_chunk = page_size, prefill_chunk
        self.appends, self._packed = model.appends, PackedModel.of(model)
        self._parts = 1 if model.mesh is None else row_parts(model.mesh)
        self._processor, self._solver = processor, solver
        self.pool = self._pool_of(pages)
        arrays = tuple((x.shape, x.dtype, x.sharding) for x in self._packed.arrays)
        self._kind = _kinds.setdefault((self._packed.structure, arrays), len(_kinds))
        empty = programs.empty.on(self._layout())
        static = dict(size=slots, capacity=capacity, pages=self.pool)
        call = Call(empty, (self._packed,), static=static)
        if is_abstract(self._packed):
            made = self.outcome(call)
        else:
            made = call()
            # Said to belong where they are: so is what comes back from host memory, and programs
            # are compiled for one or the other.
            place: Any = jax.tree.map(lambda x: x.sharding, made)
            if self._layout() is None:  # with the model: on any device
                place = self._packed.arrays[0].sharding
            made = jax.device_put(made, place)
        self.rows, self.logits = made
        self.page_bytes, self._fixed_bytes = self._sizes(model)

    @property
    def counts(self) -> bool:
        """Whether it is known how often each token was generated."""
        return self.rows.generated is not None

    def count(self, wanted: bool) -> None:
        """Begins to count tokens, or ends."""
        if not wanted:
            self.rows = dataclasses.replace(self.rows, generated=None)
        elif not self.counts:
            seen = self.rows.seen
            counts: Any = jax.ShapeDtypeStruct(seen.shape, jnp.int32, sharding=seen.sharding)
            if not is_abstract(seen):
                counts = jnp.zeros(seen.shape, jnp.int32, device=seen.sharding)
            self.rows = dataclasses.replace(self.rows, generated=counts)

    @property
    def snapshot_bytes(self) -> int:
        """Bytes of a snapshot with logits, on one device."""
        books = self.config.vocab_size * (1 + self.logits.dtype.itemsize + 4 * self.counts)
        return self._fixed_bytes + books

    def nbytes(self) -> int:
        """Bytes of the arrays on one device."""
        return device_bytes((self.rows, self.logits))

    def grow(self, capacity: int, pages: int) -> None:
        """Makes room for more tokens in every row, and for more pages."""
        self.capacity, self.pool = capacity, self._pool_of(pages)
        program = paged.grow_pools.on(self._layout(), self.counts)
        self.rows = program(self.rows, capacity, self.nowhere, self.appends)

    # Sizes.

    @property
    def nowhere(self) -> int:
        """The number of a page that does not exist."""
        return 0 if self.pool is None else self.pool[0]

    def table(self, tables: Sequence[Sequence[int]]) -> np.ndarray | None:
        """The pages of all slots as an array; None if there is no pool."""
        if self.pool is None:
            return None
        table = np.full((self.slots, self._most_pages), self.nowhere, np.int32)
        for slot, pages in enumerate(tables):
            table[slot, : len(pages)] = pages
        return table

    def widths(self, tokens: int = 0) -> list[int]:
        """What chunks are padded to, the smallest first, of rows that have so many tokens then.

        Where rows are long there are two: the time does not matter so much there.
        """
        widths = [min(programs.SMALLEST_CHUNK, self.prefill_chunk)]
        while widths[-1] < self.prefill_chunk:
            widths.append(min(widths[-1] * STEP, self.prefill_chunk))
        near = self._read_pages(tokens) == self._read_pages(0)
        return widths if near else sorted({*widths[1:2], widths[-1]})

    def starts(self) -> list[int]:
        """Beginnings of chunks, one for each number of pages that the attention of one reads."""
        starts = {}
        for start in range(0, self.capacity, self.prefill_chunk):
            starts.setdefault(self._read_pages(start + 1), start)
        return list(starts.values())

    @property
    def _most_pages(self) -> int:
        return -(-self.capacity // self.page_size)

    def _read_pages(self, tokens: int) -> int:
        """How many pages a chunk's attention reads, of a row of so many tokens: few sizes."""
        room = READ * self.prefill_chunk
        while room < tokens:
            room *= READ
        return min(-(-room // self.page_size), self._most_pages)

    def _pool_of(self, pages: int) -> tuple[int, int] | None:
        if not any(self.appends):
            return None
        if self.slots % self._parts == 0:
            if pages % self._parts:
                raise ValueError(
                    f"pages={pages} must be a multiple of {self._parts}: the mesh splits rows and "
                    "pages into so many parts."
                )
        elif pages % self._parts == 0:  # the rows are not split, so the pages must not be
            pages += 1
        return pages, self.page_size

    def _layout(self) -> Layout | None:
        return Layout.of(self._packed, self.slots, self.capacity, self.pool)

    def _sizes(self, model: HybridLM) -> tuple[int, int]:
        """Bytes of a page of all layers, and of what else a row has, on one device."""
        parts = 1 if self.slots % self._parts else self._parts  # one page and row on each
        pages = None if self.pool is None else (parts, self.page_size)
        state = model.abstract_state(parts, self.capacity, pages=pages)
        pools: list[Any] = []
        none: Any = None
        map_appended(pools.append, Rows(state, *[none] * 5), self.appends)
        page = device_bytes(pools)
        return page, device_bytes(state) - page

    # The programs with their arguments.

    def compile(self, calls: Iterable[Call]) -> None:
        """Makes what these calls need: found on disk or compiled, see `hmf_jax.stored`."""
        missing = [call for call in calls if call.ready is None]
        for call, program in zip(missing, compiled(missing), strict=True):
            _programs[self._key(call)] = program

    def outcome(self, call: Call) -> Any:
        """Arrays like those that it returns, for calls to be compiled; it runs on a mesh only."""
        device = self._packed.arrays[0].sharding
        if self._layout() is not None:  # where they will lie is known to the compiler
            return call()
        made = jax.eval_shape(lambda: call.program(*call.args, **call.options, **call.static))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), made)

    def _call(
        self, program: Any, *args: Any, options: dict[str, Any] | None = None, **static: Any
    ) -> Call:
        call = Call(program, args, options or {}, static)
        return call._replace(ready=_programs.get(self._key(call)))

    def _key(self, call: Call) -> Any:
        """Equal for calls that one program can serve."""
        ours = self._packed, self.rows, self.logits
        others = [x for x in call.args if not any(x is one for one in ours)]
        leaves, tree = jax.tree.flatten((others, call.options))
        sizes = self._kind, self.slots, self.capacity, self.pool, self.counts
        shapes = tuple(np.shape(x) for x in leaves)
        return sizes, call.program, tree, shapes, tuple(call.static.items())

    def prefill(
        self,
        slot: int,
        start: int,
        tokens: np.ndarray,
        count: int,
        pages: Sequence[int],
        num_iter: np.ndarray | None,
    ) -> Call:
        """See `paged.prefill_slot`; `pages` of the whole row."""
        table = np.full(self._read_pages(start + count), self.nowhere, np.int32)
        pages = pages[: len(table)]
        table[: len(pages)] = pages
        return self._call(
            paged.prefill_slot.on(self._layout(), self.counts), self._packed, self.rows,
            self.logits, np.int32(slot), table, tokens, np.array([count], np.int32), num_iter,
            np.bool_(start == 0), solver=self._solver,
        )  # fmt: skip

    def score(self, hidden: jax.Array, targets: np.ndarray, top: int) -> Call:
        """See `paged.score`."""
        return self._call(paged.score, self._packed, hidden, targets, top=top)

    def first(
        self, starts: np.ndarray, left: np.ndarray, settings: Settings, top: int, allowed: Any
    ) -> Call:
        """See `programs.first`."""
        program = programs.first.on(self._layout(), self.counts)
        args = self.rows, self.logits, starts, left, settings
        options = dict(allowed=allowed)
        return self._call(program, *args, options=options, top=top, processor=self._processor)

    def decode(
        self,
        ends: Any,
        steps: int | None,
        settings: Settings,
        top: int,
        table: Any,
        waits: Any,
        allowed: Any,
        most: int,
    ) -> Call:
        """See `programs.decode`."""
        count = None if steps is None else np.int32(steps)
        return self._call(
            programs.decode.on(self._layout(), self.counts), self._packed, self.rows, ends,
            count, settings, options=dict(table=table, waits=waits, allowed=allowed),
            top=top, processor=self._processor, solver=self._solver, most=most,
        )  # fmt: skip

    def save(self, slot: int, logits: bool) -> Call:
        """See `paged.save`."""
        layout = Layout.of(self._packed, 1, self.capacity, self.pool, marked=True)
        program, args = paged.save.on(layout, self.counts), (self.rows, self.logits, np.int32(slot))
        return self._call(program, *args, appends=self.appends, with_logits=logits)

    def load(
        self, held: Snapshot, slot: int, token: np.ndarray, seen: np.ndarray, resume: bool
    ) -> Call:
        """See `paged.load`."""
        rows = held.rows
        if rows.state.capacity != self.capacity:  # it grew in the meantime
            state = dataclasses.replace(rows.state, capacity=self.capacity)
            rows = dataclasses.replace(rows, state=state)
        program = paged.load.on(self._layout(), self.counts)
        args = self.rows, self.logits, rows, held.logits, np.int32(slot), token, seen
        return self._call(program, *args, appends=self.appends, resume=resume)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> Call:
        """See `paged.copy_pages`; at most `MOST_PAGES` of them."""
        return self._over_pages(paged.copy_pages, np.array(pairs, np.int32).reshape(-1, 2))

    def zero(self, pages: Sequence[int]) -> Call:
        """See `paged.zero_pages`; at most `MOST_PAGES` of them."""
        return self._over_pages(paged.zero_pages, np.array(pages, np.int32))

    def _over_pages(self, program: Any, numbers: np.ndarray) -> Call:
        padded = np.zeros((MOST_PAGES, *numbers.shape[1:]), np.int32)
        padded[: len(numbers)] = numbers
        program = program.on(self._layout(), self.counts)
        args = self.rows, padded, np.int32(len(numbers))
        return self._call(program, *args, appends=self.appends)

    def read(self, page: int) -> Call:
        """See `paged.read_page`."""
        return self._call(paged.read_page, self.rows, np.int32(page), appends=self.appends)

    def write(self, held: Any, page: int) -> Call:
        """See `paged.write_page`."""
        program = paged.write_page.on(self._layout(), self.counts)
        return self._call(program, self.rows, held, np.int32(page), appends=self.appends)
