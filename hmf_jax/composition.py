"""State composition: the parts of a long context are read side by side, then made one state.

    state = hmf_jax.compose(model, context, chunks=4, prefix=instructions)
    model.generate([question], state=state)

Nothing is trained, and no part is longer than what the model was trained on; attention and
positions of the parts overlap. Source: PICASO, arXiv 2502.17605.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hmf_jax.config import HybridConfig
from hmf_jax.engine import Tokens, check_prompts
from hmf_jax.mixers import KINDS, Parts, kinds_within
from hmf_jax.mixers.parts import Span
from hmf_jax.model import HybridLM, PackedModel
from hmf_jax.state import ModelState

KV = ("concat", "last", "full")
SSM = ("soup", "fuse", "zero")
ROOM = 512  # tokens that fit after the context unless a capacity is given


def compose(
    model: HybridLM,
    context: Tokens,
    chunks: int,
    *,
    prefix: Tokens = (),
    kv: str = "concat",
    ssm: str = "soup",
    sequential: bool = False,
    capacity: int | None = None,
    prefill_chunk: int = 2048,
    num_iter: int | None = None,
    impl: str = "auto",
) -> ModelState:
    """Read a context in `chunks` parts, each as if it were alone, and merge what they leave behind.

    kv and ssm are the two halves of the original's compose_type: its "concat_kv_soup_ssm" is the
    default here, its "sw" is "last" (there it keeps everything), its "kv_only" is ssm="zero".

    Args:
      model: the model.
      context: token ids [L]; what follows it (a question) is not part of it.
      chunks: number of parts N of ceil(L / N) tokens, the last one being shorter.
      prefix: token ids in front of every part, for example instructions.
      kv: keys and values of attention, with a window or without. "concat": of the prefix and all
        parts, one after the other; "last": of the prefix and the last part only; "full": of one
        ordinary pass over the whole context (without a prefix), the parts only make states.
      ssm: states of all other layers. "soup": the mean over the parts; "fuse": added up as their
        kind does it, for GKA the sum (additive information), for Mamba2 the mean over all orders in
        which the parts could follow each other (PICASO-S); "zero": nothing. Convolutions keep the
        mean of their last inputs, with "zero" nothing. B'MOJO-F: kv for its windows, ssm for its
        inner mixer.
      sequential: number the tokens of a part after those of the parts before. By default all parts
        start where the prefix ends, so that a long context needs no position that a part does not.
      capacity: tokens that the state can hold, those of the context included; default: 512 more.
      prefill_chunk: parts are fed in pieces of this many tokens; never changes the result.
      num_iter, impl: as in `HybridLM.__call__`.

    Returns:
      A state of one row, which `model(tokens, state=...)` and `generate(..., state=...)` continue.

    Raises:
      ValueError: a bad argument, more chunks than tokens, a part beyond max_position_embeddings, or
        "fuse" for a kind that cannot add states up (Gated DeltaNet); nothing has run then.
    """
    config = model.config
    (context,) = check_prompts([context], config.vocab_size)
    (prefix,) = check_prompts([prefix], config.vocab_size) if len(prefix) else ([],)
    for name, value, known in (("kv", kv, KV), ("ssm", ssm, SSM)):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}.")
    if not 1 <= chunks <= len(context):
        raise ValueError(f"{chunks=} must be between 1 and the {len(context)} tokens of context.")
    if prefix and kv == "full":
        raise ValueError("kv='full' reads the context once: let it start with the prefix instead.")
    if prefill_chunk < 1:
        raise ValueError(f"{prefill_chunk=} must be at least 1.")
    for kind in kinds_within(config.student_kinds, config.sections) if ssm == "fuse" else ():
        if not kind.fuses:
            raise ValueError(f"{kind.label} states cannot be fused; use ssm='soup'.")

    parts = _cut(context, chunks, even=kv == "full")
    rows = [prefix + part for part in parts]
    lengths, P = [len(row) for row in rows], len(prefix)
    longest = max(lengths)
    last = 0 if kv != "last" else len(rows) - 1
    spans = [(i, 0 if i == last else P, n) for i, n in enumerate(lengths) if i >= last]
    held = sum(end - start for _, start, end in spans)
    start = longest if kv != "full" and not sequential else P + len(context)
    room = config.max_position_embeddings - start
    capacity = held + min(ROOM, room) if capacity is None else capacity
    if not held < capacity <= held + room:
        raise ValueError(
            f"After {held} tokens, at position {start} of max_position_embeddings="
            f"{config.max_position_embeddings}, {capacity=} leaves no room or goes beyond: "
            f"choose one up to {held + room}, or more chunks."
        )
    feed = partial(_feed, model, prefill_chunk=prefill_chunk, num_iter=num_iter, impl=impl)
    before = [0, *itertools.accumulate(map(len, parts))] if sequential else [0] * len(parts)
    state = feed(rows, [_positions(P, n, b) for n, b in zip(lengths, before, strict=False)])
    whole = feed([context], [np.arange(held)], capacity=capacity) if kv == "full" else None
    return _merge(config, state, whole, tuple(spans), tuple(lengths), start, capacity, ssm)


def _cut(context: list[int], chunks: int, even: bool) -> list[list[int]]:
    """Parts of ceil(L / N) tokens, the last one shorter; even: sizes that differ by one at most."""
    if even:
        return [list(part) for part in np.array_split(context, chunks)]
    size = math.ceil(len(context) / chunks)
    return [context[at : at + size] for at in range(0, len(context), size)]


def _positions(prefix: int, length: int, before: int) -> np.ndarray:
    """Of a row: its prefix from 0 on, its part after as many tokens of other parts."""
    at = np.arange(length)
    return np.where(at < prefix, at, at + before)


def _feed(
    model: HybridLM,
    rows: Sequence[Sequence[int]],
    positions: Sequence[np.ndarray],
    *,
    prefill_chunk: int,
    capacity: int | None = None,
    **options: Any,
) -> ModelState:
    """The state after these rows, which need not be equally long."""
    size = max(map(len, rows))
    tokens, at, valid = (np.zeros((len(rows), size), np.int32) for _ in range(3))
    for i, (row, where) in enumerate(zip(rows, positions, strict=True)):
        tokens[i, : len(row)], at[i, : len(row)], valid[i, : len(row)] = row, where, 1
    state, packed = model.init_state(len(rows), capacity or size), PackedModel.of(model)
    for start in range(0, size, prefill_chunk):
        piece = [x[:, start : start + prefill_chunk] for x in (tokens, at, valid)]
        state = _prefill(packed, state, *piece, fresh=start == 0, **options)
    return state


@partial(jax.jit, donate_argnames="state", static_argnames=("fresh", "num_iter", "impl"))
def _prefill(packed, state, tokens, positions, valid, fresh, num_iter, impl):
    state = dataclasses.replace(state, fresh=fresh)
    _, state = packed.model()(
        tokens, positions=positions, segment_ids=valid, state=state,
        num_iter=num_iter, last_only=True, impl=impl,
    )  # fmt: skip
    return state


@partial(jax.jit, static_argnames=("config", "spans", "lengths", "position", "capacity", "ssm"))
def _merge(
    config: HybridConfig,
    state: ModelState,
    whole: ModelState | None,
    spans: tuple[Span, ...],
    lengths: tuple[int, ...],
    position: int,
    capacity: int,
    ssm: str,
) -> ModelState:
    """One row of the parts' rows; keys and values those of `whole`, if given, else of the spans."""
    held = sum(end - start for _, start, end in spans)
    counts, total, at = (jnp.array(x, jnp.int32) for x in (lengths, [held], [position]))
    parts = Parts(spans, counts, total, capacity, ssm)
    wholes = [None] * len(state.layers) if whole is None else whole.layers
    layers = tuple(
        KINDS[symbol].compose(parts, config.sections, layer, full)
        for symbol, layer, full in zip(config.student_kinds, state.layers, wholes, strict=True)
    )
    return ModelState(layers, total, at, capacity)
