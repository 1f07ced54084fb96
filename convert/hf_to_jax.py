"""Hugging Face safetensors -> parameters on devices, tensor by tensor.

Each reader thread holds one checkpoint tensor at a time: it reads it, sends every device its part,
and transposes and casts there. So the host needs threads x the largest tensor beyond the arrays.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, Sharding
from tqdm import tqdm

from hmf_jax.convert.reading import printable, summary
from hmf_jax.convert.rows import Entry, by_tensor, tensor_shape
from hmf_jax.convert.safetensors_io import DTYPES, Checkpoint

THREADS = 4
_CHUNK = 1 << 26  # elements compared or scanned at a time


def load(
    directory: str | Path,
    entries: Sequence[Entry],
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    *,
    aliases: Mapping[str, str] | None = None,
    copies: Mapping[str, str] | None = None,
    progress: bool = True,
    threads: int = THREADS,
) -> dict[str, jax.Array]:
    """Loads a checkpoint onto the devices.

    Args:
      directory: holds model*.safetensors (or is one such file).
      entries: the tensors that there must be, and the parameters that they become.
      abstract: parameter path -> shape, dtype to hold it in, and sharding (None: default device).
      aliases: beginning of tensor names -> what the checkpoint may have in its place.
      copies: tensors that it may hold although they equal another one -> that one.
      progress: show a bar with bytes and remaining time.
      threads: reader threads; host memory beyond the arrays is at most one tensor for each.

    Returns:
      parameter path -> array, laid out as `abstract` says.

    Raises:
      FileNotFoundError: no or incomplete weight files.
      ValueError: damaged files; or a list of the tensors that are missing, unexpected,
        wrong-shaped, of an unreadable dtype or not finite.
    """
    _check_abstract(entries, abstract)
    checkpoint, renamed = check(directory, entries, aliases=aliases, copies=copies)
    tensors = by_tensor(entries)
    problems = [
        f"wrong value: {name} differs from {original} although tie_word_embeddings is true; set it "
        "to false in config.json"
        for name, original in (copies or {}).items()
        if name in checkpoint.tensors and not _equal(checkpoint, name, original)
    ]
    if problems:
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


def check(
    directory: str | Path,
    entries: Sequence[Entry],
    *,
    aliases: Mapping[str, str] | None = None,
    copies: Mapping[str, str] | None = None,
) -> tuple[Checkpoint, dict[str, str]]:
    """Compares the headers of a checkpoint with what is needed, before anything is made for it.

    Arguments and errors as in `load`.

    Returns:
      the checkpoint; and canonical tensor name -> name in this checkpoint, where they differ.
    """
    checkpoint, tensors = Checkpoint(directory), by_tensor(entries)
    # Old checkpoints store these buffers, which the config already determines.
    found = {n for n in checkpoint.tensors if not n.endswith("rotary_emb.inv_freq")}
    renamed = _renamed(found, aliases or {})
    used = {renamed.get(n, n) for n in tensors}
    problems = []
    for name, blocks in tensors.items():
        info = checkpoint.tensors.get(renamed.get(name, name))
        shape = tensor_shape(blocks)
        if info is None:
            problems.append(f"missing: {name} {list(shape)}")
        elif info.shape != shape:
            found_shape = printable(list(info.shape))
            problems.append(f"wrong shape: {name} is {found_shape}, must be {list(shape)}")
        elif info.dtype not in DTYPES:
            problems.append(f"wrong dtype: {name} is {info.dtype}; dequantize it to BF16 or F32")
    for name in sorted(found - used - set(copies or {})):
        hint = " (teacher of a fused stage-1 layer? unfuse first)" if ".self_attn." in name else ""
        problems.append(f"unexpected: {printable(name)}{hint}")
    if problems:
        problems += [_not_finite(n) for n in _scan(checkpoint, tensors, renamed)]
        raise ValueError(_message(directory, problems))
    return checkpoint, renamed


def stored_dtypes(
    directory: str | Path, entries: Sequence[Entry], *, aliases: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Canonical checkpoint name -> dtype ("BF16", "F32", ...) the tensor is stored in."""
    checkpoint = Checkpoint(directory)
    renamed = _renamed(set(checkpoint.tensors), aliases or {})
    found = {n: checkpoint.tensors.get(renamed.get(n, n)) for n in by_tensor(entries)}
    return {n: info.dtype for n, info in found.items() if info is not None}


def _renamed(names: set[str], aliases: Mapping[str, str]) -> dict[str, str]:
    """Canonical tensor name -> name in a checkpoint that holds `names`, for names that differ."""
    renamed = {}
    for new, old in aliases.items():
        if not any(n.startswith(new) for n in names):
            renamed |= {new + n.removeprefix(old): n for n in names if n.startswith(old)}
    return renamed


def _place(
    raw: np.ndarray, entry: Entry, target: jax.ShapeDtypeStruct
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
    return x, all_finite(x)


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
def all_finite(x: jax.Array) -> jax.Array:
    """Whether no number is NaN or infinite."""
    return jnp.isfinite(x).all()


def _check_abstract(entries: Sequence[Entry], abstract: Mapping[str, Any]) -> None:
    """The model and the table must agree; they come from the same config."""
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
    one, two = checkpoint.tensors[a], checkpoint.tensors[b]
    if one.shape != two.shape or one.dtype not in DTYPES:
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
    count = "1 tensor does" if len(problems) == 1 else f"{len(problems)} tensors do"
    return summary(f"{directory}: {count} not fit the config:", problems)
