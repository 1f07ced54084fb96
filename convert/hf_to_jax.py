"""Hugging Face safetensors -> parameters on devices, tensor by tensor.

Each reader thread holds one checkpoint tensor at a time: it reads it, sends every device its part,
and transposes and casts there. So the host needs threads x the largest tensor beyond the arrays.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from tqdm import tqdm

from hmf_jax.config import HybridConfig
from hmf_jax.convert import mapping
from hmf_jax.convert.safetensors_io import DTYPES, Checkpoint

THREADS = 4
_CHUNK = 1 << 26  # elements compared or scanned at a time


def load(
    directory: str | Path,
    config: HybridConfig,
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    *,
    progress: bool = True,
    threads: int = THREADS,
) -> dict[str, jax.Array]:
    """Loads a checkpoint onto the devices.

    Args:
      directory: holds model*.safetensors (or is one such file).
      config: decides which tensors there must be, and their shapes.
      abstract: parameter path -> shape, dtype to hold it in, and sharding (None: default device).
      progress: show a bar with bytes and remaining time.
      threads: reader threads; host memory beyond the arrays is at most one tensor for each.

    Returns:
      parameter path -> array, laid out as `abstract` says.

    Raises:
      FileNotFoundError: no or incomplete weight files.
      ValueError: damaged files; or the list of all tensors that are missing, unexpected,
        wrong-shaped, of an unreadable dtype or not finite.
    """
    checkpoint = Checkpoint(directory)
    entries = mapping.table(config)
    _check_abstract(entries, abstract)
    tensors = mapping.by_tensor(entries)
    renamed, problems = check(checkpoint, config)
    if problems:
        problems += [_not_finite(n) for n in _scan(checkpoint, tensors, renamed)]
        raise ValueError(_message(directory, problems))

    params: dict[str, jax.Array] = {}
    finite: dict[str, jax.Array] = {}
    lock = threading.Lock()
    total = sum(checkpoint.tensors[renamed.get(n, n)].nbytes for n in tensors)

    # What `jax.enable_x64` and `jax.default_device` set for a block, other threads do not see.
    x64, device = jax.config.jax_enable_x64, jax.config.jax_default_device

    def work(name: str) -> None:
        raw = checkpoint.read(renamed.get(name, name))
        nbytes = raw.nbytes
        with jax.enable_x64(x64), jax.default_device(device):
            done = [(e.path, _place(raw, e, abstract[e.path])) for e in tensors[name]]
        del raw
        jax.block_until_ready(done)
        with lock:
            params.update({path: array for path, (array, _) in done})
            finite.update({f"{name}\n{path}": ok for path, (_, ok) in done})
            bar.update(nbytes)

    bar = tqdm(total=total, unit="B", unit_scale=True, desc="loading weights", disable=not progress)
    pool = ThreadPoolExecutor(threads)
    try:
        for job in [pool.submit(work, name) for name in tensors]:
            job.result()
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
    bad = sorted({key.split("\n")[0] for key, ok in jax.device_get(finite).items() if not ok})
    if bad:
        raise ValueError(_message(directory, [_not_finite(n) for n in bad]))
    return {e.path: params[e.path] for e in entries}


def check(checkpoint: Checkpoint, config: HybridConfig) -> tuple[dict[str, str], list[str]]:
    """Compares the checkpoint's headers with what the config needs.

    Returns:
      canonical name -> name in this checkpoint, where they differ; and one line per problem.
    """
    tensors = mapping.by_tensor(mapping.table(config))
    found = {n for n in checkpoint.tensors if not mapping.ignored(n)}
    renamed = mapping.find(found, config)
    used = {renamed.get(n, n) for n in tensors}
    problems = []
    for name, blocks in tensors.items():
        info = checkpoint.tensors.get(renamed.get(name, name))
        shape = mapping.tensor_shape(blocks)
        if info is None:
            problems.append(f"missing: {name} {list(shape)}")
        elif info.shape != shape:
            problems.append(f"wrong shape: {name} is {list(info.shape)}, must be {list(shape)}")
        elif info.dtype not in DTYPES:
            problems.append(f"wrong dtype: {name} is {info.dtype}; dequantize it to BF16 or F32")
    unexpected = sorted(found - used)
    if config.tie_word_embeddings and "lm_head.weight" in unexpected:
        unexpected.remove("lm_head.weight")
        embed = "model.embed_tokens.weight"
        if not problems and not _equal(checkpoint, "lm_head.weight", embed):
            problems.append(
                "wrong value: lm_head.weight differs from model.embed_tokens.weight although "
                "tie_word_embeddings is true; set it to false in config.json"
            )
    for name in unexpected:
        hint = " (teacher of a fused stage-1 layer? unfuse first)" if ".self_attn." in name else ""
        problems.append(f"unexpected: {name}{hint}")
    return renamed, problems


def stored_dtypes(directory: str | Path, config: HybridConfig) -> dict[str, str]:
    """Canonical checkpoint name -> dtype ("BF16", "F32", ...) the tensor is stored in."""
    checkpoint = Checkpoint(directory)
    renamed = mapping.find(set(checkpoint.tensors), config)
    names = mapping.by_tensor(mapping.table(config))
    found = {n: checkpoint.tensors.get(renamed.get(n, n)) for n in names}
    return {n: info.dtype for n, info in found.items() if info is not None}


def _place(
    raw: np.ndarray, entry: mapping.Entry, target: jax.ShapeDtypeStruct
) -> tuple[jax.Array, jax.Array]:
    """One parameter from its checkpoint tensor, and whether all its values are finite."""
    block = raw[entry.start : entry.start + entry.shape[0]]
    if entry.layout == "conv":
        block = block.reshape(entry.shape[0], entry.shape[2])
    if block.dtype == np.float64:  # JAX would narrow it, with a warning
        block = block.astype(np.float32)
    sharding = target.sharding
    if sharding is None:
        x = jax.device_put(block)
    else:
        source = _transposed(sharding) if entry.transposed else sharding
        x = jax.make_array_from_callback(block.shape, source, lambda index: block[index])
    if entry.transposed or x.dtype != target.dtype:
        return _convert(entry.transposed, jnp.dtype(target.dtype), sharding)(x)
    return x, _all_finite(x)


def _transposed(sharding: Sharding) -> Sharding:
    """The sharding of a matrix whose transpose is to be laid out by `sharding`."""
    if isinstance(sharding, NamedSharding):
        rows, columns, *_ = (*sharding.spec, None, None)
        return NamedSharding(sharding.mesh, PartitionSpec(columns, rows))
    if sharding.is_fully_replicated:
        return sharding
    raise ValueError(f"matrices need a NamedSharding or a replicated one, got {sharding}")


@functools.lru_cache(maxsize=256)
def _convert(transpose: bool, dtype: np.dtype, sharding: Sharding | None):
    def convert(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = (x.T if transpose else x).astype(dtype)
        return y, jnp.isfinite(y).all()

    return jax.jit(convert, out_shardings=None if sharding is None else (sharding, None))


@jax.jit
def _all_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()


def _check_abstract(entries: list[mapping.Entry], abstract: Mapping[str, Any]) -> None:
    """The model and the mapping table must agree; they come from the same config."""
    wanted = {e.path: e.parameter_shape for e in entries}
    given = {path: tuple(a.shape) for path, a in abstract.items()}
    if wanted != given:
        wrong = sorted(p for p in wanted.keys() | given.keys() if wanted.get(p) != given.get(p))
        lines = [f"{p}: table {wanted.get(p)}, model {given.get(p)}" for p in wrong]
        raise ValueError("the model does not fit this config:\n  " + "\n  ".join(lines))


def _scan(checkpoint: Checkpoint, tensors: Mapping[str, Any], renamed: Mapping[str, str]):
    """Names of readable tensors that hold NaN or infinity, checked on the host piece by piece."""
    for name in tensors:
        info = checkpoint.tensors.get(renamed.get(name, name))
        if info is None or info.dtype not in DTYPES:
            continue
        parts = _pieces(checkpoint, renamed.get(name, name))
        if not all(np.isfinite(part).all() for part in parts):
            yield name


def _equal(checkpoint: Checkpoint, a: str, b: str) -> bool:
    if checkpoint.tensors[a].shape != checkpoint.tensors[b].shape:
        return False
    pairs = zip(_pieces(checkpoint, a), _pieces(checkpoint, b), strict=True)
    return all(np.array_equal(x.astype(np.float32), y.astype(np.float32)) for x, y in pairs)


def _pieces(checkpoint: Checkpoint, name: str):
    shape = checkpoint.tensors[name].shape
    if not shape:
        yield checkpoint.read(name)
        return
    rows = max(1, _CHUNK // max(1, int(np.prod(shape[1:]))))
    for start in range(0, shape[0], rows):
        yield checkpoint.read(name, start, start + rows)


def _not_finite(name: str) -> str:
    return f"not finite: {name} holds NaN or infinity"


def _message(directory: str | Path, problems: list[str]) -> str:
    lines = "\n  ".join(problems)
    return f"{directory}: {len(problems)} tensors do not fit the config:\n  {lines}"
