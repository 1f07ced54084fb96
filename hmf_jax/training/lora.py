"""LoRA: a trained product of two thin matrices beside each frozen projection, W + (alpha / r) A B.

    model = apply_lora(model, rank=16, modules="q_proj, v_proj, gka")
    state = TrainState.create(model, optimizer, trainable="lora")  # train as usual, then
    model = merge_lora(state.model())  # a plain model again: generate, save_pretrained

QLoRA: `apply_lora(..., quantize="nf4")` holds the frozen projections in 4 bits (qwix quantises).
Sources: LoRA, arXiv 2106.09685; QLoRA, arXiv 2305.14314.

qwix makes LoRA by intercepting matrix products while a model is called and writing the new
parameters into the module it finds on the Python stack. The blocks here run in one inner jit, where
those are copies, so that nothing it writes remains; hence this module.
"""

from __future__ import annotations

import json
import math
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import save_file

from hmf_jax import table
from hmf_jax.convert.directories import printable, replacing
from hmf_jax.convert.rows import Entry, tensor_shape
from hmf_jax.layers import exact_dtype
from hmf_jax.model import HybridLM
from hmf_jax.moe import Experts
from hmf_jax.options import check_int, check_number
from hmf_jax.parameters import flat_params, with_params
from hmf_jax.training.adapters import (
    Initial,
    LoRAExperts,
    LoRALinear,
    LoRAStack,
    Quantize,
    check_quantize,
    stacks,
)
from hmf_jax.training.peft import (
    CONFIG,
    PREFIX,
    STACKS_SINCE,
    WEIGHTS,
    AdapterConfig,
    read_adapters,
    wrappers,
)
from hmf_jax.training.step import select_parameters


def apply_lora(
    model: HybridLM,
    *,
    rank: int = 16,
    alpha: float = 32.0,
    modules: str | Sequence[str] = "proj",
    quantize: Quantize | None = None,
    seed: int = 0,
) -> HybridLM:
    """A model with adapters beside its projections; it computes what `model` computes.

    Train it with `TrainState.create(..., trainable="lora")` ("lora, norm" trains the norms too).
    The new model shares the arrays of the old one, which training deletes.

    Args:
      model: a model without adapters; on a mesh, adapters are split like their projections.
      rank: r, columns of A. alpha: the adapter is multiplied by alpha / r.
      modules: which projections, as the substrings of `select_parameters`, for example "q_proj",
        "gka", "layers.3.", "mlp"; the default means every projection of mixers and MLPs. Experts
        are left out unless a substring holds the word "experts": "proj, experts",
        "layers.3.mlp.experts.down_proj". Each expert has an A and a B of its own. Routers take
        none.
      quantize: hold W of these projections in 8 bits (one scale per column) or in 4-bit NormalFloat
        (one scale per 64 rows of a column) instead; needs qwix. Experts stay as they are.
      seed: of A (uniform, variance 1 / (3 in), as in the reference implementation); B is zero.

    Raises:
      ValueError: bad numbers, a rank larger than every projection, a pattern that selects nothing
        (with what there is), nothing but experts to quantise, or a model that has adapters already.
      ImportError: `quantize` without qwix.
    """
    check_int("rank", rank, 1)
    check_number("alpha", alpha, 0, above=True)
    check_int("seed", seed, 0)
    if quantize is not None:
        check_quantize(quantize)
    shapes = _selected(model, modules)
    if rank > max(min(shape[-2:]) for shape in shapes.values()):
        raise ValueError(f"rank={rank} is larger than every projection: {max(shapes.values())}.")

    def make(path: str) -> Initial | None:
        if path not in shapes:
            return None
        *experts, n_in, n_out = shapes[path]
        dtype = exact_dtype(model.dtype)
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
        A = jax.random.uniform(key, (*experts, n_in, rank), dtype, -1.0, 1.0) / math.sqrt(n_in)
        return Initial(A, jnp.zeros((*experts, rank, n_out), dtype), alpha)

    return _with_adapters(model, make, quantize)


