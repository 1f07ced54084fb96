"""Ready-made shapes, by name: the fields of `HybridConfig.preset`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from hmf_jax.families import FAMILIES
from hmf_jax.mixers import BASE, BMojoConfig, SWAConfig
from hmf_jax.options import LinearHeads, MoEConfig, RopeConfig, nearest, shown


@dataclasses.dataclass(frozen=True)
class Preset:
    """A shape.

    Attributes:
      about: what it is, for people.
      fields: of `HybridConfig`.
      layers: the symbols of the base model.
      converted: the layers that other kinds replace, half of them.
      window: of SWA and B'MOJO-F.
    """

    about: str
    fields: Mapping[str, Any]
    layers: tuple[str, ...]
    converted: tuple[int, ...]
    window: int = 2048


def _of(family: str, **fields: Any) -> dict[str, Any]:
    return {"family": family, **FAMILIES[family].options, **fields}


_QWEN_TOKENS = dict(pad_token_id=151643, bos_token_id=151643, eos_token_id=151645)
_QWEN3_8B = dict(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=131072,
    rope=RopeConfig(5_000_000.0),
    **_QWEN_TOKENS,
)
_LLAMA_3 = _of(
    "llama",
    vocab_size=128256,
    num_attention_heads=32,
    num_key_value_heads=8,
    rms_norm_eps=1e-5,
    max_position_embeddings=131072,
    bos_token_id=128000,
    eos_token_id=128001,
)
_QWEN2_5 = _of("qwen2", rope=RopeConfig(1_000_000.0), bos_token_id=151643, eos_token_id=151643)


def _llama3_rope(factor: float) -> RopeConfig:
    return RopeConfig(
        500_000.0,
        "llama3",
        factor=factor,
        original_max_position_embeddings=8192,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
    )


def _dense(count: int) -> tuple[str, ...]:
    return (BASE,) * count


PRESETS: dict[str, Preset] = {
    "tiny": Preset(
        "for tests and demos",
        dict(
            vocab_size=320,
            hidden_size=64,
            intermediate_size=128,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            max_position_embeddings=4096,
        ),
        _dense(4),
        (1, 3),
        window=16,
    ),
    # The top half of the original's layer-selection ranking.
    "8b": Preset(
        "Qwen3-8B",
        _QWEN3_8B,
        _dense(36),
        (1, 2, 3, 4, 5, 6, 9, 10, 11, 26, 27, 28, 30, 31, 32, 33, 34, 35),
    ),
    "32b": Preset(
        "Qwen3-32B",
        {**_QWEN3_8B, "hidden_size": 5120, "intermediate_size": 25600, "num_attention_heads": 64},
        _dense(64),
        (2, 3, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 20, 22, 23, 24)
        + (26, 27, 28, 29, 32, 33, 35, 36, 39, 40, 41, 43, 44, 57, 60, 63),
    ),
    # No ranking was published of the others: every second layer, not the first one.
    "llama-3.1-8b": Preset(
        "Llama-3.1-8B",
        {
            **_LLAMA_3,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "head_dim": 128,
            "rope": _llama3_rope(8.0),
        },
        _dense(32),
        tuple(range(1, 32, 2)),
    ),
    "llama-3.2-1b": Preset(
        "Llama-3.2-1B",
        {
            **_LLAMA_3,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "head_dim": 64,
            "tie_word_embeddings": True,
            "rope": _llama3_rope(32.0),
        },
        _dense(16),
        tuple(range(1, 16, 2)),
    ),
    "qwen2.5-7b": Preset(
        "Qwen2.5-7B",
        {
            **_QWEN2_5,
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "max_position_embeddings": 131072,
        },
        _dense(28),
        tuple(range(1, 28, 2)),
    ),
    "qwen2.5-0.5b": Preset(
        "Qwen2.5-0.5B",
        {
            **_QWEN2_5,
            "vocab_size": 151936,
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
        },
        _dense(24),
        tuple(range(1, 24, 2)),
    ),
    "qwen3-30b-a3b": Preset(
        "Qwen3-30B-A3B",
        _of(
            "qwen3_moe",
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=6144,
            num_attention_heads=32,
            num_key_value_heads=4,
            head_dim=128,
            max_position_embeddings=40960,
            rope=RopeConfig(1_000_000.0),
            moe=MoEConfig(num_experts=128, experts_per_token=8, intermediate_size=768),
            **_QWEN_TOKENS,
        ),
        _dense(48),
        tuple(range(1, 48, 2)),
    ),
    "ministral-3-8b": Preset(
        "the text model of Ministral-3-8B",
        _of(
            "ministral3",
            vocab_size=131072,
            hidden_size=4096,
            intermediate_size=14336,
            num_attention_heads=32,
            num_key_value_heads=8,
            head_dim=128,
            rms_norm_eps=1e-5,
            max_position_embeddings=262144,
            rope=RopeConfig(
                1_000_000.0,
                "yarn",
                factor=16.0,
                original_max_position_embeddings=16384,
                beta_fast=32.0,
                beta_slow=1.0,
                mscale=1.0,
                mscale_all_dim=1.0,
                llama_4_scaling_beta=0.1,
            ),
            pad_token_id=11,
            bos_token_id=1,
            eos_token_id=2,
        ),
        _dense(34),
        tuple(range(1, 34, 2)),
    ),
    # Here GDN layers are replaced: two of the three in front of every layer of attention.
    "qwen3-next-80b-a3b": Preset(
        "Qwen3-Next-80B-A3B",
        _of(
            "qwen3_next",
            vocab_size=151936,
            hidden_size=2048,
            intermediate_size=5120,
            num_attention_heads=16,
            num_key_value_heads=2,
            head_dim=256,
            max_position_embeddings=262144,
            rope=RopeConfig(10_000_000.0, partial_rotary_factor=0.25),
            moe=MoEConfig(
                num_experts=512,
                experts_per_token=10,
                intermediate_size=512,
                shared_intermediate_size=512,
            ),
            linear=LinearHeads(num_key_heads=16, num_value_heads=32, head_dim=128, conv_size=4),
            **_QWEN_TOKENS,
        ),
        ("GDN", "GDN", "GDN", BASE) * 12,
        tuple(layer for layer in range(48) if layer % 4 in (0, 1)),
    ),
}


def preset(
    name: str, mixer: str | Sequence[str] | None, overrides: dict[str, Any]
) -> dict[str, Any]:
    """The fields of a preset as a dict; see `HybridConfig.preset`."""
    if not isinstance(name, str) or name not in PRESETS:
        hint = nearest(name, PRESETS)
        known = ", ".join(PRESETS)
        raise ValueError(f"unknown preset {shown(name)}{hint}; choose one of {known}")
    if mixer is not None and "layer_kinds" in overrides:
        raise ValueError("layer_kinds leaves nothing for mixer to say: give one of the two")
    shape = PRESETS[name]
    if mixer is None and name == "tiny":
        kinds: tuple[str, ...] = ("*", "GKA", "GDN", "M2", "BMF", "SWA")
    else:
        mixers = ("GKA",) if mixer is None else (mixer,) if isinstance(mixer, str) else mixer
        if not isinstance(mixers, list | tuple) or not mixers:
            raise ValueError(f"mixer must be a symbol such as 'GKA' or several, got {shown(mixer)}")
        turn = {layer: mixers[n % len(mixers)] for n, layer in enumerate(shape.converted)}
        # "*" keeps what the base model has there.
        turn = {layer: symbol for layer, symbol in turn.items() if symbol != BASE}
        kinds = tuple(turn.get(layer, symbol) for layer, symbol in enumerate(shape.layers))
    values: dict[str, Any] = {**shape.fields, "layer_kinds": kinds, **overrides}
    if "SWA" in values["layer_kinds"]:
        values.setdefault("swa", SWAConfig(shape.window))
    if "BMF" in values["layer_kinds"]:
        values.setdefault("bmojo", BMojoConfig(shape.window, ssm_mixer="GKA"))
    return values
