"""The devices of a run: other processes, the mesh, and how much memory there is."""

from __future__ import annotations

import os

import jax
from jax.sharding import Mesh

from hmf_jax.sharding import make_mesh
from hmf_jax.training.schema import TrainConfig

# Part of a device's memory that stays free: for batches, and for what lies between the arrays.
MARGIN = 0.04


def join_processes() -> None:
    """JAX finds the others under SLURM, Open MPI and Kubernetes; elsewhere the environment says."""
    given = (os.environ.get(f"JAX_{name}") for name in ("NUM_PROCESSES", "PROCESS_ID"))
    count, index = (None if n is None else int(n) for n in given)
    jax.distributed.initialize(num_processes=count, process_id=index)


def mesh_for(config: TrainConfig) -> Mesh | None:
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


def device_limit() -> int | None:
    """Bytes that a step may take on each device of this process; None where devices do not say."""
    told = [(d.memory_stats() or {}).get("bytes_limit") for d in jax.local_devices()]
    found = [int(n) for n in told if n]
    return int((1 - MARGIN) * min(found)) if len(found) == len(told) else None
