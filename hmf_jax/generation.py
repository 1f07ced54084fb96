"""Token generation: chunked prefill, and a decode loop that runs entirely on the device.

Knows tokens only; text is the business of `hmf_jax.chat`. Programs are compiled per bucket: batch
and capacity are rounded up to powers of two, prompts are cut into chunks of `prefill_chunk` tokens
whose last one is rounded up to a power of two. Everything else (prompt lengths, sampling settings,
end tokens, limits) is a run-time value; so is num_iter once it differs from the config's.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence, Sized
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hmf_jax.config import HybridConfig
from hmf_jax.model import HybridLM, PackedModel
from hmf_jax.pallas_kernels.dispatch import why_no_hopper
from hmf_jax.sampling import SamplingArrays, SamplingParams, sample, stack_params
from hmf_jax.state import ModelState

SMALLEST_CHUNK = 64  # tokens; the last chunk of a prompt is padded to this times a power of two
SMALLEST_CAPACITY = 256  # tokens
SMALLEST_HALF = 8192  # tokens; what has been found to gain, see docs/performance.md
MOST_STEPS = 64  # tokens per row and dispatch; one compiled program serves every smaller number

GREEDY = SamplingParams()

Tokens = Sequence[int] | np.ndarray | jax.Array
Step = list[tuple[list[int], list[float]]]  # per row: new tokens and their logprobs


@dataclasses.dataclass(frozen=True)
class Generation:
    """What one prompt became.

    Attributes:
      tokens: the new tokens, without the prompt; the last one is an end token if there was one.
      finish_reason: "eos" (an end token), "length" (max_new_tokens reached), "capacity" (the state
        of the row is full) or "stop" (ended by the caller).
      logprobs: log-probability of each token under the model's own distribution, before penalty,
        temperature and filters; None unless asked for.
    """

    tokens: list[int]
    finish_reason: str
    logprobs: list[float] | None = None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Rows:
    """What a batch carries from dispatch to dispatch; donated to each of them."""

    state: ModelState
    seen: jax.Array  # [B, V] bool: tokens in the row, for the repetition penalty
    token: jax.Array  # [B] int32: the newest token, not yet in the state
    active: jax.Array  # [B] bool
    left: jax.Array  # [B] int32: tokens the row may still produce


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class _Request:
    """Settings of each row; read only."""

    sampling: SamplingArrays
    eos: np.ndarray  # [B, E] int32, padded with -1
    num_iter: Any  # [B] int32; None = the config's


class _Settings(NamedTuple):
    """What one row was asked for."""

    sampling: SamplingParams
    eos: list[int]
    num_iter: int | None  # None = the config's


@partial(jax.jit, static_argnames=("size", "capacity"))
def _empty(packed: PackedModel, size: int, capacity: int) -> tuple[_Rows, jax.Array]:
    """Rows that hold nothing, and room for their logits [B, V].

    One program: made one by one, the arrays of 36 layers take 5 ms on one device, 70 on eight.
    """
    model = packed.model()
    state = model.init_state(size, capacity)
    replicate = partial(_replicate_one, model.mesh)
    counts = dict(length=replicate(state.length), position=replicate(state.position))
    logits = jnp.zeros((size, model.config.vocab_size), model.dtype)
    rows = _Rows(
        state=dataclasses.replace(state, **counts),
        seen=jnp.zeros(logits.shape, bool),
        token=jnp.zeros(size, jnp.int32),
        active=jnp.zeros(size, bool),
        left=jnp.zeros(size, jnp.int32),
    )
    return _replicate(model.mesh, rows), replicate(logits)


def _piece(mesh: Mesh | None, tokens: int) -> int:
    """How many of a chunk's tokens the model gets at once; it is called again for the others.

    Under tensor parallelism half of a long chunk: the all-reduces of one half then overlap with the
    products of the other. Not over two devices (nothing is gained), nor where attention would lose
    more by continuing a cache (its kernels that do so need a Hopper GPU).
    """
    if mesh is None or tokens < 2 * SMALLEST_HALF or why_no_hopper():
        return tokens
    halve = mesh.shape["tp"] * mesh.shape["rep"] >= 4 and tokens % (2 * mesh.shape["sp"]) == 0
    return tokens // 2 if halve else tokens


@partial(jax.jit, donate_argnames=("rows", "logits"))
def _prefill(
    packed: PackedModel,
    rows: _Rows,
    logits: jax.Array,
    tokens: jax.Array,
    valid: jax.Array,
    num_iter,
) -> tuple[_Rows, jax.Array]:
    """Feed tokens [B, T]; logits [B, V] are replaced in the rows that got any."""
    model, state = packed.model(), rows.state
    size = _piece(model.mesh, tokens.shape[1])
    for start in range(0, tokens.shape[1], size):
        piece = valid[:, start : start + size]
        new, state = model(
            tokens[:, start : start + size],
            segment_ids=piece.astype(jnp.int32),
            state=state,
            num_iter=num_iter,
            last_only=True,
        )
        logits = jnp.where(piece.any(1)[:, None], new[:, 0], logits)
    seen = rows.seen.at[jnp.arange(len(tokens))[:, None], tokens].max(valid)
    rows = dataclasses.replace(rows, state=state, seen=seen)
    return _replicate(model.mesh, rows), _replicate_one(model.mesh, logits)


@partial(jax.jit, donate_argnames=("rows",))
def _insert(rows: _Rows, one: _Rows, row: jax.Array) -> _Rows:
    """Row 0 of `one` in place of a row."""
    state = dataclasses.replace(rows.state, fresh=False)
    put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=row, axis=0)
    return jax.tree.map(put, dataclasses.replace(rows, state=state), one)


@partial(jax.jit, donate_argnames=("rows",), static_argnames=("mesh",))
def _first(
    mesh: Mesh | None, rows: _Rows, logits: jax.Array, active: jax.Array, left: jax.Array, request
) -> tuple[_Rows, jax.Array, jax.Array]:
    """Sample the token after the prompt; (rows, token [B, 1], logprob [B, 1]), -1 if inactive."""
    rows = dataclasses.replace(rows, active=active, left=left)
    rows, logprob = _choose(rows, logits, request)
    token = jnp.where(active, rows.token, -1)
    return _replicate(mesh, rows), token[:, None], logprob[:, None]


@partial(jax.jit, donate_argnames=("rows",))
def _decode(
    packed: PackedModel, rows: _Rows, keep: jax.Array, steps: jax.Array, request: _Request
) -> tuple[_Rows, jax.Array, jax.Array]:
    """Up to `steps` tokens per row; (rows, tokens [B, MOST_STEPS], logprobs), -1 where none."""
    model = packed.model()
    rows = dataclasses.replace(rows, active=rows.active & keep)
    shape = (len(keep), MOST_STEPS)

    def body(carry):
        i, rows, tokens, logprobs = carry
        logits, state = model(
            rows.token[:, None],
            segment_ids=rows.active[:, None].astype(jnp.int32),
            state=rows.state,
            num_iter=request.num_iter,
            last_only=True,
        )
        active = rows.active
        rows, logprob = _choose(dataclasses.replace(rows, state=state), logits[:, 0], request)
        tokens = tokens.at[:, i].set(jnp.where(active, rows.token, -1))
        return i + 1, rows, tokens, logprobs.at[:, i].set(logprob)

    def more(carry):
        return (carry[0] < steps) & jnp.any(carry[1].active)

    start = (jnp.int32(0), rows, jnp.full(shape, -1, jnp.int32), jnp.zeros(shape, jnp.float32))
    _, rows, tokens, logprobs = jax.lax.while_loop(more, body, start)
    return _replicate(model.mesh, rows), tokens, logprobs


def _choose(rows: _Rows, logits: jax.Array, request: _Request) -> tuple[_Rows, jax.Array]:
    """Sample a token for each active row from logits [B, V]; end rows that are done."""
    token, logprob = sample(logits, request.sampling, rows.state.length, rows.seen)
    token = jnp.where(rows.active, token, rows.token)
    left = rows.left - rows.active
    ended = jnp.any(token[:, None] == request.eos, axis=1) | (left <= 0)
    seen = rows.seen.at[jnp.arange(len(token)), token].max(rows.active)
    active = rows.active & ~ended
    return dataclasses.replace(rows, seen=seen, token=token, active=active, left=left), logprob


def _replicate_one(mesh: Mesh | None, x: jax.Array) -> jax.Array:
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec()))


def _replicate(mesh: Mesh | None, rows: _Rows) -> _Rows:
    """Pin the layout of the small arrays: the next dispatch is compiled for exactly one."""
    names = ("seen", "token", "active", "left")
    return dataclasses.replace(rows, **{n: _replicate_one(mesh, getattr(rows, n)) for n in names})


class Decoder:
    """The rows of a batch with their state: `start` feeds prompts, `step` decodes.

    `start` may be called again: it continues the rows after `context`, the tokens their state
    holds. (The newest generated token is never part of it: it is fed when the next one is needed.)

    Args:
      model: the model.
      batch: number of rows.
      capacity: most tokens a row may hold, prompts and generated tokens together.
      prefill_chunk: prompts are fed in pieces of this many tokens.
      round_up: to a power of two rows, so that batches of similar sizes share programs.
      state: what the rows hold at first (a copy is made), instead of nothing; of `batch` rows and
        this capacity.

    Raises:
      ValueError: capacity beyond the model's max_position_embeddings; anything below 1; a state
        that does not fit.
    """

    def __init__(
        self,
        model: HybridLM,
        batch: int,
        *,
        capacity: int,
        prefill_chunk: int = 2048,
        round_up: bool = True,
        state: ModelState | None = None,
    ) -> None:
        if min(batch, capacity, prefill_chunk) < 1:
            raise ValueError(f"{batch=}, {capacity=} and {prefill_chunk=} must be at least 1.")
        longest = model.config.max_position_embeddings
        if state is not None and (len(state.length), state.capacity) != (batch, capacity):
            raise ValueError(
                f"The state holds {len(state.length)} rows of {state.capacity} tokens at most, but "
                f"{batch=} and {capacity=}."
            )
        ahead = 0 if state is None else int((state.position - state.length).max())
        if capacity + ahead > longest:
            raise ValueError(
                f"capacity={capacity} is more than max_position_embeddings={longest} allows; "
                "choose a smaller one, or raise max_position_embeddings in the model's config."
            )
        self.model, self.batch, self.capacity, self.chunk = model, batch, capacity, prefill_chunk
        self._packed = PackedModel.of(model)
        self.context: list[list[int]] = [[] for _ in range(batch)]
        self.finish_reason: list[str | None] = ["idle"] * batch  # None while generating
        self._newest = [-1] * batch  # generated, not yet in the state
        self._left, self._full = [0] * batch, ["length"] * batch
        self._settings = [_Settings(GREEDY, [], None)] * batch
        self._held = [0] * batch if state is None else np.asarray(state.length).tolist()
        self._size = _power_of_two(batch) if round_up and state is None else batch
        room = capacity if state is None else 1  # of a state that is not used
        self._rows, self._logits = _empty(self._packed, self._size, room)
        if state is not None:
            self._rows = dataclasses.replace(self._rows, state=jax.tree.map(jnp.copy, state))

    @classmethod
    def begin(
        cls,
        model: HybridLM,
        prompts: Sequence[Tokens],
        *,
        max_new_tokens: int | Sequence[int] = 128,
        capacity: int | None = None,
        prefill_chunk: int = 2048,
        state: ModelState | None = None,
        **settings: Any,
    ) -> tuple[Decoder, Step]:
        """A decoder that fits these prompts, started with them. Arguments as in `generate`."""
        if state is None:
            fed, _, capacity = _fitting(model.config, prompts, max_new_tokens, capacity)
        else:
            fed = check_prompts(prompts, model.config.vocab_size)
            capacity = state.capacity if capacity is None else capacity
        sizes: dict[str, Any] = dict(capacity=capacity, prefill_chunk=prefill_chunk)
        decoder = cls(model, len(fed), **sizes, state=state)
        return decoder, decoder.start(prompts, max_new_tokens=max_new_tokens, **settings)

    @property
    def active(self) -> bool:
        """Whether any row is still generating."""
        return None in self.finish_reason

    def start(
        self,
        prompts: Sequence[Tokens],
        *,
        max_new_tokens: int | Sequence[int] = 128,
        sampling: SamplingParams | Sequence[SamplingParams] = GREEDY,
        eos_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        num_iter: int | Sequence[int] | None = None,
    ) -> Step:
        """Feed one prompt per row and sample the first new token. Arguments as in `generate`.

        Returns:
          Per row: the new token and its logprob (lists of length 1, see `step`).

        Raises:
          ValueError: a bad argument; nothing has run then.
        """
        config = self.model.config
        fed = check_prompts(prompts, config.vocab_size)
        if len(fed) != self.batch:
            raise ValueError(f"Got {len(fed)} prompts for {self.batch} rows; pass one per row.")
        held = [n + len(c) for n, c in zip(self._held, self.context, strict=True)]
        _check_room(config, fed, held, self.capacity)
        limits = _per_row("max_new_tokens", max_new_tokens, self.batch, 1)
        self._settings = _settings(config, self.batch, sampling, eos_ids, num_iter)
        self._request = _request(config, self._settings, self._size)

        self._feed(fed)
        self.context = [c + p for c, p in zip(self.context, fed, strict=True)]
        self._newest = [-1] * self.batch
        self.finish_reason = [None for _ in range(self.batch)]
        room = [self.capacity - n - len(p) for n, p in zip(held, fed, strict=True)]
        self._full = ["capacity" if r < n else "length" for r, n in zip(room, limits, strict=True)]
        self._left = [min(pair) for pair in zip(room, limits, strict=True)]
        active = np.arange(self._size) < self.batch
        left = np.pad(np.array(self._left, np.int32), (0, self._size - self.batch))
        self._rows, tokens, logprobs = _first(
            self.model.mesh, self._rows, self._logits, active, left, self._request
        )
        return self._collect(tokens, logprobs)

    def step(self, steps: int = MOST_STEPS) -> Step:
        """Decode up to `steps` (at most MOST_STEPS) tokens per row in one dispatch.

        Returns:
          Per row: new tokens and their logprobs, empty for rows that are done.
        """
        keep = np.pad([r is None for r in self.finish_reason], (0, self._size - self.batch))
        count = np.int32(min(max(steps, 1), MOST_STEPS))
        self._rows, tokens, logprobs = _decode(self._packed, self._rows, keep, count, self._request)
        return self._collect(tokens, logprobs)

    def adopt(self, row: int, other: Decoder) -> None:
        """Go on with what `other`, a decoder of one row, has begun, in place of this row.

        Raises:
          ValueError: `other` has several rows, another capacity or another model; or this row is
            still generating.
        """
        if other.batch != 1 or other.capacity != self.capacity or other.model is not self.model:
            raise ValueError(
                f"Only a decoder of one row, of this model and of a capacity of {self.capacity} "
                f"can be taken over, not one of {other.batch} and {other.capacity}."
            )
        if self.finish_reason[row] is None:
            raise ValueError(f"Row {row} is still generating; stop it first.")
        self._rows = _insert(self._rows, other._rows, np.int32(row))
        for name in ("context", "finish_reason", "_held", "_newest", "_left", "_full", "_settings"):
            getattr(self, name)[row] = getattr(other, name)[0]
        self._request = _request(self.model.config, self._settings, self._size)

    def stop(self, row: int) -> None:
        """End a row, for example because its text contains a stop string."""
        self.finish_reason[row] = "stop"

    def _feed(self, prompts: list[list[int]]) -> None:
        """Chunked prefill."""
        longest = max(map(len, prompts))
        for start in range(0, longest, self.chunk):
            size = min(_power_of_two(longest - start, SMALLEST_CHUNK), self.chunk)
            tokens = np.zeros((self._size, size), np.int32)
            valid = np.zeros((self._size, size), bool)
            for row, prompt in enumerate(prompts):
                piece = prompt[start : start + self.chunk]
                tokens[row, : len(piece)], valid[row, : len(piece)] = piece, True
            self._rows, self._logits = _prefill(
                self._packed, self._rows, self._logits, tokens, valid, self._request.num_iter
            )

    def _collect(self, tokens: jax.Array, logprobs: jax.Array) -> Step:
        """Book what a dispatch produced."""
        out = []
        new, scores = np.asarray(tokens)[: self.batch], np.asarray(logprobs)[: self.batch]
        for row, (line, score) in enumerate(zip(new, scores, strict=True)):
            count = int((line >= 0).sum())
            taken = line[:count].tolist()
            for token in taken:
                if self._newest[row] >= 0:
                    self.context[row].append(self._newest[row])
                self._newest[row] = token
            self._left[row] -= count
            if taken and self.finish_reason[row] is None:
                if taken[-1] in self._settings[row].eos:
                    self.finish_reason[row] = "eos"
                elif self._left[row] <= 0:
                    self.finish_reason[row] = self._full[row]
            out.append((taken, score[:count].tolist()))
        return out


def generate(
    model: HybridLM,
    prompts: Sequence[Tokens],
    *,
    max_new_tokens: int | Sequence[int] = 128,
    sampling: SamplingParams | Sequence[SamplingParams] = GREEDY,
    eos_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
    num_iter: int | Sequence[int] | None = None,
    capacity: int | None = None,
    prefill_chunk: int = 2048,
    slots: int | None = None,
    state: ModelState | None = None,
    logprobs: bool = False,
) -> list[Generation]:
    """Continue each prompt until an end token, `max_new_tokens` or a full state.

    For throughput, pass many prompts and as many `slots` as the memory holds: that many rows decode
    together, and a row that is done makes room for the next prompt. Prompts are then prefilled one
    by one, so that their activations take no more memory than those of one chunk.

    Args:
      model: the model.
      prompts: token ids of each prompt; lengths may differ.
      max_new_tokens: most new tokens, one number or one per prompt.
      sampling: how to choose tokens (default greedy), one setting or one per prompt. A prompt's
        random bits depend on its own seed and positions only, not on the rest of the batch.
      eos_ids: end tokens, a list for all or one list per prompt; None = the config's
        eos_token_id, () = never end.
      num_iter: Chebyshev iterations of GKA layers, one number or one per prompt; None = the
        config's. The first other number compiles once more, all further ones do not.
      capacity: tokens each row can hold, prompt and output. None = what is needed, rounded up to a
        power of two, at most max_position_embeddings.
      prefill_chunk: prompts are fed in pieces of this many tokens; never changes the result. Longer
        ones take more memory and, of a long prompt, less time, most of all on several devices.
      slots: most rows at a time, see `hmf_jax.memory.plan_memory`; None = all prompts are fed and
        decoded together.
      state: what the prompts continue, one row for each (`compose`, or an earlier call of the
        model); stays as it is. Its capacity counts; the repetition penalty does not see its tokens.
        Not with slots.
      logprobs: also return the log-probability of each token.

    Returns:
      One `Generation` per prompt, in order.

    Raises:
      ValueError: an empty prompt, token ids outside the vocabulary, a prompt that does not fit, or
        settings out of range; before anything runs.
    """
    options: dict[str, Any] = dict(
        max_new_tokens=max_new_tokens, sampling=sampling, eos_ids=eos_ids, num_iter=num_iter
    )
    memory: dict[str, Any] = dict(capacity=capacity, prefill_chunk=prefill_chunk)
    if slots is not None and state is not None:
        raise ValueError("Prompts in slots start from nothing: leave out slots or state.")
    if slots is not None:
        done = _in_slots(model, prompts, slots, **options, **memory)
    else:
        decoder, got = Decoder.begin(model, prompts, **options, **memory, state=state)
        while decoder.active:
            for (tokens, scores), (more, their) in zip(got, decoder.step(), strict=True):
                tokens += more
                scores += their
        reasons = [reason or "length" for reason in decoder.finish_reason]
        done = _generations(got, reasons)
    return done if logprobs else [dataclasses.replace(g, logprobs=None) for g in done]


def _in_slots(
    model: HybridLM,
    prompts: Sequence[Tokens],
    slots: int,
    *,
    max_new_tokens: Any,
    sampling: Any,
    eos_ids: Any,
    num_iter: Any,
    capacity: int | None,
    prefill_chunk: int,
) -> list[Generation]:
    """`generate` with at most `slots` rows at a time."""
    if slots < 1:
        raise ValueError(f"{slots=} must be at least 1.")
    fed, limits, capacity = _fitting(model.config, prompts, max_new_tokens, capacity)
    _check_room(model.config, fed, [0] * len(fed), capacity)
    settings = _settings(model.config, len(fed), sampling, eos_ids, num_iter)
    sizes: dict[str, Any] = dict(capacity=capacity, prefill_chunk=prefill_chunk)
    rows = Decoder(model, min(slots, len(fed)), round_up=False, **sizes)
    owner: list[int | None] = [None] * rows.batch  # the prompt that a row continues
    out: list[tuple[list[int], list[float]]] = [([], []) for _ in fed]
    reasons = ["length"] * len(fed)
    waiting = iter(range(len(fed)))
    left = len(fed)
    while left:
        for row in range(rows.batch):
            if owner[row] is not None or (i := next(waiting, None)) is None:
                continue
            one = Decoder(model, 1, **sizes)
            ask = settings[i]
            (out[i],) = one.start(
                [fed[i]],
                max_new_tokens=limits[i],
                sampling=ask.sampling,
                eos_ids=ask.eos,
                num_iter=ask.num_iter,
            )
            owner[row] = i
            rows.adopt(row, one)
            del one  # its state makes room for that of the next prompt
        more: Step = rows.step() if rows.active else [([], [])] * rows.batch
        for row, (tokens, scores) in enumerate(more):
            if (i := owner[row]) is None:
                continue
            out[i][0].extend(tokens)
            out[i][1].extend(scores)
            if (reason := rows.finish_reason[row]) is not None:
                reasons[i], owner[row], left = reason, None, left - 1
    return _generations(out, reasons)


def _generations(out: Step, reasons: Sequence[str]) -> list[Generation]:
    return [Generation(t, reason, s) for (t, s), reason in zip(out, reasons, strict=True)]


def stream(
    model: HybridLM,
    prompts: Sequence[Tokens],
    *,
    tokens_per_dispatch: int = 8,
    max_new_tokens: int | Sequence[int] = 128,
    sampling: SamplingParams | Sequence[SamplingParams] = GREEDY,
    eos_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
    num_iter: int | Sequence[int] | None = None,
    capacity: int | None = None,
    prefill_chunk: int = 2048,
) -> Iterator[list[list[int]]]:
    """Like `generate`, but yields the new tokens of every prompt after each dispatch.

    The first item holds the first token of each prompt, later ones up to `tokens_per_dispatch`
    (at most 64) tokens per prompt, none for prompts that are done. Same tokens as `generate`.
    """
    decoder, first = Decoder.begin(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        eos_ids=eos_ids,
        num_iter=num_iter,
        capacity=capacity,
        prefill_chunk=prefill_chunk,
    )

    def tokens() -> Iterator[list[list[int]]]:
        yield [new for new, _ in first]
        while decoder.active:
            yield [new for new, _ in decoder.step(tokens_per_dispatch)]

    return tokens()


def warmup(model: HybridLM, *, capacity: int, batch: int = 1, prefill_chunk: int = 2048) -> None:
    """Compile everything that `generate` or a chat with these three settings will need.

    Runs the model on dummy tokens: each prefill bucket as a first and as a later piece of a prompt,
    and the decode loop.
    """
    longest = min(prefill_chunk, capacity - 2)
    sizes = {longest}
    while longest > SMALLEST_CHUNK:
        longest = _power_of_two(longest) // 2
        sizes.add(longest)
    for size in sorted(sizes):
        decoder = Decoder(model, batch, capacity=capacity, prefill_chunk=prefill_chunk)
        decoder.start([[0] * size] * batch, max_new_tokens=2, eos_ids=())
        decoder.step()
        room = capacity - len(decoder.context[0]) - 1
        if room > 0:
            decoder.start([[0] * min(size, room)] * batch, max_new_tokens=1, eos_ids=())


def enable_compilation_cache(directory: str | os.PathLike[str] | None = None) -> Path:
    """Keep compiled programs on disk, so that a new process does not compile them again.

    Args:
      directory: default the environment variable JAX_COMPILATION_CACHE_DIR, else
        ~/.cache/hmf_jax/xla.

    Returns:
      The directory. Call this before anything is compiled.
    """
    default = os.environ.get("JAX_COMPILATION_CACHE_DIR", "~/.cache/hmf_jax/xla")
    path = Path(default if directory is None else directory).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
    return path


def capacity_for(config: HybridConfig, needed: int, capacity: int | None = None) -> int:
    """`capacity`, or the bucket for `needed` tokens: a power of two, at most what RoPE covers."""
    if capacity is not None:
        return capacity
    return min(_power_of_two(needed, SMALLEST_CAPACITY), config.max_position_embeddings)


def _fitting(
    config: HybridConfig, prompts: Sequence[Tokens], max_new_tokens: Any, capacity: int | None
) -> tuple[list[list[int]], list[int], int]:
    """The checked prompts, the most new tokens of each, and the capacity that they need."""
    fed = check_prompts(prompts, config.vocab_size)
    limits = _per_row("max_new_tokens", max_new_tokens, len(fed), 1)
    needed = max(len(p) + new for p, new in zip(fed, limits, strict=True))
    return fed, limits, capacity_for(config, needed, capacity)


def _check_room(
    config: HybridConfig, prompts: Sequence[Sized], held: Sequence[int], capacity: int
) -> None:
    """Raise ValueError unless every prompt leaves room after the tokens that its row holds."""
    for i, (prompt, n) in enumerate(zip(prompts, held, strict=True)):
        if n + len(prompt) >= capacity:
            after = f" after {n} tokens already held" if n else ""
            raise ValueError(
                f"Prompt {i} has {len(prompt)} tokens{after}, which leaves no room in a capacity "
                f"of {capacity}; shorten it or pass a larger capacity (at most "
                f"max_position_embeddings={config.max_position_embeddings})."
            )


def check_prompts(prompts: Sequence[Tokens], vocab_size: int) -> list[list[int]]:
    """The prompts as lists of Python ints.

    Raises:
      ValueError: no or empty prompts, something else than integers, or ids outside the vocabulary.
    """
    if not isinstance(prompts, (list, tuple)) or not prompts:
        raise ValueError("prompts must be a list with at least one list of token ids.")
    checked = []
    for i, prompt in enumerate(prompts):
        ids = np.asarray(prompt)
        if ids.ndim != 1:
            hint = " Put a single prompt into a list: [prompt]." if ids.ndim == 0 else ""
            raise ValueError(f"Prompt {i} must be a flat list of token ids.{hint}")
        if not ids.size:
            raise ValueError(f"Prompt {i} is empty; it needs at least one token.")
        if not np.issubdtype(ids.dtype, np.integer):
            raise ValueError(f"Prompt {i} holds {ids.dtype}, not integer token ids.")
        outside = ids[(ids < 0) | (ids >= vocab_size)]
        if outside.size:
            raise ValueError(
                f"Prompt {i} holds token id {int(outside[0])}, outside the vocabulary of "
                f"{vocab_size}; does the tokenizer belong to this model?"
            )
        checked.append(ids.tolist())
    return checked


def _settings(
    config: HybridConfig, batch: int, sampling, eos_ids: Any, num_iter: Any
) -> list[_Settings]:
    """Arguments of `generate` as one setting per row."""
    params = [sampling] * batch if isinstance(sampling, SamplingParams) else list(sampling)
    if len(params) != batch:
        raise ValueError(f"Got {len(params)} sampling settings for {batch} prompts.")

    if eos_ids is None:
        stored = config.eos_token_id
        eos_ids = () if stored is None else (stored,) if isinstance(stored, int) else stored
    shared = all(isinstance(e, (int, np.integer)) for e in eos_ids)
    eos = [[int(e) for e in row] for row in ([eos_ids] * batch if shared else eos_ids)]
    if len(eos) != batch:
        raise ValueError(f"Got {len(eos)} lists of end tokens for {batch} prompts.")
    iterations = [None] * batch if num_iter is None else _per_row("num_iter", num_iter, batch, 0)
    return [_Settings(*row) for row in zip(params, eos, iterations, strict=True)]


def _request(config: HybridConfig, settings: Sequence[_Settings], size: int) -> _Request:
    """Settings as arrays of `size` rows, the last ones unused."""
    unused = [_Settings(GREEDY, [], None)] * (size - len(settings))
    params, eos, num_iter = zip(*settings, *unused, strict=True)
    table = np.full((size, _power_of_two(max(map(len, eos)), 4)), -1, np.int32)
    for row, ids in enumerate(eos):
        table[row, : len(ids)] = ids

    # Plain JAX on a GPU asks the host "once more?" in every iteration unless their number is known
    # when compiling, so the config's own is not passed as an array. (Kernels do not care.)
    iterations = None
    if config.gka is not None:
        own = config.gka.num_iter
        chosen = [own if n is None else n for n in num_iter]
        if set(chosen) != {own}:
            iterations = np.array(chosen, np.int32)
    return _Request(stack_params(params), table, iterations)


def _per_row(name: str, value: int | Sequence[int], batch: int, least: int) -> list[int]:
    values = list(value) if isinstance(value, Sequence | np.ndarray) else [value] * batch
    if len(values) != batch:
        raise ValueError(f"{name} has {len(values)} entries for {batch} prompts.")
    for v in values:
        if not isinstance(v, (int, np.integer)) or v < least:
            raise ValueError(f"{name}={v!r} must be a whole number >= {least}.")
    return [int(v) for v in values]


def _power_of_two(n: int, least: int = 1) -> int:
    return max(least, 1 << max(n - 1, 0).bit_length())
