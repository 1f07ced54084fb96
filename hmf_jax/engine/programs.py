"""Everything that is compiled to generate: pure functions over rows that share one batch.

    rows, logits = empty(packed, size, capacity)
    rows, logits = prefill(packed, rows, logits, tokens, lengths, num_iter)        # again and again
    rows, tokens, logprobs, reasons = first(rows, logits, starts, left, settings)        # one token
    rows, tokens, logprobs, reasons = decode(packed, rows, ends, steps, settings)      # many tokens

They can be called in programs of one's own. The engine calls `program.on(layout)`, compiled for one
layout of its results, which is also that of its arguments: one program each, on every mesh.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hmf_jax.model import HybridLM
from hmf_jax.packed import PackedModel
from hmf_jax.pallas_kernels.dispatch import why_no_hopper
from hmf_jax.sampling import SamplingArrays, SamplingParams, sample, stack_params
from hmf_jax.state import ModelState

SMALLEST_HALF = 8192  # tokens; what has been found to gain, see docs/performance.md
MOST_STEPS = 64  # tokens per row and dispatch; one compiled program serves every smaller number
END_IDS = 16  # end tokens that fit into the smallest table; a larger one is another program

Appends = tuple[tuple[str, ...], ...]  # `Kind.appends` of each layer

RUNNING, EOS, LENGTH, CAPACITY, STOPPED = range(5)  # why a row has ended; RUNNING: it has not


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Rows:
    """What a batch carries from program to program; donated to each of them.

    Attributes:
      state: of the model.
      seen: [B, V] bool, tokens in the row, for the repetition penalty.
      token: [B] int32, the newest token, not yet in the state.
      reason: [B] int32, why the row has ended (`EOS`, ...), 0 while it runs.
      left: [B] int32, tokens that the row may still produce.
    """

    state: ModelState
    seen: jax.Array
    token: jax.Array
    reason: jax.Array
    left: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """What each row was asked for; read only.

    Attributes:
      sampling: see `hmf_jax.sampling`.
      eos: [B, E] int32 end tokens, padded with -1.
      num_iter: [B] int32; None = the config's.
    """

    sampling: SamplingArrays
    eos: np.ndarray
    num_iter: Any


def stack_settings(
    own_num_iter: int | None,
    sampling: Sequence[SamplingParams],
    eos: Sequence[Sequence[int]],
    num_iter: Sequence[int | None],
) -> Settings:
    """Settings of all rows as arrays. `own_num_iter`: the config's, None without GKA layers."""
    width = max([END_IDS, *map(len, eos)])
    table = np.full((len(eos), 1 << (width - 1).bit_length()), -1, np.int32)
    for row, ids in enumerate(eos):
        table[row, : len(ids)] = ids

    # Plain JAX on a GPU asks the host "once more?" in every iteration unless their number is known
    # when compiling, so the config's own is not passed as an array. (Kernels do not care.)
    iterations = None
    if own_num_iter is not None:
        chosen = [own_num_iter if n is None else n for n in num_iter]
        if set(chosen) != {own_num_iter}:
            iterations = np.array(chosen, np.int32)
    return Settings(stack_params(sampling), table, iterations)


@dataclasses.dataclass(frozen=True, eq=False)
class Layout:
    """How the results of a program lie on a mesh. Equal ones are one object.

    Attributes:
      structure, leaves: `Rows` of shardings, taken apart.
      other: sharding of everything else: whole on every device.
    """

    structure: Any
    leaves: list[NamedSharding]
    other: NamedSharding

    @classmethod
    def of(cls, packed: PackedModel, size: int, capacity: int) -> Layout | None:
        """For so many rows of this model; None without a mesh."""
        key = packed.structure, size, capacity
        if key not in _layouts:
            model = packed.model()
            _layouts[key] = None if model.mesh is None else cls._of(model, size, capacity)
        return _layouts[key]

    @classmethod
    def _of(cls, model: HybridLM, size: int, capacity: int) -> Layout:
        assert model.mesh is not None
        whole: Any = NamedSharding(model.mesh, PartitionSpec())
        state = jax.tree.map(lambda x: x.sharding, model.abstract_state(size, capacity))
        leaves, structure = jax.tree.flatten(Rows(state, whole, whole, whole, whole))
        return cls(structure, leaves, whole)

    def rows(self, fresh: bool) -> Rows:
        """The shardings of `Rows` whose state is fresh or not."""
        rows = jax.tree.unflatten(self.structure, self.leaves)
        return dataclasses.replace(rows, state=dataclasses.replace(rows.state, fresh=fresh))


_layouts: dict[Any, Layout | None] = {}


