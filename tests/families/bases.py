"""A small base model of each family, as its config.json."""

from __future__ import annotations

import dataclasses
from typing import Any

from hmf_jax.config import HybridConfig

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "vocab_size": 64,
    "max_position_embeddings": 512,
}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
NEXT = {**SHAPE, **EXPERTS, **LINEAR, "head_dim": 32, "shared_expert_intermediate_size": 20}
# A base model of each family.
BASES: dict[str, dict[str, Any]] = {
    "qwen3": {**SHAPE, "model_type": "qwen3", "head_dim": 16},
    "llama": {**SHAPE, "model_type": "llama", "rope_parameters": LLAMA3, "mlp_bias": True},
    "qwen2": {**SHAPE, "model_type": "qwen2", "rope_theta": 1000000.0},
    "ministral3": {**SHAPE, "model_type": "ministral3", "head_dim": 16},
    "qwen3_moe": {**SHAPE, **EXPERTS, "model_type": "qwen3_moe", "mlp_only_layers": [2]},
    "qwen3_next": {**NEXT, "model_type": "qwen3_next"},
    "qwen3_5_moe": {
        **{k: v for k, v in NEXT.items() if k != "intermediate_size"},
        "model_type": "qwen3_5_moe_text",
        "rope_parameters": {"rope_theta": 1e7, "mrope_section": [2, 1, 1], "rope_type": "default"},
    },
}


def base(family: str, **changes: Any) -> HybridConfig:
    return HybridConfig.from_dict({**BASES[family], **changes})


def hybrid(family: str, *layer_kinds: str, **changes: Any) -> HybridConfig:
    return dataclasses.replace(base(family), layer_kinds=layer_kinds or ("GKA", "*"), **changes)
