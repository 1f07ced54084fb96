"""The tokens of one call. A model puts the valid ones of each row first; its layers rely on it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hmf_jax.state import ModelState

Array = jax.Array


def valid_first(valid: Array) -> Array:
    """Where each token goes so that the valid ones come first, in their order: [B, T] int32.

    Args:
      valid: [B, T] bool, False at padding.
    """
    before = jnp.cumsum(valid, axis=1, dtype=jnp.int32)
    after = before[:, -1:] + jnp.cumsum(~valid, axis=1, dtype=jnp.int32)
    return jnp.where(valid, before, after) - 1


def arrange(x: Array, place: Array | None) -> Array:
    """x [B, T] with each entry at its `place` (from `valid_first`); None: as it is."""
    if place is None:
        return x
    rows = jnp.arange(len(x))[:, None]
    return jnp.zeros_like(x).at[rows, place].set(x, unique_indices=True)


def restore(x: Array, place: Array | None) -> Array:
    """Undoes `arrange`, for x [B, T, ...]."""
    if place is None:
        return x
    # Unlike that of `take_along_axis`, the transpose knows that no index repeats.
    return x.at[jnp.arange(len(x))[:, None], place].get(unique_indices=True)


def check_tokens(
    tokens: Any,
    positions: Any,
    segment_ids: Any,
    lengths: Any,
    state: ModelState | None,
    mesh: Mesh | None,
) -> None:
    """Raises ValueError unless these are the tokens of one call of a model, see `HybridLM`."""
    if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must be integers [B, T], got {tokens.dtype}{tokens.shape}.")
    B, T = tokens.shape
    if mesh is not None and T % mesh.shape["sp"]:
        raise ValueError(
            f"sp={mesh.shape['sp']} does not divide {T} tokens; pad rows to a multiple."
        )
    for name, a in (("positions", positions), ("segment_ids", segment_ids)):
        if a is not None and a.shape != tokens.shape:
            raise ValueError(f"{name} has shape {a.shape}, but tokens have {tokens.shape}.")
    if lengths is not None and segment_ids is not None:
        raise ValueError("lengths and segment_ids both say what is padding; pass one of them.")
    if lengths is not None and lengths.shape != (B,):
        raise ValueError(f"lengths has shape {lengths.shape}, but there are {B} rows.")
    if state is not None and state.length.shape != (B,):
        raise ValueError(
            f"The state holds {state.length.shape[0]} rows, but tokens have {B}; "
            f"make one with init_state({B}, capacity)."
        )
