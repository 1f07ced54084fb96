"""A fine-tuning run, from its config to the exported model."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from hmf_jax.config import HybridConfig
from hmf_jax.loading import from_pretrained, resolve, save_pretrained
from hmf_jax.model import HybridLM
from hmf_jax.sharding import BATCH_AXES, for_model, row_parts
from hmf_jax.text import load_tokenizer
from hmf_jax.training.batches import Batches
from hmf_jax.training.checkpoint import Checkpoints, of_all_processes
from hmf_jax.training.devices import device_limit, join_processes, mesh_for
from hmf_jax.training.diagnosis import find_not_finite
from hmf_jax.training.evaluation import Evaluation
from hmf_jax.training.identity import (
    ADAPTER,
    CHECKPOINTS,
    MODEL,
    WRITES,
    Record,
    check_output,
    data_files,
    depends_on_length,
    fields_compared,
    fingerprint,
    forget,
    refusal,
    tokenizer_identity,
    weight_files,
    write_atomically,
)
from hmf_jax.training.loop import data_shard, holding, train
from hmf_jax.training.loss import aux_coef
from hmf_jax.training.memory import StepMemory, fit, plan_memory
from hmf_jax.training.remat import AUTO, check_remat
from hmf_jax.training.report import loggers
from hmf_jax.training.schema import TrainConfig, yaml_module
from hmf_jax.training.signals import stopping_at_once
from hmf_jax.training.step import Loss, TrainState, make_train_step

# Fields that are passed on as they are, to `Batches` and to `make_train_step`.
_DATA = ("column", "template_options", "max_row_bytes", "packing", "overlong", "on_bad")
_DATA += ("padding_side", "shuffle", "seed")
_STEP = ("accumulate", "max_grad_norm", "num_iter", "impl", "chunk_size")
_STEP += ("router_aux_loss_coef",)


def fine_tune(
    config: TrainConfig,
    *,
    loss: Loss | None = None,
    progress: bool = True,
    report: Callable[[str], None] = lambda text: None,
    lines: bool | None = None,
    overwrite: bool = False,
) -> Path:
    """Runs a config from its data to the exported model; goes on where a killed run was.

    Args:
      config: what to do.
      loss: of `make_train_step`; None: of the next token. It is not compared when a run goes on.
      progress: show bars.
      report: is told in words what happens (by process 0).
      lines: also report the metrics, a line every `log_every` steps; None: where no bar is shown.
      overwrite: begin anew where another run was: its checkpoints are removed, and in the end its
        model is replaced.

    Returns:
      the directory of the exported model.

    Raises: what `from_pretrained`, `Batches` and `train` raise; TypeError for another config;
      ValueError for a mesh that does not fit the devices, the model or the batch, an output that
      holds what the run reads, and inputs that differ from those that the run began with;
      FileExistsError for an output that holds what no run wrote. The latter before any work.
    """
    run = Run.prepare(config, loss, alone=True)
    first = jax.process_index() == 0
    report = report if first else lambda text: None
    progress = progress and first
    report(run.describe())
    report(describe_source(run.seen))
    planned = run.abstract_state()  # finds bad patterns before anything is loaded or written
    output = Path(config.output).expanduser()
    checkpoints = Checkpoints(
        output / CHECKPOINTS, run.model_config, every=config.save_every, keep=config.keep
    )
    with stopping_at_once(checkpoints.describe), holding(output):
        evaluate = run.evaluation(loss)
        identity = run.identity() if first else {}
        record = _begin(run, identity, checkpoints, overwrite, report)
        remat, _ = run.fit(planned, None if record is None else record.remat, report)
        if record is not None and config.remat == AUTO:
            record.remat = list(remat)
            record.save()
        model = from_pretrained(
            run.source,
            mesh=run.mesh,
            dtype=config.dtype,
            config_overrides=config.config_overrides,
            progress=progress,
        )
        state = TrainState.create(run.adapt(model), run.optimizer, **run.selection)
        del model
        batches = run.batches()
        state = train(
            state,
            run.make_step(remat=remat),
            batches,
            steps=run.steps,
            checkpoints=checkpoints,
            directory=output,
            loggers=loggers(config, output) if first else (),
            diagnose=functools.partial(find_not_finite, loss=loss),
            evaluate=evaluate,
            eval_every=config.eval_every or config.save_every,
            progress=progress,
            say=report if (not progress if lines is None else lines) else None,
            log_every=config.log_every,
            profile=config.profile,
        )
        report(describe_data(batches))
        state = _chosen(state, checkpoints, config.export, report)
        model = state.model()
        del state
        if jax.process_count() > 1:  # gathered on every host, written by one
            gather = functools.partial(multihost_utils.process_allgather, tiled=True)
            model = jax.tree.map(gather, model)
        if record is not None:
            _export(model, record, lora=config.lora_rank is not None, progress=progress)
            report(f"Wrote {output / MODEL}.")
    return output / MODEL


def _begin(
    run: Run,
    identity: dict[str, Any],
    checkpoints: Checkpoints,
    overwrite: bool,
    report: Callable[[str], None],
) -> Record | None:
    """The record of the run, which goes on or begins; None if this is not the first process.

    Raises ValueError on all processes if it is another run than the one that is there.
    """
    problem, record, output = None, None, Path(run.config.output).expanduser()
    done = None if overwrite else checkpoints.latest
    if jax.process_index() == 0:
        try:
            check_output(output, run.inputs(), run.writes())  # again, now that it is ours alone
            old = Record.load(output)
            changes = [] if old is None or overwrite else old.changes(identity, done)
            if old is not None and changes and (done is not None or old.wrote):
                raise ValueError(refusal(old, changes))
            if old is not None and (overwrite or changes):
                forget(old)
            record = Record(output, identity, {} if old is None else old.wrote)
            record.save()
            values = yaml_module().safe_dump(dataclasses.asdict(run.config), sort_keys=False)
            write_atomically(output / "config.yaml", values)
        except (ValueError, OSError) as e:
            if jax.process_count() == 1:
                raise
            problem = str(e)
    if problem := (of_all_processes([problem]) or [[None]])[0][0]:
        raise ValueError(problem)
    for text in checkpoints.problems:
        report(f"Passed over: {text}.")
    checkpoints.problems.clear()
    if checkpoints.latest is not None:
        report(f"Going on from step {checkpoints.latest}.")
    return record


def _chosen(
    state: TrainState, checkpoints: Checkpoints, export: str, report: Callable[[str], None]
) -> TrainState:
    """The state that is to be exported."""
    best = checkpoints.best
    if best is None:
        return state
    where = checkpoints.directory / str(best.step)
    report(f"The smallest validation loss is {best.loss:.4g}, after step {best.step}: {where}")
    if export == "last" or best.step == checkpoints.latest:
        return state
    trained = state.params, state.opt_state, state.step
    shapes = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), trained
    )
    jax.tree.map(lambda a: a.delete(), trained)  # there may be no room for both
    params, opt_state, step = shapes
    state = dataclasses.replace(state, params=params, opt_state=opt_state, step=step)
    return checkpoints.restore(state, step=best.step)[0]


def _export(model: HybridLM, record: Record, *, lora: bool, progress: bool) -> None:
    """Writes the adapters if there are any, and the model with the adapters merged."""
    if lora:
        from hmf_jax.training.lora import merge_lora, save_lora

        with record.writing(ADAPTER) as directory:
            new = directory.with_name(f".{ADAPTER}.new")
            shutil.rmtree(new, ignore_errors=True)  # of a run that was killed here
            save_lora(model, new)
            directory.mkdir(exist_ok=True)
            for file in new.iterdir():  # what else is there stays
                file.replace(directory / file.name)
            new.rmdir()
        model = merge_lora(model)
    with record.writing(MODEL) as directory:
        save_pretrained(model, directory, overwrite=True, for_original=False, progress=progress)


@dataclasses.dataclass
class Run:
    """What a config means on this machine; made before any weight is loaded.

    Attributes:
      config: what it was made from.
      source: directory of the model to start from.
      model_config: its config, with the overrides.
      mesh: the devices; None: one.
      batch_size: rows of a batch, on all processes together.
      tokenizer: that of the model.
      balance: coefficient of the load-balancing loss; None: there is none.
      batches: makes the data of the run from their beginning.
      seen: such data, read to their end if the length of the run depends on them, else not yet.
      steps: of the whole run.
      optimizer: the optimizer; make_step: `make_train_step`, but for remat.
    """

    config: TrainConfig
    source: Path
    model_config: HybridConfig
    mesh: Mesh | None
    batch_size: int
    tokenizer: Any = None
    balance: float | None = None
    batches: functools.partial[Batches] = dataclasses.field(init=False)
    seen: Batches = dataclasses.field(init=False)
    steps: int = 0
    optimizer: optax.GradientTransformation = dataclasses.field(init=False)
    make_step: functools.partial[jax.stages.Wrapped] = dataclasses.field(init=False)

    @classmethod
    def prepare(cls, config: TrainConfig, loss: Loss | None, *, alone: bool = False) -> Self:
        """Finds what is wrong with a config: raises what `fine_tune` raises. Joins the other
        processes if the config says so. `alone`: refuse at once where another run is."""
        if not isinstance(config, TrainConfig):
            raise TypeError(
                f"config must be a TrainConfig, not {type(config).__name__}; TrainConfig.load "
                "reads a file, TrainConfig.of takes a dict"
            )
        if config.distributed and not jax.distributed.is_initialized():
            join_processes()
        source = resolve(config.model)
        model_config = HybridConfig.from_json(source).override(config.config_overrides)
        balance = aux_coef(config.router_aux_loss_coef, model_config)
        mesh = for_model(mesh_for(config), model_config)
        parts = 1 if mesh is None else row_parts(mesh)
        each = config.accumulate * parts
        batch_size = config.batch_size or each * (config.per_device_batch_size or 1)
        if batch_size % each:
            raise ValueError(
                f"batch_size={batch_size} is not a multiple of accumulate x dp x fsdp = "
                f"{config.accumulate} x {parts}"
            )
        run = cls(config, source, model_config, mesh, batch_size)
        run.balance = balance if loss is None else None
        output = Path(config.output).expanduser()
        check_output(output, run.inputs(), run.writes(), contents=False)
        if alone and jax.process_count() == 1 and output.is_dir():
            with holding(output):
                pass
        index, count = data_shard(mesh)
        run.tokenizer = load_tokenizer(source)
        run.batches = functools.partial(
            Batches,
            _listed(config.data),
            run.tokenizer,
            length=config.seq_len,
            batch_size=batch_size // count,
            epochs=config.epochs,
            process_index=index,
            process_count=count,
            **{name: getattr(config, name) for name in _DATA},
        )
        run.seen = run.batches(epochs=config.epochs or 1)
        run.steps = config.steps or _count(run.seen)  # the schedule must know
        run.optimizer = config.optimizer(run.steps)
        options = {name: getattr(config, name) for name in _STEP}
        run.make_step = functools.partial(make_train_step, run.optimizer, loss=loss, **options)
        if config.remat != AUTO:
            check_remat(config.remat)
        return run

    def inputs(self) -> dict[str, list[Path]]:
        """What the run reads, by the field that names it."""
        data = {name: data_files(getattr(self.config, name)) for name in ("data", "eval_data")}
        return {"model": [self.source], **data}

    def writes(self) -> list[str]:
        """What the run writes in its directory."""
        lora = self.config.lora_rank is not None
        return [name for name in WRITES if lora or name != ADAPTER]

    def identity(self) -> dict[str, Any]:
        """What this is a run of, as run.json holds it; reads all inputs."""
        c, inputs = self.config, self.inputs()
        return {
            "fields": fields_compared(c),
            "rows": self.batch_size,
            "steps": {"of": self.steps, "decide": depends_on_length(c)},
            "config": json.loads(json.dumps(self.model_config.to_dict())),
            "base weights": fingerprint(weight_files(self.source)),
            **tokenizer_identity(self.source, self.tokenizer),
            "data": [[str(f), fingerprint([f])] for f in inputs["data"]],
            "eval_data": [[str(f), fingerprint([f])] for f in inputs["eval_data"]],
        }

    def evaluation(self, loss: Loss | None) -> Evaluation | None:
        """The validation loss, if the config wants it."""
        c = self.config
        if c.eval_data is None:
            return None
        rows = self.batches.keywords["batch_size"] // c.accumulate  # a micro-batch
        arguments = self.batches.keywords | {"epochs": 1, "shuffle": False, "batch_size": rows}
        batches = Batches(_listed(c.eval_data), self.tokenizer, **arguments)
        options = {name: getattr(c, name) for name in ("num_iter", "impl", "chunk_size")}
        return Evaluation(batches, loss=loss, **options)

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
        state = TrainState.abstract(model, self.optimizer, **self.selection)
        if self.mesh is not None:
            return state
        one = SingleDeviceSharding(jax.local_devices()[0])  # as `TrainState.create` leaves it
        return jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=one), state)

    def abstract_batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """A batch as shapes, dtypes and shardings."""
        split = None if self.mesh is None else NamedSharding(self.mesh, PartitionSpec(BATCH_AXES))
        shape = self.batch_size, self.config.seq_len
        dtypes = {"tokens": "int32", "segment_ids": "int32", "loss_mask": "bool"}
        return {n: jax.ShapeDtypeStruct(shape, t, sharding=split) for n, t in dtypes.items()}

    def memory(self, state: TrainState) -> StepMemory:
        """The plan of a step's memory."""
        c = self.config
        options = {n: getattr(c, n) for n in ("accumulate", "num_iter", "impl", "chunk_size")}
        return plan_memory(state, self.batch_size, c.seq_len, **options)

    def fit(
        self, state: TrainState, before: Sequence[str] | None, say: Callable[[str], None]
    ) -> tuple[Any, jax.stages.Compiled | None]:
        """The remat of the step, and its program if finding that took to compile it."""
        loss, limit = self.make_step.keywords["loss"], device_limit()
        found = of_all_processes([limit, before]) or []
        limits = [n for n, _ in found]
        if self.config.remat != AUTO:
            return self.config.remat, None
        if loss is not None or None in limits:
            return ["block"] * len(self.model_config.layer_kinds), None

        def compile(choices: Sequence[str]) -> jax.stages.Compiled:
            step = self.make_step(remat=choices)
            return step.lower(state, self.abstract_batch()).compile()

        return fit(self.memory(state), min(limits), compile, before=found[0][1], say=say)

    def describe(self) -> str:
        """Model, devices and length in words."""
        c, device = self.config, jax.devices()[0].device_kind
        shape = (
            "one device"
            if self.mesh is None
            else " x ".join(f"{axis} {n}" for axis, n in self.mesh.shape.items() if n > 1)
        )
        balance = "" if self.balance is None else f", load-balancing loss x {self.balance:g}"
        return (
            f"model    {self.source}: {self.model_config.hybrid_override_pattern}{balance}\n"
            f"devices  {shape} ({device}), {jax.process_count()} process(es)\n"
            f"length   {self.steps} steps of {self.batch_size} rows of {c.seq_len} tokens, "
            f"{c.accumulate} micro-batch(es) each"
        )


def _listed(files: str | list[str]) -> list[str]:
    return [files] if isinstance(files, str) else files


def _count(batches: Batches) -> int:
    """How many batches there are; of the process that has most."""
    count = sum(1 for _ in batches)
    if jax.process_count() > 1:
        count = int(multihost_utils.process_allgather(np.asarray(count)).max())
    return count


def describe_source(batches: Batches) -> str:
    """Where the rows come from, and what is left out of them."""
    return "data     " + batches.describe().replace("\n", "\n         ")


def describe_data(batches: Batches) -> str:
    """How many rows, documents and tokens were read, of which formats, in words."""
    counts = ", ".join(f"{n:,} {name}" for name, n in batches.counts.items())
    more = textwrap.indent(batches.describe(), " " * 9)
    return f"data     read by this process: {counts}\n{more}"
