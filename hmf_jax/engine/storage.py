"""The arrays that requests live in, slots and a pool of pages, and the calls that change them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
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

STEP = 4  # from one width of chunks to the next
# Chunks that attention reads up to, and the next step from there. Each size is a program that takes
# seconds to trace; reading 32K tokens that are not there takes 1% of the time of a chunk of 2048.
READ = 16
# Tokens of a page, unless told otherwise. Attention takes 2% longer than from pages of 2048 and
# from buffers, a decode step as long (benchmarks/results); half a page per row is lost.
PAGE_SIZE = 1024
MOST_PAGES = 64  # that one call copies, or fills with zeros


class Snapshot(NamedTuple):
    """What a slot held outside of pages: `rows` of one, without pools; and logits [1, V]."""

    rows: Rows
    logits: jax.Array | None


class Call(NamedTuple):
    """A compiled program and its arguments."""

    program: Any
    args: tuple[Any, ...]
    options: dict[str, Any]

    def __call__(self) -> Any:
        """What it returns; of abstract arguments, what that would look like."""
        if not is_abstract(self.args):
            return self.program(*self.args, **self.options)
        device = jax.tree.leaves(self.args)[0].sharding
        made = jax.eval_shape(lambda: self.program(*self.args, **self.options))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), made)

    def compile(self) -> Any:
        """Begins to compile it: traced now, the rest in the function that is returned."""
        return self.program.lower(*self.args, **self.options).compile


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
        empty = programs.empty.on(self._layout())
        made = Call(empty, (self._packed, slots, capacity), dict(pages=self.pool))()
        if not is_abstract(made):
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
        args = (
            self._packed, self.rows, self.logits, np.int32(slot), table, tokens,
            np.array([count], np.int32), num_iter, np.bool_(start == 0),
        )  # fmt: skip
        options = dict(solver=self._solver)
        return Call(paged.prefill_slot.on(self._layout(), self.counts), args, options)

    def score(self, hidden: jax.Array, targets: np.ndarray, top: int) -> Call:
        """See `paged.score`."""
        return Call(paged.score, (self._packed, hidden, targets), dict(top=top))

    def first(
        self, starts: np.ndarray, left: np.ndarray, settings: Settings, top: int, allowed: Any
    ) -> Call:
        """See `programs.first`."""
        args = self.rows, self.logits, starts, left, settings
        options = dict(top=top, processor=self._processor, allowed=allowed)
        return Call(programs.first.on(self._layout(), self.counts), args, options)

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
        args = self._packed, self.rows, ends, count, settings
        options = dict(top=top, processor=self._processor, solver=self._solver)
        options |= dict(table=table, waits=waits, allowed=allowed, most=most)
        return Call(programs.decode.on(self._layout(), self.counts), args, options)

    def save(self, slot: int, logits: bool) -> Call:
        """See `paged.save`."""
        layout = Layout.of(self._packed, 1, self.capacity, self.pool, marked=True)
        options = dict(appends=self.appends, with_logits=logits)
        args = self.rows, self.logits, np.int32(slot)
        return Call(paged.save.on(layout, self.counts), args, options)

    def load(
        self, held: Snapshot, slot: int, token: np.ndarray, seen: np.ndarray, resume: bool
    ) -> Call:
        """See `paged.load`."""
        rows = held.rows
        if rows.state.capacity != self.capacity:  # it grew in the meantime
            state = dataclasses.replace(rows.state, capacity=self.capacity)
            rows = dataclasses.replace(rows, state=state)
        args = self.rows, self.logits, rows, held.logits, np.int32(slot), token, seen
        options = dict(appends=self.appends, resume=resume)
        return Call(paged.load.on(self._layout(), self.counts), args, options)

    def copy(self, pairs: Sequence[tuple[int, int]]) -> Call:
        """See `paged.copy_pages`; at most `MOST_PAGES` of them."""
        return self._over_pages(paged.copy_pages, np.array(pairs, np.int32).reshape(-1, 2))

    def zero(self, pages: Sequence[int]) -> Call:
        """See `paged.zero_pages`; at most `MOST_PAGES` of them."""
        return self._over_pages(paged.zero_pages, np.array(pages, np.int32))

    def _over_pages(self, program: Any, numbers: np.ndarray) -> Call:
        padded = np.zeros((MOST_PAGES, *numbers.shape[1:]), np.int32)
        padded[: len(numbers)] = numbers
        args = self.rows, padded, np.int32(len(numbers))
        return Call(program.on(self._layout(), self.counts), args, dict(appends=self.appends))

    def read(self, page: int) -> Call:
        """See `paged.read_page`."""
        return Call(paged.read_page, (self.rows, np.int32(page)), dict(appends=self.appends))

    def write(self, held: Any, page: int) -> Call:
        """See `paged.write_page`."""
        args = self.rows, held, np.int32(page)
        program = paged.write_page.on(self._layout(), self.counts)
        return Call(program, args, dict(appends=self.appends))
