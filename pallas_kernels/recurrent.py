"""What the recurrent operators share: argument checks, padding, chunks, decays inside a chunk."""

from __future__ import annotations

import functools
import importlib
import importlib.util

import jax
import jax.numpy as jnp

from hmf_jax.pallas_kernels.dispatch import why_no_hopper
from hmf_jax.pallas_kernels.segments import documents, leading


def check(op: str, name: str, x: jax.Array, shape: tuple[int, ...], dims: str) -> None:
    """Raise ValueError unless `x` is a float array of this shape (`dims` says it in letters)."""
    if x.shape != shape:
        raise ValueError(f"{op}: {name} has shape {x.shape}, expected [{dims}] = {shape}.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{op}: {name} has dtype {x.dtype}, expected a floating dtype.")


def check_heads(op: str, heads: int, kv_heads: int) -> None:
    """Raise ValueError unless every key/value head serves the same number of query heads."""
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(
            f"{op}: {heads} query heads are not a multiple of {kv_heads} key/value heads; "
            "repeat or project the keys and values to a divisor of the query heads."
        )


def check_padding(
    op: str, segment_ids: jax.Array | None, lengths: jax.Array | None, shape: tuple[int, int]
) -> None:
    """Raise ValueError unless what is given are integers [B, T], and integers [B]."""
    named = {"segment_ids": (segment_ids, shape, "B, T"), "lengths": (lengths, shape[:1], "B")}
    for name, (x, expected, dims) in named.items():
        if x is not None and (x.shape != expected or not jnp.issubdtype(x.dtype, jnp.integer)):
            raise ValueError(
                f"{op}: {name} is {x.dtype}{x.shape}, expected integers [{dims}] = {expected}."
            )


def mask_padding(
    segment_ids: jax.Array | None, lengths: jax.Array | None, *arrays: jax.Array
) -> tuple[jax.Array | None, tuple[jax.Array, ...]]:
    """Document numbers [B, T] (None without segment ids) and the arrays [B, T, ...] with zeros at
    padding, whatever was there: a token of zeros neither writes nor decays, and reads zeros."""
    doc = None
    if segment_ids is not None:
        doc, valid = documents(segment_ids, lengths)
    elif lengths is not None:
        valid = leading(lengths, arrays[0].shape[1])
    else:
        return None, arrays
    wide = [valid.reshape(valid.shape + (1,) * (x.ndim - 2)) for x in arrays]
    return doc, tuple(jnp.where(w, x, 0) for w, x in zip(wide, arrays, strict=True))


def start_state(
    op: str, state: jax.Array | None, shape: tuple[int, ...], dims: str, dtype: jnp.dtype
) -> jax.Array:
    """The state before the first token: the given one, checked as by `check`, or zeros.

    float32, or float64 where `dtype`, that of the values, is.
    """
    acc = jnp.promote_types(dtype, jnp.float32)
    if state is None:
        return jnp.zeros(shape, acc)
    check(op, "initial_state", state, shape, dims)
    return state.astype(acc)


def to_chunks(x: jax.Array, chunk: int, kv_heads: int | None = None) -> jax.Array:
    """[B, T, heads, ...] -> [n, B, K, heads // K, chunk, ...]; a short tail is filled with zeros.

    `kv_heads` None: `x` has kv heads, and the axis of query heads per kv head is left out.
    """
    B, T, heads, *rest = x.shape
    x = jnp.pad(x, [(0, 0), (0, -T % chunk)] + [(0, 0)] * (x.ndim - 2))
    x = jnp.moveaxis(x.reshape(B, -1, chunk, heads, *rest), (1, 3), (0, 2))  # n b heads chunk ...
    if kv_heads is None:
        return x
    return x.reshape(*x.shape[:2], kv_heads, heads // kv_heads, *x.shape[3:])


def from_chunks(x: jax.Array, length: int) -> jax.Array:
    """[n, B, K, R, chunk, D] -> [B, T, K * R, D] of T = `length` tokens."""
    n, B, K, R, chunk, D = x.shape
    return jnp.transpose(x, (1, 0, 4, 2, 3, 5)).reshape(B, n * chunk, K * R, D)[:, :length]


def decays(g: jax.Array, doc: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Decay factors inside chunks.

    Args:
      g: [n, B, K, R, C] log-decays <= 0 of n consecutive chunks.
      doc: [B, T] document numbers (non-decreasing, 0 = the document of the initial state) or None.

    Returns:
      pair: [n, B, K, R, C, C], decay from token j (after its write) to token i >= j, else 0.
      head: [n, B, K, R, C], decay from the state carried into the chunk to token i.
      Both are 0 across a document boundary. The last row of `pair` and the last entry of `head`
      are the decays to the end of the chunk.

    The sums run over the tokens in between only (no difference of two long sums, which would lose
    digits after a strong decay), and exp sees nothing but these sums.
    """
    C = g.shape[-1]
    i = jnp.arange(C)
    later = i[:, None] > i
    pair = jnp.exp(jnp.cumsum(jnp.where(later, g[..., :, None], 0), axis=-2))
    head = jnp.exp(jnp.cumsum(g, axis=-1))
    same = i[:, None] >= i
    if doc is not None:
        n = g.shape[0]
        doc = jnp.pad(doc, ((0, 0), (0, n * C - doc.shape[1])), mode="edge")
        doc = jnp.moveaxis(doc.reshape(doc.shape[0], n, C), 1, 0)[:, :, None, None]
        carried = jnp.concatenate([jnp.zeros_like(doc[:1, ..., -1:]), doc[:-1, ..., -1:]])
        head = jnp.where(doc == carried, head, 0)
        same &= doc[..., :, None] == doc[..., None, :]
    return jnp.where(same, pair, 0), head


@functools.cache
def _jla_missing() -> str | None:
    if importlib.util.find_spec("jla") is None:
        return "the package jax-linear-attention is not installed (pip install hmf-jax[jla])"
    if reason := why_no_hopper():
        return reason
    try:
        importlib.import_module("jla.ops")
    except ImportError as error:
        return f"the package jax-linear-attention cannot be imported ({error})"
    return None


def why_not_jla(dtypes: set[jnp.dtype], head_dims: tuple[int, ...]) -> str | None:
    """Why the kernels of jax-linear-attention cannot run these arguments here; None if they can."""
    if _jla_missing() is not None:
        return _jla_missing()
    if dtypes != {jnp.dtype(jnp.bfloat16)}:
        return f"its kernels take bfloat16, got {', '.join(sorted(map(str, dtypes)))}"
    if any(d not in (64, 128) for d in head_dims):
        return f"its kernels take head dims 64 and 128, got {head_dims}"
    return None
