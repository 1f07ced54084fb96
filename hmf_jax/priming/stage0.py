"""Stage 0: a hybrid from the weights of a Transformer.

Embeddings, norms, MLPs and the attention that stays are copied; a new mixer starts from the
attention of the same layer. Which part starts from which is what its kind says (`Kind.starts`):
all take over W_Q, W_K, W_V, W_O (as [out, in] matrices), and an output gate becomes

    (W_O^T + R(W_V)) / 2.

R repeats W_V from key/value to query width. The original repeats single rows (row r of the result
is row r // groups of W_V), and so do we by default; `repeat="heads"` repeats the blocks of whole
heads, which is the order of grouped-query heads. Convolutions, decays and other gates are fresh.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from hmf_jax import table
from hmf_jax.config import HybridConfig
from hmf_jax.convert.directories import check_target
from hmf_jax.convert.safetensors_io import Checkpoint
from hmf_jax.families import model_types
from hmf_jax.layers import exact
from hmf_jax.loading import from_pretrained, resolve, save_pretrained
from hmf_jax.mixers import (
    BASE,
    GATE,
    KINDS,
    Section,
    make_mixer,
    same_parameters,
    split_symbol,
    start,
)
from hmf_jax.model import HybridLM
from hmf_jax.moved import moved
from hmf_jax.options import check_int
from hmf_jax.parameters import abstract_params, flat_params, with_params
from hmf_jax.training.fields import Range, read_yaml, typed, unknown

Repeat = Literal["rows", "heads"]
How = Literal["copied", "initialised", "fresh"]
_IN_LAYER = re.compile(r"layers\.(\d+)\.(mixer|teacher)\.(.+)")


@dataclasses.dataclass(frozen=True)
class Origin:
    """Where a parameter comes from: `sources` are the paths of the base's parameters.

    "copied": it is that parameter (in the dtype of the new model); "initialised": computed from
    those parameters; "fresh": not from the base, but random, or constant (norms, biases).
    """

    how: How
    sources: tuple[str, ...] = ()


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
      base: a Qwen3-shaped model, its directory, or a Hugging Face repository. A live model is left
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
      ValueError: a pattern that does not fit the base, missing settings, a base without QK-norm, or
        tensors of the base that are missing, by name.
    """
    if isinstance(base, HybridLM):
        if mesh is not None:
            raise ValueError("mesh is for a base that is loaded here; this one has its own.")
        base_config, directory = base.config, None
    else:
        directory = resolve(base, progress=progress)
        base_config = HybridConfig.from_json(directory)
        if base_config.qk_norm:
            _check_qk_norm(directory)
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
    if wrong := _mismatches(plan, abstract, sources):
        raise ValueError("the base does not fit the new mixers:\n  " + "\n  ".join(wrong))

    fresh = [path for path, origin in plan.items() if origin.how == "fresh"]
    params = _fresh(config, dtype, seed, {path: abstract[path] for path in fresh})
    taken = set() if directory is not None else set(sources)
    groups = config.num_attention_heads // config.num_key_value_heads
    for path, origin in plan.items():
        inputs = [sources[name] for name in origin.sources]
        if origin.how == "copied":
            x, kind, source = inputs[0], abstract[path].dtype, origin.sources[0]
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
            changes[name] = _settings(name, given)
    known = {*base.sections, *changes}
    for symbol in dict.fromkeys(kind for s in kinds for kind in split_symbol(s) if kind in KINDS):
        section = KINDS[symbol].section
        if section is not None and section.ask is not None and section.attribute not in known:
            raise ValueError(section.ask)
    return dataclasses.replace(base, **changes)


