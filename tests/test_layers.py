"""What all layers are made of: roundings, constants, rotary angles, fresh parameters."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from hmf_jax import layers
from hmf_jax.config import BMojoConfig, GDNConfig, GKAConfig, RopeConfig
from hmf_jax.mixers import KINDS, make_mixer
from hmf_jax.mixers.linear import OutputNorm, l2_normalize
from hmf_jax.mixers.mamba2 import GatedGroupNorm
from hmf_jax.model import HybridLM
from hmf_jax.parameters import flat_params
from tests.util import rel, tiny_config

BF16 = jnp.bfloat16


def bfloat16(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), BF16)


def rounded(x: np.ndarray) -> np.ndarray:
    """To bfloat16, as float32."""
    return np.asarray(jnp.asarray(x, jnp.float32).astype(BF16), np.float32)


def rms(x: Any, eps: float) -> np.ndarray:
    wide = np.asarray(x, np.float32)
    return wide / np.sqrt(np.mean(wide * wide, axis=-1, keepdims=True) + np.float32(eps))


def almost_equal(actual: Any, expected: np.ndarray) -> None:
    """Equal in bfloat16, but for the few numbers that lie between two of its values."""
    actual = np.asarray(actual, np.float32)
    assert np.mean(actual != expected) < 2e-3, np.mean(actual != expected)


def test_gradients_of_copies_are_added_to_the_sum_so_far():
    def back(x, *gradients):
        return jax.vjp(lambda x: layers.fan_out(x, 3), x)[1](gradients)

    jaxpr = jax.make_jaxpr(back)(*map(bfloat16, range(4), (4,) * 4)).jaxpr
    _, a, b, c = jaxpr.invars
    first, second = (e for e in jaxpr.eqns if e.primitive.name.startswith("add"))
    assert first.invars == [b, a] and second.invars == [c, *first.outvars]


def test_norm_rounds_before_its_weight():
    """As the original's: x / rms(x) in float32, rounded, times the weight, rounded."""
    norm = layers.RMSNorm(64, 1e-3, BF16)
    norm.weight[...] = weight = 1 + 0.3 * bfloat16(1, 64)
    x = bfloat16(0, 40, 64)
    y = norm(x)
    assert y.dtype == BF16
    almost_equal(y, rounded(rounded(rms(x, 1e-3)) * np.asarray(weight, np.float32)))
    late = rounded(rms(x, 1e-3) * np.asarray(weight, np.float32))
    assert np.mean(np.asarray(y, np.float32) != late) > 0.05  # so the test does tell them apart


def test_zero_centered_norm_rounds_once():
    """Its stored weight is one less; everything in float32, and one rounding."""
    norm = layers.RMSNorm(64, 1e-3, BF16, zero_centered=True)
    assert not norm.weight[...].any()
    norm.weight[...] = weight = 0.3 * bfloat16(1, 64)
    x = bfloat16(0, 40, 64)
    y = norm(x)
    assert y.dtype == BF16
    wide = np.asarray(weight, np.float32)
    almost_equal(y, rounded(rms(x, 1e-3) * (1 + wide)))
    early = rounded(rounded(rms(x, 1e-3)) * (1 + wide))
    assert np.mean(np.asarray(y, np.float32) != early) > 0.05


def test_which_norms_are_zero_centered():
    """All of the backbone, and B and C of Mamba2; output norms of mixers are not."""
    config = tiny_config(tuple(KINDS), **OPTIONS, zero_centered_norm=True)
    modules: Any = nnx.iter_modules(nnx.eval_shape(lambda: HybridLM(config)))
    found = {".".join(map(str, path)): m for path, m in modules if hasattr(m, "eps")}
    centered = {path for path, m in found.items() if getattr(m, "zero_centered", False)}
    assert {path.rsplit(".", 1)[-1] for path in set(found) - centered} == {"o_norm", "norm"}
    names = {path.rsplit(".", 1)[-1] for path in centered}
    assert names == {
        "input_layernorm", "post_attention_layernorm", "norm", "q_norm", "k_norm", "q_norm_",
        "k_norm_", "B_norm", "C_norm",
    }  # fmt: skip
    assert "norm" in centered and "layers.4.mixer.norm" not in centered


