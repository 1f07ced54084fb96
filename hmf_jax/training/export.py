"""What becomes of a run that has ended: which of its states is exported, and how."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable

import jax

from hmf_jax.loading import save_pretrained
from hmf_jax.model import HybridLM
from hmf_jax.training.checkpoint import Checkpoints
from hmf_jax.training.identity import ADAPTER, MODEL, Record
from hmf_jax.training.step import TrainState


def chosen(
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


def export(model: HybridLM, record: Record, *, lora: bool, progress: bool) -> None:
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
