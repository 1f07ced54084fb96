"""A fine-tuning run as a file: the fields of the YAML, their types and checks."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from hmf_jax.training.optimizer import RECIPES, Recipe


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
      column, template_options, packing, on_bad, padding_side, shuffle, seed: of `Batches`.
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
        yaml = yaml_module()
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


def yaml_module() -> Any:
    """PyYAML; ImportError, which says how to install it, if it is missing."""
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