def merge_lora(model: HybridLM) -> HybridLM:
    """The plain model that computes the same, up to one rounding of each weight to its dtype.

    Quantised projections come back in the dtype they had, with what quantisation did to them.

    Raises:
      ValueError: the model has no adapters.
    """
    own = (".lora_A", ".lora_B", ".qvalue", ".scale")
    params = {path: x for path, x in flat_params(model).items() if not path.endswith(own)}
    adapters = _adapters(model)
    for path, a in adapters.items():
        if isinstance(a, LoRAStack):
            W = params[path]
            params[path] = jax.device_put(a.merged(W), getattr(W, "sharding", None))
            continue
        held = (a.kernel if a.quantized is None else a.qvalue)[...]  # may be a copy on the host
        params[f"{path}.kernel"] = jax.device_put(a.merged(), getattr(held, "sharding", None))
    plain = nnx.eval_shape(lambda: HybridLM(model.config, dtype=model.dtype, mesh=model.mesh))
    merged = with_params(plain, params)
    merged.source = model.source
    return merged


def save_lora(model: HybridLM, directory: str | Path) -> None:
    """Writes the adapters alone, as PEFT names and lays them out; loads in PEFT too.

    Mamba2's five projections are one tensor in the checkpoint: their adapters are stored as one of
    five times the rank, with block-diagonal B. Adapters of experts are `target_parameters`, which
    PEFT reads from version 0.19 on.

    Args:
      model: from `apply_lora`, its arrays all on this machine.
      directory: a new or empty one; appears only once it is complete.

    Raises:
      FileExistsError: the directory is not empty.
      ValueError: no adapters, or some that are not finite, by name; nothing is written.
    """
    adapters = _adapters(model)
    tensors: dict[str, np.ndarray] = {}
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, blocks in _stored(model).items():
        parts = [(e, adapters[p]) for p, e in blocks.items() if p in adapters]
        if not parts:
            continue
        rank = sum(a.rank for _, a in parts)
        B = np.zeros((tensor_shape(list(blocks.values()))[0], rank), np.float32)
        at = 0
        for entry, a in parts:
            B[entry.rows, at : at + a.rank] = np.asarray(a.lora_B[...], np.float32).T
            at += a.rank
        A = np.concatenate([np.asarray(a.lora_A[...], np.float32).T for _, a in parts])
        tensors |= _halves(name, A, B)
        ranks[name], alphas[name] = rank, len(parts) * parts[0][1].alpha
    modules = list(ranks)
    stacked = {n: adapters[e.path] for n, e in _stacked(model).items() if e.path in adapters}
    for name, module in wrappers(stacked).items():
        a = stacked[name]
        A, B = (np.asarray(half[...], np.float32) for half in (a.lora_A, a.lora_B))
        A = A.transpose(0, 2, 1).reshape(-1, A.shape[1])  # rows: all of expert 0, ...
        B = B.transpose(2, 1, 0).reshape(B.shape[2], -1)  # columns: the first of every expert, ...
        tensors |= _halves(module, A, B)
        ranks[name], alphas[name] = a.rank, a.alpha
    if bad := [name for name, x in tensors.items() if not np.isfinite(x).all()]:
        raise ValueError(f"nothing written to {directory}; not finite: {', '.join(bad)}")
    first = next(iter(adapters.values()))
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.source,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "target_modules": modules,
        "rank_pattern": {n: r for n, r in ranks.items() if r != first.rank},
        "alpha_pattern": {n: a for n, a in alphas.items() if a != first.alpha},
        "lora_dropout": 0.0,
        "bias": "none",
    }
    if stacked:
        since = ".".join(map(str, STACKS_SINCE))
        config |= {"target_parameters": list(stacked), "peft_version": since}
    with replacing(directory) as tmp:
        save_file(tensors, tmp / WEIGHTS, {"format": "pt", "modules": json.dumps(list(adapters))})
        (tmp / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load_lora(
    model: HybridLM, directory: str | Path, *, quantize: Quantize | None = None
) -> HybridLM:
    """A model with the adapters that `save_lora`, or PEFT, wrote.

    Args:
      model: the model they were trained on, or a float version of it, without adapters.
      directory: holds adapter_config.json and adapter_model.safetensors.
      quantize: see `apply_lora`.

    Raises:
      FileNotFoundError: there are no adapters.
      ValueError: damaged files, a variant of LoRA that is not supported, or adapters that do not
        fit the model: all of them, by name.
    """
    directory = Path(directory)
    files = directory / CONFIG, directory / WEIGHTS
    for file in files:
        if not file.is_file():
            pickled = "; pickled .bin files are not read" if any(directory.glob("*.bin")) else ""
            raise FileNotFoundError(
                f"{directory} holds no adapters: there is no {file.name}{pickled}"
            )
    if quantize is not None:
        check_quantize(quantize)
    config = AdapterConfig.read(files[0])
    read, shapes, saved = read_adapters(files[1])
    stored, stacked = _stored(model), _stacked(model)
    found: dict[str, Initial] = {}
    problems, absent = [], []

    def take(
        name: str, module: str, shape: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray] | None:
        """A and B of a weight, float32; None if there are none."""
        keys = [f"{module}.lora_{half}.weight" for half in "AB"]
        A, B = (shapes.pop(key, None) for key in keys)
        if problem := _misfit(config, name, A, B, shape):
            problems.append(f"{name}: {problem}")
        elif A is None:
            absent.extend([name] if config.names(name) else [])
        else:
            first, second = (read(key).astype(np.float32) for key in keys)
            if not (np.isfinite(first).all() and np.isfinite(second).all()):
                problems.append(f"{name}: holds NaN or infinity")
            return first, second
        return None

    dtype = exact_dtype(model.dtype)
    for name, blocks in stored.items():
        if halves := take(name, name, tensor_shape(list(blocks.values()))):
            own = [path for path in blocks if path in saved]
            found |= _split(*halves, config.alpha(name), blocks, own, dtype)
    for name, module in wrappers(filter(config.names_parameter, stacked)).items():
        path, (E, n_out, n_in) = stacked[name].path, stacked[name].shape
        if halves := take(name, module, (E, n_out, n_in)):
            A = halves[0].reshape(E, -1, n_in).transpose(0, 2, 1)
            B = halves[1].reshape(n_out, -1, E).transpose(2, 1, 0)
            initial = jnp.asarray(A, dtype), jnp.asarray(B, dtype)
            found[path] = Initial(*initial, config.alpha(name))
    problems += [f"{printable(name)}: no such projection in this model" for name in shapes]
    if problems:
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        lines = "\n  ".join(problems[:20]) + more
        raise ValueError(f"{directory}: adapters do not fit the model:\n  {lines}")
    config.check_modules(stored, stacked)
    config.check_base(model.source)
    if absent:  # as in PEFT: these projections stay as they are
        some = ", ".join(absent[:3]) + (f" and {len(absent) - 3} more" if absent[3:] else "")
        warnings.warn(f"{files[1]} lacks the adapters of {some}", stacklevel=2)
    return _with_adapters(model, found.get, quantize)


def _misfit(
    config: AdapterConfig,
    name: str,
    A: tuple[int, ...] | None,
    B: tuple[int, ...] | None,
    shape: tuple[int, ...],
) -> str | None:
    """Why adapters of these shapes are none for a weight [out, in], or for experts' [E, out, in].

    Those of experts are [E r, in] and [out, E r].
    """
    if A is None or B is None:
        return None if A is B else "only one of lora_A and lora_B"
    *experts, n_out, n_in = shape
    rank, E = config.rank(name), math.prod(experts)
    if len(A) != 2 or len(B) != 2 or (*A[1:], *B) != (n_in, n_out, A[0]):
        return f"lora_A {A}, lora_B {B} for a {shape} weight"
    if A[0] != E * rank:
        return f"rank {A[0] / E:g}, but {CONFIG} says {rank}"
    if experts or config.targets(name):
        return None
    return f"not among the target_modules of {CONFIG}"


def _split(
    A: np.ndarray,
    B: np.ndarray,
    alpha: float,
    blocks: dict[str, Entry],
    own: list[str],
    dtype: Any,
) -> dict[str, Initial]:
    """The adapter of a stored tensor as those of the projections that are rows of it.

    `own`: the projections that `save_lora` put together into this one, each with columns of its
    own; empty for an adapter of PEFT, which belongs to all of them.
    """
    found = {}
    for path in own or blocks:
        n, i = (len(own), own.index(path)) if own else (1, 0)
        columns = slice(i * len(A) // n, (i + 1) * len(A) // n)
        e = blocks[path]
        part = B[e.rows, columns]
        halves = jnp.asarray(A[columns].T, dtype), jnp.asarray(part.T, dtype)
        found[path] = Initial(*halves, alpha / n)
    return found


def _children(
    model: HybridLM, kind: type | tuple[type, ...]
) -> Iterator[tuple[Any, str, str, Any]]:
    """(parent, attribute, path "layers.3.mixer.q_proj", module) of the projections in blocks."""
    for i, block in enumerate(model.layers):
        for path, parent in nnx.iter_modules(block):
            for name, child in list(vars(parent).items()):
                if isinstance(child, kind):
                    yield parent, name, ".".join(map(str, ("layers", i, *path, name))), child


def _adapters(model: HybridLM) -> dict[str, LoRALinear | LoRAStack]:
    """Path of each projection, or stack of experts, that has adapters -> what has or is them."""
    adapters: dict[str, LoRALinear | LoRAStack] = {}
    for _, _, path, a in _children(model, (LoRALinear, LoRAExperts)):
        if isinstance(a, LoRALinear):
            adapters[path] = a
        else:
            adapters |= {f"{path}.{name}": stack for name, stack in a.adapters()}
    if not adapters:
        raise ValueError("The model has no adapters; apply_lora or load_lora gives it some.")
    return adapters


def _selected(model: HybridLM, modules: str | Sequence[str]) -> dict[str, tuple[int, ...]]:
    """Path -> shape, [in, out] or [E, in, out], of what these patterns select."""
    known = {f"{path}.kernel": p.kernel for _, _, path, p in _children(model, nnx.Linear)}
    kinds = sorted({path.removesuffix(".kernel").split(".", 2)[2] for path in known})
    experts = {
        f"{path}.{name}": W
        for _, _, path, module in _children(model, Experts)
        for name, W in stacks(module)
    }
    if not isinstance(modules, str) and not (
        isinstance(modules, Sequence) and all(isinstance(m, str) for m in modules)
    ):
        raise ValueError(f"modules must be a text or a list of texts, got {modules!r}.")
    patterns = modules.split(",") if isinstance(modules, str) else list(modules)
    chosen: set[str] = set()
    for pattern in filter(None, map(str.strip, patterns)):
        names = set(select_parameters(model, pattern))
        hits = names & ({*known, *experts} if "experts" in pattern else known.keys())
        if not hits:
            more = "" if not experts else "; 'experts' selects experts; routers take no adapters"
            raise ValueError(
                f"{pattern!r} selects no projection; there are {', '.join(kinds)}{more}."
            )
        chosen |= hits
    if not chosen:
        raise ValueError(f"modules={modules!r} holds no pattern.")
    return {
        path.removesuffix(".kernel"): W.shape
        for path, W in (known | experts).items()
        if path in chosen
    }


def _stored(model: HybridLM) -> dict[str, dict[str, Entry]]:
    """Checkpoint module ("model.layers.3.gka.q_proj") -> path -> its rows, for all projections."""
    known = {path for _, _, path, _ in _children(model, (nnx.Linear, LoRALinear))}
    out: dict[str, dict[str, Entry]] = {}
    for e in table.entries(model.config):
        if (path := e.path.removesuffix(".kernel")) in known and e.path != path:
            out.setdefault(e.name.removesuffix(".weight"), {})[path] = e
    return out


def _stacked(model: HybridLM) -> dict[str, Entry]:
    """Checkpoint tensor ("model.layers.3.mlp.experts.down_proj") -> its rows, for all experts."""
    return {e.name: e for e in table.entries(model.config) if e.layout == "experts"}


def _halves(module: str, A: np.ndarray, B: np.ndarray) -> dict[str, np.ndarray]:
    """The tensors of an adapter; safetensors writes the memory as it lies."""
    names = (f"{PREFIX}{module}.lora_{half}.weight" for half in "AB")
    return {name: np.ascontiguousarray(x) for name, x in zip(names, (A, B), strict=True)}


def _with_adapters(
    model: HybridLM, make: Callable[[str], Initial | None], quantize: Quantize | None
) -> HybridLM:
    """A copy of the model (of its modules, not its arrays) with adapters where `make` says."""
    if any(_children(model, (LoRALinear, LoRAExperts))):
        raise ValueError("The model has adapters already; merge_lora(model) first.")
    model = jax.tree.map(lambda x: x, model)
    quantized = False
    for parent, name, path, module in list(_children(model, (nnx.Linear, Experts))):
        if isinstance(module, Experts):
            found = {n: a for n, _ in stacks(module) if (a := make(f"{path}.{n}")) is not None}
            if found:
                setattr(parent, name, LoRAExperts(module, found, model.mesh))
        elif (initial := make(path)) is not None:
            setattr(parent, name, LoRALinear(module, initial, quantize, model.mesh))
            quantized = True
    if quantize is not None and not quantized:
        raise ValueError(
            f"quantize={quantize!r} is for projections, and these adapters are all beside experts; "
            "select projections too, or leave it out."
        )
    return model
