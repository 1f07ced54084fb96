"""The keys of config.json: what they say of a model, read and written by the row of its family.

Where a function takes `notes`, it adds a line for everything that is there and has no effect.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hmf_jax.families import Family
from hmf_jax.mixers import BASE, KINDS, check_symbols, known_symbols, split_symbol
from hmf_jax.mixers.attention import base_window
from hmf_jax.options import (
    MOST_LAYERS,
    SCALINGS,
    Backbone,
    LinearHeads,
    MoEConfig,
    RopeConfig,
    check_bool,
    check_int,
    check_number,
    check_object,
    names,
    shown,
)

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
# Options with fields of their own, and what they are.
_PARTS: dict[str, Any] = {"moe": MoEConfig, "linear": LinearHeads}
# Options of one value that differ between families.
_OPTIONS = tuple(
    field.name
    for field in dataclasses.fields(Backbone)
    if field.name not in (*_PLAIN, *_PARTS, "rope")
)
# Beside linear_key_head_dim, which it must equal.
_VALUE_HEAD_DIM = "linear_value_head_dim"
_PARTIAL = "partial_rotary_factor"
# Fields of RopeConfig that only some families read, with any type of embedding.
_ROPE_OPTIONS = (_PARTIAL, "llama_4_scaling_beta")
TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
_SLIDING = "sliding_attention"
# Keys that libraries write for themselves. They say nothing about the numbers a model computes.
BOOKKEEPING = frozenset(
    """_name_or_path _commit_hash _attn_implementation _attn_implementation_autoset
    attn_implementation _experts_implementation auto_map chunk_size_feed_forward dtype
    finetuning_task id2label label2id model_name name_or_path num_labels output_attentions
    output_hidden_states prefix problem_type return_dict sep_token_id task_specific_params
    tokenizer_class torch_dtype torchscript transformers_version unsloth_fixed unsloth_version
    use_bfloat16 use_cache is_llama_config output_router_logits pretraining_tp
    transformers.js_config""".split()
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
        use_mrope use_mup use_parallel_residual vision_config""".split(),
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


def take_backbone(top: dict[str, Any], family: Family, notes: list[str]) -> dict[str, Any]:
    """The options of `Backbone` that a config.json gives; removes them from the top level."""
    values: dict[str, Any] = {**family.options}
    for option, key in family.keys.items():
        if option in _OPTIONS and key in top:
            values[option] = check_bool(key, top[key])
    parts = {part: _take_part(part, top, family) for part in _PARTS}
    for key in family.keys.values():
        top.pop(key, None)
    read = [name for name in _PLAIN if name not in family.absent or name == "head_dim"]
    values |= {name: top.pop(name) for name in read if name in top}
    heads = values.get("num_attention_heads", Backbone.num_attention_heads)
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = heads
    if values.get("head_dim", 0) is None:
        width = check_int("hidden_size", values.get("hidden_size", Backbone.hidden_size), 1)
        values["head_dim"] = width // check_int("num_attention_heads", heads, 1)
    positions = values.get("max_position_embeddings", Backbone.max_position_embeddings)
    check_int("max_position_embeddings", positions, 1)
    return {**values, **parts, "rope": _take_rope(top, positions, family, notes)}


def _take_part(part: str, top: dict[str, Any], family: Family) -> Any:
    """The experts or the linear heads that a config.json gives, or None."""
    keys = family.part(part)
    given = {field: top[key] for field, key in keys.items() if key in top}
    if part == "moe":
        count = given.get("num_experts", MoEConfig.num_experts)
        # Where layers may be dense, all of them may be.
        if not keys or ("every" in keys and check_int(keys["num_experts"], count, 0) == 0):
            return None
        given["dense_layers"] = given.get("dense_layers") or ()
    else:
        value_dim = top.pop(_VALUE_HEAD_DIM, None) if keys else None
        if not given.keys() - {"conv_size"}:
            return None
        key_dim = given.get("head_dim", LinearHeads.head_dim)
        if value_dim is not None and value_dim != key_dim:
            raise ValueError(
                f"{_VALUE_HEAD_DIM} {shown(value_dim)} is not supported, only that of "
                f"{keys['head_dim']}, {shown(key_dim)}, is"
            )
    start = f"{part}."
    fixed = {o.removeprefix(start): v for o, v in family.options.items() if o.startswith(start)}
    try:
        return _PARTS[part](**{**fixed, **given})
    except ValueError as e:
        text = str(e)
        for field, key in keys.items():
            text = text.replace(f"{start}{field}", key)
        raise ValueError(text) from None


