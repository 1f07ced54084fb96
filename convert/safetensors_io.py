"""Safetensors checkpoints, one tensor at a time: a single file, or shards with an index.

The format is 8 bytes (little-endian header length), a JSON header with dtype, shape and byte range
of every tensor, then the bytes. Reading and writing it here, not through whole-file calls, keeps
host memory at one tensor, knows bfloat16, and can say exactly what is wrong with a damaged file.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from hmf_jax.convert.reading import inside, listed, parse_json, printable, read_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
# Bits per element of all dtypes of the format; those of DTYPES are the ones that can be loaded.
_BITS = {"BOOL": 8, "I8": 8, "U8": 8, "I16": 16, "U16": 16, "I32": 32, "U32": 32, "I64": 64}
_BITS |= {"U64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8, "F8_E4M3": 8, "F8_E5M2": 8}
_BITS |= {"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "C64": 64} | {
    name: 8 * dtype.itemsize for name, dtype in DTYPES.items()
}
_HEADER_LIMIT = 100_000_000  # bytes, as in the safetensors library
_HEADER_MARKS = 5_000_000  # brackets and commas: enough for 500,000 tensors, read in 1 GB
_INDEX_LIMIT, _MAX_FILES = 1 << 25, 10_000


def dtype_name(dtype: Any) -> str:
    """The safetensors name of a floating dtype ("BF16", "F16", "F32", "F64")."""
    dtype = np.dtype(dtype)
    for name, known in DTYPES.items():
        if known == dtype:
            return name
    raise ValueError(f"dtype {dtype} is not supported; use bfloat16, float16, float32 or float64")


def common_dtype(dtypes: Iterable[np.dtype]) -> np.dtype:
    """The narrowest dtype that holds numbers of all of these exactly."""
    found = set(dtypes)
    if len(found) == 1:
        return found.pop()
    return max(found | {DTYPES["F32"]}, key=lambda dtype: dtype.itemsize)


@dataclasses.dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `nbytes` bytes from `offset` in `file`."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read_header(file: Path) -> dict[str, TensorInfo]:
    """The tensors of one file, whose bytes must cover the file without gaps or overlap.

    Raises ValueError, one line that names the file, for anything that is not so.
    """
    size = file.stat().st_size
    with file.open("rb") as f:
        begin = f.read(8)
        if begin == b"version ":
            raise ValueError(
                f"{file} is a git-lfs pointer, not the file itself: run `git lfs pull` in the "
                "repository it comes from"
            )
        length = int.from_bytes(begin, "little")
        if size < 8 or 8 + length > size:
            raise ValueError(
                f"{file} is truncated or not a safetensors file (its header does not fit into "
                f"{size} bytes); download it again"
            )
        if length > _HEADER_LIMIT:
            raise ValueError(f"{file} has a header of {length:,} bytes; {_HEADER_LIMIT:,} may be")
        raw = f.read(length)
    if sum(raw.count(mark) for mark in (b"{", b"[", b",")) > _HEADER_MARKS:
        raise ValueError(f"{file} has a header of far too many entries")
    if raw[:1] != b"{":
        raise ValueError(f"{file} has no valid safetensors header; download it again")
    header = parse_json(raw, f"{file} has no valid safetensors header: it")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{file}: __metadata__ must be an object of strings")
    tensors = {name: _tensor_info(file, name, entry) for name, entry in header.items()}
    _check_coverage(file, tensors, size - 8 - length)
    shift = 8 + length
    return {n: dataclasses.replace(t, offset=t.offset + shift) for n, t in tensors.items()}


def _tensor_info(file: Path, name: str, entry: Any) -> TensorInfo:
    """One entry of a header, its offset still that within the data."""
    where = f"{file}: {printable(name)}"
    if not isinstance(entry, dict):
        raise ValueError(f"{where} must be a JSON object")
    values: list[Any] = [entry.get(key) for key in ("dtype", "shape", "data_offsets")]
    dtype, shape, ends = values
    if dtype not in list(_BITS):
        raise ValueError(f"{where} has the unknown dtype {printable(dtype)}")
    if not _are_sizes(shape):
        raise ValueError(f"{where} has the shape {printable(shape)}, must be a list of integers")
    if not _are_sizes(ends) or len(ends) != 2 or ends[0] > ends[1]:
        raise ValueError(f"{where} has data_offsets {printable(ends)}, must be [begin, end]")
    nbytes = ends[1] - ends[0]
    if 8 * nbytes != math.prod(shape) * _BITS[dtype]:
        raise ValueError(f"{where} has {nbytes} bytes, not {dtype}{printable(shape)}")
    return TensorInfo(file, dtype, tuple(shape), ends[0], nbytes)


def _are_sizes(values: Any) -> bool:
    return (
        isinstance(values, list)
        and len(values) <= 32
        and all(type(n) is int and 0 <= n < 1 << 63 for n in values)
    )


def _check_coverage(file: Path, tensors: Mapping[str, TensorInfo], size: int) -> None:
    """Raises ValueError unless the tensors lie one after the other and fill `size` bytes."""
    end, before = 0, ""
    for name, t in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if t.offset < end:
            raise ValueError(
                f"{file}: {printable(before)} and {printable(name)} share bytes; download it again"
            )
        if t.offset > end:
            raise ValueError(
                f"{file}: {t.offset - end:,} bytes before {printable(name)} belong to no tensor; "
                "download it again"
            )
        end, before = t.offset + t.nbytes, name
    if end > size:
        raise ValueError(
            f"{file} is truncated: it should have {end - size:,} bytes more; download it again"
        )
    if end < size:
        raise ValueError(
            f"{file}: the last {size - end:,} bytes belong to no tensor; download it again"
        )


def _files(directory: Path) -> tuple[list[Path], dict[str, str]]:
    """Weight files of a model directory, and the index (tensor name -> file name), if any."""
    single, index_file = os.path.lexists(directory / SINGLE), directory / INDEX
    index = _read_index(index_file) if index_file.is_file() else {}
    if index:
        names = sorted(set(index.values()))
        if single and SINGLE not in names:
            raise ValueError(
                f"{directory} holds both {SINGLE} and {INDEX}: remove the one that is old"
            )
    elif single:
        names = [SINGLE]
    else:
        names = sorted(p.name for p in directory.glob("model*.safetensors"))
        counts = {re.sub(r"^.*-of-(\d+)\.safetensors$|.*", r"\1", n) for n in names}
        if len(counts) > 1:
            raise ValueError(
                f"{directory} holds weight files that do not belong together and no {INDEX}: "
                f"{printable(', '.join(names))}"
            )
        total = int(counts.pop() or len(names)) if counts else 0
        if len(names) != total:
            raise FileNotFoundError(
                f"{directory} has {len(names)} of {total} weight files; download the rest"
            )
    missing = [printable(n) for n in names if not (directory / n).is_file()]
    if missing or not names:
        raise FileNotFoundError(_missing(directory, missing))
    return [inside(directory, name) for name in names], index


def _read_index(file: Path) -> dict[str, str]:
    """The weight_map of an index."""
    index = read_json(file, limit=_INDEX_LIMIT).get("weight_map")
    if (
        not isinstance(index, dict)
        or not index
        or not all(isinstance(name, str) and name for name in index.values())
    ):
        raise ValueError(
            f"{file} is not a valid index (weight_map must say the file of each tensor); download "
            "it again"
        )
    if len(names := set(index.values())) > _MAX_FILES:
        raise ValueError(f"{file} names {len(names):,} weight files; {_MAX_FILES:,} may be")
    for name in names:
        inside(file.parent, name)
    return index


def _missing(directory: Path, files: list[str]) -> str:
    """What to do about weights that are not there."""
    if files:
        more = f" and {len(files) - 5} more" if len(files) > 5 else ""
        return f"{directory} lacks {', '.join(files[:5])}{more}; download the missing weights"
    found = {p.suffix for p in directory.iterdir()}
    what = f"{directory} lacks model*.safetensors files"
    if ".gguf" in found:
        return f"{what}; of a GGUF file, `hmf-jax convert FILE.gguf DIR` makes a model"
    if found & {".bin", ".pth", ".pt", ".ckpt", ".msgpack", ".h5"}:
        return (
            f"{what}: pickled .bin and other files are not read; convert them to safetensors (in "
            "transformers: save_pretrained)"
        )
    return f"{what}; download the missing weights"


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
        self._found = {file: _identity(file.stat()) for file in files}
        twice: list[str] = []
        for file in files:
            header = read_header(file)
            twice += sorted(header.keys() & self.tensors.keys())
            self.tensors |= header
        if twice:
            raise ValueError(f"{path}: stored in more than one shard: {listed(twice)}")
        misplaced = [
            name
            for name, file in index.items()
            if name not in self.tensors or self.tensors[name].file != path / file
        ]
        if misplaced:
            raise ValueError(f"{path}: not in the shard the index names: {listed(misplaced)}")

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
        out = aligned(shape, dtype)
        self._read_into(out, name, offset)
        return out

    def read_into(self, out: np.ndarray, name: str) -> None:
        """`read` of a whole tensor into memory of its shape, without gaps; any dtype."""
        info = self.tensors[name]
        if out.dtype != DTYPES[info.dtype]:
            out[...] = self.read(name)
            return
        self._read_into(out, name, info.offset)

    def _read_into(self, out: np.ndarray, name: str, offset: int) -> None:
        info, count = self.tensors[name], out.nbytes
        data = out.reshape(-1).view(np.uint8)
        with info.file.open("rb", buffering=0) as f:
            if _identity(os.fstat(f.fileno())) != self._found[info.file]:
                raise ValueError(f"{info.file} was replaced while it was read; load it again")
            f.seek(offset)
            done = 0
            while done < count:
                if not (got := f.readinto(memoryview(data)[done:])):
                    raise ValueError(f"{info.file} ended inside {name}; download it again")
                done += got

    def dtypes(self) -> dict[str, str]:
        """Name -> stored dtype ("BF16", "F32", ...)."""
        return {name: t.dtype for name, t in self.tensors.items()}


def aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory that JAX's CPU backend uses in place instead of copying it."""
    count = math.prod(shape) * dtype.itemsize
    memory = np.empty(count + 64, np.uint8)
    begin = -memory.ctypes.data % 64
    return memory[begin : begin + count].view(dtype).reshape(shape)


def _identity(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


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
    text = str(size) if isinstance(size, int | str) else ""
    pattern = r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([KMGT]?)(i?)B?\s*"
    match = re.fullmatch(pattern, text, re.IGNORECASE)
    base = 1024 if match and match[3] else 1000
    found = match and int(float(match[1]) * base ** " KMGT".index(match[2].upper() or " "))
    if not found:
        raise ValueError(
            f"max_shard_size {printable(repr(size))} is not a size; write e.g. '5GB' or '500MiB'"
        )
    return found


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
