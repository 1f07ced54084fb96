"""Which implementation "auto" picks on which machine, for which arguments. Nothing runs."""

from __future__ import annotations

import importlib.machinery
import inspect
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from hmf_jax.pallas_kernels import (
    attention,
    causal_conv1d,
    decode_attention,
    dispatch,
    gated_delta_rule,
    gated_delta_rule_step,
    gka,
    gka_step,
    grouped_matmul,
    recurrent,
    ssd,
    ssd_step,
    triton,
    two_window_attention,
    two_window_decode,
)
from hmf_jax.pallas_kernels.ops.two_window_attention import cudnn as two_window_cudnn

B, T, H, K = 2, 4, 4, 2
BF16, F16, F32 = jnp.bfloat16, jnp.float16, jnp.float32


class Picked(Exception):
    """Ends a call where it has decided what to run."""


def array(*shape: int, dtype: Any = F32) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


def qkv(D: int, *dtypes: Any, tokens: tuple[int, ...] = (T,)) -> tuple[Any, ...]:
    """q, k, v of one dtype, or of three."""
    dtypes = dtypes if len(dtypes) == 3 else dtypes * 3
    pairs = zip((H, K, K), dtypes, strict=True)
    return tuple(array(B, *tokens, n, D, dtype=dtype) for n, dtype in pairs)


def gates(count: int, *tokens: int) -> list[Any]:
    return [array(B, *tokens, H) for _ in range(count)]


def states(D: int, dtype: Any = F32) -> tuple[Any, ...]:
    return (array(B, H, D, D, dtype=dtype),) * 2


def ssd_arguments(D: int, *dtypes: Any) -> tuple[Any, ...]:
    C, Bs, x = qkv(D, *dtypes)
    return x, Bs, C, *gates(1, T), array(H), array(H)


def whole(D: int, *dtypes: Any) -> tuple[Any, ...]:
    q, k, v = qkv(D, *dtypes)
    return q, k, v, k, v


def decoding(D: int, *dtypes: Any) -> tuple[Any, ...]:
    q, k, v = qkv(D, *dtypes)
    return array(B, H, D, dtype=q.dtype), k, v, array(B, dtype=jnp.int32)


def token(D: int, *dtypes: Any, state: Any = F32) -> tuple[Any, ...]:
    return *qkv(D, *dtypes, tokens=()), *gates(3), states(D, state)


OFFSET = {"offset": array(B, dtype=jnp.int32)}
IDS = {"segment_ids": array(B, T, dtype=jnp.int32)}
LENGTHS = {"lengths": array(B, dtype=jnp.int32)}
UNTIED = {"q_fading": array(B, T, H, 64, dtype=BF16)}
UNTIED_FLOAT = {"q_fading": array(B, T, H, 64)}

# What runs on (a CPU, Hopper, Ampere, a GPU of 99 KiB per block, Turing).
CHUNKED = ("chunked",) * 5


def experts(rows: int, width: int, dtype: Any) -> tuple[Any, ...]:
    weights = array(3, 64, width, dtype=dtype)
    return array(rows, 64, dtype=dtype), weights, array(3, dtype=jnp.int32)


