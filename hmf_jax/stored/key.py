"""What a compiled program is made of, as text: equal only for programs that are equal.

Nothing is traced for it. Whatever cannot be described completely raises `Unknown`.
"""

from __future__ import annotations

import enum
import functools
import hashlib
import importlib.metadata
import os
import sys
import time
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding

from hmf_jax.packed import Origin, PackedModel
from hmf_jax.pallas_kernels.compat import JAX, compute_capability, multiprocessors, setting

_BEGAN = time.time()
# Whose code takes part in making a program: their versions are part of the key, and functions and
# types of theirs are what their names say.
_MAKERS = (*JAX, "flax", "numpy", "ml_dtypes", "optax", "qwix", "jla", "jax_triton")
_PLUGINS = ("jax_cuda", "jax_linear", "nvidia_", "triton")  # beginnings of names
_NAMED = ("hmf_jax", "builtins", *_MAKERS)
# Settings of JAX that say where programs are kept and what is told about them.
_ASIDE = ("jax_compilation_cache", "jax_persistent_cache", "jax_log", "jax_debug_log")
_ASIDE += ("jax_traceback", "jax_explain", "jax_enable_compilation_cache")


class Unknown(Exception):
    """Something that cannot be described so that two of them have the same text only if equal."""


def key_of(call: Any) -> str:
    """A name for the program of this `hmf_jax.stored.Call`: another one for any other program.

    Raises:
      Unknown: a part of it cannot be described; OSError: a source file cannot be read.
    """
    function = call.program.__wrapped__
    if call.made_of is None:
        made_of = _text(function)
    else:
        made_of = f"{function.__module__}:{function.__qualname__} {_text(call.made_of)}"
    leaves, tree = jax.tree.flatten((call.args, dict(call.options)))
    parts = [
        _environment(),
        ",".join(f"{name}={setting(name)!r}" for name in _settings()),
        ",".join(os.environ.get(name, "") for name in ("XLA_FLAGS", "LIBTPU_INIT_ARGS")),
        made_of,
        _text(dict(call.static)),
        _text(tree),
        "\n".join(map(_array_text, leaves)),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@functools.cache
def _settings() -> list[str]:
    return sorted(name for name in jax.config.values if not name.startswith(_ASIDE))


@functools.cache
def _environment() -> str:
    """What is the same for all programs of this process.

    Raises Unknown if the source files are not those that this process runs.
    """
    root, digest = Path(__file__).parents[1], hashlib.sha256()
    files = [
        Path(folder, name)
        for folder, _, names in os.walk(root, followlinks=True)
        for name in names
        if name.endswith(".py")
    ]
    for file in sorted(files):
        if file.stat().st_mtime > _BEGAN:
            raise Unknown(f"{file}, which was changed meanwhile,")
        digest.update(f"{file.relative_to(root)}\0".encode() + file.read_bytes())
    device = jax.devices()[0]
    kind = [device.platform, device.device_kind, device.client.platform_version]
    kind += [compute_capability(), str(multiprocessors())]
    if device.platform == "cpu":
        kind.append(_instructions())
    return f"{digest.hexdigest()} {sys.version} {kind} {_versions()}"


def _versions() -> list[str]:
    """Names and versions of what takes part in compiling, as directories of packages say."""
    found = []
    for name in _MAKERS:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    for path in sys.path:
        if os.path.isdir(path):
            names = (name for name in os.listdir(path) if name.startswith(_PLUGINS))
            found += [name for name in names if name.endswith(".dist-info")]
    return sorted(found)


def _instructions() -> str:
    """What this machine's processor can do: programs for CPUs depend on it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return os.uname().machine
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _array_text(x: Any) -> str:
    if not hasattr(x, "dtype"):
        return type(x).__name__
    sharding = getattr(x, "sharding", None)
    place = sharding is not None and getattr(x, "committed", True)
    weak = getattr(x, "weak_type", False)
    return f"{np.shape(x)} {x.dtype} {weak} {_sharding_text(sharding) if place else ''}"


@functools.lru_cache
def _sharding_text(sharding: Any) -> str:
    if isinstance(sharding, NamedSharding):
        what = f"{sharding.spec} {_mesh_text(sharding.mesh)}"
    else:
        what = f"{type(sharding)} {sorted(device.id for device in sharding.device_set)}"
        what += "" if len(sharding.device_set) == 1 else repr(sharding)
    return f"{what} {sharding.memory_kind}"


def _mesh_text(mesh: Mesh | AbstractMesh) -> str:
    ids = [device.id for device in mesh.devices.flat] if isinstance(mesh, Mesh) else None
    return f"{[*mesh.shape.items()]} {mesh.axis_types} {ids}"


def _text(x: Any) -> str:
    """What says all of a static value; raises `Unknown` where that is not known."""
    if x is None or isinstance(x, bool | int | float | complex | str | bytes):
        return f"{type(x).__name__}({x!r})"
    if isinstance(x, enum.Enum | np.dtype):
        return f"{type(x).__qualname__}({x!s})"
    if isinstance(x, jax.tree_util.PyTreeDef):
        return _tree_text(x)
    if isinstance(x, type | types.FunctionType):
        name = f"{x.__module__}:{x.__qualname__}"
        if x.__module__.partition(".")[0] not in _NAMED or "<" in name:
            raise Unknown(name)
        if getattr(x, "__closure__", None):
            raise Unknown(f"what {name} was made of")
        return name
    if isinstance(x, tuple | list):
        return f"{_text(type(x))}[{','.join(map(_text, x))}]"
    if isinstance(x, Mapping):
        return f"{_text(type(x))}{{{','.join(f'{_text(k)}:{_text(v)}' for k, v in x.items())}}}"
    if isinstance(x, jax.sharding.Sharding):
        return _sharding_text(x)
    if isinstance(x, Mesh | AbstractMesh):
        return _mesh_text(x)
    if isinstance(x, Origin):
        return "Origin"  # all are equal
    if hasattr(x, "__dataclass_fields__"):
        fields = ",".join(f"{name}={_text(getattr(x, name))}" for name in x.__dataclass_fields__)
        return f"{_text(type(x))}({fields})"
    raise Unknown(f"a {type(x).__qualname__}")


def _tree_text(tree: Any) -> str:
    node = tree.node_data()
    if node is None:
        return "*"
    kind, static = node
    if kind is PackedModel:
        return _packed_text(static)
    return f"{_text(kind)}<{_text(static)}>({','.join(map(_tree_text, tree.children()))})"


@functools.lru_cache(maxsize=32)
def _packed_text(structure: Any) -> str:
    """Of the model that a list of arrays stands for, see `PackedModel`."""
    return _tree_text(structure.treedef)
