"""Compile time of a model's programs, with and without an inner jit around each block."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import time
from collections.abc import Iterator
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

import hmf_jax.model
from benchmarks import models
from benchmarks.rows import Row
from hmf_jax.config import HybridConfig
from hmf_jax.model import HybridLM
from hmf_jax.state import ModelState

Array = jax.Array


def compile_times(settings: models.Settings, *, inner_jit: bool, env: dict[str, Any]) -> list[Row]:
    """Seconds to trace, lower and compile the three programs of a model, from nothing.

    The layer pattern is that of the preset, the width that of "tiny" (compile time depends on the
    number of operations, hardly on their size). Programs: "decode" (one token), "fwd" (prefill of
    `length` tokens into a state) and "fwd_bwd" (loss and gradient). `inner_jit` True is the model
    as it is (each kind of block traced and lowered once), False inlines every block.
    """
    pattern = settings.config.layer_kinds
    config = HybridConfig.preset("tiny", layer_kinds=pattern)
    dtype = jnp.dtype(settings.dtype)
    model = jax.eval_shape(lambda: HybridLM(config, dtype=dtype))
    state = jax.eval_shape(lambda: HybridLM(config, dtype=dtype).init_state(settings.batch, 4096))
    token = jax.ShapeDtypeStruct((settings.batch, 1), jnp.int32)
    tokens = jax.ShapeDtypeStruct((settings.batch, settings.length), jnp.int32)
    options: dict[str, Any] = dict(num_iter=settings.num_iter, impl=settings.impl)

    def run(model: HybridLM, tokens: Array, state: ModelState):
        state = dataclasses.replace(state, fresh=tokens.shape[1] > 1)
        return model(tokens, state=state, last_only=True, **options)

    def grad(model: HybridLM, tokens: Array):
        return jax.value_and_grad(
            lambda m: models.next_token_loss(m(tokens, **options)[0], tokens)
        )(model)

    rows = []
    for pass_, fn, args in (
        ("decode", run, (model, token, state)),
        ("fwd", run, (model, tokens, state)),
        ("fwd_bwd", grad, (model, tokens)),
    ):
        with inlined_blocks() if not inner_jit else contextlib.nullcontext(), _no_cache():
            jax.clear_caches()
            clock = [time.perf_counter()]
            traced = jax.jit(fn).trace(*args)
            clock.append(time.perf_counter())
            lowered = traced.lower()
            clock.append(time.perf_counter())
            lowered.compile()
            clock.append(time.perf_counter())
        trace_s, lower_s, compile_s = (b - a for a, b in zip(clock, clock[1:], strict=False))
        extra = {"trace_s": trace_s, "lower_s": lower_s, "compile_s": compile_s}
        row = settings.row(models.COMPILE, pass_, 1e3 * (clock[-1] - clock[0]), extra, env)
        dims = dict(
            row.shape,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
        )
        case = f"{row.case} of tiny width, {'inner jit' if inner_jit else 'plain'}"
        rows.append(dataclasses.replace(row, case=case, shape=dims))
    return rows


def inlined_blocks() -> Any:
    """The plain design: blocks called without an inner jit."""
    plain = inspect.unwrap(hmf_jax.model.run_block)
    return mock.patch.object(hmf_jax.model, "run_block", plain)


@contextlib.contextmanager
def _no_cache() -> Iterator[None]:
    """Compile from nothing, whatever caches the process uses."""
    before = jax.config.jax_enable_compilation_cache
    jax.config.update("jax_enable_compilation_cache", False)
    try:
        yield
    finally:
        jax.config.update("jax_enable_compilation_cache", before)
