"""config.json as it is published with base models: read without a word, and the shapes by name."""

from __future__ import annotations

import dataclasses
import json
import warnings
from typing import Any

import pytest

from hmf_jax.config import HybridConfig
from hmf_jax.options import Backbone, RopeConfig

COMMON: dict[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0",
    "use_cache": True,
}
LLAMA = """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 128000,
"eos_token_id": 128001, "mlp_bias": false, "model_type": "llama", "num_attention_heads": 32,
"num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
"max_position_embeddings": 131072, "vocab_size": 128256, "rope_scaling": {"factor": %s,
"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
"rope_type": "llama3"}, "hidden_size": %s, "intermediate_size": %s, "num_hidden_layers": %s,
"tie_word_embeddings": %s}"""
QWEN2 = """{"architectures": ["Qwen2ForCausalLM"], "bos_token_id": 151643, "eos_token_id": 151643,
"max_position_embeddings": %s, "model_type": "qwen2", "rms_norm_eps": 1e-06, "sliding_window": %s,
"rope_theta": 1000000.0, "use_mrope": false, "use_sliding_window": false, "max_window_layers": %s,
"hidden_size": %s, "intermediate_size": %s, "num_attention_heads": %s, "num_hidden_layers": %s,
"num_key_value_heads": %s, "tie_word_embeddings": %s, "vocab_size": %s}"""
MOE = """{"architectures": ["Qwen3MoeForCausalLM"], "attention_bias": false, "bos_token_id": 151643,
"decoder_sparse_step": 1, "eos_token_id": 151645, "head_dim": 128, "hidden_size": 2048,
"intermediate_size": 6144, "max_position_embeddings": 40960, "max_window_layers": 48,
"mlp_only_layers": [], "model_type": "qwen3_moe", "moe_intermediate_size": 768,
"norm_topk_prob": true, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
"num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": false,
"rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 1000000.0, "sliding_window": null,
"router_aux_loss_coef": 0.001, "tie_word_embeddings": false, "use_sliding_window": false,
"vocab_size": 151936}"""
NEXT = """{"architectures": ["Qwen3NextForCausalLM"], "bos_token_id": 151643,
"decoder_sparse_step": 1, "eos_token_id": 151645, "full_attention_interval": 4, "head_dim": 256,
"hidden_size": 2048, "intermediate_size": 5120, "linear_conv_kernel_dim": 4,
"linear_key_head_dim": 128, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
"linear_value_head_dim": 128, "max_position_embeddings": 262144, "mlp_only_layers": [],
"model_type": "qwen3_next", "moe_intermediate_size": 512, "norm_topk_prob": true,
"num_attention_heads": 16, "num_experts": 512, "num_experts_per_tok": 10, "num_hidden_layers": 48,
"num_key_value_heads": 2, "output_router_logits": false, "partial_rotary_factor": 0.25,
"rms_norm_eps": 1e-06, "rope_scaling": null, "rope_theta": 10000000, "vocab_size": 151936,
"router_aux_loss_coef": 0.001, "shared_expert_intermediate_size": 512,
"tie_word_embeddings": false, "use_sliding_window": false}"""
FILES = {
    "llama-3.1-8b": LLAMA % (8.0, 4096, 14336, 32, "false"),
    "llama-3.2-1b": LLAMA % (32.0, 2048, 8192, 16, "true"),
    "qwen2.5-7b": QWEN2 % (131072, 131072, 28, 3584, 18944, 28, 28, 4, "false", 152064),
    "qwen2.5-0.5b": QWEN2 % (32768, 32768, 24, 896, 4864, 14, 24, 2, "true", 151936),
    "qwen3-30b-a3b": MOE,
    "qwen3-next-80b-a3b": NEXT,
}


def read(data: dict[str, Any]) -> HybridConfig:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = HybridConfig.from_dict(data)
    written = config.to_dict()
    assert {key: written[key] for key in data} == data
    assert not {"num_local_experts", "rope_parameters", "dtype"} & written.keys()
    return config


@pytest.mark.parametrize("name", FILES)
def test_shapes_by_name_are_those_of_the_files(name):
    config, preset = read({**COMMON, **json.loads(FILES[name])}), HybridConfig.preset(name, "*")
    options = [field.name for field in dataclasses.fields(Backbone)]
    for option in (*options, "family", "layer_kinds", "bos_token_id", "eos_token_id"):
        assert getattr(config, option) == getattr(preset, option), option
    assert config.sections == preset.sections and config.is_stock


def test_smollm2():
    data = json.loads(
        """{"architectures": ["LlamaForCausalLM"], "attention_bias": false, "bos_token_id": 1,
        "eos_token_id": 2, "hidden_size": 576, "intermediate_size": 1536, "is_llama_config": true,
        "max_position_embeddings": 8192, "mlp_bias": false, "model_type": "llama",
        "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
        "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_interleaved": false,
        "rope_scaling": null, "rope_theta": 100000, "tie_word_embeddings": true,
        "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16"}}, "vocab_size": 49152}"""
    )
    config = read({**COMMON, **data})
    assert (config.head_dim, config.rope, config.qkv_bias) == (64, RopeConfig(100000.0), False)


def test_the_text_of_qwen3_5():
    text = json.loads(
        """{"attention_bias": false, "attn_output_gate": true, "eos_token_id": 248044,
        "full_attention_interval": 4, "head_dim": 256, "hidden_size": 2048,
        "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_num_key_heads": 16,
        "linear_num_value_heads": 32, "linear_value_head_dim": 128, "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262144, "mlp_only_layers": [],
        "model_type": "qwen3_5_moe_text", "moe_intermediate_size": 512,
        "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": false,
        "num_attention_heads": 16, "num_experts": 256, "num_experts_per_tok": 8,
        "num_hidden_layers": 40, "num_key_value_heads": 2, "output_router_logits": false,
        "partial_rotary_factor": 0.25, "rms_norm_eps": 1e-06, "router_aux_loss_coef": 0.001,
        "rope_parameters": {"mrope_interleaved": true, "mrope_section": [11, 11, 10],
        "partial_rotary_factor": 0.25, "rope_theta": 10000000, "rope_type": "default"},
        "shared_expert_intermediate_size": 512, "vocab_size": 248320}"""
    )
    whole = {"model_type": "qwen3_5_moe", "text_config": {**COMMON, **text}, "vision_config": {}}
    with pytest.warns(UserWarning, match="only the text part") as said:
        config = HybridConfig.from_dict(whole)
    assert len(said) == 1
    assert config.layer_kinds == ("GDN", "GDN", "GDN", "*") * 10 and config.is_stock
    assert config.rope == RopeConfig(10000000.0, partial_rotary_factor=0.25)
    assert config.gdn.norm_eps == 1e-6
    assert config.moe and config.moe.shared_intermediate_size == 512
    written = config.to_dict()
    assert {key: written[key] for key in text} == text
