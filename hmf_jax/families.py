"""Base families: one table of data.

A family is a row. Layers read the options of `hmf_jax.options.Backbone`, never a family's name; a
row says which options a family's models have, and under which keys of config.json they are kept.
`hmf_jax.keys` reads and writes config.json by it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hmf_jax.mixers import BASE


@dataclasses.dataclass(frozen=True)
class Family:
    """How the models of one base family are described in config.json.

    Attributes:
      name: of the row, `HybridConfig.family`.
      hybrid: model_type of its hybrids.
      stock: model types of its base models.
      architectures: class names of its hybrids and of its base models.
      num_hidden_layers: layers of a base model that does not say how many.
      defaults: values of keys that are absent, where they are not those of `Backbone`.
      base_defaults: the same, in base models alone.
      options: options of `Backbone` that all its models have. As in `keys`, "moe.every" is the
        field `every` of the option `moe`.
      keys: option of `Backbone` -> the key that says it. A family without keys of `moe` is dense,
        and one without keys of `linear` has no heads but those of attention.
      absent: options that have keys of their own name in all other families, and none in this one.
      rope: further fields of `RopeConfig` that its models read.
      constants: keys that are written into hybrids and mean nothing here.
      unused: keys, also of rope_parameters, that are kept although they mean nothing here.
      windows: which layers of a base model that switches a sliding window on have one: "from"
        max_window_layers on, "all", or "always" all, and there is no switch; "" for none.
      layer_types: whether hybrids have this key.
      unreadable: layers that the original's classes of this family do not have, by their symbols;
        "BMF:M2" is B'MOJO-F around Mamba-2.
      ignored: how names of checkpoint tensors begin that are of no use to a text model.
      prefixes: how names of checkpoint tensors may begin -> how they begin here.
      experts: how experts are written, "per_expert" or "stacked"; both are read.
    """

    name: str
    hybrid: str
    stock: tuple[str, ...]
    architectures: tuple[str, str]
    num_hidden_layers: int = 32
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    base_defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    absent: tuple[str, ...] = ()
    rope: tuple[str, ...] = ()
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    unused: tuple[str, ...] = ()
    windows: str = ""
    layer_types: bool = True
    unreadable: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    prefixes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    experts: str = "per_expert"

    def part(self, name: str) -> dict[str, str]:
        """The keys of an option that has fields ("moe", "linear"): field -> key."""
        start = f"{name}."
        return {o.removeprefix(start): key for o, key in self.keys.items() if o.startswith(start)}

    @property
    def base_kinds(self) -> tuple[str, ...]:
        """The symbols of the layers that its base models may have."""
        windowed = ("SWA",) if self.windows else ()
        return (BASE, *windowed, *(("GDN",) if self.part("linear") else ()))


_ATTENTION_BIAS = {"qkv_bias": "attention_bias", "o_bias": "attention_bias"}
_EXPERTS = {
    "moe.experts_per_token": "num_experts_per_tok",
    "moe.intermediate_size": "moe_intermediate_size",
    "moe.aux_coef": "router_aux_loss_coef",
}
_SOME_DENSE = {
    "moe.renormalize": "norm_topk_prob",
    "moe.every": "decoder_sparse_step",
    "moe.dense_layers": "mlp_only_layers",
}
_SHARED = {
    **_EXPERTS,
    "moe.num_experts": "num_experts",
    "moe.shared_intermediate_size": "shared_expert_intermediate_size",
}
_LINEAR = {
    "linear.num_key_heads": "linear_num_key_heads",
    "linear.num_value_heads": "linear_num_value_heads",
    "linear.head_dim": "linear_key_head_dim",
    "linear.conv_size": "linear_conv_kernel_dim",
}
_WRITTEN = {"attention_dropout": 0.0, "use_cache": True}
_NO_WINDOW = {"sliding_window": None, "use_sliding_window": False}
_NO_LOGITS = {"output_router_logits": False}
_NEXT_ONLY = ("GDN>GKA",)

_TABLE = (
    Family(
        name="qwen3",
        hybrid="hybrid_qwen3",
        stock=("qwen3",),
        architectures=("HybridQwen3ForCausalLM", "Qwen3ForCausalLM"),
        defaults={"sliding_window": 4096, "max_window_layers": 28},
        options={"qk_norm": True},
        keys=_ATTENTION_BIAS,
        constants={**_WRITTEN, **_NO_WINDOW, "max_window_layers": 28},
        windows="from",
        unreadable=_NEXT_ONLY,
    ),
    Family(
        name="llama",
        hybrid="hybrid_llama",
        stock=("llama",),
        architectures=("HybridLlamaForCausalLM", "LlamaForCausalLM"),
        defaults={
            "vocab_size": 32000,
            "intermediate_size": 11008,
            "num_key_value_heads": None,
            "head_dim": None,
            "max_position_embeddings": 2048,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
        options={"qk_norm": False},
        keys={**_ATTENTION_BIAS, "mlp_bias": "mlp_bias"},
        constants={**_WRITTEN, "pretraining_tp": 1},
        unreadable=_NEXT_ONLY,
    ),
    Family(
        name="qwen2",
        hybrid="hybrid_qwen2",
        stock=("qwen2",),
        architectures=("HybridQwen2ForCausalLM", "Qwen2ForCausalLM"),
        defaults={"head_dim": None, "sliding_window": 4096, "max_window_layers": 28},
        options={"qk_norm": False, "qkv_bias": True},
        absent=("head_dim",),
        constants={**_WRITTEN, **_NO_WINDOW, "max_window_layers": 28},
        unused=("mrope_section",),
        windows="from",
        unreadable=_NEXT_ONLY,
        ignored=("visual.", "model.visual."),
        prefixes={"model.language_model.": "model."},
    ),
    Family(
        name="ministral3",
        hybrid="hybrid_ministral3",
        stock=("ministral3",),
        architectures=("HybridMinistral3ForCausalLM", "Ministral3ForCausalLM"),
        num_hidden_layers=34,
        defaults={
            "vocab_size": 131072,
            "intermediate_size": 14336,
            "num_key_value_heads": 8,
            "max_position_embeddings": 262144,
            "rms_norm_eps": 1e-5,
            "pad_token_id": 11,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1000000.0,
                "factor": 16.0,
                "original_max_position_embeddings": 16384,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
        options={"qk_norm": False, "bmojo_bias": True},
        rope=("llama_4_scaling_beta",),
        constants={**_WRITTEN, "sliding_window": None},
        unused=("max_position_embeddings",),
        windows="always",
        layer_types=False,
        unreadable=_NEXT_ONLY,
    ),
    Family(
        name="qwen3_moe",
        hybrid="hybrid_qwen3_moe",
        stock=("qwen3_moe",),
        architectures=("HybridQwen3MoeForCausalLM", "Qwen3MoeForCausalLM"),
        num_hidden_layers=24,
        defaults={
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_key_value_heads": 4,
            "head_dim": None,
            "sliding_window": 4096,
            "norm_topk_prob": False,
        },
        options={"qk_norm": True},
        keys={
            **_ATTENTION_BIAS,
            **_EXPERTS,
            **_SOME_DENSE,
            "moe.num_experts": "num_local_experts",
        },
        constants={**_WRITTEN, **_NO_WINDOW, **_NO_LOGITS},
        windows="all",
        unreadable=_NEXT_ONLY,
    ),
    Family(
        name="qwen3_next",
        hybrid="qwen3_next_hmf",
        stock=("qwen3_next",),
        architectures=("Qwen3NextHMFForCausalLM", "Qwen3NextForCausalLM"),
        num_hidden_layers=48,
        defaults={
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "num_experts": 512,
            "num_experts_per_tok": 10,
            "partial_rotary_factor": 0.25,
            "linear_num_key_heads": 16,
        },
        options={"qk_norm": True, "output_gate": True, "zero_centered_norm": True},
        keys={**_ATTENTION_BIAS, **_SHARED, **_SOME_DENSE, **_LINEAR},
        rope=("partial_rotary_factor",),
        constants={**_WRITTEN, **_NO_LOGITS},
        unused=("full_attention_interval",),
        unreadable=("M2", "SWA"),
        ignored=("mtp.",),
    ),
    Family(
        name="qwen3_5_moe",
        hybrid="qwen3_5_moe_hmf_text",
        stock=("qwen3_5_moe_text",),
        architectures=("Qwen3_5MoeHMFForCausalLM", "Qwen3_5MoeForCausalLM"),
        num_hidden_layers=40,
        defaults={
            "vocab_size": 248320,
            "hidden_size": 2048,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "head_dim": 256,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
            "num_experts": 256,
            "partial_rotary_factor": 0.25,
        },
        base_defaults={"linear_num_key_heads": 16},
        options={"qk_norm": True, "output_gate": True, "zero_centered_norm": True},
        keys={**_ATTENTION_BIAS, **_SHARED, **_LINEAR},
        absent=("intermediate_size",),
        rope=("partial_rotary_factor",),
        constants={**_WRITTEN, **_NO_LOGITS},
        unused=("full_attention_interval", "mrope_section", "mrope_interleaved"),
        unreadable=("M2", "SWA", "BMF:M2"),
        ignored=("mtp.", "visual.", "model.visual."),
        prefixes={"model.language_model.": "model."},
        experts="stacked",
    ),
)
FAMILIES: dict[str, Family] = {family.name: family for family in _TABLE}

_VL_TEXT = {
    "vocab_size": 152064,
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1000000.0,
    "max_window_layers": 80,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
}
_MISTRAL = {
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "sliding_window": 4096,
}
# Base models that are those of a family under another name: the family's model type, and what
# absent keys mean there.
ALSO: dict[str, tuple[str, Mapping[str, Any]]] = {
    "mistral": ("llama", _MISTRAL),
    "qwen2_5_vl_text": ("qwen2", _VL_TEXT),
}
# Models of several parts -> the model type of the text model in them, all of them that is read.
COMPOSITES = {
    "hybrid_qwen2_5_vl": "hybrid_qwen2",
    "qwen2_5_vl": "qwen2_5_vl_text",
    "qwen3_5_moe": "qwen3_5_moe_text",
    "qwen3_5_moe_hmf": "qwen3_5_moe_hmf_text",
}
# Model types that are often asked for and cannot run -> what to do, or why.
REFUSED = {
    "gemma3": "other norms and windows",
    "gpt_oss": "attention sinks and biases of experts",
    "llama4": "chunked attention and other experts",
    "llama4_text": "chunked attention and other experts",
    "mistral3": "split the text model (model_type ministral3) off first",
    "mixtral": "other names and gates of experts",
    "phi3": "joined projections",
    "qwen2_5_omni": "audio and video",
    "qwen2_moe": "attention has biases and experts have no norms; Qwen3-MoE is supported",
    "qwen2_vl": "Qwen2.5-VL is supported, its text model",
    "qwen3_5": "the dense Qwen3.5; Qwen3.5-MoE is supported",
    "qwen3_5_text": "the dense Qwen3.5; Qwen3.5-MoE is supported",
    "qwen3_vl": "split the text model (model_type qwen3) off first",
    "qwen3_vl_moe": "split the text model (model_type qwen3_moe) off first",
}
KNOWN_MODEL_TYPES = tuple(REFUSED)


def model_types() -> tuple[str, ...]:
    """The model types of config.json that can run."""
    of_families = (name for f in FAMILIES.values() for name in (f.hybrid, *f.stock))
    return (*of_families, *ALSO, *COMPOSITES)
