"""Safetensors checkpoints, one tensor at a time: a single file, or shards with an index.

The format is 8 bytes (little-endian header length), a JSON header with dtype, shape and byte range
of every tensor, then the bytes. Reading and writing it here, not through whole-file calls, keeps
host memory at one tensor, knows bfloat16, and can say exactly what is wrong with a damaged file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
_SIZES = {"F8_E4M3": 1, "F8_E5M2": 1, "BOOL": 1, "I8": 1, "U8": 1, "I16": 2, "U16": 2}
_SIZES |= {"I32": 4, "U32": 4, "I64": 8, "U64": 8} | {k: v.itemsize for k, v in DTYPES.items()}


def dtype_name(dtype: Any) -> str:
    """The safetensors name of a floating dtype ("BF16", "F16", "F32", "F64")."""
    dtype = np.dtype(dtype)
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    raise ValueError(f"dtype {dtype} is not supported; use bfloat16, float16, float32 or float64")


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `nbytes` bytes from `offset` in `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one file; ValueError if the file is truncated or not safetensors."""
    size = file.stat().st_size
    with file.open("rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or 8 + length > size:
            raise ValueError(
                f"{file} is truncated or not a safetensors file (its header does not fit into "
                f"{size} bytes); download it again"
            )
        try:
            header = json.loads(f.read(length))
            header.pop("__metadata__", None)
            tensors = {
                name: TensorInfo(
                    file,
                    entry["dtype"],
                    tuple(entry["shape"]),
                    8 + length + entry["data_offsets"][0],
                    entry["data_offsets"][1] - entry["data_offsets"][0],
                )
                for name, entry in header.items()
            }
        except (ValueError, LookupError, TypeError, AttributeError) as e:
            raise ValueError(f"{file} has no valid safetensors header; download it again") from e
    end = max((t.offset + t.nbytes for t in tensors.values()), default=8 + length)
    if end > size:
        raise ValueError(
            f"{file} is truncated: it should have {end:,} bytes and has {size:,}; download it again"
        )
    for name, t in tensors.items():
        if t.dtype in _SIZES and t.nbytes != math.prod(t.shape) * _SIZES[t.dtype]:
            raise ValueError(f"{file}: {name} has {t.nbytes} bytes, not {t.dtype}{list(t.shape)}")
    return tensors


def _files(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """Weight files of a model directory, and the index (tensor name -> file name), if any."""
    if (directory / SINGLE).is_file():
        return [directory / SINGLE], {}
    if (directory / INDEX).is_file():
        try:
            index = dict(json.loads((directory / INDEX).read_text())["weight_map"])
        except (ValueError, LookupError, TypeError) as e:
            raise ValueError(f"{directory / INDEX} is not a valid index; download it again") from e
        names = sorted(set(index.values()))
    else:
        index, names = {}, sorted(p.name for p in directory.glob("model*.safetensors"))
        counts = [re.search(r"-of-(\d+)\.safetensors$", n) for n in names]
        total = int(counts[0][1]) if counts and counts[0] else len(names)
        if len(names) != total:
            raise FileNotFoundError(
                f"{directory} has {len(names)} of {total} weight files; download the rest"
            )
    missing = [n for n in names if not (directory / n).is_file()]
    if missing or not names:
        what = ", ".join(missing) if missing else "model*.safetensors files"
        raise FileNotFoundError(
            f"{directory} lacks {what}; download the missing weights (pickled .bin files are not "
            "read: convert them to safetensors)"
        )
    return [directory / n for n in names], index


class Checkpoint:
    """The tensors of a model directory, or of one safetensors file.

    Attributes:
      tensors: name -> `TensorInfo`.

    Raises FileNotFoundError for missing files and ValueError for damaged or contradictory ones.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        files, index = ([path], {}) if path.is_file() else _files(path)
        self.tensors: dict[str, TensorInfo] = {}
        twice, misplaced = [], []
        for file in files:
            header = read_header(file)
            twice += sorted(set(header) & set(self.tensors))
            misplaced += [n for n, f in index.items() if f == file.name and n not in header]
            self.tensors |= header
        if twice:
            raise ValueError(f"{path}: stored in more than one shard: {', '.join(twice)}")
        if misplaced:
            raise ValueError(f"{path}: not in the shard the index names: {', '.join(misplaced)}")

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows start:stop of a floating tensor, in its stored dtype; the caller owns the memory.

        Reads with its own file handle, so threads may call it at the same time.
        """
        info = self.tensors[name]
        dtype = DTYPES[info.dtype]
        shape, offset = info.shape, info.offset
        if shape:
            stop = shape[0] if stop is None else min(stop, shape[0])
            shape = (stop - start, *shape[1:])
            offset += start * math.prod(shape[1:]) * dtype.itemsize
        count = math.prod(shape) * dtype.itemsize
        # Aligned memory: JAX's CPU backend then uses it in place instead of copying it.
        memory = np.empty(count + 64, np.uint8)
        begin = -memory.ctypes.data % 64
        data = memory[begin : begin + count]
        with info.file.open("rb", buffering=0) as f:
            f.seek(offset)
            done = 0
            while done < count:
                if not (got := f.readinto(memoryview(data)[done:])):
                    raise ValueError(f"{info.file} ended inside {name}; download it again")
                done += got
        return data.view(dtype).reshape(shape)

    def dtypes(self) -> dict[str, str]:
        """Name -> stored dtype ("BF16", "F32", ...)."""
        return {name: t.dtype for name, t in self.tensors.items()}


@dataclasses.dataclass(frozen=True)
class Pending:
    """A tensor to be written; `make()` returns it when its turn comes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def parse_size(size: int | str) -> int:
    """Bytes of "5GB", "500MB" (powers of 1000), "2GiB" (powers of 1024), or of a number."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?\s*", str(size), re.IGNORECASE)
    if match is None or not float(match[1]) > 0:
        raise ValueError(f"max_shard_size {size!r} is not a size; write e.g. '5GB' or '500MiB'")
    base = 1024 if match[3] else 1000
    return int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))


