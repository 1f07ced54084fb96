"""Training steps of whole models with random weights, as `hmf_jax.training` makes them.

* lora_step: adapters of rank 16 beside every projection; the model's weights stay in bfloat16.
* mixers_step: the mixers that replaced attention (of a "*" model: all attention layers) train, with
  float32 master weights, as in the first stages of the original's recipes; all else is frozen.
* full_step: every parameter trains, with float32 master weights: a state of 12 bytes for each.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks import models, watching
from benchmarks.rows import Row
from benchmarks.timing import device_time, milliseconds
from hmf_jax.memory import device_bytes
from hmf_jax.mixers import KINDS
from hmf_jax.model import HybridLM
from hmf_jax.sharding import BATCH_AXES
from hmf_jax.training import TrainState, make_train_step, training_flops
from hmf_jax.training.flops import peak_flops
from hmf_jax.training.lora import apply_lora

STEPS = ("lora_step", "mixers_step", "full_step")


def measure(op: str, s: models.Settings, remat: str, env: dict[str, Any]) -> Row:
    """Time of one AdamW step on `batch` rows of `length` tokens; the state is donated.

    Extra numbers, of one device but for trained: tokens_per_s; mfu, the model's FLOP/s
    (`training_flops`, which leaves out what is computed again) over the peak of the device, where
    that is known; trained parameters; bytes of the state, of everything the program needs as the
    compiler planned it, and the largest number in use so far in this process (one measurement per
    process tells it apart). On GPUs also what the profiler saw of one step, see
    `benchmarks.timing.DeviceTime`.

    Raises:
      ValueError: the mesh does not split the rows evenly.
    """
    jax.clear_caches()  # choices are seen when blocks are traced
    parts = math.prod(s.axes.get(axis, 1) for axis in BATCH_AXES)
    if s.batch % parts:
        raise ValueError(f"{s.batch} rows cannot be split over {parts} devices: see --batches")
    model = HybridLM.init(s.config, dtype=jnp.dtype(s.dtype), mesh=s.mesh())
    batches = [{"tokens": tokens} for tokens in s.tokens(model.mesh)]
    optimizer = optax.adamw(1e-5, weight_decay=0.0)
    if op == "lora_step":
        state = TrainState.create(apply_lora(model), optimizer, trainable="lora")
    else:
        trainable = KINDS[s.mixer].name if op == "mixers_step" else None
        state = TrainState.create(model, optimizer, trainable=trainable)
    del model  # its trained arrays: the state holds them in float32
    flops = training_flops(state, s.length)
    trained = sum(p.size for p in state.params.values())
    state_bytes = device_bytes(state)
    step = make_train_step(
        optimizer, remat=remat, max_grad_norm=1.0, num_iter=s.num_iter, impl=s.impl
    )
    with watching.watch_dispatch() as ran:
        program = step.lower(state, batches[0]).compile()

    def call(batch: dict[str, Any]) -> Any:
        nonlocal state
        state, metrics = program(state, batch)
        return metrics

    ms = milliseconds(call, batches)
    rate = 1e3 * s.batch * s.length / ms / s.devices
    extra: dict[str, Any] = {"tokens_per_s": rate}
    if (peak := peak_flops()) is not None:
        extra["mfu"] = rate * flops / peak
    if profile := device_time(lambda: call(batches[0])):
        extra |= profile.per(1, top=20)
    extra |= {"trained": trained, "state_bytes": state_bytes}
    extra["program_bytes"] = watching.program_bytes(program)
    if (used := watching.peak_bytes()) is not None:
        extra["peak_bytes"] = used
    extra["ran"] = dict(sorted(ran.items()))
    row = s.row(op, "fwd_bwd", ms, extra, env)
    return dataclasses.replace(row, case=f"{row.case}, remat {remat}")
