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

import functools
import json
import math
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from safetensors.numpy import save_file

from hmf_jax import table
from hmf_jax.convert.directories import printable, replacing
from hmf_jax.convert.rows import Entry, tensor_shape
from hmf_jax.layers import exact, exact_dtype, one_row_twice
from hmf_jax.model import HybridLM
from hmf_jax.options import check_int, check_number
from hmf_jax.parameters import flat_params, with_params
from hmf_jax.sharding import named_sharding
from hmf_jax.training.peft import CONFIG, PREFIX, WEIGHTS, AdapterConfig, read_adapters
from hmf_jax.training.step import select_parameters

Array = jax.Array
Quantize = Literal["int8", "nf4"]

# Rows of a column of the kernel that share a scale; None: all of them.
_TILES: dict[str, int | None] = {"int8": None, "nf4": 64}


class LoRALinear(nnx.Module):
    """y = x W + b + (alpha / r) (x A) B with W [in, out], A [in, r], B [r, out].

    A and B are float32; x A B is computed in the dtype of x. W is either `kernel`, or quantised as
    `qvalue` [in, out] (int8 or 4-bit indices) times `scale` [in / tile, out].
    """

    def __init__(
        self,
        linear: nnx.Linear,
        A: Array,
        B: Array,
        alpha: float,
        quantize: Quantize | None = None,
        mesh: Mesh | None = None,
    ):
        rows, columns = self.dims = linear.kernel.get_metadata()["dims"]
        self.lora_A = _param(A, (rows, None), mesh)
        self.lora_B = _param(B, (None, columns), mesh)
        self.alpha, self.rank = float(alpha), A.shape[1]
        self.bias, self.quantized = linear.bias, quantize
        if quantize is None:
            self.kernel = linear.kernel
        else:
            qvalue, scale = _quantize(linear.kernel[...], quantize)
            self.qvalue = _param(qvalue, self.dims, mesh)
            self.scale = _param(scale, (None, columns), mesh)

    def __call__(self, x: Array) -> Array:
        """x [B, T, in] -> y [B, T, out]."""
        return one_row_twice(self._product, x)

    def _product(self, x: Array) -> Array:
        if (kind := self.quantized) is None:
            y = x @ self.kernel[...].astype(x.dtype)
        else:
            # The backward pass makes W again: it would otherwise be kept for every projection.
            def product(x: Array, qvalue: Array, scale: Array) -> Array:
                return x @ _dequantize(qvalue, scale, kind, x.dtype)

            y = jax.checkpoint(product)(x, self.qvalue[...], self.scale[...])
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        A, B = self.lora_A[...].astype(x.dtype), self.lora_B[...].astype(x.dtype)
        return y + (x @ A) @ B * (self.alpha / self.rank)

    @jax.jit
    def merged(self) -> Array:
        """W + (alpha / r) A B [in, out], computed in float32, in the dtype of W."""
        if self.quantized is None:
            W = self.kernel[...]
        else:
            scale = self.scale[...]
            W = _dequantize(self.qvalue[...], scale, self.quantized, scale.dtype)
        delta = self.lora_A[...] @ self.lora_B[...] * (self.alpha / self.rank)
        return (exact(W) + delta).astype(W.dtype)


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
        and routers take no adapters: `TrainState.create(..., trainable="lora, experts")`.
      quantize: hold W of these projections in 8 bits (one scale per column) or in 4-bit NormalFloat
        (one scale per 64 rows of a column) instead; needs qwix.
      seed: of A (uniform, variance 1 / (3 in), as in the reference implementation); B is zero.

    Raises:
      ValueError: bad numbers, a rank larger than every projection, a pattern that selects nothing
        (with what there is), or a model that has adapters already.
      ImportError: `quantize` without qwix.
    """
    check_int("rank", rank, 1)
    check_number("alpha", alpha, 0, above=True)
    check_int("seed", seed, 0)
    if quantize is not None:
        _check_quantize(quantize)
    chosen = set(_projections(model, modules))
    shapes = {p: a.kernel.shape for _, _, p, a in _children(model, nnx.Linear) if p in chosen}
    if rank > max(map(min, shapes.values())):
        raise ValueError(f"rank={rank} is larger than every projection: {max(shapes.values())}.")

    def make(path: str, linear: nnx.Linear) -> tuple[Array, Array, float] | None:
        if path not in chosen:
            return None
        n_in, n_out = linear.kernel.shape
        dtype = exact_dtype(model.dtype)
        key = jax.random.fold_in(jax.random.key(seed), zlib.crc32(path.encode()))
        A = jax.random.uniform(key, (n_in, rank), dtype, -1.0, 1.0) / math.sqrt(n_in)
        return A, jnp.zeros((rank, n_out), dtype), alpha

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
        held = (a.kernel if a.quantized is None else a.qvalue)[...]  # may be a copy on the host
        params[f"{path}.kernel"] = jax.device_put(a.merged(), getattr(held, "sharding", None))
    plain = nnx.eval_shape(lambda: HybridLM(model.config, dtype=model.dtype, mesh=model.mesh))
    merged = with_params(plain, params)
    merged.source = model.source
    return merged


def save_lora(model: HybridLM, directory: str | Path) -> None:
    """Writes the adapters alone, as PEFT names and lays them out; loads in PEFT too.

    Mamba2's five projections are one tensor in the checkpoint: their adapters are stored as one of
    five times the rank, with block-diagonal B.

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
        A = np.ascontiguousarray(A)  # safetensors writes the memory as it lies
        tensors |= {f"{PREFIX}{name}.lora_A.weight": A, f"{PREFIX}{name}.lora_B.weight": B}
        ranks[name], alphas[name] = rank, len(parts) * parts[0][1].alpha
    if bad := [name for name, x in tensors.items() if not np.isfinite(x).all()]:
        raise ValueError(f"nothing written to {directory}; not finite: {', '.join(bad)}")
    first = next(iter(adapters.values()))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.source,
        "r": first.rank,
        "lora_alpha": first.alpha,
        "target_modules": list(ranks),
        "rank_pattern": {n: r for n, r in ranks.items() if r != first.rank},
        "alpha_pattern": {n: a for n, a in alphas.items() if a != first.alpha},
        "lora_dropout": 0.0,
        "bias": "none",
    }
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
        _check_quantize(quantize)
    config = AdapterConfig.read(files[0])
    read, shapes, saved = read_adapters(files[1])
    stored = _stored(model)
    found: dict[str, tuple[Array, Array, float]] = {}
    problems, absent = [], []
    for name, blocks in stored.items():
        halves = {half: shapes.pop(f"{name}.lora_{half}.weight", None) for half in "AB"}
        if problem := _misfit(config, name, halves, tensor_shape(list(blocks.values()))):
            problems.append(f"{name}: {problem}")
        elif halves["A"] is None:
            absent += [name] if config.names(name) else []
        else:
            A, B = (read(f"{name}.lora_{half}.weight").astype(np.float32) for half in "AB")
            if not (np.isfinite(A).all() and np.isfinite(B).all()):
                problems.append(f"{name}: holds NaN or infinity")
            own = [path for path in blocks if path in saved]
            found |= _split(A, B, config.alpha(name), blocks, own, exact_dtype(model.dtype))
    problems += [f"{printable(name)}: no such projection in this model" for name in shapes]
    if problems:
        more = f"\n  and {len(problems) - 20} more" if len(problems) > 20 else ""
        lines = "\n  ".join(problems[:20]) + more
        raise ValueError(f"{directory}: adapters do not fit the model:\n  {lines}")
    config.check_modules(stored)
    config.check_base(model.source)
    if absent:  # as in PEFT: these projections stay as they are
        some = ", ".join(absent[:3]) + (f" and {len(absent) - 3} more" if absent[3:] else "")
        warnings.warn(f"{files[1]} lacks the adapters of {some}", stacklevel=2)
    return _with_adapters(model, lambda path, _: found.get(path), quantize)


