"""Compile time: a kind of block is traced once, and no program of 64 layers takes three minutes."""

from __future__ import annotations

import time
from unittest import mock

import jax
import jax.numpy as jnp
import pytest

from benchmarks.models import next_token_loss
from hmf_jax.block import Block
from hmf_jax.config import HybridConfig
from hmf_jax.model import HybridLM

CEILING_S = 180.0


def test_each_kind_of_block_is_traced_once():
    kinds = ("*", "GKA", "GKA", "*", "GDN", "GKA")
    # Of a size that no other test has, so that nothing is traced yet.
    config = HybridConfig.preset("tiny", layer_kinds=kinds, intermediate_size=72)
    model = jax.eval_shape(lambda: HybridLM(config))
    tokens = jax.ShapeDtypeStruct((1, 9), jnp.int32)
    traced = []
    call = Block.__call__

    def spy(self, *args, **named):
        traced.append(type(self.mixer).__name__)
        return call(self, *args, **named)

    with mock.patch.object(Block, "__call__", spy):
        lowered = jax.jit(lambda m, t: m(t)).lower(model, tokens)
    assert sorted(traced) == ["Attention", "GatedDeltaNet", "GatedKalmaNet"]
    calls = lowered.as_text().count("call @run_block")
    assert calls == 6, "every layer should call the function of its kind"


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["GKA", "BMF"])
@pytest.mark.parametrize("program", ["decode", "prefill", "train"])
def test_64_layers_compile_within_the_ceiling(mixer, program):
    pattern = HybridConfig.preset("32b", mixer=mixer).layer_kinds
    config = HybridConfig.preset("tiny", layer_kinds=pattern)
    model = jax.eval_shape(lambda: HybridLM(config))
    state = jax.eval_shape(lambda: HybridLM(config).init_state(1, 1024))

    def run(model, tokens, state):
        return model(tokens, state=state, last_only=True)

    def train(model, tokens):
        return jax.grad(lambda m: next_token_loss(m(tokens)[0], tokens))(model)

    tokens = jax.ShapeDtypeStruct((1, 1 if program == "decode" else 256), jnp.int32)
    args = (model, tokens) if program == "train" else (model, tokens, state)
    start = time.perf_counter()
    jax.jit(train if program == "train" else run).lower(*args).compile()
    seconds = time.perf_counter() - start
    print(f"{mixer}, 64 layers, {program}: {seconds:.0f} s to trace, lower and compile")
    assert seconds < CEILING_S
