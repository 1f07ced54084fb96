"""Base families: one table of data, and the reading and writing of config.json by it.

A family is a row. Layers read the options of `hmf_jax.options.Backbone`, never a family's name; a
row says which options a family's models have, and under which keys of config.json they are kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hmf_jax.mixers import BASE, KINDS, check_symbols, known_symbols
from hmf_jax.mixers.attention import base_window
from hmf_jax.options import (
    MOST_LAYERS,
    SCALINGS,
    Backbone,
    RopeConfig,
    check_bool,
    check_int,
    check_number,
    check_object,
    names,
    shown,
)


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
      options: options of `Backbone` that all its models have.
      keys: option of `Backbone` -> the key that says it.
      constants: keys that are written into hybrids and mean nothing here.
      experts: how its checkpoints hold experts, "per_expert" or "stacked"; both are read.
      prefixes: beginning of tensor names in its checkpoints -> what it stands for.
      ignored: beginnings of names of tensors that the text model does not need.
    """

    name: str
    hybrid: str
    stock: tuple[str, ...]
    architectures: tuple[str, str]
    num_hidden_layers: int = 32
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    keys: Mapping[str, str] = dataclasses.field(default_factory=dict)
    constants: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    experts: str = "per_expert"
    prefixes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    ignored: tuple[str, ...] = ()


