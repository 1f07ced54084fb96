"""Scores of layers on disk: the original's CSV, and the record of what its scores are of."""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from hmf_jax.convert.directories import printable, read_json

BASELINE = -1
_METADATA = ("layer_num", "layer_type", "n_runs", "codename", "window_size", "model")
_MAX_LAYER = 9999


@dataclasses.dataclass(frozen=True)
class LayerScores:
    """Scores, higher is better: layer -> task -> score; layer -1 is the unchanged model.

    `tasks` are all columns in their order. A layer may lack some tasks, not all.
    """

    tasks: tuple[str, ...]
    rows: Mapping[int, Mapping[str, float]]


def read_scores(file: str | Path) -> LayerScores:
    """Reads a CSV of scores.

    Raises:
      FileNotFoundError: there is none.
      ValueError: no layer_num column, no tasks, or a line that cannot be read, by number.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; pass a CSV of layer scores")
    try:
        text = file.read_text(encoding="utf-8-sig")
        reader = csv.DictReader(io.StringIO(text), strict=True)
        columns = [name for name in reader.fieldnames or () if name]
        lines = [(reader.line_num, line) for line in reader]
    except (UnicodeDecodeError, csv.Error) as e:
        raise ValueError(f"{file} is no CSV: {e}") from e
    tasks = tuple(name for name in columns if name not in _METADATA)
    if "layer_num" not in columns or not tasks or len(set(columns)) < len(columns):
        shown = printable(",".join(columns))
        raise ValueError(f"{file}: the header must be layer_num,<task>,..., found {shown!r}")
    rows: dict[int, dict[str, float]] = {}
    for number, line in lines:
        where = f"{file}, line {number}"
        if None in line or None in line.values():
            raise ValueError(f"{where}: must have as many cells as the header")
        try:
            layer = int(_digits(line["layer_num"]))
            cells = {t: _digits(line[t]) for t in tasks}
            values = {t: float(text) for t, text in cells.items() if text}
        except ValueError as e:
            raise ValueError(f"{where}: {e}; layers are integers, scores numbers") from e
        if not BASELINE <= layer <= _MAX_LAYER:
            raise ValueError(f"{where}: layer {layer} is not between {BASELINE} and {_MAX_LAYER}")
        if layer in rows:
            raise ValueError(f"{where}: layer {layer} is there twice")
        if bad := [t for t, x in values.items() if not math.isfinite(x)]:
            raise ValueError(f"{where}: {', '.join(bad)} is not finite; leave the cell empty")
        rows[layer] = values
    return LayerScores(tasks, rows)


def write_scores(scores: LayerScores, file: str | Path) -> None:
    """Writes the CSV that `read_scores` and the original read; replaces it at once."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["layer_num", *scores.tasks])
    for layer, row in scores.rows.items():
        writer.writerow([layer, *(row.get(task, "") for task in scores.tasks)])
    _write(Path(file), text.getvalue())


