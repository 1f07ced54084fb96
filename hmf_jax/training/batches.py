"""Batches: rows of a fixed number of tokens, packed from documents.

Rows of the source are shuffled, split over processes and repeated by grain, become tokens and
targets in background threads (`documents`, `encode`), and are packed here. Where the iterator
stands is a few integers, from which it goes on exactly: grain can begin anywhere in the shuffled
order, and packing is repeated from the beginning of a window of rows. While the batches of one
window are trained on, a thread fills the next one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from typing import Any, NamedTuple

import jax
import numpy as np

from hmf_jax.options import check_bool, check_choice, check_int
from hmf_jax.training.documents import Column, Document, Documents, Stream, reason
from hmf_jax.training.sources import MAX_ROW_BYTES, is_stream

_CHOICES = {
    "packing": ("first_fit", "sequential", "none"),
    "overlong": ("cut", "split", "skip", "error"),
    "on_bad": ("skip", "error"),
    "padding_side": ("right", "left"),
}
_STREAM_RUN = 10_000  # bad rows of a stream without a good one, after which it is given up

# Tokens and targets of (a part of) a document, [N] int32 and [N] bool.
Piece = tuple[np.ndarray, np.ndarray]


class _Window(NamedTuple):
    """Rows that were packed together, and where the data were before and after (`_snapshot`)."""

    start: dict[str, Any]
    rows: list[list[Piece]]
    end: dict[str, Any]


def _grain() -> Any:
    try:
        import grain  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise ImportError("training data are read with grain: pip install 'hmf-jax[train]'") from e
    return grain


class Batches:
    """Iterator over batches of tokens, the same for the same arguments, which can be resumed.

    A batch is a dict of numpy arrays [batch_size, length]:
      tokens: int32.
      segment_ids: int32, 1, 2, ... for the documents of a row, 0 = padding.
      loss_mask: bool, True where a token is to be predicted from those before it in its document
        (never its first token, never padding; in chats what the assistant writes).
    The last batch is filled up with rows of padding.

    Args:
      source: see `Documents`; or an iterable of rows without a length (a streaming dataset, a
        generator), which is read in its order, within 1000 rows at a time shuffled, and from its
        beginning when a state is set. It is never held in memory.
      tokenizer, column, template_options, max_row_bytes: see `Documents`.
      length: tokens per row.
      batch_size: rows per batch of this process.
      packing: "first_fit" puts a document into the first row with room of a window of rows,
        "sequential" into the newest row (keeps the order), "none" into a row of its own.
      overlong: a document of more than `length` tokens is "cut", "split" into several documents,
        left out ("skip") or an "error". What then has no target is left out.
      on_bad: empty and malformed rows are left out and counted ("skip"), or an "error" that names
        file and line. Rows that show that the data are of another kind (preference data, images,
        another format than the file's first row) are an error in any case.
      padding_side: "right" or "left".
      shuffle: in another order in every epoch.
      seed: of the order, 0 to 2^32 - 1.
      epochs: None = without end. Processes may end at different steps, as their documents differ;
        `train` goes on with `padding()` in those that end first.
      window: rows that "first_fit" fills at a time; None = about 64.
      process_index, process_count: this process reads every process_count-th row of the shuffled
        order; None = those of jax.
      threads: that read and tokenize in the background. More than a few do not help. 0: all is done
        when a batch is asked for, in the caller's thread.

    Attributes:
      counts: rows read; documents, tokens and targets packed; empty, malformed and overlong rows
        (overlong ones whatever became of them); cut: tokens of overlong rows that were left out.
        A window counts as a whole.
      reasons: why rows were left out -> how many.
      problems: the first bad rows, in words.

    Raises:
      ImportError: grain is missing.
      ValueError: an argument out of range; while iterating, a bad row (see `on_bad`, `overlong`) or
        not one good row.
    """

    def __init__(
        self,
        source: Any,
        tokenizer: Any,
        *,
        length: int,
        batch_size: int,
        column: Column = None,
        template_options: dict[str, Any] | None = None,
        max_row_bytes: int = MAX_ROW_BYTES,
        packing: str = "first_fit",
        overlong: str = "cut",
        on_bad: str = "skip",
        padding_side: str = "right",
        shuffle: bool = True,
        seed: int = 0,
        epochs: int | None = None,
        window: int | None = None,
        process_index: int | None = None,
        process_count: int | None = None,
        threads: int = 4,
    ) -> None:
        grain = _grain()
        given = dict(zip(_CHOICES, (packing, overlong, on_bad, padding_side), strict=True))
        for name, value in given.items():
            check_choice(name, value, _CHOICES[name])
        check_int("length", length, 2)
        check_int("batch_size", batch_size, 1)
        check_int("seed", seed, 0, (1 << 32) - 1)
        check_int("threads", threads, 0)
        check_bool("shuffle", shuffle)
        for name, value in (("window", window), ("epochs", epochs)):
            if value is not None:
                check_int(name, value, 1)
        index = jax.process_index() if process_index is None else process_index
        count = jax.process_count() if process_count is None else process_count
        make: type[Documents] | type[Stream] = Stream if is_stream(source) else Documents
        documents = make(source, tokenizer, column, template_options, max_row_bytes)
        rows = len(documents) if isinstance(documents, Documents) else None
        if not 0 <= index < count or (rows is not None and count > rows):
            raise ValueError(f"process {index} of {count} cannot share {rows} rows")

        self._length, self._batch_size, self._choices = length, batch_size, given
        # Whole batches, so that a window ends where a batch does.
        self._window = -(-(window or max(64, batch_size)) // batch_size) * batch_size
        self._pad = tokenizer.pad_token_id or 0
        # A state belongs to these settings and rows; on_bad and epochs may change.
        self._settings = {
            **{k: given[k] for k in ("packing", "overlong", "padding_side")},
            "length": length,
            "batch_size": batch_size,
            "window": self._window,
            "rows": rows,
            "shuffle": shuffle,
            "seed": seed,
            "process_index": index,
            "process_count": count,
            "fingerprint": documents.fingerprint(),
        }
        self.documents = documents
        if isinstance(documents, Documents):
            data = grain.MapDataset.source(documents).seed(seed)
            data = (data.shuffle() if shuffle else data)[index::count]
            self._shard = len(data)
            self._data = data.repeat(epochs)
        else:
            self._shard = _STREAM_RUN
            self._order: dict[str, Any] = dict(
                epochs=epochs, shuffle=shuffle, seed=seed, part=(index, count)
            )
        self._reading = grain.ReadOptions(
            num_threads=threads, prefetch_buffer_size=max(128, threads)
        )
        self._reader: Any = None
        self._ahead: Future[_Window] | None = None
        self._in_background = threads > 0
        self.problems: list[str] = []
        zero = dict.fromkeys(
            ("documents", "tokens", "targets", "empty", "malformed", "overlong", "cut"), 0
        )
        self._enter({"row": 0, "piece": 0, "counts": zero, "reasons": {}})

    # --- state --------------------------------------------------------------------------------

    @property
    def counts(self) -> dict[str, int]:
        return {"rows": self._end["row"], **self._end["counts"]}

    @property
    def reasons(self) -> dict[str, int]:
        return dict(self._end["reasons"])

    def describe(self) -> str:
        """Where the rows come from, their format, what is not used of them and what is left out.

        Rows are left out by reason: of all that were read so far, else of a sample of them.
        """
        if isinstance(self.documents, Stream):
            lines = ["a stream of rows"]
        else:
            lines = [self.documents.describe(sample=0 if self._end["row"] else 200)]
        counts = self.counts
        if self.reasons:
            what = ", ".join(f"{n:,} {why}" for why, n in sorted(self.reasons.items()))
            rows, first = counts["rows"], self.problems[0]
            lines.append(f"left out of {rows:,} rows: {what}; the first is {first}")
        if counts["cut"]:
            lines.append(f"{counts['cut']:,} tokens beyond length {self._length} are left out")
        return "\n".join(lines)

    def get_state(self) -> dict[str, Any]:
        """Where the next batch is; JSON can hold it."""
        return {**self._start, "batch": self._taken, "settings": dict(self._settings)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on where `get_state` was called.

        Raises:
          ValueError: the state of an iterator with other settings or over other rows, or no state.
        """
        names = {"settings", "row", "piece", "counts", "batch"}
        if not isinstance(state, dict) or not names <= set(state):
            raise ValueError(
                "this is no state of training data: it has no " + ", ".join(sorted(names))
            )
        was = {"fingerprint": self._settings["fingerprint"], **state["settings"]}
        if different := [k for k in self._settings if was.get(k) != self._settings[k]]:
            changes = ", ".join(f"{k} {was.get(k)} -> {self._settings[k]}" for k in different)
            raise ValueError(f"this state belongs to other training data settings: {changes}")
        self._enter(state)
        if state["batch"]:
            self._begin_window()
            self._taken = state["batch"]

    def _enter(self, state: dict[str, Any]) -> None:
        """To the beginning of a window of rows."""
        if self._ahead is not None:
            wait([self._ahead])  # it reads and counts, too
            self._ahead = None
        self._row: int = state["row"]  # in the shuffled order: the next document not yet packed
        self._piece: int = state["piece"]  # of that document: the next one not yet packed
        self._counts: dict[str, int] = {**state["counts"]}
        self._counts.setdefault("cut", 0)
        self._reasons: dict[str, int] = dict(state.get("reasons", {}))
        self._start = self._end = self._snapshot()
        self._rows, self._taken = [], 0
        self._pieces: list[Piece] | None = None
        # Tokens cut off these pieces' document, None if it fits; bad rows without a good one.
        self._cut_tokens: int | None = None
        self._bad_run = 0
        if self._reader is not None:
            self._reader.close()
        self._reader = self._read(self._row)

    def _read(self, start: int) -> Iterator[Document]:
        if isinstance(self.documents, Stream):
            return self.documents.read(start, **self._order)
        return iter(self._data[start:].to_iter_dataset(self._reading))

    def _snapshot(self) -> dict[str, Any]:
        return {
            "row": self._row,
            "piece": self._piece,
            "counts": dict(self._counts),
            "reasons": dict(self._reasons),
        }

    # --- batches ------------------------------------------------------------------------------

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._taken * self._batch_size >= len(self._rows):
            self._begin_window()
            if not self._rows:
                raise StopIteration
        first = self._taken * self._batch_size
        self._taken += 1
        batch = self.padding()
        left = self._choices["padding_side"] == "left"
        for b, row in enumerate(self._rows[first : first + self._batch_size]):
            at = self._length - sum(len(tokens) for tokens, _ in row) if left else 0
            for segment, (tokens, targets) in enumerate(row, start=1):
                here = slice(at, at + len(tokens))
                batch["tokens"][b, here] = tokens
                batch["segment_ids"][b, here] = segment
                batch["loss_mask"][b, here] = targets
                at += len(tokens)
        return batch

    def padding(self) -> dict[str, np.ndarray]:
        """A batch with nothing in it, for a process whose data end before those of others."""
        shape = self._batch_size, self._length
        return {
            "tokens": np.full(shape, self._pad, np.int32),
            "segment_ids": np.zeros(shape, np.int32),
            "loss_mask": np.zeros(shape, bool),
        }

    def _begin_window(self) -> None:
        """To the next window of rows; the one after it is filled in the background."""
        try:
            window = self._packed() if self._ahead is None else self._ahead.result()
        except BaseException:
            if self._ahead is None or self._ahead.done():
                self._enter(self._end)  # after a bad row or an interrupt all begins here again
            raise
        self._start, self._rows, self._end = window
        self._taken, self._ahead = 0, None
        if self._in_background and self._rows:
            self._ahead = _in_background(self._packed)

    def _packed(self) -> _Window:
        start = self._snapshot()
        return _Window(start, self._fill(), self._snapshot())

    def _fill(self) -> list[list[Piece]]:
        """Rows until a document finds no room in a window of them, or the data end."""
        rows, room = [], []
        while (pieces := self._next_document()) is not None:
            while self._piece < len(pieces):
                tokens, targets = piece = pieces[self._piece]
                candidates = {"first_fit": len(rows), "sequential": 1, "none": 0}
                oldest = max(0, len(rows) - candidates[self._choices["packing"]])
                fits = (r for r in range(oldest, len(rows)) if room[r] >= len(tokens))
                r = next(fits, len(rows))
                if r == self._window:
                    return rows
                if r == len(rows):
                    rows.append([])
                    room.append(self._length)
                rows[r].append(piece)
                room[r] -= len(tokens)
                if self._piece == 0:
                    self._counts["documents"] += 1
                    self._counts["overlong"] += self._cut_tokens is not None
                    self._counts["cut"] += self._cut_tokens or 0
                self._counts["targets"] += int(targets.sum())
                self._counts["tokens"] += len(tokens)
                self._piece += 1
            self._row, self._piece, self._pieces = self._row + 1, 0, None
        return rows

    def _next_document(self) -> list[Piece] | None:
        """The pieces of the next good document, None at the end. Counts bad ones."""
        while self._pieces is None:
            document = next(self._reader, None)
            if document is None:
                return None
            pieces, bad, why = self._cut(document)
            if bad is None:
                self._pieces, self._bad_run = pieces, 0
                n = len(document.tokens)
                over = n > self._length
                self._cut_tokens = n - sum(len(t) for t, _ in pieces) if over else None
                break
            text = f"{document.where}: {bad} row: {why}"
            choice = self._choices["overlong" if bad == "overlong" else "on_bad"]
            if choice == "error" or bad == "refused":
                raise ValueError(text)
            self._row += 1
            self._counts[bad] += 1
            self._counts["cut"] += len(document.tokens)
            what = "overlong" if bad == "overlong" else reason(document)
            self._reasons[what] = self._reasons.get(what, 0) + 1
            self._bad_run += 1
            if len(self.problems) < 20:
                self.problems.append(text)
            if self._bad_run >= self._shard:
                raise ValueError(f"not one of {self._shard} rows is usable; {self.problems[0]}")
        return self._pieces

    def _cut(self, document: Document) -> tuple[list[Piece], str | None, str]:
        """Pieces that fit into a row and have a target; or what is wrong with the document."""
        tokens, targets, bad, _, why = document
        n, mode = len(tokens), self._choices["overlong"]
        if bad is not None or n <= self._length:
            return [(tokens, targets)], bad, why
        why = f"{n} tokens, {self._length} fit into a row"
        if mode in ("skip", "error"):
            return [], "overlong", why
        targets = targets.copy()
        targets[:: self._length] = False  # a piece knows nothing of the one before it
        cuts = range(0, n if mode == "split" else self._length, self._length)
        pieces = [(tokens[a : a + self._length], targets[a : a + self._length]) for a in cuts]
        pieces = [piece for piece in pieces if piece[1].any()]
        return pieces, None if pieces else "overlong", f"{why}, where nothing is to be predicted"


def _in_background[T](call: Callable[[], T]) -> Future[T]:
    """The result of a call in a thread, which the end of the program does not wait for."""
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as e:
            future.set_exception(e)

    threading.Thread(target=run, name="batches", daemon=True).start()
    return future
