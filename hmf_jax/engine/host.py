"""Arrays that wait in the memory of the host, and their way back."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np

HOST = "pinned_host"  # memory that the device reads and writes by itself


def to_host(tree: Any) -> Any:
    """The arrays of a tree in host memory; where there is a choice, the copy is not waited for."""

    def kept(x: jax.Array) -> Any:
        return x.sharding.with_memory_kind(HOST)

    leaves, treedef = jax.tree.flatten(tree)
    if leaves and not _has_pinned(next(iter(leaves[0].devices()))):
        return jax.tree.unflatten(treedef, [np.asarray(x) for x in leaves])
    return jax.tree.unflatten(treedef, jax.device_put(leaves, [kept(x) for x in leaves]))


def to_device(tree: Any) -> Any:
    """What `to_host` returned, in the memory of the devices where it was."""
    leaves, treedef = jax.tree.flatten(tree)
    if any(isinstance(x, np.ndarray) for x in leaves):
        return tree  # a program takes it along
    places = [x.sharding.with_memory_kind(_own(next(iter(x.devices())))) for x in leaves]
    return jax.tree.unflatten(treedef, jax.device_put(leaves, places))


@functools.cache
def _has_pinned(device: Any) -> bool:
    return HOST in {memory.kind for memory in device.addressable_memories()}


@functools.cache
def _own(device: Any) -> str:
    return device.default_memory().kind
