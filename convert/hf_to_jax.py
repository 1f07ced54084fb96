"""Hugging Face safetensors -> parameters on devices, tensor by tensor.

Each reader thread holds one checkpoint tensor at a time: it reads it, sends every device its part,
and transposes and casts there. So the host needs threads x the largest tensor beyond the arrays;
gate and up matrices of all experts of a layer are one tensor, also where they are stored by expert.
"""

from __future__ import annotations

import bisect
import functools
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
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
from hmf_jax.convert.safetensors_io import DTYPES, Checkpoint, aligned, common_dtype

THREADS = 4
_CHUNK = 1 << 26  # elements compared or scanned at a time
# Tensor -> names it is stored under, and what of the tensor each of them holds, as an index.
Sources = dict[str, dict[str, Any]]


def load(
    directory: str | Path,
    entries: Sequence[Entry],
    abstract: Mapping[str, jax.ShapeDtypeStruct],
    *,
    aliases: Mapping[str, str] | None = None,
    copies: Mapping[str, str] | None = None,
    prefixes: Mapping[str, str] | None = None,
    ignored: Collection[str] = (),
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
      prefixes: beginning of names in the checkpoint -> what it stands for.
      ignored: beginnings of names, as the checkpoint has them, of tensors that nothing needs.
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
    checkpoint, sources = check(
        directory, entries, aliases=aliases, copies=copies, prefixes=prefixes, ignored=ignored
    )
    tensors = by_tensor(entries)
    problems = [
        f"wrong value: {name} differs from {original} although tie_word_embeddings is true; set it "
        "to false in config.json"
        for name, original in (copies or {}).items()
        if name in sources and not _equal(checkpoint, *sources[name], *sources[original])
    ]
    if problems:
        raise ValueError(_message(directory, problems))

    params: dict[str, jax.Array] = {}
    finite: dict[str, jax.Array] = {}
    lock = threading.Lock()
    total = sum(checkpoint.tensors[stored].nbytes for n in tensors for stored in sources[n])

    # What `jax.enable_x64` and `jax.default_device` set for a block, other threads do not see.
    x64, device = jax.config.jax_enable_x64, jax.config.jax_default_device

    def work(name: str) -> None:
        raw = _read(checkpoint, sources[name], tensor_shape(tensors[name]))
        nbytes = sum(checkpoint.tensors[stored].nbytes for stored in sources[name])
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
        found = [n for name in bad for n in _scan(checkpoint, name, sources[name]) or [name]]
        raise ValueError(_message(directory, [_not_finite(n) for n in found]))
    return {e.path: params[e.path] for e in entries}


def check(
    directory: str | Path,
    entries: Sequence[Entry],
    *,
    aliases: Mapping[str, str] | None = None,
    copies: Mapping[str, str] | None = None,
    prefixes: Mapping[str, str] | None = None,
    ignored: Collection[str] = (),
) -> tuple[Checkpoint, Sources]:
    """Compares the headers of a checkpoint with what is needed, before anything is made for it.

    Arguments and errors as in `load`.

    Returns:
      the checkpoint, and where in it each tensor is.
    """
    checkpoint, tensors = Checkpoint(directory), by_tensor(entries)
    names = _names(checkpoint, aliases, prefixes)
    sources: Sources = {}
    problems = []
    for name, blocks in tensors.items():
        sources[name] = {}
        for wanted, (index, shape) in _wanted(names, blocks).items():
            info = checkpoint.tensors.get(stored := names.get(wanted, ""))
            if info is None:
                parts = [part.format(0) for part in blocks[0].parts if wanted == name]
                instead = f", or {parts[0]} and so on" if parts else ""
                problems.append(f"missing: {wanted} {list(shape)}{instead}")
                continue
            sources[name][stored] = index
            if info.shape != shape:
                found = printable(list(info.shape))
                problems.append(f"wrong shape: {wanted} is {found}, must be {list(shape)}")
            elif info.dtype not in DTYPES:
                problems.append(
                    f"wrong dtype: {wanted} is {info.dtype}; dequantize it to BF16 or F32"
                )
    used = {stored for where in sources.values() for stored in where}
    sources |= {copy: {names[copy]: ...} for copy in copies or {} if copy in names}
    used |= {stored for copy in copies or {} for stored in sources.get(copy, {})}
    for name in sorted(checkpoint.tensors.keys() - used):
        # Old checkpoints store these buffers, which the config already determines.
        if name.endswith("rotary_emb.inv_freq") or name.startswith(tuple(ignored)):
            continue
        hint = " (teacher of a fused stage-1 layer? unfuse first)" if ".self_attn." in name else ""
        problems.append(f"unexpected: {printable(name)}{hint}")
    if problems:
        damaged = (n for name in tensors for n in _scan(checkpoint, name, sources[name]))
        problems += [_not_finite(n) for n in damaged]
        raise ValueError(_message(directory, problems))
    return checkpoint, sources


def stored_dtypes(
    directory: str | Path,
    entries: Sequence[Entry],
    *,
    aliases: Mapping[str, str] | None = None,
    prefixes: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Checkpoint name, as in `entries` -> dtype ("BF16", "F32", ...) the tensor is stored in.

    Of a tensor that is stored in parts: theirs, or one for all if they agree.
    """
    checkpoint = Checkpoint(directory)
    names = _names(checkpoint, aliases, prefixes)
    out: dict[str, str] = {}
    for name, blocks in by_tensor(entries).items():
        wanted = [n for n in _wanted(names, blocks) if n in names]
        found = {n: checkpoint.tensors[names[n]].dtype for n in wanted}
        same = len(set(found.values())) == 1
        out |= {name: next(iter(found.values()))} if same else found
    return out


def held_dtype(stored: Mapping[str, str], entry: Entry) -> np.dtype:
    """What holds a parameter exactly, given `stored_dtypes`; float32 if they do not name it."""
    names = [entry.name] if entry.name in stored else [n for n, _ in entry.pieces() if n in stored]
    return common_dtype(DTYPES.get(stored[n], DTYPES["F32"]) for n in names)


def _names(
    checkpoint: Checkpoint,
    aliases: Mapping[str, str] | None,
    prefixes: Mapping[str, str] | None,
) -> dict[str, str]:
    """Names as in the table -> names in the checkpoint, of all that it holds."""
    names = {name: name for name in checkpoint.tensors}
    for old, new in (prefixes or {}).items():
        for name in checkpoint.tensors:
            if name.startswith(old):
                names.setdefault(new + name.removeprefix(old), name)
    ordered = sorted(names)

    def beginning(prefix: str) -> list[str]:
        first = bisect.bisect_left(ordered, prefix)
        last = bisect.bisect_left(ordered, prefix + chr(0x10FFFF))
        return ordered[first:last]

    for new, old in (aliases or {}).items():
        if not beginning(new):
            names |= {new + name.removeprefix(old): names[name] for name in beginning(old)}
    return names


def _wanted(
    names: Collection[str], blocks: Sequence[Entry]
) -> dict[str, tuple[Any, tuple[int, ...]]]:
    """Name -> index and shape, of what a tensor is read from: itself, or its parts."""
    first, shape = blocks[0], tensor_shape(blocks)
    if first.name in names or not any(name in names for name, _ in first.pieces()):
        return {first.name: (..., shape)}
    part = (shape[1] // len(first.parts), *shape[2:])
    return {name: (index, part) for name, index in first.pieces()}


def _read(checkpoint: Checkpoint, source: Mapping[str, Any], shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of this shape, in the dtype that holds all its parts."""
    if len(source) == 1:
        return checkpoint.read(next(iter(source))).reshape(shape)
    dtype = common_dtype(DTYPES[checkpoint.tensors[name].dtype] for name in source)
    out = aligned(shape, dtype)
    for name, index in source.items():
        checkpoint.read_into(out[index], name)
    return out


def _place(
    raw: np.ndarray, entry: Entry, target: jax.ShapeDtypeStruct
) -> tuple[jax.Array, jax.Array]:
    """One parameter from its checkpoint tensor, and whether all its values are finite."""
    block = raw[entry.rows]
    if entry.layout == "conv":
        block = block.reshape(entry.shape[0], entry.shape[2])
    if block.dtype == np.float64:  # JAX would narrow it, with a warning
        block = block.astype(np.float32)
    sharding = target.sharding
    if sharding is None:
        x = jax.device_put(block)
    else:
        source = _transposed(sharding, block.ndim) if entry.transposed else sharding
        x = jax.make_array_from_callback(block.shape, source, lambda index: block[index])
    if entry.transposed or x.dtype != target.dtype:
        return _convert(entry.transposed, jnp.dtype(target.dtype), sharding)(x)
    return x, all_finite(x)


def _transposed(sharding: Sharding, ndim: int) -> Sharding:
    """The sharding of a matrix (or a stack of them) whose transpose is to lie as in `sharding`."""
    if isinstance(sharding, NamedSharding):
        *lead, rows, columns = (*sharding.spec, *[None] * ndim)[:ndim]
        return NamedSharding(sharding.mesh, PartitionSpec(*lead, columns, rows))
    if sharding.is_fully_replicated:
        return sharding
    raise ValueError(f"matrices need a NamedSharding or a replicated one, got {sharding}")


@functools.lru_cache(maxsize=256)
def _convert(transpose: bool, dtype: np.dtype, sharding: Sharding | None):
    def convert(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        y = (x.mT if transpose else x).astype(dtype)
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


def _scan(checkpoint: Checkpoint, name: str, source: Mapping[str, Any]) -> list[str]:
    """Names of what holds NaN or infinity of a tensor, checked on the host piece by piece."""
    readable = [stored for stored in source if checkpoint.tensors[stored].dtype in DTYPES]
    bad = [
        stored
        for stored in readable
        if not all(np.isfinite(part).all() for part in _pieces(checkpoint, stored))
    ]
    return bad if len(source) > 1 else [name for _ in bad]


def _equal(checkpoint: Checkpoint, a: str, b: str) -> bool:
    one, two = checkpoint.tensors[a], checkpoint.tensors[b]
    if one.shape != two.shape or one.dtype not in DTYPES:
        return False
    pairs = zip(_pieces(checkpoint, a), _pieces(checkpoint, b), strict=True)
    return all(np.array_equal(x.astype(np.float32), y.astype(np.float32)) for x, y in pairs)


def _pieces(checkpoint: Checkpoint, name: str) -> Iterator[np.ndarray]:
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
