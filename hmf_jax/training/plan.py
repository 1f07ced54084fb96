"""What a training run would do and take, without running it."""

from __future__ import annotations

import math
import re
from typing import Any

import jax

from hmf_jax.memory import device_bytes, size_text
from hmf_jax.training.devices import device_limit
from hmf_jax.training.flops import peak_flops, training_flops
from hmf_jax.training.remat import AUTO, Choices, remat_choices, remat_text
from hmf_jax.training.run import Run, describe_data, describe_source
from hmf_jax.training.schema import TrainConfig
from hmf_jax.training.step import Loss, TrainState


def plan(config: TrainConfig, *, loss: Loss | None = None) -> str:
    """What a run would do and take, in words: data, trained parameters, memory and cost of a step.

    Arguments and errors are those of `fine_tune`. The step is compiled for the devices of this
    machine; no weight is loaded, nothing is written.
    """
    run = Run.prepare(config, loss)
    state, said = run.abstract_state(), []
    remat, compiled = run.fit(state, None, said.append)
    if compiled is None:
        compiled = run.make_step(remat=remat).lower(state, run.abstract_batch()).compile()
    if config.steps is not None:
        next(run.seen)
    return "\n".join(
        [
            run.describe(),
            describe_source(run.seen),
            describe_data(run.seen),
            *(f"         {problem}" for problem in run.seen.problems[:5]),
            *_describe_parameters(state),
            *said,
            *_describe_remat(run, state, remat, loss),
            *_describe_memory(state, compiled.memory_analysis()),
            *_describe_cost(run, state, compiled.cost_analysis()),
        ]
    )


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


def _describe_remat(run: Run, state: TrainState, remat: Choices, loss: Loss | None) -> list[str]:
    """What each layer keeps, and the memory that this was chosen by."""
    choices = remat_choices(remat, run.model_config.student_kinds)
    lines = [f"remat    {remat_text(choices)} ({'auto' if run.config.remat == AUTO else 'given'})"]
    if loss is None:
        limit = device_limit()
        of = "" if limit is None else f" of {size_text(limit)} that a step may take"
        peak = run.memory(state).peak(choices)
        lines.append(f"         planned: {size_text(sum(peak.values()))}{of}; when it is fullest")
        lines += [f"  {size_text(n):>12}  {name}" for name, n in peak.items() if n]
    return lines


def _describe_memory(state: TrainState, analysis: Any) -> list[str]:
    parts = {
        "frozen weights": device_bytes(state.frozen),
        "trained weights": device_bytes(state.params),
        "optimizer": device_bytes(state.opt_state),
        "gradients, activations, workspace": analysis.temp_size_in_bytes,
    }
    float32 = sum(4 * (device_bytes(p) // p.dtype.itemsize) for p in state.params.values())
    lines = [f"  {size_text(n):>12}  {name}" for name, n in parts.items()]
    lines[-1] += f" (gradients are {size_text(float32)})"
    total = size_text(sum(parts.values()))
    return ["memory   of one device, as compiled:", *lines, f"  {total:>12}  in all"]


def _describe_cost(run: Run, state: TrainState, cost: Any) -> list[str]:
    tokens = run.batch_size * run.config.seq_len
    flops = training_flops(state, run.config.seq_len) * tokens
    peak = peak_flops()
    seconds = ""
    if peak is not None:
        seconds = f"; {flops / peak / jax.device_count():.2f} s at the peak of the device(s)"
    return [
        f"step     {tokens:,} tokens, {flops:.3g} model FLOPs{seconds}",
        f"         as compiled, per device: {cost.get('flops', math.nan):.3g} FLOPs, "
        f"{size_text(cost.get('bytes accessed', math.nan))} accessed "
        "(XLA counts a loop once and a kernel as nothing)",
    ]
