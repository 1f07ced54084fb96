"""Layer selection: which attention layers can go. For each layer alone, how good is the model when
that layer only sees a window? The layers that hurt least are the ones to convert.

Scores are kept in the original's CSV: a header `layer_num,<task>,...`, one row per layer, -1 for
the unchanged model, and an empty cell where a task was not run.
"""

from __future__ import annotations

import csv
import dataclasses
import itertools
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from hmf_jax.config import HybridConfig
from hmf_jax.convert.directories import link, replacing
from hmf_jax.families import FAMILIES
from hmf_jax.loading import from_pretrained, resolve
from hmf_jax.mixers import BASE, SWAConfig
from hmf_jax.model import HybridLM
from hmf_jax.parameters import flat_params, with_params
from hmf_jax.text import load_tokenizer
from hmf_jax.training.batches import Batches
from hmf_jax.training.loss import next_token_loss

WINDOW = 2048  # the original's default
BASELINE = -1
_METADATA = ("layer_num", "layer_type", "n_runs", "codename", "window_size", "model")


@dataclasses.dataclass(frozen=True)
class LayerScores:
    """Scores, higher is better: layer -> task -> score; layer -1 is the unchanged model.

    `tasks` are all columns in their order. A layer may lack some tasks, not all.
    """

    tasks: tuple[str, ...]
    rows: Mapping[int, Mapping[str, float]]


@dataclasses.dataclass(frozen=True)
class Selection:
    """The layers to convert, ascending, and what they were chosen by.

    Attributes:
      layers: the chosen ones.
      ranking: (layer, mean score), best first.
      tie: what decided between equal scores at the edge of the choice; None if nothing had to.
    """

    layers: tuple[int, ...]
    ranking: tuple[tuple[int, float], ...]
    tie: str | None


def swa_variant(model: HybridLM, layer: int, window: int = WINDOW) -> HybridLM:
    """The model with one attention layer limited to a window. It shares all arrays with it.

    Raises ValueError if that layer is not full attention.
    """
    config = _variant_config(model.config, layer, window)
    new = nnx.eval_shape(lambda: HybridLM(config, dtype=model.dtype, mesh=model.mesh))
    new = with_params(new, flat_params(model))
    new.source = model.source
    return new


def write_swa_variants(
    source: str | Path,
    target: str | Path,
    *,
    window: int = WINDOW,
    layers: Sequence[int] | None = None,
) -> list[Path]:
    """A Hugging Face directory per layer, target/layer_<i>: links to the base and another config.

    The links are hard ones, so that no directory depends on a name outside of it; on another file
    system they are copies.

    Directories that are already there stay, so that an interrupted call can be repeated. The
    weights keep their names (`self_attn` in a layer that is now SWA), as in the original.

    Args:
      source: a local Hugging Face directory.
      target: the directory for the variants.
      window: of the limited layer, in tokens.
      layers: default all that are full attention.

    Returns:
      the directories, in the order of the layers.

    Raises:
      FileNotFoundError: source is no such directory.
      FileExistsError: a variant of other settings is in the way.
      ValueError: a layer that is not full attention.
    """
    source, target = Path(source).expanduser().resolve(), Path(target).expanduser()
    config = HybridConfig.from_json(source)
    if not any(source.glob("model*.safetensors")):
        raise FileNotFoundError(f"{source} holds no model*.safetensors to link to")
    chosen = _attention_layers(config) if layers is None else list(layers)
    kinds = {i: _variant_config(config, i, window).layer_kinds for i in chosen}
    stored = json.loads((source / "config.json").read_text(encoding="utf-8"))
    family, data = FAMILIES[config.family], {}
    for i in chosen:
        data[i] = stored | {
            "architectures": [family.architectures[0]],
            "model_type": family.hybrid,
            "hybrid_override_pattern": "-".join(kinds[i]),
            "swa_config": {"window_size": window},
        }
        file = target / f"layer_{i}" / "config.json"
        if file.is_file() and json.loads(file.read_text(encoding="utf-8")) != data[i]:
            raise FileExistsError(f"{file.parent} is a variant of other settings; remove it")
    for i in chosen:
        directory = target / f"layer_{i}"
        if (directory / "config.json").is_file():
            continue
        with replacing(directory, overwrite=False) as tmp:
            for file in source.iterdir():
                if file.name != "config.json":
                    link(file.resolve(), tmp / file.name)
            text = json.dumps(data[i], indent=2) + "\n"
            (tmp / "config.json").write_text(text, encoding="utf-8")
    return [target / f"layer_{i}" for i in chosen]


