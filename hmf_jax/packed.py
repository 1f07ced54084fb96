"""A model as programs see it: a list of arrays, and nothing of where these are from."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Self

import jax

from hmf_jax.pallas_kernels.compat import tracing

if TYPE_CHECKING:
    from hmf_jax.model import HybridLM


@jax.tree_util.register_pytree_node_class
class PackedModel:
    """A model as programs are called with it over and over: a list of arrays.

    Taking the modules of a 36-layer model apart costs every call of a jitted function 4 ms of
    Python on one device and 11 on eight; a list costs a tenth.

        packed = PackedModel.of(model)
        step = jax.jit(lambda packed, tokens, state: packed.model()(tokens, state=state))
    """

    _structures: dict[Any, Any] = {}  # equal ones are one object, so that comparing them is free

    def __init__(self, arrays: Sequence[Any], structure: _Structure):
        self.arrays, self.structure = arrays, structure

    @classmethod
    def of(cls, model: HybridLM) -> PackedModel:
        """The model's arrays, not copies of them."""
        arrays, treedef = jax.tree.flatten(model)
        structure = _Structure(treedef)
        return cls(arrays, cls._structures.setdefault(structure, structure))

    def model(self) -> HybridLM:
        """The model again, without its source; within a program at no cost."""
        model = jax.tree.unflatten(self.structure.treedef, self.arrays)
        model.origin = Origin()  # equal structures are one object, whatever their sources
        return model

    def tree_flatten(self):
        return self.arrays, self.structure

    @classmethod
    def tree_unflatten(cls, structure: _Structure, arrays: Sequence[Any]) -> PackedModel:
        return cls(arrays, structure)


@jax.tree_util.register_pytree_node_class
@dataclasses.dataclass(frozen=True, eq=False)
class Origin:
    """Where a model is from: a leaf-less part of its tree, which follows it through `jax.tree.map`.

    All are equal, so that models of several directories share programs and can be mapped together.
    A program would therefore return that of the model it was compiled with: it returns none.

    Attributes:
      source: the directory that the model was loaded from, or None.
      recast: whether `HybridLM.astype` made it.
      lost: whether it came out of a program, such as `jax.jit`, that cannot know its source.
    """

    source: str | None = None
    recast: bool = False
    lost: bool = False

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Origin)

    def __hash__(self) -> int:
        return hash(Origin)

    def tree_flatten(self) -> tuple[tuple[()], Self]:
        if not tracing():
            return (), self
        return (), type(self)(lost=self.lost or self.source is not None)

    @classmethod
    def tree_unflatten(cls, aux: Self, children: Any) -> Self:
        return aux


class _Structure:
    """A tree definition that is hashed once."""

    def __init__(self, treedef: Any):
        self.treedef, self._hash = treedef, hash(treedef)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return isinstance(other, _Structure) and self.treedef == other.treedef
