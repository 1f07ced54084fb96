"""GGUF files (of llama.cpp): keys and values, and tensors that may be quantised, row by row.

The format is a header (keys with typed values; name, shape, type and place of every tensor), then
the bytes. Reading the header here takes a second where the `gguf` package needs ten, and a damaged
or hostile file is one clear error; what the package does is to undo the quantisation.
"""

from __future__ import annotations

import dataclasses
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from hmf_jax.convert.reading import printable

MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_ALIGNMENT = 32
# Numbers by the format's type: how `struct` reads one.
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q"}
_NUMBERS |= {12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_KEYS, _MOST_TENSORS, _MOST_ITEMS, _LONGEST = 1 << 16, 1 << 18, 1 << 22, 1 << 24
_WIDEST = 1 << 40  # elements of a tensor
_SLAB = 1 << 22  # elements that are made float32 at a time


@dataclasses.dataclass(frozen=True)
class GGUFTensor:
    """A tensor: its shape, rows first, the name of its type ("F32", "Q8_0"), and its bytes."""

    shape: tuple[int, ...]
    type: str
    offset: int
    nbytes: int


class GGUF:
    """A GGUF file.

    Attributes:
      file: its path.
      values: key -> value, of numbers, bools, texts, and lists of one of these.
      tensors: name -> `GGUFTensor`.

    Raises:
      ImportError: the package `gguf` is not installed.
      FileNotFoundError: there is no such file.
      ValueError: one line that names the file: another format or version, truncated, contradictory.
    """

    def __init__(self, file: str | Path):
        self.file = Path(file)
        _package()
        if not self.file.is_file():
            raise FileNotFoundError(f"{self.file} is not a file")
        with self.file.open("rb") as f:
            header = _Header(self.file, f)
            self.values, self.tensors = header.values, header.tensors

    def read(self, name: str, dtype: np.dtype) -> np.ndarray:
        """A tensor, its quantisation undone in float32 and then rounded to `dtype`.

        Raises ValueError if it is damaged, or holds NaN, infinity or numbers that `dtype` does not
        have.
        """
        t = self.tensors[name]
        width = t.shape[-1]
        out = np.empty((math.prod(t.shape[:-1]), width), dtype)
        row = t.nbytes // max(1, len(out))
        step = max(1, _SLAB // width)
        with self.file.open("rb") as f:
            f.seek(t.offset)
            for start in range(0, len(out), step):
                rows = min(step, len(out) - start)
                raw = f.read(rows * row)
                if len(raw) < rows * row:
                    raise ValueError(f"{self.file} ended inside {printable(name)}")
                with np.errstate(all="ignore"):
                    values = self._dequantized(name, np.frombuffer(raw, np.uint8).reshape(rows, -1))
                    out[start : start + rows] = values.reshape(rows, width)
                if not np.isfinite(out[start : start + rows]).all():
                    raise ValueError(f"{self.file}: {printable(name)} holds NaN or infinity")
        return out.reshape(t.shape)

    def _dequantized(self, name: str, raw: np.ndarray) -> np.ndarray:
        constants, quants = _package()
        kind = constants.GGMLQuantizationType[self.tensors[name].type]
        try:
            return quants.dequantize(raw, kind)
        except NotImplementedError:
            raise ValueError(
                f"{self.file}: {printable(name)} is of type {kind.name}, which is not read"
            ) from None


def _package() -> tuple[Any, Any]:
    """The modules `constants` and `quants` of the package `gguf`."""
    try:
        from gguf import constants, quants
    except ImportError as e:
        raise ImportError('reading GGUF files needs gguf: pip install "hmf-jax[gguf]"') from e
    return constants, quants


class _Header:
    """Reads the header of a file, never more of it than there is."""

    def __init__(self, file: Path, f: BinaryIO):
        self.file, self.f = file, f
        self.left = file.stat().st_size
        begin = self.take(4)
        if begin != MAGIC:
            raise ValueError(f"{file} is not a GGUF file (it begins with {printable(begin)})")
        version = self.number("I")
        if version not in _VERSIONS:
            big = " (or big-endian)" if version & 0xFFFF == 0 else ""
            raise ValueError(f"{file} is of GGUF version {version}{big}; 2 and 3 are read")
        count, keys = self.number("Q"), self.number("Q")
        if count > _MOST_TENSORS or keys > _MOST_KEYS:
            raise ValueError(f"{file} is damaged: {count:,} tensors and {keys:,} keys")
        self.values: dict[str, Any] = {}
        for _ in range(keys):
            name = self.text()
            if name in self.values:
                raise ValueError(f"{file}: the key {printable(name)} is there twice")
            self.values[name] = self.value(self.number("I"), name)
        found = list(self.infos(count))
        alignment = self.values.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= 1 << 20:
            raise ValueError(f"{file}: general.alignment is {printable(alignment)}")
        size = file.stat().st_size
        begins = size - self.left
        begins += -begins % alignment
        self.tensors = {n: dataclasses.replace(t, offset=t.offset + begins) for n, t in found}
        if len(self.tensors) < count:
            raise ValueError(f"{file}: two tensors have the same name")
        self.check_places(size)

    def take(self, count: int) -> bytes:
        if count > self.left or len(raw := self.f.read(count)) < count:
            raise ValueError(
                f"{self.file} is truncated or damaged: its header goes beyond its end; download "
                "it again"
            )
        self.left -= count
        return raw

    def number(self, kind: str) -> Any:
        return struct.unpack(f"<{kind}", self.take(struct.calcsize(kind)))[0]

    def text(self) -> str:
        if (length := self.number("Q")) > _LONGEST:
            raise ValueError(f"{self.file} is damaged: it holds a text of {length:,} bytes")
        try:
            return self.take(length).decode()
        except UnicodeDecodeError:
            raise ValueError(f"{self.file} is damaged: it holds a text that is not UTF-8") from None

    def value(self, kind: int, name: str) -> Any:
        if kind == _STRING:
            return self.text()
        if kind in _NUMBERS:
            return self.number(_NUMBERS[kind])
        if kind != _ARRAY:
            raise ValueError(f"{self.file}: {printable(name)} is of the unknown type {kind}")
        inner, count = self.number("I"), self.number("Q")
        if count > _MOST_ITEMS:
            raise ValueError(f"{self.file}: {printable(name)} has {count:,} items")
        if inner == _STRING:
            return [self.text() for _ in range(count)]
        if inner not in _NUMBERS:
            raise ValueError(f"{self.file}: {printable(name)} is a list of the type {inner}")
        item = _NUMBERS[inner]
        return list(struct.unpack(f"<{count}{item}", self.take(count * struct.calcsize(item))))

    def infos(self, count: int) -> Iterator[tuple[str, GGUFTensor]]:
        """Name and place of each tensor, counted from where the bytes begin."""
        constants, _ = _package()
        sizes = {int(kind): (kind.name, *n) for kind, n in constants.GGML_QUANT_SIZES.items()}
        for _ in range(count):
            where = f"{self.file}: {printable(name := self.text())}"
            if (dims := self.number("I")) > 4:
                raise ValueError(f"{where} has {dims} dimensions")
            shape = tuple(self.number("Q") for _ in range(dims))[::-1] or (1,)
            kind, offset = self.number("I"), self.number("Q")
            if kind not in sizes:
                raise ValueError(f"{where} is of the unknown type {kind}; a newer gguf may know it")
            type_name, block, nbytes = sizes[kind]
            if not 0 < math.prod(shape) <= _WIDEST or shape[-1] % block:
                raise ValueError(f"{where} has the shape {list(shape)}, of the type {type_name}")
            yield name, GGUFTensor(shape, type_name, offset, math.prod(shape) // block * nbytes)

    def check_places(self, size: int) -> None:
        end, before = 0, ""
        for name, t in sorted(self.tensors.items(), key=lambda item: item[1].offset):
            if t.offset < end:
                raise ValueError(
                    f"{self.file}: {printable(before)} and {printable(name)} share bytes; download "
                    "it again"
                )
            end, before = t.offset + t.nbytes, name
        if end > size:
            raise ValueError(
                f"{self.file} is truncated: it should have {end - size:,} bytes more; download it "
                "again"
            )
