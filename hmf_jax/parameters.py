"""The parameters of a model, or of a part of one: the one place that lists them.

A parameter has a path ("layers.3.mixer.q_proj.kernel") and names for its dimensions (`dims`), which
say how a mesh splits it, see `hmf_jax.sharding`. All functions here give parameters in the order of
`jax.tree.leaves(module)`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from hmf_jax.pallas_kernels.compat import is_traced
from hmf_jax.sharding import named_sharding


def variables(module: nnx.Module) -> dict[str, nnx.Variable]:
    """Path -> variable, which holds the array and its `dims`.

    Args:
      module: a model, a part of one, its abstract twin (`nnx.eval_shape`) or its gradients.
    """
    pairs = jax.tree.leaves_with_path(module, is_leaf=_is_variable)
    return {jax.tree_util.keystr(path, simple=True, separator="."): v for path, v in pairs}


def flat_params(module: nnx.Module) -> dict[str, jax.Array]:
    """Path -> array, of a model or a part of one."""
    return {path: variable.get_value() for path, variable in variables(module).items()}


def abstract_params(module: nnx.Module, mesh: Mesh | None) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape, dtype, and the sharding that `dims` mean on this mesh (None without one)."""
    out = {}
    for path, variable in variables(module).items():
        value = variable.get_value()
        sharding = named_sharding(mesh, variable.get_metadata()["dims"], value.shape)
        out[path] = jax.ShapeDtypeStruct(value.shape, value.dtype, sharding=sharding)
    return out


def shardings(module: nnx.Module, mesh: Mesh) -> Any:
    """A pytree like the module with the sharding of each parameter, for `jax.device_put`."""
    split = [a.sharding for a in abstract_params(module, mesh).values()]
    return jax.tree.unflatten(jax.tree.structure(module), split)


def split[M: nnx.Module](module: M, mesh: Mesh | None) -> M:
    """The module with its parameters on their shards; as it is without a mesh or in a trace."""
    if mesh is None or any(is_traced(x) for x in jax.tree.leaves(module)):
        return module
    return jax.block_until_ready(jax.device_put(module, shardings(module, mesh)))


def with_params[M: nnx.Module](module: M, params: Mapping[str, Any]) -> M:
    """A copy of the module that holds these arrays (the abstract twin of a model becomes real).

    Args:
      module: only the shapes of its own arrays are looked at.
      params: path -> floating-point array, of any dtype.

    Raises:
      KeyError: paths of the module are missing.
      ValueError: other paths, shapes or types, by name.
    """
    own = flat_params(module)
    if missing := own.keys() - params.keys():
        raise KeyError(f"missing parameters: {', '.join(sorted(missing))}")
    problems = [f"{path} is no parameter of the module" for path in params.keys() - own.keys()]
    for path, old in own.items():
        new = params[path]
        if not _floats(new):
            problems.append(f"{path} must be a floating-point array, got {_kind(new)}")
        elif new.shape != old.shape:
            problems.append(f"{path} has shape {list(new.shape)}, must be {list(old.shape)}")
    if problems:
        raise ValueError("; ".join(sorted(problems)))
    return jax.tree.unflatten(jax.tree.structure(module), [params[path] for path in own])


def cast[M: nnx.Module](module: M, dtypes: Mapping[str, Any]) -> M:
    """A copy of the module with parameters in these dtypes (path -> dtype); others keep theirs."""
    leaves = [x.astype(dtypes.get(path, x.dtype)) for path, x in flat_params(module).items()]
    return jax.tree.unflatten(jax.tree.structure(module), leaves)


def float_dtype(dtype: Any) -> np.dtype:
    """The dtype of a model, from any of its spellings: `jnp.bfloat16`, "bfloat16", `np.dtype`.

    Raises:
      ValueError: it is none that a model computes in.
    """
    known = "bfloat16, float16 or float32"
    try:
        found = None if dtype is None else np.dtype(dtype)
    except TypeError:
        found = None
    if found is None or found.name not in ("bfloat16", "float16", "float32", "float64"):
        raise ValueError(f"dtype={dtype!r} is none that models compute in; choose {known}.")
    if jax.dtypes.canonicalize_dtype(found) != found:
        raise ValueError(f"dtype=float64 needs jax_enable_x64; or choose {known}.")
    return found


def _floats(x: Any) -> bool:
    """Whether it is an array of a floating dtype, or describes one; PyTorch's have other dtypes."""
    try:
        return jnp.issubdtype(np.dtype(x.dtype), jnp.floating)
    except (AttributeError, TypeError):
        return False


def _kind(x: Any) -> str:
    return str(x.dtype) if hasattr(x, "dtype") else type(x).__name__


def _is_variable(x: Any) -> bool:
    return isinstance(x, nnx.Variable)