@dataclasses.dataclass
class Record:
    """The scores that `score_layers` made: FILE.json, beside the CSV.

    Attributes:
      file: the CSV.
      identity: what they are of.
      rows: layer -> task -> score.
      others: what the CSV held of other tasks.
    """

    file: Path
    identity: dict[str, Any]
    rows: dict[int, dict[str, float]]
    others: LayerScores

    @classmethod
    def open(cls, file: str | Path, identity: dict[str, Any]) -> Self:
        """The scores that there are already.

        Raises:
          FileExistsError: they are of something else, or the CSV was changed since.
          ValueError: damaged files.
          OSError: the CSV could not be written.
        """
        file = Path(file)
        if file.exists() and not file.is_file():
            raise FileExistsError(f"{file} is not a file; name a CSV")
        file.parent.mkdir(parents=True, exist_ok=True)
        held = read_scores(file) if file.is_file() else LayerScores((), {})
        path = _record(file)
        if not path.is_file():
            _write(path, json.dumps({"identity": identity, "rows": {}}))  # finds what is read-only
            return cls(file, identity, {}, held)
        stored = read_json(path, limit=1 << 26)
        if not isinstance(stored.get("identity"), dict):
            raise ValueError(f"{path} is damaged: remove it and {file.name}")
        if different := [
            k
            for k in {**identity, **stored["identity"]}
            if identity.get(k) != stored["identity"].get(k)
        ]:
            raise FileExistsError(
                f"{file} holds scores of other {', '.join(map(printable, different))}; choose "
                f"another file, or remove it and {path.name}"
            )
        try:
            rows = {
                int(layer): {str(t): float(x) for t, x in row.items()}
                for layer, row in stored["rows"].items()
            }
        except (LookupError, TypeError, ValueError, AttributeError) as e:
            raise ValueError(f"{path} is damaged: remove it and {file.name}") from e
        own = {t for row in rows.values() for t in row}
        for layer, row in held.rows.items():
            if any(row[t] != rows.get(layer, {}).get(t) for t in own if t in row):
                raise FileExistsError(
                    f"{file}: the scores of layer {layer} are not those of {path.name}; remove both"
                )
        tasks = tuple(t for t in held.tasks if t not in own)
        kept = {i: {t: x for t, x in row.items() if t in tasks} for i, row in held.rows.items()}
        return cls(file, identity, rows, LayerScores(tasks, kept))

    def check_columns(self, tasks: Iterable[str]) -> None:
        """Raises FileExistsError if the CSV holds such tasks already, from somewhere else."""
        if twice := [t for t in tasks if t in self.others.tasks]:
            raise FileExistsError(
                f"{self.file} has a column {', '.join(twice)} already, and nothing says what it "
                "was scored on; remove the column or choose another file"
            )

    def add(self, layer: int, found: dict[str, float]) -> None:
        """Adds the scores of a layer and writes both files, the record first."""
        self.check_columns(found)
        self.rows[layer] = found
        rows = {str(i): row for i, row in self.rows.items()}
        text = json.dumps({"identity": self.identity, "rows": rows}, indent=1) + "\n"
        _write(_record(self.file), text)
        self.write()

    def write(self) -> LayerScores:
        """Writes the CSV; what it holds."""
        own = dict.fromkeys(t for row in self.rows.values() for t in row)
        layers = dict.fromkeys([*self.others.rows, *self.rows])
        rows = {i: {**self.others.rows.get(i, {}), **self.rows.get(i, {})} for i in layers}
        scores = LayerScores((*self.others.tasks, *own), rows)
        write_scores(scores, self.file)
        return scores


def fingerprint(arrays: Mapping[str, jax.Array]) -> str:
    """Of names, shapes, dtypes and all bits of arrays, wherever they live."""
    about = [[name, list(a.shape), str(a.dtype)] for name, a in arrays.items()]
    sums = np.asarray(_sums(list(arrays.values())))
    return hashlib.sha256(json.dumps(about).encode() + sums.tobytes()).hexdigest()


@jax.jit
def _sums(arrays: list[jax.Array]) -> jax.Array:
    def total(a: jax.Array) -> jax.Array:
        if a.dtype != bool:
            a = jax.lax.bitcast_convert_type(a, f"uint{min(8 * a.dtype.itemsize, 32)}")
        words = a.astype(jnp.uint32).reshape(-1)
        place = jax.lax.iota(jnp.uint32, words.size) * 2 + 1  # so that no two words can be swapped
        mixed = (words ^ (words >> 15)) * jnp.uint32(0x9E3779B1)
        return jnp.stack([jnp.sum(words * place), jnp.sum(mixed * (place ^ (place >> 7)))])

    return jnp.stack([total(a) for a in arrays])


def _record(file: Path) -> Path:
    return file.with_name(f"{file.name}.json")


def _digits(text: str) -> str:
    """A cell; Python also reads numbers with underscores, which are none in a CSV."""
    if re.search(r"[^\x21-\x7e]|_", text := text.strip()):
        raise ValueError(f"{printable(text, 40)!r} is no number")
    return text


def _write(file: Path, text: str) -> None:
    """Replaces a file at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    tmp = file.with_name(f".{file.name}.tmp")
    tmp.write_text(text, encoding="utf-8", newline="")
    tmp.replace(file)
