"""`shard_map` around operator calls: batch and heads are split, time and head_dim never are.

Kernels are opaque to the compiler's partitioner, and a recurrence gives it little to work with, so
every operator call names its split. Mesh axes (see `hmf_jax.sharding`): "dp" and "fsdp" split the
batch; "tp" splits heads of every kind; "rep" splits query heads further where there are more tensor
parallel devices than key/value heads, which are then replicated over it. "sp" splits tokens
everywhere but in here, where it splits heads, too: on the way in and out of an operator, devices
exchange tokens for heads (all-to-all; DeepSpeed-Ulysses, arXiv 2309.14509).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec

BATCH_AXES = ("dp", "fsdp")
TOKEN_AXES = ("sp",)
HEAD_AXES = ("tp", "rep")  # of weights; also their columns for the MLP and the vocabulary
KV_HEAD_AXES = ("tp",)
EMBED_AXES = ("sp", "fsdp")
_LETTERS = {
    "b": BATCH_AXES,
    "f": EMBED_AXES,
    "h": ("tp", "sp", "rep"),
    "k": ("tp", "sp"),
    "T": TOKEN_AXES,
    "V": HEAD_AXES,
}


def batch_axes(mesh: Mesh, batch: int) -> tuple[str, ...]:
    """Mesh axes that split a batch of this size: all of them, or none if they do not divide it."""
    size = 1
    for axis in BATCH_AXES:
        size *= mesh.shape[axis]
    return BATCH_AXES if batch % size == 0 else ()


def spec(mesh: Mesh, dims: str, batch: int) -> PartitionSpec:
    """PartitionSpec of an array described by letters: b batch, h heads, k kv heads, T tokens,
    V vocabulary, f the hidden dimension of stored weights, other whole."""

    def axes(letter: str) -> tuple[str, ...] | None:
        names = batch_axes(mesh, batch) if letter == "b" else _LETTERS.get(letter, ())
        return tuple(name for name in names if name in mesh.shape) or None

    return PartitionSpec(*map(axes, dims))


def call(
    fn: Callable[..., Any],
    mesh: Mesh | None,
    batch: int,
    args: Sequence[Any],
    in_dims: Sequence[str],
    out_dims: Any,
) -> Any:
    """Run `fn(*args)` with every array split as its letters say; plain call when `mesh` is None.

    Args:
      fn: takes and returns arrays of local shapes; arguments may be None (an empty pytree).
      mesh: device mesh with the axes of this module, or None.
      batch: global batch size.
      args: global arrays, pytrees of arrays that share one letter string, or None.
      in_dims: one letter string per argument, one letter per axis ("bthd", "btkd", "" = scalar).
      out_dims: pytree of letter strings with the structure of the result.
    """
    if mesh is None or mesh.size == 1:
        return fn(*args)
    return jax.shard_map(
        fn,
        mesh=mesh,
        in_specs=tuple(spec(mesh, d, batch) for d in in_dims),
        out_specs=jax.tree.map(lambda d: spec(mesh, d, batch), out_dims),
        check_vma=False,
    )(*args)