MACHINES = ("", "9.0", "8.0", "8.6", "7.5")
CASES: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], tuple[str, ...]]] = [
    # Gated KalmaNet
    (gka, qkv(64, BF16), {}, ("chunked", "mosaic", "triton", "triton", "chunked")),
    (gka, qkv(128, BF16), {}, ("chunked", "mosaic", "triton", "triton", "chunked")),
    (gka, qkv(32, BF16), {}, ("chunked", "triton", "triton", "triton", "chunked")),
    (gka, qkv(96, BF16), {}, CHUNKED),
    (gka, qkv(256, BF16), {}, CHUNKED),
    (gka, qkv(64, F32), {}, ("chunked", "triton", "triton", "triton", "chunked")),
    (gka, qkv(128, F32), {}, ("chunked", "triton", "triton", "chunked", "chunked")),
    (gka, qkv(64, F16), {}, CHUNKED),
    (gka, qkv(64, BF16, BF16, F32), {}, CHUNKED),
    (gka, qkv(64, BF16), {"solver": "cg"}, CHUNKED),
    (gka, qkv(64, BF16), {"initial_state": states(64, BF16)}, CHUNKED),
    (gka, qkv(64, BF16), IDS, ("chunked", "mosaic", "triton", "triton", "chunked")),
    (gka, qkv(64, BF16), LENGTHS, ("chunked", "mosaic", "triton", "triton", "chunked")),
    (gka_step, token(64, BF16), {}, ("chunked", "mosaic", "triton", "triton", "chunked")),
    (gka_step, token(128, F32), {}, ("chunked", "mosaic", "triton", "chunked", "chunked")),
    (gka_step, token(32, F32), {}, ("chunked", "triton", "triton", "triton", "chunked")),
    (gka_step, token(64, BF16, F32, F32), {}, ("chunked", "mosaic", *CHUNKED[2:])),
    (gka_step, token(64, F16), {}, CHUNKED),
    (gka_step, token(64, BF16), {"solver": "cg"}, CHUNKED),
    (gka_step, token(64, BF16, state=BF16), {}, CHUNKED),
    # Gated DeltaNet and Mamba-2: the package jax-linear-attention, for Hopper
    (gated_delta_rule, (*qkv(64, BF16), *gates(2, T)), {}, ("chunked", "jla", *CHUNKED[2:])),
    (gated_delta_rule, (*qkv(128, BF16), *gates(2, T)), IDS, ("chunked", "jla", *CHUNKED[2:])),
    (gated_delta_rule, (*qkv(32, BF16), *gates(2, T)), {}, CHUNKED),
    (
        gated_delta_rule,
        (*qkv(64, BF16)[:2], array(B, T, K, 32, dtype=BF16), *gates(2, T)),
        {},
        CHUNKED,
    ),
    (gated_delta_rule, (*qkv(64, F32), *gates(2, T)), {}, CHUNKED),
    (gated_delta_rule, (*qkv(64, BF16, F32, BF16), *gates(2, T)), {}, CHUNKED),
    (
        gated_delta_rule_step,
        (*qkv(64, BF16, tokens=()), *gates(2), states(64)[0]),
        {},
        CHUNKED,
    ),
    (ssd, ssd_arguments(64, BF16), {}, ("chunked", "jla", *CHUNKED[2:])),
    (ssd, ssd_arguments(16, BF16), {}, CHUNKED),
    (ssd, ssd_arguments(64, F32), {}, CHUNKED),
    (
        ssd_step,
        (
            *(array(B, K, 64),) * 2,
            array(B, H, 64),
            *gates(1),
            array(H),
            array(H),
            array(B, H, 64, 64),
        ),
        {},
        CHUNKED,
    ),
    (causal_conv1d, (array(B, T, 8, dtype=BF16), array(4, 8, dtype=BF16)), {}, CHUNKED),
    # Attention: cuDNN before the kernels for Hopper
    (attention, qkv(64, BF16), {}, ("chunked", "cudnn", "cudnn", "cudnn", "chunked")),
    (attention, qkv(128, F16), LENGTHS, ("chunked", "cudnn", "cudnn", "cudnn", "chunked")),
    (attention, qkv(64, BF16), {"window": 2}, ("chunked", "cudnn", "cudnn", "cudnn", "chunked")),
    (attention, qkv(136, BF16), {}, CHUNKED),
    (attention, qkv(256, BF16), {}, ("chunked", "cudnn", *CHUNKED[2:])),
    (attention, qkv(256, BF16), OFFSET, CHUNKED),
    (attention, qkv(60, BF16), {}, CHUNKED),
    (attention, qkv(64, F32), {}, CHUNKED),
    (attention, qkv(64, BF16, BF16, F16), {}, CHUNKED),
    (attention, qkv(64, BF16), IDS, ("chunked", "mosaic", *CHUNKED[2:])),
    (attention, qkv(128, BF16), OFFSET, ("chunked", "mosaic", *CHUNKED[2:])),
    (attention, qkv(64, F16), IDS, CHUNKED),
    (attention, qkv(64, BF16), IDS | {"scale": 0.0}, CHUNKED),
    (attention, qkv(64, BF16), OFFSET | {"scale": -0.1}, CHUNKED),
    (attention, qkv(32, BF16), IDS, CHUNKED),
    (decode_attention, decoding(64, BF16), {}, ("chunked", "cudnn", "cudnn", "cudnn", "chunked")),
    (decode_attention, decoding(64, F32), {}, CHUNKED),
    # Two windows: the kernel for Hopper before cuDNN
    (
        two_window_attention,
        whole(64, BF16),
        {"window": 2},
        ("chunked", "mosaic", "cudnn", "cudnn", "chunked"),
    ),
    (
        two_window_attention,
        whole(64, BF16),
        {"window": 2} | UNTIED,
        ("chunked", "mosaic", "cudnn", "cudnn", "chunked"),
    ),
    (
        two_window_attention,
        whole(32, BF16),
        {"window": 2} | LENGTHS,
        ("chunked", "cudnn", "cudnn", "cudnn", "chunked"),
    ),
    (
        two_window_attention,
        whole(64, BF16),
        {"window": 2} | IDS,
        ("chunked", "mosaic", *CHUNKED[2:]),
    ),
    (
        two_window_attention,
        whole(64, BF16),
        {"window": 2} | OFFSET,
        ("chunked", "mosaic", *CHUNKED[2:]),
    ),
    (two_window_attention, whole(64, F32), {"window": 2}, CHUNKED),
    (
        two_window_decode,
        (*decoding(64, BF16), array(B, dtype=jnp.int32)),
        {},
        ("chunked", "cudnn", "cudnn", "cudnn", "chunked"),
    ),
    (two_window_decode, (*decoding(64, F32), array(B, dtype=jnp.int32)), {}, CHUNKED),
    # Experts: the kernel for Hopper; elsewhere XLA's product, for a few rows
    (grouped_matmul, experts(300, 64, BF16), {}, ("chunked", "mosaic", *CHUNKED[2:])),
    (grouped_matmul, experts(8, 64, F32), {}, ("chunked", "xla", "xla", "xla", "xla")),
    (grouped_matmul, experts(300, 40, BF16), {}, CHUNKED),
]
CACHED = (dispatch.why_no_hopper, triton.why_no_triton, recurrent._jla_missing)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Makes this machine one with a GPU of that compute capability, and all optional packages."""
    package, ops = types.ModuleType("jla"), types.ModuleType("jla.ops")
    package.__spec__ = importlib.machinery.ModuleSpec("jla", None)
    monkeypatch.setitem(sys.modules, "jla", package)
    monkeypatch.setitem(sys.modules, "jla.ops", ops)
    monkeypatch.setattr(triton, "MISSING", None)

    def make(capability: str) -> None:
        platform = "gpu" if capability else "cpu"
        device = types.SimpleNamespace(platform=platform, compute_capability=capability)
        monkeypatch.setattr(jax, "devices", lambda *_: [device])
        monkeypatch.setattr(jax, "default_backend", lambda: platform)
        for function in CACHED:
            function.cache_clear()

    yield make
    monkeypatch.undo()
    for function in CACHED:
        function.cache_clear()


def picked(op: Callable[..., Any], arguments: tuple[Any, ...], options: dict[str, Any]) -> str:
    """The implementation that this call would run."""
    module: Any = inspect.getmodule(op)
    resolve = module.resolve
    plain = {name: x for name, x in options.items() if isinstance(x, int | float | str)}
    arrays = {name: x for name, x in options.items() if name not in plain}

    def stop(*args: Any) -> None:
        raise Picked(resolve(*args))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "resolve", stop)
        with pytest.raises(Picked) as found:
            jax.eval_shape(lambda args, given: op(*args, **given, **plain), arguments, arrays)
    return str(found.value)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_auto(case: int, machine: Callable[[str], None]) -> None:
    op, arguments, options, expected = CASES[case]
    found = []
    for capability in MACHINES:
        machine(capability)
        found.append(picked(op, arguments, options))
    assert tuple(found) == expected, (op.__name__, [x.dtype for x in arguments[:3]], options)


def test_kernels_for_hopper_need_just_that(machine: Callable[[str], None]) -> None:
    """Their instructions are those of one generation: neither older nor newer GPUs have them."""
    for capability, runs in {"9.0": True, "10.0": False, "12.0": False, "8.9": False}.items():
        machine(capability)
        assert (dispatch.why_no_hopper() is None) == runs, capability


@pytest.mark.parametrize("name", ["8.6", "8.9", "12.0", "12.1"])
def test_small_blocks(name: str, machine: Callable[[str], None]) -> None:
    machine(name)
    assert picked(gka, qkv(128, F32), {}) == "chunked"
    assert picked(gka, qkv(64, F32), {}) == picked(gka, qkv(128, BF16), {}) == "triton"


def test_an_amd_gpu(machine: Callable[[str], None]) -> None:
    machine("gfx942")
    for op, arguments, options, _ in CASES:
        few = op is grouped_matmul and len(arguments[0]) < 256
        assert picked(op, arguments, options) == ("xla" if few else "chunked")


def test_what_optional_packages_bring(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine("9.0")
    monkeypatch.setattr(triton, "MISSING", "jax-triton is not there")
    assert picked(gka, qkv(32, BF16), {}) == "chunked"
    monkeypatch.setitem(sys.modules, "jla.ops", None)  # cannot be imported
    recurrent._jla_missing.cache_clear()
    assert picked(ssd, ssd_arguments(64, BF16), {}) == "chunked"


def test_a_jax_that_hides_cudnns_passes(machine, monkeypatch: pytest.MonkeyPatch) -> None:
    machine("8.0")
    monkeypatch.setattr(two_window_cudnn, "_backward_pass", None)
    assert picked(two_window_attention, whole(64, BF16), {"window": 2}) == "chunked"
    assert picked(attention, qkv(64, BF16), {}) == "cudnn"


def test_mosaic_attention_takes_no_mixed_dtypes(machine: Callable[[str], None]) -> None:
    """Every array is looked at, the queries of the fading window too."""
    machine("9.0")
    options = {"window": 2} | IDS
    assert picked(two_window_attention, whole(64, BF16), options | UNTIED) == "mosaic"
    assert picked(two_window_attention, whole(64, BF16), options | UNTIED_FLOAT) == "chunked"
    q, k, v, _, v_fading = whole(64, BF16)
    for i in range(5):
        arrays = [q, k, v, k, v_fading]
        arrays[i] = array(*arrays[i].shape)
        assert picked(two_window_attention, tuple(arrays), options) == "chunked"
