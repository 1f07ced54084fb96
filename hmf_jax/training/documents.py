"""Training data: files of texts and chats, row by row, as tokens and targets."""

from __future__ import annotations

import collections
import contextlib
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jinja2 import TemplateError

from hmf_jax.options import check_int
from hmf_jax.text.template import render
from hmf_jax.training.encode import encode_chat, encode_completion, encode_text
from hmf_jax.training.formats import (
    COLUMNS,
    FORMATS,
    EmptyRow,
    Example,
    RefusedRow,
    format_of,
    read_row,
    unused,
)
from hmf_jax.training.sources import (
    MAX_ROW_BYTES,
    Rows,
    open_rows,
    shuffled,
    without_nulls,
)

_LOOK_SECONDS = 2.0
Column = str | Mapping[str, str] | None
# What rows and templates can do wrong: no JSON, no UTF-8, other types, too deeply nested.
_WRONG = (ValueError, TypeError, LookupError, AttributeError, RecursionError, TemplateError)


class Document(NamedTuple):
    """One row of the source: its tokens, or why it has none.

    Attributes:
      tokens: [N] int32.
      targets: [N] bool, True where a token is to be predicted from those before it.
      bad: None, "empty", "malformed", or "refused": a row that shows that the data are of another
        kind than its file's first row, or of one that is not trained here.
      where: file and line.
      why: what is wrong with a bad row; the reason, then ": " and details.
    """

    tokens: np.ndarray
    targets: np.ndarray
    bad: str | None
    where: str
    why: str = ""


class Documents:
    """The rows of files or of a dataset as `Document`s, by index. Bad rows do not raise.

    The format of a file is that of its first row; a row of another one is "refused".

    Args:
      source: a file (.jsonl, .json, both also .gz, .parquet), a directory of such files, a pattern
        ("data/*.jsonl"), a list of these, or an object with `__len__` and `__getitem__` that gives
        rows as dicts (a list, a Hugging Face dataset).
      tokenizer: a fast Hugging Face tokenizer.
      column: None: the format is known by the columns, see docs/training.md. The name of a column:
        only that one is trained, as a text, or as a chat if it holds messages. A mapping renames
        columns, for example {"prompt": "question", "completion": "answer"}; where a row has columns
        of two formats, those in the mapping decide.
      template_options: further variables of the chat template.
      max_row_bytes: the longest row, in bytes of its line or its text. Longer ones are malformed:
        tokenizers need some 200 times as much memory.

    Raises:
      FileNotFoundError: there is no such file.
      ImportError: a Parquet file without pyarrow.
      ValueError: a file or an object of another kind, no rows at all, or data that are not trained
        here (preference data, images), with file and line.
    """

    def __init__(
        self,
        source: Any,
        tokenizer: Any,
        column: Column = None,
        template_options: dict[str, Any] | None = None,
        max_row_bytes: int = MAX_ROW_BYTES,
    ) -> None:
        self._encode = _encoder(tokenizer, column, template_options, max_row_bytes)
        self._settings = _settings(tokenizer, column, template_options)
        known = {*COLUMNS, *([column] if isinstance(column, str) else (column or {}).values())}
        self._parts: list[Rows] = open_rows(source, max_row_bytes, known)
        self._ends = np.cumsum([len(part) for part in self._parts], dtype=np.int64)
        if not len(self):
            raise ValueError(f"no rows in {source}")
        self._column = column
        self._first = [_first_row(part, column) for part in self._parts]

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, index: int) -> Document:
        part, i, first = self._locate(index)
        try:
            row = part[i]
        except _WRONG as e:
            return _bad(e, part.where(i))
        return self._encode(row, first, part.where(i))

    def _locate(self, index: int) -> tuple[Rows, int, _First | None]:
        p = int(np.searchsorted(self._ends, index, side="right"))
        return self._parts[p], index - int(self._ends[p - 1] if p else 0), self._first[p]

    def fingerprint(self) -> str:
        """Of 64 rows, evenly spread, and of what makes tokens of them; tells other data apart."""
        digest = hashlib.sha256(self._settings)
        for i in np.unique(np.linspace(0, len(self) - 1, min(64, len(self)), dtype=np.int64)):
            part, j, _ = self._locate(int(i))
            try:
                digest.update(json.dumps(part[j], sort_keys=True, default=_type_name).encode())
            except _WRONG as e:
                digest.update(str(e).encode(errors="replace"))
        return digest.hexdigest()

    def describe(self, sample: int = 200) -> str:
        """Files, formats, columns that are not read, and what would be left out of some rows.

        Args:
          sample: so many rows, evenly spread, are encoded to see what is wrong with them; fewer if
            that takes more than two seconds.
        """
        looked = np.unique(np.linspace(0, len(self) - 1, min(sample, len(self)), dtype=np.int64))
        lines, more = [], self._unused(looked)
        for part, first in zip(self._parts, self._first, strict=True):
            kind, extra = ("no format", []) if first is None else (first.format, first.unused)
            extra = list(dict.fromkeys([*extra, *more[id(part)], *getattr(part, "unread", [])]))
            ignored = f"; not used: {', '.join(map(repr, extra[:10]))}" if extra else ""
            lines.append(f"{part.name}: {len(part):,} rows of format {kind!r}{ignored}")
        if len(lines) > 10:
            lines[10:] = [f"and {len(lines) - 10} more files"]
        found, end = [], time.monotonic() + _LOOK_SECONDS
        for i in np.random.default_rng(0).permutation(looked):
            if time.monotonic() > end:
                break
            found.append((int(i), self[int(i)]))
        found = [document for _, document in sorted(found, key=lambda pair: pair[0])]
        reasons = collections.Counter(reason(d) for d in found if d.bad)
        if reasons:
            what = ", ".join(f"{n} {why}" for why, n in reasons.most_common(5))
            where = next(d for d in found if d.bad)
            lines.append(
                f"of {len(found)} rows looked at, {reasons.total()} are left out: {what}; "
                f"the first is {where.where}: {where.why}"
            )
        return "\n".join(lines)

    def _unused(self, looked: np.ndarray) -> dict[int, list[str]]:
        """What is not read of these rows, for each part (its id)."""
        found: dict[int, list[str]] = {id(part): [] for part in self._parts}
        for index in looked:
            part, i, _ = self._locate(int(index))
            with contextlib.suppress(*_WRONG):
                found[id(part)] += unused(part[i], self._column)
        return found


