"""What a model remembers between calls: a state per layer, static shapes, and where its rows are.

The state of a layer is a small pytree, defined beside its mixer. Recurrent states are float32
whatever the dtype of the model; convolution histories and keys and values have the model's dtype.
None of them counts tokens: `ModelState.length` does, once per row.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Self

import jax
import jax.numpy as jnp

from hmf_jax.moved import moved

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ModelState:
    """State of a whole model for a batch of rows.

    Attributes:
      layers: one state per layer.
      length: [B] int32, tokens that each row holds.
      position: [B] int32, rotary position of each row's next token; its length, unless it was
        composed (`hmf_jax.compose`).
      capacity: most tokens a row may hold (static); attention layers allocate this many entries.
      fresh: static; True until the first call, which may then use plain causal attention kernels.
    """

    layers: tuple[Any, ...]
    length: Array
    position: Array
    capacity: int = dataclasses.field(metadata={"static": True})
    fresh: bool = dataclasses.field(default=True, metadata={"static": True})

    def reset(self, rows: Array) -> Self:
        """Empty the rows where the [B] bool `rows` is True."""

        def clear(x: Array) -> Array:
            return jnp.where(rows.reshape(-1, *([1] * (x.ndim - 1))), jnp.zeros((), x.dtype), x)

        return jax.tree.map(clear, self)

    def gather(self, rows: Array) -> Self:
        """Rows [N] of this state, in this order, as a new state of batch N."""
        return jax.tree.map(lambda x: jnp.take(x, rows, axis=0), self)

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


__getattr__ = moved(
    __name__,
    {
        f"{name}State": f"is now hmf_jax.mixers.{name}State"
        for name in ("Attention", "Window", "GKA", "GDN", "Mamba2", "BMojo")
    },
)