@pytest.mark.parametrize("gated", [True, False])
def test_output_norm_rounds_once(gated):
    """Norm, weight, then SiLU of the gate, all in float32."""
    norm = OutputNorm(64, 1e-3, BF16)
    norm.weight[...] = weight = 1 + 0.3 * bfloat16(1, 64)
    x, gate = bfloat16(0, 1, 10, 4, 64), bfloat16(2, 1, 10, 4, 64)
    wide = np.asarray(gate, np.float32)
    y = rms(x, 1e-3) * np.asarray(weight, np.float32)
    y = y * wide / (1 + np.exp(-wide)) if gated else y
    found = norm(x, gate if gated else None)
    assert found.dtype == BF16
    almost_equal(found, rounded(y))


def test_group_norm_gates_first_and_rounds_once():
    norm = GatedGroupNorm(4 * 64, 1e-3, BF16)
    norm.weight[...] = weight = 1 + 0.3 * bfloat16(1, 4 * 64)
    x, gate = bfloat16(0, 1, 10, 4, 64), bfloat16(2, 1, 10, 4, 64)
    wide = np.asarray(gate, np.float32)
    mixed = np.asarray(x, np.float32) * wide / (1 + np.exp(-wide))
    found = norm(x, gate)
    assert found.dtype == BF16
    almost_equal(
        found,
        rounded(rms(jnp.asarray(mixed), 1e-3) * np.asarray(weight, np.float32).reshape(4, 64)),
    )


@pytest.mark.parametrize("under_root", [True, False])
def test_unit_vectors(under_root):
    """Short vectors tell where eps is added; zero ones stay zero, with a finite gradient."""
    x, eps = jnp.asarray([[3e-4, 4e-4], [0.0, 0.0], [30.0, 40.0]], BF16), 1e-3
    y = l2_normalize(x, eps, under_root=under_root)
    assert y.dtype == jnp.float32
    wide = np.asarray(x, np.float64)
    norm = np.linalg.norm(wide, axis=-1, keepdims=True)
    expected = wide / (np.sqrt(norm**2 + eps) if under_root else norm + eps)
    assert rel(y[0], expected[0]) < 1e-6 and rel(y[2], expected[2]) < 1e-6 and not y[1].any()
    gradient = jax.grad(lambda x: l2_normalize(x, eps, under_root=under_root).sum())
    assert np.isfinite(gradient(jnp.zeros((2, 2)))).all()


def test_log_decay():
    """In float32 whatever comes in; the step is softplus(x + dt_bias), the decay -exp(A_log)."""
    x, A_log, dt_bias = bfloat16(0, 1, 5, 3), jnp.asarray([-1.0, 0.5, 2]), jnp.asarray([0.2, -3, 1])
    step, decay = layers.log_decay(A_log, x, dt_bias)
    expected = np.log1p(np.exp(np.asarray(x, np.float64) + np.asarray(dt_bias)))
    assert step.dtype == decay.dtype == jnp.float32
    assert rel(step, expected) < 1e-6 and rel(decay, -np.exp(A_log) * expected) < 1e-6


# Rotary position embeddings


