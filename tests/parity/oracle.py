"""A second opinion: all base families in float64 NumPy, from the published equations alone.

Nothing here is shared with the library: recurrences run token by token, attention is dense, the
checkpoint is read under its original names, and what a layer has (norms, biases, gates, experts)
follows from its tensors. One row of tokens at a time, no padding. Letters: T tokens, d hidden, E
query heads ("expanded" heads of a linear mixer), K key-value heads, D head dim.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

Array = np.ndarray
Config = Mapping[str, Any]

# Inner mixers of B'MOJO-F by their name in config.json: module name in the checkpoint.
INNER = {
    "mamba2": "mamba",
    "gdn": "gdn",
    "gated_deltanet": "gdn",
    "gka": "gka",
    "gated_kalmanet": "gka",
    "parallel_latent_sketch": "gka",
}


# Families whose attention has an output gate and whose norms store their weight minus one.
NEXT = ("qwen3_next_hmf", "qwen3_5_moe_hmf_text")


@dataclass(frozen=True)
class Run:
    """logits [T, V]; per layer: mixer_out [T, d] before the residual add, layer_out [T, d], states.

    States after the last token. Attention: keys, values [T, K, D] of all tokens, keys after RoPE
    (B'MOJO-F also fading_keys, fading_values). GKA: h_kk, h_kv [E, D, D]. GDN: recurrent [E, D, D]
    (key, value). Mamba-2: ssm [E, D, D] (x, B), log_aprods [E]. Convolutions: conv_* [taps - 1, C],
    newest last.
    """

    logits: Array
    mixer_out: list[Array]
    layer_out: list[Array]
    states: list[dict[str, Array]]


class Weights:
    """Tensors below one prefix, in float64."""

    def __init__(self, tensors: Mapping[str, Array], prefix: str = ""):
        self.tensors, self.prefix = tensors, prefix

    def __getitem__(self, name: str) -> Array:
        return np.asarray(self.tensors[self.prefix + name], np.float64)

    def __contains__(self, name: str) -> bool:
        return self.prefix + name in self.tensors

    def under(self, prefix: str) -> Weights:
        return Weights(self.tensors, self.prefix + prefix)

    def linear(self, name: str, x: Array) -> Array:
        y = x @ self[f"{name}.weight"].T
        return y + self[f"{name}.bias"] if f"{name}.bias" in self else y


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def silu(x: Array) -> Array:
    return x * sigmoid(x)


def softplus(x: Array) -> Array:
    return np.where(x > 20, x, np.log1p(np.exp(np.minimum(x, 20))))


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return weight * x / np.sqrt((x * x).mean(-1, keepdims=True) + eps)


def heads(x: Array, D: int) -> Array:
    return x.reshape(len(x), -1, D)


def outer(x: Array, y: Array) -> Array:
    """x [E, D], y [E, D] -> [E, D, D]."""
    return x[:, :, None] * y[:, None, :]


def repeat(x: Array, E: int) -> Array:
    """Head e of the result is head floor(e / (E / K)) of x [T, K, D]."""
    return np.stack([x[:, e * x.shape[1] // E] for e in range(E)], axis=1)


# Rotary embedding


def rope_tables(config: Config, D: int, positions: Array) -> tuple[Array, Array]:
    """cos, sin [T, R], R = the part of D that is rotated, in rope_parameters or at the top.

    Legacy rope_scaling, where present, replaces rope_parameters.
    """
    scaling = config.get("rope_scaling")
    rope = dict(scaling or config.get("rope_parameters") or {})
    theta = rope.get("rope_theta") or config.get("rope_theta") or 10000.0
    kind = rope.get("rope_type") or rope.get("type") or "default"
    partial = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1
    D = int(D * partial)
    i = np.arange(D // 2)
    inverse = float(theta) ** (-2.0 * i / D)
    scale = 1.0
    if kind == "linear":
        inverse = inverse / rope["factor"]
    elif kind == "yarn":
        factor = rope["factor"]
        original = rope.get("original_max_position_embeddings") or config["max_position_embeddings"]

        # The (fractional) index of the frequency that makes n turns over the original context.
        def index(n: float) -> float:
            return D * math.log(original / (2 * math.pi * n)) / (2 * math.log(theta))

        low = max(math.floor(index(rope.get("beta_fast") or 32)), 0)
        high = min(math.ceil(index(rope.get("beta_slow") or 1)), D - 1)
        slow = np.clip((i - low) / max(high - low, 1e-3), 0, 1)
        inverse = inverse * ((1 - slow) + slow / factor)
        over, under = rope.get("mscale"), rope.get("mscale_all_dim")

        def magnitude(m: float) -> float:
            return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0

        scale = magnitude(over) / magnitude(under) if over and under else magnitude(1)
        scale = rope.get("attention_factor") or scale
    elif kind == "llama3":
        factor, original = rope["factor"], rope["original_max_position_embeddings"]
        low, high = rope["low_freq_factor"], rope["high_freq_factor"]
        turns = original * inverse / (2 * math.pi)  # over the original context
        fast = np.clip((turns - low) / (high - low), 0, 1)
        inverse = inverse * (fast + (1 - fast) / factor)
    else:
        assert kind == "default", kind
    angle = positions[:, None] * np.concatenate([inverse, inverse])
    return np.cos(angle) * scale, np.sin(angle) * scale


def rotate(x: Array, rope: tuple[Array, Array]) -> Array:
    """The first channels of each head, as many as the tables have."""
    cos, sin = rope
    x, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    first, second = np.split(x, 2, axis=-1)
    turned = np.concatenate([-second, first], axis=-1)
    return np.concatenate([x * cos[:, None] + turned * sin[:, None], rest], axis=-1)


def query_scale(config: Config, positions: Array) -> Array:
    """[T]: what attention multiplies its rotated queries by."""
    rope = config.get("rope_parameters") or {}
    if "llama_4_scaling_beta" not in rope:
        return np.ones(len(positions))
    contexts = positions // rope["original_max_position_embeddings"]
    return 1 + rope["llama_4_scaling_beta"] * np.log(1 + contexts)


# Attention


def softmax_over(key_sets: list[tuple[Array, Array, Array, Array]]) -> Array:
    """One softmax over all of (q [T,E,D], k [T,K,D], v [T,K,D], visible [T,T]) -> [T, E*D]."""
    T, E, D = key_sets[0][0].shape
    out = np.zeros((T, E, D))
    for e in range(E):
        scores, values = [], []
        for q, k, v, visible in key_sets:
            head = e * k.shape[1] // E
            s = q[:, e] @ k[:, head].T / math.sqrt(D)
            scores.append(np.where(visible, s, -np.inf))
            values.append(v[:, head])
        s = np.concatenate(scores, axis=1)
        p = np.exp(s - s.max(1, keepdims=True))
        out[:, e] = p @ np.concatenate(values) / p.sum(1, keepdims=True)
    return out.reshape(T, E * D)


def attention(g: Geometry, w: Weights, h: Array, window: int | None) -> tuple[Array, dict]:
    q, k, v = g.qkv(w, h, h)
    age = np.arange(g.T)[:, None] - np.arange(g.T)
    visible = (age >= 0) & (age < (window or g.T + 1))
    o = softmax_over([(q * query_scale(g.config, g.positions)[:, None, None], k, v, visible)])
    if g.gated:  # q_proj has, per head, the rows of the query and then those of its gate
        o = o * sigmoid(heads(w.linear("q_proj", h), 2 * g.D)[..., g.D :].reshape(g.T, -1))
    return w.linear("o_proj", o), dict(keys=k, values=v)


def bmojo(g: Geometry, w: Weights, h: Array, num_iter: int | None) -> tuple[Array, dict]:
    """In-context window of W tokens and a window of W inner-mixer outputs before it."""
    c = g.config.get("bmojo_config") or {}
    inner = INNER[c.get("ssm_mixer", "mamba2").lower()]
    fading, state = linear_mixer(inner, g, w.under(f"{inner}."), h, num_iter)
    a, W = w.under("bmojo_attn."), c.get("window_size", 2048)
    q, k, v = g.qkv(a, h, h)
    q_, k_, v_ = g.qkv(a, h, fading, suffix="" if c.get("tie_attn_weights", True) else "_")
    age = np.arange(g.T)[:, None] - np.arange(g.T)
    recent, older = (age >= 0) & (age < W), (age >= W) & (age < 2 * W)
    o = softmax_over([(q, k, v, recent), (q_, k_, v_, older)])
    state |= dict(keys=k, values=v, fading_keys=k_, fading_values=v_)
    return a.linear("o_proj", o), state


# Recurrent mixers


def short_conv(w: Weights, name: str, x: Array) -> tuple[Array, Array]:
    """Depthwise causal convolution and SiLU of x [T, C]; also the last taps - 1 inputs."""
    taps = w[f"{name}.weight"][:, 0]
    n = taps.shape[1]
    padded = np.concatenate([np.zeros((n - 1, x.shape[1])), x])
    bias = w[f"{name}.bias"] if f"{name}.bias" in w else 0.0
    y = np.stack([(taps.T * padded[t : t + n]).sum(0) + bias for t in range(len(x))])
    return silu(y), padded[len(x) :]


def expand(g: Geometry, c: Config, w: Weights, which: str, flat: Array) -> Array:
    """Keys or values [T, K*D] to all heads [T, E, D]; both by a low rank if one needs it."""
    x = heads(flat, g.D)
    if not c.get("kv_proj_rank") or all(len(w[f"{n}_proj.weight"]) == g.E * g.D for n in "kv"):
        return repeat(x, g.E)
    low = silu(w.linear(f"proj_{which}.linearA", flat))
    y = heads(w.linear(f"proj_{which}.linearB", low), g.D)
    if c.get("kv_learnable_residual"):
        return y + np.einsum("ek,tkd->ted", w[f"{which}_rep"], x)
    return y + repeat(x, g.E)


def log_decay(w: Weights, name: str, h: Array) -> Array:
    return -np.exp(w["A_log"]) * softplus(w.linear(name, h) + w["dt_bias"])


def gated_norm(g: Geometry, c: Config, w: Weights, h: Array, o: Array, eps: float) -> Array:
    """Normalise, then gate, then o_proj. o [T, E, D]; eps where the config has none."""
    eps = g.eps if "linear_num_key_heads" in g.config else eps
    o = rms_norm(o, w["o_norm.weight"], c.get("norm_eps", eps))
    if c.get("use_gate", True):
        o = o * silu(heads(w.linear("g_proj", h), g.D))
    return w.linear("o_proj", o.reshape(g.T, -1))


def chebyshev(H: Array, q: Array, ridge: float, n: int) -> Array:
    """n steps towards (H + ridge |H|_F I)^-1 q per head; zero where H is. H [E, D, D], q [E, D]."""
    f = np.sqrt((H * H).sum((1, 2)))[:, None]
    some = np.where(f > 0, f, 1.0)
    lam = ridge * some
    s = 2 / (2 * lam + some)
    c = (0.5 * some / (2 * lam + some)) ** 2
    previous, x, omega = np.zeros_like(q), s * q, 2 * np.ones_like(f)
    for _ in range(n):
        omega = 1 / (1 - c * omega)
        residual = np.einsum("eij,ej->ei", H, x) + lam * x - q
        previous, x = x, omega * x - (s * omega * residual + (omega - 1) * previous)
    return np.where(f > 0, x, 0.0)


def gka(g: Geometry, w: Weights, h: Array, num_iter: int | None) -> tuple[Array, dict]:
    """Gated KalmaNet."""
    g = g.linear()
    c = dict(g.config.get("gka_config") or {}) | dict(g.config.get("gka_overrides") or {})
    n = c.get("num_iter", 30) if num_iter is None else num_iter
    q, conv_q = short_conv(w, "q_conv1d", w.linear("q_proj", h))
    k, conv_k = short_conv(w, "k_conv1d", w.linear("k_proj", h))
    v = w.linear("v_proj", h)
    state = dict(conv_q=conv_q, conv_k=conv_k)
    if c.get("use_v_conv", True):
        v, state["conv_v"] = short_conv(w, "v_conv1d", v)
    q = repeat(heads(q, g.D), g.E)
    k, v = expand(g, c, w, "k", k), expand(g, c, w, "v", v)
    q = q / (np.linalg.norm(q, axis=-1, keepdims=True) + 1e-6)
    k = k / (np.linalg.norm(k, axis=-1, keepdims=True) + 1e-6)
    if c.get("use_beta_gate", True):
        beta = sigmoid(w.linear("b_proj", h))[:, :, None]
        k, v = (beta + 1e-6) * k, (beta + 1e-6) * v
    alpha = np.ones((g.T, g.E))
    if c.get("use_alpha_connection", True):
        alpha = sigmoid(w.linear("alpha_proj", h))
    decay = kk_decay = np.ones((g.T, g.E))
    if c.get("use_forgetting_gate", True):
        decay = np.exp(log_decay(w, "a_proj", h))
        kk_decay = decay if c.get("use_forgetting_gate_kk", True) else kk_decay
    scale = g.D**-0.5 if c.get("gla_rescale", True) else 1.0
    H, U, o = np.zeros((g.E, g.D, g.D)), np.zeros((g.E, g.D, g.D)), np.zeros((g.T, g.E, g.D))
    for t in range(g.T):
        H = kk_decay[t, :, None, None] * H + outer(k[t], k[t])
        U = decay[t, :, None, None] * U + outer(k[t], v[t])
        read = q[t]
        if n > 0:
            x = chebyshev(H, q[t], c.get("ridge_strength", 0.02), n)
            read = q[t] + alpha[t, :, None] * (x - q[t])
        o[t] = scale * np.einsum("eij,ei->ej", U, read)
    return gated_norm(g, c, w, h, o, 1e-6), state | dict(h_kk=H, h_kv=U)


def gdn(g: Geometry, w: Weights, h: Array) -> tuple[Array, dict]:
    """Gated DeltaNet."""
    g = g.linear()
    c = g.config.get("gdn_config") or {}
    state, qkv = {}, []
    for name in "qkv":
        x = w.linear(f"{name}_proj", h)
        if c.get("use_short_conv", True):
            x, state[f"conv_{name}"] = short_conv(w, f"{name}_conv1d", x)
        else:
            x = silu(x)
        qkv.append(x)
    q = repeat(heads(qkv[0], g.D), g.E)
    k, v = expand(g, c, w, "k", qkv[1]), expand(g, c, w, "v", qkv[2])
    q = q / np.sqrt((q * q).sum(-1, keepdims=True) + 1e-6)
    k = k / np.sqrt((k * k).sum(-1, keepdims=True) + 1e-6)
    beta = sigmoid(w.linear("b_proj", h)) * (2 if c.get("allow_neg_eigval") else 1)
    decay = np.exp(log_decay(w, "gk_proj", h))
    S, o = np.zeros((g.E, g.D, g.D)), np.zeros((g.T, g.E, g.D))
    for t in range(g.T):
        S = decay[t, :, None, None] * S
        delta = beta[t, :, None] * (v[t] - np.einsum("eij,ei->ej", S, k[t]))
        S = S + outer(k[t], delta)
        o[t] = np.einsum("eij,ei->ej", S, q[t]) * g.D**-0.5
    return gated_norm(g, c, w, h, o, 1e-5), state | dict(recurrent=S)


def mamba2(g: Geometry, w: Weights, h: Array) -> tuple[Array, dict]:
    """Mamba-2 with the geometry of attention: x = V, B = K, C = Q."""
    c = g.config.get("mamba2_config") or {}
    nq, nk = g.E * g.D, g.K * g.D
    z, x, B, C, dt = np.split(w.linear("in_proj", h), np.cumsum([nq, nk, nk, nq]), axis=1)
    B, C = heads(B, g.D), heads(C, g.D)
    if "B_norm.weight" in w:
        B, C = g.norm(B, w["B_norm.weight"], 1e-6), g.norm(C, w["C_norm.weight"], 1e-6)
    if c.get("use_pos_emb"):
        B, C = rotate(B, g.rope), rotate(C, g.rope)
    flat = np.concatenate([x, B.reshape(g.T, nk), C.reshape(g.T, nq)], axis=1)
    flat, conv = short_conv(w, "conv1d", flat)
    x, B, C = (heads(part, g.D) for part in np.split(flat, [nk, 2 * nk], axis=1))
    x, B = repeat(x, g.E), repeat(B, g.E)
    dt = softplus(dt + w["dt_bias"])
    A = -np.exp(w["A_log"])
    S, y = np.zeros((g.E, g.D, g.D)), np.zeros((g.T, g.E, g.D))
    for t in range(g.T):
        S = np.exp(dt[t] * A)[:, None, None] * S + outer(dt[t, :, None] * x[t], B[t])
        y[t] = np.einsum("epn,en->ep", S, C[t]) + w["D"][:, None] * x[t]
    u = y * silu(heads(z, g.D))
    u = rms_norm(u, w["norm.weight"].reshape(g.E, g.D), 1e-5)
    state = dict(conv=conv, ssm=S, log_aprods=(dt * A).sum(0))
    return w.linear("out_proj", u.reshape(g.T, nq)), state


def linear_mixer(
    name: str, g: Geometry, w: Weights, h: Array, num_iter: int | None
) -> tuple[Array, dict]:
    if name == "gka":
        return gka(g, w, h, num_iter)
    return gdn(g, w, h) if name == "gdn" else mamba2(g, w, h)


# The model


class Geometry:
    """Sizes of the attention, rotary tables and what both attention kinds share."""

    def __init__(self, config: Config, positions: Array):
        self.config, self.T, self.positions = config, len(positions), positions
        self.E = config["num_attention_heads"]
        self.K = config.get("num_key_value_heads") or self.E
        qwen3 = config["model_type"] == "hybrid_qwen3"
        self.D = config.get("head_dim") or (128 if qwen3 else config["hidden_size"] // self.E)
        self.eps = config.get("rms_norm_eps", 1e-6)
        self.rope = rope_tables(config, self.D, positions)
        self.gated = config["model_type"] in NEXT

    def linear(self) -> Geometry:
        """That of GKA and GDN: as many heads as there are of values."""
        found = copy.copy(self)
        if "linear_num_value_heads" in self.config:
            found.E = self.config["linear_num_value_heads"]
            found.D = self.config["linear_key_head_dim"]
        return found

    def norm(self, x: Array, weight: Array, eps: float | None = None) -> Array:
        """A norm of the backbone, whose weights some families store around zero."""
        around = 1 if self.config["model_type"] in NEXT else 0
        return rms_norm(x, around + weight, eps or self.eps)

    def qkv(self, w: Weights, h: Array, kv: Array, suffix: str = "") -> tuple[Array, Array, Array]:
        """Queries of h, keys and values of kv: per-head norm on q and k, then RoPE."""
        q = w.linear(f"q_proj{suffix}", h).reshape(self.T, self.E, -1)[..., : self.D]
        k = heads(w.linear(f"k_proj{suffix}", kv), self.D)
        v = heads(w.linear(f"v_proj{suffix}", kv), self.D)
        if f"q_norm{suffix}.weight" in w:
            q = self.norm(q, w[f"q_norm{suffix}.weight"])
            k = self.norm(k, w[f"k_norm{suffix}.weight"])
        return rotate(q, self.rope), rotate(k, self.rope), v


def swiglu(w: Weights, h: Array, prefix: str = "") -> Array:
    gate, up = w.linear(f"{prefix}gate_proj", h), w.linear(f"{prefix}up_proj", h)
    return w.linear(f"{prefix}down_proj", silu(gate) * up)


def experts(config: Config, w: Weights, h: Array) -> Array:
    """Each token through its experts, one token at a time."""
    logits = w.linear("gate", h)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p = p / p.sum(-1, keepdims=True)
    out = np.zeros_like(h)
    for t, x in enumerate(h):
        chosen = np.argsort(-p[t], kind="stable")[: config["num_experts_per_tok"]]
        total = p[t, chosen].sum() if config.get("norm_topk_prob", True) else 1
        for e in chosen:
            if "experts.gate_up_proj" in w:
                gate, up = np.split(w["experts.gate_up_proj"][e] @ x, 2)
                y = w["experts.down_proj"][e] @ (silu(gate) * up)
            else:
                y = swiglu(w, x, f"experts.{e}.")
            out[t] += p[t, e] / total * y
    if "shared_expert_gate.weight" in w:
        out += sigmoid(w.linear("shared_expert_gate", h)) * swiglu(w, h, "shared_expert.")
    return out


def evaluate(
    config: Config,
    tensors: Mapping[str, Array],
    tokens: Array,
    *,
    num_iter: int | None = None,
    positions: Array | None = None,
) -> Run:
    """Run one row of tokens [T] through the checkpoint `tensors` described by config.json."""
    tokens = np.asarray(tokens)
    g = Geometry(config, np.arange(len(tokens)) if positions is None else np.asarray(positions))
    w = Weights(tensors)
    x = w["model.embed_tokens.weight"][tokens]
    mixer_out, layer_out, states = [], [], []
    for i, kind in enumerate(config["hybrid_override_pattern"].split("-")):
        layer = w.under(f"model.layers.{i}.")
        h = g.norm(x, layer["input_layernorm.weight"])
        if kind == "*":
            y, state = attention(g, layer.under("self_attn."), h, None)
        elif kind == "SWA":
            name = "swa." if "swa.q_proj.weight" in layer else "self_attn."
            y, state = attention(g, layer.under(name), h, config["swa_config"]["window_size"])
        elif kind == "BMF":
            y, state = bmojo(g, layer.under("bmojo_f."), h, num_iter)
        else:
            name = {"GKA": "gka", "GDN": "gdn", "M2": "mamba"}[kind]
            y, state = linear_mixer(name, g, layer.under(f"{name}."), h, num_iter)
        x = x + y
        h, mlp = g.norm(x, layer["post_attention_layernorm.weight"]), layer.under("mlp.")
        x = x + (experts(config, mlp, h) if "gate.weight" in mlp else swiglu(mlp, h))
        mixer_out.append(y)
        layer_out.append(x)
        states.append(state)
    head = "model.embed_tokens" if config.get("tie_word_embeddings") else "lm_head"
    logits = w.linear(head, g.norm(x, w["model.norm.weight"]))
    return Run(logits, mixer_out, layer_out, states)
