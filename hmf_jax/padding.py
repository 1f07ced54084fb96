"""The tokens of one call. A model puts the valid ones of each row first; its layers rely on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hmf_jax.options import check_choice
from hmf_jax.pallas_kernels.compat import is_traced
from hmf_jax.state import ModelState

if TYPE_CHECKING:
    from hmf_jax.config import HybridConfig
    from hmf_jax.model import HybridLM

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


def default_positions(B: int, T: int, segment_ids: Array | None, state: ModelState | None) -> Array:
    """Rotary positions [B, T] int32: the index of each token in its document, after `state`'s."""
    positions = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    if state is not None:
        return positions + state.position[:, None]
    if segment_ids is None:
        return positions
    changes = segment_ids[:, 1:] != segment_ids[:, :-1]
    starts = jnp.concatenate([jnp.zeros((B, 1), bool), changes], axis=1)
    return positions - jax.lax.cummax(jnp.where(starts, positions, 0), axis=1)


def next_position(
    state: ModelState, positions: Array | None, lengths: Array | None, T: int
) -> Array:
    """[B]: one more than the last position of each row, whose valid tokens come first."""
    if positions is None:
        return state.position + (T if lengths is None else lengths)
    if lengths is None:
        return positions[:, -1].astype(jnp.int32) + 1
    last = jnp.take_along_axis(positions, jnp.maximum(lengths - 1, 0)[:, None], axis=1)[:, 0]
    return jnp.where(lengths > 0, last.astype(jnp.int32) + 1, state.position)


def check_tokens(
    tokens: Any,
    positions: Any,
    segment_ids: Any,
    lengths: Any,
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


def check_state(model: HybridLM, state: Any, batch: int) -> None:
    """Raises ValueError unless this is a state of this model for so many rows."""
    if not isinstance(state, ModelState):
        raise ValueError(f"state is a {type(state).__name__}, not one from init_state.")
    if state.length.shape != (batch,):
        raise ValueError(
            f"The state holds {state.length.shape[0]} rows, but tokens have {batch}; "
            f"make one with init_state({batch}, capacity)."
        )
    pages = None if state.pages is None else state.pool_size(model.appends)
    # Looked up, because a model may be called again and again outside of jit.
    key = model.config, model.dtype, batch, state.capacity, pages
    if key not in _layers:
        wanted = model.abstract_state(batch, state.capacity, pages=pages)
        _layers[key] = [_described(layer) for layer in wanted.layers]
    found = [_described(layer) for layer in state.layers]
    if found == _layers[key]:
        return
    hint = f"make one with this model's init_state({batch}, {state.capacity})"
    if len(found) != len(_layers[key]):
        raise ValueError(
            f"The state has {len(found)} layers, but the model {len(_layers[key])}; {hint}."
        )
    pairs = enumerate(zip(found, _layers[key], strict=True))
    i, (got, wanted) = next(pair for pair in pairs if pair[1][0] != pair[1][1])
    raise ValueError(f"The state's layer {i} is {got}, but the model's is {wanted}; {hint}.")


def check_room(model: HybridLM, state: ModelState, new: Array | int) -> None:
    """Raises ValueError if `new` tokens of each row, [B] or T, do not fit into the state.

    Only layers that keep every token lose some; what is traced cannot be looked at.
    """
    if not any(model.appends):
        return
    held = state.length
    if isinstance(new, int) and new > state.capacity:
        held = np.zeros(1, np.int32)  # so many are too many for any row
    arrays = [x for x in (held, new) if isinstance(x, jax.Array)]
    if any(is_traced(x) or not x.is_fully_addressable for x in arrays):
        return
    total = np.asarray(held) + np.asarray(new)
    if (row := int(total.argmax())) >= 0 and total[row] > state.capacity:
        raise ValueError(
            f"Row {row} would hold {total[row]} tokens, but the state's capacity is "
            f"{state.capacity}; make a larger one with init_state(batch, capacity)."
        )


def check_solver(solver: str, config: HybridConfig) -> None:
    """Raises ValueError for an unknown solver, or another one where no layer has any."""
    check_choice("solver", solver, ("chebyshev", "cg"))
    if solver != "chebyshev" and not config.solves:
        raise ValueError(f"solver={solver!r}: the model has no layers with a solver (GKA).")


_layers: dict[Any, list[str]] = {}


def _described(layer: Any) -> str:
    """ "GKAState(h_kk=float32[2, 4, 16, 16], ...)"."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(layer)
    arrays = (
        f"{jax.tree_util.keystr(path, simple=True, separator='.')}={x.dtype}{list(x.shape)}"
        for path, x in leaves
    )
    return f"{type(layer).__name__}({', '.join(arrays)})"