def angles(rope: dict[str, Any], D: int, limit: int, positions: np.ndarray) -> np.ndarray:
    """[T, R/2] angles, one frequency after the other, from the definitions (yarn: its paper)."""
    D = int(D * rope.get("partial_rotary_factor", 1))
    theta, kind, factor = rope["theta"], rope.get("rope_type", "default"), rope.get("factor", 1.0)
    context = rope.get("original_max_position_embeddings", limit)
    fast, slow = rope.get("beta_fast", 32.0), rope.get("beta_slow", 1.0)

    def where(turns: float) -> float:
        """The index at which a frequency makes so many turns over the original context."""
        return D * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = where(fast), where(slow)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, D - 1)
    columns = []
    for i in range(D // 2):
        frequency = theta ** (-2 * i / D)
        if kind == "linear":
            frequency /= factor
        if kind == "yarn":
            share = min(max((i - low) / max(high - low, 1e-3), 0.0), 1.0)
            frequency = frequency / factor * share + frequency * (1 - share)
        if kind == "llama3":
            wavelength, slow, fast = 2 * math.pi / frequency, rope["low_freq_factor"], 4.0
            if wavelength > context / slow:
                frequency /= factor
            elif wavelength > context / fast:
                share = (context / wavelength - slow) / (fast - slow)
                frequency *= (1 - share) / factor + share
        columns.append(positions * frequency)
    return np.stack(columns, axis=-1)


def temperature(factor: float, mscale: float = 1.0) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0


YARN: dict[str, Any] = dict(rope_type="yarn", theta=1e4, factor=4.0)
YARN |= dict(original_max_position_embeddings=256)
LLAMA3: dict[str, Any] = dict(rope_type="llama3", theta=1e4, factor=8.0, low_freq_factor=1.0)
LLAMA3 |= dict(high_freq_factor=4.0, original_max_position_embeddings=256)


@pytest.mark.parametrize(
    ("rope", "scale"),
    [
        (dict(theta=1e4), 1.0),
        (dict(theta=5e6), 1.0),
        (dict(rope_type="linear", theta=1e4, factor=3.0), 1.0),
        (YARN, temperature(4.0)),
        (YARN | dict(original_max_position_embeddings=64), temperature(4.0)),
        (YARN | dict(beta_fast=8.0, beta_slow=2.0), temperature(4.0)),
        (YARN | dict(truncate=False), temperature(4.0)),
        (YARN | dict(attention_factor=1.7), 1.7),
        (
            YARN | dict(mscale=0.7, mscale_all_dim=1.3),
            temperature(4.0, 0.7) / temperature(4.0, 1.3),
        ),
        (YARN | dict(mscale=0.7), temperature(4.0)),
        (YARN | dict(factor=1.0), 1.0),
        (dict(rope_type="yarn", theta=1e4, factor=4.0), temperature(4.0)),
        (YARN | dict(mscale=1.0, mscale_all_dim=1.0), 1.0),
        (YARN | dict(partial_rotary_factor=0.5), temperature(4.0)),
        (dict(theta=1e4, partial_rotary_factor=0.25), 1.0),
        (LLAMA3, 1.0),
        (LLAMA3 | dict(factor=32.0, low_freq_factor=2.0), 1.0),
        (LLAMA3 | dict(original_max_position_embeddings=8192), 1.0),
        (LLAMA3 | dict(partial_rotary_factor=0.5), 1.0),
    ],
)
def test_rotary_angles(rope, scale):
    config = dataclasses.replace(tiny_config(("*",), head_dim=32), rope=RopeConfig(**rope))
    positions = np.asarray([[0, 1, 2, 77, 511]])
    expected = angles(rope, 32, 512, positions[0])
    cos, sin = layers.rope_table(jnp.asarray(positions), config)
    assert cos.shape == sin.shape == (1, 5, 1, expected.shape[1])
    assert cos.dtype == sin.dtype == jnp.float32
    np.testing.assert_allclose(cos[0, :, 0], scale * np.cos(expected), atol=2e-4)
    np.testing.assert_allclose(sin[0, :, 0], scale * np.sin(expected), atol=2e-4)


def test_rotation_turns_the_halves_of_a_head_and_rounds_once():
    x = bfloat16(0, 1, 3, 2, 8)
    table = layers.rope_table(jnp.asarray([[3, 0, 40]]), tiny_config(("*",), head_dim=8))
    cos, sin = (np.asarray(a, np.float32) for a in table)
    a, b = np.split(np.asarray(x, np.float32), 2, axis=-1)
    expected = np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)
    y = layers.apply_rope(x, table)
    assert y.dtype == BF16
    np.testing.assert_array_equal(y, rounded(expected))


def test_a_part_of_each_head_is_rotated():
    """The first channels, by halves of their own; the others come out as they went in."""
    x = bfloat16(0, 1, 3, 2, 16)
    for share, R in ((0.5, 8), (0.26, 4)):
        config = tiny_config(("*",), rope=RopeConfig(partial_rotary_factor=share))
        table = layers.rope_table(jnp.asarray([[3, 0, 40]]), config)
        y = layers.apply_rope(x, table)
        np.testing.assert_array_equal(y[..., :R], layers.apply_rope(x[..., :R], table))
        np.testing.assert_array_equal(y[..., R:], x[..., R:])
        assert y.dtype == BF16 and (y[:, 0, :, :R] != x[:, 0, :, :R]).any()


def test_query_scale_steps_with_every_original_context():
    yarn = RopeConfig(rope_type="yarn", factor=4.0, original_max_position_embeddings=8)
    scaled, unscaled = (dataclasses.replace(yarn, llama_4_scaling_beta=b) for b in (0.1, 0.0))
    config = tiny_config(("*",), rope=scaled)
    scale = layers.query_scale(jnp.asarray([[0, 7, 8, 15, 16, 800, -3]]), config)
    assert scale is not None and scale.dtype == jnp.float32 and scale.shape == (1, 7, 1, 1)
    expected = 1 + 0.1 * np.log([1, 1, 2, 2, 3, 101, 1])
    np.testing.assert_allclose(scale[0, :, 0, 0], expected, rtol=1e-6)
    for rope in (RopeConfig(), yarn, unscaled):
        assert layers.query_scale(jnp.zeros((1, 2)), tiny_config(("*",), rope=rope)) is None


