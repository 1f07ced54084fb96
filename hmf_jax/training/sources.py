"""Where the rows of training data come from: files, directories, datasets, in-memory lists.

A file of any size is read row by row; the limits here keep one hostile file from taking all memory.
"""

from __future__ import annotations

import glob
import gzip
import itertools
import os
import tempfile
import zlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from hmf_jax.convert.directories import printable
from hmf_jax.training.formats import EmptyRow, parse_json

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
MAX_ROW_BYTES = 1 << 22  # of one row; tokenizers need some 200 times as much
_MAX_LIST_BYTES = 1 << 28  # of a .json list, which is held in memory
_UNPACKED_RATIO = 200  # unpacked bytes per packed one; JSON has 5 to 20
_FREE = 1 << 26  # bytes that may be unpacked whatever the ratio
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


class Rows(Protocol):
    """Rows by number. `rows[i]` raises ValueError or `EmptyRow` for what is no row."""

    name: str

    def __len__(self) -> int: ...
    def __getitem__(self, i: int) -> Any: ...
    def where(self, i: int) -> str:
        """The file and line of a row, in words."""
        ...


def is_stream(source: Any) -> bool:
    """Whether rows can only be read one after another: an iterable dataset, a generator."""
    return not isinstance(source, str | Path | Sequence | Mapping) and not (
        hasattr(source, "__len__") and hasattr(source, "__getitem__")
    )


def open_rows(
    source: Any, max_row_bytes: int = MAX_ROW_BYTES, columns: Collection[str] = ()
) -> list[Rows]:
    """The rows of a source, file by file.

    Args:
      source: a file (`SUFFIXES`), a directory of such files, a pattern such as "data/*.jsonl", a
        list of these, or an object that gives rows by number.
      max_row_bytes: the longest line of a file.
      columns: those of a Parquet file that are read; the others are not held in memory.

    Raises:
      FileNotFoundError: no such file; a pattern or directory without files.
      ImportError: a Parquet file without pyarrow.
      ValueError: another kind of file or object, or a damaged file.
    """
    if isinstance(source, Mapping):
        raise ValueError(f"this is a dict of splits ({', '.join(map(str, source))}): pass one")
    if is_stream(source):
        raise ValueError(f"{type(source).__name__} gives no rows by number: `Batches` streams it")
    paths = [source] if isinstance(source, str | Path) else source
    if not isinstance(paths, list | tuple) or not paths:
        return [_Given(source)]
    if not any(isinstance(p, str | Path) for p in paths):
        return [_Given(source)]
    if not all(isinstance(p, str | Path) for p in paths):
        raise ValueError("a source is a list of files or a list of rows, not of both")
    return [_open(path, max_row_bytes, columns) for p in paths for path in files_of(p)]


def files_of(source: str | Path) -> Iterator[Path]:
    """The files that a file, a directory or a pattern stands for; errors as in `open_rows`."""
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            raise ValueError(
                f"{path} was written by save_to_disk: pass datasets.load_from_disk({str(path)!r})"
            )
        found = sorted(p for p in path.iterdir() if _is_data(p) and p.is_file())
        if not found:
            raise FileNotFoundError(f"{path} holds no {', '.join(SUFFIXES)} files")
        yield from found
    elif not path.exists() and glob.has_magic(str(path)):
        matches = (Path(p) for p in glob.glob(str(path), recursive=True))
        found = sorted(p for p in matches if p.is_file())
        if not found:
            raise FileNotFoundError(f"{path} matches no file")
        yield from found
    else:
        yield path


def _is_data(path: Path) -> bool:
    return path.name.endswith(SUFFIXES) and not path.name.startswith(".")


def _open(path: Path, max_row_bytes: int, columns: Collection[str]) -> Rows:
    if not path.name.endswith(SUFFIXES):
        raise ValueError(f"{path}: training data are {', '.join(SUFFIXES)} files")
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file; give a file, a directory or a pattern")
    if path.suffix == ".parquet":
        return _Parquet(path, columns)
    content = _Content(path)
    if path.name.endswith((".json", ".json.gz")) and content.begins_list():
        return _JsonList(content)
    return _JsonLines(content, max_row_bytes)


class _Content:
    """The bytes of a file, unpacked into a temporary file if it is gzipped."""

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, printable(path, 1000)
        self._unpacked = _unpack(path) if path.suffix == ".gz" else None
        self.size = self._unpacked.tell() if self._unpacked else path.stat().st_size
        if self.read(0, 2) in _UTF16:
            raise ValueError(f"{self.name} is UTF-16: convert it to UTF-8")

    def read(self, start: int, size: int) -> bytes:
        """Safe against other threads."""
        if self._unpacked is not None:
            return os.pread(self._unpacked.fileno(), size, start)
        with self.path.open("rb") as file:
            file.seek(start)
            return file.read(size)

    def begins_list(self) -> bool:
        return self.read(0, 1 << 16).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _unpack(path: Path) -> Any:
    limit = max(_FREE, _UNPACKED_RATIO * path.stat().st_size)
    file = tempfile.TemporaryFile()
    try:
        with gzip.open(path) as packed:
            while chunk := packed.read(1 << 20):
                if file.tell() + len(chunk) > limit:
                    raise ValueError(
                        f"{path} unpacks to more than {_UNPACKED_RATIO} times its size; unpack it "
                        "yourself if that is right"
                    )
                file.write(chunk)
        file.flush()
    except (EOFError, gzip.BadGzipFile, zlib.error) as e:
        file.close()
        raise ValueError(f"{path} is damaged or not gzipped: {e}") from None
    except BaseException:
        file.close()
        raise
    return file


