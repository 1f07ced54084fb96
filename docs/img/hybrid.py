"""Draws hybrid.png of the README from benchmarks/results: `python docs/img/hybrid.py`."""

from __future__ import annotations

import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks.serve_table import CARDS, CONTEXTS, ratios, read  # noqa: E402

INK, PALE = "#26323d", "#8a97a3"
ATTENTION, KALMAN, BMOJO = "#4878a8", "#d9772b", "#7a5aa6"
LAYERS, CONVERTED, HEADS, KV_HEADS, DIM = 36, 18, 32, 8, 128  # Qwen3-8B, half of it converted


def layers(ax) -> None:
    """A column of layers: caches grow to the right with the text, states do not."""
    kinds = ["attention", "GKA"] * 3
    for i, kind in enumerate(kinds):
        color = ATTENTION if kind == "attention" else KALMAN
        ax.add_patch(Rectangle((0, i), 2.6, 0.74, facecolor=color, edgecolor="none"))
        ax.text(1.3, i + 0.36, kind, color="white", ha="center", va="center", fontsize=9)
        if kind == "attention":
            for t in range(12):
                box = Rectangle((2.9 + 0.42 * t, i + 0.1), 0.3, 0.54, facecolor=color)
                box.set_alpha(0.75 if t < 9 else 0.3)
                ax.add_patch(box)
            ax.text(8.05, i + 0.36, "…", color=color, va="center", fontsize=12)
        else:
            box = Rectangle((2.9, i + 0.02), 0.9, 0.7, facecolor=color, alpha=0.75)
            ax.add_patch(box)
    ax.text(2.9, 6.35, "keys and values: one more per token", color=ATTENTION, fontsize=8.5)
    ax.text(
        4.1,
        5.36,
        "two 128 × 128 matrices per head, always",
        color=KALMAN,
        fontsize=8.5,
        va="center",
    )
    ax.annotate("", (1.3, 6.9), (1.3, 6.0), arrowprops={"arrowstyle": "->", "color": PALE})
    ax.set(xlim=(-0.2, 9), ylim=(-0.2, 7), title="A hybrid: half of the layers keep a state")
    ax.axis("off")


def memory(ax) -> None:
    """GB that one sequence holds: bfloat16 keys and values, float32 states."""
    lengths = [n * 1024 for n in (0, 16, 32, 64, 128)]
    cache = 2 * 2 * KV_HEADS * DIM / 1e9  # of one token and layer
    states = CONVERTED * HEADS * 2 * DIM * DIM * 4 / 1e9
    for name, color, values in (
        ("Qwen3-8B", ATTENTION, [n * LAYERS * cache for n in lengths]),
        ("GKA", KALMAN, [n * (LAYERS - CONVERTED) * cache + states for n in lengths]),
    ):
        ax.plot([n / 1024 for n in lengths], values, color=color, linewidth=2)
        ax.text(
            112,
            values[-1] - 1.2 if name == "GKA" else values[-1],
            name,
            color=color,
            ha="right",
            va="bottom",
        )
    ax.set(title="Memory of one sequence", xlabel="context, K tokens", ylabel="GB")
    ax.set(xlim=(0, 130), ylim=(0, 22), xticks=(0, 32, 64, 96, 128), yticks=(0, 5, 10, 15, 20))


def throughput(ax) -> None:
    """Decoding with the memory full, over Qwen3-8B: measured on one H200, and the model cards."""
    rows = read(ROOT / "benchmarks" / "results" / "2026-11-22-h200.jsonl", steps=64)
    measured = ratios(rows, "decode")
    places = range(len(CONTEXTS))
    ax.axhline(1, color=ATTENTION, linewidth=2)
    ax.text(3, 1.03, "Qwen3-8B", color=ATTENTION, ha="right", va="bottom")
    for model, name, color, above in (
        ("GKA", "GKA", KALMAN, True),
        ("BMF", "B'MOJO-F", BMOJO, False),
    ):
        line = measured["8B", model, 30, 1]
        values = [line[context] for context in CONTEXTS]
        ax.plot(places, values, "o-", color=color, linewidth=2, markersize=4)
        ax.plot(places, CARDS["decode"][model], "--", color=color, linewidth=1.2, alpha=0.7)
        at = (1, values[1] + 0.09) if above else (1, values[1] - 0.2)
        ax.text(*at, name, color=color, ha="center", va="bottom")
    ax.set_xticks(places, [f"{c // 1024}" for c in CONTEXTS])
    ax.set(title="Decoding, memory full", xlabel="context, K tokens")
    ax.set(ylabel="times Qwen3-8B's", ylim=(0.6, 2.4), xlim=(-0.15, 3.15))
    style = {"color": PALE, "linewidth": 1.6}
    handles = [Line2D([], [], marker="o", markersize=4, **style), Line2D([], [], ls="--", **style)]
    names = ["this library, one H200", "original (its model cards, 8 H200)"]
    ax.legend(
        handles, names, frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, -0.02)
    )


def main() -> None:
    plt.rcParams.update(
        {
            "font.size": 9,
            "axes.titlesize": 10.5,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": PALE,
            "axes.labelcolor": INK,
            "text.color": INK,
            "xtick.color": INK,
            "ytick.color": INK,
        }
    )
    fig, axes = plt.subplots(1, 3, figsize=(11.4, 3.2), width_ratios=(1.25, 0.8, 1.15))
    for draw, ax in zip((layers, memory, throughput), axes, strict=True):
        draw(ax)
    fig.tight_layout(w_pad=2)
    fig.savefig(Path(__file__).with_suffix(".png"), dpi=150, facecolor="white")


if __name__ == "__main__":
    main()
