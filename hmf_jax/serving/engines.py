"""The engines of a server: how they are to be made, what memory they get, and the making."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
from flax import nnx
from jax.sharding import SingleDeviceSharding

from hmf_jax.config import HybridConfig
from hmf_jax.engine import Engine, Request
from hmf_jax.engine.programs import SMALLEST_CHUNK
from hmf_jax.engine.storage import PAGE_SIZE
from hmf_jax.memory import EnginePlan, plan_engine, size_text
from hmf_jax.model import HybridLM
from hmf_jax.options import MOST_POSITIONS, check_int
from hmf_jax.parameters import abstract_params, flat_params, with_params
from hmf_jax.serving.config import CHUNKS, EngineConfig
from hmf_jax.sharding import make_mesh

_HEADROOM = 0.98  # of the memory that JAX may use: the rest is lost between arrays
_READ = 256  # tokens of prompts that GPUs read for each one that rows decode meanwhile
_PART = 8  # snapshots take at most so many times the bytes of the keys and values between them


def checked(config: HybridConfig, options: EngineConfig) -> tuple[HybridConfig, EngineConfig]:
    """The config with the options' num_iter, and the options with a `prefill_chunk`.

    Raises:
      ValueError: what a model of this config, or the devices, cannot do.
    """
    count, needed = jax.device_count(), options.tp * options.dp
    if needed > count:
        raise ValueError(
            f"tp={options.tp} x dp={options.dp} needs {needed} devices, but there are {count}."
        )
    chunk = options.prefill_chunk
    if chunk is None:
        chunk = (2048 if on_gpu() else 512) if options.max_stall is None else CHUNKS[0]
    elif options.max_stall is not None:
        raise ValueError("Give prefill_chunk or max_stall, which chooses it.")
    if options.snapshot_every % chunk:
        raise ValueError(
            f"snapshot_every={options.snapshot_every} must be a multiple of the chunk of {chunk} "
            "tokens."
        )
    for name in ("snapshot_every", "snapshot_spacing", "host_bytes"):
        if getattr(options, name) and options.prefix_cache == "off":
            raise ValueError(f"{name} is for a prefix cache, which is off.")
    if options.snapshot_spacing is not None:
        check_int("snapshot_spacing", options.snapshot_spacing, 1, MOST_POSITIONS)
    longest = config.max_position_embeddings
    if options.max_model_len is not None and options.max_model_len > longest:
        raise ValueError(
            f"max_model_len={options.max_model_len} is more than the model's "
            f"max_position_embeddings={longest}."
        )
    config.check_num_iter(options.num_iter)
    if options.num_iter is not None and config.gka is not None:
        gka = dataclasses.replace(config.gka, num_iter=options.num_iter)
        config = dataclasses.replace(config, gka=gka)
    return config, dataclasses.replace(options, prefill_chunk=chunk)


def on_gpu() -> bool:
    """Whether the default device is one."""
    return jax.devices()[0].platform == "gpu"


def host_memory() -> int:
    """Bytes of memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def plan(config: HybridConfig, options: EngineConfig, dtype: Any) -> EnginePlan:
    """The memory of one device of one engine, see `hmf_jax.memory.plan_engine`.

    On CPUs it takes little: 8 slots of at most 8192 tokens, unless told otherwise.
    """
    assert options.prefill_chunk is not None
    longest, gpu = options.max_model_len, on_gpu()
    if longest is None and not gpu:
        longest = min(config.max_position_embeddings, 8192)
    size = options.page_size or min(PAGE_SIZE if gpu else 256, longest or PAGE_SIZE)
    limit = memory_limit()
    fraction = _HEADROOM
    if limit is None:
        limit = host_memory() // (options.tp * options.dp)
        fraction = 0.5 if options.memory_fraction is None else options.memory_fraction
    return plan_engine(
        config,
        memory=limit,
        fraction=fraction,
        page_size=size,
        slots=options.slots,
        capacity=longest,
        most_slots=64 if gpu else 8,
        fill=gpu,
        prefixes=options.prefix_cache != "off",
        prefill_chunk=options.prefill_chunk,
        dtype=dtype,
        mesh=meshes(options)[0],
    )


def meshes(options: EngineConfig) -> list[Any]:
    """The mesh of each engine, None on one device."""
    if options.tp == 1:
        return [None] * options.dp
    devices, tp = jax.devices(), options.tp
    return [make_mesh(tp=tp, devices=devices[i * tp : (i + 1) * tp]) for i in range(options.dp)]


def copies(model: HybridLM, options: EngineConfig) -> list[HybridLM]:
    """The model, and its copies on the devices of the other engines."""
    others = zip(range(1, options.dp), meshes(options)[1:], strict=True)
    return [model, *(_copy(model, mesh, jax.devices()[i]) for i, mesh in others)]