def score_layers(
    model: HybridLM,
    score: Callable[[HybridLM], Mapping[str, float]],
    file: str | Path,
    *,
    window: int = WINDOW,
    layers: Sequence[int] | None = None,
    done: Callable[[int], object] = lambda layer: None,
) -> LayerScores:
    """Scores the model and its `swa_variant` of every layer.

    Args:
      model: the base.
      score: task -> score (higher is better) of a model, e.g. `likelihood(batches)`.
      file: the CSV, written after each layer; layers that it holds already are not scored again.
      window: of the limited layer, in tokens.
      layers: default all that are full attention.
      done: called with each layer that was scored (-1: the unchanged model).

    Raises:
      ValueError: layers that are not full attention, or a file that is not such a CSV.
    """
    chosen = _attention_layers(model.config) if layers is None else list(layers)
    for i in chosen:
        _variant_config(model.config, i, window)
    file = Path(file)
    scores = read_scores(file) if file.is_file() else LayerScores((), {})
    for i in [BASELINE, *chosen]:
        if i in scores.rows:
            continue
        found = dict(score(model if i == BASELINE else swa_variant(model, i, window)))
        tasks = (*scores.tasks, *(t for t in found if t not in scores.tasks))
        scores = LayerScores(tasks, {**scores.rows, i: found})
        write_scores(scores, file)
        done(i)
    return scores


def likelihood(batches: Iterable[Mapping[str, Any]]) -> Callable[[HybridLM], dict[str, float]]:
    """A score for `score_layers`: "log_likelihood", the mean of log p(token) in nats.

    Args:
      batches: as for `make_train_step`; they are kept, and every model reads all of them.
    """
    kept = [{k: jnp.asarray(a) for k, a in batch.items()} for batch in batches]
    if not kept:
        raise ValueError("there are no batches to score with.")
    loss = jax.jit(lambda model, batch: next_token_loss(model, **batch))

    def score(model: HybridLM) -> dict[str, float]:
        sums = [loss(model, batch) for batch in kept]
        total, count = (sum(float(pair[n]) for pair in sums) for n in (0, 1))
        return {"log_likelihood": -total / count}

    return score


def score_directory(
    base: str | Path,
    data: str | Path,
    file: str | Path,
    *,
    length: int = 8192,
    rows: int = 16,
    window: int = WINDOW,
    dtype: Any = jnp.bfloat16,
    progress: bool = True,
    report: Callable[[str], object] = lambda text: None,
) -> LayerScores:
    """`score_layers` from files: adds the log-likelihood of the data to a CSV of scores.

    Args:
      base: directory or repository of the model.
      data: a JSONL or Parquet file of texts or chats, see `hmf_jax.training.Batches`.
      file: the CSV, see `score_layers`.
      length: tokens per row; rows: how many rows are scored.
      window: of the limited layer, in tokens.
      dtype: of the model.
      progress: show bars.
      report: is told of each layer that was scored.

    Raises: what `from_pretrained`, `Batches` and `score_layers` raise.
    """
    directory = resolve(base, progress=progress)
    tokenizer = load_tokenizer(directory)
    batches = Batches([str(data)], tokenizer, length=length, batch_size=1, epochs=1, shuffle=False)
    score = likelihood(itertools.islice(batches, rows))
    model = from_pretrained(directory, dtype=dtype, progress=progress)

    def done(layer: int) -> None:
        report(f"scored {'the base' if layer < 0 else f'layer {layer}'}")

    return score_layers(model, score, file, window=window, done=done)


def read_scores(file: str | Path) -> LayerScores:
    """Reads a CSV of scores.

    Raises:
      FileNotFoundError: there is none.
      ValueError: no layer_num column, no tasks, or a line that cannot be read, by number.
    """
    file = Path(file)
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist; pass a CSV of layer scores")
    with file.open(newline="", encoding="utf-8") as f:
        reader = csv.DictReader(f)
        columns = [name for name in reader.fieldnames or () if name]
        tasks = tuple(name for name in columns if name not in _METADATA)
        if "layer_num" not in columns or not tasks:
            raise ValueError(
                f"{file}: the header must be layer_num,<task>,..., found {','.join(columns)!r}"
            )
        rows: dict[int, dict[str, float]] = {}
        for line in reader:
            where = f"{file}, line {reader.line_num}"
            try:
                layer = int(line["layer_num"])
                cells = {t: (line[t] or "").strip() for t in tasks}
                values = {t: float(text) for t, text in cells.items() if text}
            except (TypeError, ValueError) as e:
                raise ValueError(f"{where}: {e}; layers are integers, scores numbers") from e
            if layer in rows:
                raise ValueError(f"{where}: layer {layer} is there twice")
            if bad := [t for t, x in values.items() if not math.isfinite(x)]:
                raise ValueError(f"{where}: {', '.join(bad)} is not finite; leave the cell empty")
            rows[layer] = values
    return LayerScores(tasks, rows)