class _JsonLines:
    """Random access to the lines of a file."""

    def __init__(self, content: _Content, max_row_bytes: int) -> None:
        self.name, self._content, self._limit = content.name, content, max_row_bytes
        starts, at = [np.zeros(1, np.int64)], 0
        while chunk := content.read(at, 1 << 24):
            starts.append(at + 1 + np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10))
            at += len(chunk)
        self._starts = np.concatenate(starts)
        if self._starts[-1] != at:
            self._starts = np.append(self._starts, at)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def where(self, i: int) -> str:
        return f"{self.name}:{i + 1}"

    def __getitem__(self, i: int) -> Any:
        start, size = int(self._starts[i]), int(self._starts[i + 1] - self._starts[i])
        if size > self._limit:
            raise ValueError(
                f"too long: {size:,} bytes, max_row_bytes is {self._limit:,}; split the document"
            )
        line = self._content.read(start, size)
        line = (line.removeprefix(b"\xef\xbb\xbf") if i == 0 else line).strip()
        if not line:
            raise EmptyRow("blank line")
        return parse_json(_decode(line))


class _JsonList:
    """The rows of a file that holds one list."""

    def __init__(self, content: _Content) -> None:
        self.name = content.name
        if content.size > _MAX_LIST_BYTES:
            raise ValueError(
                f"{self.name} is too large for one JSON list ({content.size:,} bytes); write "
                "its rows as lines: jq -c '.[]' data.json > data.jsonl"
            )
        text = _decode(content.read(0, content.size).removeprefix(b"\xef\xbb\xbf"), self.name)
        self._rows = parse_json(text, self.name)

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, i: int) -> str:
        return f"{self.name}, row {i + 1}"

    def __getitem__(self, i: int) -> Any:
        return self._rows[i]


class _Parquet:
    """The rows of a table, in memory. For more than that there are datasets on disk."""

    def __init__(self, path: Path, columns: Collection[str]) -> None:
        self.name = printable(path, 1000)
        try:
            import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]
        except ImportError as e:
            raise ImportError("Parquet files need pyarrow: pip install pyarrow") from e
        limit, held = max(_FREE, _UNPACKED_RATIO * path.stat().st_size), 0
        self._parts: list[Any] = []
        try:
            # A few rows at a time: a small file may stand for a table larger than the memory.
            with parquet.ParquetFile(path) as file:
                names = file.schema_arrow.names
                self.unread = [n for n in names if n not in columns]
                read = [n for n in names if n in columns]
                for part in file.iter_batches(batch_size=256, columns=read):
                    held += part.nbytes
                    if held > limit:
                        raise OverflowError
                    self._parts.append(part)
        except OverflowError:
            raise ValueError(
                f"{self.name} unpacks to more than {_UNPACKED_RATIO} times its size; write it as "
                "JSON lines if that is right"
            ) from None
        except (ValueError, OSError) as e:  # pyarrow's own message does not name the file
            raise ValueError(
                f"{self.name} is not a Parquet file: {' '.join(str(e).split())}"
            ) from None
        self._ends = np.cumsum([part.num_rows for part in self._parts], dtype=np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def where(self, i: int) -> str:
        return f"{self.name}:{i + 1}"

    def __getitem__(self, i: int) -> Any:
        p = int(np.searchsorted(self._ends, i, side="right"))
        part = self._parts[p]
        first = int(self._ends[p]) - part.num_rows
        return without_nulls(part.slice(i - first, 1).to_pylist()[0])


class _Given:
    """Rows of an object with `__len__` and `__getitem__`: a list, a Hugging Face dataset."""

    def __init__(self, source: Any) -> None:
        self.name, self._source = type(source).__name__, source
        self._table = hasattr(source, "features")
        if len(source):
            try:
                source[0]
            except Exception as e:
                raise ValueError(
                    f"{self.name} gives no rows by number ({type(e).__name__}): pass a list of "
                    "dicts or a Hugging Face dataset"
                ) from e

    def __len__(self) -> int:
        return len(self._source)

    def where(self, i: int) -> str:
        return f"row {i}"

    def __getitem__(self, i: int) -> Any:
        row = self._source[i]
        return without_nulls(row) if self._table else row


def without_nulls(value: Any) -> Any:
    """A row of a table without the keys that only other rows have, at any depth."""
    if isinstance(value, Mapping):
        # The columns themselves stay, so that a null one is not taken for an unknown one.
        return {k: _pruned(v) for k, v in value.items()}
    return value


def _pruned(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _pruned(v) for k, v in value.items() if v is not None}
    return [_pruned(v) for v in value] if isinstance(value, list) else value


def shuffled(rows: Iterable[Any], seed: tuple[int, ...], size: int = 1000) -> Iterator[Any]:
    """The rows in another order: each is drawn from the next `size` that are left."""
    rng, rows = np.random.default_rng(seed), iter(rows)
    kept = list(itertools.islice(rows, size))
    for row in rows:
        i = rng.integers(len(kept))
        kept[i], row = row, kept[i]
        yield row
    yield from (kept[i] for i in rng.permutation(len(kept)))


def _decode(raw: bytes, name: str = "") -> str:
    try:
        return raw.decode()
    except UnicodeDecodeError as e:
        name = f"{name}: " if name else ""
        raise ValueError(f"{name}no UTF-8: byte {raw[e.start]:#04x} at {e.start}") from None
