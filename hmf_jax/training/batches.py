"""Batches: rows of a fixed number of tokens, packed from documents.

Rows of the source are shuffled, split over processes and repeated by grain, become tokens and
targets in background threads (`documents`, `encode`), and are packed here. Where the iterator
stands is a few integers, from which it goes on exactly: grain can begin anywhere in the shuffled
order, and packing is repeated from the beginning of a window of rows.
"""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from hmf_jax.training.documents import Document, Documents

_CHOICES = {
    "packing": ("first_fit", "sequential", "none"),
    "overlong": ("cut", "split", "skip", "error"),
    "on_bad": ("skip", "error"),
    "padding_side": ("right", "left"),
}

# Tokens and targets of (a part of) a document, [N] int32 and [N] bool.
Piece = tuple[np.ndarray, np.ndarray]


class Batches:
    """Iterator over batches of tokens, the same for the same arguments, which can be resumed.

    A batch is a dict of numpy arrays [batch_size, length]:
      tokens: int32.
      segment_ids: int32, 1, 2, ... for the documents of a row, 0 = padding.
      loss_mask: bool, True where a token is to be predicted from those before it in its document
        (never its first token, never padding; in chats what the assistant writes).
    The last batch is filled up with rows of padding.

    Args:
      source, tokenizer, column, template_options: see `Documents`.
      length: tokens per row.
      batch_size: rows per batch of this process.
      packing: "first_fit" puts a document into the first row with room of a window of rows,
        "sequential" into the newest row (keeps the order), "none" into a row of its own.
      overlong: a document of more than `length` tokens is "cut", "split" into several documents,
        left out ("skip") or an "error". What then has no target is left out.
      on_bad: empty and malformed rows are left out and counted ("skip"), or an "error" that names
        file and line.
      padding_side: "right" or "left".
      shuffle: in another order in every epoch.
      seed: of the order.
      epochs: None = without end. Processes may end at different steps, as their documents differ;
        `train` goes on with `padding()` in those that end first.
      window: rows that "first_fit" fills at a time; None = about 64.
      process_index, process_count: this process reads every process_count-th row of the shuffled
        order; None = those of jax.
      threads: that read and tokenize in the background. More than a few do not help.

    Attributes:
      counts: rows read; documents, tokens and targets packed; empty, malformed and overlong rows
        (overlong ones whatever became of them). A window counts as a whole.
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
        column: str | None = None,
        template_options: dict[str, Any] | None = None,
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
        try:
            import grain  # pyright: ignore[reportMissingImports]
        except ImportError as e:
            raise ImportError(
                "training data are read with grain: pip install 'hmf-jax[train]'"
            ) from e
        given = dict(zip(_CHOICES, (packing, overlong, on_bad, padding_side), strict=True))
        for name, value in given.items():
            if value not in _CHOICES[name]:
                raise ValueError(f"{name} is one of {', '.join(_CHOICES[name])}, not {value!r}")
        if length < 2 or batch_size < 1 or (window is not None and window < 1):
            raise ValueError("length must be at least 2, batch_size and window at least 1")
        index = jax.process_index() if process_index is None else process_index
        count = jax.process_count() if process_count is None else process_count
        documents = Documents(source, tokenizer, column, template_options)
        if not 0 <= index < count <= len(documents):
            raise ValueError(f"process {index} of {count} cannot share {len(documents)} rows")

        self._length, self._batch_size, self._choices = length, batch_size, given
        # Whole batches, so that a window ends where a batch does.
        self._window = -(-(window or max(64, batch_size)) // batch_size) * batch_size
        self._pad = tokenizer.pad_token_id or 0
        # A state belongs to these settings; on_bad and epochs may change.
        self._settings = {
            **{k: given[k] for k in ("packing", "overlong", "padding_side")},
            "length": length,
            "batch_size": batch_size,
            "window": self._window,
            "rows": len(documents),
            "shuffle": shuffle,
            "seed": seed,
            "process_index": index,
            "process_count": count,
        }
        data = grain.MapDataset.source(documents).seed(seed)
        data = (data.shuffle() if shuffle else data)[index::count]
        self._shard = len(data)
        self._data = data.repeat(epochs)
        self._reading = grain.ReadOptions(
            num_threads=threads, prefetch_buffer_size=max(128, threads)
        )
        self._reader: Any = None
        self.problems: list[str] = []
        zero = dict.fromkeys(
            ("documents", "tokens", "targets", "empty", "malformed", "overlong"), 0
        )
        self._enter({"row": 0, "piece": 0, "counts": zero})

    # --- state --------------------------------------------------------------------------------

    @property
    def counts(self) -> dict[str, int]:
        return {"rows": self._row, **self._counts}

    def get_state(self) -> dict[str, Any]:
        """Where the next batch is; JSON can hold it."""
        return {**self._start, "batch": self._taken, "settings": dict(self._settings)}

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on where `get_state` was called.

        Raises:
          ValueError: the state of an iterator with other settings.
        """
        was = state["settings"]
        if different := [k for k in self._settings if was.get(k) != self._settings[k]]:
            changes = ", ".join(f"{k} {was.get(k)} -> {self._settings[k]}" for k in different)
            raise ValueError(f"this state belongs to other training data settings: {changes}")
        self._enter(state)
        if state["batch"]:
            self._rows, self._taken = self._fill(), state["batch"]

    def _enter(self, state: dict[str, Any]) -> None:
        """To the beginning of a window of rows."""
        self._row: int = state["row"]  # in the shuffled order: the next document not yet packed
        self._piece: int = state["piece"]  # of that document: the next one not yet packed
        self._counts: dict[str, int] = dict(state["counts"])
        self._start, self._rows, self._taken = self._snapshot(), [], 0
        self._pieces: list[Piece] | None = None
        self._overlong, self._bad_run = False, 0  # of these pieces; bad rows without a good one
        if self._reader is not None:
            self._reader.close()
        self._reader = iter(self._data[self._row :].to_iter_dataset(self._reading))

    def _snapshot(self) -> dict[str, Any]:
        return {"row": self._row, "piece": self._piece, "counts": dict(self._counts)}

    # --- batches ------------------------------------------------------------------------------

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        if self._taken * self._batch_size >= len(self._rows):
            self._start, self._rows, self._taken = self._snapshot(), [], 0
            try:
                self._rows = self._fill()
            except BaseException:  # a bad row or an interrupt: the next call begins here again
                self._enter(self._start)
                raise
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

    def _fill(self) -> list[list[Piece]]:
        """The next window of rows: until a document finds no room, or the data end."""
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
                    self._counts["overlong"] += self._overlong
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
                self._pieces, self._overlong = pieces, len(document.tokens) > self._length
                self._bad_run = 0
                break
            why = f"{document.where}: {bad} row: {why}"
            if self._choices["overlong" if bad == "overlong" else "on_bad"] == "error":
                raise ValueError(why)
            self._row += 1
            self._counts[bad] += 1
            self._bad_run += 1
            if len(self.problems) < 20:
                self.problems.append(why)
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
