"""State composition: the parts of a long context are read side by side, then made one state.

    state = hmf_jax.compose(model, context, chunks=4, prefix=instructions)
    model.generate([question], state=state)

Nothing is trained, and no part is longer than what the model was trained on; attention and
positions of the parts overlap. Source: PICASO, arXiv 2502.17605.

Two things are not as in the original code, on purpose. Parts of different lengths stay so: the
original fills shorter ones up with newline tokens, which then are in the states and, of the first
part, in the cache. And positions belong to content: where fillers took positions there, the part
begins right after the prefix here, and with `sequential` after the part before, so that the next
token never falls on a position that is taken. Of parts of one length the results are the same.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax import Array

from hmf_jax.config import HybridConfig
from hmf_jax.engine import Tokens, check_prompts
from hmf_jax.engine.programs import SMALLEST_CHUNK, power_of_two
from hmf_jax.mixers import KINDS, Parts, kinds_within
from hmf_jax.model import HybridLM, PackedModel
from hmf_jax.options import check_int
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
    solver: str = "chebyshev",
) -> ModelState:
    """Read a context in `chunks` parts, each as if it were alone, and merge what they leave behind.

    kv and ssm are the two halves of the original's compose_type: its "concat_kv_soup_ssm" is the
    default here, its "sw" is "last" (there it keeps everything), its "kv_only" is ssm="zero".

    Args:
      model: the model.
      context: token ids [L]; what follows it (a question) is not part of it.
      chunks: number of parts N of ceil(L / N) tokens; the last one is shorter, and where such parts
        are enough there are fewer (6 of 10 tokens: 5 parts of 2). With kv="full" N parts whose
        lengths differ by one at most.
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
      capacity: tokens that the state can hold, those of the context included; default: at least 512
        more, rounded up so that contexts of similar lengths share programs.
      prefill_chunk: parts are fed in pieces of this many tokens; never changes the result.
      num_iter, impl, solver: as in `HybridLM.__call__`.

    Returns:
      A state of one row, which `model(tokens, state=...)` and `generate(..., state=...)` continue.

    Raises:
      TypeError: `model` is no model.
      ValueError: a bad argument, more chunks than tokens, a part beyond max_position_embeddings, or
        "fuse" for a kind that cannot add states up (Gated DeltaNet); nothing has run then.
    """
    if not isinstance(model, HybridLM):
        raise TypeError(f"model must be a HybridLM, not {type(model).__name__}.")
    config = model.config
    context, prefix = _ids("context", context, config), _ids("prefix", prefix, config)
    _check(config, context, prefix, chunks, kv, ssm, sequential)
    for name, value, low in (
        ("capacity", capacity, 1), ("prefill_chunk", prefill_chunk, 1), ("num_iter", num_iter, 0)
    ):  # fmt: skip
        if value is not None or name == "prefill_chunk":
            check_int(name, value, low)
    parts = _cut(context, chunks, even=kv == "full")
    rows = [prefix + part for part in parts]
    lengths, P = [len(row) for row in rows], len(prefix)
    longest = max(lengths)
    first = 0 if kv != "last" else len(rows) - 1  # the row that the prefix is kept of
    kept = [(i, t) for i in range(first, len(rows)) for t in range(P * (i > first), lengths[i])]
    held = len(kept)
    start = longest if kv != "full" and not sequential else P + len(context)
    room = config.max_position_embeddings - start
    if room < 1:
        raise ValueError(
            f"The parts, of up to {longest} tokens with their prefix, end at position {start}, and "
            f"max_position_embeddings={config.max_position_embeddings}: use more chunks, or a "
            "shorter prefix."
        )
    capacity = min(_bucket(held + ROOM), held + room) if capacity is None else capacity
    if not held < capacity <= held + room:
        raise ValueError(
            f"After {held} tokens, at position {start} of max_position_embeddings="
            f"{config.max_position_embeddings}, {capacity=} leaves no room or goes beyond: "
            f"choose one from {held + 1} to {held + room}."
        )
    options: Any = dict(prefill_chunk=prefill_chunk, num_iter=num_iter, impl=impl, solver=solver)
    before = np.cumsum([0, *map(len, parts)]) if sequential else np.zeros(len(parts) + 1, int)
    at = [_positions(P, n, before[i]) for i, n in enumerate(lengths)]
    state = _feed(model, rows, at, _bucket(longest), **options)
    whole = None
    if kv == "full":
        whole = _feed(model, [context], [np.arange(held)], capacity, **options)
    place = np.zeros((2, capacity), np.int32)
    place[:, :held] = np.transpose(kept)
    counts, total, start = (np.array(x, np.int32) for x in (lengths, [held], [start]))
    return _merge(config, state, whole, place, counts, total, start, ssm)


def _ids(name: str, tokens: Tokens | None, config: HybridConfig) -> list[int]:
    """The tokens as a list of ints; a prefix may be empty or None."""
    if name == "prefix" and (tokens is None or np.size(tokens) == 0):
        return []
    prompts: Any = [tokens]
    try:
        return check_prompts(prompts, config.vocab_size)[0]
    except ValueError as e:
        said = str(e).replace("Prompt 0", name).split(" Put a single")[0]
        ragged = not said.startswith(name)  # numpy's words
        raise ValueError(f"{name} must be a flat list of token ids." if ragged else said) from None


def _check(
    config: HybridConfig,
    context: list[int],
    prefix: list[int],
    chunks: int,
    kv: str,
    ssm: str,
    sequential: bool,
) -> None:
    """Raises ValueError unless the context can be composed in this way."""
    for name, value, known in (("kv", kv, KV), ("ssm", ssm, SSM)):
        if value not in known:
            raise ValueError(f"{name}={value!r} is unknown; choose one of {', '.join(known)}.")
    check_int("chunks", chunks, 1)
    if chunks > len(context):
        raise ValueError(f"{chunks=} must be between 1 and the {len(context)} tokens of context.")
    if not isinstance(sequential, bool):
        raise ValueError(f"{sequential=} must be True or False.")
    if prefix and kv == "full":
        raise ValueError("kv='full' reads the context once: let it start with the prefix instead.")
    for kind in kinds_within(config.student_kinds, config.sections) if ssm == "fuse" else ():
        if not kind.fuses:
            raise ValueError(f"{kind.label} states cannot be fused; use ssm='soup'.")


def _bucket(size: int) -> int:
    """Rounded up by an eighth at most, or to 256: few programs, and little unused memory."""
    step = max(256, power_of_two(size) // 16)
    return math.ceil(size / step) * step


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
    capacity: int,
    *,
    prefill_chunk: int,
    **options: Any,
) -> ModelState:
    """The state after these rows, which need not be equally long, with room for `capacity`."""
    counts, longest = np.array([len(row) for row in rows], np.int32), max(map(len, rows))
    tokens, at = (np.zeros((len(rows), longest + prefill_chunk), np.int32) for _ in range(2))
    for i, (row, where) in enumerate(zip(rows, positions, strict=True)):
        tokens[i, : len(row)], at[i, : len(row)] = row, where
    state, packed = model.init_state(len(rows), capacity), PackedModel.of(model)
    for start in range(0, longest, prefill_chunk):
        width = min(power_of_two(longest - start, SMALLEST_CHUNK), prefill_chunk)
        piece = (x[:, start : start + width] for x in (tokens, at))
        counted = np.clip(counts - start, 0, width)
        state = _prefill(packed, state, *piece, counted, fresh=start == 0, **options)
    return state


@partial(jax.jit, donate_argnames="state", static_argnames=("fresh", "impl", "solver"))
def _prefill(packed, state, tokens, positions, lengths, fresh, num_iter, impl, solver):
    state = dataclasses.replace(state, fresh=fresh)
    _, state = packed.model()(
        tokens, positions=positions, lengths=lengths, state=state,
        num_iter=num_iter, last_only=True, impl=impl, solver=solver,
    )  # fmt: skip
    return state


@partial(jax.jit, static_argnames=("config", "ssm"))
def _merge(
    config: HybridConfig,
    state: ModelState,
    whole: ModelState | None,
    place: Array,
    counts: Array,
    total: Array,
    position: Array,
    ssm: str,
) -> ModelState:
    """One row of the parts' rows; keys and values those of `whole`, if given, else of the parts.

    Args:
      place: [2, capacity] int32, the row and the token of each token of the new row.
      counts: [N], total, position: [1] int32, tokens of the rows and of the new one, the position
        of its next token.
    """
    parts = Parts(place[0], place[1], counts, total, ssm)
    wholes = [None] * len(state.layers) if whole is None else whole.layers
    layers = tuple(
        KINDS[symbol].compose(parts, config.sections, layer, full)
        for symbol, layer, full in zip(config.student_kinds, state.layers, wholes, strict=True)
    )
    return ModelState(layers, total, position, place.shape[1])