# Constants and fresh parameters

OPTIONS: dict[str, Any] = dict(
    rms_norm_eps=3e-3,
    gka=GKAConfig(norm_eps=4e-3, kv_proj_rank=4, kv_learnable_residual=True),
    gdn=GDNConfig(norm_eps=5e-3, kv_proj_rank=4, conv_bias=True),
    bmojo=BMojoConfig(4, False, "M2"),
)


def test_every_norm_has_its_own_eps():
    config = tiny_config(tuple(KINDS), **OPTIONS)
    model = jax.eval_shape(lambda: HybridLM(config))
    own = {"o_norm": None, "B_norm": 1e-6, "C_norm": 1e-6, "mixer.norm": 1e-5, "inner.norm": 1e-5}
    seen = set()
    for i, block in enumerate(model.layers):
        modules: Any = nnx.iter_modules(block)
        for path, module in modules:
            if hasattr(module, "eps"):
                name = ".".join(map(str, path))
                expected = next((eps for end, eps in own.items() if name.endswith(end)), 3e-3)
                kind = config.layer_kinds[i]
                expected = expected or {"GKA": 4e-3, "GDN": 5e-3}[kind]
                assert getattr(module, "eps") == expected, (kind, name)  # noqa: B009
                seen.add((kind, name))
    assert model.norm.eps == 3e-3 and len(seen) == 28


@pytest.fixture(scope="module")
def fresh() -> dict[str, np.ndarray]:
    config = tiny_config(("GKA", "GDN", "M2"), **OPTIONS, initializer_range=0.05)
    params = flat_params(HybridLM(config, dtype=jnp.float32))
    return {path: np.asarray(x, np.float64) for path, x in params.items()}


def test_fresh_matrices_have_the_standard_deviation_of_the_config(fresh):
    found = 0
    for path, x in fresh.items():
        if "linearB" in path:  # what it adds is learnt
            assert not x.any(), path
        elif path.endswith(("kernel", "embedding")) or "conv1d.weight" in path:
            sigma = 0.05 / math.sqrt(2 * x.size)
            assert abs(x.std() - 0.05) < 5 * sigma and abs(x.mean()) < 7 * sigma, path
            found += 1
    assert found > 40


def test_fresh_vectors(fresh):
    """Norms and skips are one, biases zero; learnt repetition begins as plain repetition."""
    for path, x in fresh.items():
        name = path.rsplit(".", 2)[-2]
        if path.endswith(".bias"):
            assert not x.any(), path
        elif path.endswith(".D") or ("norm" in name and path.endswith("weight")):
            assert (x == 1).all(), path
        elif path.endswith("_rep"):
            np.testing.assert_array_equal(x, np.repeat(np.eye(2), 2, axis=0))
    assert sum(path.endswith("_rep") for path in fresh) == 2


def test_fresh_decays():
    """A is uniform in (0, 16), the smallest step size log-uniform in [1e-3, 0.1]."""
    A_log, dt_bias = (p[...] for p in layers.decay_params(4000, nnx.Rngs(0)))
    assert A_log.dtype == dt_bias.dtype == jnp.float32
    A, dt = np.exp(A_log), np.log1p(np.exp(np.asarray(dt_bias, np.float64)))
    assert 1e-3 <= A.min() < 0.1 and 15.9 < A.max() <= 16 and abs(A.mean() - 8) < 0.4
    assert 0.999e-3 < dt.min() < 1.1e-3 and 0.099 < dt.max() < 0.1001
    assert abs(np.log10(dt).mean() + 2) < 0.05


def test_layers_of_one_model_start_differently(fresh):
    one, other = fresh["layers.0.mixer.A_log"], fresh["layers.1.mixer.A_log"]
    assert (one != other).all()


# symbol: name in checkpoints, kind of the same parameters, can be fused, has an entry per token,
# keys that a token of a row of 100 sees at most, name in layer_types.
FACTS = {
    "*": ("self_attn", None, True, True, 100, "full_attention"),
    "SWA": ("swa", "*", True, False, 5, "sliding_attention"),
    "GKA": ("gka", None, True, False, 0, None),
    "GDN": ("gdn", None, False, False, 0, "linear_attention"),
    "M2": ("mamba", None, True, False, 0, None),
    "BMF": ("bmojo_f", None, True, False, 8, None),
}