class Program:
    """A pure function of and to `Rows`, and what it was compiled to: a program for each layout.

    Args:
      function: returns `Rows` first.
      others: how many arrays it returns after them.
      fresh: whether it returns a state that has seen no token.
      options: of `jax.jit`.
    """

    def __init__(
        self, function: Callable[..., Any], others: int, fresh: bool = False, **options: Any
    ):
        self._function, self._options = function, options
        self._others, self._fresh = others, fresh
        self._compiled: dict[Layout | None, Any] = {}
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The function, as part of whatever is being traced."""
        return self._function(*args, **kwargs)

    def on(self, layout: Layout | None) -> Any:
        """The function compiled for this layout."""
        if layout not in self._compiled:
            options = dict(self._options)
            if layout is not None:
                rows = layout.rows(self._fresh)
                others = (layout.other,) * self._others
                options["out_shardings"] = (rows, *others) if others else rows
            self._compiled[layout] = jax.jit(self._function, **options)
        return self._compiled[layout]

    def _cache_size(self) -> int:
        """How many programs there are."""
        return sum(program._cache_size() for program in self._compiled.values())


def program(others: int, fresh: bool = False, **options: Any) -> Callable[..., Program]:
    """Makes a `Program` of a function."""
    return functools.partial(Program, others=others, fresh=fresh, **options)


@program(others=1, fresh=True, static_argnames=("size", "capacity"))
def empty(packed: PackedModel, size: int, capacity: int) -> tuple[Rows, jax.Array]:
    """Rows that hold nothing, and room for their logits [B, V].

    One program: made one by one, the arrays of 36 layers take 5 ms on one device, 70 on eight.
    """
    model = packed.model()
    logits = jnp.zeros((size, model.config.vocab_size), model.dtype)
    rows = Rows(
        state=model.init_state(size, capacity),
        seen=jnp.zeros(logits.shape, bool),
        token=jnp.zeros(size, jnp.int32),
        reason=jnp.full(size, STOPPED, jnp.int32),
        left=jnp.zeros(size, jnp.int32),
    )
    return rows, logits


@program(others=1, donate_argnames=("rows", "logits"), static_argnames=("impl",))
def prefill(
    packed: PackedModel,
    rows: Rows,
    logits: jax.Array,
    tokens: jax.Array,
    lengths: jax.Array,
    num_iter: Any,
    impl: str = "auto",
) -> tuple[Rows, jax.Array]:
    """Feed the first lengths[b] of tokens [B, T]; logits [B, V] change in the rows that got any."""
    model, state = packed.model(), rows.state
    size = piece_size(model.mesh, tokens.shape[1])
    for start in range(0, tokens.shape[1], size):
        count = jnp.clip(lengths - start, 0, size)
        new, state = model(
            tokens[:, start : start + size],
            lengths=count,
            state=state,
            num_iter=num_iter,
            last_only=True,
            impl=impl,
        )
        logits = jnp.where((count > 0)[:, None], new[:, 0], logits)
    valid = jnp.arange(tokens.shape[1]) < lengths[:, None]
    seen = rows.seen.at[jnp.arange(len(tokens))[:, None], tokens].max(valid)
    return dataclasses.replace(rows, state=state, seen=seen), logits


@program(others=0, donate_argnames=("rows",))
def insert(rows: Rows, one: Rows, row: jax.Array) -> Rows:
    """Row 0 of `one` in place of a row."""
    put = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=row, axis=0)
    return jax.tree.map(put, begun(rows), begun(one))


@program(others=0)
def take(rows: Rows, row: jax.Array) -> Rows:
    """A copy of one row, as a batch of one."""
    cut = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=row, slice_size=1, axis=0)
    return jax.tree.map(cut, begun(rows))


@program(others=0, static_argnames=("appends",))
def mark(rows: Rows, row: jax.Array, appends: Appends) -> Rows:
    """What `insert` needs to bring a row back to where it is now, as a batch of one.

    Nothing is copied of the arrays that tokens are only appended to: no entry of theirs is left.
    """
    return _map_appended(lambda x: x[:, :0], take(rows, row), appends)


@program(others=0, static_argnames=("capacity", "appends"))
def grow(rows: Rows, capacity: int, appends: Appends) -> Rows:
    """The same rows with room for more tokens."""

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, 0), (0, capacity - x.shape[1]), *[(0, 0)] * (x.ndim - 2)])

    rows = _map_appended(pad, begun(rows), appends)
    return dataclasses.replace(rows, state=dataclasses.replace(rows.state, capacity=capacity))


@program(others=0, donate_argnames=("rows",))
def clear(rows: Rows, which: jax.Array) -> Rows:
    """Empties the rows where `which` [B] is True."""
    rows = begun(rows)
    return dataclasses.replace(
        rows, state=rows.state.reset(which), seen=rows.seen & ~which[:, None]
    )


@program(others=3, donate_argnames=("rows",))
def first(
    rows: Rows, logits: jax.Array, starts: jax.Array, left: jax.Array, settings: Settings
) -> tuple[Rows, jax.Array, jax.Array, jax.Array]:
    """The token after the prompt, in the rows that start [B] bool, which may produce `left` [B].

    Returns the rows, tokens [B, 1] (-1 in the other rows), their logprobs [B, 1], and the reason
    [B] of each row.
    """
    before = rows.reason
    only = jnp.where(starts, RUNNING, STOPPED)
    left = jnp.where(starts, left, rows.left)
    rows = dataclasses.replace(rows, reason=only, left=left)
    rows, logprob = _choose(rows, logits, settings)
    rows = dataclasses.replace(rows, reason=jnp.where(starts, rows.reason, before))
    token = jnp.where(starts, rows.token, -1)
    return rows, token[:, None], logprob[:, None], rows.reason


@program(others=3, donate_argnames=("rows",), static_argnames=("impl",))
def decode(
    packed: PackedModel,
    rows: Rows,
    ends: jax.Array,
    steps: jax.Array,
    settings: Settings,
    impl: str = "auto",
) -> tuple[Rows, jax.Array, jax.Array, jax.Array]:
    """Up to `steps` tokens for each row that runs and is not to end now, `ends` [B] bool.

    Returns the rows, tokens [B, MOST_STEPS] (-1 where there is none), their logprobs, and the
    reason [B] of each row.
    """
    model = packed.model()
    stopped = ends & (rows.reason == RUNNING)
    rows = dataclasses.replace(begun(rows), reason=jnp.where(stopped, STOPPED, rows.reason))
    shape = (len(ends), MOST_STEPS)

    def body(carry):
        i, rows, tokens, logprobs = carry
        runs = rows.reason == RUNNING
        logits, state = model(
            rows.token[:, None],
            lengths=runs.astype(jnp.int32),
            state=rows.state,
            num_iter=settings.num_iter,
            last_only=True,
            impl=impl,
        )
        rows, logprob = _choose(dataclasses.replace(rows, state=state), logits[:, 0], settings)
        tokens = tokens.at[:, i].set(jnp.where(runs, rows.token, -1))
        return i + 1, rows, tokens, logprobs.at[:, i].set(logprob)

    def more(carry):
        return (carry[0] < steps) & jnp.any(carry[1].reason == RUNNING)

    start = (jnp.int32(0), rows, jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32))
    _, rows, tokens, logprobs = jax.lax.while_loop(more, body, start)
    return rows, tokens, logprobs, rows.reason


def _map_appended(do: Callable[[jax.Array], jax.Array], rows: Rows, appends: Appends) -> Rows:
    """`do` to the arrays of each layer that `appends` names."""
    layers = tuple(
        dataclasses.replace(layer, **{name: do(getattr(layer, name)) for name in names})
        for layer, names in zip(rows.state.layers, appends, strict=True)
    )
    return dataclasses.replace(rows, state=dataclasses.replace(rows.state, layers=layers))


def begun(rows: Rows) -> Rows:
    """The rows, of which some hold something: `fresh` is part of what a program is compiled for."""
    return dataclasses.replace(rows, state=dataclasses.replace(rows.state, fresh=False))


def piece_size(mesh: Mesh | None, tokens: int) -> int:
    """How many of a chunk's tokens the model gets at once; it is called again for the others.

    Under tensor parallelism half of a long chunk: the all-reduces of one half then overlap with the
    products of the other. Not over two devices (nothing is gained), nor where attention would lose
    more by continuing a cache (its kernels that do so need a Hopper GPU).
    """
    if mesh is None or tokens < 2 * SMALLEST_HALF or why_no_hopper():
        return tokens
    halve = mesh.shape["tp"] * mesh.shape["rep"] >= 4 and tokens % (2 * mesh.shape["sp"]) == 0
    return tokens // 2 if halve else tokens


def _choose(rows: Rows, logits: jax.Array, settings: Settings) -> tuple[Rows, jax.Array]:
    """Sample a token for each row that runs from logits [B, V]; say which rows end with it.

    This is the only place that decides whether a row has ended.
    """
    runs = rows.reason == RUNNING
    token, logprob = sample(logits, settings.sampling, rows.state.length, rows.seen)
    token = jnp.where(runs, token, rows.token)
    left = rows.left - runs
    # The token is fed with the next step: a row is full if there is no room for it then.
    full = rows.state.length + 1 >= rows.state.capacity
    reason = jnp.where(full, CAPACITY, RUNNING)
    reason = jnp.where(left <= 0, LENGTH, reason)
    reason = jnp.where(jnp.any(token[:, None] == settings.eos, axis=1), EOS, reason)
    seen = rows.seen.at[jnp.arange(len(token)), token].max(runs)
    rows = dataclasses.replace(
        rows,
        seen=seen,
        token=token,
        reason=jnp.where(runs, reason, rows.reason),
        left=left,
    )
    return rows, logprob