def _misfit(
    config: AdapterConfig, name: str, halves: dict[str, Any], shape: tuple[int, ...]
) -> str | None:
    """Why a module's adapter, of these shapes, is none for a weight [out, in] of this shape."""
    A, B = halves["A"], halves["B"]
    if A is None or B is None:
        return None if A is B else "only one of lora_A and lora_B"
    rank, (n_out, n_in) = config.rank(name), shape
    if len(A) != 2 or len(B) != 2 or (*A[1:], *B) != (n_in, n_out, A[0]):
        return f"lora_A {A}, lora_B {B} for a {n_out, n_in} weight"
    if A[0] != rank:
        return f"rank {A[0]}, but {CONFIG} says {rank}"
    return None if config.targets(name) else f"not among the target_modules of {CONFIG}"


def _split(
    A: np.ndarray,
    B: np.ndarray,
    alpha: float,
    blocks: dict[str, Entry],
    own: list[str],
    dtype: Any,
) -> dict[str, tuple[Array, Array, float]]:
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
        found[path] = jnp.asarray(A[columns].T, dtype), jnp.asarray(part.T, dtype), alpha / n
    return found


def _param(value: Array, dims: tuple[str | None, ...], mesh: Mesh | None) -> nnx.Param:
    sharding = named_sharding(mesh, dims, value.shape)
    return nnx.Param(value if sharding is None else jax.device_put(value, sharding), dims=dims)


