"""Sizes that only a timing can choose: looked up when a kernel is traced, never tuned there.

`tuned.json` holds what `python -m benchmarks.tune` measured: device kind -> "operator dtype bucket"
-> {name: number}. The bucket is the size of the problem rounded up to a power of two. Kernels bring
defaults for everything that is not in it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.resources
import json
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

Table = dict[str, dict[str, dict[str, int]]]
_override: dict[str, Mapping[str, int]] = {}


def key(op: str, dtype: Any, size: int) -> str:
    """The name of an entry, e.g. "gka.scan bfloat16 8192"."""
    return f"{op} {jnp.dtype(dtype).name} {1 << max(size - 1, 0).bit_length()}"


def tuned(op: str, dtype: Any, size: int, **default: int) -> dict[str, int]:
    """`default`, with what was measured on this kind of device for this operator and bucket."""
    measured = _table().get(jax.devices()[0].device_kind, {}).get(key(op, dtype, size), {})
    chosen = default | {n: v for n, v in measured.items() if n in default}
    return chosen | dict(_override.get(op, {}))


@contextlib.contextmanager
def using(op: str, **values: int) -> Iterator[None]:
    """Programs traced inside use these values; for the tuner and for tests."""
    before = dict(_override)
    _override[op] = values
    try:
        yield
    finally:
        _override.clear()
        _override.update(before)


@functools.cache
def _table() -> Table:
    file = importlib.resources.files("hmf_jax.pallas_kernels") / "tuned.json"
    return json.loads(file.read_text()) if file.is_file() else {}
