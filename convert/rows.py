"""Rows: which checkpoint tensor becomes which parameter, written down once and read both ways.

Rows that name the same checkpoint tensor are blocks of its rows, one after the other in this order.
Layouts:

    "same"     the parameter is the tensor
    "linear"   [out, in] in the checkpoint, [in, out] here
    "conv"     [C, 1, K] in the checkpoint, [K, C] here
    "experts"  [E, out, in] in the checkpoint, [E, in, out] here
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

Layout = Literal["same", "linear", "conv", "experts"]


class Row(NamedTuple):
    """A checkpoint tensor, or a block of its rows, and the parameter that it becomes.

    Attributes:
      name: of the tensor in the checkpoint.
      path: of the parameter.
      shape: of the block, as the checkpoint has it.
      layout: see above.
      groups: the tensor is that many equal groups of rows, and each group has its part of the block
        (1: the block lies in one piece). All rows of a tensor say the same.
      parts: names of the tensors that a checkpoint may hold in place of this one, one set for each
        slice of the first axis, with {} for its number: slice i is what they hold, one below the
        other.
      split: the parts are what is written.
    """

    name: str
    path: str
    shape: tuple[int, ...]
    layout: Layout
    groups: int = 1
    parts: tuple[str, ...] = ()
    split: bool = False


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter and its place in a checkpoint; fields as in `Row`, and:

    Attributes:
      start: where the block begins, in rows of the tensor (of its first group).
      stride: rows of a group.
    """

    name: str
    path: str
    shape: tuple[int, ...]
    layout: Layout
    groups: int = 1
    parts: tuple[str, ...] = ()
    split: bool = False
    start: int = 0
    stride: int = 0

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        if self.layout == "experts":
            return self.shape[0], self.shape[2], self.shape[1]
        return (self.shape[-1], self.shape[0]) if self.transposed else self.shape

    @property
    def transposed(self) -> bool:
        """Whether the last two axes change places (where there are three, [C, 1, K] is [C, K])."""
        return self.layout != "same"

    @property
    def rows(self) -> slice | np.ndarray:
        """The rows of the tensor that the block is, for use as an index."""
        if self.groups == 1:
            return slice(self.start, self.start + self.shape[0])
        block = self.start + np.arange(self.shape[0] // self.groups)
        return (self.stride * np.arange(self.groups)[:, None] + block).reshape(-1)

    def pieces(self) -> Iterator[tuple[str, tuple[int, slice]]]:
        """Name of each of its parts, and what that part is of the tensor, as an index."""
        if not self.parts:
            return
        height = self.shape[1] // len(self.parts)
        for i in range(self.shape[0]):
            for j, part in enumerate(self.parts):
                yield part.format(i), (i, slice(j * height, (j + 1) * height))


def linear(
    n_out: int,
    n_in: int,
    name: str,
    bias: bool = False,
    path: str | None = None,
    groups: int = 1,
) -> list[Row]:
    """A projection's weight [n_out, n_in] and, if it has one, its bias."""
    path = path or name
    rows = [Row(f"{name}.weight", f"{path}.kernel", (n_out, n_in), "linear", groups)]
    if bias:
        rows.append(Row(f"{name}.bias", f"{path}.bias", (n_out,), "same", groups))
    return rows


def vector(size: int, *names: str) -> list[Row]:
    """Vectors of one size, each under its own name."""
    return [Row(name, name, (size,), "same") for name in names]


def conv(
    channels: int, taps: int, name: str, bias: bool = False, path: str | None = None
) -> list[Row]:
    """A depthwise convolution's weight [channels, 1, taps] and, if it has one, its bias."""
    path = path or name
    rows = [Row(f"{name}.weight", f"{path}.weight", (channels, 1, taps), "conv")]
    if bias:
        rows.append(Row(f"{name}.bias", f"{path}.bias", (channels,), "same"))
    return rows


def experts(count: int, width: int, d: int, name: str, *, split: bool) -> list[Row]:
    """SwiGLU experts: gate and up [count, 2 width, d] one below the other, down [count, d, width].

    Checkpoints hold the two stacks (`NAME.gate_up_proj`, `NAME.down_proj`) or each expert's
    matrices (`NAME.3.gate_proj.weight`, `up_proj`, `down_proj`). Both are read; `split`: the latter
    are written.
    """
    gate, up, down = (f"{name}.{{}}.{half}_proj.weight" for half in ("gate", "up", "down"))
    gate_up, all_down = f"{name}.gate_up_proj", f"{name}.down_proj"
    return [
        Row(gate_up, gate_up, (count, 2 * width, d), "experts", 1, (gate, up), split),
        Row(all_down, all_down, (count, d, width), "experts", 1, (down,), split),
    ]


def under(prefix: str, rows: Iterable[Row], path: str | None = None) -> list[Row]:
    """The rows of a module: `prefix` is its name in the checkpoint, `path` (default: same) here."""
    path = prefix if path is None else path
    return [
        row._replace(
            name=f"{prefix}.{row.name}",
            path=f"{path}.{row.path}",
            parts=tuple(f"{prefix}.{part}" for part in row.parts),
        )
        for row in rows
    ]


def entries(rows: Iterable[Row]) -> list[Entry]:
    """The rows, each with its place in the checkpoint tensor that it is a block of."""
    rows = list(rows)
    filled: dict[str, int] = {}
    starts = []
    for row in rows:
        starts.append(filled.get(row.name, 0))
        filled[row.name] = starts[-1] + row.shape[0] // row.groups
    return [
        Entry(*row, start=start, stride=filled[row.name])
        for row, start in zip(rows, starts, strict=True)
    ]


def by_tensor(entries: Iterable[Entry]) -> dict[str, list[Entry]]:
    """The entries of each checkpoint tensor, its row blocks in order."""
    out: dict[str, list[Entry]] = {}
    for entry in entries:
        out.setdefault(entry.name, []).append(entry)
    return out


def tensor_shape(blocks: Sequence[Entry]) -> tuple[int, ...]:
    """Shape of the checkpoint tensor made of these row blocks."""
    return (sum(e.shape[0] for e in blocks), *blocks[0].shape[1:])