@functools.partial(jax.jit, static_argnums=1)
def _quantize(W: Array, kind: str) -> tuple[Array, Array]:
    """W [in, out] as integers [in, out] and scales [in / tile, out].

    Column by column: so no device needs the columns of another.
    """
    import qwix

    tile = math.gcd(W.shape[0], _TILES[kind] or W.shape[0])
    array = jax.vmap(lambda w: qwix.quantize(w, kind, tiled_axes={0: tile}), 1, 1)(W)
    return array.qvalue, array.scale


def _dequantize(qvalue: Array, scale: Array, kind: str, dtype: Any) -> Array:
    import qwix

    array = qwix.QArray(qvalue, scale, qtype=kind)
    return jax.vmap(qwix.dequantize, 1, 1)(array).astype(dtype)


def _check_quantize(quantize: str) -> None:
    if quantize not in _TILES:
        raise ValueError(f"quantize={quantize!r} is unknown; use one of {list(_TILES)} or None.")
    try:
        import qwix  # noqa: F401
    except ImportError as e:
        raise ImportError("quantised projections need qwix: pip install 'hmf-jax[train]'") from e


def _children(
    model: HybridLM, kind: type | tuple[type, ...]
) -> Iterator[tuple[Any, str, str, Any]]:
    """(parent, attribute, path "layers.3.mixer.q_proj", module) of the projections in blocks."""
    for i, block in enumerate(model.layers):
        for path, parent in nnx.iter_modules(block):
            for name, child in list(vars(parent).items()):
                if isinstance(child, kind):
                    yield parent, name, ".".join(map(str, ("layers", i, *path, name))), child


def _adapters(model: HybridLM) -> dict[str, LoRALinear]:
    adapters = {path: a for _, _, path, a in _children(model, LoRALinear)}
    if not adapters:
        raise ValueError("The model has no adapters; apply_lora or load_lora gives it some.")
    return adapters


def _projections(model: HybridLM, modules: str | Sequence[str]) -> list[str]:
    """Paths of the projections that these patterns select."""
    known = [path for _, _, path, _ in _children(model, nnx.Linear)]
    if not isinstance(modules, str) and not (
        isinstance(modules, Sequence) and all(isinstance(m, str) for m in modules)
    ):
        raise ValueError(f"modules must be a text or a list of texts, got {modules!r}.")
    patterns = modules.split(",") if isinstance(modules, str) else list(modules)
    chosen: set[str] = set()
    for pattern in filter(None, map(str.strip, patterns)):
        names = set(select_parameters(model, pattern))
        hits = [path for path in known if f"{path}.kernel" in names]
        if not hits:
            kinds = ", ".join(sorted({path.split(".", 2)[2] for path in known}))
            whole = "" if model.config.moe is None else "; experts and routers are trained whole"
            raise ValueError(f"{pattern!r} selects no projection; there are {kinds}{whole}.")
        chosen.update(hits)
    if not chosen:
        raise ValueError(f"modules={modules!r} holds no pattern.")
    return [path for path in known if path in chosen]


def _stored(model: HybridLM) -> dict[str, dict[str, Entry]]:
    """Checkpoint module ("model.layers.3.gka.q_proj") -> path -> its rows, for all projections."""
    known = {path for _, _, path, _ in _children(model, (nnx.Linear, LoRALinear))}
    out: dict[str, dict[str, Entry]] = {}
    for e in table.entries(model.config):
        if (path := e.path.removesuffix(".kernel")) in known and e.path != path:
            out.setdefault(e.name.removesuffix(".weight"), {})[path] = e
    return out


def _with_adapters(
    model: HybridLM,
    make: Callable[[str, nnx.Linear], tuple[Array, Array, float] | None],
    quantize: Quantize | None,
) -> HybridLM:
    """A copy of the model (of its modules, not its arrays) with (A, B, alpha) where `make` says."""
    if any(_children(model, LoRALinear)):
        raise ValueError("The model has adapters already; merge_lora(model) first.")
    model = jax.tree.map(lambda x: x, model)
    for parent, name, path, linear in list(_children(model, nnx.Linear)):
        if (adapter := make(path, linear)) is not None:
            setattr(parent, name, LoRALinear(linear, *adapter, quantize, model.mesh))
    return model
