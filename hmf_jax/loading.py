"""Loading and saving models: Hugging Face repositories and directories, and Orbax directories.

An Orbax directory of ours holds `config.json`, `params/` (sharded arrays, restorable on any mesh),
`stored_dtypes.json` (dtypes of the checkpoint it came from), the tokenizer files, and
`checksums.sha256` of all these, which is compared when the directory is read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import tqdm as hub_tqdm
from jax.sharding import Mesh

from hmf_jax import table
from hmf_jax.config import HybridConfig
from hmf_jax.convert import gguf_to_hf, hf_to_jax, jax_to_hf, orbax_io
from hmf_jax.convert.directories import (
    DTYPES_FILE,
    check_checksums,
    check_target,
    is_orbax,
    read_json,
    recover,
    replacing,
    write_checksums,
)
from hmf_jax.convert.reading import first_line, summary
from hmf_jax.convert.safetensors_io import DTYPES, dtype_name, parse_size
from hmf_jax.families import model_types
from hmf_jax.model import HybridLM
from hmf_jax.parameters import abstract_params, flat_params, float_dtype, with_params
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
      num_iter: Chebyshev iterations of GKA layers, in place of the config's; at most 1000.
      config_overrides: other values for keys of config.json, see `HybridConfig.override`.
      revision: branch, tag or commit of a repository; not with a directory.
      progress: show download and loading bars.

    Raises:
      FileNotFoundError: no such directory or repository, no config.json, or missing weight files.
      ConnectionError: the download stopped; the next call continues it.
      ValueError: an unsupported config or argument, files of another format, damaged files, or a
        list of the tensors that are missing, unexpected, wrong-shaped or not finite.
    """
    automatic = dtype is None or (isinstance(dtype, str) and dtype == "auto")
    dtype = None if automatic else float_dtype(dtype)
    if mesh is not None and not isinstance(mesh, Mesh):
        raise ValueError(f"mesh must be a jax.sharding.Mesh, see hmf_jax.make_mesh; got {mesh!r}")
    directory = resolve(repo_or_dir, revision=revision, progress=progress)
    _check_format(directory)
    config = HybridConfig.from_json(directory).override(config_overrides or {})
    if num_iter is not None:
        config.check_num_iter(num_iter)
        assert config.gka is not None
        gka = dataclasses.replace(config.gka, num_iter=num_iter)
        config = dataclasses.replace(config, gka=gka)
    mesh = for_model(mesh, config)
    entries = table.entries(config)
    rules: dict[str, Any] = {
        "aliases": table.aliases(config),
        "copies": table.copies(config),
        "prefixes": table.prefixes(config),
        "ignored": table.ignored(config),
    }
    # Before the model is made, which takes long for a config that asks for too much.
    if is_orbax(directory):
        check_checksums(directory)
        orbax_io.check(directory, {e.path: e.parameter_shape for e in entries})
    else:
        hf_to_jax.check(directory, entries, **rules)
    stored = None
    if automatic:
        stored = _held_dtypes(directory, config)
        dtype = stored["embed_tokens.embedding"]
    model = nnx.eval_shape(lambda: HybridLM(config, dtype=dtype, mesh=mesh))
    abstract = abstract_params(model, mesh)
    if stored is not None:
        abstract = {
            path: jax.ShapeDtypeStruct(a.shape, stored[path], sharding=a.sharding)
            for path, a in abstract.items()
        }
    if is_orbax(directory):
        params = orbax_io.restore(directory, abstract)
        if bad := [p for p, x in params.items() if not hf_to_jax.all_finite(x)]:
            raise ValueError(summary(f"{directory}: not finite:", bad))
    else:
        params = hf_to_jax.load(directory, entries, abstract, progress=progress, **rules)
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
    for_original: bool = True,
    progress: bool = True,
) -> None:
    """Writes a Hugging Face directory that the original and this package load.

    A base model that was loaded and is still one comes back as it was read, so that transformers
    loads it; everything else is written as a hybrid.

    Args:
      model: the model.
      directory: the old content or the new is there at every moment, never a part.
      source: the local directory the model came from (default: the one it was loaded from): its
        tokenizer files are copied and its tensors' dtypes are kept, so that loading (in the stored
        dtype) and saving gives the same bytes. Without one, or where it holds a model of other
        layers (that this one was primed from), and after `HybridLM.astype`, tensors keep the dtype
        they are held in.
      max_shard_size: largest weight file, e.g. "5GB", "500MiB" or a number of bytes.
      overwrite: replace a model that is already there (it may be the one that was loaded). Files
        that are no part of a model (README.md, notes, folders) stay.
      for_original: refuse layers that the original's classes of this family do not have, such as
        Mamba-2 in Qwen3-Next. False: write them for this package, which reads them all.
      progress: show a bar.

    Raises:
      FileExistsError: the directory is not empty and holds no model, or `overwrite` is off.
      FileNotFoundError: `source` is not a directory.
      OSError: the directory cannot be written: permissions, space.
      ValueError: parameters that are not finite, by name, or layers that the original does not
        have; nothing is written.
    """
    if for_original:
        model.config.check_for_original(directory)
    check_target(directory, overwrite, model_types=model_types())
    source = _source(model, source)
    jax_to_hf.save(
        directory,
        model.config.to_dict(),
        table.entries(model.config),
        flat_params(model),
        dtypes=None if model.origin.recast else _stored_dtypes(source, model.config),
        companions=source,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
        model_types=model_types(),
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
    check_target(directory, overwrite, model_types=model_types())
    source = _source(model, source)
    params = flat_params(model)
    bad = [p for p, x in params.items() if not jnp.isfinite(x).all()]
    if bad:
        raise ValueError(f"nothing written to {directory}; not finite: {', '.join(bad)}")
    stored = None if model.origin.recast else _stored_dtypes(source, model.config)
    files = {} if source is None else jax_to_hf.companions_of(source)
    space = sum(x.nbytes for x in params.values())
    with replacing(directory, overwrite, model_types=model_types(), space=space) as tmp:
        orbax_io.write(tmp, params)
        embedding = dtype_name(params["embed_tokens.embedding"].dtype)
        jax_to_hf.write_config(tmp, model.config.to_dict(), embedding)
        if stored is not None:
            (tmp / DTYPES_FILE).write_text(json.dumps(stored, indent=0) + "\n")
        jax_to_hf.copy_companions(files, tmp)
        write_checksums(tmp)


def convert_directory(
    source: str | Path,
    target: str | Path,
    *,
    to: Literal["orbax", "hf"] | None = None,
    dtype: Any = None,
    max_shard_size: int | str = "5GB",
    overwrite: bool = False,
    for_original: bool = True,
    progress: bool = True,
) -> Literal["orbax", "hf"]:
    """A model directory in the other format, every number bit-identical; or one from a GGUF file.

    Args:
      source: directory or repository of a model, or a GGUF file of a Llama, Qwen2 or Qwen3 model.
      target: the directory to write.
      to: the format to write; None: Orbax from safetensors, else Hugging Face's.
      dtype: what the numbers of a GGUF file, which may be quantised, become; None: bfloat16.
      max_shard_size, overwrite, for_original, progress: see `save_pretrained`.

    Returns:
      the format written.

    Raises: what `from_pretrained`, `save_pretrained` and `gguf_to_hf.read` raise; what can be known
      before, before the model is loaded.
    """
    if to not in (None, "orbax", "hf"):
        raise ValueError(f"to must be 'orbax', 'hf' or None, got {to!r}")
    parse_size(max_shard_size)
    check_target(target, overwrite, model_types=model_types())
    if is_gguf(source):
        if to == "orbax":
            raise ValueError("a GGUF file becomes a Hugging Face directory; convert that to Orbax")
        file = Path(source).expanduser()
        converted = gguf_to_hf.read(file, float_dtype(dtype or jnp.bfloat16))
        try:  # what cannot run is refused before it is written
            HybridConfig.from_dict(converted.config)
        except ValueError as e:
            raise ValueError(f"{file}: {e}") from None
        gguf_to_hf.save(
            converted,
            target,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            model_types=model_types(),
            progress=progress,
        )
        return "hf"
    if dtype is not None:
        raise ValueError("dtype is for GGUF files: all others keep the numbers that they hold")
    directory = resolve(source, progress=progress)
    if to is None:
        to = "hf" if is_orbax(directory) else "orbax"
    if to == "hf" and for_original:
        HybridConfig.from_json(directory).check_for_original(target)
    model = from_pretrained(directory, dtype=None, progress=progress)
    if to == "orbax":
        save_orbax(model, target, overwrite=overwrite)
    else:
        save_pretrained(
            model,
            target,
            max_shard_size=max_shard_size,
            overwrite=overwrite,
            for_original=for_original,
            progress=progress,
        )
    return to


def resolve(repo_or_dir: str | Path, *, revision: str | None = None, progress: bool = True) -> Path:
    """The local directory of a model: `repo_or_dir` itself, or the cached download of a repository.

    Raises FileNotFoundError, saying what was tried, if there is neither, and ValueError for a
    revision of a directory.
    """
    name = str(repo_or_dir)
    if not name or "\0" in name:
        raise FileNotFoundError(f"{name!r} is not the name of a directory or repository")
    path = Path(repo_or_dir).expanduser()
    recover(path)
    if path.is_dir():
        if revision is not None:
            raise ValueError(
                f"revision={revision!r} is for repositories, and {path} is a directory here: leave "
                "it out, or check the revision out there"
            )
        if not os.access(path, os.R_OK | os.X_OK):
            raise PermissionError(f"no permission to read {path}")
        return path
    if is_gguf(path) and path.exists():
        raise ValueError(f"{path} is a GGUF file: `hmf-jax convert {path} DIR` makes a model of it")
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
            f"cannot download {name}: no such directory here, and huggingface.co says: "
            f"{first_line(e)}. Check the name and revision; for private or gated models run "
            "`hf auth login` first"
        ) from e
    except Exception as e:  # of the HTTP client, which is the hub's own choice
        raise ConnectionError(
            f"the download of {name} stopped ({first_line(e)}); try again, it continues where it "
            "stopped"
        ) from e


