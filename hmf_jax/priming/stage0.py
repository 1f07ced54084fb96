"""Stage 0: a hybrid from the weights of a Transformer.

Embeddings, norms, MLPs and the attention that stays are copied; a new mixer starts from the
attention of the same layer. Which part starts from which is what its kind says (`Kind.starts`):
all take over W_Q, W_K, W_V, W_O (as [out, in] matrices; W_Q without the gates that some bases make
with it), and an output gate becomes

    (W_O^T + R(W_V)) / 2.

R repeats W_V from key/value to query width. The original repeats single rows (row r of the result
is row r // groups of W_V), and so do we by default; `repeat="heads"` repeats the blocks of whole
heads, which is the order of grouped-query heads. Convolutions, decays and other gates are fresh.

Gated DeltaNet layers that a base has (Qwen3-Next) are copied, or become Gated KalmaNets.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from hmf_jax.config import HybridConfig
from hmf_jax.convert.directories import check_target
from hmf_jax.families import model_types
from hmf_jax.layers import exact
from hmf_jax.loading import from_pretrained, resolve, save_pretrained
from hmf_jax.mixers import KINDS, Section, make_mixer, split_symbol
from hmf_jax.model import HybridLM
from hmf_jax.moved import moved
from hmf_jax.options import Backbone, check_int
from hmf_jax.parameters import abstract_params, flat_params, with_params
from hmf_jax.priming.origins import IN_LAYER, describe_plan, stage0_plan
from hmf_jax.training.fields import Range, read_yaml, typed, unknown

Repeat = Literal["rows", "heads"]


def prime(
    base: HybridLM | str | Path,
    pattern: str | Sequence[str],
    *,
    seed: int = 0,
    dtype: Any = None,
    mesh: Mesh | None = None,
    repeat: Repeat = "rows",
    progress: bool = True,
    **settings: Any,
) -> HybridLM:
    """A hybrid whose mixers start from the attention of a Transformer.

        fused = prime(base, "*DA-GKA*-*DA-GKA*")         # for stage 1, with the teacher inside
        hybrid = prime(base, "*-GKA-*-GKA", gka={"num_iter": 10})  # without stage 1

    Args:
      base: a model of any family, its directory, or a Hugging Face repository. A live model is left
        as it is (nothing is shared with it).
      pattern: one symbol per layer, joined by "-" or as a sequence: what each layer becomes. Fused
        symbols ("GKA*", "*DA", ...) are for distillation. See `selection.pattern` for making one.
      seed: of the fresh parameters.
      dtype: of the new model, default that of a live base, else bfloat16. A_log, dt_bias and D are
        float32 in any case.
      mesh: device mesh, for a base that is not live yet.
      repeat: how the gates' R(W_V) is repeated, see above.
      progress: show a bar while loading.
      settings: of the mixers, by the names of `HybridConfig` (gka, gdn, mamba2, bmojo, swa): their
        class, or a dict of the fields that differ from the defaults. BMF layers need bmojo, SWA
        layers need swa.

    Raises:
      FileNotFoundError: no such base.
      ValueError: a pattern that does not fit the base, missing settings, or tensors of the base
        that are missing, by name.
    """
    if isinstance(base, HybridLM):
        if mesh is not None:
            raise ValueError("mesh is for a base that is loaded here; this one has its own.")
        base_config, directory = base.config, None
    else:
        directory = resolve(base, progress=progress)
        base_config = HybridConfig.from_json(directory)
    config = primed_config(base_config, pattern, **settings)
    plan = stage0_plan(base_config, config)  # says what is wrong before anything is loaded
    check_int("seed", seed, 0, (1 << 32) - 1)
    if repeat not in ("rows", "heads"):
        raise ValueError(f"repeat={repeat!r} is unknown; use 'rows' or 'heads'.")
    if directory is not None:
        dtype = jnp.bfloat16 if dtype is None else dtype
        base = from_pretrained(directory, mesh=mesh, dtype=dtype, progress=progress)
    assert isinstance(base, HybridLM)
    dtype, mesh = base.dtype if dtype is None else dtype, base.mesh
    model = nnx.eval_shape(lambda: HybridLM(config, dtype=dtype, mesh=mesh))
    abstract = abstract_params(model, mesh)
    sources = flat_params(base)

    fresh = [path for path, origin in plan.items() if origin.how == "fresh"]
    params = _fresh(config, dtype, seed, {path: abstract[path] for path in fresh})
    taken = set() if directory is not None else set(sources)
    groups = config.num_attention_heads // config.num_key_value_heads
    for path, origin in plan.items():
        inputs = [sources[name] for name in origin.sources]
        if origin.how == "copied":
            x, kind, source = inputs[0], abstract[path].dtype, origin.sources[0]
            if origin.queries:
                params[path] = _queries(config.head_dim, kind, abstract[path].sharding)(x)
                continue
            # A step of training deletes arrays, so each belongs to one parameter of one model.
            params[path] = jnp.array(x, kind) if source in taken else x.astype(kind)
            taken.add(source)
        elif origin.how == "initialised":
            new = abstract[path]
            gate = _gate(groups, config.head_dim, repeat, new.dtype, new.sharding)
            params[path] = gate(*inputs)
    model = with_params(model, params)
    model.source = base.source
    return model


def prime_directory(
    base: str | Path,
    pattern: str | Sequence[str],
    output: str | Path,
    *,
    dtype: Any = jnp.bfloat16,
    copy_auxiliary_files: bool = True,
    overwrite: bool = False,
    progress: bool = True,
    report: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> None:
    """Stage 0 from a directory or repository to a Hugging Face directory, all of it or nothing.

    Args:
      base, pattern, dtype, progress, options: see `prime`.
      output: the directory to write.
      copy_auxiliary_files: tokenizer, chat template and generation_config.json of the base too.
      overwrite: replace a model that is already there.
      report: is told what is copied, initialised and fresh.

    Raises: what `prime` and `save_pretrained` raise; FileExistsError before anything is read.
    """
    output = check_output(output, overwrite)
    directory = resolve(base, progress=progress)
    check_output(output, overwrite, directory)
    model = prime(directory, pattern, dtype=dtype, progress=progress, **options)
    old = HybridConfig.from_json(directory)
    report(f"{old.hybrid_override_pattern} -> {model.config.hybrid_override_pattern}")
    report(describe_plan(stage0_plan(old, model.config), model.config))
    if foreign := model.config.foreign_layers:
        report(
            f"Only this package can load it: {', '.join(foreign)} layers are foreign to its family."
        )
    if not copy_auxiliary_files:
        model.source = None
    save_pretrained(model, output, overwrite=overwrite, for_original=False, progress=progress)
    report(f"Wrote {output}.")


def check_output(output: str | Path, overwrite: bool, base: str | Path | None = None) -> Path:
    """The directory that a step of priming may write; call it before anything is loaded.

    Raises FileExistsError for one that holds something (unless that is a model and `overwrite` is
    set), or that is or holds the base, or lies in it; OSError if it cannot be written.
    """
    output = Path(output).expanduser()
    if base is not None:
        old, new = Path(base).expanduser().resolve(), output.resolve()
        if old == new or old in new.parents or new in old.parents:
            raise FileExistsError(
                f"{output} would be written over its base, {base}; choose another"
            )
    if output.exists() and not overwrite:
        raise FileExistsError(f"{output} exists; choose another directory or overwrite it")
    return check_target(output, overwrite, model_types=model_types())


def read_stage0(file: str | Path) -> dict[str, Any]:
    """The arguments of `prime_directory` from a YAML file in the original's format.

    Its keys: base_model_name_or_path, hybrid_override_pattern, output_dir, dtype,
    copy_auxiliary_files, and the settings of the mixers by name; ours are seed and repeat.

    Raises FileNotFoundError; ValueError for unknown keys or a dtype other than bf16, fp16, fp32.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file} does not exist; pass a YAML file")
    values = read_yaml(file)
    names = {
        "base_model_name_or_path": "base",
        "hybrid_override_pattern": "pattern",
        "output_dir": "output",
    }
    known = [*names, "dtype", "copy_auxiliary_files", "seed", "repeat", *_sections()]
    for key in values:
        if key not in known:
            raise ValueError(f"{file}: {unknown(key, known)}")
    hints = {
        "copy_auxiliary_files": bool,
        "seed": Annotated[int, Range(0)],
        "repeat": Repeat,
        **dict.fromkeys((*names, "dtype"), str),
        **dict.fromkeys(_sections(), dict[str, Any]),
    }
    out: dict[str, Any] = {}
    for key, value in values.items():
        if value is not None:
            try:
                out[names.get(key, key)] = typed(key, value, hints[key])
            except ValueError as e:
                raise ValueError(f"{file}: {e}") from e
    if "dtype" in out:
        short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
        out["dtype"] = short.get(out["dtype"], out["dtype"])
        if out["dtype"] not in short.values():
            raise ValueError(f"{file}: dtype {out['dtype']!r} is not one of {', '.join(short)}")
    return out


