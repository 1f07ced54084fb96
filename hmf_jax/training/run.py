"""A fine-tuning run, from its config to the exported model."""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from hmf_jax.config import HybridConfig
from hmf_jax.loading import from_pretrained, resolve, save_pretrained
from hmf_jax.model import HybridLM
from hmf_jax.sharding import for_model, make_mesh, row_parts
from hmf_jax.text import load_tokenizer
from hmf_jax.training.batches import Batches
from hmf_jax.training.checkpoint import Checkpoints
from hmf_jax.training.diagnosis import find_not_finite
from hmf_jax.training.loop import data_shard, train
from hmf_jax.training.schema import TrainConfig, yaml_module
from hmf_jax.training.step import Loss, TrainState, make_train_step

# Fields that are passed on as they are, to `Batches` and to `make_train_step`.
_DATA = ("column", "template_options", "packing", "overlong", "on_bad", "padding_side")
_DATA += ("shuffle", "seed")
_STEP = ("accumulate", "remat", "max_grad_norm", "num_iter", "impl", "chunk_size")


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
    run = Run.prepare(config, loss)
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
        (output / "config.yaml").write_text(yaml_module().safe_dump(dataclasses.asdict(config)))
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
    report(describe_data(batches))
    model = state.model()
    del state
    if jax.process_count() > 1:  # gathered on every host, written by one
        gather = functools.partial(multihost_utils.process_allgather, tiled=True)
        model = jax.tree.map(gather, model)
    if first:
        _export(model, output, lora=config.lora_rank is not None, progress=progress)
        report(f"Wrote {output / 'model'}.")
    return output / "model"


def _export(model: HybridLM, output: Path, *, lora: bool, progress: bool) -> None:
    """Writes the adapters if there are any, and the model with the adapters merged."""
    if lora:
        from hmf_jax.training.lora import merge_lora, save_lora

        shutil.rmtree(output / "adapter", ignore_errors=True)  # of an earlier, shorter run
        save_lora(model, output / "adapter")
        model = merge_lora(model)
    save_pretrained(model, output / "model", overwrite=True, progress=progress)


@dataclasses.dataclass
class Run:
    """What a config means on this machine; made before any weight is loaded.

    Attributes:
      config: what it was made from.
      source: directory of the model to start from.
      model_config: its config, with the overrides.
      mesh: the devices; None: one.
      batch_size: rows of a batch, on all processes together.
      batches: makes the data of the run from their beginning.
      seen: such data, read to their end if the length of the run depends on them, else not yet.
      steps: of the whole run.
      optimizer, step: the functions that train.
    """

    config: TrainConfig
    source: Path
    model_config: HybridConfig
    mesh: Mesh | None
    batch_size: int
    batches: Callable[..., Batches]
    seen: Batches
    steps: int
    optimizer: optax.GradientTransformation
    step: jax.stages.Wrapped

    @classmethod
    def prepare(cls, config: TrainConfig, loss: Loss | None) -> Self:
        """Finds what is wrong with a config: raises what `fine_tune` raises. Joins the other
        processes if the config says so."""
        if config.distributed and not jax.distributed.is_initialized():
            _join_processes()
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
        """What to train, as arguments of `TrainState.create`."""
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
        """The state as shapes, dtypes and shardings."""
        dtype = jnp.dtype(self.config.dtype)
        model = nnx.eval_shape(
            lambda: self.adapt(HybridLM(self.model_config, dtype=dtype, mesh=self.mesh))
        )
        return TrainState.abstract(model, self.optimizer, **self.selection)

    def describe(self) -> str:
        """Model, devices and length in words."""
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


def _join_processes() -> None:
    """JAX finds the others under SLURM, Open MPI and Kubernetes; elsewhere the environment says."""
    given = (os.environ.get(f"JAX_{name}") for name in ("NUM_PROCESSES", "PROCESS_ID"))
    count, index = (None if n is None else int(n) for n in given)
    jax.distributed.initialize(num_processes=count, process_id=index)


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


def describe_data(batches: Batches) -> str:
    """How many rows, documents and tokens were read, in words."""
    counts = ", ".join(f"{n:,} {name}" for name, n in batches.counts.items())
    return f"data     read by this process: {counts}"
