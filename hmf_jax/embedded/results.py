"""Files and tables of results over several seeds."""

from __future__ import annotations

import json
import os
import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def slug(name: str) -> str:
    """The directory name of a model."""
    return "".join(c if c.isalnum() else "-" for c in name.lower().replace("'", ""))


def replace(path: Path, text: str) -> None:
    """Write beside, then rename: nobody reads half a file."""
    part = path.with_name(f"{path.name}.{os.getpid()}")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)


def write_results(out: Path) -> None:
    """results.json and results.md over all seeds found."""
    found = sorted(out.glob("seed*/metrics.json"))
    rows = summarize([json.loads(path.read_text(encoding="utf-8")) for path in found])
    replace(out / "results.json", json.dumps(rows, indent=1))
    replace(out / "results.md", table(rows))


def summarize(reports: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows with mean and standard deviation of the accuracy over seeds."""
    found: dict[tuple, list[float]] = defaultdict(list)
    for report in reports:
        for row in report["rows"]:
            key = tuple((k, v) for k, v in row.items() if k != "accuracy")
            found[key].append(row["accuracy"])
    return [
        dict(key)
        | dict(
            mean=round(statistics.mean(values), 4),
            std=round(statistics.stdev(values), 4) if len(values) > 1 else None,
            seeds=len(values),
        )
        for key, values in found.items()
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as Markdown: one line per model, stage and num_iter, one column per context."""
    lengths = sorted({r["context"] for r in rows})
    lines: dict[tuple, dict[int, str]] = defaultdict(dict)
    for r in rows:
        std = "" if r["std"] is None else f" ± {100 * r['std']:.1f}"
        what = r["stage"] + (", states zeroed" if r["zeroed"] else "")
        what += "" if r["steps"] is None else f", {r['steps']} steps"
        lines[r["model"], what, r["num_iter"]][r["context"]] = f"{100 * r['mean']:.1f}{std}"
    head = ["model", "", "num_iter", *(f"{n} tokens" for n in lengths)]
    out = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for (model, what, num_iter), cells in lines.items():
        cells = [cells.get(n, "–") for n in lengths]
        row = [model, what, "" if num_iter is None else str(num_iter), *cells]
        out.append("| " + " | ".join(row) + " |")
    return "\n".join(out)
