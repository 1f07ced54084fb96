"""The library against an independent float64 NumPy evaluator, on random checkpoints.

The recorded cases of the original have one family of geometries; here come others, with every
option of every layer kind. In float64 the library must agree to 1e-9, which proves its formulas;
in float32, loaded from disk, to 1e-4. Each case runs as one forward and as prefill, continuation
and decoding past every window, and all final states are compared.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from hmf_jax import table
from hmf_jax.config import HybridConfig
from hmf_jax.loading import from_pretrained
from hmf_jax.mixers import AttentionState, BMojoState, WindowState
from hmf_jax.model import HybridLM
from hmf_jax.parameters import with_params
from hmf_jax.state import ModelState
from tests.goldens import cases, expected, golden
from tests.parity import oracle
from tests.util import rel

SIX = "GKA-*-BMF-GDN-SWA-M2"
BASE: dict[str, Any] = dict(
    model_type="hybrid_qwen3",
    vocab_size=67,
    hidden_size=40,  # not heads x head_dim
    intermediate_size=56,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    rms_norm_eps=3e-5,  # that of no norm which has its own
    max_position_embeddings=64,
    rope_parameters={"rope_type": "default", "rope_theta": 3e4},
    swa_config={"window_size": 5},
    bmojo_config={"window_size": 3, "ssm_mixer": "gka", "tie_attn_weights": True},
)
T = 70  # beyond every short window twice and one chunk of 64, and a multiple of no chunk

# Changes to BASE, key by key; None removes a key.
CASES: dict[str, dict[str, Any]] = {
    "six": dict(hybrid_override_pattern=SIX),
    # One kv head, low rank with learnt residuals, biases, windows of one token, legacy yarn keys.
    "six other": dict(
        hybrid_override_pattern="SWA-GDN-M2-BMF-*-GKA",
        num_key_value_heads=1,
        tie_word_embeddings=True,
        attention_bias=True,
        rope_parameters=None,
        rope_theta=5e3,
        rope_scaling=dict(type="yarn", factor=4.0, original_max_position_embeddings=16),
        gka_config=dict(
            kv_proj_rank=5,
            kv_learnable_residual=True,
            conv_size=3,
            chunk_size=16,
            num_iter=3,
            ridge_strength=0.07,
            use_forgetting_gate_kk=False,
            norm_eps=1e-3,
        ),
        gka_overrides=dict(num_iter=7),
        gdn_config=dict(
            kv_proj_rank=3,
            kv_learnable_residual=True,
            conv_size=5,
            conv_bias=True,
            allow_neg_eigval=True,
            norm_eps=1e-3,
        ),
        mamba2_config=dict(use_pos_emb=True),
        swa_config=dict(window_size=1),
        bmojo_config=dict(window_size=1, ssm_mixer="Gated_KalmaNet", tie_attn_weights=False),
    ),
    # As many kv heads as heads: a rank has nothing to expand. Windows longer than the sequence.
    "equal heads": dict(
        hybrid_override_pattern="BMF-SWA-GKA-GDN",
        num_key_value_heads=None,
        num_attention_heads=2,
        head_dim=64,
        hidden_size=128,
        rope_parameters=dict(rope_type="linear", rope_theta=1e4, factor=3.0),
        gka_config=dict(kv_proj_rank=5, use_forgetting_gate=False),
        gdn_config=dict(kv_proj_rank=5, use_short_conv=False),
        mamba2_config=dict(use_qk_norm=False),
        swa_config=dict(window_size=90),
        bmojo_config={},
    ),
    "plain gka": dict(
        hybrid_override_pattern="GKA-GKA",
        gka_config=dict(
            use_alpha_connection=False, use_v_conv=False, use_gate=False, gla_rescale=False
        ),
    ),
    "gka without decay": dict(
        hybrid_override_pattern="GKA-BMF",
        gka_config=dict(
            use_forgetting_gate=False,
            use_beta_gate=False,
            kv_proj_rank=2,
            conv_size=1,
            chunk_size=4,
            num_iter=1,
        ),
        bmojo_config=dict(window_size=2, ssm_mixer="parallel_latent_sketch"),
    ),
    "gka without a solver": dict(
        hybrid_override_pattern="GKA-SWA",
        gka_config=dict(num_iter=0, conv_size=2, kv_proj_rank=9, use_beta_gate=False),
        swa_config=dict(window_size=7),
    ),
    "plain gdn": dict(
        hybrid_override_pattern="GDN-BMF",
        gdn_config=dict(use_gate=False, use_short_conv=False, kv_proj_rank=4),
        bmojo_config=dict(window_size=5, ssm_mixer="gated_deltanet", tie_attn_weights=False),
    ),
    "gdn in bmf": dict(
        hybrid_override_pattern="BMF-GDN",
        num_key_value_heads=4,
        gdn_config=dict(conv_bias=True, use_gate=False, conv_size=2),
        bmojo_config=dict(window_size=4, ssm_mixer="gdn"),
    ),
    "m2": dict(
        hybrid_override_pattern="M2-BMF",
        num_key_value_heads=1,
        max_position_embeddings=32,
        rope_parameters=dict(
            rope_type="yarn", rope_theta=1e4, factor=2.0, beta_fast=8, beta_slow=2
        ),
        mamba2_config=dict(use_pos_emb=True, use_qk_norm=False),
        bmojo_config=dict(window_size=3, ssm_mixer="mamba2", tie_attn_weights=False),
    ),
    # Both kinds of RoPE keys: the legacy ones replace the others.
    "m2 in bmf": dict(
        hybrid_override_pattern="BMF-*",
        attention_bias=True,
        rope_theta=2e3,
        rope_scaling=dict(rope_type="linear", factor=1.5),
        bmojo_config=dict(window_size=5, ssm_mixer="Mamba2"),
    ),
    # Tensors of an SWA layer under the name of the attention it was made from; the widest heads.
    "legacy": dict(
        hybrid_override_pattern="SWA-GKA-M2",
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=128,
        rope_parameters=None,
        rope_theta=777.0,
        tie_word_embeddings=True,
        swa_config=dict(window_size=9),
        swa_name="self_attn",
    ),
}
EXPERTS = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, norm_topk_prob=True)
NEXT = EXPERTS | dict(
    model_type="qwen3_next_hmf",
    shared_expert_intermediate_size=20,
    partial_rotary_factor=0.25,
    linear_num_key_heads=2,
    linear_num_value_heads=6,
    linear_key_head_dim=16,
    linear_value_head_dim=16,
    linear_conv_kernel_dim=3,
)
YARN = dict(rope_type="yarn", rope_theta=1e4, factor=4.0, original_max_position_embeddings=16)
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
# Other base families, with what their recorded cases do not have.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": dict(
        model_type="hybrid_llama",
        hybrid_override_pattern="*-M2-SWA-BMF",
        num_attention_heads=6,
        head_dim=16,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        rope_parameters=LLAMA3,
        mamba2_config=dict(use_pos_emb=True),
        bmojo_config=dict(window_size=5, ssm_mixer="mamba2", tie_attn_weights=False),
    ),
    "llama without head_dim": dict(
        model_type="hybrid_llama",
        hybrid_override_pattern="GDN-*-GKA",
        num_attention_heads=5,
        num_key_value_heads=None,
        head_dim=None,
        gka_config=dict(kv_proj_rank=3),
    ),
    "qwen2": dict(
        model_type="hybrid_qwen2",
        hybrid_override_pattern="GDN-SWA-BMF-*",
        num_attention_heads=7,
        num_key_value_heads=1,
        hidden_size=56,
        head_dim=None,
        rope_parameters=YARN,
        gdn_config=dict(kv_proj_rank=3),
        bmojo_config=dict(window_size=3, ssm_mixer="gdn", tie_attn_weights=False),
    ),
    "ministral3": dict(
        model_type="hybrid_ministral3",
        hybrid_override_pattern="SWA-BMF-*-M2",
        tie_word_embeddings=True,
        rope_parameters=YARN | dict(mscale=1.0, mscale_all_dim=0.5, llama_4_scaling_beta=0.3),
        bmojo_config=dict(window_size=3, ssm_mixer="gdn", tie_attn_weights=False),
    ),
    "qwen3_moe": dict(
        EXPERTS,
        model_type="hybrid_qwen3_moe",
        hybrid_override_pattern="BMF-M2-GKA-*",
        num_attention_heads=10,
        head_dim=8,
        norm_topk_prob=False,
        decoder_sparse_step=2,
        num_experts_per_tok=3,
        attention_bias=True,
        stacked=True,
    ),
    "qwen3_moe, one expert each": dict(
        EXPERTS,
        model_type="hybrid_qwen3_moe",
        hybrid_override_pattern="*-SWA-GDN",
        num_experts_per_tok=1,
        mlp_only_layers=[1],
    ),
    "qwen3_next": dict(
        NEXT,
        hybrid_override_pattern="*-GKA-BMF-GDN",
        mlp_only_layers=[1],
        attention_bias=True,
        gka_config=dict(kv_proj_rank=3, kv_learnable_residual=True),
        gdn_config=dict(kv_proj_rank=2, conv_size=2),
        bmojo_config=dict(window_size=3, ssm_mixer="gdn", tie_attn_weights=False),
    ),
    "qwen3_next, all that it lacks": dict(
        NEXT,
        hybrid_override_pattern="M2-SWA-BMF",
        norm_topk_prob=False,
        mamba2_config=dict(use_pos_emb=True),
        bmojo_config=dict(window_size=3, ssm_mixer="mamba2", tie_attn_weights=True),
    ),
    "qwen3_5_moe": dict(
        NEXT,
        model_type="qwen3_5_moe_hmf_text",
        hybrid_override_pattern="*-GDN-GKA",
        intermediate_size=None,
        norm_topk_prob=None,
        tie_word_embeddings=True,
        partial_rotary_factor=None,
        rope_parameters=dict(
            rope_theta=1e4, rope_type="default", partial_rotary_factor=0.5,
            mrope_section=[4, 2, 2], mrope_interleaved=True,
        ),
        linear_num_key_heads=1,
        linear_num_value_heads=5,
        stacked=True,
    ),
    "qwen3_5_moe, heads of attention": dict(
        {key: value for key, value in NEXT.items() if not key.startswith("linear")},
        model_type="qwen3_5_moe_hmf_text",
        hybrid_override_pattern="GKA-*",
        intermediate_size=None,
        norm_topk_prob=None,
    ),
}  # fmt: skip
SLOW = pytest.mark.slow
SIXES = ("six", "six other")


def random_case(seed: int) -> dict[str, Any]:
    """Two layers with any geometry and any options."""
    rng = np.random.default_rng(seed)

    def pick(*values):
        return values[rng.integers(len(values))]

    heads, kv_heads = pick((4, 4), (4, 2), (4, 1), (6, 3), (1, 1), (5, 1))
    inner = pick("gka", "gdn", "mamba2")
    rank = dict(kv_proj_rank=pick(None, 1, 6), kv_learnable_residual=pick(True, False))
    flags = ("use_alpha_connection", "use_v_conv", "use_forgetting_gate", "use_forgetting_gate_kk")
    flags += ("gla_rescale", "use_gate", "use_beta_gate", "bp_lambda")
    yarn = dict(
        rope_type="yarn",
        factor=pick(1.0, 2.5, 32),
        original_max_position_embeddings=pick(16, 48),
        attention_factor=pick(None, 1.2),
    )
    return dict(
        hybrid_override_pattern=f"{pick('GKA', 'GDN', 'M2', 'BMF')}-{pick('*', 'SWA', 'BMF')}",
        vocab_size=pick(33, 50),
        hidden_size=pick(24, 64, 72),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=pick(16, 32, 64),
        rms_norm_eps=pick(1e-6, 1e-2),
        tie_word_embeddings=pick(True, False),
        attention_bias=pick(True, False),
        rope_parameters=pick(None, dict(rope_type="linear", rope_theta=1e3, factor=7.0), yarn),
        gka_config=dict(
            **{flag: pick(True, True, False) for flag in flags},
            **rank,
            num_iter=pick(0, 1, 5, 30),
            conv_size=pick(1, 2, 4, 6),
            chunk_size=pick(1, 16, 64, 128),
            ridge_strength=pick(0.005, 0.02, 1.0),
        ),
        gdn_config=dict(
            **rank,
            use_gate=pick(True, False),
            use_short_conv=pick(True, True, False),
            allow_neg_eigval=pick(True, False),
            conv_bias=pick(True, False),
            conv_size=pick(1, 2, 4, 6),
        ),
        mamba2_config=dict(use_qk_norm=pick(True, False), use_pos_emb=pick(True, False)),
        swa_config=dict(window_size=pick(1, 2, 6, 33, T, T + 1)),
        bmojo_config=dict(
            window_size=pick(1, 2, 7, 34, 35, T),
            ssm_mixer=inner,
            tie_attn_weights=pick(True, False),
        ),
    )


# Random checkpoints

Shapes = dict[str, tuple[int, ...]]


def config_for(changes: dict[str, Any]) -> dict[str, Any]:
    """config.json of one case."""
    config = BASE | changes
    config["num_hidden_layers"] = len(config["hybrid_override_pattern"].split("-"))
    return {key: value for key, value in config.items() if value is not None}


def shapes_for(config: dict[str, Any]) -> Shapes:
    """Checkpoint name -> shape, as the original names its tensors."""
    d, F, V = config["hidden_size"], config.get("intermediate_size", 0), config["vocab_size"]
    E = config["num_attention_heads"]
    D = config.get("head_dim", d // E)
    K = config.get("num_key_value_heads", E)
    nq, nk = E * D, K * D
    family = config["model_type"].removeprefix("hybrid_")
    gated, normed = config["model_type"] in oracle.NEXT, "qwen3" in family
    # Heads of queries and keys, of values, and their size, in GKA and GDN.
    kv = config.get("linear_num_key_heads", K), config.get("linear_num_value_heads", K)
    linear = (config.get("linear_num_key_heads", E), *kv, config.get("linear_key_head_dim", D))

    def attention(suffix: str = "", *, within: bool = False) -> Shapes:
        """`within` B'MOJO-F."""
        out: Shapes = {f"{n}_norm{suffix}.weight": (D,) for n in "qk"} if normed else {}
        bias = family == "qwen2" or within and family == "ministral3"
        for name, rows in (("q", nq), ("k", nk), ("v", nk)):
            rows = 2 * rows if name == "q" and gated and not within else rows
            out[f"{name}_proj{suffix}.weight"] = rows, d
            if bias or config.get("attention_bias"):
                out[f"{name}_proj{suffix}.bias"] = (rows,)
        return out

    def o_proj() -> Shapes:
        biased = config.get("attention_bias") and family != "qwen2"
        bias: dict = {"o_proj.bias": (d,)} if biased else {}
        return {"o_proj.weight": (d, nq), **bias}

    def linear_attention(kind: str) -> Shapes:
        c = config.get(f"{kind}_config", {})
        gka = kind == "gka"
        Hq, Hk, Hv, D = linear
        E = max(Hq, Hv)
        nq, nk, nv, all_heads = Hq * D, Hk * D, Hv * D, E * D
        out: Shapes = {
            "o_proj.weight": (d, all_heads),
            "A_log": (E,),
            "dt_bias": (E,),
            "o_norm.weight": (D,),
            "a_proj.weight" if gka else "gk_proj.weight": (E, d),
        }
        taps = c.get("conv_size", config.get("linear_conv_kernel_dim", 4))
        for name, rows in (("q", nq), ("k", nk), ("v", nv)):
            out[f"{name}_proj.weight"] = rows, d
            if c.get("use_short_conv", True) and (name != "v" or c.get("use_v_conv", True)):
                out[f"{name}_conv1d.weight"] = rows, 1, taps
                if c.get("conv_bias"):
                    out[f"{name}_conv1d.bias"] = (rows,)
        if c.get("use_gate", True):
            out["g_proj.weight"] = all_heads, d
        if c.get("use_beta_gate", True):
            out |= {"b_proj.weight": (E, d)} | ({"b_proj.bias": (E,)} if gka else {})
        if gka and c.get("use_alpha_connection", True):
            out |= {"alpha_proj.weight": (E, d), "alpha_proj.bias": (E,)}
        if (rank := c.get("kv_proj_rank")) and min(Hk, Hv) != E:
            for name, held in (("k", Hk), ("v", Hv)):
                out[f"proj_{name}.linearA.weight"] = rank, held * D
                out[f"proj_{name}.linearB.weight"] = all_heads, rank
                if c.get("kv_learnable_residual"):
                    out[f"{name}_rep"] = E, held
        return out

    def mamba() -> Shapes:
        channels = nq + 2 * nk
        out: Shapes = {
            "in_proj.weight": (2 * nq + 2 * nk + E, d),
            "conv1d.weight": (channels, 1, 4),
            "conv1d.bias": (channels,),
            "norm.weight": (nq,),
            "out_proj.weight": (d, nq),
            **{name: (E,) for name in ("dt_bias", "A_log", "D")},
        }
        if normed and config.get("mamba2_config", {}).get("use_qk_norm", True):
            out |= {"B_norm.weight": (D,), "C_norm.weight": (D,)}
        return out

    def mixer(name: str) -> Shapes:
        return mamba() if name == "mamba" else linear_attention(name)

    def under(prefix: str, some: Shapes) -> Shapes:
        return {f"{prefix}.{name}": shape for name, shape in some.items()}

    def swiglu(name: str, width: int) -> Shapes:
        parts = {"gate_proj": (width, d), "up_proj": (width, d), "down_proj": (d, width)}
        out: Shapes = {f"{name}.{part}.weight": shape for part, shape in parts.items()}
        if config.get("mlp_bias"):
            out |= {f"{name}.{part}.bias": shape[:1] for part, shape in parts.items()}
        return out

    def mlp(layer: int) -> Shapes:
        count, step = config.get("num_experts", 0), config.get("decoder_sparse_step", 1)
        if not count or layer in config.get("mlp_only_layers", ()) or (layer + 1) % step:
            return swiglu("mlp", F)
        width = config["moe_intermediate_size"]
        out: Shapes = {"mlp.gate.weight": (count, d)}
        if config.get("stacked"):
            out["mlp.experts.gate_up_proj"] = count, 2 * width, d
            out["mlp.experts.down_proj"] = count, d, width
        for e in range(0 if config.get("stacked") else count):
            out |= swiglu(f"mlp.experts.{e}", width)
        if shared := config.get("shared_expert_intermediate_size"):
            out |= swiglu("mlp.shared_expert", shared) | {"mlp.shared_expert_gate.weight": (1, d)}
        return out

    out = {"model.embed_tokens.weight": (V, d), "model.norm.weight": (d,)}
    if not config.get("tie_word_embeddings"):
        out["lm_head.weight"] = V, d
    for i, kind in enumerate(config["hybrid_override_pattern"].split("-")):
        layer: Shapes = {
            "input_layernorm.weight": (d,),
            "post_attention_layernorm.weight": (d,),
            **mlp(i),
        }
        if kind in ("*", "SWA"):
            name = "self_attn" if kind == "*" else config.get("swa_name", "swa")
            layer |= under(name, attention() | o_proj())
        elif kind == "BMF":
            c = config["bmojo_config"]
            inner = oracle.INNER[c.get("ssm_mixer", "mamba2").lower()]
            windows = attention(within=True)
            if not c.get("tie_attn_weights", True):
                windows |= attention("_", within=True)
            layer |= under("bmojo_f.bmojo_attn", windows | o_proj())
            layer |= under(f"bmojo_f.{inner}", mixer(inner))
        else:
            name = {"GKA": "gka", "GDN": "gdn", "M2": "mamba"}[kind]
            layer |= under(name, mixer(name))
        out |= under(f"model.layers.{i}", layer)
    return out


