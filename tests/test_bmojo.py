"""B'MOJO-F: decoding far beyond its windows, and memory that does not grow."""

from __future__ import annotations

import itertools

import jax
import jax.numpy as jnp
import pytest

from hmf_jax import HybridConfig, HybridLM
from hmf_jax.config import BMojoConfig
from tests.util import random_model, rel, tiny_config

W = 4
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("inner", "tied"),
    [
        pytest.param(*case, marks=[] if case == ("M2", False) else [SLOW])
        for case in itertools.product(("GKA", "GDN", "M2"), (True, False))
    ],
)
def test_decoding_past_three_windows_equals_the_whole(inner, tied):
    """Token by token from the second token on, until tokens were pending, fading and forgotten."""
    with jax.enable_x64():
        config = tiny_config(("BMF", "BMF"), bmojo=BMojoConfig(W, tied, inner))
        model = random_model(config, jnp.float64)
        tokens = jax.random.randint(jax.random.key(0), (2, 4 * W + 3), 0, config.vocab_size)
        whole = jax.jit(lambda m, t: m(t)[0])(model, tokens)
        step = jax.jit(lambda m, t, state: m(t, state=state))
        state = model.init_state(2, tokens.shape[1])
        for i in range(tokens.shape[1]):
            logits, state = step(model, tokens[:, i : i + 1], state)
            assert rel(logits[:, 0], whole[:, i]) < 1e-8, f"token {i}"


def test_memory_does_not_grow_with_the_context():
    config = HybridConfig.preset("8b", layer_kinds=("BMF",))

    def state_bytes(context: int) -> int:
        state = jax.eval_shape(lambda: HybridLM(config).init_state(1, context))
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state.layers))

    rings = 2 * 3 * 2048 * 8 * 128 * 2  # keys and values; 3 rings of 2048; 8 heads; bfloat16
    gka = 2 * 32 * 128 * 128 * 4  # two float32 matrices per head
    convs = 3 * (32 + 8 + 8) * 128 * 2
    assert state_bytes(4096) == state_bytes(131072) == rings + gka + convs
