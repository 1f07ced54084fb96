"""Base families: one table of data, and the reading and writing of config.json by it.

A family is a row. Layers read the options of `hmf_jax.options.Backbone`, never a family's name; a
row says which options a family's models have, and under which keys of config.json they are kept.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hmf_jax.mixers import BASE, KINDS, check_symbols, known_symbols
from hmf_jax.options import Backbone, RopeConfig, check_int


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
# In older files, in place of rope_parameters.
LEGACY_ROPE = ("rope_theta", "rope_scaling", "original_max_position_embeddings")
_SLIDING = "sliding_attention"


def model_types() -> tuple[str, ...]:
    """The model types of config.json that can run."""
    return tuple(name for f in FAMILIES.values() for name in (f.hybrid, *f.stock))


def take_family(top: dict[str, Any]) -> tuple[Family, bool]:
    """The family of a config.json, and whether it describes a hybrid and not a base model.

    Removes what it reads from the top level. Raises ValueError for families that cannot run.
    """
    architectures = top.pop("architectures", None) or []
    model_type = top.pop("model_type", None)
    families = list(FAMILIES.values())
    if model_type is None:
        names = {f.architectures[0]: f.hybrid for f in families}
        names |= {f.architectures[1]: f.stock[0] for f in families}
        model_type = next((names[a] for a in architectures if a in names), None)
    for family in families:
        if model_type == family.hybrid or model_type in family.stock:
            return family, model_type == family.hybrid or "hybrid_override_pattern" in top
    raise ValueError(
        f"model_type {model_type!r} is not supported; supported are {', '.join(model_types())}. "
        f"Known base families that are not supported yet: {', '.join(KNOWN_MODEL_TYPES)}"
    )


def take_backbone(top: dict[str, Any], family: Family) -> dict[str, Any]:
    """The options of `Backbone` that a config.json gives; removes them from the top level."""
    values: dict[str, Any] = {**family.options}
    values |= {option: top[key] for option, key in family.keys.items() if key in top}
    for key in family.keys.values():
        top.pop(key, None)
    values |= {name: top.pop(name) for name in _PLAIN if name in top}
    heads = values.get("num_attention_heads", Backbone.num_attention_heads)
    if values.get("num_key_value_heads") is None:
        values["num_key_value_heads"] = heads
    if values.get("head_dim", 0) is None:
        values["head_dim"] = values.get("hidden_size", Backbone.hidden_size) // heads
    positions = values.get("max_position_embeddings", Backbone.max_position_embeddings)
    values["rope"] = _take_rope(top, positions)
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


def take_layers(top: dict[str, Any], family: Family, hybrid: bool) -> tuple[str, ...]:
    """The layer symbols that a config.json gives; removes them from the top level."""
    layer_types = top.pop("layer_types", None)
    count = top.pop("num_hidden_layers", None)
    pattern = top.pop("hybrid_override_pattern", None)
    if hybrid and pattern is None and not set(layer_types or ["?"]) <= set(known_symbols()):
        raise ValueError(
            "hybrid_override_pattern is missing; set it to one symbol per layer joined by '-', "
            "e.g. '*-GKA-*-GKA'"
        )
    if pattern is not None:
        if not isinstance(pattern, str):
            raise ValueError(f"hybrid_override_pattern must be a string, got {pattern!r}")
        symbols = tuple(pattern.split("-"))
        check_symbols(symbols)
    elif hybrid:
        symbols = tuple(layer_types)
    else:
        if layer_types is None and count is None:
            count = family.num_hidden_layers
        symbols = _base_layers(top, layer_types, count)
    if count is not None and count != len(symbols):
        raise ValueError(
            f"the layer pattern has {len(symbols)} symbols but num_hidden_layers is {count}; "
            "give exactly one symbol per layer"
        )
    return symbols


def _base_layers(top: Mapping[str, Any], layer_types: Any, count: Any) -> tuple[str, ...]:
    """The symbols of a base model's layers: those from max_window_layers on may have a window."""
    window = top.get("sliding_window") if top.get("use_sliding_window", False) else None
    symbols = {kind.layer_type: symbol for symbol, kind in KINDS.items() if kind.layer_type}
    if layer_types is None:
        check_int("num_hidden_layers", count, 1)
        first = count if window is None else top.get("max_window_layers", 0)
        full = KINDS[BASE].layer_type
        layer_types = [_SLIDING if i >= first else full for i in range(count)]
    if unknown := set(layer_types) - set(symbols):
        raise ValueError(f"layer_types has unknown entries {sorted(map(str, unknown))}")
    if _SLIDING in layer_types and window is None:
        raise ValueError(
            "layer_types has sliding_attention but no window is active: set use_sliding_window "
            "to true and sliding_window to a number of tokens"
        )
    return tuple(symbols[name] for name in layer_types)


def _take_rope(top: dict[str, Any], max_positions: int) -> RopeConfig:
    """RoPE settings from new or legacy keys, resolved in transformers 5's order.

    Base: rope_parameters.rope_theta, then rope_theta, then 10000. A non-null legacy rope_scaling
    replaces rope_parameters as a whole, so the base then comes from rope_theta.
    """
    parameters = top.pop("rope_parameters", None)
    theta, scaling, original = (top.pop(name, None) for name in LEGACY_ROPE)
    stored = dict(scaling or parameters or {})
    stored = {k: v for k, v in stored.items() if v is not None}
    legacy = stored.pop("type", "default")
    values = {"rope_type": stored.pop("rope_type", legacy)}
    values["theta"] = float(stored.pop("rope_theta", 10000.0 if theta is None else theta))
    if (partial := stored.pop("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(f"partial_rotary_factor {partial} is not supported, only 1.0 is")
    if values["rope_type"] == "yarn":
        original = original or stored.pop("original_max_position_embeddings", max_positions)
        stored["original_max_position_embeddings"] = original
    names = {f.name for f in dataclasses.fields(RopeConfig)}
    if unknown := sorted(set(stored) - names):
        raise ValueError(
            f"unknown rope_parameters {', '.join(unknown)}; remove them or use those of 'yarn'"
        )
    return RopeConfig(**values, **stored)