class Stream:
    """The rows of an iterable (a streaming dataset, a generator) as `Document`s, in its order.

    Args: as for `Documents`; `source` is iterated once per epoch and must give the same rows each
    time. An iterator, which can be read only once, is good for one epoch, from its beginning.
    """

    def __init__(
        self,
        source: Any,
        tokenizer: Any,
        column: Column = None,
        template_options: dict[str, Any] | None = None,
        max_row_bytes: int = MAX_ROW_BYTES,
    ) -> None:
        if not hasattr(source, "__iter__"):
            raise ValueError(f"training data are files or rows, not {type(source).__name__}")
        self._encode = _encoder(tokenizer, column, template_options, max_row_bytes)
        self._settings = _settings(tokenizer, column, template_options)
        self._source, self._column, self._begun = source, column, False

    def fingerprint(self) -> str:
        """Of what makes tokens of the rows; the rows themselves are not known in advance."""
        return hashlib.sha256(self._settings).hexdigest()

    def read(
        self, start: int, *, epochs: int | None, shuffle: bool, seed: int, part: tuple[int, int]
    ) -> Iterator[Document]:
        """The documents from number `start` of this process on.

        Args:
          start: counts over the epochs; rows before it are read, not encoded.
          epochs: None = without end.
          shuffle: within 1000 rows at a time, in another order in every epoch.
          seed: of the order.
          part: (index, count): every count-th row, from number index on.
        """
        seen = 0
        for epoch in itertools.count() if epochs is None else range(epochs):
            before = seen
            rows = self._rows(epoch)
            rows = shuffled(rows, (seed, epoch)) if shuffle else rows
            for row, first, where in itertools.islice(rows, part[0], None, part[1]):
                seen += 1
                if seen > start:
                    yield self._encode(row, first, where)
            if seen == before:
                raise ValueError(f"no rows in {type(self._source).__name__}")

    def _rows(self, epoch: int) -> Iterator[tuple[Any, _First | None, str]]:
        if iter(self._source) is self._source:
            if self._begun:
                raise ValueError(
                    f"{type(self._source).__name__} can be read only once: pass epochs=1, or an "
                    "iterable that begins again (a dataset, a list)"
                )
            self._begun = True
        if hasattr(self._source, "set_epoch"):
            self._source.set_epoch(epoch)
        first = None
        rows = (
            map(without_nulls, self._source) if hasattr(self._source, "features") else self._source
        )
        for i, row in enumerate(rows):
            first = first or _format(row, self._column, f"row {i}")
            yield row, first, f"row {i}"


