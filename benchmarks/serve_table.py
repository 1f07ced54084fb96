"""The tables of the model cards: `python -m benchmarks.serve_table --out rows.jsonl`.

For every model and context: decode throughput with the memory of the device full of sequences (of
`context` tokens each, the last ones being decoded), and the time to the first token of one prompt
of that length. One process per row; rows that the file already holds are not measured again, so the
same command goes on where it was stopped. Beside it, rows.md and rows.png: throughput and time of
every model as ratios to the Transformer on as many devices, and how close each comes to what a
device can copy. Throughput is that of all devices over their number.

The method is that of the cards (random tokens, all requests decoding, chunked prefill), but for
three things: prompts are prefilled one after the other, so that a mean over N of them is
(N + 1) / 2 times the time here and ratios are the same; decoding starts from states with random
values instead of prompts; and there is no server.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

CONTEXTS = (16384, 32768, 65536, 131072)
MODELS = ("*", "GKA", "GDN", "M2", "BMF", "SWA")
# Decode throughput and time to first token over Qwen3-8B's on the cards (8 H200, TP=8), by context.
CARDS: dict[str, dict[str, tuple[float, ...]]] = {
    "decode": {
        "GKA": (1.78, 1.77, 1.89, 2.23),
        "GDN": (1.95, 1.95, 2.01, 2.33),
        "M2": (1.88, 1.93, 1.99, 2.30),
        "BMF": (0.88, 1.08, 1.30, 1.75),
    },
    "ttft": {
        "GKA": (1.26, 1.18, 1.06, 0.85),
        "GDN": (1.00, 0.95, 0.85, 0.74),
        "M2": (1.03, 0.96, 0.86, 0.74),
        "BMF": (1.61, 1.46, 1.23, 0.98),
    },
}
OPS = {"decode": "decode_throughput", "ttft": "ttft"}
Line = tuple[str, str, int | None, int]  # shape, model, num_iter, devices (tensor parallel)
Key = tuple[str, int, Line]  # what, context


def main(argv: Sequence[str] | None = None) -> None:
    args = _parse(argv)
    missing = wanted(args.shape, args.models, args.contexts, args.num_iter, args.tp)
    for key in missing if args.measure else ():
        if key in read(args.out, args.steps):
            continue
        what, context, (_, model, num_iter, tp) = key
        # A decoded row ends with the context full; see `Settings.length`.
        length = context - args.steps if what == "decode" else context
        command = f"--shape {args.shape} --ops {OPS[what]} --lengths {length} --steps {args.steps}"
        command += " --batches full" if what == "decode" else f" --batches 1 --chunk {args.chunk}"
        command += "" if num_iter is None else f" --num-iter {num_iter}"
        command += "" if tp == 1 else f" --mesh tp={tp}"
        command += "" if args.memory is None else f" --memory {args.memory}"
        first = not args.out.is_file() and args.ceilings
        command += " --ceilings" if first else " --no-ceilings"
        run = [sys.executable, "-m", "benchmarks.run", *command.split(), "--mixers", model]
        subprocess.run([*run, "--out", str(args.out)], check=False)  # what cannot run is skipped
    rows = {key: row for key, row in read(args.out, args.steps).items() if key[1] in args.contexts}
    if not rows:
        sys.exit("Nothing was measured: nothing that was asked for could run here.")
    copy = copy_rate(args.out)
    args.out.with_suffix(".md").write_text(table(rows, copy) + "\n")
    plot(rows, copy, args.out.with_suffix(".png"))
    print(table(rows, copy))


def wanted(
    shape: str, models: Iterable[str], contexts: Sequence[int], num_iters: Sequence[int], tp: int
) -> Iterable[Key]:
    """Every row of the tables; only models with a GKA solver have several num_iter."""
    for model in models:
        for num_iter in (
            num_iters if model == "GKA" else num_iters[:1] if model == "BMF" else [None]
        ):
            for context in contexts:
                for what in OPS:
                    yield what, context, (shape, model, num_iter, tp)


def read(file: Path, steps: int) -> dict[Key, dict[str, Any]]:
    """The rows of a file, the newest of each kind."""
    found: dict[Key, dict[str, Any]] = {}
    ops = {op: what for what, op in OPS.items()}
    for line in file.read_text().splitlines() if file.is_file() else ():
        row = json.loads(line)
        case = re.fullmatch(r"(\S+) (\S+) \d+ layers(, mesh tp=\d+)?", row["case"])
        if case is None or (what := ops.get(row["op"])) is None:
            continue
        context = row["shape"]["length"] + (steps if what == "decode" else 0)
        tp = row["extra"].get("mesh", {}).get("tp", 1)
        found[what, context, (case[1], case[2], row["num_iter"], tp)] = row
    return found


def copy_rate(file: Path) -> float | None:
    """GB/s of a copy, where the file has that ceiling."""
    rows = map(json.loads, file.read_text().splitlines())
    return next((r["extra"]["gb_per_s"] for r in rows if r["op"] == "ceiling_copy"), None)


def ratios(rows: Mapping[Key, Mapping[str, Any]], what: str) -> dict[Line, dict[int, float]]:
    """Line -> context -> throughput or time over that of the Transformer on as many devices."""
    out: dict[Line, dict[int, float]] = {}
    for (kind, context, line), row in rows.items():
        shape, model, _, tp = line
        base = rows.get((what, context, (shape, "*", None, tp)))
        if kind != what or model == "*" or base is None:
            continue
        a, b = ((r["extra"]["tokens_per_s"] if what == "decode" else r["ms"]) for r in (row, base))
        out.setdefault(line, {})[context] = a / b
    return out


def shares(rows: Mapping[Key, Mapping[str, Any]], copy: float) -> dict[Line, dict[int, float]]:
    """Line -> context -> how fast what a decode step has to move moves, over `copy` GB/s."""
    out: dict[Line, dict[int, float]] = {}
    for (kind, context, line), row in rows.items():
        if kind == "decode":
            out.setdefault(line, {})[context] = row["extra"]["gb_per_s"] / copy
    return out


def table(rows: Mapping[Key, Mapping[str, Any]], copy: float | None) -> str:
    """Markdown: one line per `Line`, absolute numbers and ratios per context."""
    contexts = sorted({context for _, context, _ in rows})
    lines = []
    for what, title in (
        (
            "decode",
            "Decode, memory full: tokens/s per device "
            "(sequences; of the copy rate; x Transformer; card)",
        ),
        ("ttft", "Time to first token, ms (x Transformer; card)"),
    ):
        found = {line for kind, _, line in rows if kind == what}
        names = sorted(found, key=lambda x: (x[3], *_place(x)))
        if not names:
            continue
        relative = ratios(rows, what)
        moved = shares(rows, copy) if copy else {}
        heads = "".join(f" {_short(c)} |" for c in contexts)
        lines += [
            "",
            f"{title}:",
            "",
            f"| shape | model | num_iter | devices |{heads}",
            "|---" * (4 + len(contexts)) + "|",
        ]
        for line in names:
            shape, model, num_iter, tp = line
            cells = []
            for context in contexts:
                row = rows.get((what, context, line))
                if row is None:
                    cells.append("–")
                    continue
                extra = row["extra"]
                if what == "decode":
                    notes = [f"{row['shape']['batch']}"]
                    notes += [f"{moved[line][context]:.0%}"] if copy else []
                else:
                    notes = []
                if (ratio := relative.get(line, {}).get(context)) is not None:
                    notes.append(f"{ratio:.2f}x")
                if context in CONTEXTS and _on_card(what, line):
                    notes.append(f"card {CARDS[what][model][CONTEXTS.index(context)]:.2f}x")
                value = extra["tokens_per_s"] if what == "decode" else row["ms"]
                cells.append(f"{value:,.0f}" + (f" ({', '.join(notes)})" if notes else ""))
            heads = f"| {shape} | {model} | {num_iter or ''} | {tp} | "
            lines.append(heads + " | ".join(cells) + " |")
    return "\n".join(lines).strip()


def plot(rows: Mapping[Key, Mapping[str, Any]], copy: float | None, file: Path) -> None:
    """Ratios to the Transformer (the cards' dashed) and decoding's share of `copy`, by context.

    One device above, several below. Needs matplotlib.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        (title, "x Transformer", ratios(rows, what), CARDS[what])
        for what, title in (
            ("decode", "decode throughput, memory full"),
            ("ttft", "time to first token"),
        )
    ]
    if copy:
        panels.append(("decode: what must move, per second", "x copy rate", shares(rows, copy), {}))
    # num_iter hardly matters: in the table
    lines = {line for _, _, line in rows if line[2] in (None, 30)}
    groups = [[x for x in lines if (x[3] > 1) == several] for several in (False, True)]
    groups = [sorted(x, key=lambda x: (len(x[0]), x[3], _place(x))) for x in groups if x]
    contexts = sorted({context for _, context, _ in rows})
    size = (5 * len(panels) + 2, 3.8 * len(groups))
    fig, grid = plt.subplots(len(groups), len(panels), figsize=size, squeeze=False, sharey="col")
    for group, axes in zip(groups, grid, strict=True):
        for ax, (title, unit, values, cards) in zip(axes, panels, strict=True):
            for line in group:
                shape, model, _, tp = line
                style = {1: "o", 2: "s", 4: "D"}.get(tp, "^") + ("-" if shape == "8B" else ":")
                name = f"{shape} {model}" + ("" if tp == 1 else f", {tp} devices")
                points = dict(sorted(values.get(line, {}).items()))  # none: still in the legend
                ax.plot([*points], [*points.values()], style, color=_color(model), label=name)
            for model in cards.keys() & {x[1] for x in group if x[0] == "8B"}:
                ax.plot(CONTEXTS, cards[model], "x--", color=_color(model), alpha=0.6)
            ax.axhline(1, color="grey", linewidth=0.8)
            ax.set(xscale="log", xlabel="context (tokens)", ylabel=unit, title=title)
            ax.set_xticks(contexts, [_short(c) for c in contexts])
            ax.minorticks_off()
        axes[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    fig.text(0.5, 0.01, "dashed: the model cards (8 H200, TP=8)", ha="center", fontsize=8)
    fig.tight_layout(rect=(0, 0.03, 1, 1))
    fig.savefig(file, dpi=100)
    plt.close(fig)


def _place(line: Line) -> tuple[Any, ...]:
    """Where a line stands: by shape, then as in `MODELS`, then by num_iter, the largest first."""
    shape, model, num_iter, tp = line
    return len(shape), shape, MODELS.index(model), -(num_iter or 0), tp


def _color(model: str) -> str:
    return f"C{MODELS.index(model)}"


def _on_card(what: str, line: Line) -> bool:
    shape, model, num_iter, _ = line
    return shape == "8B" and model in CARDS[what] and num_iter in (None, 30)


def _short(context: int) -> str:
    return f"{context // 1024}K" if context % 1024 == 0 else str(context)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.serve_table",
        description=(__doc__ or "").split("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser.add_argument(
        "--out", type=Path, required=True, help="rows (JSON lines); goes on with it"
    )
    parser.add_argument("--shape", choices=("tiny", "8B", "32B"), default="8B")
    parser.add_argument("--models", type=lambda text: text.split(","), default=",".join(MODELS))
    parser.add_argument("--contexts", type=numbers, default=",".join(map(str, CONTEXTS)))
    parser.add_argument("--num-iter", type=numbers, default="30,10,5,1", help="of GKA")
    parser.add_argument("--tp", type=int, default=1, help="devices to split each model over")
    parser.add_argument("--steps", type=int, default=64, help="tokens per decode call")
    parser.add_argument("--chunk", type=int, default=32768, help="tokens per prefill call of ttft")
    parser.add_argument("--memory", type=float, help="GB per device; default: 95%% of JAX's pool")
    parser.add_argument("--ceilings", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument(
        "--measure", action=argparse.BooleanOptionalAction, default=True,
        help="--no-measure: tables and plot of the rows that are there",
    )  # fmt: skip
    args = parser.parse_args(argv)
    if unknown := [m for m in args.models if m not in MODELS]:
        parser.error(f"model {unknown[0]!r} is unknown; choose from {', '.join(MODELS)}")
    return args


if __name__ == "__main__":
    main()
