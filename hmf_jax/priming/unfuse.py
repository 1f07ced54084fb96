"""From a fused stage-1 model to an ordinary one: the student, or the teacher it learned from."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from flax import nnx

from hmf_jax.config import HybridConfig
from hmf_jax.loading import from_pretrained, save_pretrained
from hmf_jax.mixers import split_symbol
from hmf_jax.model import HybridLM
from hmf_jax.parameters import flat_params, with_params
from hmf_jax.priming.stage0 import check_output
from hmf_jax.table import num_parameters


def unfuse(model: HybridLM) -> HybridLM:
    """The hybrid inside a fused model, without its teacher: "GKA*" -> "GKA", "*DA" -> "*".

    It shares its arrays with the fused model.

    Raises:
      ValueError: there is nothing to unfuse.
    """
    return _half(model, teacher=False)


def teacher(model: HybridLM) -> HybridLM:
    """The model that a fused one learns from: "GKA*" -> "*"; after stage 0 it is the base.

    It shares its arrays with the fused model. Raises ValueError if the model is not fused.
    """
    return _half(model, teacher=True)


def unfuse_directory(
    directory: str | Path,
    output: str | Path | None = None,
    *,
    dtype: Any = jnp.bfloat16,
    overwrite: bool = False,
    progress: bool = True,
    report: Callable[[str], None] = lambda text: None,
) -> Path:
    """`unfuse` from directory to directory (default: <directory>_unfused), all of it or nothing.

    Args:
      directory: a fused model, Hugging Face or Orbax; its tokenizer files are copied.
      output: a Hugging Face directory.
      dtype: of the weights; A_log, dt_bias and D are float32.
      overwrite: replace a model that is already there.
      progress: show bars.
      report: is told what was kept and dropped.

    Returns:
      the directory written.

    Raises: what `from_pretrained`, `unfuse` and `save_pretrained` raise.
    """
    directory = Path(directory).expanduser()
    config = HybridConfig.from_json(directory)
    check_fused(config, "unfuse")
    output = check_output(output or f"{directory.resolve()}_unfused", overwrite, directory)
    model = unfuse(from_pretrained(directory, dtype=dtype, progress=progress))
    kept, all_of_them = num_parameters(model.config), num_parameters(config)
    save_pretrained(model, output, overwrite=overwrite, for_original=False, progress=progress)
    report(
        f"{config.hybrid_override_pattern} -> {model.config.hybrid_override_pattern}\n"
        f"{kept:,} parameters kept, {all_of_them - kept:,} of the teacher dropped.\n"
        f"Wrote {output}."
    )
    return output


def check_fused(config: HybridConfig, what: str) -> None:
    """Raises ValueError unless this is the config of a fused model."""
    if not config.fused:
        raise ValueError(
            f"cannot {what} this model: its pattern {config.hybrid_override_pattern} has no fused "
            "layers. Stage 0 makes them where the pattern says 'GKA*', '*DA', ...; unfusing ends "
            "them"
        )


def _half(model: HybridLM, teacher: bool) -> HybridLM:
    """The teacher of a fused model as a model of its own, or the student."""
    check_fused(model.config, "unfuse")
    pairs = [split_symbol(symbol) for symbol in model.config.layer_kinds]
    kinds = tuple((other or kind) if teacher else kind for kind, other in pairs)
    config = dataclasses.replace(model.config, layer_kinds=kinds)
    new = nnx.eval_shape(lambda: HybridLM(config, dtype=model.dtype, mesh=model.mesh))
    params = flat_params(model)
    for i, (_, other) in enumerate(pairs):
        kept, dropped = (
            ("mixer", "teacher") if not teacher or other is None else ("teacher", "mixer")
        )
        for path in [p for p in params if p.startswith(f"layers.{i}.{dropped}.")]:
            del params[path]
        for path in [p for p in params if p.startswith(f"layers.{i}.{kept}.")]:
            params[path.replace(f".{kept}.", ".mixer.", 1)] = params.pop(path)
    new = with_params(new, params)
    new.source = model.source
    return new