def is_gguf(path: str | Path) -> bool:
    """Whether this is the name of a GGUF file, by its end."""
    path = Path(path).expanduser()
    return path.suffix.lower() == ".gguf" and not path.is_dir()


def _check_format(directory: Path) -> None:
    """Raises ValueError, which says what to do, for directories of something else than a model."""
    if (directory / "config.json").exists():
        return
    if (directory / "adapter_config.json").exists():
        raise ValueError(
            f"{directory} holds LoRA adapters, not a model: load their base model, then "
            "hmf_jax.training.load_lora(model, directory)"
        )
    if found := sorted(directory.glob("*.gguf")):
        raise ValueError(
            f"{directory} holds a GGUF file: `hmf-jax convert {found[0]} DIR` makes a model of it"
        )
    for inner in ("model", "final", "checkpoint"):
        if (directory / inner / "config.json").is_file():
            raise FileNotFoundError(f"{directory} holds no config.json; {directory / inner} does")


def _source(model: HybridLM, source: str | Path | None) -> str | Path | None:
    """The directory that tokenizer files and dtypes are taken from."""
    if source is not None:
        if not Path(source).is_dir():
            raise FileNotFoundError(f"source={source} is not a directory")
        return source
    if model.source is not None and not Path(model.source).is_dir():
        warnings.warn(
            f"{model.source}, which the model was loaded from, is gone: no tokenizer files are "
            "written with it",
            stacklevel=3,
        )
        return None
    if model.origin.lost:
        warnings.warn(
            "The model came out of a jitted function, so its source is not known and no tokenizer "
            "files are written with it; pass source=, or set model.source",
            stacklevel=3,
        )
    return model.source


