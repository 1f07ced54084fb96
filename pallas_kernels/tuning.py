"""Sizes that only a timing can choose: looked up when a kernel is traced, never tuned there.

`tuned.json`, next to this file, holds what `python -m benchmarks.tune` measured:

    {device kind: {"jax": version, "date": day,
                   "entries": {"operator dtype bucket": {name: value}}}}

The bucket is the size of the problem rounded up to a power of two. Kernels bring defaults for
everything that is not in it: other devices, dtypes and sizes.
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

Entries = dict[str, dict[str, int]]

# Operator -> name -> the values that its kernel takes: what is tuned, and what a table may hold.
TUNABLE: dict[str, dict[str, tuple[int, ...]]] = {
    "gka.scan": {"stages": (2, 3, 4)},
    "gka.decode": {"early": (64, 128)},
}
_override: dict[str, Mapping[str, int]] = {}


def key(op: str, dtype: Any, size: int) -> str:
    """The name of an entry, e.g. "gka.scan bfloat16 8192"."""
    return f"{op} {jnp.dtype(dtype).name} {1 << max(size - 1, 0).bit_length()}"


def tuned(op: str, dtype: Any, size: int, **default: int) -> dict[str, int]:
    """`default`, with what was measured on this kind of device for this operator and bucket."""
    if op in _override:
        return default | dict(_override[op])
    measured = _entries(jax.devices()[0].device_kind).get(key(op, dtype, size), {})
    return default | {n: v for n, v in measured.items() if n in default}


@contextlib.contextmanager
def using(op: str, **values: int) -> Iterator[None]:
    """Programs traced inside use these values, and the kernel's own choice for others, whatever
    was measured; for the tuner and for tests."""
    before = dict(_override)
    _override[op] = values
    try:
        yield
    finally:
        _override.clear()
        _override.update(before)


def check(table: Any) -> dict[str, Any]:
    """The table itself.

    Raises:
      ValueError: it is not of the form above, or holds a value that its kernel does not take.
    """

    def wrong(what: str) -> ValueError:
        return ValueError(f"tuned.json: {what}; write it anew with python -m benchmarks.tune.")

    if not isinstance(table, dict):
        raise wrong("not an object by device kind")
    for device, measured in table.items():
        if not isinstance(measured, dict) or measured.keys() != {"jax", "date", "entries"}:
            raise wrong(f"{device!r} must have jax, date and entries")
        for name, values in measured["entries"].items():
            op, *rest = name.split(" ")
            if op not in TUNABLE or len(rest) != 2 or not rest[1].isdigit():
                raise wrong(f"{name!r} is not the name of an entry")
            for value_name, value in values.items():
                allowed = TUNABLE[op].get(value_name, ())
                if isinstance(value, bool) or value not in allowed:
                    raise wrong(f"{name!r} has {value_name}={value!r}, allowed are {allowed}")
    return table


def _entries(device_kind: str) -> Entries:
    return _table().get(device_kind, {}).get("entries", {})


@functools.cache
def _table() -> dict[str, Any]:
    file = importlib.resources.files("hmf_jax.pallas_kernels") / "tuned.json"
    return check(json.loads(file.read_text())) if file.is_file() else {}