class _First(NamedTuple):
    """What is known of a file from its first row with content."""

    format: str
    where: str
    unused: list[str]


def reason(document: Document) -> str:
    """Why a row is left out, without the details of this row."""
    return document.why.partition(": ")[0]


def _first_row(rows: Rows, column: Column) -> _First | None:
    for i in range(min(len(rows), 100)):
        try:
            row = rows[i]
        except _WRONG:
            continue
        if (found := _format(row, column, rows.where(i))) is not None:
            return found
    return None


def _format(row: Any, column: Column, where: str) -> _First | None:
    try:
        return _First(format_of(row, column), where, unused(row, column))
    except RefusedRow as e:
        raise ValueError(f"{where}: {e}") from None
    except _WRONG:
        return None


def _encoder(
    tokenizer: Any, column: Column, options: dict[str, Any] | None, max_row_bytes: int
) -> Callable[[Any, _First | None, str], Document]:
    """A function: (row, the first of its file, where it is) -> its document."""
    if isinstance(column, Mapping):
        known = {*FORMATS, *itertools.chain(*FORMATS.values())}
        if wrong := [name for name in column if name not in known]:
            raise ValueError(f"column maps {wrong}; it can map {', '.join(sorted(known))}")
    check_int("max_row_bytes", max_row_bytes, 1)
    tokenizer("a")  # settles the tokenizer's options before several threads use it
    _check_template(tokenizer, options or {})

    def encode(example: Example) -> tuple[list[int], list[bool]]:
        if example.messages is not None:
            given = {**(options or {}), **example.options}
            return encode_chat(tokenizer, example.messages, example.tools, **given)
        if example.prompt is not None:
            return encode_completion(tokenizer, example.prompt, example.text)
        return encode_text(tokenizer, example.text)

    def document(row: Any, first: _First | None, where: str) -> Document:
        try:
            kind = format_of(row, column)
            if first is not None and kind != first.format:
                raise RefusedRow(
                    f"another format than {first.where}: {kind!r}, not {first.format!r}; put rows "
                    "of different formats into different files"
                )
            example = read_row(row, column)
            size = _size(example)
            if size > max_row_bytes:
                raise ValueError(
                    f"too long: {size:,} bytes, max_row_bytes is {max_row_bytes:,}; split it"
                )
            tokens, targets = encode(example)
            if not any(targets):
                raise EmptyRow("nothing to predict")
        except _WRONG as e:
            return _bad(e, where)
        return Document(np.asarray(tokens, np.int32), np.asarray(targets, bool), None, where)

    return document


def _check_template(tokenizer: Any, options: dict[str, Any]) -> None:
    """Raises ValueError if the chat template does not come to an end, or fills the memory."""
    if tokenizer.chat_template is None:
        return
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    try:
        render(tokenizer, chat, **options)
    except ValueError as e:
        if e.__cause__ is None:  # else it refuses this chat, which says nothing of the rows
            raise


def _type_name(value: Any) -> str:
    """In place of a value that JSON does not know; its text may hold an address."""
    return type(value).__name__


def _settings(tokenizer: Any, column: Column, options: dict[str, Any] | None) -> bytes:
    """What makes tokens of rows, apart from the vocabulary itself."""
    values = [
        column,
        options or {},
        tokenizer.chat_template,
        tokenizer.eos_token_id,
        len(tokenizer),
    ]
    return json.dumps(values, sort_keys=True, default=str).encode()


def _size(value: Any) -> int:
    """Bytes of all texts in a value."""
    if isinstance(value, str):
        return len(value) if value.isascii() else len(value.encode())
    if isinstance(value, Mapping):
        return sum(_size(k) + _size(v) for k, v in value.items())
    return sum(map(_size, value)) if isinstance(value, list | tuple) else 0


def _bad(error: Exception, where: str) -> Document:
    kinds = ((EmptyRow, "empty"), (RefusedRow, "refused"))
    bad = next((name for kind, name in kinds if isinstance(error, kind)), "malformed")
    why = "".join(c if c.isprintable() else " " for c in str(error)[:500])
    why = why if isinstance(error, ValueError) else f"{type(error).__name__}: {why}"
    return Document(np.zeros(0, np.int32), np.zeros(0, bool), bad, where, why)
