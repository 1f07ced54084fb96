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
import numpy as np
import optax
from flax import nnx

from benchmarks import models, watching
from benchmarks.rows import Row
from benchmarks.timing import device_time, milliseconds
from hmf_jax.memory import device_bytes
from hmf_jax.mixers import KINDS
from hmf_jax.model import HybridLM
from hmf_jax.sharding import BATCH_AXES, named_sharding
from hmf_jax.training import TrainState, make_train_step, training_flops
from hmf_jax.training.flops import peak_flops
from hmf_jax.training.lora import apply_lora

STEPS = ("lora_step", "mixers_step", "full_step")


OPTIMIZER = optax.adamw(1e-5, weight_decay=0.0)


def compiled(op: str, s: models.Settings, remat: str, documents: int | None = None) -> Any:
    """The program of one AdamW step, of a state that need not exist; arguments as of `measure`."""
    jax.clear_caches()  # choices are seen when blocks are traced
    model = nnx.eval_shape(lambda: _model(op, s))
    state = TrainState.abstract(model, OPTIMIZER, trainable=_trainable(op, s))
    shape = s.batch, s.length
    split = named_sharding(model.mesh, ("batch", None), shape)
    names = ("tokens", "segment_ids") if documents else ("tokens",)
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=split) for name in names}
    step = make_train_step(
        OPTIMIZER, remat=remat, max_grad_norm=1.0, num_iter=s.num_iter, impl=s.impl
    )
    return step.lower(state, batch).compile()


def _model(op: str, s: models.Settings) -> HybridLM:
    model = HybridLM.init(s.config, dtype=jnp.dtype(s.dtype), mesh=s.mesh())
    return apply_lora(model) if op == "lora_step" else model


def _trainable(op: str, s: models.Settings) -> str | None:
    return {"lora_step": "lora", "mixers_step": KINDS[s.mixer].name}.get(op)


def measure(
    op: str, s: models.Settings, remat: str, documents: int | None = None, *, env: dict[str, Any]
) -> Row:
    """Time of one AdamW step on `batch` rows of `length` tokens; the state is donated.

    Args:
      op: one of `STEPS`; remat: see `make_train_step`.
      documents: pack every row of so many documents of random lengths; None: rows are one document.

    Extra numbers, of one device but for trained: tokens_per_s; mfu, the model's FLOP/s
    (`training_flops`, which leaves out what is computed again) over the peak of the device, where
    that is known and rows are one document; trained parameters; bytes of the state, of everything
    the program needs as the compiler planned it, and the largest number in use so far in this
    process (one measurement per process tells it apart). On GPUs also what the profiler saw of one
    step, see `benchmarks.timing.DeviceTime`.

    Raises:
      ValueError: the mesh does not split the rows evenly.
    """
    parts = math.prod(s.axes.get(axis, 1) for axis in BATCH_AXES)
    if s.batch % parts:
        raise ValueError(f"{s.batch} rows cannot be split over {parts} devices: see --batches")
    if documents is not None and not 1 <= documents <= s.length:
        raise ValueError(f"{documents} documents do not fit into rows of {s.length} tokens")
    with watching.watch_dispatch() as ran:
        program = compiled(op, s, remat, documents)  # before anything that takes memory
    model = _model(op, s)
    batches = [{"tokens": tokens} for tokens in s.tokens(model.mesh)]
    if documents:
        for seed, batch in enumerate(batches):
            ids = segment_ids(batch["tokens"].shape, documents, seed)
            batch["segment_ids"] = jax.device_put(ids, batch["tokens"].sharding)
    state = TrainState.create(model, OPTIMIZER, trainable=_trainable(op, s))
    del model  # its trained arrays: the state holds them in float32
    flops = training_flops(state, s.length)
    trained = sum(p.size for p in state.params.values())
    state_bytes = device_bytes(state)

    def call(batch: dict[str, Any]) -> Any:
        nonlocal state
        state, metrics = program(state, batch)
        return metrics

    ms = milliseconds(call, batches)
    rate = 1e3 * s.batch * s.length / ms / s.devices
    extra: dict[str, Any] = {"tokens_per_s": rate}
    if not documents and (peak := peak_flops()) is not None:
        extra["mfu"] = rate * flops / peak
    if profile := device_time(lambda: call(batches[0])):
        extra |= profile.per(1, top=20)
    extra |= {"trained": trained, "state_bytes": state_bytes}
    extra["program_bytes"] = watching.program_bytes(program)
    if (used := watching.peak_bytes()) is not None:
        extra["peak_bytes"] = used
    extra["ran"] = dict(sorted(ran.items()))
    row = s.row(op, "fwd_bwd", ms, extra, env)
    packed = f", {documents} documents" if documents else ""
    return dataclasses.replace(row, case=f"{row.case}, remat {remat}{packed}")


def segment_ids(shape: tuple[int, int], documents: int, seed: int) -> np.ndarray:
    """Numbers 1, 2, ... of documents of random lengths that fill every row, int32 [B, T]."""
    rng = np.random.default_rng(seed)
    starts = np.zeros(shape, np.int32)
    for row in starts:
        row[1 + rng.choice(len(row) - 1, documents - 1, replace=False)] = 1
    return 1 + np.cumsum(starts, axis=1, dtype=np.int32)