def stage0_plan(base: HybridConfig, config: HybridConfig) -> dict[str, Origin]:
    """Parameter path of the new model -> where its values come from; from the configs alone.

    Raises ValueError where a layer cannot be made from the base's.
    """
    problems = ["the base is a fused stage-1 model: unfuse it first"] if base.fused else []
    rules: list[Mapping[str, str] | None] = []
    for i, (old, symbol) in enumerate(zip(base.layer_kinds, config.layer_kinds, strict=True)):
        kind, teacher = split_symbol(symbol)
        alike = old in KINDS and same_parameters(old, kind)
        rules.append(None if alike or old not in KINDS else start(kind, old, config.sections))
        if rules[i] is None and not alike:
            problems.append(f"layer {i}: the base has {old!r} there, {kind!r} cannot start from it")
        goal = teacher or kind
        if symbol not in KINDS and goal != old:
            problems.append(
                f"layer {i}: the teacher of {symbol!r} is {goal!r}, but the base has {old!r}"
            )
    if problems:
        raise ValueError("cannot prime this base:\n  " + "\n  ".join(problems))
    stored = {e.path for e in table.entries(base)}
    plan: dict[str, Origin] = {}
    for entry in table.entries(config):
        found = _IN_LAYER.fullmatch(entry.path)
        if found is None:  # shared by all kinds
            plan[entry.path] = Origin("copied", (entry.path,))
            continue
        layer, part, rest = found.groups()
        rule = rules[int(layer)] if part == "mixer" else None
        source = rest if rule is None else _source(rule, rest)
        prefix = f"layers.{layer}.mixer."
        if source == GATE:
            names = (f"{prefix}o_proj.kernel", f"{prefix}v_proj.kernel")
            plan[entry.path] = Origin("initialised", names)
        elif source is not None and prefix + source in stored:
            plan[entry.path] = Origin("copied", (prefix + source,))
        else:
            plan[entry.path] = Origin("fresh")
    return plan


def describe_plan(plan: Mapping[str, Origin], config: HybridConfig) -> str:
    """A text: how many parameters are copied, initialised and fresh, and which, by layer kind."""
    size = {e.path: math.prod(e.shape) for e in table.entries(config)}
    texts = {
        "copied": "copied from the base",
        "initialised": "initialised from W_O and W_V",
        "fresh": "fresh, random or constant",
    }
    lines = []
    for how, text in texts.items():
        chosen = [path for path, origin in plan.items() if origin.how == how]
        total = sum(size[path] for path in chosen)
        lines.append(f"{total:>15,} parameters in {len(chosen)} arrays: {text}")
        named: dict[str, dict[str, None]] = {}  # ordered sets
        for path in chosen:
            found = _IN_LAYER.fullmatch(path)
            if found is not None and plan[path].sources != (path,):
                layer, part, rest = found.groups()
                if part == "mixer":
                    named.setdefault(config.layer_kinds[int(layer)], {})[rest] = None
        for symbol, parts in named.items():
            lines.append(f"{'':15} {symbol}: {', '.join(parts)}")
    return "\n".join(lines)


def _source(rule: Mapping[str, str], rest: str) -> str | None:
    """The base's name for the new mixer's parameter `rest`, `GATE`, or None."""
    for part, source in rule.items():
        if rest == part or rest.startswith(part + "."):
            return GATE if source == GATE else source + rest.removeprefix(part)
    return None


def _sections() -> dict[str, Section]:
    """What settings there are, by name."""
    return {kind.section.attribute: kind.section for kind in KINDS.values() if kind.section}


def _settings(name: str, given: Any) -> Any:
    """A kind's settings from a dict of their fields."""
    if name not in _sections():
        raise ValueError(f"there are no settings {name!r}; there are {', '.join(_sections())}")
    make = _sections()[name].type
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
    return make(**given)


def _check_qk_norm(directory: Path) -> None:
    """Say plainly what the list of missing tensors would only hint at."""
    if not any(directory.glob("*.safetensors")):
        return
    names = Checkpoint(directory).tensors
    module = KINDS[BASE].name
    attention = any(f".{module}.q_proj.weight" in n for n in names)
    if attention and not any(n.endswith(f".{module}.q_norm.weight") for n in names):
        raise ValueError(
            f"{directory} has no QK-norm ({module}.q_norm.weight, k_norm.weight): only models "
            "with the attention of Qwen3 can be primed"
        )


def _mismatches(plan: Mapping[str, Origin], abstract, sources) -> list[str]:
    """Parameters whose source has another shape (other settings of the same mixer)."""
    wrong = []
    for path, origin in plan.items():
        if origin.how == "copied" and sources[origin.sources[0]].shape != abstract[path].shape:
            found = sources[origin.sources[0]].shape
            wrong.append(f"{path} is {abstract[path].shape}, {origin.sources[0]} is {found}")
    return wrong


def _fresh(config: HybridConfig, dtype, seed: int, abstract: Mapping[str, jax.ShapeDtypeStruct]):
    """The parameters of `abstract` as a new model has them, each made on its own shards.

    A mixer depends on the seed, its layer and its kind alone; each kind is compiled once.
    """
    layers: dict[int, dict[str, str]] = {}  # layer -> name in its mixer -> path
    for path in abstract:
        found = _IN_LAYER.fullmatch(path)
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


__getattr__ = moved(__name__, {"Settings": "is gone; it was Mapping[str, Any]"})
