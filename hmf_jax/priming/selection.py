"""Layer selection: which attention layers can go. For each layer alone, how good is the model when
that layer only sees a window? The layers that hurt least are the ones to convert.

Scores are kept in the original's CSV: a header `layer_num,<task>,...`, one row per layer, -1 for
the unchanged model, and an empty cell where a task was not run. Beside the CSV that we score lies
a record, scores.csv.json: of which weights, data and settings its scores are. They are used again
for the same ones only.
"""

from __future__ import annotations

import dataclasses
import filecmp
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
from hmf_jax.convert.directories import link, read_json, replacing
from hmf_jax.families import FAMILIES, text_part
from hmf_jax.loading import from_pretrained, resolve
from hmf_jax.mixers import BASE, KINDS, SWAConfig
from hmf_jax.model import HybridLM
from hmf_jax.options import check_int
from hmf_jax.parameters import flat_params, with_params
from hmf_jax.priming.scores import BASELINE, LayerScores, Record, fingerprint
from hmf_jax.priming.scores import read_scores as read_scores
from hmf_jax.priming.scores import write_scores as write_scores
from hmf_jax.text import load_tokenizer
from hmf_jax.training.batches import Batches
from hmf_jax.training.loss import next_token_loss

WINDOW = 2048  # the original's default


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
      FileExistsError: a variant of other settings or of another base is in the way.
      ValueError: a layer that is not full attention, or a family without windows in the original.
    """
    source, target = Path(source).expanduser().resolve(), Path(target).expanduser()
    if source in (target.resolve(), *target.resolve().parents):
        raise FileExistsError(f"{target} lies in the base, {source}; choose another directory")
    config = HybridConfig.from_json(source)
    if not any(source.glob("model*.safetensors")):
        raise FileNotFoundError(f"{source} holds no model*.safetensors to link to")
    if "SWA" in FAMILIES[config.family].unreadable:
        raise ValueError(
            f"the original has no SWA layers in {FAMILIES[config.family].hybrid} models, so it "
            "cannot evaluate variants; score them here (score_layers, or --data)"
        )
    chosen = attention_layers(config) if layers is None else list(layers)
    stored = text_part(read_json(source / "config.json"), [])
    dtype = {key: stored[key] for key in ("dtype", "torch_dtype") if key in stored}
    data = {}
    for i in chosen:
        written = _variant_config(config, i, window).to_dict()
        del written["dtype"]
        data[i] = written | dtype
        file = target / f"layer_{i}" / "config.json"
        if file.is_file():
            _check_variant(file.parent, source, data[i])
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
    identity: Any = None,
    done: Callable[[int], object] = lambda layer: None,
) -> LayerScores:
    """Scores the model and its `swa_variant` of every layer.

    Args:
      model: the base.
      score: task -> score (higher is better, finite) of a model, e.g. `likelihood(batches)`.
      file: the CSV; it may hold other tasks already. It and its record are written after each
        layer, and layers that the record holds are not scored again.
      window: of the limited layer, in tokens.
      layers: default all that are full attention.
      identity: what the scores depend on besides the model and the window, as JSON can hold it;
        default: `score.identity` if there is one. Recorded scores of another one are refused.
      done: called with each layer that was scored (-1: the unchanged model).

    Raises:
      FileExistsError: recorded scores of other weights, data or settings, or a column of this task
        that no record knows; what differs is named.
      ValueError: layers that are not full attention, scores that are not finite, or damaged files.
    """
    chosen = attention_layers(model.config) if layers is None else list(layers)
    for i in chosen:
        _variant_config(model.config, i, window)
    identity = getattr(score, "identity", None) if identity is None else identity
    record = Record.open(file, _identity(model, window, identity))
    record.check_columns(getattr(score, "tasks", ()))
    for i in [BASELINE, *chosen]:
        if i in record.rows:
            continue
        scored = score(model if i == BASELINE else swa_variant(model, i, window))
        found = {task: float(x) for task, x in scored.items()}
        bad = [f"{task} is {x}" for task, x in found.items() if not math.isfinite(x)]
        if bad or not found:
            where = "the base" if i == BASELINE else f"layer {i}"
            raise ValueError(f"{where}: {', '.join(bad) or 'no score'}; nothing added to {file}")
        record.add(i, found)
        done(i)
    return record.write()


class Likelihood:
    """See `likelihood`. `identity` is a fingerprint of the batches."""

    tasks = ("log_likelihood",)

    def __init__(self, batches: Iterable[Mapping[str, Any]]) -> None:
        self._kept = [{k: jnp.asarray(a) for k, a in batch.items()} for batch in batches]
        if not self._kept:
            raise ValueError("there are no batches to score with.")
        flat = {f"{i}.{k}": a for i, batch in enumerate(self._kept) for k, a in batch.items()}
        self.identity = {"data": fingerprint(flat)}
        self._loss = jax.jit(lambda model, batch: next_token_loss(model, **batch))

    def __call__(self, model: HybridLM) -> dict[str, float]:
        """Its score, of all batches together."""
        sums = [self._loss(model, batch) for batch in self._kept]
        total, count = (sum(float(pair[n]) for pair in sums) for n in (0, 1))
        return {"log_likelihood": -total / count}


def likelihood(batches: Iterable[Mapping[str, Any]]) -> Likelihood:
    """A score for `score_layers`: "log_likelihood", the mean of log p(token) in nats.

    Args:
      batches: as for `make_train_step`; they are kept, and every model reads all of them.
    """
    return Likelihood(batches)


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
      data: texts or chats, see `hmf_jax.training.Batches`.
      file: the CSV, see `score_layers`.
      length: tokens per row; rows: how many rows are scored, fewer if the data end.
      window: of the limited layer, in tokens.
      dtype: of the model.
      progress: show bars.
      report: is told of each layer that was scored.

    Raises: what `from_pretrained`, `Batches` and `score_layers` raise.
    """
    check_int("rows", rows, 1)
    directory = resolve(base, progress=progress)
    attention_layers(HybridConfig.from_json(directory))
    tokenizer = load_tokenizer(directory)
    batches = Batches([str(data)], tokenizer, length=length, batch_size=1, epochs=1, shuffle=False)
    score = likelihood(itertools.islice(batches, rows))
    model = from_pretrained(directory, dtype=dtype, progress=progress)

    def done(layer: int) -> None:
        report(f"scored {'the base' if layer < 0 else f'layer {layer}'}")

    return score_layers(model, score, file, window=window, done=done)


