"""Compares a model with recorded outputs of the original: logits, hidden states, routing, caches,
decoding; of fused models the distillation's losses and gradients.

A case directory holds a checkpoint, `case.json` and `expected.safetensors`. Of the model only
`__call__`, `trace`, `init_state` and `dtype` are used, and where routing is recorded `embed` and
`blocks`, so this module imports no model.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import safe_open

from hmf_jax.convert.directories import printable, read_json
from hmf_jax.convert.safetensors_io import Checkpoint
from hmf_jax.moe import load_balancing_loss
from hmf_jax.options import check_int

RTOL = 1e-4
LOSS_RTOL = 1e-5
BF16_FACTOR = 1.25  # times the original's own bfloat16 error


# (model, tokens [B, T], target, pre_lm_head) -> loss, checkpoint name -> gradient
Distillation = Callable[[Any, jax.Array, str, bool], tuple[Any, Mapping[str, Any]]]


class Check(NamedTuple):
    """One compared tensor; `tolerance` is None where the error is only reported, `note` says why.

    The error of chosen experts is the share of them that the original did not choose.
    """

    name: str
    error: float
    tolerance: float | None
    ok: bool
    note: str = ""

    def __str__(self) -> str:
        verdict = "  --" if self.tolerance is None else "  ok" if self.ok else "FAIL"
        limit = self.note if self.tolerance is None else f"at most {self.tolerance:.2e}"
        return f"{verdict}  {self.error:.2e}  {self.name}" + (f"  ({limit})" if limit else "")


@dataclasses.dataclass(frozen=True)
class Report:
    """All checks of one case directory; `str()` gives one line per tensor and a verdict."""

    directory: Path
    dtype: str
    checks: list[Check]

    @property
    def ok(self) -> bool:
        return bool(self.checks) and all(c.ok for c in self.checks)

    def __str__(self) -> str:
        failed = sum(not c.ok for c in self.checks)
        verdict = f"{failed} of {len(self.checks)} tensors FAIL" if failed else "all tensors pass"
        if self.ok and all(c.tolerance is None for c in self.checks):
            verdict = "nothing is judged: the original's own error in this dtype is not recorded"
        lines = [f"{self.directory} in {self.dtype}: relative error per tensor", *self.checks]
        return "\n".join(map(str, [*lines, verdict]))


def rel(actual: Any, expected: Any) -> float:
    """||a - b|| / ||b|| over the whole tensor, in float64; infinite if a is not finite."""
    a, b = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {a.shape}, expected {b.shape}")
    error = float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-30))
    return error if math.isfinite(error) else math.inf


def verify_dir(
    directory: str | Path,
    load: Callable[[Path, Any], Any],
    *,
    distillation: Distillation | None = None,
    dtype: str = "float32",
    rtol: float = RTOL,
) -> Report:
    """Loads the checkpoint of a case directory and compares it with the recorded outputs.

    Args:
      directory: holds config.json, model*.safetensors, case.json and expected.safetensors.
      load: (directory, dtype) -> model, e.g. `hmf_jax.from_pretrained`.
      distillation: for cases of kind "stage1", e.g. `hmf_jax.priming.loss_and_gradients`.
      dtype: "float32" (matrix products at the highest precision) or "bfloat16".
      rtol: largest relative error in float32. In bfloat16 the logits may have 1.25 times the
        original's own bfloat16 error, and everything else is only reported.

    Raises:
      FileNotFoundError: there is nothing recorded to compare with.
      ValueError: the directory records something that cannot be compared here.
    """
    directory = Path(directory)
    for name in ("case.json", "expected.safetensors"):
        if not (directory / name).is_file():
            raise FileNotFoundError(
                f"{directory} has no {name}, so there is nothing to compare with. verify needs a "
                "directory with the original's recorded outputs (case.json, expected.safetensors) "
                "next to config.json and the weights"
            )
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {dtype!r}")
    case = read_json(directory / "case.json")
    kinds = ["model"] if distillation is None else ["model", "stage1"]
    if case.get("kind") not in kinds:
        known = " or ".join(map(repr, kinds))
        raise ValueError(
            f"{directory} is a case of kind {printable(case.get('kind'))!r}; verify runs kind "
            f"{known}"
        )
    file = directory / "expected.safetensors"
    Checkpoint(file)  # says what is wrong with a damaged one
    with safe_open(file, framework="numpy") as f:
        expected = {name: f.get_tensor(name) for name in f.keys()}
    _check_recorded(directory, case, expected)
    precision = "highest" if dtype == "float32" else None
    with jax.default_matmul_precision(precision):
        model = load(directory, jnp.dtype(dtype))
        if case["kind"] == "model":
            checks = run_case(model, case, expected, rtol=rtol)
        else:
            assert distillation is not None
            checks = run_stage1(model, distillation, expected, rtol=rtol)
    return Report(directory, dtype, checks)


def _check_recorded(
    directory: Path, case: Mapping[str, Any], expected: Mapping[str, np.ndarray]
) -> None:
    """Raises ValueError, one line, for what no recording of the original holds."""
    needed = ["input_ids"]
    if case["kind"] == "model":
        needed += ["positions", "logits", "logits_tail"]
    if missing := [name for name in needed if name not in expected]:
        raise ValueError(f"{directory}/expected.safetensors lacks {', '.join(missing)}")
    tokens = expected["input_ids"]
    if tokens.ndim != 2 or tokens.dtype.kind not in "iu" or not tokens.size or tokens.min() < 0:
        raise ValueError(f"{directory}/expected.safetensors: input_ids must be [B, T] token ids")
    if case["kind"] != "model":
        return
    (B, T), file = tokens.shape, directory / "case.json"
    check_int(f"{file}: L", case.get("L"), 1, T)
    check_int(f"{file}: layer_row", case.get("layer_row"), 0, B - 1)
    rows = case.get("rows")
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{file}: rows must be a list of rows, got {printable(rows)}")
    for row in rows:
        check_int(f"{file}: rows", row, 0, B - 1)
    positions = expected["positions"]
    if positions.ndim != 1 or not ((positions >= 0) & (positions < case["L"])).all():
        raise ValueError(f"{directory}/expected.safetensors: positions must be from 0 to L - 1")


def run_case(
    model: Any, case: Mapping[str, Any], expected: Mapping[str, np.ndarray], *, rtol: float = RTOL
) -> list[Check]:
    """Runs one case and compares every recorded tensor.

    The recorded tokens are run three ways: as one forward without a cache (`logits`,
    `logits_tail`), as a prefill of L tokens (`logits (prefill)`, `layers.*`, `aux`, `state.*`), and
    as 8 single steps after it (`decode`), which must give what the original's decode gave, or its
    full forward where its own cached decode is wrong (B'MOJO-F) or not recorded.

    Args:
      model: with `dtype`, `init_state(batch, capacity)`, `__call__(tokens, state=)` and
        `trace(tokens, state=)`.
      case: case.json.
      expected: the tensors of expected.safetensors, by name.
      rtol: largest relative error in float32.
    """
    exact = jnp.dtype(model.dtype) == jnp.float32
    bf16 = case.get("checks", {}).get("bf16")
    checks: list[Check] = []

    def compare(name: str, actual: Any, wanted: np.ndarray, note: str = "") -> None:
        tolerance = rtol if exact and not note else None
        if not exact and name.startswith("logits") and "tail" not in name and bf16:
            tolerance = BF16_FACTOR * bf16
        error = (_share_not_chosen if name.endswith("router_topk") else rel)(actual, wanted)
        ok = math.isfinite(error) if tolerance is None else error <= tolerance
        checks.append(Check(name, error, tolerance, ok, note))

    tokens = jnp.asarray(expected["input_ids"], jnp.int32)
    L = case["L"]
    rows, row = np.asarray(case["rows"]), case["layer_row"]
    positions = np.asarray(expected["positions"])

    whole = _host(model(tokens)[0])
    compare("logits", whole[rows][:, positions], expected["logits"])
    compare("logits_tail", whole[:, L - 1 :], expected["logits_tail"])
    if _SCALE in expected:
        compare(_SCALE, whole[rows][:, positions], expected[_SCALE], _SCALE_NOTE)

    state = model.init_state(*tokens.shape)
    logits, state, layers = model.trace(tokens[:, :L], state=state)
    compare("logits (prefill)", _host(logits)[rows][:, positions], expected["logits"])
    routings = _routings(model, tokens, L) if any(map(_ROUTED.fullmatch, expected)) else []
    for name in sorted(expected):
        if found := re.fullmatch(r"layers\.(\d+)\.(mixer_out|layer_out)", name):
            output = _layer(layers, found[1])[found[2] == "layer_out"]
            compare(name, _host(output)[row, positions], expected[name])
        elif _ROUTED.fullmatch(name):
            compare(name, _routed(routings, name, row, positions), expected[name])
        elif found := re.fullmatch(r"state\.(\d+)\.(\w+)", name):
            actual, wanted = _state(
                _layer(state.layers, found[1]), found[2], expected[name], row, L
            )
            compare(name, actual, wanted)
        elif name not in _GLOBAL:
            raise ValueError(f"do not know how to compare {printable(name)}")

    steps = []
    for t in range(L, tokens.shape[1]):
        logits, state = model(tokens[:, t : t + 1], state=state)
        steps.append(_host(logits))
    decode = expected.get("logits_decode")
    if decode is None or "BMF" in case.get("pattern", ""):
        decode = expected["logits_tail"][:, 1:]
    compare("decode", np.concatenate(steps, axis=1), decode)
    return checks


def run_stage1(
    model: Any,
    distillation: Distillation,
    expected: Mapping[str, np.ndarray],
    *,
    rtol: float = RTOL,
) -> list[Check]:
    """Compares every recorded loss (`loss.TARGET`), gradient and norm of a gradient of stage 1.

    TARGET is decoder, mixer, residuals or all, with "+pre_lm_head" if that term is added, or
    pre_lm_head alone. A gradient is `grad.TARGET.NAME`, or its first n rows, `...NAME.rows<n>`;
    `gradnorm.TARGET.NAME` is its norm. NAME is that of the parameter in the checkpoint.

    Args:
      model: a fused model, with `dtype`.
      distillation: see `Distillation`; called once per recorded target.
      expected: the tensors of expected.safetensors, by name.
      rtol: largest relative error of gradients in float32; losses may have 1e-5.
    """
    exact = jnp.dtype(model.dtype) == jnp.float32
    tokens = jnp.asarray(expected["input_ids"], jnp.int32)
    results: dict[str, tuple[Any, Mapping[str, Any]]] = {}
    checks: list[Check] = []
    for key in sorted(expected):
        if key == "input_ids":
            continue
        what, _, rest = key.partition(".")
        if what not in ("loss", "grad", "gradnorm"):
            raise ValueError(f"do not know how to compare {printable(key)}")
        target, _, name = rest.partition(".")
        if target not in results:
            per_layer = target.removesuffix("pre_lm_head").removesuffix("+") or "none"
            results[target] = distillation(model, tokens, per_layer, "pre_lm_head" in target)
        loss, gradients = results[target]
        if what == "loss":
            actual, tolerance = np.reshape(loss, (1,)), LOSS_RTOL
        else:
            name, _, rows = name.partition(".rows")
            actual, tolerance = np.asarray(gradients[name], np.float64), rtol
            if what == "gradnorm":
                actual = np.linalg.norm(actual.ravel())[None]
            elif rows:
                actual = actual[: int(rows)]
        error = rel(actual, expected[key])
        ok = error <= tolerance if exact else math.isfinite(error)
        checks.append(Check(key, error, tolerance if exact else None, ok))
    return checks


# Logits with the original's own scale of B'MOJO-F attention, where that is not 1 / sqrt(head_dim).
_SCALE = "original_scale.logits"
_SCALE_NOTE = "the original scales B'MOJO-F by (hidden_size / heads)^-1/2, this package does not"
_GLOBAL = ("input_ids", "positions", "logits", "logits_tail", "logits_decode", _SCALE)
_ROUTED = re.compile(r"aux|layers\.(\d+)\.router_(logits|topk)")
# Recorded name -> field of the layer's state; both [H, D, D] (or [H]).
_FIELDS = {
    "h_kk": "h_kk",
    "h_kv": "h_kv",
    "recurrent": "s",
    "ssm": "s",
    "log_aprods": "log_decay",
}


def _routings(model: Any, tokens: jax.Array, length: int) -> list[Any]:
    """What the router of each layer decides in a prefill; None in dense ones."""
    state = model.init_state(*tokens.shape)
    x, ctx = model.embed(tokens[:, :length], state=state)
    return [layer.routing for layer in model.blocks(x, ctx, state)]


def _routed(routings: list[Any], name: str, row: int, positions: np.ndarray) -> np.ndarray:
    """What is recorded as `layers.i.router_logits`, `layers.i.router_topk` or `aux`."""
    sparse = [routing for routing in routings if routing is not None]
    if name == "aux" and sparse:
        return _host(load_balancing_loss(sparse))[None]
    routing = None if name == "aux" else _layer(routings, name.split(".")[1])
    if routing is None:
        raise ValueError(f"{name} is recorded and the model has no router there")
    found = routing.logits if name.endswith("logits") else routing.experts
    return _host(found)[row, positions]


def _host(x: Any) -> np.ndarray:
    return np.asarray(x, np.float32)


def _layer(layers: Any, index: str) -> Any:
    if len(index) > 6 or int(index) >= len(layers):
        raise ValueError(f"layer {printable(index)} is recorded and the model has {len(layers)}")
    return layers[int(index)]


def _share_not_chosen(chosen: np.ndarray, wanted: np.ndarray) -> float:
    """Share of the recorded experts [P, k] of each token that are not among the chosen ones."""
    if chosen.shape != wanted.shape:
        raise ValueError(f"shapes differ: experts {chosen.shape}, expected {wanted.shape}")
    return float(1 - (wanted[..., None] == chosen[:, None]).any(-1).mean())


def _state(state: Any, key: str, wanted: np.ndarray, row: int, length: int):
    """A recorded cache and the same thing from a layer's state, in the recorded layout."""
    if key in ("key_last4", "value_last4"):  # [K, 4, D], the newest tokens of a cache or a ring
        buffer = _host(state.k if key == "key_last4" else state.v)[row]
        count = min(wanted.shape[1], buffer.shape[0])
        slots = np.arange(length - count, length) % buffer.shape[0]
        return buffer[slots].swapaxes(0, 1), wanted[:, wanted.shape[1] - count :]
    state = getattr(state, "inner", state)
    if key.startswith("conv"):  # recorded [C, K], newest last; the oldest tap is never read again
        names = ("conv_x", "conv_B", "conv_C") if key == "conv" else (key,)
        history = np.concatenate([_host(getattr(state, n))[row] for n in names], axis=-1)
        return history.T, wanted[:, 1:]
    if key not in _FIELDS:
        raise ValueError(f"do not know how to compare the state {key!r}")
    actual = _host(getattr(state, _FIELDS[key]))[row]
    return actual[: wanted.shape[0]], wanted  # some record the first head only