def primed_config(
    base: HybridConfig, pattern: str | Sequence[str], **settings: Any
) -> HybridConfig:
    """The config of a model primed from `base`, a hybrid's; arguments and errors as for `prime`."""
    if not isinstance(pattern, str | Sequence) or not all(isinstance(s, str) for s in pattern):
        raise ValueError(f"pattern must be symbols joined by '-', or a list of them: {pattern!r}")
    kinds = tuple(pattern.split("-")) if isinstance(pattern, str) else tuple(pattern)
    if len(kinds) != base.num_hidden_layers:
        raise ValueError(
            f"the pattern has {len(kinds)} symbols but the base has {base.num_hidden_layers} "
            "layers; give exactly one symbol per layer"
        )
    changes: dict[str, Any] = {"layer_kinds": kinds, "stock": None}
    for name, given in settings.items():
        if given is not None:
            changes[name] = _settings(name, given, base)
    known = {*base.sections, *changes}
    for symbol in dict.fromkeys(kind for s in kinds for kind in split_symbol(s) if kind in KINDS):
        section = KINDS[symbol].section
        if section is not None and section.ask is not None and section.attribute not in known:
            raise ValueError(section.ask)
    return dataclasses.replace(base, **changes)


def _sections() -> dict[str, Section]:
    """What settings there are, by name."""
    return {kind.section.attribute: kind.section for kind in KINDS.values() if kind.section}