def select_layers(
    scores: LayerScores,
    m: int = 14,
    *,
    num_layers: int | None = None,
    layers: Iterable[int] | None = None,
    exclude_layer_0: bool = False,
    task_filter: str | None = None,
) -> Selection:
    """The m layers with the highest mean score.

    Args:
      scores: one row per layer; the baseline does not take part.
      m: layers to convert (the original: 18 of 36 for 8B, 32 of 64 for 32B).
      num_layers: of the model; default as many as the highest layer says.
      layers: which can be chosen, where not all are attention; default all.
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
    candidates = [i for i in range(count) if layers is None or i in set(layers)]
    candidates = [i for i in candidates if i > 0 or not exclude_layer_0]
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


def describe(
    chosen: Selection, num_layers: int, kind: str, base: Sequence[str] | None = None
) -> str:
    """A text: the ranking, a tie if there is one, the chosen layers, and the fused pattern.

    `base`: see `pattern`.
    """
    lines = [
        f"{layer:5d}  {mean:10.4f}{'  chosen' if layer in chosen.layers else ''}"
        for layer, mean in chosen.ranking
    ]
    if chosen.tie is not None:
        lines.append(f"tie: {chosen.tie}.")
    lines.append(f"layers: {','.join(map(str, chosen.layers))}")
    lines.append(f"pattern: {pattern(chosen.layers, num_layers, kind, base=base)}")
    return "\n".join(lines)


def pattern(
    layers: Iterable[int],
    num_layers: int,
    kind: str,
    *,
    fused: bool = True,
    base: Sequence[str] | None = None,
) -> str:
    """The pattern that converts these layers: "GKA*" and "*DA", or unfused "GKA" and "*".

    `base`: the symbols of a base whose layers are not all attention. Others become "GDN>GKA", or
    stay as they are.
    """
    chosen = set(layers)
    if outside := sorted(i for i in chosen if not 0 <= i < num_layers):
        raise ValueError(f"layers {outside} are not among the {num_layers} of the model")
    if kind not in KINDS or kind == BASE:
        raise ValueError(f"kind {kind!r} is unknown; use one of {', '.join(set(KINDS) - {BASE})}")

    def symbol(layer: int) -> str:
        old = BASE if base is None else base[layer]
        if layer not in chosen:
            return f"{old}DA" if fused and old == BASE else old
        if not fused:
            return kind
        return f"{kind}{old}" if old == BASE else f"{old}>{kind}"

    return "-".join(map(symbol, range(num_layers)))


def attention_layers(config: HybridConfig) -> list[int]:
    """The layers that are full attention, and can be converted."""
    return [i for i, kind in enumerate(config.layer_kinds) if kind == BASE]


def _identity(model: HybridLM, window: int, score: Any) -> dict[str, Any]:
    """What scores of a model depend on, as JSON holds it."""
    identity = {
        "base weights": fingerprint(flat_params(model)),
        "config": model.config.to_dict(),
        "window": window,
        **(score if isinstance(score, Mapping) else {"score": score}),
    }
    return json.loads(json.dumps(identity))


def _check_variant(directory: Path, source: Path, config: dict[str, Any]) -> None:
    """Raises FileExistsError unless this is the variant of the base that is to be written."""
    if read_json(directory / "config.json") != config:
        raise FileExistsError(f"{directory} is a variant of other settings; remove it")
    for file in source.glob("model*.safetensors"):
        other = directory / file.name
        if not other.is_file() or not (
            other.samefile(file) or filecmp.cmp(other, file, shallow=False)
        ):
            raise FileExistsError(f"{directory} is a variant of another base; remove it")


def _variant_config(config: HybridConfig, layer: int, window: int) -> HybridConfig:
    if layer not in attention_layers(config):
        raise ValueError(
            f"layer {layer} is not full attention; choose among {attention_layers(config)}"
        )
    if "SWA" in config.student_kinds and config.swa != SWAConfig(window):
        raise ValueError(
            f"the base has SWA layers already, {config.swa}; use that window for the variants"
        )
    kinds = tuple("SWA" if i == layer else kind for i, kind in enumerate(config.layer_kinds))
    return dataclasses.replace(config, layer_kinds=kinds, swa=SWAConfig(window), stock=None)
