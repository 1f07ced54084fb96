"""Rows: which checkpoint tensor becomes which parameter, written down once and read both ways.

A row is (checkpoint name, parameter path, shape in the checkpoint, layout). Rows that name the same
checkpoint tensor are consecutive row blocks of it, in this order. Layouts:

    "same"    the parameter is the tensor
    "linear"  [out, in] in the checkpoint, [in, out] here
    "conv"    [C, 1, K] in the checkpoint, [K, C] here
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Literal

Layout = Literal["same", "linear", "conv"]
Row = tuple[str, str, tuple[int, ...], Layout]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter: a block of rows `start : start + shape[0]` of one checkpoint tensor."""

    name: str
    path: str
    shape: tuple[int, ...]
    layout: Layout
    start: int = 0

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        if self.layout == "same":
            return self.shape
        return self.shape[-1], self.shape[0]

    @property
    def transposed(self) -> bool:
        return self.layout != "same"


def linear(
    n_out: int, n_in: int, name: str, bias: bool = False, path: str | None = None
) -> list[Row]:
    """A projection's weight [n_out, n_in] and, if it has one, its bias."""
    path = path or name
    rows: list[Row] = [(f"{name}.weight", f"{path}.kernel", (n_out, n_in), "linear")]
    if bias:
        rows.append((f"{name}.bias", f"{path}.bias", (n_out,), "same"))
    return rows


def vector(size: int, *names: str) -> list[Row]:
    """Vectors of one size, each under its own name."""
    return [(name, name, (size,), "same") for name in names]


def conv(
    channels: int, taps: int, name: str, bias: bool = False, path: str | None = None
) -> list[Row]:
    """A depthwise convolution's weight [channels, 1, taps] and, if it has one, its bias."""
    path = path or name
    rows: list[Row] = [(f"{name}.weight", f"{path}.weight", (channels, 1, taps), "conv")]
    if bias:
        rows.append((f"{name}.bias", f"{path}.bias", (channels,), "same"))
    return rows


def under(prefix: str, rows: Iterable[Row], path: str | None = None) -> list[Row]:
    """The rows of a module: `prefix` is its name in the checkpoint, `path` (default: same) here."""
    path = prefix if path is None else path
    return [(f"{prefix}.{n}", f"{path}.{p}", shape, layout) for n, p, shape, layout in rows]


def entries(rows: Iterable[Row]) -> list[Entry]:
    """The rows, each with its place in the checkpoint tensor that it is a block of."""
    filled: dict[str, int] = {}
    out = []
    for name, path, shape, layout in rows:
        start = filled.get(name, 0)
        out.append(Entry(name, path, shape, layout, start))
        filled[name] = start + shape[0]
    return out


def by_tensor(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """The entries of each checkpoint tensor, its row blocks in order."""
    out: dict[str, list[Entry]] = {}
    for entry in entries:
        out.setdefault(entry.name, []).append(entry)
    return out


def tensor_shape(blocks: Sequence[Entry]) -> tuple[int, ...]:
    """Shape of the checkpoint tensor made of these row blocks."""
    return (sum(e.shape[0] for e in blocks), *blocks[0].shape[1:])