def test_facts_of_the_kinds():
    sections = tiny_config(tuple(KINDS)).sections
    assert FACTS == {
        symbol: (k.name, k.like, k.fuses, k.grows, k.sees(sections, 100), k.layer_type)
        for symbol, k in KINDS.items()
    }
    tied, untied = (tiny_config(("BMF",), bmojo=BMojoConfig(4, t, "M2")) for t in (True, False))
    for part, uses in (("k_proj", 2), ("v_proj", 2), ("q_proj", 1), ("o_proj", 1)):
        path = f"bmojo_attn.{part}.kernel"
        assert KINDS["BMF"].uses(tied.sections, path) == uses
        assert KINDS["BMF"].uses(untied.sections, path) == 1
    assert KINDS["BMF"].inner(tied.sections) == ("M2",)


def abstract(kind: str, **changes: Any) -> HybridLM:
    """A model of one layer without its arrays."""
    return jax.eval_shape(lambda: HybridLM(tiny_config((kind,), **changes), dtype=jnp.float32))


def tokens(T: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((1, T), jnp.int32)


def mix(model: HybridLM, tokens: jax.Array, state: Any, fresh: bool = True) -> Any:
    """What the mixer of the first layer makes of the embedded tokens."""
    state = None if state is None else dataclasses.replace(state, fresh=fresh)
    x, ctx = model.embed(tokens, state=state)
    return model.layers[0].mixer(x, ctx, None if state is None else state.layers[0])


def test_options_of_gated_kalmanet_reach_the_operator(monkeypatch):
    """Of a sequence and of a token; the gradient of lambda and the chunks have no other witness."""
    seen: list[dict[str, Any]] = []

    def spy(q, *args, **options):
        seen.append(options)
        states = (jnp.zeros((q.shape[0], 4, 16, 16)),) * 2
        return jnp.zeros((*q.shape[:-2], 4, 16)), states

    monkeypatch.setattr("hmf_jax.mixers.gka.gka", spy)
    monkeypatch.setattr("hmf_jax.mixers.gka.gka_step", spy)
    options: dict[str, Any] = dict(num_iter=7, ridge_strength=0.3, use_forgetting_gate_kk=False)
    config = GKAConfig(**options, bp_lambda=False, gla_rescale=False, chunk_size=16)
    model = abstract("GKA", gka=config)
    for T in (3, 1):
        jax.eval_shape(mix, model, tokens(T), model.abstract_state(1, 4))
    expected = {"num_iter": 7, "ridge": 0.3, "scale": 1.0, "decay_kk": False}
    (sequence, token) = seen
    for found in seen:
        assert {name: found[name] for name in expected} == expected
    assert sequence["bp_lambda"] is False and sequence["chunk_size"] == 16
    assert "bp_lambda" not in token


@pytest.mark.parametrize("kind", ["*", "SWA"])
def test_what_attention_is_asked_for(monkeypatch, kind):
    """A first prefill is plain causal attention, which more kernels know, not one over a cache."""
    seen: list[tuple[str, bool, bool]] = []

    def spy(name):
        def run(q, k, v, *args, **options):
            seen.append((name, "offset" in options, k.shape[1] == q.shape[1]))
            return jnp.zeros_like(q)

        return run

    for name in ("attention", "decode_attention"):
        monkeypatch.setattr(f"hmf_jax.mixers.attention.{name}", spy(name))
    model = abstract(kind)
    state = model.abstract_state(1, 32)
    for T, given, fresh in (
        (6, None, True),
        (6, state, True),
        (6, state, False),
        (1, state, False),
    ):
        jax.eval_shape(functools.partial(mix, fresh=fresh), model, tokens(T), given)
    own, continued = ("attention", False, True), ("attention", True, False)
    assert seen == [own, own, continued, ("decode_attention", False, False)]


def test_mixers_are_made_by_their_symbols():
    config = tiny_config(tuple(KINDS))
    for symbol in KINDS:
        made = jax.eval_shape(
            lambda symbol=symbol: make_mixer(
                symbol, config, config.sections, dtype=BF16, rngs=nnx.Rngs(0)
            )
        )
        names = {
            "*": "Attention", "SWA": "Attention", "GKA": "GatedKalmaNet", "GDN": "GatedDeltaNet",
            "M2": "Mamba2", "BMF": "BMojo",
        }  # fmt: skip
        assert type(made).__name__ == names[symbol]
        assert getattr(made, "window", None) == (5 if symbol == "SWA" else None)
