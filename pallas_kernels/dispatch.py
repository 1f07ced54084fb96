"""Which implementation of an operator runs, and why; gradients that another one lends."""

from __future__ import annotations

import functools
import logging
import math
import numbers
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

from hmf_jax.pallas_kernels.compat import compute_capability

IMPLS = ("auto", "mosaic", "triton", "jla", "cudnn", "xla", "chunked", "reference")
# Names for policies of `jax.checkpoint`: what operators hand to their backward pass beside what
# they were given, and products with weights.
OPERATOR, PRODUCT = "operator", "product"
_log = logging.getLogger("pallas_kernels")
_said: set[tuple[str, str, str]] = set()


def resolve(op: str, impl: str, usable: Mapping[str, str | None]) -> str:
    """Pick the implementation of `op`.

    Args:
      op: operator name, for messages.
      impl: one of `IMPLS`. A named implementation never falls back to another one.
      usable: the implementations `op` has, best first: name -> None when it can run these
        arguments on this backend, else the reason why it cannot.

    Returns:
      The name of the implementation to run. Says once (logger "pallas_kernels", level INFO)
      which one that is and why.

    Raises:
      ValueError: unknown name, or a named implementation that cannot run these arguments.
    """
    if impl not in IMPLS:
        raise ValueError(f"impl={impl!r} is unknown; choose one of {', '.join(IMPLS)}.")
    if impl == "auto":
        name = next(n for n, why_not in usable.items() if why_not is None)
        why = (
            "; ".join(f"not {n}: {w}" for n, w in usable.items() if w is not None) or "first choice"
        )
    else:
        if impl not in usable:
            raise ValueError(f"{op} has no implementation {impl!r}; it has {', '.join(usable)}.")
        if usable[impl] is not None:
            raise ValueError(
                f"{op} cannot run impl={impl!r} here: {usable[impl]}. Use impl='auto'."
            )
        name, why = impl, "asked for"
    if (op, name, why) not in _said:
        _said.add((op, name, why))
        _log.info("%s runs %s (%s)", op, name, why)
    return name


def kept[T](arrays: T, name: str = OPERATOR) -> T:
    """These arrays under a name by which a policy of `jax.checkpoint` may keep them.

    The forward rules of operators name what their backward rules read: where that is kept, no
    kernel runs again.
    """
    return jax.tree.map(lambda x: checkpoint_name(x, name), arrays)


def check_whole(op: str, name: str, value: Any) -> None:
    """Raise ValueError unless it is a whole number from 1 to 2**30: sums of two fit into int32."""
    whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if not whole or not 1 <= int(value) <= 2**30:
        raise ValueError(f"{op}: {name}={value!r} must be a whole number from 1 to 2**30.")


def finite(op: str, name: str, value: Any, default: float) -> float:
    """The value as a float, or the default for None. Raises ValueError unless it is finite."""
    value = default if value is None else value
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if isinstance(value, bool | str) or not math.isfinite(number):
        raise ValueError(f"{op}: {name}={value!r} must be a finite number.")
    return number


@functools.cache
def why_no_hopper() -> str | None:
    """Why kernels for NVIDIA Hopper cannot run on this machine; None if they can."""
    if jax.devices()[0].platform != "gpu" or compute_capability() != "9.0":
        return "its kernels need an NVIDIA Hopper GPU (compute capability 9.0)"
    return None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def with_gradient_of(other: Callable[..., Any], run: Callable[..., Any], *arrays: Any) -> Any:
    """`run(*arrays)`, with the gradient of `other(*arrays)`, another implementation of the same.

    The gradient is computed from the saved arguments, in JAX's highest precision.
    """
    return run(*arrays)


def _forward(other, run, *arrays):
    return run(*arrays), arrays


def _backward(other, run, arrays, cotangents):
    with jax.default_matmul_precision("highest"):
        return jax.vjp(other, *arrays)[1](cotangents)


with_gradient_of.defvjp(_forward, _backward)
