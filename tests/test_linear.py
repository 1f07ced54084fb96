"""GKA and GDN with fewer queries and keys than values: the same as if they were stored repeated."""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hmf_jax.config import HybridConfig
from hmf_jax.mixers import GKAConfig, make_mixer
from hmf_jax.mixers.linear import dimension, geometry
from hmf_jax.options import LinearHeads
from hmf_jax.parameters import abstract_params, flat_params, with_params
from hmf_jax.table import entries, num_parameters
from tests.util import mesh_of, place, random_model, rel, tiny_config

FEW, MANY = LinearHeads(2, 4, 8), LinearHeads(4, 4, 8)
KINDS = ("GKA", "GDN")


def tokens(length: int):
    return jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, length)), jnp.int32)


@pytest.fixture(scope="module")
def few():
    return random_model(tiny_config(KINDS, linear=FEW), jnp.float32)


def test_heads_of_queries_and_keys_are_repeated(few):
    """A model that stores each of them twice computes the same."""

    def repeated(path: str, x: jax.Array) -> jax.Array:
        if not re.search(r"\.[qk]_(proj|conv1d)\.", path):
            return x
        heads = x.reshape(x.shape[0], FEW.num_key_heads, FEW.head_dim)
        return jnp.repeat(heads, 2, axis=1).reshape(x.shape[0], -1)

    params = {path: repeated(path, x) for path, x in flat_params(few).items()}
    many = nnx.eval_shape(lambda: type(few)(tiny_config(KINDS, linear=MANY), dtype=jnp.float32))
    many = with_params(many, params)
    assert {path: x.shape for path, x in params.items()} == {
        path: x.shape for path, x in flat_params(many).items()
    }
    assert rel(few(tokens(11))[0], many(tokens(11))[0]) < 1e-5  # the solver amplifies rounding


def test_states_are_those_of_the_values(few):
    state = few.init_state(2, 16)
    gka, gdn = state.layers
    assert gka.h_kk.shape == gka.h_kv.shape == gdn.s.shape == (2, 4, 8, 8)
    for layer in (gka, gdn):
        assert [x.shape for x in (layer.conv_q, layer.conv_k, layer.conv_v)] == [
            (2, 3, 16), (2, 3, 16), (2, 3, 32),
        ]  # fmt: skip


@pytest.mark.slow  # a law of every family, tests/test_laws.py
def test_a_prefix_and_a_token(few):
    whole = few(tokens(11))[0]
    first, state = few(tokens(11)[:, :10], state=few.init_state(2, 16))
    last, _ = few(tokens(11)[:, 10:], state=state)
    assert rel(jnp.concatenate([first, last], axis=1), whole) < 1e-5


def test_parameters_and_copies(few):
    config = few.config
    assert num_parameters(config) == sum(x.size for x in flat_params(few).values())
    assert geometry(config) == {
        "hidden_size": 32, "head_dim": 8, "num_q_heads": 2, "num_k_heads": 2, "num_v_heads": 4,
    }  # fmt: skip
    for layer in few.layers:
        assert layer.mixer.o_norm.weight[...].shape == (8,)
        assert layer.mixer.A_log[...].shape == layer.mixer.dt_bias[...].shape == (4,)
        assert layer.mixer.g_proj.kernel[...].shape == (32, 32)


def test_low_rank_of_keys_and_values():
    """Both get theirs as soon as one of them has fewer heads than there are states."""

    def made(config) -> Any:
        return make_mixer("GKA", config, config.sections, dtype=jnp.float32, rngs=nnx.Rngs(0))

    c = GKAConfig(kv_proj_rank=3, kv_learnable_residual=True)
    config = tiny_config(("GKA",), linear=FEW, gka=c)
    mixer = nnx.eval_shape(lambda: made(config))
    params = abstract_params(mixer, None)
    shapes = {path: x.shape for path, x in params.items() if "proj_" in path}
    assert shapes == {
        "proj_k.linearA.kernel": (16, 3),
        "proj_k.linearB.kernel": (3, 32),
        "proj_v.linearA.kernel": (32, 3),
        "proj_v.linearB.kernel": (3, 32),
    }
    assert params["k_rep"].shape == (4, 2) and params["v_rep"].shape == (4, 4)
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 2, 16)), jnp.float32)
    heads = np.asarray(x).reshape(1, 2, 2, 8)[:, :, [0, 0, 1, 1]]

    @jax.jit
    def expanded(x):  # by a fresh mixer, of which nothing else is made
        mixer = made(config)
        return mixer.expand(x, mixer.proj_k, mixer.k_rep)

    np.testing.assert_array_equal(expanded(x), heads)  # B is zero
    equal = tiny_config(("GKA",), linear=MANY, gka=c)
    mixer = nnx.eval_shape(lambda: made(equal))
    assert mixer.proj_k is None and mixer.v_rep is None


