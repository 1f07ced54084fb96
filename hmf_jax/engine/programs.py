"""Everything that is compiled to generate: pure functions over rows that share one batch.

    rows, logits = empty(packed, size, capacity)
    rows, logits = prefill(packed, rows, logits, tokens, lengths, num_iter)        # again and again
    rows, tokens, logprobs, reasons, top = first(rows, logits, starts, left, settings)   # one token
    rows, tokens, logprobs, reasons, top = decode(packed, rows, ends, steps, settings) # many tokens

They can be called in programs of one's own, as `hmf_jax.sample` does. The engine calls
`program.on(layout)`, compiled for one layout of its results, which is also that of its arguments:
one program each, on every mesh.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hmf_jax.engine.rows import (
    CAPACITY,
    EOS,
    ERROR,
    LENGTH,
    RUNNING,
    STOPPED,
    Rows,
    Top,
    program,
)
from hmf_jax.engine.rows import Layout as Layout  # they have names here, too
from hmf_jax.engine.rows import as_dicts as as_dicts
from hmf_jax.engine.settings import Context, Processor, Settings
from hmf_jax.engine.settings import stack_settings as stack_settings  # it has a name here, too
from hmf_jax.model import HybridLM
from hmf_jax.packed import PackedModel
from hmf_jax.pallas_kernels import PageTable
from hmf_jax.pallas_kernels.dispatch import why_no_hopper
from hmf_jax.sampling import adjust, choose, logprob
from hmf_jax.state import ModelState

SMALLEST_HALF = 8192  # tokens; what has been found to gain, see docs/performance.md
SMALLEST_CHUNK = 64  # tokens; the last chunk of a prompt is padded to this times a power of two
SMALLEST_CAPACITY = 256  # tokens
ALL = np.uint32(0xFFFFFFFF)  # a word of 32 tokens that are all allowed
MOST_STEPS = 64  # tokens per row and dispatch; one compiled program serves every smaller number


@program(others=1, static_argnames=("size", "capacity", "pages"))
def empty(
    packed: PackedModel, size: int, capacity: int, pages: tuple[int, int] | None = None
) -> tuple[Rows, jax.Array]:
    """Rows that hold nothing, and room for their logits [B, V].

    One program: made one by one, the arrays of 36 layers take 5 ms on one device, 70 on eight.
    """
    model = packed.model()
    logits = jnp.zeros((size, model.config.vocab_size), model.dtype)
    rows = Rows(
        state=model.init_state(size, capacity, pages=pages),
        seen=jnp.zeros(logits.shape, bool),
        token=jnp.zeros(size, jnp.int32),
        reason=jnp.full(size, STOPPED, jnp.int32),
        left=jnp.zeros(size, jnp.int32),
        made=jnp.zeros(size, jnp.int32),
    )
    return rows, logits


@program(others=1, donate_argnames=("rows", "logits"), static_argnames=("fresh", "impl", "solver"))
def prefill(
    packed: PackedModel,
    rows: Rows,
    logits: jax.Array,
    tokens: jax.Array,
    lengths: jax.Array,
    num_iter: Any,
    fresh: bool = False,
    impl: str = "auto",
    solver: str = "chebyshev",
) -> tuple[Rows, jax.Array]:
    """Feed the first lengths[b] of tokens [B, T]; logits [B, V] change in the rows that got any.

    fresh: no row holds anything yet, see `ModelState.fresh`.
    """
    model, state = packed.model(), dataclasses.replace(rows.state, fresh=fresh)
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
            solver=solver,
        )
        logits = jnp.where((count > 0)[:, None], new[:, 0], logits)
    valid = jnp.arange(tokens.shape[1]) < lengths[:, None]
    seen = rows.seen.at[jnp.arange(len(tokens))[:, None], tokens].max(valid)
    last = jnp.take_along_axis(tokens, jnp.maximum(lengths - 1, 0)[:, None], axis=1)[:, 0]
    token = jnp.where(lengths > 0, last, rows.token)
    return dataclasses.replace(rows, state=state, seen=seen, token=token), logits


@program(others=4, donate_argnames=("rows",), static_argnames=("top", "processor"))
def first(
    rows: Rows,
    logits: jax.Array,
    starts: jax.Array,
    left: jax.Array,
    settings: Settings,
    top: int = 0,
    processor: Processor | None = None,
    allowed: jax.Array | None = None,
) -> tuple[Rows, jax.Array, jax.Array, jax.Array, Top | None]:
    """The token after the prompt, in the rows that start [B] bool, which may produce `left` [B].

    Returns what `decode` does, for one step. `allowed`: see `next_token`.
    """
    before, begin = rows, jnp.where(starts, 0, rows.made)
    only = jnp.where(starts, RUNNING, STOPPED)
    left = jnp.where(starts, left, rows.left)
    rows = dataclasses.replace(rows, reason=only, left=left, made=begin)
    if rows.generated is not None:
        rows = dataclasses.replace(rows, generated=jnp.where(starts[:, None], 0, rows.generated))
    rows, token, logprob, found = next_token(rows, logits, settings, top, processor, allowed)
    rows = dataclasses.replace(rows, reason=jnp.where(starts, rows.reason, before.reason))
    found = jax.tree.map(lambda x: x[:, None], found)
    return rows, token[:, None], logprob[:, None], rows.reason, found


@program(
    others=4,
    donate_argnames=("rows",),
    static_argnames=("top", "processor", "impl", "solver", "most"),
)
def decode(
    packed: PackedModel,
    rows: Rows,
    ends: jax.Array,
    steps: jax.Array | None,
    settings: Settings,
    top: int = 0,
    processor: Processor | None = None,
    impl: str = "auto",
    solver: str = "chebyshev",
    table: jax.Array | None = None,
    waits: jax.Array | None = None,
    allowed: jax.Array | None = None,
    most: int = MOST_STEPS,
) -> tuple[Rows, jax.Array, jax.Array, jax.Array, Top | None]:
    """Up to `steps` tokens for each row that runs and is not to end now, `ends` [B] bool.

    Args:
      steps: at most `most`, which is known when compiling. None: just as many, whether a row still
        runs or not: a loop whose end is not known beforehand keeps the callers of GPUs waiting.
      table: [B, M] int32, the pages of each row, if rows have pages (`PageTable`).
      waits: [B] bool, rows that get no token this time; None: none.
      allowed: see `next_token`.

    Returns the rows, tokens [B, most] (-1 where there is none), their logprobs, the reason [B]
    of each row, and the `top` most likely tokens of each step (None: 0).
    """
    model = packed.model()
    stopped = ends & (rows.reason == RUNNING)
    reason = jnp.where(stopped, STOPPED, rows.reason)
    waits = jnp.zeros_like(ends) if waits is None else waits & (reason == RUNNING)
    rows = dataclasses.replace(rows, reason=jnp.where(waits, STOPPED, reason))
    if table is not None:
        rows = dataclasses.replace(rows, state=with_pages(model, rows.state, table))
    options: dict[str, Any] = dict(
        top=top, processor=processor, impl=impl, solver=solver, allowed=allowed
    )
    step = functools.partial(one_step, model, settings=settings, **options)
    shape = (len(ends), most)
    found: tuple[Any, ...] = (jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32))
    if top:
        found += (Top(jnp.zeros((*shape, top), jnp.int32), jnp.zeros((*shape, top), jnp.float32)),)

    def body(i, carry):
        rows, found = carry
        rows, *new = step(rows)
        put = functools.partial(jax.tree.map, lambda all, one: all.at[:, i].set(one))
        return rows, put(found, tuple(new[: len(found)]))

    def more(carry):
        return (carry[0] < steps) & jnp.any(carry[1].reason == RUNNING)

    if steps is None:
        rows, found = jax.lax.fori_loop(0, most, body, (rows, found))
    else:
        begin = jnp.int32(0), rows, found
        _, rows, found = jax.lax.while_loop(more, lambda c: (c[0] + 1, *body(c[0], c[1:])), begin)
    reason = jnp.where(waits, RUNNING, rows.reason)
    state = dataclasses.replace(rows.state, pages=None)
    rows = dataclasses.replace(rows, reason=reason, state=state)
    return rows, found[0], found[1], rows.reason, found[2] if top else None


def one_step(
    model: HybridLM,
    rows: Rows,
    settings: Settings,
    top: int = 0,
    processor: Processor | None = None,
    impl: str = "auto",
    solver: str = "chebyshev",
    allowed: jax.Array | None = None,
) -> tuple[Rows, jax.Array, jax.Array, Top | None]:
    """Feeds the newest token of each row that runs, and chooses the next one."""
    logits, state = model(
        rows.token[:, None],
        lengths=(rows.reason == RUNNING).astype(jnp.int32),
        state=rows.state,
        num_iter=settings.num_iter,
        last_only=True,
        impl=impl,
        solver=solver,
    )
    assert state is not None
    rows = dataclasses.replace(rows, state=state)
    return next_token(rows, logits[:, 0], settings, top, processor, allowed)


def with_pages(model: HybridLM, state: ModelState, table: jax.Array) -> ModelState:
    """The state with the pages of its rows, table [B, M]; as it is if no layer has any."""
    if (size := state.pool_size(model.appends)) is None:
        return state
    return dataclasses.replace(state, pages=PageTable.of(table, *size))


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


def next_token(
    rows: Rows,
    logits: jax.Array,
    settings: Settings,
    top: int = 0,
    processor: Processor | None = None,
    allowed: jax.Array | None = None,
) -> tuple[Rows, jax.Array, jax.Array, Top | None]:
    """Sample a token for each row that runs from logits [B, V]; say which rows end with it.

    This is the only place that decides whether a row has ended. That logits are not finite is read
    off their maximum and their normaliser, which are needed anyway.

    allowed: [B, ceil(V / 32)] uint32, the tokens that may be chosen, token t in bit t % 32 of
    word t // 32; None: all.

    Returns the rows, tokens [B] (-1 in rows that do not run, or have none to choose), their
    logprobs [B] and the most likely tokens.
    """
    runs, raw = rows.reason == RUNNING, logits.astype(jnp.float32)
    scores = adjust(raw, settings.sampling, rows.seen, rows.generated)
    if settings.least is not None:
        early = rows.made < settings.least
        scores = jax.lax.cond(
            jnp.any(early), lambda s: _without_ends(s, settings.eos, early), lambda s: s, scores
        )
    if processor is not None:
        scores = _processed(processor, scores, rows)
    if allowed is not None:
        scores = jax.lax.cond(
            jnp.all(allowed == ALL), lambda s: s, lambda s: _only(s, allowed), scores
        )
    token, ok = choose(scores, settings.sampling, rows.state.length)
    score, total = logprob(raw, token)
    makes = runs & ok & jnp.isfinite(total)
    token = jnp.where(makes, token, rows.token)
    left = rows.left - makes
    # The token is fed with the next step: a row is full if there is no room for it then.
    full = rows.state.length + 1 >= rows.state.capacity
    reason = jnp.where(full, CAPACITY, RUNNING)
    reason = jnp.where(left <= 0, LENGTH, reason)
    reason = jnp.where(jnp.any(token[:, None] == settings.eos, axis=1), EOS, reason)
    reason = jnp.where(makes, reason, ERROR)
    at = jnp.arange(len(token)), token
    counts = rows.generated
    rows = dataclasses.replace(
        rows,
        seen=rows.seen.at[at].max(makes),
        token=token,
        reason=jnp.where(runs, reason, rows.reason),
        left=left,
        made=rows.made + makes,
        generated=None if counts is None else counts.at[at].add(makes),
    )
    found = _most_likely(raw, total, top, settings.top) if top else None
    return rows, jnp.where(makes, token, -1), score, found


def _only(scores: jax.Array, allowed: jax.Array) -> jax.Array:
    """Scores with -inf at all other tokens, see `next_token`."""
    bits = (allowed[:, :, None] >> jnp.arange(32, dtype=jnp.uint32)) & 1
    bits = bits.reshape(len(scores), -1)[:, : scores.shape[1]]
    return jnp.where(bits == 1, scores, -jnp.inf)


def _without_ends(scores: jax.Array, eos: jax.Array, rows: jax.Array) -> jax.Array:
    """Scores with -inf at the end tokens of these rows."""
    ends = jnp.where(rows[:, None] & (eos >= 0), eos, scores.shape[1])
    return scores.at[jnp.arange(len(scores))[:, None], ends].set(-jnp.inf, mode="drop")


def _most_likely(raw: jax.Array, total: jax.Array, top: int, asked: jax.Array | None) -> Top:
    """The `top` most likely tokens of logits; zeros if no row has `asked`."""

    def find(raw: jax.Array) -> Top:
        values, ids = jax.lax.top_k(raw, top)
        return Top(ids, values - total[:, None])

    if asked is None:
        return find(raw)
    shape = (len(raw), top)
    none = Top(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, raw.dtype))
    return jax.lax.cond(jnp.any(asked > 0), find, lambda _: none, raw)


def _processed(processor: Processor, scores: jax.Array, rows: Rows) -> jax.Array:
    assert rows.generated is not None
    context = Context(rows.token, rows.state.length, rows.made, rows.seen, rows.generated)
    new = jnp.asarray(processor(scores, context))
    if new.shape != scores.shape:
        raise ValueError(
            f"The processor made {new.shape} of logits {scores.shape}; it must keep their shape."
        )
    return new.astype(scores.dtype)


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n, or `least` if that is larger."""
    return max(least, 1 << max(n - 1, 0).bit_length())
