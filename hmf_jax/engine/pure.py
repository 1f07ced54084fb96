"""Generation as a pure function, for programs of one's own: `sample`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from hmf_jax.engine import programs
from hmf_jax.engine.programs import ERROR, RUNNING
from hmf_jax.engine.request import Request, check_request, check_whole, sampling_of
from hmf_jax.engine.settings import Processor, stack_settings
from hmf_jax.model import HybridLM
from hmf_jax.packed import PackedModel
from hmf_jax.padding import check_state
from hmf_jax.sampling import SamplingArrays, SamplingParams
from hmf_jax.state import ModelState

Array = jax.Array
Settings = SamplingParams | Mapping[str, Any] | Sequence[Any] | SamplingArrays | None


def sample(
    model: HybridLM,
    tokens: Array,
    lengths: Array | None,
    key: Array,
    *,
    steps: int,
    sampling: Settings = None,
    num_iter: Array | int | None = None,
    state: ModelState | None = None,
    eos_ids: Sequence[int] = (),
    processor: Processor | None = None,
    impl: str = "auto",
    solver: str = "chebyshev",
) -> tuple[Array, Array, Array, ModelState]:
    """Continue each row of tokens, as a pure function of arrays.

        tokens, logprobs, lengths, state = jax.jit(
            lambda model, prompts, key: sample(model, prompts, None, key, steps=32)
        )(model, prompts, key)

    It can be called under `jax.jit`, in `jax.vmap` (over keys, over prompts), in `jax.lax.scan`,
    and with a model that lies on a mesh. In `jax.shard_map`, with each device continuing its own
    rows, the model must have been made without a mesh, and shard_map be told `check_vma=False`.
    Gradients do not pass: `score` gives log-probabilities that have them.

    Args:
      model: the model.
      tokens: [B, T] integers, the prompts.
      lengths: [B]; the first lengths[b] >= 1 tokens of row b are valid, the others padding. None:
        all are.
      key: a random key (`jax.random.key`), from which each of several rows gets its own by
        `jax.random.split`; or a key per row [B]. A row whose key is `jax.random.key(seed)` draws
        what `generate` draws with that seed.
      steps: new tokens per row.
      sampling: how to choose them: `SamplingParams`, a dict (see `SamplingParams.of`), one of them
        per row, or arrays (`SamplingArrays`, which may be traced). Seeds are replaced by `key`.
        None: draw from the model's distribution, temperature 1.
      num_iter: Chebyshev iterations of GKA layers, a number or one per row [B]; None = the
        config's.
      state: what the prompts continue; None: they begin. It must have room for T + steps tokens
        more: a row whose state is full ends.
      eos_ids: tokens that end a row.
      processor: changes the logits, see `generate`.
      impl, solver: as in `HybridLM.__call__`.

    Returns:
      tokens: [B, steps] int32, zeros after the end of a row.
      logprobs: [B, steps] float32, the log-probability of each token under the model's own
        distribution (before biases, penalties, processor, temperature and filters), as `score`
        computes it; zeros after the end. In bfloat16 the two differ by rounding: for ratios of
        probabilities take both from `score`.
      lengths: [B] int32, how many of the tokens are valid, an end token included. A row whose
        logits are NaN or infinite ends there, and its next log-probability is NaN.
      state: of all tokens but the newest of each row, which was not read yet.

    Raises:
      ValueError: shapes, dtypes or settings that do not fit.
    """
    check_whole("steps", steps, 1)
    tokens = jnp.asarray(tokens)
    if tokens.ndim != 2:
        raise ValueError(f"tokens must be [B, T], got {tokens.shape}.")
    B, T = tokens.shape
    settings = _settings(model, sampling, key, B, num_iter, eos_ids)
    packed = PackedModel.of(model)
    counts = settings.counts or processor is not None
    if state is not None:
        check_state(model, state, B)
    rows, logits = programs.empty(packed, B, T + steps if state is None else 1)
    fresh = state is None or state.fresh
    rows = dataclasses.replace(
        rows,
        state=rows.state if state is None else state,
        reason=jnp.full(B, RUNNING, jnp.int32),
        left=jnp.full(B, steps, jnp.int32),
        generated=jnp.zeros(logits.shape, jnp.int32) if counts else None,
    )
    valid = jnp.full(B, T, jnp.int32) if lengths is None else jnp.asarray(lengths, jnp.int32)
    options: dict[str, Any] = dict(impl=impl, solver=solver)
    rows, logits = programs.prefill(
        packed, rows, logits, tokens, valid, settings.num_iter, fresh=fresh, **options
    )
    rows, token, score, _ = programs.next_token(rows, logits, settings, 0, processor)
    found = (jnp.zeros((B, steps), jnp.int32), jnp.zeros((B, steps), jnp.float32))
    found = _put(found, 0, token, score)

    def body(carry):
        i, rows, found = carry
        rows, token, score, _ = programs.one_step(
            model, rows, settings, processor=processor, **options
        )
        return i + 1, rows, _put(found, i, token, score)

    def more(carry):
        return (carry[0] < steps) & jnp.any(carry[1].reason == RUNNING)

    carry = jnp.int32(1), rows, found
    if len(eos_ids):
        carry = jax.lax.while_loop(more, body, carry)
    else:  # without a condition, which under vmap would be one for each copy of the state
        carry = jax.lax.fori_loop(1, steps, lambda _, carry: body(carry), carry)
    _, rows, (out, logprobs) = carry
    place = jnp.arange(steps)
    within = place < rows.made[:, None]
    failed = (rows.reason == ERROR)[:, None] & (place == rows.made[:, None])
    logprobs = jnp.where(within, logprobs, jnp.where(failed, jnp.nan, 0))
    return jnp.where(within, out, 0), logprobs, rows.made, rows.state


def _put(found: tuple[Array, Array], i: Any, token: Array, score: Array) -> tuple[Array, Array]:
    tokens, logprobs = found
    return tokens.at[:, i].set(token), logprobs.at[:, i].set(score)


def _settings(
    model: HybridLM, sampling: Settings, key: Array, B: int, num_iter: Any, eos_ids: Sequence[int]
):
    """The settings of all rows."""
    if isinstance(sampling, SamplingArrays):
        params = [SamplingParams()] * B
    else:
        params = sampling_of(sampling, {}, {"do_sample": True}, B)
    for p in params:
        if p.seed:
            raise ValueError(f"seed={p.seed}: pass key=jax.random.key({p.seed}) instead.")
        check_request(model.config, Request((), sampling=p))
    model.config.check_num_iter(num_iter)
    for id in eos_ids:
        check_whole("eos_ids", id, 0)
    settings = stack_settings(None, params, [tuple(eos_ids)] * B, [None] * B)
    arrays = sampling if isinstance(sampling, SamplingArrays) else settings.sampling
    arrays = arrays._replace(seed=_row_keys(key, B))
    if num_iter is not None:
        num_iter = jnp.broadcast_to(jnp.asarray(num_iter, jnp.int32), B)
    return dataclasses.replace(settings, sampling=arrays, num_iter=num_iter)


def _row_keys(key: Any, B: int) -> Array:
    """A key for each row."""
    kind: Any = getattr(key, "dtype", np.dtype(object))
    if not jnp.issubdtype(kind, jax.dtypes.prng_key):
        if kind != jnp.uint32 or key.shape[-1:] != (2,):
            raise ValueError(f"key={key!r} must be a random key: jax.random.key(seed).")
        key = jax.random.wrap_key_data(key)
    if key.shape not in ((), (B,)):
        raise ValueError(f"key has shape {key.shape}; pass one key, or one for each of {B} rows.")
    if key.shape == ():
        return key[None] if B == 1 else jax.random.split(key, B)
    return key