def test_dimensions_on_a_mesh():
    """A tp that divides the heads of attention divides what is split like them."""
    config = tiny_config(KINDS, num_attention_heads=4, num_key_value_heads=2)
    assert [dimension(config, n) for n in (4, 8, 2, 6)] == ["heads", "heads", *["kv_heads"] * 2]


@pytest.mark.slow
def test_more_devices_than_key_heads(few):
    """Four devices, two heads of queries and keys: each is on two of them; nothing more moves."""
    config = few.config
    step = jax.jit(lambda m, t: m(t)[0])
    split = place(few, config, mesh_of(dict(tp=4)))
    assert rel(step(split, tokens(8)), few(tokens(8))[0]) < 1e-5
    text = step.lower(split, tokens(8)).compile().as_text() or ""
    found = re.findall(r" (all-reduce|all-gather|all-to-all|collective-permute)(?:-start)?\(", text)
    assert found == ["all-reduce"] * 5  # of the embedding, of each mixer and of each MLP


def base_config(family: str) -> HybridConfig:
    linear = {"num_key_heads": 2, "num_value_heads": 6, "key_head_dim": 8, "value_head_dim": 8}
    sizes = {"hidden_size": 32, "num_attention_heads": 4, "head_dim": 16, "vocab_size": 64}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
    stored = {f"linear_{name}": value for name, value in linear.items()}
    layers = ["linear_attention", "full_attention"]
    return HybridConfig.from_dict(
        {"model_type": family, "layer_types": layers, **sizes, **experts, **stored}
    )


@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe_text"])
def test_layers_of_base_models_that_are_not_attention(family):
    """Packed, the rows of a key head and of its three value heads are together: q, k, v, gate."""
    config = base_config(family)
    assert config.layer_kinds == ("GDN", "*") and config.is_stock
    assert config.to_dict()["layer_types"] == ["linear_attention", "full_attention"]
    prefix = "model.layers.0.linear_attn."
    of_layer = [e for e in entries(config) if e.name.startswith(prefix)]
    if family == "qwen3_next":
        stacks = {"in_proj_qkvz": {"q": 16, "k": 16, "v": 48, "g": 48}}
        stacks |= {"in_proj_ba": {"b": 6, "gk": 6}}
    else:
        stacks = {"in_proj_qkv": {"q": 16, "k": 16, "v": 48}}
    names = {e.name.removeprefix(prefix).removesuffix(".weight") for e in of_layer}
    others = {"in_proj_z", "in_proj_b", "in_proj_a"} if family != "qwen3_next" else set()
    assert names == {*stacks, *others, "conv1d", "A_log", "dt_bias", "norm", "out_proj"}
    groups = 2 if family == "qwen3_next" else 1
    for name, parts in stacks.items():
        heights = [height // groups for height in parts.values()]
        rows = np.arange(groups * sum(heights)).reshape(groups, -1)
        found = {e.path: e for e in of_layer if e.name == f"{prefix}{name}.weight"}
        for s, block in zip(parts, np.split(rows, np.cumsum(heights)[:-1], axis=1), strict=True):
            entry = found.pop(f"layers.0.mixer.{s}_proj.kernel")
            np.testing.assert_array_equal(rows.reshape(-1)[entry.rows], block.reshape(-1))
        assert not found
    conv = [e for e in of_layer if e.name == f"{prefix}conv1d.weight"]
    assert [(e.path.split(".")[3], e.start, e.shape) for e in conv] == [
        ("q_conv1d", 0, (16, 1, 4)), ("k_conv1d", 16, (16, 1, 4)), ("v_conv1d", 32, (48, 1, 4)),
    ]  # fmt: skip
    mixer = nnx.eval_shape(
        lambda: make_mixer("GDN", config, config.sections, dtype=jnp.float32, rngs=nnx.Rngs(0))
    )
    shapes = {f"layers.0.mixer.{path}": x.shape for path, x in flat_params(mixer).items()}
    assert {e.path: e.parameter_shape for e in of_layer} == shapes
