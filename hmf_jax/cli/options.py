"""Arguments and options that several commands share."""

from __future__ import annotations

import enum
from typing import Annotated

import typer


class DType(enum.StrEnum):
    bfloat16 = "bfloat16"
    float32 = "float32"


class Format(enum.StrEnum):
    orbax = "orbax"
    hf = "hf"


Model = Annotated[
    str,
    typer.Argument(
        help="Directory of the model (Hugging Face or Orbax format), or a Hugging Face repository "
        "such as org/name, which is downloaded."
    ),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        help="Longest answer, in tokens. Default: what the model's generation_config.json says, "
        "else 128, in a chat 1024.",
        min=1,
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        help="Randomness: 0 always takes the most likely token, 1 follows the model's "
        "probabilities. Default: what the model's generation_config.json recommends, else 0."
    ),
]
TopK = Annotated[int | None, typer.Option(help="Choose among the K most likely tokens. 0: all.")]
TopP = Annotated[
    float | None,
    typer.Option(help="Choose among the most likely tokens that make up this probability. 1: all."),
]
MinP = Annotated[
    float | None, typer.Option(help="Drop tokens less likely than this times the best one. 0: off.")
]
Penalty = Annotated[
    float | None, typer.Option(help="Above 1: avoid tokens that already occurred. 1: off.")
]
Seed = Annotated[int, typer.Option(help="Same seed, same text.")]
Stop = Annotated[
    list[str] | None, typer.Option(help="End the answer before this text. May be repeated.")
]
NumIter = Annotated[
    int | None,
    typer.Option(help="Solver iterations of GKA layers: fewer is faster, 0 is linear attention."),
]
Capacity = Annotated[
    int | None,
    typer.Option(
        help="Most tokens to keep in memory, prompt and answer. Default: as needed.", min=1
    ),
]
Dtype = Annotated[DType, typer.Option(help="Number format of weights and activations.")]
Fields = Annotated[
    list[str] | None,
    typer.Argument(help="field=value, in place of the file's, e.g. learning_rate=1e-5 fsdp=8."),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Begin anew where another run was: its checkpoints and model go."
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Only show the data, what is trained, memory and cost of a step."
    ),
]
TP = Annotated[int, typer.Option(help="Devices to split the model over (tensor parallel).", min=1)]
