"""Loading and saving models: Hugging Face repositories and directories, and Orbax directories.

An Orbax directory of ours holds `config.json`, `params/` (sharded arrays, restorable on any mesh),
`stored_dtypes.json` (dtypes of the checkpoint it came from) and the tokenizer files.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx, traverse_util
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import tqdm as hub_tqdm
from jax.sharding import Mesh

from hmf_jax import table
from hmf_jax.config import HybridConfig
from hmf_jax.convert import hf_to_jax, jax_to_hf
from hmf_jax.convert.safetensors_io import DTYPES, dtype_name
from hmf_jax.model import HybridLM
from hmf_jax.parameters import abstract_params, flat_params, with_params
from hmf_jax.sharding import for_model

__all__ = [
    "abstract_params",  # of hmf_jax.parameters
    "convert_directory",
    "flat_params",
    "from_pretrained",
    "resolve",
    "save_orbax",
    "save_pretrained",
    "with_params",
]

_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "*.txt", "tokenizer*", "vocab.*", "merges.*"]
_PARAMS, _DTYPES = "params", "stored_dtypes.json"


def from_pretrained(
    repo_or_dir: str | Path,
    *,
    mesh: Mesh | None = None,
    dtype: Any = jnp.bfloat16,
    num_iter: int | None = None,
    config_overrides: Mapping[str, Any] | None = None,
    revision: str | None = None,
    progress: bool = True,
) -> HybridLM:
    """Loads a model.

    Args:
      repo_or_dir: a Hugging Face repository id (downloaded through its cache), a local Hugging Face
        directory (config.json, model*.safetensors), or a directory written by `save_orbax`.
      mesh: device mesh from `make_mesh`; every parameter goes straight to its shards. None: one
        device.
      dtype: dtype of parameters and activations; None or "auto" keeps each tensor's stored dtype
        and computes in that of the embeddings. A_log, dt_bias and D are float32 in any case.
      num_iter: Chebyshev iterations of GKA layers, in place of the config's.
      config_overrides: other values for keys of config.json, see `HybridConfig.override`.
      revision: branch, tag or commit of a repository.
      progress: show download and loading bars.

    Raises:
      FileNotFoundError: no such directory or repository, no config.json, or missing weight files.
      ValueError: an unsupported config, damaged files, or the list of all tensors that are missing,
        unexpected, wrong-shaped or not finite.
    """
    directory = resolve(repo_or_dir, revision=revision, progress=progress)
    config = HybridConfig.from_json(directory).override(config_overrides or {})
    if num_iter is not None:
        if config.gka is None:
            raise ValueError(f"{directory} has no GKA layers: leave num_iter out")
        gka = dataclasses.replace(config.gka, num_iter=num_iter)
        config = dataclasses.replace(config, gka=gka)
    mesh = for_model(mesh, config)
    stored = None
    if dtype is None or (isinstance(dtype, str) and dtype == "auto"):
        stored = _held_dtypes(directory, config)
        dtype = stored["embed_tokens.embedding"]
    model = nnx.eval_shape(lambda: HybridLM(config, dtype=dtype, mesh=mesh))
    abstract = abstract_params(model, mesh)
    if stored is not None:
        abstract = {
            path: jax.ShapeDtypeStruct(a.shape, stored[path], sharding=a.sharding)
            for path, a in abstract.items()
        }
    if _is_orbax(directory):
        params = _restore(directory, abstract)
    else:
        params = hf_to_jax.load(
            directory,
            table.entries(config),
            abstract,
            aliases=table.aliases(config),
            copies=table.copies(config),
            progress=progress,
        )
    model = with_params(model, params)
    model.source = str(directory)
    return model


def save_pretrained(
    model: HybridLM,
    directory: str | Path,
    *,
    source: str | Path | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: bool = True,
) -> None:
    """Writes a Hugging Face directory that the original and this package load.

    A base model (Qwen3) that was loaded and is still one comes back as it was read, so that
    transformers loads it; everything else is written as a hybrid.

    Args:
      model: the model.
      directory: appears only once it is complete.
      source: the local directory the model came from (default: the one it was loaded from): its
        tokenizer files are copied and its tensors' dtypes are kept, so that loading (in the stored
        dtype) and saving gives the same bytes. Without one, or where it holds a model of other
        layers (that this one was primed from), and after `HybridLM.astype`, tensors keep the dtype
        they are held in.
      max_shard_size: largest weight file, e.g. "5GB", "500MiB" or a number of bytes.
      overwrite: replace a directory that already holds a model.
      progress: show a bar.

    Raises:
      FileExistsError: the directory is not empty.
      ValueError: parameters that are not finite, by name; nothing is written.
    """
    source = source or model.source
    jax_to_hf.save(
        directory,
        model.config.to_dict(),
        table.entries(model.config),
        flat_params(model),
        dtypes=None if model.origin.recast else _stored_dtypes(source, model.config),
        companions=source,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        progress=progress,
    )


def save_orbax(
    model: HybridLM,
    directory: str | Path,
    *,
    source: str | Path | None = None,
    overwrite: bool = False,
) -> None:
    """Writes an Orbax directory; `from_pretrained` restores it on any mesh. `source`, `overwrite`
    and errors as in `save_pretrained`."""
    source = source or model.source
    params = flat_params(model)
    bad = [p for p, x in params.items() if not jnp.isfinite(x).all()]
    if bad:
        raise ValueError(f"nothing written to {directory}; not finite: {', '.join(bad)}")
    stored = None if model.origin.recast else _stored_dtypes(source, model.config)
    with jax_to_hf.replacing(directory, overwrite) as tmp:
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(tmp / _PARAMS, traverse_util.unflatten_dict(params, sep="."))
        embedding = dtype_name(params["embed_tokens.embedding"].dtype)
        jax_to_hf.write_config(tmp, model.config.to_dict(), embedding)
        if stored is not None:
            (tmp / _DTYPES).write_text(json.dumps(stored, indent=0) + "\n")
        if source is not None:
            jax_to_hf.copy_companions(source, tmp)


def convert_directory(
    source: str | Path,
    target: str | Path,
    *,
    to: Literal["orbax", "hf"] | None = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    progress: bool = True,
) -> Literal["orbax", "hf"]:
    """A model directory in the other format, every number bit-identical.

    Args:
      source: directory or repository of a model.
      target: the directory to write.
      to: the format to write; None: Orbax from safetensors, else Hugging Face's.
      max_shard_size, overwrite, progress: see `save_pretrained`.

    Returns:
      the format written.

    Raises: what `from_pretrained` and `save_pretrained` raise.
    """
    directory = resolve(source, progress=progress)
    if to is None:
        to = "orbax" if any(directory.glob("*.safetensors")) else "hf"
    model = from_pretrained(directory, dtype=None, progress=progress)
    if to == "orbax":
        save_orbax(model, target, overwrite=overwrite)
    else:
        save_pretrained(
            model, target, max_shard_size=max_shard_size, overwrite=overwrite, progress=progress
        )
    return to


def resolve(repo_or_dir: str | Path, *, revision: str | None = None, progress: bool = True) -> Path:
    """The local directory of a model: `repo_or_dir` itself, or the cached download of a repository.

    Raises FileNotFoundError, saying what was tried, if there is neither.
    """
    path = Path(repo_or_dir).expanduser()
    if path.is_dir():
        return path
    name = str(repo_or_dir)
    if path.exists():
        raise FileNotFoundError(f"{path} is a file; pass the directory that holds it")
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or name.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"{name} is not a directory, nor a Hugging Face repository id like 'org/model'"
        )
    try:
        return Path(
            huggingface_hub.snapshot_download(
                name,
                revision=revision,
                allow_patterns=_PATTERNS,
                tqdm_class=None if progress else _Silent,
            )
        )
    except LocalEntryNotFoundError as e:
        raise FileNotFoundError(
            f"{name} is not in the local cache and huggingface.co cannot be reached; check the "
            "network (and HF_HUB_OFFLINE), or pass a local directory"
        ) from e
    except (HfHubHTTPError, HFValidationError) as e:
        raise FileNotFoundError(
            f"cannot download {name}: no such directory here, and huggingface.co says: {e}. Check "
            "the name and revision; for private or gated models run `hf auth login` first"
        ) from e


def _is_orbax(directory: Path) -> bool:
    return (directory / _PARAMS).is_dir()


def _stored_dtypes(source: str | Path | None, config: HybridConfig) -> dict[str, str] | None:
    """Dtypes of the checkpoint in (or behind) this directory; None if it is not known."""
    if source is None:
        return None
    directory = Path(source)
    if _is_of_another_model(directory, config):
        return None
    if _is_orbax(directory):
        file = directory / _DTYPES
        return json.loads(file.read_text()) if file.is_file() else None
    if not directory.is_dir() or not any(directory.glob("model*.safetensors")):
        return None
    return _checkpoint_dtypes(directory, config)


def _checkpoint_dtypes(directory: Path, config: HybridConfig) -> dict[str, str]:
    """Checkpoint name -> dtype, of a Hugging Face directory."""
    aliases = table.aliases(config)
    return hf_to_jax.stored_dtypes(directory, table.entries(config), aliases=aliases)


def _is_of_another_model(directory: Path, config: HybridConfig) -> bool:
    """Whether it holds what the model was made from (by priming, unfusing), not the model."""
    if not (directory / "config.json").is_file():
        return False
    return HybridConfig.from_json(directory).layer_kinds != config.layer_kinds


def _held_dtypes(directory: Path, config: HybridConfig) -> dict[str, np.dtype]:
    """Parameter path -> dtype to hold it in when the stored dtypes are to be kept."""
    if _is_orbax(directory):
        found = {path: np.dtype(a.dtype) for path, a in _orbax_metadata(directory).items()}
    else:
        stored = _checkpoint_dtypes(directory, config)
        found = {
            e.path: DTYPES.get(stored.get(e.name, "F32"), DTYPES["F32"])
            for e in table.entries(config)
        }
    float32 = DTYPES["F32"]  # also what JAX makes of float64
    half = nnx.eval_shape(lambda: HybridLM(config, dtype=jnp.bfloat16))
    always = {path for path, a in abstract_params(half, None).items() if a.dtype == float32}
    return {
        path: float32 if path in always or d == DTYPES["F64"] else d for path, d in found.items()
    }


def _orbax_metadata(directory: Path) -> dict[str, Any]:
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.metadata((directory / _PARAMS).absolute()).item_metadata.tree
    return traverse_util.flatten_dict(tree, sep=".")


def _restore(directory: Path, abstract: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    """Parameters of an Orbax directory, each straight onto its shards."""
    found = {path: tuple(a.shape) for path, a in _orbax_metadata(directory).items()}
    problems = [f"missing: {p}" for p in abstract if p not in found]
    problems += [f"unexpected: {p}" for p in found if p not in abstract]
    problems += [
        f"wrong shape: {p} is {list(found[p])}, must be {list(a.shape)}"
        for p, a in abstract.items()
        if p in found and found[p] != a.shape
    ]
    if problems:
        lines = "\n  ".join(problems)
        raise ValueError(f"{directory}: parameters do not fit the config:\n  {lines}")
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    target = {
        p: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding or device)
        for p, a in abstract.items()
    }
    with ocp.StandardCheckpointer() as checkpointer:
        tree: Any = checkpointer.restore(
            (directory / _PARAMS).absolute(), traverse_util.unflatten_dict(target, sep=".")
        )
    flat: Any = traverse_util.flatten_dict(tree, sep=".")
    return flat


class _Silent(hub_tqdm):
    """A download bar that shows nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{**kwargs, "disable": True})