def _stored_dtypes(source: str | Path | None, config: HybridConfig) -> dict[str, str] | None:
    """Dtypes of the checkpoint in (or behind) this directory; None if it is not known."""
    if source is None:
        return None
    directory = Path(source)
    if _is_of_another_model(directory, config):
        return None
    if is_orbax(directory):
        file = directory / DTYPES_FILE
        stored = read_json(file) if file.is_file() else None
        if stored is not None and not all(dtype in list(DTYPES) for dtype in stored.values()):
            raise ValueError(f"{file} must map names to {', '.join(DTYPES)}")
        return stored
    if not directory.is_dir() or not any(directory.glob("model*.safetensors")):
        return None
    return _checkpoint_dtypes(directory, config)


def _checkpoint_dtypes(directory: Path, config: HybridConfig) -> dict[str, str]:
    """Checkpoint name -> dtype, of a Hugging Face directory."""
    return hf_to_jax.stored_dtypes(
        directory,
        table.entries(config),
        aliases=table.aliases(config),
        prefixes=table.prefixes(config),
    )


def _is_of_another_model(directory: Path, config: HybridConfig) -> bool:
    """Whether it holds what the model was made from (by priming, unfusing), not the model."""
    if not (directory / "config.json").is_file():
        return False
    return HybridConfig.from_json(directory).layer_kinds != config.layer_kinds


def _held_dtypes(directory: Path, config: HybridConfig) -> dict[str, np.dtype]:
    """Parameter path -> dtype to hold it in when the stored dtypes are to be kept."""
    if is_orbax(directory):
        found = {path: np.dtype(dtype) for path, dtype in orbax_io.dtypes(directory).items()}
    else:
        stored = _checkpoint_dtypes(directory, config)
        found = {e.path: hf_to_jax.held_dtype(stored, e) for e in table.entries(config)}
    float32 = DTYPES["F32"]  # also what JAX makes of float64
    half = nnx.eval_shape(lambda: HybridLM(config, dtype=jnp.bfloat16))
    always = {path for path, a in abstract_params(half, None).items() if a.dtype == float32}
    return {
        path: float32 if path in always or d == DTYPES["F64"] else d for path, d in found.items()
    }


class _Silent(hub_tqdm):
    """A download bar that shows nothing."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{**kwargs, "disable": True})