def _settings(name: str, given: Any, backbone: Backbone) -> Any:
    """A kind's settings from a dict of their fields."""
    if name not in _sections():
        raise ValueError(f"there are no settings {name!r}; there are {', '.join(_sections())}")
    section = _sections()[name]
    make = section.type
    if isinstance(given, make):
        return given
    if not isinstance(given, Mapping):
        raise ValueError(f"{name} must be a {make.__name__} or a dict of its fields, got {given!r}")
    fields = dataclasses.fields(make)
    names = [f.name for f in fields]
    if unknown := sorted(set(given) - set(names)):
        raise ValueError(f"{name} has no {', '.join(unknown)}; its settings are {names}")
    for field in fields:
        if field.default is dataclasses.MISSING and field.name not in given:
            example = f" ({field.metadata['example']})" if "example" in field.metadata else ""
            raise ValueError(f"{name} needs {field.name}{example}")
    return make(**{**section.defaults(backbone), **given})


def _fresh(config: HybridConfig, dtype, seed: int, abstract: Mapping[str, jax.ShapeDtypeStruct]):
    """The parameters of `abstract` as a new model has them, each made on its own shards.

    A mixer depends on the seed, its layer and its kind alone; each kind is compiled once.
    """
    layers: dict[int, dict[str, str]] = {}  # layer -> name in its mixer -> path
    for path in abstract:
        found = IN_LAYER.fullmatch(path)
        assert found is not None and found[2] == "mixer"
        layers.setdefault(int(found[1]), {})[found[3]] = path
    params: dict[str, jax.Array] = {}
    for layer, paths in layers.items():
        kind = config.student_kinds[layer]
        one = dataclasses.replace(config, layer_kinds=(kind,))
        names = tuple((name, abstract[path].sharding) for name, path in paths.items())
        made = _maker(one, jnp.dtype(dtype), names)(jax.random.fold_in(jax.random.key(seed), layer))
        params |= {path: made[name] for name, path in paths.items()}
    return params


@functools.lru_cache
def _maker(config: HybridConfig, dtype, names: tuple[tuple[str, Any], ...]):
    """A function: key -> these parameters (name, sharding) of the mixer of a one-layer config."""

    def make(key: jax.Array) -> dict[str, jax.Array]:
        kind, rngs = config.layer_kinds[0], nnx.Rngs(key)
        mixer = make_mixer(kind, config, config.sections, dtype=dtype, rngs=rngs)
        made = flat_params(mixer)
        return {name: made[name] for name, _ in names}

    return jax.jit(make, out_shardings=dict(names))


@functools.lru_cache
def _gate(groups: int, head_dim: int, repeat: Repeat, dtype, sharding):
    """(W_O^T + R(W_V)) / 2 of kernels: o [H*D, d], v [d, Hkv*D] -> [d, H*D]."""

    def gate(o: jax.Array, v: jax.Array) -> jax.Array:
        if repeat == "heads":
            blocks = v.reshape(v.shape[0], -1, head_dim)
            repeated = jnp.repeat(blocks, groups, axis=1).reshape(v.shape[0], -1)
        else:
            repeated = jnp.repeat(v, groups, axis=1)
        return (0.5 * (exact(o).T + exact(repeated))).astype(dtype)

    return jax.jit(gate, out_shardings=sharding)


@functools.lru_cache
def _queries(head_dim: int, dtype, sharding):
    """Of [..., H*2*D], each head's queries and then its gates, the queries [..., H*D]."""

    def queries(x: jax.Array) -> jax.Array:
        heads = x.reshape(*x.shape[:-1], -1, 2, head_dim)
        return heads[..., 0, :].reshape(*x.shape[:-1], -1).astype(dtype)

    return jax.jit(queries, out_shardings=sharding)


__getattr__ = moved(__name__, {"Settings": "is gone; it was Mapping[str, Any]"})
