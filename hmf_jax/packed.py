"""A model as programs are called with it over and over: a list of arrays."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax

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
        """The model again; within a program at no cost."""
        return jax.tree.unflatten(self.structure.treedef, self.arrays)

    def tree_flatten(self):
        return self.arrays, self.structure

    @classmethod
    def tree_unflatten(cls, structure: _Structure, arrays: Sequence[Any]) -> PackedModel:
        return cls(arrays, structure)


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
