"""A whole fine-tuning run as one config (a YAML file), and what it would take (a dry run)."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import math
import os
import re
import shutil
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hmf_jax.config import HybridConfig
from hmf_jax.loading import from_pretrained, resolve, save_pretrained
from hmf_jax.memory import size_text
from hmf_jax.model import HybridLM
from hmf_jax.sharding import BATCH_AXES, for_model, make_mesh, row_parts
from hmf_jax.text import load_tokenizer
from hmf_jax.training.checkpoint import Checkpoints
from hmf_jax.training.data import Batches
from hmf_jax.training.optimizer import RECIPES, Recipe
from hmf_jax.training.step import Loss, TrainState, make_train_step
from hmf_jax.training.trainer import (
    data_shard,
    find_not_finite,
    peak_flops,
    train,
    training_flops,
)

# Fields that are passed on as they are.
_DATA = ("column", "template_options", "packing", "overlong", "on_bad", "padding_side")
_DATA += ("shuffle", "seed")
_STEP = ("accumulate", "remat", "max_grad_norm", "num_iter", "impl", "chunk_size")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Recipe):
    """One fine-tuning run: the fields of `Recipe` and these.

    Attributes:
      model: directory or repository of the model to start from, see `from_pretrained`.
      data: a JSONL or Parquet file of texts or chats, or a list of them, see `Batches`.
      output: directory of the run: config.yaml, checkpoints/, metrics.jsonl, loss.png, and at the
        end model/, a Hugging Face directory (and adapter/, with LoRA). A run that is started again
        goes on from its last checkpoint.
      recipe: a name of `RECIPES` whose values hold where the file says nothing.
      dtype: of the model's computations, "bfloat16" or "float32"; what is exported has the dtypes
        of the original.
      master_weights: hold trained parameters in float32.
      lora_rank: train adapters of this rank and nothing else, see `apply_lora` (also for the
        next three); None: no adapters. `trainable` is then "lora", unless it is given.
      lora_alpha, lora_modules, lora_quantize: see `apply_lora`.
      batch_size: rows of one optimizer step, on all devices together; None: one per micro-batch
        and data parallel device.
      column, template_options, packing, on_bad, padding_side, shuffle, seed: of
        `Batches`.
      remat, num_iter, impl, chunk_size: of `make_train_step`.
      dp, fsdp, sp, tp: the mesh, see `make_mesh`; fsdp None: all devices that the others leave.
      distributed: join the other processes of the run (`jax.distributed`): found by itself under
        SLURM, Open MPI and Kubernetes, else described by the variables JAX_COORDINATOR_ADDRESS
        (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID.
      save_every, keep: steps between checkpoints, and how many stay.
      tensorboard: also write the metrics to output/tensorboard (needs google-metrax).
      wandb: also send them to this Weights & Biases project (needs google-metrax and wandb).
      profile: trace three steps into output/profile.
    """

    model: str
    data: str | list[str]
    output: str
    recipe: str | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    master_weights: bool = True
    lora_rank: int | None = None
    lora_alpha: float = 32.0
    lora_modules: str = "proj"
    lora_quantize: Literal["int8", "nf4"] | None = None
    batch_size: int | None = None
    column: str | None = None
    template_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    packing: str = "first_fit"
    on_bad: str = "skip"
    padding_side: str = "right"
    shuffle: bool = True
    seed: int = 0
    remat: str | dict[str, str] = "block"
    num_iter: int | None = None
    impl: str = "auto"
    chunk_size: int = 512
    dp: int = 1
    fsdp: int | None = None
    sp: int = 1
    tp: int = 1
    distributed: bool = False
    save_every: int = 500
    keep: int = 2
    tensorboard: bool = False
    wandb: str | None = None
    profile: bool = False

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Reads a YAML file of these fields; overrides ("learning_rate=1e-5") replace its values.
        One of steps or epochs also replaces the other.

        Raises:
          FileNotFoundError: there is no such file.
          ValueError: not YAML, an unknown field (with the nearest known one), a value of the wrong
            type, or a required field that is missing.
        """
        yaml = _yaml()
        try:
            given = yaml.safe_load(Path(path).read_text())
            if not isinstance(given, Mapping):
                raise ValueError(f"{path} must hold fields, one `name: value` per line")
            values = dict(given)
            for override in overrides:
                name, separator, value = override.partition("=")
                if not separator:
                    raise ValueError(f"{override!r} is no field=value, e.g. learning_rate=1e-5")
                name = name.strip()
                values.pop({"steps": "epochs", "epochs": "steps"}.get(name), None)
                values[name] = yaml.safe_load(value)
        except yaml.YAMLError as e:
            raise ValueError(f"{path}: no YAML: {' '.join(str(e).split())}") from e
        return cls.of(values)

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The config with these values of its fields, those of its recipe, and defaults."""
        known = typing.get_type_hints(cls)
        for name in values:
            if name not in known:
                near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
                hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
                raise ValueError(f"unknown field {name!r}; {hint}")
        recipe = values.get("recipe")
        if recipe is not None and recipe not in RECIPES:
            raise ValueError(f"unknown recipe {recipe!r}; there are {', '.join(RECIPES)}")
        base = {} if recipe is None else dataclasses.asdict(RECIPES[recipe])
        if "steps" in values or "epochs" in values:
            base |= {"steps": None, "epochs": None}  # the length is the file's, not the recipe's
        if values.get("lora_rank") is not None:
            base["trainable"] = "lora"
        merged = {n: _typed(n, v, known[n]) for n, v in {**base, **values}.items()}
        required = [
            f.name for f in dataclasses.fields(cls) if f.default is f.default_factory
        ]  # both MISSING
        if missing := [name for name in required if name not in merged]:
            extra = ", or a recipe" if {"learning_rate", "schedule"} & set(missing) else ""
            raise ValueError(f"missing: {', '.join(missing)}{extra}")
        return cls(**merged)

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give the length of the run: either steps or epochs")
        for name in ("steps", "epochs", "batch_size", "dp", "fsdp", "tp", "save_every", "keep"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")


def fine_tune(
    config: TrainConfig,
    *,
    loss: Loss | None = None,
    progress: bool = True,
    report: Callable[[str], None] = lambda text: None,
) -> Path:
    """Runs a config from its data to the exported model; goes on where a killed run was.

    Args:
      config: what to do.
      loss: of `make_train_step`; None: of the next token.
      progress: show bars.
      report: is told in words what happens (by process 0).

    Returns:
      the directory of the exported model.

    Raises: what `from_pretrained`, `Batches` and `train` raise; ValueError for a mesh that does not
      fit the devices, the model or the batch.
    """
    run = _Run.prepare(config, loss)
    first = jax.process_index() == 0
    report = report if first else lambda text: None
    progress = progress and first
    report(run.describe())
    run.abstract_state()  # finds patterns that select nothing before anything is loaded or written
    output = Path(config.output).expanduser()
    checkpoints = Checkpoints(
        output / "checkpoints", run.model_config, every=config.save_every, keep=config.keep
    )
    if checkpoints.latest is not None:
        report(f"Going on from step {checkpoints.latest}.")
    model = from_pretrained(
        run.source,
        mesh=run.mesh,
        dtype=config.dtype,
        config_overrides=config.config_overrides,
        progress=progress,
    )
    state = TrainState.create(run.adapt(model), run.optimizer, **run.selection)
    del model
    if first:
        (output / "config.yaml").write_text(_yaml().safe_dump(dataclasses.asdict(config)))
    batches = run.batches()
    state = train(
        state,
        run.step,
        batches,
        steps=run.steps,
        checkpoints=checkpoints,
        directory=output,
        loggers=_loggers(config, output) if first else (),
        diagnose=functools.partial(find_not_finite, loss=loss),
        progress=progress,
        profile=config.profile,
    )
    report(_describe_data(batches))
    model = state.model()
    del state
    if jax.process_count() > 1:  # gathered on every host, written by one
        gather = functools.partial(multihost_utils.process_allgather, tiled=True)
        model = jax.tree.map(gather, model)
    if first:
        if config.lora_rank is not None:
            from hmf_jax.training.lora import merge_lora, save_lora

            shutil.rmtree(output / "adapter", ignore_errors=True)  # of an earlier, shorter run
            save_lora(model, output / "adapter")
            model = merge_lora(model)
        save_pretrained(model, output / "model", overwrite=True, progress=progress)
        report(f"Wrote {output / 'model'}.")
    return output / "model"


def plan(config: TrainConfig, *, loss: Loss | None = None) -> str:
    """What a run would do and take, in words: data, trained parameters, memory and cost of a step.

    The step is compiled for the devices of this machine; no weight is loaded, nothing is written.
    """
    run = _Run.prepare(config, loss)
    state = run.abstract_state()
    sharding = None if run.mesh is None else NamedSharding(run.mesh, PartitionSpec(BATCH_AXES))
    batch = {
        name: jax.ShapeDtypeStruct((run.batch_size, config.seq_len), dtype, sharding=sharding)
        for name, dtype in (("tokens", "int32"), ("segment_ids", "int32"), ("loss_mask", "bool"))
    }
    compiled = run.step.lower(state, batch).compile()
    if config.steps is not None:
        next(run.seen)
    return "\n".join(
        [
            run.describe(),
            _describe_data(run.seen),
            *(f"         {problem}" for problem in run.seen.problems[:5]),
            *_describe_parameters(state),
            *_describe_memory(state, compiled.memory_analysis()),
            *_describe_cost(run, state, compiled.cost_analysis()),
        ]
    )


@dataclasses.dataclass
class _Run:
    """What a config means on this machine; made before any weight is loaded."""

    config: TrainConfig
    source: Path
    model_config: HybridConfig
    mesh: Mesh | None
    batch_size: int
    batches: Callable[..., Batches]
    seen: Batches  # has been read to its end if the length depends on the data, else not at all
    steps: int
    optimizer: optax.GradientTransformation
    step: jax.stages.Wrapped

    @classmethod
    def prepare(cls, config: TrainConfig, loss: Loss | None) -> Self:
        if config.distributed and not jax.distributed.is_initialized():
            given = (os.environ.get(f"JAX_{name}") for name in ("NUM_PROCESSES", "PROCESS_ID"))
            count, index = (None if n is None else int(n) for n in given)
            jax.distributed.initialize(num_processes=count, process_id=index)
        source = resolve(config.model)
        model_config = HybridConfig.from_json(source).override(config.config_overrides)
        mesh = for_model(_mesh(config), model_config)
        parts = 1 if mesh is None else row_parts(mesh)
        each = config.accumulate * parts
        batch_size = config.batch_size or each
        if batch_size % each:
            raise ValueError(
                f"batch_size={batch_size} is not a multiple of accumulate x dp x fsdp = "
                f"{config.accumulate} x {parts}"
            )
        index, count = data_shard(mesh)
        make = functools.partial(
            Batches,
            [config.data] if isinstance(config.data, str) else config.data,
            load_tokenizer(source),
            length=config.seq_len,
            batch_size=batch_size // count,
            epochs=config.epochs,
            process_index=index,
            process_count=count,
            **{name: getattr(config, name) for name in _DATA},
        )
        steps, seen = config.steps, make(epochs=config.epochs or 1)
        if steps is None:  # the schedule must know, so all data are read once
            steps = sum(1 for _ in seen)
            if jax.process_count() > 1:
                steps = int(multihost_utils.process_allgather(np.asarray(steps)).max())
        optimizer = config.optimizer(steps)
        options = {name: getattr(config, name) for name in _STEP}
        step = make_train_step(optimizer, loss=loss, **options)
        return cls(
            config, source, model_config, mesh, batch_size, make, seen, steps, optimizer, step
        )

    @property
    def selection(self) -> dict[str, Any]:
        return {"trainable": self.config.trainable, "master_weights": self.config.master_weights}

    def adapt(self, model: HybridLM) -> HybridLM:
        """The model with adapters, if the config wants them."""
        c = self.config
        if c.lora_rank is None:
            return model
        from hmf_jax.training.lora import apply_lora

        return apply_lora(
            model,
            rank=c.lora_rank,
            alpha=c.lora_alpha,
            modules=c.lora_modules,
            quantize=c.lora_quantize,
            seed=c.seed,
        )

    def abstract_state(self) -> TrainState:
        dtype = jnp.dtype(self.config.dtype)
        model = nnx.eval_shape(
            lambda: self.adapt(HybridLM(self.model_config, dtype=dtype, mesh=self.mesh))
        )
        return TrainState.abstract(model, self.optimizer, **self.selection)

    def describe(self) -> str:
        c, device = self.config, jax.devices()[0].device_kind
        shape = (
            "one device"
            if self.mesh is None
            else " x ".join(f"{axis} {n}" for axis, n in self.mesh.shape.items() if n > 1)
        )
        return (
            f"model    {self.source}: {self.model_config.hybrid_override_pattern}\n"
            f"devices  {shape} ({device}), {jax.process_count()} process(es)\n"
            f"length   {self.steps} steps of {self.batch_size} rows of {c.seq_len} tokens, "
            f"{c.accumulate} micro-batch(es) each"
        )


def _yaml() -> Any:
    try:
        import yaml
    except ImportError as e:
        raise ImportError("configs are read with PyYAML: pip install 'hmf-jax[train]'") from e
    return yaml


def _typed(name: str, value: Any, hint: Any) -> Any:
    """The value as a field of this type holds it. (YAML reads 1e-4 as text; has no tuples.)"""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = typing.get_args(hint) if union else (hint,)
    for option in options:
        kind, args = typing.get_origin(option) or option, typing.get_args(option)
        if kind is Literal and value in args or type(value) is kind and kind is not tuple:
            return value
        if kind is tuple and isinstance(value, list | tuple) and len(value) == len(args):
            return tuple(_typed(name, v, a) for v, a in zip(value, args, strict=True))
    if float in options and isinstance(value, int | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError):
            return float(value)
    wanted = [
        " or ".join(map(repr, typing.get_args(o)))
        if typing.get_origin(o) is Literal
        else {type(None): "null", dict: "a mapping"}.get(typing.get_origin(o) or o)
        or (o.__name__ if isinstance(o, type) else str(o))
        for o in options
    ]
    raise ValueError(f"{name} must be {' or '.join(wanted)}, not {value!r}")


def _mesh(config: TrainConfig) -> Mesh | None:
    """The mesh of the config on the devices there are; None for a single device."""
    there = jax.device_count()
    others = config.dp * config.sp * config.tp
    fsdp = max(1, there // others) if config.fsdp is None else config.fsdp
    wanted = others * fsdp
    if wanted > there or (config.fsdp is None and there % others):
        raise ValueError(
            f"dp={config.dp} x fsdp={fsdp} x sp={config.sp} x tp={config.tp} does not fit the "
            f"{there} device(s)"
        )
    if wanted == 1:
        return None
    devices = jax.devices()[:wanted] if jax.process_count() == 1 else jax.devices()
    return make_mesh(dp=config.dp, fsdp=fsdp, sp=config.sp, tp=config.tp, devices=devices)


def _loggers(config: TrainConfig, output: Path) -> list[Any]:
    if not config.tensorboard and config.wandb is None:
        return []
    try:
        from metrax import logging  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise ImportError(
            "tensorboard and wandb need google-metrax: pip install 'hmf-jax[train]'"
        ) from e
    loggers: list[Any] = []
    if config.tensorboard:
        loggers.append(logging.TensorboardBackend(str(output / "tensorboard")))
    if config.wandb is not None:
        loggers.append(logging.WandbBackend(config.wandb, name=output.name))
    return loggers


def _describe_data(batches: Batches) -> str:
    counts = ", ".join(f"{n:,} {name}" for name, n in batches.counts.items())
    return f"data     read by this process: {counts}"


def _describe_parameters(state: TrainState) -> list[str]:
    """Names of the trained parameters, those of all layers in one line."""
    groups: dict[tuple[str, tuple[int, ...]], int] = {}
    for name, p in state.params.items():
        key = re.sub(r"\d+", "*", name, count=1), p.shape
        groups[key] = groups.get(key, 0) + 1
    trained = sum(p.size for p in state.params.values())
    total = trained + sum(p.size for p in state.frozen.values())
    head = f"trained  {len(state.params)} tensors, {trained:,} of {total:,} parameters"
    return [head, *(f"  {n:4d} x {name} {list(s)}" for (name, s), n in sorted(groups.items()))]


def _describe_memory(state: TrainState, analysis: Any) -> list[str]:
    parts = {
        "frozen weights": _bytes(state.frozen),
        "trained weights": _bytes(state.params),
        "optimizer": _bytes(state.opt_state),
        "gradients, activations, workspace": analysis.temp_size_in_bytes,
    }
    float32 = sum(_local_size(p) * 4 for p in state.params.values())
    lines = [f"  {size_text(n):>12}  {name}" for name, n in parts.items()]
    lines[-1] += f" (gradients are {size_text(float32)})"
    total = size_text(sum(parts.values()))
    return ["memory   of one device, as compiled:", *lines, f"  {total:>12}  in all"]


def _bytes(tree: Any) -> int:
    return sum(_local_size(a) * a.dtype.itemsize for a in jax.tree.leaves(tree))


def _local_size(a: Any) -> int:
    return math.prod(a.shape if a.sharding is None else a.sharding.shard_shape(a.shape))


def _describe_cost(run: _Run, state: TrainState, cost: Any) -> list[str]:
    tokens = run.batch_size * run.config.seq_len
    flops = training_flops(state, run.config.seq_len) * tokens
    peak = peak_flops()
    seconds = (
        ""
        if peak is None
        else (f"; {flops / peak / jax.device_count():.2f} s at the peak of the device(s)")
    )
    return [
        f"step     {tokens:,} tokens, {flops:.3g} model FLOPs{seconds}",
        f"         as compiled, per device: {cost.get('flops', math.nan):.3g} FLOPs, "
        f"{size_text(cost.get('bytes accessed', math.nan))} accessed "
        "(XLA counts a loop once and a kernel as nothing)",
    ]
