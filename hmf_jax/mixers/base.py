"""The protocol of a sequence mixer, and what a model tells its mixers about the tokens at hand."""

from __future__ import annotations

import abc
import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hmf_jax.pallas_kernels import PageTable
from hmf_jax.sharding import constrain, named_sharding, spec

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """The tokens of one call, as the model lays them out: valid tokens first, padding last.

    Attributes:
      rope: cos, sin float32 [B, T, 1, R/2], of the R channels of a head that are rotated.
      segment_ids: [B, T] int32 of packed documents, one number each, 0 = padding; None: every row
        is one document.
      lengths: [B] int32, valid tokens of each row in this call; None = T.
      offset: [B] int32, tokens that the state already holds; zeros without a state.
      num_iter: Chebyshev iterations, scalar or [B] int32; None = the config's.
      place: [B, T] int32, where each token of the caller is in this layout; None: where it was.
      fresh: static; the state is empty, so this call sees whole sequences from their start.
      impl: static; implementation of the operators ("auto" or a name that they all know).
      solver: static; whose steps num_iter counts, see `hmf_jax.pallas_kernels.gka`.
      mesh: static; the device mesh, or None.
      position: [B] int32, what the state's `position` is after this call; None without a state.
      pages: where full attention layers keep keys and values; None: in a buffer per row.
      query_scale: float32 [B, T, 1, 1], what attention multiplies its rotated queries by; None: 1.
    """

    rope: tuple[Array, Array]
    segment_ids: Array | None
    lengths: Array | None
    offset: Array
    num_iter: Array | None
    place: Array | None
    fresh: bool = dataclasses.field(metadata={"static": True})
    impl: str = dataclasses.field(metadata={"static": True})
    mesh: Mesh | None = dataclasses.field(metadata={"static": True})
    solver: str = dataclasses.field(default="chebyshev", metadata={"static": True})
    position: Array | None = None
    query_scale: Array | None = None
    pages: PageTable | None = None

    @property
    def options(self) -> dict:
        """Keyword arguments of every operator."""
        return {"impl": self.impl, "mesh": self.mesh}

    @property
    def padding(self) -> dict:
        """What recurrent operators and convolutions are told about padding and documents."""
        return {"segment_ids": self.segment_ids, "lengths": self.lengths}

    @property
    def active(self) -> Array | None:
        """[B] bool: the rows that have a token, in calls of one token each; None: all."""
        return None if self.lengths is None else self.lengths > 0

    def counts(self, T: int) -> Array:
        """[B] int32: how many of the T tokens of each row are valid."""
        return jnp.full_like(self.offset, T) if self.lengths is None else self.lengths

    def mask(self, x: Array) -> Array:
        """x [B, T, ...] with zeros at padding: zero keys, step sizes and decays are no-ops."""
        if self.lengths is None:
            return x
        valid = jnp.arange(x.shape[1]) < self.lengths[:, None]
        return jnp.where(valid.reshape(*x.shape[:2], *([1] * (x.ndim - 2))), x, 0)

    def over_tokens(self, x: Array) -> Array:
        """x [B, T, ...] with its tokens split over the mesh's "sp", as between operators."""
        if self.mesh is None or self.mesh.shape["sp"] == 1:
            return x
        rows, tokens = spec(self.mesh, ("batch", "tokens"), x.shape[:2])
        others = (PartitionSpec.UNCONSTRAINED,) * (x.ndim - 2)
        split = NamedSharding(self.mesh, PartitionSpec(rows, tokens, *others))
        return jax.lax.with_sharding_constraint(x, split)


class Mixer(nnx.Module):
    """Mixes tokens along a sequence.

    x may be a first prefill, the continuation of one, or a single token; y must not depend on how
    the sequence was cut. Without a state the rows are whole sequences, and None is returned for it.
    """

    @abc.abstractmethod
    def __call__(self, x: Array, ctx: Context, state: Any = None) -> tuple[Array, Any]:
        """x [B, T, d], state -> y [B, T, d], the state after these tokens."""

    @abc.abstractmethod
    def init_state(self, batch: int, capacity: int, dtype, mesh: Mesh | None) -> Any:
        """The state before the first token, for rows of at most `capacity` tokens."""


_abstract = contextvars.ContextVar("abstract", default=False)


@contextlib.contextmanager
def abstract_zeros() -> Iterator[None]:
    """In this context `zeros` makes no arrays, only their `jax.ShapeDtypeStruct`s."""
    token = _abstract.set(True)
    try:
        yield
    finally:
        _abstract.reset(token)


def zeros(shape: Sequence[int], dims: Sequence[str | None], dtype, mesh: Mesh | None) -> Array:
    """An array of zeros, laid out on the mesh by its dimension names; states are made of these."""
    split = named_sharding(mesh, dims, shape)
    if _abstract.get():
        return jax.ShapeDtypeStruct(shape, dtype, sharding=split)  # pyright: ignore
    made = jnp.zeros(shape, dtype, device=split)
    return constrain(made, mesh, *dims)  # in a trace, `device` is no constraint