def write_scores(scores: LayerScores, file: str | Path) -> None:
    """Writes the CSV that `read_scores` and the original read; replaces it at once."""
    file = Path(file)
    file.parent.mkdir(parents=True, exist_ok=True)
    tmp = file.with_name(f".{file.name}.tmp")
    with tmp.open("w", newline="", encoding="utf-8") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerow(["layer_num", *scores.tasks])
        for layer, row in scores.rows.items():
            writer.writerow([layer, *(row.get(task, "") for task in scores.tasks)])
    tmp.replace(file)


def select_layers(
    scores: LayerScores,
    m: int = 14,
    *,
    num_layers: int | None = None,
    exclude_layer_0: bool = False,
    task_filter: str | None = None,
) -> Selection:
    """The m layers with the highest mean score.

    Args:
      scores: one row per layer; the baseline does not take part.
      m: layers to convert (the original: 18 of 36 for 8B, 32 of 64 for 32B).
      num_layers: of the model; default as many as the highest layer says.
      exclude_layer_0: never choose the first layer.
      task_filter: only tasks whose name contains this.

    Equal scores keep the order of the rows, as in the original; `Selection.tie` says so where it
    mattered.

    Raises:
      ValueError: layers that are missing or have no score, no task that fits, too large an m.
    """
    tasks = [t for t in scores.tasks if task_filter is None or task_filter in t]
    if not tasks:
        raise ValueError(
            f"no task contains {task_filter!r}; the tasks are {', '.join(scores.tasks)}"
        )
    rows = {i: row for i, row in scores.rows.items() if i >= 0}
    count = max(rows, default=-1) + 1 if num_layers is None else num_layers
    if foreign := sorted(i for i in rows if i >= count):
        raise ValueError(f"the model has {count} layers, but there are scores of {foreign}")
    candidates = [i for i in range(count) if i > 0 or not exclude_layer_0]
    if missing := [i for i in candidates if i not in rows]:
        raise ValueError(
            f"no row for layers {missing} (of {count}); score them too, a layer without a score "
            "cannot be ranked"
        )
    means: dict[int, float] = {}
    for i, row in rows.items():
        values = [row[t] for t in tasks if t in row]
        if i in candidates and not values:
            raise ValueError(f"layer {i} has no score in {', '.join(tasks)}")
        if i in candidates:
            means[i] = sum(values) / len(values)
    if not 1 <= m <= len(means):
        raise ValueError(f"m={m}: choose between 1 and {len(means)} layers")
    ranking = sorted(means.items(), key=lambda pair: -pair[1])
    taken, left = ranking[:m], ranking[m:]
    edge = taken[-1][1]
    tie = None
    if left and left[0][1] == edge:
        first = [i for i, x in taken if x == edge]
        other = [i for i, x in left if x == edge]
        tie = (
            f"layers {first + other} share the score {edge:g}; "
            f"{first} were taken because their rows come first"
        )
    return Selection(tuple(sorted(i for i, _ in taken)), tuple(ranking), tie)


def describe(chosen: Selection, num_layers: int, kind: str) -> str:
    """A text: the ranking, a tie if there is one, the chosen layers, and the fused pattern."""
    lines = [
        f"{layer:5d}  {mean:10.4f}{'  chosen' if layer in chosen.layers else ''}"
        for layer, mean in chosen.ranking
    ]
    if chosen.tie is not None:
        lines.append(f"tie: {chosen.tie}.")
    lines.append(f"layers: {','.join(map(str, chosen.layers))}")
    lines.append(f"pattern: {pattern(chosen.layers, num_layers, kind)}")
    return "\n".join(lines)


def pattern(layers: Iterable[int], num_layers: int, kind: str, *, fused: bool = True) -> str:
    """The pattern that converts these layers: "GKA*" and "*DA", or unfused "GKA" and "*"."""
    chosen = set(layers)
    if outside := sorted(i for i in chosen if not 0 <= i < num_layers):
        raise ValueError(f"layers {outside} are not among the {num_layers} of the model")
    new, old = (f"{kind}*", "*DA") if fused else (kind, "*")
    return "-".join(new if i in chosen else old for i in range(num_layers))


def _attention_layers(config: HybridConfig) -> list[int]:
    return [i for i, kind in enumerate(config.layer_kinds) if kind == BASE]


def _variant_config(config: HybridConfig, layer: int, window: int) -> HybridConfig:
    if layer not in _attention_layers(config):
        raise ValueError(
            f"layer {layer} is not full attention; choose among {_attention_layers(config)}"
        )
    if "SWA" in config.student_kinds and config.swa != SWAConfig(window):
        raise ValueError(
            f"the base has SWA layers already, {config.swa}; use that window for the variants"
        )
    kinds = tuple("SWA" if i == layer else kind for i, kind in enumerate(config.layer_kinds))
    return dataclasses.replace(config, layer_kinds=kinds, swa=SWAConfig(window), stock=None)
