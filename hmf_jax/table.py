"""The checkpoint of a whole model as a table: which tensor becomes which parameter.

It follows from the config alone. The rows of a mixer are its kind's, those outside the mixers are
here; `hmf_jax.convert` reads and writes checkpoints by them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from hmf_jax.config import HybridConfig
from hmf_jax.convert import rows
from hmf_jax.convert.rows import Entry, Row
from hmf_jax.families import FAMILIES
from hmf_jax.mixers import BASE, KINDS, split_symbol


def entries(config: HybridConfig) -> list[Entry]:
    """Every parameter of the model, in checkpoint order."""
    return rows.entries(_rows(config))


def num_parameters(config: HybridConfig) -> int:
    """Elements of all parameters."""
    return sum(math.prod(e.shape) for e in entries(config))


def num_active_parameters(config: HybridConfig) -> int:
    """Elements of the parameters that a token meets: of the experts only those that it goes to."""
    return round(sum(math.prod(e.shape) * used(config, e.path) for e in entries(config)))


def used(config: HybridConfig, path: str) -> float:
    """Which part of a parameter a token meets: all of it, or of experts k of E."""
    moe = config.moe
    if moe is None or ".mlp.experts." not in path:
        return 1
    return moe.experts_per_token / moe.num_experts


def aliases(config: HybridConfig) -> dict[str, str]:
    """Beginning of tensor names -> what checkpoints may have in its place.

    A kind with the parameters of another may be stored under its name: layer-selection variants of
    the original keep `self_attn` in layers that became SWA. Base models do so always.
    """
    out: dict[str, str] = {}
    if config.is_stock:
        return out
    for i, symbol in enumerate(config.layer_kinds):
        kind = KINDS.get(symbol)
        if kind is not None and kind.like is not None:
            layer = f"model.layers.{i}"
            out[f"{layer}.{kind.name}."] = f"{layer}.{KINDS[kind.like].name}."
    return out


def prefixes(config: HybridConfig) -> Mapping[str, str]:
    """Beginning of tensor names in checkpoints of the family -> what it stands for."""
    return FAMILIES[config.family].prefixes


def ignored(config: HybridConfig) -> tuple[str, ...]:
    """Beginnings of names of tensors that checkpoints of the family may hold and nothing needs."""
    return FAMILIES[config.family].ignored


def copies(config: HybridConfig) -> dict[str, str]:
    """Tensors that a checkpoint may hold although they equal another one -> that one."""
    return {"lm_head.weight": "model.embed_tokens.weight"} if config.tie_word_embeddings else {}


def _rows(c: HybridConfig) -> Iterator[Row]:
    V, d = c.vocab_size, c.hidden_size
    yield Row("model.embed_tokens.weight", "embed_tokens.embedding", (V, d), "same")
    for i, symbol in enumerate(c.layer_kinds):
        kind, teacher = split_symbol(symbol)
        block = _mixer(c, kind, "mixer")
        if teacher is not None:
            block += _mixer(c, teacher, "teacher")
        block += [
            *rows.vector(d, "input_layernorm.weight", "post_attention_layernorm.weight"),
            *(
                _experts(c)
                if c.is_sparse(i)
                else _swiglu(d, c.intermediate_size, "mlp", c.mlp_bias)
            ),
        ]
        yield from rows.under(f"model.layers.{i}", block, f"layers.{i}")
    yield Row("model.norm.weight", "norm.weight", (d,), "same")
    if not c.tie_word_embeddings:
        yield Row("lm_head.weight", "lm_head.kernel", (V, d), "linear")


def _swiglu(d: int, width: int, name: str, bias: bool = False) -> list[Row]:
    return [
        *rows.linear(width, d, f"{name}.gate_proj", bias),
        *rows.linear(width, d, f"{name}.up_proj", bias),
        *rows.linear(d, width, f"{name}.down_proj", bias),
    ]


def _experts(c: HybridConfig) -> list[Row]:
    """The rows of a mixture of experts."""
    moe, d = c.moe, c.hidden_size
    assert moe is not None
    split = FAMILIES[c.family].experts == "per_expert"
    width = moe.intermediate_size
    found = [
        *rows.linear(moe.num_experts, d, "mlp.gate"),
        *rows.experts(moe.num_experts, width, d, "mlp.experts", split=split),
    ]
    if moe.shared_intermediate_size is not None:
        found += _swiglu(d, moe.shared_intermediate_size, "mlp.shared_expert")
        found += rows.linear(1, d, "mlp.shared_expert_gate")
    return found


def _mixer(config: HybridConfig, symbol: str, path: str) -> list[Row]:
    """The rows of one mixer, under its kind's name, or as base models have them."""
    kind, sections = KINDS[symbol], config.sections
    if not config.is_stock:
        return rows.under(kind.name, kind.rows(config, sections), path)
    if kind.base_rows is None:
        found = kind.rows(config, sections)
    else:
        found = kind.base_rows(config, sections, FAMILIES[config.family].layout)
    return rows.under(kind.base_name or KINDS[BASE].name, found, path)