_TABLE = (
    Family(
        name="qwen3",
        hybrid="hybrid_qwen3",
        stock=("qwen3",),
        architectures=("HybridQwen3ForCausalLM", "Qwen3ForCausalLM"),
        defaults={"sliding_window": 4096, "max_window_layers": 28},
        options={"qk_norm": True},
        keys={"qkv_bias": "attention_bias", "o_bias": "attention_bias"},
        constants={
            "attention_dropout": 0.0,
            "max_window_layers": 28,
            "sliding_window": None,
            "use_cache": True,
            "use_sliding_window": False,
        },
    ),
)
FAMILIES: dict[str, Family] = {family.name: family for family in _TABLE}
# Base families of the original that this package knows by name but cannot run yet.
KNOWN_MODEL_TYPES = (
    "hybrid_qwen2",
    "hybrid_llama",
    "hybrid_ministral3",
    "hybrid_qwen3_moe",
    "qwen3_next_hmf",
    "qwen3_5_moe_hmf",
    "hybrid_qwen2_5_vl",
)
# Options of the backbone that differ between families.
_OPTIONS = ("qk_norm", "qkv_bias", "o_bias", "mlp_bias")
# Options that config.json keeps under their own names.
_PLAIN = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "max_position_embeddings",
    "tie_word_embeddings",
    "initializer_range",
)
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
# In older files, in place of rope_parameters.
LEGACY_ROPE = ("rope_theta", "rope_scaling", "original_max_position_embeddings")
_SLIDING = "sliding_attention"
# The windows of base models. Those of a hybrid are its pattern's and swa_config's.
WINDOW_KEYS = ("use_sliding_window", "sliding_window", "max_window_layers")
# Keys that libraries write for themselves. They say nothing about the numbers a model computes.
BOOKKEEPING = frozenset(
    """_name_or_path _commit_hash _attn_implementation _attn_implementation_autoset
    attn_implementation _experts_implementation auto_map chunk_size_feed_forward dtype
    finetuning_task id2label label2id model_name name_or_path num_labels output_attentions
    output_hidden_states prefix problem_type return_dict sep_token_id task_specific_params
    tokenizer_class torch_dtype torchscript transformers_version unsloth_fixed unsloth_version
    use_bfloat16 use_cache""".split()
)
# Keys that would change what a model computes, and the values at which they do not.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        """add_cross_attention alibi attention_chunk_size attention_sinks attn_logit_softcapping
        clip_qkv compression_config embedding_size final_logit_softcapping is_encoder_decoder
        kv_lora_rank logit_softcapping logits_soft_cap mlp_bias moe_intermediate_size
        no_rope_layer_interval no_rope_layers norm_bias num_experts num_local_experts
        parallel_attn per_layer_config pruned_heads q_lora_rank qkv_clip query_pre_attn_scalar
        rope_interleaved scale_depth scale_emb text_config use_alibi use_bidirectional_attention
        use_mup use_parallel_residual vision_config""".split(),
        (False, 0, {}, []),
    ),
    **dict.fromkeys(
        """attention_multiplier embedding_multiplier logit_scale logits_scaling lm_head_multiplier
        mup_scale partial_rotary_factor residual_multiplier rotary_pct""".split(),
        (1,),
    ),
    **dict.fromkeys(("is_causal", "qk_layernorm", "qk_norm", "use_qk_norm", "use_rope"), (True,)),
    "hidden_activation": ("silu", "swish"),
    "norm_type": ("rmsnorm",),
    "position_embedding_type": ("rope", "absolute"),  # the default that old files have
}


def model_types() -> tuple[str, ...]:
    """The model types of config.json that can run."""
    return tuple(name for f in FAMILIES.values() for name in (f.hybrid, *f.stock))


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
    for family in families:
        if model_type == family.hybrid or model_type in family.stock:
            return family, model_type == family.hybrid or "hybrid_override_pattern" in top
    raise ValueError(
        f"model_type {shown(model_type)} is not supported; supported are "
        f"{', '.join(model_types())}. "
        f"Known base families that are not supported yet: {', '.join(KNOWN_MODEL_TYPES)}"
    )


def take_backbone(top: dict[str, Any], family: Family, notes: list[str]) -> dict[str, Any]:
    """The options of `Backbone` that a config.json gives; removes them from the top level.

    `notes` gets a line for everything that is there and has no effect; so below.
    """
    values: dict[str, Any] = {**family.options}
    values |= {
        option: check_bool(key, top[key]) for option, key in family.keys.items() if key in top
    }
    for key in family.keys.values():
        top.pop(key, None)
    values |= {name: top.pop(name) for name in _PLAIN if name in top}
    heads = values.get("num_attention_heads", Backbone.num_attention_heads)
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = heads
    if values.get("head_dim", 0) is None:
        width = check_int("hidden_size", values.get("hidden_size", Backbone.hidden_size), 1)
        values["head_dim"] = width // check_int("num_attention_heads", heads, 1)
    positions = values.get("max_position_embeddings", Backbone.max_position_embeddings)
    check_int("max_position_embeddings", positions, 1)
    values["rope"] = _take_rope(top, positions, notes)
    return values


def backbone_keys(backbone: Backbone, family: Family) -> dict[str, Any]:
    """The keys of config.json that say these options.

    Raises ValueError for options that no model of the family has.
    """
    out: dict[str, Any] = {name: getattr(backbone, name) for name in _PLAIN}
    for option in _OPTIONS:
        value, key = getattr(backbone, option), family.keys.get(option)
        if key is None:
            possible = family.options.get(option, getattr(Backbone, option))
        else:
            possible = out.setdefault(key, value)  # several options may share a key
        if value != possible:
            why = f"{key} is {possible}" if key else f"they have {option}={possible}"
            raise ValueError(
                f"{option}={value} cannot be written for the family {family.name!r}: {why}"
            )
    rope = {k: v for k, v in dataclasses.asdict(backbone.rope).items() if v is not None}
    return {**out, "rope_parameters": {"rope_theta": rope.pop("theta"), **rope}}


def take_layers(
    top: dict[str, Any], family: Family, hybrid: bool, notes: list[str]
) -> tuple[str, ...]:
    """The layer symbols that a config.json gives; removes them from the top level."""
    layer_types = top.pop("layer_types", None)
    count = top.pop("num_hidden_layers", None)
    pattern = top.pop("hybrid_override_pattern", None)
    if layer_types is not None:
        strings = isinstance(layer_types, list | tuple) and layer_types
        if not strings or not all(isinstance(name, str) for name in layer_types):
            raise ValueError(f"layer_types must be a list of names, got {shown(layer_types)}")
        check_int("the number of layer_types", len(layer_types), 1, MOST_LAYERS)
    if count is not None:
        check_int("num_hidden_layers", count, 1, MOST_LAYERS)
    if hybrid and pattern is None and not set(layer_types or ["?"]) <= set(known_symbols()):
        raise ValueError(
            "hybrid_override_pattern is missing; set it to one symbol per layer joined by '-', "
            "e.g. '*-GKA-*-GKA'"
        )
    if pattern is not None:
        if not isinstance(pattern, str):
            raise ValueError(f"hybrid_override_pattern must be a string, got {shown(pattern)}")
        symbols = tuple(pattern.split("-", MOST_LAYERS))
        try:
            check_symbols(symbols)
        except ValueError as e:
            raise ValueError(f"hybrid_override_pattern: {e}") from None
        base = {kind.layer_type for kind in KINDS.values()}
        if layer_types and tuple(layer_types) != symbols and not set(layer_types) <= base:
            notes.append("layer_types has no effect: it differs from hybrid_override_pattern")
    elif hybrid:
        symbols = tuple(layer_types or ())
    else:
        if layer_types is None and count is None:
            count = family.num_hidden_layers
        symbols = _base_layers(top, layer_types, count, notes)
    if count is not None and count != len(symbols):
        raise ValueError(
            f"the layer pattern has {len(symbols)} symbols but num_hidden_layers is {count}; "
            "give exactly one symbol per layer"
        )
    return symbols


def _base_layers(
    top: Mapping[str, Any], layer_types: Any, count: Any, notes: list[str]
) -> tuple[str, ...]:
    """The symbols of a base model's layers: those from max_window_layers on may have a window."""
    window = base_window(top)
    symbols = {kind.layer_type: symbol for symbol, kind in KINDS.items() if kind.layer_type}
    if layer_types is None:
        first = top.get("max_window_layers", 0)
        first = count if window is None else check_int("max_window_layers", first, 0)
        full = KINDS[BASE].layer_type
        layer_types = [_SLIDING if i >= first else full for i in range(count)]
    elif window is not None and _SLIDING not in layer_types:
        notes.append("use_sliding_window has no effect: layer_types has no sliding_attention")
    if unknown := set(layer_types) - set(symbols):
        raise ValueError(f"layer_types has unknown entries {names(unknown)}")
    if _SLIDING in layer_types and window is None:
        raise ValueError(
            "layer_types has sliding_attention but no window is active: set use_sliding_window "
            "to true and sliding_window to a number of tokens"
        )
    return tuple(symbols[name] for name in layer_types)


