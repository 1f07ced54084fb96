"""The library against an independent float64 NumPy evaluator, on random checkpoints.

The recorded cases of the original have one family of geometries; here come others, with every
option of every layer kind. In float64 the library must agree to 1e-9, which proves its formulas;
in float32, loaded from disk, to 1e-4. Each case runs as one forward and as prefill, continuation
and decoding past every window, and all final states are compared.
"""

from __future__ import annotations

import copy
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
from safetensors.numpy import save_file

from hmf_jax.loading import from_pretrained
from hmf_jax.model import HybridLM
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
    rms_norm_eps=1e-5,
    max_position_embeddings=64,
    rope_parameters={"rope_type": "default", "rope_theta": 3e4},
    swa_config={"window_size": 5},
    bmojo_config={"window_size": 3, "ssm_mixer": "gka", "tie_attn_weights": True},
)
T = 21  # more than twice every short window, no multiple of any chunk

# Changes to BASE; a mixer dict replaces that of BASE, None removes a key.
CASES: dict[str, dict[str, Any]] = {
    "six": dict(
        hybrid_override_pattern=SIX,
        gka_config=dict(chunk_size=8),
    ),
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
        swa_config=dict(window_size=30),
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
        rope_parameters=dict(
            rope_type="yarn", rope_theta=1e4, factor=2.0, beta_fast=8, beta_slow=2
        ),
        max_position_embeddings=32,
        mamba2_config=dict(use_pos_emb=True, use_qk_norm=False),
        bmojo_config=dict(window_size=3, ssm_mixer="mamba2", tie_attn_weights=False),
    ),
    "m2 in bmf": dict(
        hybrid_override_pattern="BMF-*",
        attention_bias=True,
        rope_parameters=None,
        rope_scaling=dict(rope_type="linear", factor=1.5, rope_theta=2e3),
        bmojo_config=dict(window_size=5, ssm_mixer="Mamba2"),
    ),
    # Legacy names and keys, and the widest heads.
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
QUICK = ("six", "six other")
SLOW = [name for name in CASES if name not in QUICK]
ALL = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


# Random checkpoints


def config_for(case: str) -> dict[str, Any]:
    """config.json of one case."""
    config = copy.deepcopy(BASE) | copy.deepcopy(CASES[case])
    config["num_hidden_layers"] = len(config["hybrid_override_pattern"].split("-"))
    return {key: value for key, value in config.items() if value is not None}


