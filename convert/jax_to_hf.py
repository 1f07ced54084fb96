"""Parameters -> a Hugging Face directory that the original and this package load."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from hmf_jax.convert.directories import COMPANIONS, replacing
from hmf_jax.convert.reading import inside, summary
from hmf_jax.convert.rows import Entry, by_tensor, tensor_shape
from hmf_jax.convert.safetensors_io import (
    DTYPES,
    Pending,
    common_dtype,
    dtype_name,
    parse_size,
    write,
)


def save(
    directory: str | Path,
    config: Mapping[str, Any],
    entries: Sequence[Entry],
    params: Mapping[str, jax.Array],
    *,
    dtypes: Mapping[str, str] | None = None,
    companions: str | Path | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    model_types: Collection[str] | None = None,
    progress: bool = True,
) -> None:
    """Writes config.json, safetensors and tokenizer files; all of them or nothing.

    Args:
      directory: target; it, or what it held before, is complete at every moment.
      config: the object of config.json.
      entries: the tensors to write, and the parameters that they are made of.
      params: parameter path -> array.
      dtypes: checkpoint name -> "BF16" | "F16" | "F32", e.g. those of the checkpoint the parameters
        came from (of parts, too); tensors it does not name keep the dtype they are held in.
      companions: directory whose tokenizer, chat template and generation_config.json are copied.
      max_shard_size: "5GB", "500MiB" or bytes.
      overwrite: replace a model that is already there; other files beside it are kept.
      model_types: which directories hold a model, see `directories.holds_model`.
      progress: show a bar with bytes and remaining time.

    Raises:
      FileExistsError: the directory is not empty (and `overwrite` cannot help or is off).
      OSError: it cannot be written, see `directories.check_target`.
      ValueError: parameters that are missing, unexpected, wrong-shaped or not finite, by name.
    """
    parse_size(max_shard_size)
    wanted = {e.path: e.parameter_shape for e in entries}
    problems = [f"missing: {p}" for p in wanted if p not in params]
    adapters = "  (an adapter: hmf_jax.training.merge_lora adds it to the weights first)"
    problems += [
        f"unexpected: {p}{adapters if 'lora_' in p else ''}" for p in params if p not in wanted
    ]
    problems += [
        f"wrong shape: {p} is {tuple(params[p].shape)}, must be {shape}"
        for p, shape in wanted.items()
        if p in params and tuple(params[p].shape) != shape
    ]
    bad: list[str] = []
    pending = [] if problems else _pending(entries, params, dtypes or {}, bad)
    if problems:
        raise ValueError(summary(f"nothing written to {directory}:", problems))

    files = {} if companions is None else companions_of(companions)
    total = sum(t.nbytes for t in pending)
    with replacing(directory, overwrite, model_types=model_types, space=total) as tmp:
        with tqdm(
            total=total, unit="B", unit_scale=True, desc="writing weights", disable=not progress
        ) as bar:
            write(tmp, pending, max_shard_size, bar.update)
        if bad:
            lines = [f"not finite: {n} holds NaN or infinity" for n in bad]
            raise ValueError(summary(f"nothing written to {directory}:", lines))
        write_config(tmp, config, pending[0].dtype)
        copy_companions(files, tmp)


def write_config(directory: Path, config: Mapping[str, Any], dtype: str) -> None:
    """config.json, whose `dtype` is that of the embeddings ("BF16", ...)."""
    older = "torch_dtype" in config and "dtype" not in config
    data = {**config, "torch_dtype" if older else "dtype": DTYPES[dtype].name}
    (directory / "config.json").write_text(
        json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


def companions_of(source: str | Path) -> dict[str, Path]:
    """Name -> file, of tokenizer files, chat templates and generation_config.json.

    Raises ValueError for symbolic links that lead out of the directory: what they lead to was never
    part of the model.
    """
    source = Path(source)
    found = [path for pattern in COMPANIONS for path in sorted(source.glob(pattern))]
    files = [f for path in found for f in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    names = [f.relative_to(source).as_posix() for f in files if f.is_file()]
    return {name: inside(source, name) for name in names}


def copy_companions(files: Mapping[str, Path], target: Path) -> None:
    """Copies what `companions_of` found."""
    for name, file in files.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target / name)


def tensors(entries: Sequence[Entry], params: Mapping[str, jax.Array]) -> dict[str, np.ndarray]:
    """Checkpoint name -> tensor in the checkpoint's layout and the held dtype, on the host.

    `params` may be anything shaped like the parameters, for example their gradients.
    """
    return {t.name: t.make() for t in _pending(entries, params, {}, [])}


def _pending(
    entries: Sequence[Entry],
    params: Mapping[str, jax.Array],
    dtypes: Mapping[str, str],
    bad: list[str],
) -> list[Pending]:
    """What is to be written; `bad` gets the names of tensors that turn out not to be finite."""
    last = _Last()
    out = []
    for name, blocks in by_tensor(entries).items():
        held = dtype_name(common_dtype(params[e.path].dtype for e in blocks))
        pieces = dict(blocks[0].pieces()) if blocks[0].split else {name: ...}
        own = {n: dtypes.get(n, dtypes.get(name, held)) for n in pieces}
        if unknown := [n for n, dtype in own.items() if dtype not in DTYPES]:
            n = unknown[0]
            raise ValueError(f"{n}: cannot write dtype {own[n]!r}; use one of {list(DTYPES)}")
        shape, dtype = tensor_shape(blocks), common_dtype(DTYPES[d] for d in own.values())
        make = functools.partial(_assemble, name, blocks, params, dtype, bad)
        if not blocks[0].split:
            out.append(Pending(name, own[name], shape, make))
            continue
        part = (shape[1] // len(blocks[0].parts), *shape[2:])
        for n, index in pieces.items():
            cut = functools.partial(last.part, name, make, index, DTYPES[own[n]])
            out.append(Pending(n, own[n], part, cut))
    return out


class _Last:
    """The tensor whose parts are being written, made once for all of them."""

    name: str | None = None
    value: np.ndarray | None = None

    def part(
        self, name: str, make: Callable[[], np.ndarray], index: Any, dtype: np.dtype
    ) -> np.ndarray:
        if name != self.name or self.value is None:
            self.value = None  # never two at a time
            self.name, self.value = name, make()
        return self.value[index].astype(dtype, copy=False)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _convert(x: jax.Array, transpose: bool, dtype: np.dtype) -> tuple[jax.Array, jax.Array]:
    y = (x.mT if transpose else x).astype(dtype)
    return y, jnp.isfinite(y).all()


def _assemble(
    name: str,
    blocks: list[Entry],
    params: Mapping[str, jax.Array],
    dtype: np.dtype,
    bad: list[str],
) -> np.ndarray:
    """The checkpoint tensor on the host; its name goes to `bad` if it is not finite."""
    shape = tensor_shape(blocks)
    out = None if len(blocks) == 1 else np.empty(shape, dtype)
    for e in blocks:
        y, finite = _convert(params[e.path], e.transposed, dtype)
        if not finite and name not in bad:
            bad.append(name)
        part = np.asarray(y).reshape(e.shape).astype(dtype, copy=False)
        if out is None:
            return part
        out[e.rows] = part
    assert out is not None
    return out
