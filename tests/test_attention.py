"""Attention against its definition, with the options that backbones other than Qwen3's have."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hmf_jax import layers, table
from hmf_jax.config import BMojoConfig, HybridConfig, RopeConfig
from hmf_jax.model import HybridLM
from hmf_jax.parameters import abstract_params, flat_params
from tests.util import random_model, rel, tiny_config

SIX = ("*", "SWA", "GKA", "GDN", "M2", "BMF")
LLAMA3 = RopeConfig(
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=64,
)
SCALED = RopeConfig(
    rope_type="yarn",
    factor=16.0,
    original_max_position_embeddings=4,
    mscale=1.0,
    mscale_all_dim=1.0,
    llama_4_scaling_beta=0.5,
)
QUARTER = RopeConfig(partial_rotary_factor=0.25)
BACKBONES: dict[str, dict[str, Any]] = {
    "biases, llama3": dict(qk_norm=False, qkv_bias=True, o_bias=True, rope=LLAMA3),
    "query scale": dict(qk_norm=False, bmojo_bias=True, rope=SCALED),
    "gate": dict(output_gate=True, zero_centered_norm=True, rope=QUARTER),
    "gate with biases": dict(output_gate=True, qkv_bias=True, o_bias=True),
}


def numpy_attention(model: HybridLM, x: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """What the attention of the only layer makes of x [T, d], in float64."""
    c, mixer = model.config, "layers.0.mixer."
    P = {
        path.removeprefix(mixer): np.asarray(a, np.float64)
        for path, a in flat_params(model).items()
        if path.startswith(mixer)
    }
    cos, sin = (np.asarray(a)[0] for a in layers.rope_table(jnp.asarray(positions)[None], c))
    T, D, R = len(x), c.head_dim, c.rotary_dim

    def heads(name: str, width: int) -> np.ndarray:
        y = x @ P[f"{name}.kernel"] + P.get(f"{name}.bias", 0)
        return y.reshape(T, -1, width)

    def placed(a: np.ndarray, norm: str) -> np.ndarray:
        if c.qk_norm:
            weight = P[f"{norm}.weight"] + c.zero_centered_norm
            a = a / np.sqrt((a * a).mean(-1, keepdims=True) + c.rms_norm_eps) * weight
        one, two = a[..., : R // 2], a[..., R // 2 : R]
        return np.concatenate([one * cos - two * sin, two * cos + one * sin, a[..., R:]], axis=-1)

    q, k, v = heads("q_proj", D * (1 + c.output_gate)), heads("k_proj", D), heads("v_proj", D)
    q, gate = q[..., :D], q[..., D:]
    q, k = placed(q, "q_norm"), placed(k, "k_norm")
    if c.rope.llama_4_scaling_beta:
        turns = np.floor(positions / c.rope.original_max_position_embeddings)
        q = q * (1 + c.rope.llama_4_scaling_beta * np.log(1 + turns))[:, None, None]
    k, v = (np.repeat(a, q.shape[1] // a.shape[1], axis=1) for a in (k, v))
    scores = np.einsum("thd,shd->hts", q, k) / np.sqrt(D)
    ago = np.arange(T)[:, None] - np.arange(T)
    window = T if c.layer_kinds == ("*",) else c.swa.window_size
    scores = np.where((ago >= 0) & (ago < window), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    o = np.einsum("hts,shd->thd", weights / weights.sum(-1, keepdims=True), v)
    if c.output_gate:
        o = o / (1 + np.exp(-gate))
    return o.reshape(T, -1) @ P["o_proj.kernel"] + P.get("o_proj.bias", 0)


@pytest.mark.parametrize(
    ("name", "kind", "heads"),
    [
        ("biases, llama3", "*", (6, 2)),
        ("query scale", "SWA", (5, 1)),
        ("gate", "*", (4, 2)),
        ("gate with biases", "SWA", (6, 1)),
    ],
)
def test_attention_is_its_definition(name, kind, heads):
    """Positions that jump, and heads whose width is not hidden_size / heads."""
    many = dict(num_attention_heads=heads[0], num_key_value_heads=heads[1])
    model = random_model(tiny_config((kind,), **many, **BACKBONES[name]), jnp.float32)
    tokens, positions = jnp.arange(9)[None] + 20, np.array([0, 1, 2, 3, 4, 30, 31, 32, 40])

    @jax.jit
    def mix(model: HybridLM) -> tuple[jax.Array, jax.Array]:
        x, ctx = model.embed(tokens, positions=jnp.asarray(positions)[None])
        return x, model.layers[0].mixer(x, ctx)[0]

    x, found = mix(model)
    assert rel(found[0], numpy_attention(model, np.asarray(x[0], np.float64), positions)) < 2e-6


def test_bmojo_has_neither_gate_nor_query_scale():
    """Its queries are not scaled, and its biases can be its own."""
    model = random_model(tiny_config(("BMF",), **BACKBONES["query scale"]), jnp.float32)

    @jax.jit
    def mix(scale: jax.Array) -> jax.Array:
        x, ctx = model.embed(jnp.arange(9)[None])
        return model.layers[0].mixer(x, dataclasses.replace(ctx, query_scale=scale))[0]

    factors = jnp.ones((1, 9, 1, 1))
    np.testing.assert_array_equal(mix(factors), mix(3 * factors))
    gated = dataclasses.replace(model.config, rope=RopeConfig(), output_gate=True)
    shapes = {path: a.shape for path, a in flat_params(model).items()}
    assert shapes == {e.path: e.parameter_shape for e in table.entries(gated)}
    assert "layers.0.mixer.bmojo_attn.q_proj.bias" in shapes
    assert "layers.0.mixer.bmojo_attn.o_proj.bias" not in shapes


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", BACKBONES)
def test_the_table_has_every_parameter(name, tied):
    config = tiny_config(SIX, **BACKBONES[name], bmojo=BMojoConfig(4, tied, "M2"))
    model = nnx.eval_shape(lambda: HybridLM(config))
    found = {path: a.shape for path, a in abstract_params(model, None).items()}
    assert found == {e.path: e.parameter_shape for e in table.entries(config)}


def test_names_and_shapes_of_optional_tensors():
    """q_proj makes queries and gates; biases of B'MOJO-F are those of attention unless it says."""

    def stored(config: HybridConfig, prefix: str) -> dict[str, tuple[int, ...]]:
        start = f"model.layers.0.{prefix}."
        found = {e.name: e.shape for e in table.entries(config) if e.name.startswith(start)}
        return {name.removeprefix(start): shape for name, shape in found.items()}

    gated = stored(tiny_config(("*",), **BACKBONES["gate with biases"]), "self_attn")
    assert gated["q_proj.weight"] == (128, 32) and gated["q_proj.bias"] == (128,)
    assert gated["o_proj.weight"] == (32, 64) and gated["o_proj.bias"] == (32,)
    assert not [n for n in stored(tiny_config(("*",), qk_norm=False), "self_attn") if "norm" in n]
    untied = BMojoConfig(4, False, "M2")
    for qkv, own in ((True, None), (False, True)):
        config = tiny_config(("BMF",), qkv_bias=qkv, bmojo_bias=own, bmojo=untied)
        biases = {n for n in stored(config, "bmojo_f.bmojo_attn") if n.endswith("bias")}
        assert biases == {f"{part}_proj{end}.bias" for part in "qkv" for end in ("", "_")}
    config = tiny_config(("BMF",), qkv_bias=True, o_bias=True, bmojo_bias=False)
    biases = {n for n in stored(config, "bmojo_f.bmojo_attn") if n.endswith("bias")}
    assert biases == {"o_proj.bias"}


def test_rotary_tables_and_query_scales_are_made_once_for_all_layers():
    config = tiny_config(("*", "SWA", "*"), rope=SCALED)
    model = nnx.eval_shape(lambda: HybridLM(config))
    for T, state in ((6, None), (1, model.abstract_state(2, 8))):
        tokens = jax.ShapeDtypeStruct((2, T), jnp.int32)
        text = jax.jit(lambda m, t, s: m(t, state=s)).lower(model, tokens, state).as_text()
        for operation in ("cosine", "sine", "log_plus_one"):
            assert text.count(f"stablehlo.{operation} ") == 1, operation


def test_the_gate_costs_no_product():
    """Decoding multiplies by as many matrices with an output gate as without."""

    def products(**changes: Any) -> int:
        model = nnx.eval_shape(lambda: HybridLM(tiny_config(("*",), **changes)))
        tokens, state = jax.ShapeDtypeStruct((2, 1), jnp.int32), model.abstract_state(2, 8)
        step = jax.jit(lambda m, t, s: m(t, state=s))
        return step.lower(model, tokens, state).as_text().count("stablehlo.dot_general")

    assert products(output_gate=True) == products()
