"""Which checkpoint tensor becomes which parameter: a table per mixer kind, read both ways.

A row is (checkpoint name, parameter path, shape in the checkpoint, layout). Rows that name the same
checkpoint tensor are consecutive row blocks of it, in this order. Layouts:

    "same"    the parameter is the tensor
    "linear"  [out, in] in the checkpoint, [in, out] here
    "conv"    [C, 1, K] in the checkpoint, [K, C] here
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Literal

from hmf_jax.config import HybridConfig, streams

Layout = Literal["same", "linear", "conv"]
Row = tuple[str, str, tuple[int, ...], Layout]

# Mixer module names in the checkpoint, by layer symbol.
PREFIX = {
    "*": "self_attn",
    "SWA": "swa",
    "GKA": "gka",
    "GDN": "gdn",
    "M2": "mamba",
    "BMF": "bmojo_f",
}


@dataclasses.dataclass(frozen=True)
class Entry:
    """One parameter: a block of rows `start : start + shape[0]` of one checkpoint tensor."""

    name: str
    path: str
    shape: tuple[int, ...]
    layout: Layout
    start: int = 0

    @property
    def parameter_shape(self) -> tuple[int, ...]:
        if self.layout == "same":
            return self.shape
        return self.shape[-1], self.shape[0]

    @property
    def transposed(self) -> bool:
        return self.layout != "same"


def _linear(
    n_out: int, n_in: int, name: str, bias: bool = False, path: str | None = None
) -> list[Row]:
    path = path or name
    rows: list[Row] = [(f"{name}.weight", f"{path}.kernel", (n_out, n_in), "linear")]
    if bias:
        rows.append((f"{name}.bias", f"{path}.bias", (n_out,), "same"))
    return rows


def _vector(size: int, *names: str) -> list[Row]:
    return [(name, name, (size,), "same") for name in names]


def _conv(
    channels: int, taps: int, name: str, bias: bool = False, path: str | None = None
) -> list[Row]:
    path = path or name
    rows: list[Row] = [(f"{name}.weight", f"{path}.weight", (channels, 1, taps), "conv")]
    if bias:
        rows.append((f"{name}.bias", f"{path}.bias", (channels,), "same"))
    return rows


def _under(prefix: str, rows: list[Row], path: str | None = None) -> list[Row]:
    path = prefix if path is None else path
    return [(f"{prefix}.{n}", f"{path}.{p}", shape, layout) for n, p, shape, layout in rows]


def _attention_rows(c: HybridConfig, suffix: str = "") -> list[Row]:
    """q, k, v projections and QK-norms; `suffix` "_" is B'MOJO-F's untied fading stream."""
    d, nq, nk, bias = c.hidden_size, *_widths(c), c.attention_bias
    return [
        *_linear(nq, d, f"q_proj{suffix}", bias),
        *_linear(nk, d, f"k_proj{suffix}", bias),
        *_linear(nk, d, f"v_proj{suffix}", bias),
        *_vector(c.head_dim, f"q_norm{suffix}.weight", f"k_norm{suffix}.weight"),
    ]


def _attention(c: HybridConfig) -> list[Row]:
    o_proj = _linear(c.hidden_size, _widths(c)[0], "o_proj", c.attention_bias)
    return _attention_rows(c) + o_proj


def _linear_attention(
    c: HybridConfig,
    *,
    decay: str,
    convs: str,
    conv_size: int,
    conv_bias: bool,
    gate: bool,
    rank: int | None,
    learnable_residual: bool,
) -> list[Row]:
    """What GKA and GDN share; `decay` names the decay projection, `convs` the convolved streams."""
    d, nq, nk, heads = c.hidden_size, *_widths(c), c.num_attention_heads
    widths = {"q": nq, "k": nk, "v": nk}
    rows = [
        *(row for s, width in widths.items() for row in _linear(width, d, f"{s}_proj")),
        *(r for s in convs for r in _conv(widths[s], conv_size, f"{s}_conv1d", conv_bias)),
        *_linear(heads, d, decay),
        *_vector(heads, "A_log", "dt_bias"),
        *_vector(c.head_dim, "o_norm.weight"),
        *_linear(d, nq, "o_proj"),
    ]
    if gate:
        rows += _linear(nq, d, "g_proj")
    if rank and c.num_key_value_heads != heads:  # nothing to expand otherwise
        for s in "kv":
            rows += _linear(rank, nk, f"proj_{s}.linearA") + _linear(nq, rank, f"proj_{s}.linearB")
            if learnable_residual:
                rows.append((f"{s}_rep", f"{s}_rep", (heads, c.num_key_value_heads), "same"))
    return rows


def _gka(c: HybridConfig) -> list[Row]:
    g = c.gka
    assert g is not None
    rows = _linear_attention(
        c,
        decay="a_proj",  # stored even if use_forgetting_gate is off
        convs="qkv" if g.use_v_conv else "qk",
        conv_size=g.conv_size,
        conv_bias=False,
        gate=g.use_gate,
        rank=g.kv_proj_rank,
        learnable_residual=g.kv_learnable_residual,
    )
    if g.use_beta_gate:
        rows += _linear(c.num_attention_heads, c.hidden_size, "b_proj", bias=True)
    if g.use_alpha_connection:
        rows += _linear(c.num_attention_heads, c.hidden_size, "alpha_proj", bias=True)
    return rows


def _gdn(c: HybridConfig) -> list[Row]:
    g = c.gdn
    assert g is not None
    rows = _linear_attention(
        c,
        decay="gk_proj",
        convs="qkv" if g.use_short_conv else "",
        conv_size=g.conv_size,
        conv_bias=g.conv_bias,
        gate=g.use_gate,
        rank=g.kv_proj_rank,
        learnable_residual=g.kv_learnable_residual,
    )
    return rows + _linear(c.num_attention_heads, c.hidden_size, "b_proj")


def _mamba2(c: HybridConfig) -> list[Row]:
    assert c.mamba2 is not None
    d, nq, nk, heads = c.hidden_size, *_widths(c), c.num_attention_heads
    rows: list[Row] = []
    for block, width in (("z", nq), ("x", nk), ("B", nk), ("C", nq), ("dt", heads)):
        rows += _linear(width, d, "in_proj", path=f"{block}_proj")
    for block, width in (("x", nk), ("B", nk), ("C", nq)):
        rows += _conv(width, 4, "conv1d", bias=True, path=f"{block}_conv1d")
    rows += _vector(heads, "A_log", "dt_bias", "D") + _vector(nq, "norm.weight")
    if c.mamba2.use_qk_norm:
        rows += _vector(c.head_dim, "B_norm.weight", "C_norm.weight")
    return rows + _linear(d, nq, "out_proj")


def _bmojo(c: HybridConfig) -> list[Row]:
    assert c.bmojo is not None
    kind = c.bmojo.ssm_mixer
    attention = _attention(c)
    if not c.bmojo.tie_attn_weights:
        attention += _attention_rows(c, "_")
    return _under("bmojo_attn", attention) + _under(PREFIX[kind], MIXERS[kind](c), "inner")


MIXERS: Mapping[str, Callable[[HybridConfig], list[Row]]] = {
    "*": _attention,
    "SWA": _attention,
    "GKA": _gka,
    "GDN": _gdn,
    "M2": _mamba2,
    "BMF": _bmojo,
}


def _widths(c: HybridConfig) -> tuple[int, int]:
    return c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim


def _rows(c: HybridConfig) -> Iterator[Row]:
    V, d, F = c.vocab_size, c.hidden_size, c.intermediate_size
    yield "model.embed_tokens.weight", "embed_tokens.embedding", (V, d), "same"
    for i, symbol in enumerate(c.layer_kinds):
        kind, teacher = streams(symbol)
        block = _under(PREFIX[kind], MIXERS[kind](c), "mixer")
        if teacher is not None:
            block += _under(PREFIX[teacher], MIXERS[teacher](c), "teacher")
        block += [
            *_vector(d, "input_layernorm.weight", "post_attention_layernorm.weight"),
            *_linear(F, d, "mlp.gate_proj"),
            *_linear(F, d, "mlp.up_proj"),
            *_linear(d, F, "mlp.down_proj"),
        ]
        yield from _under(f"model.layers.{i}", block, f"layers.{i}")
    yield "model.norm.weight", "norm.weight", (d,), "same"
    if not c.tie_word_embeddings:
        yield "lm_head.weight", "lm_head.kernel", (V, d), "linear"


def table(config: HybridConfig) -> list[Entry]:
    """Every parameter of the model, in checkpoint order; follows from the config alone."""
    filled: dict[str, int] = {}
    entries = []
    for name, path, shape, layout in _rows(config):
        start = filled.get(name, 0)
        entries.append(Entry(name, path, shape, layout, start))
        filled[name] = start + shape[0]
    return entries


def by_tensor(entries: list[Entry]) -> dict[str, list[Entry]]:
    """The entries of each checkpoint tensor, its row blocks in order."""
    out: dict[str, list[Entry]] = {}
    for entry in entries:
        out.setdefault(entry.name, []).append(entry)
    return out


def tensor_shape(blocks: list[Entry]) -> tuple[int, ...]:
    """Shape of the checkpoint tensor made of these row blocks."""
    return (sum(e.shape[0] for e in blocks), *blocks[0].shape[1:])


def num_parameters(config: HybridConfig) -> int:
    return sum(math.prod(e.shape) for e in table(config))


def find(names: set[str], config: HybridConfig) -> dict[str, str]:
    """Canonical tensor name -> name in a checkpoint that holds `names`, for names that differ.

    Layer-selection variants of the original keep the name `self_attn` in layers that became SWA.
    """
    renamed = {}
    for i, kind in enumerate(config.layer_kinds):
        new, old = f"model.layers.{i}.swa.", f"model.layers.{i}.self_attn."
        if kind == "SWA" and not any(n.startswith(new) for n in names):
            renamed |= {new + n.removeprefix(old): n for n in names if n.startswith(old)}
    return renamed


def ignored(name: str) -> bool:
    """Buffers that old checkpoints store and that the config already determines."""
    return name.endswith("rotary_emb.inv_freq")