def backbone_keys(backbone: Backbone, family: Family) -> dict[str, Any]:
    """The keys of config.json that say these options.

    Raises ValueError for options that no model of the family has.
    """
    out: dict[str, Any] = {name: getattr(backbone, name) for name in _PLAIN}
    usual = {"head_dim": backbone.hidden_size // backbone.num_attention_heads}
    for name in family.absent:
        if out[name] == usual.get(name, out[name]):
            del out[name]
    for option, value in _options(backbone, family).items():
        part, _, field = option.rpartition(".")
        key = family.keys.get(option)
        if key is None:
            possible = family.options.get(option, getattr(_PARTS.get(part, Backbone), field))
        else:
            possible = out.setdefault(key, value)  # several options may share a key
        if value != possible:
            why = f"{key} is {possible}" if key else f"they have {option}={possible}"
            raise ValueError(
                f"{option}={value} cannot be written for the family {family.name!r}: {why}"
            )
    if backbone.linear is not None:
        out[_VALUE_HEAD_DIM] = backbone.linear.head_dim
    rope = {k: v for k, v in dataclasses.asdict(backbone.rope).items() if v is not None}
    for name in _ROPE_OPTIONS:
        if name in rope and name not in family.rope:
            raise ValueError(
                f"rope.{name} cannot be written for the family {family.name!r}: its models "
                "do not have it"
            )
    if _PARTIAL in family.rope:
        out[_PARTIAL] = backbone.rope.partial_rotary_factor
    return {**out, "rope_parameters": {"rope_theta": rope.pop("theta"), **rope}}


def _options(backbone: Backbone, family: Family) -> dict[str, Any]:
    """Options that differ between families, "moe.every" for the field of an option."""
    out = {option: getattr(backbone, option) for option in _OPTIONS}
    for part in _PARTS:
        settings, keys = getattr(backbone, part), family.part(part)
        if settings is not None and keys:
            fields = dataclasses.asdict(settings)
            lists = {k: list(v) for k, v in fields.items() if isinstance(v, tuple) and k in keys}
            out |= {f"{part}.{name}": value for name, value in (fields | lists).items()}
        elif part == "moe" and "every" in keys:  # dense throughout
            out["moe.num_experts"] = 0
        elif settings is not None or (keys and not family.base_defaults.keys() & keys.values()):
            raise ValueError(
                f"{part}={settings} cannot be written for the family {family.name!r}: its models "
                f"{'always have' if keys else 'do not have'} it"
            )
    return out


def read_by(family: Family) -> set[str]:
    """The keys of the top level that options of the family's models are read from."""
    return {*_PLAIN, *family.keys.values(), _VALUE_HEAD_DIM, _PARTIAL}


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
        symbols = _windowed(symbols, top, family, notes)
        if layer_types and tuple(layer_types) != symbols and not set(layer_types) <= base:
            notes.append("layer_types has no effect: it differs from hybrid_override_pattern")
    elif hybrid:
        symbols = tuple(layer_types or ())
    else:
        if layer_types is None and count is None:
            count = family.num_hidden_layers
        symbols = _base_layers(top, family, layer_types, count, notes)
    if count is not None and count != len(symbols):
        raise ValueError(
            f"the layer pattern has {len(symbols)} symbols but num_hidden_layers is {count}; "
            "give exactly one symbol per layer"
        )
    return symbols


def layer_types(layer_kinds: tuple[str, ...], family: Family) -> list[str]:
    """The value of layer_types in hybrids: the symbols, or else what the base models' were."""
    if "GDN" not in family.base_kinds:
        return list(layer_kinds)
    linear, full = KINDS["GDN"].layer_type or "", KINDS[BASE].layer_type or ""
    sources = [teacher or kind for kind, teacher in map(split_symbol, layer_kinds)]
    return [linear if source in ("GDN", "GKA") else full for source in sources]


def _windowed(
    symbols: tuple[str, ...], top: Mapping[str, Any], family: Family, notes: list[str]
) -> tuple[str, ...]:
    """The layers of a hybrid, with the window that some families put on all attention.

    Where the hybrid has a window of its own, sliding_window is a copy of it.
    """
    if family.windows != "always" or top.get("swa_config") is not None or base_window(top) is None:
        return symbols
    if fused := [symbol for symbol in symbols if symbol not in KINDS]:
        raise ValueError(
            f"sliding_window is set, and so attention of {names(fused)} has a window: set it to "
            "null, or give such layers as SWA"
        )
    if BASE in symbols:
        notes.append(f"sliding_window is set: all layers {BASE!r} are read as SWA")
    return tuple("SWA" if symbol == BASE else symbol for symbol in symbols)


def _base_layers(
    top: dict[str, Any], family: Family, layer_types: Any, count: Any, notes: list[str]
) -> tuple[str, ...]:
    """The symbols of a base model's layers."""
    window, every = base_window(top), top.pop("full_attention_interval", None)
    full = KINDS[BASE].layer_type
    if layer_types is None and "GDN" in family.base_kinds:
        every = check_int("full_attention_interval", 4 if every is None else every, 1)
        linear = KINDS["GDN"].layer_type
        layer_types = [linear if (i + 1) % every else full for i in range(count)]
    elif layer_types is None:
        first = top.get("max_window_layers", 0) if family.windows == "from" else 0
        first = count if window is None else check_int("max_window_layers", first, 0)
        layer_types = [_SLIDING if i >= first else full for i in range(count)]
    elif window is not None and _SLIDING not in layer_types:
        notes.append("use_sliding_window has no effect: layer_types has no sliding_attention")
    symbols = {KINDS[symbol].layer_type: symbol for symbol in family.base_kinds}
    if unknown := set(layer_types) - set(symbols):
        raise ValueError(f"layer_types has unknown entries {names(unknown)}")
    if _SLIDING in layer_types and window is None:
        raise ValueError(
            "layer_types has sliding_attention but no window is active: set use_sliding_window "
            "to true and sliding_window to a number of tokens"
        )
    return tuple(symbols[name] for name in layer_types)


def _take_rope(
    top: dict[str, Any], max_positions: int, family: Family, notes: list[str]
) -> RopeConfig:
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
    partial = top.pop(_PARTIAL, None)
    if _PARTIAL not in family.rope:
        for value in (partial, stored.pop(_PARTIAL, None)):
            if value not in (None, 1):
                raise ValueError(f"{_PARTIAL} {shown(value)} is not supported, only 1.0 is")
    elif partial is not None and stored.setdefault(_PARTIAL, partial) != partial:
        notes.append(f"{_PARTIAL} has no effect: that of rope_parameters differs")
    if nested := [k for k, v in stored.items() if isinstance(v, Mapping)]:
        raise ValueError(f"rope_parameters of one layer type are not supported: {names(nested)}")
    known = {*SCALINGS.get(str(rope_type), stored), *family.rope}
    if "llama_4_scaling_beta" in known & stored.keys():
        known.add("original_max_position_embeddings")
    if rope_type in ("yarn", "llama3"):
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
    if unknown := {k: v for k, v in stored.items() if k not in known}:
        if foreign := unknown.keys() - set(family.unused):
            notes.append(
                f"keys of rope_parameters that have no effect with rope_type {shown(rope_type)}: "
                f"{names(foreign)}"
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


def check_token(name: str, value: Any) -> int | None:
    """The value, a token or None. Raises ValueError for anything else."""
    # Released files also say -1 for "none".
    return None if value is None else check_int(name, value, -1, 2**31 - 1)


def check_tokens(name: str, value: Any) -> int | tuple[int, ...] | None:
    """The value, a token, several of them, or None. Raises ValueError for anything else."""
    if isinstance(value, list | tuple):
        return tuple(check_int(name, token, -1, 2**31 - 1) for token in value)
    return check_token(name, value)


def is_known(key: str) -> bool:
    """Whether a key that nothing reads is nothing to hear of."""
    return key in BOOKKEEPING or key in _NEUTRAL or key == "attention_dropout"


def check_rest(rest: Mapping[str, Any], family: Family, notes: list[str]) -> None:
    """Looks at the keys of the top level that nothing has read.

    Raises ValueError for those that say that the model computes something else.
    """
    unknown = []
    for key, value in rest.items():
        if value is None or key in BOOKKEEPING or key in family.unused:
            continue
        if key == "attention_dropout":
            if check_number(key, value, 0, 1):
                notes.append(f"attention_dropout {value} has no effect: nothing is dropped here")
        elif key == "attention_bias" and value is False:
            continue
        elif key == "attn_output_gate":
            if value is not family.options.get("output_gate", False):
                raise ValueError(
                    f"{key} {shown(value)} is not supported in the family {family.name}"
                )
        elif key.startswith("linear_num_"):
            raise ValueError(f"{key} is not supported in the family {family.name}")
        elif key in _NEUTRAL:
            if value not in _NEUTRAL[key]:
                allowed = " or ".join(str(v).lower() for v in _NEUTRAL[key][:1])
                raise ValueError(f"{key} {shown(value)} is not supported, only {allowed} is")
        else:
            unknown.append(key)
    if unknown:
        notes.append(f"unknown keys that have no effect: {names(unknown)}")
