"""Parameters in Orbax's format: written from any mesh, restored onto any other."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from hmf_jax.convert.directories import PARAMS
from hmf_jax.convert.reading import first_line, printable, summary


def write(directory: Path, params: Mapping[str, jax.Array]) -> None:
    """Writes `params/`, a tree with one level per part of the parameters' paths.

    Raises OSError, one line, if they cannot be written.
    """
    try:
        with _quiet(), ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(directory / PARAMS, _nested(params))
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as e:
        full = os.strerror(errno.ENOSPC) in str(e)
        code = errno.ENOSPC if full else errno.EIO
        raise OSError(code, first_line(e), str(directory / PARAMS)) from None


def dtypes(directory: Path) -> dict[str, Any]:
    """Parameter path -> the dtype it is stored in."""
    return {path: a.dtype for path, a in _metadata(directory).items()}


def check(directory: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Compares what a directory holds with the shapes that parameters must have.

    Raises ValueError for damaged files, or with a list of the parameters that are missing,
    unexpected or wrong-shaped.
    """
    found = {path: tuple(a.shape) for path, a in _metadata(directory).items()}
    problems = [f"missing: {p}" for p in shapes if p not in found]
    problems += [f"unexpected: {printable(p)}" for p in found if p not in shapes]
    problems += [
        f"wrong shape: {p} is {list(found[p])}, must be {list(shape)}"
        for p, shape in shapes.items()
        if p in found and found[p] != shape
    ]
    if problems:
        raise ValueError(summary(f"{directory}: parameters do not fit the config:", problems))


def restore(directory: Path, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """The parameters of a directory that `check` has passed, each straight onto its shards.

    Args:
      directory: holds `params/`.
      abstract: parameter path -> shape, dtype and sharding (None: the first device).

    Raises ValueError for damaged files.
    """
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = {
        p: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding or device)
        for p, a in abstract.items()
    }
    with _reading(directory), ocp.StandardCheckpointer() as checkpointer:
        return _flat(checkpointer.restore((directory / PARAMS).absolute(), _nested(target)))


def _metadata(directory: Path) -> dict[str, Any]:
    """Parameter path -> what has its shape and dtype."""
    with _reading(directory), ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.metadata((directory / PARAMS).absolute()).item_metadata.tree
        return {p: jax.ShapeDtypeStruct(a.shape, a.dtype) for p, a in _flat(tree).items()}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without Orbax's log: what goes wrong is raised, and said once."""
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        log.setLevel(level)


@contextlib.contextmanager
def _reading(directory: Path) -> Iterator[None]:
    """What Orbax says about damaged files, of many types and pages long, in one line."""
    try:
        with _quiet():
            yield
    except (MemoryError, jax.errors.JaxRuntimeError):
        raise
    except Exception as e:
        raise ValueError(
            f"{directory / PARAMS} is damaged or incomplete ({first_line(e)}); restore it from a "
            "copy"
        ) from None


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    found = {}
    for name, value in tree.items():
        found |= _flat(value, f"{prefix}.{name}" if prefix else str(name))
    return found
