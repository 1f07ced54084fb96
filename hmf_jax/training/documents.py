"""Training data: files of texts and chats, row by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jinja2 import TemplateError

from hmf_jax.training.encode import ROLES, EmptyRow, encode_chat, encode_text

COLUMNS = ("messages", "conversations", "text")
# Roles of "conversations" (ShareGPT), and Hugging Face's own.
_ROLES = {"human": "user", "gpt": "assistant", "observation": "tool", **{r: r for r in ROLES}}


class Document(NamedTuple):
    """One row of the source: its tokens, or why it has none.

    Attributes:
      tokens: [N] int32.
      targets: [N] bool, True where a token is to be predicted from those before it.
      bad: None, "empty" or "malformed".
      where: file and line.
      why: what is wrong with a bad row.
    """

    tokens: np.ndarray
    targets: np.ndarray
    bad: str | None
    where: str
    why: str = ""


class Documents:
    """The rows of files or of a dataset as `Document`s, by index. Bad rows do not raise.

    Args:
      source: JSONL (.jsonl) or Parquet (.parquet) files, or an object with `__len__` and
        `__getitem__` that gives rows as dicts (a Hugging Face dataset).
      tokenizer: a fast Hugging Face tokenizer.
      column: the column to train on: a string is a text, a list is a chat of {"role", "content"}
        or {"from", "value"} messages. None = messages, conversations or text, the first that a row
        has. A chat may have the columns "system" and "tools" (for the chat template) beside it.
      template_options: further variables of the chat template.

    Raises:
      FileNotFoundError: there is no such file.
      ImportError: a Parquet file without pyarrow.
      ValueError: a file of another kind, or no rows at all.
    """

    def __init__(
        self,
        source: Any,
        tokenizer: Any,
        column: str | None = None,
        template_options: dict[str, Any] | None = None,
    ) -> None:
        paths = [source] if isinstance(source, str | Path) else source
        if isinstance(paths, list | tuple) and all(isinstance(p, str | Path) for p in paths):
            parts = [_open(Path(p), column) for p in paths]
        else:
            parts = [paths]
        self._parts: list[Any] = parts
        self._ends = np.cumsum([len(part) for part in parts])
        self._tokenizer, self._column = tokenizer, column
        self._options = template_options or {}
        if not len(self):
            raise ValueError(f"no rows in {source}")
        tokenizer("a")  # settles the tokenizer's options before several threads use it

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Document:
        p = int(np.searchsorted(self._ends, index, side="right"))
        part, i = self._parts[p], index - int(self._ends[p - 1] if p else 0)
        file = isinstance(part, _JsonLines | _Parquet)
        where = f"{part.path}:{i + 1}" if file else f"row {i}"
        tokens, targets, bad, why = [], [], None, ""
        # What rows and templates can do wrong: no JSON, no UTF-8, other types, too deeply nested.
        try:
            tokens, targets = self._encode(part[i])
            if not any(targets):
                raise EmptyRow("nothing to predict")
        except (
            ValueError,
            TypeError,
            KeyError,
            AttributeError,
            RecursionError,
            TemplateError,
        ) as e:
            tokens, targets, why = [], [], str(e)
            bad = "empty" if isinstance(e, EmptyRow) else "malformed"
        return Document(np.asarray(tokens, np.int32), np.asarray(targets, bool), bad, where, why)

    def _encode(self, row: Any) -> tuple[list[int], list[bool]]:
        if not isinstance(row, dict):
            raise ValueError(f"a row is an object with columns, not {type(row).__name__}")
        names = COLUMNS if self._column is None else (self._column,)
        name = next((n for n in names if row.get(n) is not None), None)
        if name is None:
            problem = EmptyRow if any(n in row for n in names) else ValueError
            raise problem(f"nothing in column {' or '.join(names)}; there are {', '.join(row)}")
        value = row[name]
        if isinstance(value, str):
            return encode_text(self._tokenizer, value)
        if not isinstance(value, list):
            raise ValueError(f"column {name} holds {type(value).__name__}, no text and no messages")
        # Tables have all keys in every message: None stands for one that is missing.
        messages = [{k: v for k, v in m.items() if v is not None} for m in value]
        if messages and "from" in messages[0]:
            messages = [
                {"role": _ROLES.get(m.get("from", "")), "content": m.get("value")} for m in messages
            ]
        if isinstance(row.get("system"), str) and row["system"]:
            messages.insert(0, {"role": "system", "content": row["system"]})
        return encode_chat(self._tokenizer, messages, row.get("tools"), **self._options)


def _open(path: Path, column: str | None) -> _JsonLines | _Parquet:
    if path.suffix == ".jsonl":
        return _JsonLines(path)
    if path.suffix == ".parquet":
        return _Parquet(path, column)
    raise ValueError(f"{path}: training data are .jsonl or .parquet files")


class _JsonLines:
    """Random access to the lines of a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        starts, size = [np.zeros(1, np.int64)], 0
        with path.open("rb") as file:
            while chunk := file.read(1 << 24):
                starts.append(size + 1 + np.flatnonzero(np.frombuffer(chunk, np.uint8) == 10))
                size += len(chunk)
        self._starts = np.concatenate(starts)
        if self._starts[-1] != size:
            self._starts = np.append(self._starts, size)

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, i: int) -> Any:
        with self.path.open("rb") as file:
            file.seek(self._starts[i])
            line = file.read(self._starts[i + 1] - self._starts[i]).strip()
        if not line:
            raise EmptyRow("blank line")
        return json.loads(line)


class _Parquet:
    """The columns that are used, in memory. For more than that there are datasets on disk."""

    def __init__(self, path: Path, column: str | None) -> None:
        names = COLUMNS if column is None else (column,)
        self.path, wanted = path, {*names, "tools", "system"}
        try:
            import pyarrow.parquet as parquet  # pyright: ignore[reportMissingImports]
        except ImportError as e:
            raise ImportError("Parquet files need pyarrow: pip install pyarrow") from e
        try:
            found = [n for n in parquet.read_schema(path).names if n in wanted]
            self._table = parquet.read_table(path, columns=found)
        except ValueError as e:  # pyarrow's own message does not name the file
            raise ValueError(f"{path} is not a Parquet file: {e}") from e

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, i: int) -> Any:
        return self._table.slice(i, 1).to_pylist()[0]