def plan_shards(tensors: Sequence[Pending], max_shard_size: int | str) -> list[list[Pending]]:
    """Cuts the tensors, in order, into files of at most this size (one tensor at least)."""
    limit = parse_size(max_shard_size)
    shards: list[list[Pending]] = [[]]
    filled = 0
    for t in tensors:
        if shards[-1] and filled + t.nbytes > limit:
            shards.append([])
            filled = 0
        shards[-1].append(t)
        filled += t.nbytes
    return shards


def write(
    directory: Path,
    tensors: Sequence[Pending],
    max_shard_size: int | str = "5GB",
    done: Callable[[int], object] = lambda nbytes: None,
) -> None:
    """Writes model.safetensors, or shards and their index, one tensor in memory at a time.

    `done` is called with the size in bytes of each tensor written.
    """
    shards = plan_shards(tensors, max_shard_size)
    index: dict[str, str] = {}
    for i, shard in enumerate(shards):
        many = len(shards) > 1
        name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" if many else SINGLE
        index |= {t.name: name for t in shard}
        _write_file(directory / name, shard, done)
    if len(shards) > 1:
        total = sum(t.nbytes for t in tensors)
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (directory / INDEX).write_text(text + "\n")


def _write_file(file: Path, tensors: Sequence[Pending], done: Callable[[int], object]) -> None:
    # Wide elements first: every tensor then starts at a multiple of its element size.
    tensors = sorted(tensors, key=lambda t: -DTYPES[t.dtype].itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for t in tensors:
        ends = [offset, offset := offset + t.nbytes]
        header[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": ends}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        for t in tensors:
            array = t.make()
            if array.shape != t.shape or array.dtype != DTYPES[t.dtype]:
                raise ValueError(f"{t.name}: made {array.dtype}{array.shape}, planned {t}")
            f.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
            done(t.nbytes)