def random_tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Float32 values of a size that keeps every part of a layer at work and rounding small."""
    x = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape)
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "A_log":
        x = 0.2 + 0.6 * x
    elif leaf == "dt_bias":
        x = x - 2.5
    elif leaf.endswith("_rep"):
        x = np.repeat(np.eye(shape[1]), shape[0] // shape[1], axis=0) + 0.3 * x
    elif leaf == "bias":
        x = 0.3 * x
    elif len(shape) == 1:
        x = np.clip(1 + 0.3 * x, 0.3, 2)
    elif "conv1d" in name:
        x = 0.5 * x
    elif "embed_tokens" not in name:
        x = x / math.sqrt(shape[-1])
    if name == "model.embed_tokens.weight":
        x[0] = 0  # token 0: no keys at all until another token comes
    return x.astype(np.float32)


class Checkpoint:
    """A random Hugging Face directory, and what it holds."""

    def __init__(self, changes: dict[str, Any], directory: Path):
        self.config, self.directory = config_for(changes), directory
        self.tensors = {n: random_tensor(n, s) for n, s in shapes_for(self.config).items()}
        written = {k: v for k, v in self.config.items() if k not in ("stacked", "swa_name")}
        (directory / "config.json").write_text(json.dumps(written))
        save_file(self.tensors, directory / "model.safetensors", metadata={"format": "pt"})

    def model(self, **kwargs) -> HybridLM:
        return from_pretrained(self.directory, dtype=jnp.float32, progress=False, **kwargs)

    def wide_model(self) -> HybridLM:
        """The loaded model in float64, including the scalars that are float32 in any model."""
        with jax.enable_x64(False):
            model = self.model()
        held = {path: p.get_value() for path, p in nnx.to_flat_state(nnx.state(model))}
        wide = nnx.eval_shape(lambda: HybridLM(model.config, dtype=jnp.float64))
        graph, state = nnx.split(wide)
        flat = nnx.to_flat_state(state)
        params = [(path, p.replace(held[path].astype(jnp.float64))) for path, p in flat]
        return nnx.merge(graph, nnx.from_flat_state(params))

    def run(self, tokens, **kwargs) -> oracle.Run:
        return oracle.evaluate(self.config, self.tensors, tokens, **kwargs)

    def tokens(self, rows: int = 2, length: int = T) -> np.ndarray:
        """Random ids; the first row starts with tokens of zero embedding."""
        ids = np.random.default_rng(7).integers(1, self.config["vocab_size"], (rows, length))
        ids[0, :2] = 0
        return ids


@pytest.fixture
def float64(monkeypatch):
    """Float64 arithmetic, also of the rotary tables, which are float32 in any model."""

    def table(positions, config):
        shape = *positions.shape, 1, config.rotary_dim // 2
        flat = np.asarray(positions, np.float64).reshape(-1)
        tables = oracle.rope_tables(config.to_dict(), config.head_dim, flat)
        return tuple(jnp.asarray(a[:, : shape[-1]].reshape(shape)) for a in tables)

    def scale(positions, config):
        flat = np.asarray(positions, np.float64)
        return jnp.asarray(oracle.query_scale(config.to_dict(), flat.ravel()).reshape(flat.shape))[
            ..., None, None
        ]

    monkeypatch.setattr("hmf_jax.model.rope_table", table)
    monkeypatch.setattr("hmf_jax.model.query_scale", scale)
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True)
def precise():
    """Devices with low-precision matrix units must not use them here."""
    with jax.default_matmul_precision("highest"):
        yield


# Comparing


class Errors(dict[str, float]):
    """Largest relative error per kind of tensor."""

    def add(self, name: str, actual: Any, wanted: np.ndarray) -> None:
        actual = np.asarray(actual, np.float64)
        error = rel(actual, wanted) if wanted.any() else float(np.abs(actual).max(initial=0.0))
        self[name] = max(self.get(name, 0.0), error if math.isfinite(error) else math.inf)

    def check(self, tolerance: float) -> None:
        assert self
        bad = {name: f"{error:.1e}" for name, error in self.items() if not error <= tolerance}
        assert not bad, f"beyond {tolerance:.0e}: {bad}"


def held(state: Any, row: int, seen: int) -> dict[str, tuple[np.ndarray, slice | None]]:
    """What one row of a layer's state holds, under the oracle's names.

    With each array comes the range of tokens it stands for, or None if it is no list of tokens.
    """
    arrays = {name: x for name, x in vars(state).items() if isinstance(x, jax.Array)}
    get: dict[str, np.ndarray] = {name: np.asarray(x[row]) for name, x in arrays.items()}
    out: dict[str, tuple[np.ndarray, slice | None]] = {}

    def ring(name: str, slots: np.ndarray, newest: int) -> None:
        """Token i is in slot i mod W; the newest token is newest - 1."""
        tokens = np.arange(max(newest - len(slots), 0), max(newest, 0))
        out[name] = (
            slots[tokens % len(slots)],
            slice(tokens[0], newest) if len(tokens) else slice(0),
        )

    if isinstance(state, BMojoState):
        W = state.k_pending.shape[1]
        for x, name in (("k", "keys"), ("v", "values")):
            ring(name, get[x][:W], seen)
            ring(f"fading_{name}", get[x][W:], seen - W)
            ring(f"fading_{name} (pending)", get[f"{x}_pending"], seen)
        return out | held(state.inner, row, seen)
    if isinstance(state, AttentionState | WindowState):
        ring("keys", get["k"], seen)
        ring("values", get["v"], seen)
        return out
    names = {"log_decay": "log_aprods", "s": "ssm" if "log_decay" in get else "recurrent"}
    if "conv_x" in get:
        parts = [get.pop(f"conv_{x}") for x in "xBC"]
        get["conv"] = np.concatenate(parts, axis=-1)
    return {names.get(name, name): (x, None) for name, x in get.items()}


def compare(
    model: HybridLM,
    checkpoint: Checkpoint,
    tokens: np.ndarray,
    *,
    num_iter: Any = None,
    cuts: tuple[int, ...] = (5, 63),
    whole: bool = True,
    **kwargs,
) -> Errors:
    """One forward, then a prefill, a continuation and single steps, against the oracle.

    Without `whole` no forward: the prefill shows the layers.
    """
    B, length = tokens.shape
    per_row = np.broadcast_to(np.asarray(num_iter), B)
    wanted = [checkpoint.run(row, num_iter=n) for row, n in zip(tokens, per_row, strict=True)]
    kwargs["num_iter"] = num_iter
    errors = Errors()
    state = model.init_state(B, length)
    ends = [end for end in cuts if end < length]
    seen = length if whole else ends[0]
    first = None if whole else state
    logits, after, layers = model.trace(jnp.asarray(tokens[:, :seen]), state=first, **kwargs)
    for b, run in enumerate(wanted):
        errors.add("logits", logits[b], run.logits[:seen])
        for i, (mixer_out, layer_out) in enumerate(layers):
            errors.add(f"{i}.mixer_out", mixer_out[b], run.mixer_out[i][:seen])
            errors.add(f"{i}.layer_out", layer_out[b], run.layer_out[i][:seen])

    ends += range(ends[-1] + 1 if ends else 1, length + 1)
    pieces, start = [], 0
    if not whole:
        state, pieces, start = after, [np.asarray(logits)], ends.pop(0)
    for end in ends:
        out, state = model(jnp.asarray(tokens[:, start:end]), state=state, **kwargs)
        pieces.append(np.asarray(out))
        start = end
    for b, run in enumerate(wanted):
        errors.add("logits in pieces", np.concatenate(pieces, axis=1)[b], run.logits)
        compare_states(errors, state, b, length, run)
    return errors


def compare_states(
    errors: Errors, state: ModelState | None, row: int, seen: int, run: oracle.Run
) -> None:
    assert state is not None and int(state.length[row]) == seen
    for i, layer in enumerate(state.layers):
        found = held(layer, row, seen)
        assert {name.split(" ")[0] for name in found} == set(run.states[i])
        for name, (array, tokens) in found.items():
            value = run.states[i][name.split(" ")[0]]
            errors.add(f"{i}.{name}", array, value if tokens is None else value[tokens])


def slow_unless(quick: tuple[str, ...], names) -> list:
    """Parameters of a test; each model compiles programs of its own, so most are slow."""
    return [
        n if n in quick or not isinstance(n, str) else pytest.param(n, marks=SLOW) for n in names
    ]


# Tests

RECORDED = ("attn_hd64_bias", "bmf_gka_untied", "gdn_opts", "m2_rope")


@pytest.mark.parametrize(
    "case", slow_unless(RECORDED, cases("model") + cases("model", families=True))
)
def test_the_oracle_agrees_with_the_original(case: str):
    """The recordings are float32 runs, so this is how far apart they may be."""
    directory = golden(case)
    info = json.loads((directory / "case.json").read_text())
    config = json.loads((directory / "config.json").read_text())
    tensors, recorded = load_file(directory / "model.safetensors"), expected(directory)
    row, L, at = info["layer_row"], info["L"], recorded["positions"]
    errors = Errors()
    whole = oracle.evaluate(config, tensors, recorded["input_ids"][row])
    errors.add("logits_tail", whole.logits[L - 1 :], recorded["logits_tail"][row])
    prefill = oracle.evaluate(config, tensors, recorded["input_ids"][row, :L])
    if row in info["rows"]:
        logits = recorded["logits"][info["rows"].index(row)]
        errors.add("logits", prefill.logits[at], logits)
    for name, value in recorded.items():
        if name.startswith("layers.") and "router" not in name:
            _, i, field = name.split(".")
            errors.add(name, getattr(prefill, field)[int(i)][at], value)
        elif name.startswith("state."):
            _, i, field = name.split(".")
            state = prefill.states[int(i)]
            if field.startswith("conv"):
                errors.add(name, state[field].T, value[:, 1:])
            elif field.endswith("_last4"):
                tokens = state[f"{field.removesuffix('_last4')}s"][-4:]
                errors.add(name, tokens.swapaxes(0, 1), value)
            else:
                errors.add(name, state[field][: len(value)], value)
    errors.check(1e-5)


@pytest.mark.parametrize(
    ("case", "cuts"),
    [("six other", (66,)), *(pytest.param(case, (5, 63), marks=SLOW) for case in CASES)],
)
def test_formulas(case: str, cuts: tuple[int, ...], tmp_path: Path, float64):
    """Each kind of piece (forward, prefill, continuation, step) compiles every layer: quickly, a
    prefill and steps only. That forwards are like prefills is a law (tests/test_laws.py)."""
    checkpoint, whole = Checkpoint(CASES[case], tmp_path), len(cuts) > 1
    errors = compare(
        checkpoint.wide_model(), checkpoint, checkpoint.tokens(), cuts=cuts, whole=whole
    )
    errors.check(1e-11)


@SLOW
@pytest.mark.parametrize("case", FAMILIES)
def test_families(case: str, tmp_path: Path, float64):
    checkpoint = Checkpoint(FAMILIES[case], tmp_path)
    compare(checkpoint.wide_model(), checkpoint, checkpoint.tokens(length=40)).check(1e-11)


# Options that "six other" does not have; those of one line do not hide each other.
OPTIONS: dict[str, dict[str, Any]] = {
    "gka": CASES["plain gka"],
    "gka without gates": dict(
        gka_config=dict(use_forgetting_gate=False, use_beta_gate=False, kv_proj_rank=2, num_iter=2)
    ),
    "gka of equal heads": dict(num_key_value_heads=4, gka_config=dict(kv_proj_rank=5, num_iter=0)),
    "gdn": dict(gdn_config=dict(use_gate=False, use_short_conv=False, kv_proj_rank=4)),
    "gdn as it is": {},
    "mamba": dict(mamba2_config=dict(use_qk_norm=False)),
    "mamba as it is": {},
}
SYMBOLS = {"gka": "GKA", "gdn": "GDN", "mamba": "M2"}


def test_options_of_mixers(float64):
    """The recurrent mixers alone, all in one program: a model of each would take minutes."""
    tokens, x = np.arange(6)[None], np.random.default_rng(0).standard_normal((1, 6, 40))
    mixers, wanted, ctx = [], [], None
    for case, changes in OPTIONS.items():
        name = case.split(" ")[0]
        config = config_for(
            changes | {"hybrid_override_pattern": SYMBOLS[name], "rms_norm_eps": 0.1}
        )
        tensors = {n: random_tensor(n, shape) for n, shape in shapes_for(config).items()}
        ours = HybridConfig.from_dict(config)
        params = {}
        for entry in table.entries(ours):
            rows = tensors[entry.name][entry.start : entry.start + entry.shape[0]]
            rows = np.asarray(rows.squeeze(1) if entry.layout == "conv" else rows, np.float64)
            params[entry.path] = jnp.asarray(rows.T if entry.transposed else rows)
        abstract = nnx.eval_shape(lambda ours=ours: HybridLM(ours, dtype=jnp.float64))
        model = with_params(abstract, params)
        ctx = model.embed(jnp.asarray(tokens), impl="reference")[1]
        mixers.append(model.layers[0].mixer)
        weights = oracle.Weights(tensors, f"model.layers.0.{name}.")
        geometry = oracle.Geometry(config, tokens[0])
        wanted.append(oracle.linear_mixer(name, geometry, weights, x[0], None)[0])
    found = jax.jit(lambda mixers, x: [mixer(x, ctx)[0] for mixer in mixers])(mixers, x)
    for case, ours, oracles in zip(OPTIONS, found, wanted, strict=True):
        assert rel(ours[0], oracles) < 1e-11, case


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_float32(case: str, tmp_path: Path):
    checkpoint = Checkpoint(CASES[case], tmp_path)
    compare(checkpoint.model(), checkpoint, checkpoint.tokens()).check(1e-4)


@SLOW
@pytest.mark.parametrize("seed", range(8))
def test_random_options(seed: int, tmp_path: Path, float64):
    checkpoint = Checkpoint(random_case(seed), tmp_path)
    compare(checkpoint.wide_model(), checkpoint, checkpoint.tokens()).check(1e-11)


@SLOW
@pytest.mark.parametrize("case", SIXES)
def test_num_iter_at_run_time(case: str, tmp_path: Path, float64):
    checkpoint = Checkpoint(CASES[case], tmp_path)
    model, tokens = checkpoint.wide_model(), checkpoint.tokens(rows=4, length=66)
    compare(model, checkpoint, tokens, num_iter=jnp.array([0, 1, 5, 60])).check(1e-11)
    compare(model, checkpoint, tokens[:1], num_iter=2).check(1e-11)


@SLOW
def test_num_iter_when_loading(tmp_path: Path):
    checkpoint = Checkpoint(CASES["plain gka"], tmp_path)
    logits, _ = checkpoint.model(num_iter=2)(jnp.asarray(checkpoint.tokens()[1:]))
    assert rel(logits[0], checkpoint.run(checkpoint.tokens()[1], num_iter=2).logits) < 1e-4
    assert rel(logits[0], checkpoint.run(checkpoint.tokens()[1], num_iter=3).logits) > 1e-3


@SLOW
@pytest.mark.parametrize("case", SIXES)
@pytest.mark.parametrize(("length", "cuts"), [(1, ()), (65, (64,)), (140, (3, 130))])
def test_lengths(case: str, length: int, cuts: tuple[int, ...], tmp_path: Path, float64):
    checkpoint = Checkpoint(CASES[case], tmp_path)
    tokens = checkpoint.tokens(length=length)
    compare(checkpoint.wide_model(), checkpoint, tokens, cuts=cuts).check(1e-11)


@SLOW
@pytest.mark.parametrize("case", SIXES)
def test_reference_operators(case: str, tmp_path: Path, float64):
    checkpoint = Checkpoint(CASES[case], tmp_path)
    tokens = checkpoint.tokens()
    compare(checkpoint.wide_model(), checkpoint, tokens, impl="reference").check(1e-11)


@SLOW
@pytest.mark.parametrize("case", SIXES)
def test_padding_packing_and_positions(case: str, tmp_path: Path, float64):
    """Rows with pads on the left, in between and on the right, and packed documents."""
    checkpoint = Checkpoint(CASES[case], tmp_path)
    model, tokens = checkpoint.wide_model(), checkpoint.tokens(rows=3, length=24)
    segments = np.ones(tokens.shape, int)
    segments[0, :7] = segments[0, 10:12] = segments[0, 20:] = 0
    segments[1, :9], segments[1, 9:10], segments[1, 10:20], segments[1, 20:] = 4, 2, 9, 0
    positions = np.random.default_rng(0).integers(0, 50, tokens.shape)
    for given in (None, positions):
        at = None if given is None else jnp.asarray(given)
        logits, _ = model(jnp.asarray(tokens), positions=at, segment_ids=jnp.asarray(segments))
        errors = Errors()
        for b in range(3):
            for document in set(segments[b]) - {0}:
                own = segments[b] == document
                at = None if given is None else given[b, own]
                run = checkpoint.run(tokens[b, own], positions=at)
                errors.add(f"logits of row {b}", logits[b, own], run.logits)
        errors.check(1e-11)

    # With a state: a padded prefill, a padded continuation (row 2 pauses), one padded step.
    masks = segments[:, :14] > 0, segments[:, 14:23] > 0, segments[:, 23:] > 0
    masks[1][2] = False
    state, start, seen = model.init_state(3, 24), 0, [[] for _ in tokens]
    for mask in masks:
        ids = tokens[:, start : start + mask.shape[1]]
        logits, state = model(jnp.asarray(ids), segment_ids=jnp.asarray(mask), state=state)
        for b in range(3):
            seen[b] += list(zip(ids[b, mask[b]], np.asarray(logits[b])[mask[b]], strict=True))
        start += mask.shape[1]
    errors = Errors()
    for b in range(3):
        run = checkpoint.run(np.array([token for token, _ in seen[b]]))
        errors.add("logits in pieces", np.array([row for _, row in seen[b]]), run.logits)
        compare_states(errors, state, b, len(seen[b]), run)
    errors.check(1e-11)