def _copy(model: HybridLM, mesh: Any, device: Any) -> HybridLM:
    if mesh is None:
        return jax.device_put(model, device)
    abstract = nnx.eval_shape(lambda: HybridLM(model.config, dtype=model.dtype, mesh=mesh))
    place = {path: a.sharding for path, a in abstract_params(abstract, abstract.mesh).items()}
    params = {path: jax.device_put(x, place[path]) for path, x in flat_params(model).items()}
    copy = with_params(abstract, params)
    copy.source = model.source
    return copy


def make(model: HybridLM, options: EngineConfig, plan: EnginePlan) -> Engine:
    """An engine with what the plan gives it."""
    assert options.prefill_chunk is not None
    return Engine(
        model,
        plan.slots,
        capacity=plan.capacity,
        pages=plan.pages,
        page_size=plan.page_size,
        prefill_chunk=options.prefill_chunk,
        prefixes=options.prefix_cache,  # pyright: ignore[reportArgumentType]
        prefix_bytes=plan.prefix_bytes,
        host_bytes=host_bytes(options) // (options.dp * options.tp),  # per device, as pages are
        every=options.snapshot_every,
        spacing=spacing(options, plan),
        interleave=interleave(options.prefill_chunk),
        fixed=True,
        explain=False,
        threaded=True,
    )


def compile_ahead(config: HybridConfig, options: EngineConfig, plan: EnginePlan) -> None:
    """Compiles all programs of an engine on the first device, before there is a model for it.

    An engine whose model has been put on that device finds them in JAX's caches.
    """
    place = SingleDeviceSharding(jax.devices()[0])
    model = nnx.eval_shape(lambda: HybridLM(config, dtype=options.dtype))
    model = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), model)
    make(model, options, plan).warm()


def spacing(options: EngineConfig, plan: EnginePlan) -> int:
    """Fewest tokens between two snapshots of a prompt. Copying one takes no time, but it must not
    take too much of the memory that longer beginnings could have."""
    if options.snapshot_spacing is not None:
        return options.snapshot_spacing
    tokens = plan.snapshot_bytes * plan.page_size // max(_PART * plan.page_bytes, 1)
    return max(SMALLEST_CHUNK, tokens) if plan.page_bytes else SMALLEST_CHUNK


def interleave(chunk: int) -> int:
    """Most tokens that rows decode beside a chunk of a prompt, see `Engine`."""
    return max(1, chunk // _READ) if on_gpu() else 8


def host_bytes(options: EngineConfig) -> int:
    """Memory of the host for prefixes of all engines."""
    if options.prefix_cache == "off":
        return 0
    if options.host_bytes is not None:
        return options.host_bytes
    return host_memory() // 4 if on_gpu() else 0


def warm(engine: Engine, options: EngineConfig) -> None:
    """Compiles everything, and runs what takes most memory; libraries take theirs at first use."""
    assert options.prefill_chunk is not None
    engine.warm()
    length = min(options.prefill_chunk + 64, engine.capacity - 2)
    engine.add(Request([0] * length, max_new_tokens=2))
    while engine.busy:
        engine.step()
    engine.reset_prefixes()


def peak(devices: Sequence[Any]) -> int | None:
    """The most bytes that one of them has had in use; None: they do not say."""
    found = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    return max((n for n in found if n is not None), default=None)


def check_memory(plan: EnginePlan, devices: Sequence[Any]) -> None:
    """Compares the plan with what devices say that they have used; after `warm`.

    Raises:
      ValueError: there is no room for the snapshots of prefixes, which are yet to come.
    """
    used, limit = peak(devices), memory_limit()
    if used is not None and limit is not None and used + plan.prefix_bytes > limit:
        raise ValueError(
            f"a device has used {size_text(used)} at its peak, and prefixes may take "
            f"{size_text(plan.prefix_bytes)} more, of {size_text(limit)}; planned were "
            f"{size_text(plan.total)} in all: ask for fewer slots, shorter rows or smaller chunks"
        )


def memory_limit() -> int | None:
    """Bytes of a device that JAX may use; None: it does not say, as on CPUs."""
    return (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")


def cache_config(plan: EnginePlan, options: EngineConfig) -> dict[str, str]:
    """The plan as labels of a metric."""
    return {
        "block_size": str(plan.page_size),
        "num_gpu_blocks": str(plan.pages),
        "gpu_memory_utilization": os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION", ""),
        "enable_prefix_caching": str(options.prefix_cache != "off"),
        "prefix_cache": options.prefix_cache,
        "mamba_cache_dtype": "float32",
        "slots": str(plan.slots),
        "max_model_len": str(plan.capacity),
        "prefill_chunk": str(options.prefill_chunk),
        "weights_bytes": str(plan.weights),
        "slot_bytes": str(plan.slot_bytes),
        "page_bytes": str(plan.page_bytes),
        "snapshot_bytes": str(plan.snapshot_bytes),
        "prefix_bytes": str(plan.prefix_bytes),
        "host_bytes": str(host_bytes(options)),
        "planned_bytes": str(plan.total),
    }
