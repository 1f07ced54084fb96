"""`shard_map` around operator calls: batch and heads are split, time and head_dim never are.

Kernels are opaque to the compiler's partitioner, and a recurrence gives it little to work with, so
every operator call names its split, in letters (`spec`) that its inputs carry (`run`). Which mesh
axes split what is said once, by `AXES`: "dp" and "fsdp" split the batch; "tp" splits heads of every
kind; "rep" splits query heads further where there are more tensor parallel devices than key/value
heads, which are then replicated over it. "sp" splits tokens everywhere but in here, where it splits
heads, too: on the way in and out of an operator, devices exchange tokens for heads (all-to-all;
DeepSpeed-Ulysses, arXiv 2309.14509).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, PartitionSpec


@dataclasses.dataclass(frozen=True)
class Axes:
    """Names of the mesh axes that split each kind of dimension.

    Attributes:
      batch: rows of a batch.
      tokens: tokens of a row, between operators.
      heads: query heads, and with them the columns of an MLP and experts, in stored weights.
      kv_heads: key/value heads in stored weights; the first axes of `heads`.
      embed: the hidden dimension of stored weights.
      vocab: the vocabulary.
    """

    batch: tuple[str, ...]
    tokens: tuple[str, ...]
    heads: tuple[str, ...]
    kv_heads: tuple[str, ...]
    embed: tuple[str, ...]
    vocab: tuple[str, ...]

    @property
    def letters(self) -> dict[str, tuple[str, ...]]:
        """The axes behind the letters of `spec`. Inside an operator tokens are whole, and their
        axes split heads."""
        k = self.kv_heads + self.tokens
        rest = tuple(axis for axis in self.heads if axis not in self.kv_heads)
        return {
            "b": self.batch,
            "h": k + rest,
            "k": k,
            "T": self.tokens,
            "V": self.vocab,
            "E": self.heads,
            "f": self.embed,
        }


AXES = Axes(
    batch=("dp", "fsdp"),
    tokens=("sp",),
    heads=("tp", "rep"),
    kv_heads=("tp",),
    embed=("sp", "fsdp"),
    vocab=("tp", "rep"),
)


def batch_parts(mesh: Mesh) -> int:
    """How many parts a mesh splits the rows of a batch into, if their number allows it."""
    size = 1
    for axis in AXES.batch:
        size *= mesh.shape.get(axis, 1)
    return size


def parts(mesh: Mesh | None, letter: str) -> int:
    """How many parts a mesh splits a dimension of this letter into."""
    return 1 if mesh is None else math.prod(mesh.shape.get(a, 1) for a in AXES.letters[letter])


def batch_axes(mesh: Mesh, batch: int) -> tuple[str, ...]:
    """Mesh axes that split a batch of this size: all of them, or none if they do not divide it."""
    divides = batch % batch_parts(mesh) == 0
    return tuple(axis for axis in AXES.batch if axis in mesh.shape) if divides else ()


def spec(mesh: Mesh, dims: str, batch: int) -> PartitionSpec:
    """PartitionSpec of an array described by letters: b batch, h heads, k kv heads, T tokens,
    V vocabulary, E experts, f the hidden dimension of stored weights, other whole."""
    letters = AXES.letters | {"b": batch_axes(mesh, batch)}

    def axes(letter: str) -> tuple[str, ...] | None:
        return tuple(name for name in letters.get(letter, ()) if name in mesh.shape) or None

    return PartitionSpec(*map(axes, dims))


def call(
    fn: Callable[..., Any],
    mesh: Mesh | None,
    batch: int,
    args: Sequence[Any],
    in_dims: Sequence[Any],
    out_dims: Any,
) -> Any:
    """Run `fn(*args)` with every array split as its letters say; plain call when `mesh` is None.

    Args:
      fn: takes and returns arrays of local shapes; arguments may be None (an empty pytree).
      mesh: device mesh with axes of `AXES`, or None.
      batch: global batch size.
      args: global arrays, pytrees of arrays, or None.
      in_dims: per argument a letter string, one letter per axis ("bthd", "btkd", "" = scalar), or a
        pytree of such strings; a string stands for all arrays below its place.
      out_dims: pytree of letter strings with the structure of the result.
    """
    if mesh is None or mesh.size == 1:
        return fn(*args)
    in_specs, out_specs = jax.tree.map(lambda d: spec(mesh, d, batch), (tuple(in_dims), out_dims))
    return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)(
        *args
    )


def run(
    fn: Callable[[Any], Any],
    mesh: Mesh | None,
    inputs: Any,
    out_dims: Any,
    *,
    rename: Mapping[str, str] | None = None,
) -> Any:
    """`call` of `fn(inputs)` for the inputs of an operator.

    Args:
      inputs: a NamedTuple whose fields carry their letters: `q: Annotated[jax.Array, "bthd"]`. The
        first field has the batch as its first axis.
      out_dims: pytree of letter strings with the structure of the result.
      rename: letters that stand for other ones in this call.
    """
    table = str.maketrans(dict(rename or {}))
    letters = [dims.translate(table) for dims in _letters(type(inputs))]
    out_dims = jax.tree.map(lambda dims: dims.translate(table), out_dims)
    in_dims = type(inputs)(*letters)
    return call(fn, mesh, inputs[0].shape[0], (inputs,), (in_dims,), out_dims)


def rename_kv(heads: int, kv_heads: int) -> dict[str, str]:
    """For `run`: as many key/value heads as query heads are split like query heads."""
    return {"k": "h"} if heads == kv_heads else {}


@functools.cache
def _letters(inputs: type) -> tuple[str, ...]:
    hints = typing.get_type_hints(inputs, include_extras=True)
    return tuple(hint.__metadata__[0] for hint in hints.values())