def _take_rope(top: dict[str, Any], max_positions: int, notes: list[str]) -> RopeConfig:
    """RoPE settings from new or legacy keys, resolved in transformers 5's order.

    Base: rope_parameters.rope_theta, then rope_theta, then 10000. A non-null legacy rope_scaling
    replaces rope_parameters as a whole, so the base then comes from rope_theta. Keys that the type
    of embedding does not know have no effect there either, and stay at the top level.
    """
    parameters = check_object("rope_parameters", top.pop("rope_parameters", None))
    theta = top.pop("rope_theta", None)
    scaling = check_object("rope_scaling", top.pop("rope_scaling", None))
    if scaling and parameters:
        notes.append("rope_parameters has no effect: rope_scaling replaces all of it")
    read = scaling or parameters or {}
    stored = {k: v for k, v in read.items() if v is not None}
    legacy = stored.pop("type", "default")
    rope_type = stored.pop("rope_type", legacy)
    if legacy not in ("default", rope_type):
        notes.append(f"type {shown(legacy)} has no effect beside rope_type {shown(rope_type)}")
    theta = stored.pop("rope_theta", 10000.0 if theta is None else theta)
    values = {"rope_type": rope_type, "theta": float(check_number("rope_theta", theta, 1, 1e15))}
    for where in (stored, top):
        partial = where.pop("partial_rotary_factor", None)
        if partial not in (None, 1):
            raise ValueError(
                f"partial_rotary_factor {shown(partial)} is not supported, only 1.0 is"
            )
    if nested := [k for k, v in stored.items() if isinstance(v, Mapping)]:
        raise ValueError(f"rope_parameters of one layer type are not supported: {names(nested)}")
    if rope_type == "yarn":
        nested = stored.get("original_max_position_embeddings", max_positions)
        original = top.pop("original_max_position_embeddings", None)
        original = nested if original is None else original
        stored["original_max_position_embeddings"] = original
        if original != nested and "original_max_position_embeddings" in read:
            notes.append("original_max_position_embeddings in rope_parameters has no effect")
        if "factor" in read and "factor" not in stored:
            check_int("rope_parameters.original_max_position_embeddings", original, 1)
            stored["factor"] = max_positions / original
        if "truncate" in read:  # null is false to transformers, absent is true
            stored["truncate"] = False if read["truncate"] is None else read["truncate"]
    known = SCALINGS.get(str(rope_type), tuple(stored))
    if unknown := {k: v for k, v in stored.items() if k not in known}:
        notes.append(
            f"keys of rope_parameters that have no effect with rope_type {shown(rope_type)}: "
            f"{names(unknown)}"
        )
        top["rope_parameters"] = unknown
    return RopeConfig(**values, **{k: v for k, v in stored.items() if k in known})


def take_tokens(top: dict[str, Any], vocab_size: int, notes: list[str]) -> dict[str, Any]:
    """The special tokens of a config.json; removes them from the top level."""
    values = {name: top.pop(name, None) for name in TOKENS}
    for name, value in values.items():
        tokens = value if isinstance(value, list | tuple) else [] if value is None else [value]
        if not all(isinstance(token, int) and 0 <= token < vocab_size for token in tokens):
            notes.append(f"{name} {shown(value)} is outside the vocabulary of {vocab_size} tokens")
    return values


def is_known(key: str) -> bool:
    """Whether a key that nothing reads is nothing to hear of."""
    return key in BOOKKEEPING or key in _NEUTRAL or key == "attention_dropout"


def check_rest(rest: Mapping[str, Any], notes: list[str]) -> None:
    """Looks at the keys of the top level that nothing has read.

    Raises ValueError for those that say that the model computes something else.
    """
    unknown = []
    for key, value in rest.items():
        if value is None or key in BOOKKEEPING:
            continue
        if key == "attention_dropout":
            if check_number(key, value, 0, 1):
                notes.append(f"attention_dropout {value} has no effect: nothing is dropped here")
        elif key.startswith("linear_num_"):
            raise ValueError(f"{key} belongs to Qwen3-Next style models, which are not supported")
        elif key in _NEUTRAL:
            if value not in _NEUTRAL[key]:
                allowed = " or ".join(str(v).lower() for v in _NEUTRAL[key][:1])
                raise ValueError(f"{key} {shown(value)} is not supported, only {allowed} is")
        else:
            unknown.append(key)
    if unknown:
        notes.append(f"unknown keys that have no effect: {names(unknown)}")
