"""A fine-tuning run as a file: the fields of the YAML, their types and checks."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from hmf_jax.training import original
from hmf_jax.training.fields import (
    Count,
    Positive,
    Range,
    parse_yaml,
    read_yaml,
    typed,
    unknown,
    yaml_module,
)
from hmf_jax.training.optimizer import RECIPES, Recipe
from hmf_jax.training.remat import AUTO
from hmf_jax.training.sources import MAX_ROW_BYTES

__all__ = ["TrainConfig", "yaml_module"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig(Recipe):
    """One fine-tuning run: the fields of `Recipe` and these.

    Attributes:
      model: directory or repository of the model to start from, see `from_pretrained`.
      data: files of texts or chats, a directory or pattern of them, or a list, see `Batches`.
      output: directory of the run: run.json (what it is a run of), config.yaml, checkpoints/,
        metrics.jsonl, loss.png, and at the end model/, a Hugging Face directory (and adapter/, with
        LoRA). A run that is started again goes on from its last checkpoint.
      recipe: a name of `RECIPES` whose values hold where the file says nothing.
      dtype: of the model's computations, "bfloat16" or "float32"; what is exported has the dtypes
        of the original.
      master_weights: hold trained parameters in float32.
      lora_rank: train adapters of this rank and nothing else, see `apply_lora` (also for the
        next three); None: no adapters. `trainable` is then "lora", unless it is given.
      lora_alpha, lora_modules, lora_quantize: see `apply_lora`.
      batch_size: rows of one optimizer step, on all devices together; None: those of a device
        times micro-batches and data parallel devices.
      per_device_batch_size: rows of a micro-batch on one data parallel device; None: 1, unless
        batch_size says otherwise.
      column, template_options, max_row_bytes, packing, on_bad, padding_side, shuffle, seed: of
        `Batches`.
      eval_data: files like `data`, for the validation loss: the mean over all their targets, each
        document once, packed like `data` and in the order of the files. None: no validation.
      eval_every: steps between validations (there is one at the end, too); None: save_every.
      export: which weights become output/model: "last", or "best", those of the smallest validation
        loss; their checkpoint is kept beside the newest.
      remat: of `make_train_step`, or "auto": as little is computed again as the memory of a device
        allows, layer by layer (see `hmf_jax.training.memory`). Where devices do not say how much
        they have, as CPUs do not, and with another loss than the next token's it is "block".
      num_iter, impl, chunk_size: of `make_train_step`.
      dp, fsdp, sp, tp: the mesh, see `make_mesh`; fsdp None: all devices that the others leave.
      distributed: join the other processes of the run (`jax.distributed`): found by itself under
        SLURM, Open MPI and Kubernetes, else described by the variables JAX_COORDINATOR_ADDRESS
        (host:port), JAX_NUM_PROCESSES and JAX_PROCESS_ID.
      save_every, keep: steps between checkpoints, and how many stay.
      log_every: steps between printed lines, where no bar is shown.
      tensorboard: also write the metrics to output/tensorboard (needs google-metrax).
      wandb: also send them to this Weights & Biases project (needs google-metrax and wandb).
      profile: trace three steps into output/profile.

    Raises:
      ValueError: a value of another type or out of its range, in one line that names the field.
    """

    stages: typing.ClassVar[tuple[str, ...]] = ("pt", "sft")  # of the original

    model: str
    data: str | list[str]
    output: str
    recipe: str | None = None
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    master_weights: bool = True
    lora_rank: Count | None = None
    lora_alpha: Positive = 32.0
    lora_modules: str = "proj"
    lora_quantize: Literal["int8", "nf4"] | None = None
    batch_size: Count | None = None
    per_device_batch_size: Count | None = None
    column: str | dict[str, str] | None = None
    template_options: dict[str, Any] = dataclasses.field(default_factory=dict)
    max_row_bytes: Count = MAX_ROW_BYTES
    packing: str = "first_fit"
    on_bad: str = "skip"
    padding_side: str = "right"
    shuffle: bool = True
    seed: Annotated[int, Range(0)] = 0
    eval_data: str | list[str] | None = None
    eval_every: Count | None = None
    export: Literal["last", "best"] = "last"
    remat: str | dict[str, str] = AUTO
    num_iter: Annotated[int, Range(0)] | None = None
    impl: str = "auto"
    chunk_size: Count = 512
    dp: Count = 1
    fsdp: Count | None = None
    sp: Count = 1
    tp: Count = 1
    distributed: bool = False
    save_every: Count = 500
    keep: Count = 2
    log_every: Count = 1
    tensorboard: bool = False
    wandb: str | None = None
    profile: bool = False

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> Self:
        """Reads a YAML file of these fields; overrides ("learning_rate=1e-5") replace its values.
        One of steps or epochs also replaces the other. A file in the format of the original is
        read as well, see `original`.

        Raises:
          OSError: there is no such file, or it cannot be read.
          ValueError: not YAML, an unknown field (with the nearest known one), a value of the wrong
            type or out of its range, a required field that is missing, or a field that is given
            twice, in two spellings or by two overrides.
        """
        values = read_yaml(path)
        given: dict[str, Any] = {}
        for override in overrides:
            name, separator, value = override.partition("=")
            name = name.strip()
            if not separator:
                raise ValueError(f"{override!r} is no field=value, e.g. learning_rate=1e-5")
            if name in given:
                raise ValueError(f"{name} is given twice: {override!r} comes after another value")
            given[name] = parse_yaml(value, override)
        given = original.renamed(given)
        values = original.translated(values, cls.stages, str(path), replaced=given)
        for name, others in _INSTEAD.items():
            if name in given:
                values = {n: v for n, v in values.items() if n not in others}
        try:
            return cls.of({**values, **given})
        except ValueError as e:
            raise ValueError(f"{path}: {e}") from e

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        """The config with these values of its fields, those of its recipe, and defaults."""
        known = {f.name for f in dataclasses.fields(cls)}
        for name in values:
            if name not in known and original.RENAMED.get(name) in known:
                raise ValueError(f"unknown field {name!r}; here it is {original.RENAMED[name]!r}")
            if name not in known:
                raise ValueError(unknown(name, [f.name for f in dataclasses.fields(cls)]))
        recipe = typed("recipe", values.get("recipe"), str | None)
        if recipe is not None and recipe not in RECIPES:
            raise ValueError(f"unknown recipe {recipe!r}; there are {', '.join(RECIPES)}")
        base = {} if recipe is None else dataclasses.asdict(RECIPES[recipe])
        if "steps" in values or "epochs" in values:
            base |= {"steps": None, "epochs": None}  # the length is the file's, not the recipe's
        if values.get("lora_rank") is not None:
            base["trainable"] = "lora"
        merged = {**base, **values}
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
        if self.batch_size is not None and self.per_device_batch_size is not None:
            raise ValueError("give either batch_size or per_device_batch_size")
        for name in ("model", "data", "output", "eval_data"):
            value = getattr(self, name)
            files = value if isinstance(value, list) else [value]
            if not files or any(f is not None and not f.strip() for f in files):
                raise ValueError(f"{name} is empty; name a file or directory")
        if self.eval_data is None:
            if self.eval_every is not None:
                raise ValueError("eval_every needs eval_data, the files to validate on")
            if self.export == "best":
                raise ValueError("export: best needs eval_data, the files to validate on")


# Fields of which one replaces the others that a file holds.
_INSTEAD = {
    "steps": ("epochs",),
    "epochs": ("steps",),
    "batch_size": ("per_device_batch_size",),
    "per_device_batch_size": ("batch_size",),
}
