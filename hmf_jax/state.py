"""What a model remembers between calls: a state per layer, static shapes, and where its rows are.

The state of a layer is a small pytree, defined beside its mixer. Recurrent states are float32
whatever the dtype of the model; convolution histories and keys and values have the model's dtype.
None of them counts tokens: `ModelState.length` does, once per row.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp

from hmf_jax.moved import moved
from hmf_jax.pallas_kernels import PageTable

if TYPE_CHECKING:
    from hmf_jax.mixers.base import Context

Array = jax.Array


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("layers", "length", "position", "pages"),
    meta_fields=("capacity",),
    drop_fields=("fresh",),
)
@dataclasses.dataclass(frozen=True)
class ModelState:
    """State of a whole model for a batch of rows.

    Attributes:
      layers: one state per layer.
      length: [B] int32, tokens that each row holds.
      position: [B] int32, rotary position of each row's next token; its length, unless it was
        composed (`hmf_jax.compose`) or positions were given (then the last given one + 1).
      capacity: most tokens a row may hold (static); attention layers allocate this many entries.
      fresh: whether no row holds a token, so that the next call may use plain causal attention
        kernels. A hint, and not part of the pytree: what comes out of a transformation (an argument
        of a jitted function, a loop's carry) is not fresh, which is always right. So a state has
        one type from `init_state` on. Programs that know better say
        `dataclasses.replace(state, fresh=True)`.
      pages: where the keys and values of full attention layers lie, if these are pools of pages
        [P, page, K, D] instead of a buffer per row; None: they are buffers. Pages are lent to rows
        and taken back by whoever made the state, see `hmf_jax.engine.device`.
    """

    layers: tuple[Any, ...]
    length: Array
    position: Array
    capacity: int
    fresh: bool = False
    pages: PageTable | None = None

    def reset(self, rows: Array) -> Self:
        """Empty the rows where the [B] bool `rows` is True."""
        self._check_buffers()

        def clear(x: Array) -> Array:
            return jnp.where(rows.reshape(-1, *([1] * (x.ndim - 1))), jnp.zeros((), x.dtype), x)

        return jax.tree.map(clear, self)

    def gather(self, rows: Array) -> Self:
        """Rows [N] of this state, in this order, as a new state of batch N."""
        self._check_buffers()
        return jax.tree.map(lambda x: jnp.take(x, rows, axis=0), self)

    def pool_size(self, appends: Sequence[Sequence[str]]) -> tuple[int, int] | None:
        """(P, page) of the pools, if full attention layers have them; `HybridLM.appends`."""
        named = zip(self.layers, appends, strict=False)
        pools = (getattr(layer, name, None) for layer, names in named for name in names)
        return next((pool.shape[:2] for pool in pools if pool is not None), None)

    def _check_buffers(self) -> None:
        if self.pages is not None:
            raise ValueError("the rows of this state have their keys and values in pages.")

    def __repr__(self) -> str:
        """Sizes in one line; the layers' arrays are in `layers`."""
        rows = self.length.shape[0] if hasattr(self.length, "shape") else self.length
        return (
            f"ModelState({len(self.layers)} layers, rows={rows}, capacity={self.capacity}, "
            f"fresh={self.fresh})"
        )

    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(self))


def advance(
    state: ModelState | None, layers: Iterable[Any], ctx: Context, T: int
) -> ModelState | None:
    """The state after T more tokens of each row, of which padding does not count; None without one.

    `layers`: the new states of the layers.
    """
    if state is None:
        return None
    length = state.length + (T if ctx.lengths is None else ctx.lengths)
    assert ctx.position is not None
    return ModelState(tuple(layers), length, ctx.position, state.capacity, pages=state.pages)


def with_pools(layer: Any, pool: Any, names: Sequence[str]) -> Any:
    """The state of a layer with these arrays of another one."""
    return dataclasses.replace(layer, **{name: getattr(pool, name) for name in names})


__getattr__ = moved(
    __name__,
    {
        f"{name}State": f"is now hmf_jax.mixers.{name}State"
        for name in ("Attention", "Window", "GKA", "GDN", "Mamba2", "BMojo")
    },
)
