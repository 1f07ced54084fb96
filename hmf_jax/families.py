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
from hmf_jax.options import check_bool, check_object, shown


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
      layout: how its base models store layers that are not attention, see `Kind.base_rows`.
      experts: how its checkpoints hold experts, "per_expert" or "stacked"; both are read.
      unused: keys, also of rope_parameters, that are kept although they mean nothing here.
      windows: which layers of a base model that switches a sliding window on have one: "from"
        max_window_layers on, "all", or "always" all, and there is no switch; "" for none.
      layer_types: whether hybrids have this key.
      unreadable: layers that the original's classes of this family do not have, by their symbols;
        "BMF:M2" is B'MOJO-F around Mamba-2.
      ignored: how names of checkpoint tensors begin that are of no use to a text model.
      prefixes: how names of checkpoint tensors may begin -> how they begin here.
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
    layout: str = "packed"
    experts: str = "per_expert"
    unused: tuple[str, ...] = ()
    windows: str = ""
    layer_types: bool = True
    unreadable: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    prefixes: Mapping[str, str] = dataclasses.field(default_factory=dict)

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
        layout="split",
        experts="stacked",
        unused=(
            "full_attention_interval",
            "mamba_ssm_dtype",
            "mlp_only_layers",
            "mrope_interleaved",
            "mrope_section",
            "mtp_num_hidden_layers",
            "mtp_use_dedicated_embeddings",
        ),
        unreadable=("M2", "SWA", "BMF:M2"),
        ignored=("mtp.", "visual.", "model.visual."),
        prefixes={"model.language_model.": "model."},
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
# The number of experts has two names, and both are read.
EXPERTS = ("num_experts", "num_local_experts")
# The windows of base models. Those of a hybrid are its pattern's and swa_config's.
WINDOW_KEYS = ("use_sliding_window", "sliding_window", "max_window_layers")
# In older files, in place of rope_parameters.
LEGACY_ROPE = ("rope_theta", "rope_scaling", "original_max_position_embeddings")


def model_types() -> tuple[str, ...]:
    """The model types of config.json that can run."""
    of_families = (name for f in FAMILIES.values() for name in (f.hybrid, *f.stock))
    return (*of_families, *ALSO, *COMPOSITES)


def text_part(data: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The config.json of the text model in that of a model of several parts; a copy of others."""
    model_type = data.get("model_type")
    if not isinstance(model_type, str) or model_type not in COMPOSITES:
        return dict(data)
    notes.append(f"of a {model_type} model only the text part is read, nothing of images or video")
    text = check_object("text_config", data.get("text_config"))
    if text is None:  # older files have its keys at the top level
        text = {k: v for k, v in data.items() if not k.startswith(("vision_", "image_", "video_"))}
    text.pop("architectures", None)
    tied = (text.get("tie_word_embeddings"), data.get("tie_word_embeddings"))
    if any(value is not None for value in tied):
        text["tie_word_embeddings"] = any(check_bool("tie_word_embeddings", v) for v in tied if v)
    for key in ("quantization_config", "dtype", "torch_dtype", "transformers_version"):
        if key in data:
            text.setdefault(key, data[key])
    for key in ("rope_scaling", "rope_parameters"):
        rope = check_object(key, text.get(key))
        if rope and "mrope" in (rope.get("type"), rope.get("rope_type")):
            # Of a text all three axes of positions are the same: it is plain RoPE.
            text[key] = {**{k: v for k, v in rope.items() if k != "type"}, "rope_type": "default"}
    also = ALSO.get(COMPOSITES[model_type])
    if also is None:
        return {**text, "model_type": COMPOSITES[model_type]}
    return {**text, **_absent(also[1], text), "model_type": also[0]}


def take_family(top: dict[str, Any]) -> tuple[Family, bool]:
    """The family of a config.json, and whether it describes a hybrid and not a base model.

    Removes what it reads from the top level. Raises ValueError for families that cannot run.
    """
    architectures = top.pop("architectures", None)
    model_type = top.pop("model_type", None)
    if architectures is not None and not isinstance(architectures, list | tuple):
        raise ValueError(f"architectures must be a list of names, got {shown(architectures)}")
    families = list(FAMILIES.values())
    if model_type is None:
        types = {f.architectures[0]: f.hybrid for f in families}
        types |= {f.architectures[1]: f.stock[0] for f in families}
        model_type = next((types[str(a)] for a in architectures or () if str(a) in types), None)
    if isinstance(model_type, str) and model_type in ALSO:
        like, defaults = ALSO[model_type]
        top |= _absent(defaults, top)
        if model_type == "mistral" and top["sliding_window"] is not None:
            raise ValueError(
                f"sliding_window {shown(top['sliding_window'])} of a mistral model is not "
                "supported, only null is (absent means 4096)"
            )
        model_type = like
    for family in families:
        if model_type == family.hybrid or model_type in family.stock:
            return family, model_type == family.hybrid or "hybrid_override_pattern" in top
    reason = REFUSED.get(str(model_type))
    why = f" ({reason})" if reason else ""
    raise ValueError(
        f"model_type {shown(model_type)} is not supported{why}; supported are "
        f"{', '.join(model_types())}"
    )


def fill_in(top: dict[str, Any], family: Family, hybrid: bool, notes: list[str]) -> dict[str, Any]:
    """The top level of a config.json with what absent keys mean, one name for each setting."""
    top, experts = dict(top), family.part("moe").get("num_experts")
    for name in EXPERTS:
        if experts is not None and name != experts and name in top:
            value = top.pop(name)
            if top.setdefault(experts, value) != value:
                raise ValueError(
                    f"{name} is {shown(value)} but {experts} is {shown(top[experts])}; "
                    "correct one of them"
                )
    found = _absent(family.defaults, top)
    if not hybrid:
        found |= _absent(family.base_defaults, top)
    if "rope_parameters" in found and (theta := top.get("rope_theta")) is not None:
        if theta != found["rope_parameters"]["rope_theta"]:
            notes.append("rope_theta has no effect: give all of rope_parameters")
    top |= found
    switches = [top.get(key) for key in WINDOW_KEYS[:2]]
    if family.windows == "always":
        top["use_sliding_window"] = switches[1] is not None
    elif not family.windows:
        if switches[0]:
            notes.append(f"use_sliding_window has no effect in the family {family.name}")
        top["use_sliding_window"] = False
    return top


def _absent(defaults: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    """The defaults that count beside these keys."""
    found = {key: value for key, value in defaults.items() if key not in top}
    rope = top.get("rope_scaling") or top.get("rope_parameters")
    if rope is not None:
        found.pop("rope_parameters", None)
    elif "rope_parameters" in defaults:  # null is as good as absent
        found["rope_parameters"] = defaults["rope_parameters"]
    if isinstance(rope, Mapping) and rope.get("partial_rotary_factor") is not None:
        found.pop("partial_rotary_factor", None)
    return found