def shapes_for(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Checkpoint name -> shape, as the original names its tensors."""
    d, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    E, D = config["num_attention_heads"], config["head_dim"]
    K = config.get("num_key_value_heads", E)
    nq, nk = E * D, K * D

    def attention(suffix: str = "") -> dict[str, tuple[int, ...]]:
        out: dict[str, tuple[int, ...]] = {f"{n}_norm{suffix}.weight": (D,) for n in "qk"}
        for name, rows in (("q", nq), ("k", nk), ("v", nk)):
            out[f"{name}_proj{suffix}.weight"] = rows, d
            if config.get("attention_bias"):
                out[f"{name}_proj{suffix}.bias"] = (rows,)
        return out

    def o_proj() -> dict[str, tuple[int, ...]]:
        bias: dict = {"o_proj.bias": (d,)} if config.get("attention_bias") else {}
        return {"o_proj.weight": (d, nq), **bias}

    def linear_attention(kind: str) -> dict[str, tuple[int, ...]]:
        c = config.get(f"{kind}_config", {})
        gka = kind == "gka"
        out: dict[str, tuple[int, ...]] = {
            "o_proj.weight": (d, nq),
            "A_log": (E,),
            "dt_bias": (E,),
            "o_norm.weight": (D,),
            "a_proj.weight" if gka else "gk_proj.weight": (E, d),
        }
        for name, rows in (("q", nq), ("k", nk), ("v", nk)):
            out[f"{name}_proj.weight"] = rows, d
            if c.get("use_short_conv", True) and (name != "v" or c.get("use_v_conv", True)):
                out[f"{name}_conv1d.weight"] = rows, 1, c.get("conv_size", 4)
                if c.get("conv_bias"):
                    out[f"{name}_conv1d.bias"] = (rows,)
        if c.get("use_gate", True):
            out["g_proj.weight"] = nq, d
        if c.get("use_beta_gate", True):
            out |= {"b_proj.weight": (E, d)} | ({"b_proj.bias": (E,)} if gka else {})
        if gka and c.get("use_alpha_connection", True):
            out |= {"alpha_proj.weight": (E, d), "alpha_proj.bias": (E,)}
        if (rank := c.get("kv_proj_rank")) and K != E:
            for name in "kv":
                out[f"proj_{name}.linearA.weight"] = rank, nk
                out[f"proj_{name}.linearB.weight"] = nq, rank
                if c.get("kv_learnable_residual"):
                    out[f"{name}_rep"] = E, K
        return out

    def mamba() -> dict[str, tuple[int, ...]]:
        channels = nq + 2 * nk
        out: dict[str, tuple[int, ...]] = {
            "in_proj.weight": (2 * nq + 2 * nk + E, d),
            "conv1d.weight": (channels, 1, 4),
            "conv1d.bias": (channels,),
            "norm.weight": (nq,),
            "out_proj.weight": (d, nq),
            **{name: (E,) for name in ("dt_bias", "A_log", "D")},
        }
        if config.get("mamba2_config", {}).get("use_qk_norm", True):
            out |= {"B_norm.weight": (D,), "C_norm.weight": (D,)}
        return out

    def mixer(name: str) -> dict[str, tuple[int, ...]]:
        return mamba() if name == "mamba" else linear_attention(name)

    def under(prefix: str, some: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
        return {f"{prefix}.{name}": shape for name, shape in some.items()}

    out = {"model.embed_tokens.weight": (V, d), "model.norm.weight": (d,)}
    if not config.get("tie_word_embeddings"):
        out["lm_head.weight"] = V, d
    for i, kind in enumerate(config["hybrid_override_pattern"].split("-")):
        layer: dict[str, tuple[int, ...]] = {
            "input_layernorm.weight": (d,),
            "post_attention_layernorm.weight": (d,),
            "mlp.gate_proj.weight": (F, d),
            "mlp.up_proj.weight": (F, d),
            "mlp.down_proj.weight": (d, F),
        }
        if kind in ("*", "SWA"):
            name = "self_attn" if kind == "*" else config.get("swa_name", "swa")
            layer |= under(name, attention() | o_proj())
        elif kind == "BMF":
            bmojo = oracle.BMOJO_DEFAULTS | config["bmojo_config"]
            inner = oracle.INNER[bmojo["ssm_mixer"].lower()]
            streams = attention() | ({} if bmojo["tie_attn_weights"] else attention("_"))
            layer |= under("bmojo_f.bmojo_attn", streams | o_proj())
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
        x = x / math.sqrt(shape[1])
    if name == "model.embed_tokens.weight":
        x[0] = 0  # token 0: no keys at all until another token comes
    return x.astype(np.float32)


class Checkpoint:
    """A random Hugging Face directory, and what it holds."""

    def __init__(self, case: str, directory: Path):
        self.config, self.directory = config_for(case), directory
        self.tensors = {n: random_tensor(n, s) for n, s in shapes_for(self.config).items()}
        (directory / "config.json").write_text(json.dumps(self.config))
        save_file(self.tensors, directory / "model.safetensors", metadata={"format": "pt"})

    def model(self, dtype) -> HybridLM:
        """Loaded in float32; for float64, every parameter (also the scalars) is then widened."""
        with jax.enable_x64(False):
            model = from_pretrained(self.directory, dtype=jnp.float32, progress=False)
        if dtype == jnp.float32:
            return model
        held = {path: p.get_value() for path, p in nnx.to_flat_state(nnx.state(model))}
        graph, state = nnx.split(nnx.eval_shape(lambda: HybridLM(model.config, dtype=dtype)))
        wide = [
            (path, p.replace(held[path].astype(jnp.float64))) for path, p in nnx.to_flat_state(state)
        ]
        return nnx.merge(graph, nnx.from_flat_state(wide))

    def run(self, tokens, **kwargs) -> oracle.Run:
        return oracle.evaluate(self.config, self.tensors, tokens, **kwargs)

    def tokens(self, rows: int = 2, length: int = T) -> np.ndarray:
        """Random ids; the first row starts with tokens of zero embedding."""
        seed = zlib.crc32(self.config["hybrid_override_pattern"].encode())
        ids = np.random.default_rng(seed).integers(1, self.config["vocab_size"], (rows, length))
        ids[0, : min(2, length - 1)] = 0
        return ids


@pytest.fixture
def exact_rope(monkeypatch):
    """The library's rotary tables are float32 by definition; for float64 tests, give it exact ones."""

    def table(positions, config):
        data = config.to_dict()
        shape = *positions.shape, 1, config.head_dim // 2
        flat = np.asarray(positions, np.float64).reshape(-1)
        tables = oracle.rope_tables(data, config.head_dim, flat)
        return tuple(jnp.asarray(a[:, : shape[-1]].reshape(shape)) for a in tables)

    monkeypatch.setattr("hmf_jax.model.rope_table", table)


# Comparing


class Errors(dict[str, float]):
    """Largest relative error per kind of tensor."""

    def add(self, name: str, actual, wanted) -> None:
        error = rel(actual, wanted) if np.any(wanted) else float(np.abs(np.asarray(actual)).max())
        self[name] = max(self.get(name, 0.0), error if math.isfinite(error) else math.inf)

    def check(self, tolerance: float) -> None:
        assert self
        bad = {name: f"{error:.1e}" for name, error in self.items() if not error <= tolerance}
        assert not bad, f"beyond {tolerance:.0e}: {bad}"


def compare_state(errors: Errors, i: int, state: Any, row: int, wanted: dict[str, Any]) -> None:
    """One layer's state after all tokens of a row against the oracle's."""
    get = {f: np.asarray(getattr(state, f)[row]) for f in ("k", "v") if hasattr(state, f)}
    if "fading_keys" in wanted:
        W, length = state.k_pending.shape[1], len(wanted["keys"])
        for key, ring, pending in (("k", "keys", state.k_pending), ("v", "values", state.v_pending)):
            recent = np.arange(max(length - W, 0), length)
            errors.add(f"{i}.{ring}", get[key][recent % W], wanted[ring][recent])
            fading = wanted[f"fading_{ring}"]
            errors.add(f"{i}.pending {ring}", pending[row][recent % W], fading[recent])
            ripe = np.arange(max(length - 2 * W, 0), max(length - W, 0))
            if len(ripe):
                errors.add(f"{i}.fading {ring}", get[key][W + ripe % W], fading[ripe])
        state = state.inner
    elif "keys" in wanted:
        length = len(wanted["keys"])
        recent = np.arange(max(length - get["k"].shape[0], 0), length)
        for key, name in (("k", "keys"), ("v", "values")):
            errors.add(f"{i}.{name}", get[key][recent % len(get[key])], wanted[name][recent])
        return
    fields = {"recurrent": "s", "ssm": "s", "log_aprods": "log_decay"}
    for name, value in wanted.items():
        if name == "conv":
            parts = [state.conv_x, state.conv_B, state.conv_C]
            actual = np.concatenate([np.asarray(p[row]) for p in parts], axis=-1)
        elif "keys" in name or "values" in name:
            continue
        else:
            actual = getattr(state, fields.get(name, name))[row]
        if np.size(value):  # a convolution with one tap has no history
            errors.add(f"{i}.{name}", actual, value)


def compare(model: HybridLM, checkpoint: Checkpoint, tokens: np.ndarray, **kwargs) -> Errors:
    """One forward, then prefill, a continuation and single steps, against the oracle."""
    errors = Errors()
    wanted = [checkpoint.run(row, **kwargs) for row in tokens]
    logits, _, seen = model.trace(jnp.asarray(tokens), **kwargs)
    for b, run in enumerate(wanted):
        errors.add("logits", logits[b], run.logits)
        for i, (mixed, out) in enumerate(seen):
            errors.add(f"{i}.mixer_out", mixed[b], run.mixer_out[i])
            errors.add(f"{i}.layer_out", out[b], run.layer_out[i])

    length = tokens.shape[1]
    state = model.init_state(len(tokens), length)
    first, second = (1, 1) if length == 1 else (length // 3, length // 3 + 4)
    cuts = [0, first, *range(second, length + 1)]
    pieces = []
    for start, stop in zip(cuts, cuts[1:], strict=False):
        if stop > start:
            out, state = model(jnp.asarray(tokens[:, start:stop]), state=state, **kwargs)
            pieces.append(np.asarray(out))
    for b, run in enumerate(wanted):
        errors.add("logits in pieces", np.concatenate(pieces, axis=1)[b], run.logits)
        for i, layer in enumerate(state.layers):
            compare_state(errors, i, layer, b, run.states[i])
    return errors


@pytest.mark.parametrize("case", ALL)
def test_formulas(case: str, tmp_path: Path, exact_rope):
    checkpoint = Checkpoint(case, tmp_path)
    with jax.enable_x64(True):
        model = checkpoint.model(jnp.float64)
        compare(model, checkpoint, checkpoint.tokens()).check(1e-9)
