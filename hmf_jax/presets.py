"""Ready-made shapes, by name: the fields of `HybridConfig.preset`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hmf_jax.mixers import BASE, BMojoConfig, SWAConfig
from hmf_jax.options import RopeConfig, nearest, shown

_QWEN3_8B = dict(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=131072,
    rope=RopeConfig(5_000_000.0),
    pad_token_id=151643,
    bos_token_id=151643,
    eos_token_id=151645,
)
_QWEN3_32B = {
    **_QWEN3_8B,
    "hidden_size": 5120,
    "intermediate_size": 25600,
    "num_attention_heads": 64,
}
_TINY = dict(
    vocab_size=320,
    hidden_size=64,
    intermediate_size=128,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=4096,
)
# name -> (fields, number of layers, converted layers, window of SWA and B'MOJO-F)
_PRESETS: dict[str, tuple[dict[str, Any], int, tuple[int, ...], int]] = {
    "tiny": (_TINY, 4, (1, 3), 16),
    "8b": (
        _QWEN3_8B,
        36,
        (1, 2, 3, 4, 5, 6, 9, 10, 11, 26, 27, 28, 30, 31, 32, 33, 34, 35),
        2048,
    ),
    "32b": (
        _QWEN3_32B,
        64,
        (2, 3, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 20, 22, 23, 24)
        + (26, 27, 28, 29, 32, 33, 35, 36, 39, 40, 41, 43, 44, 57, 60, 63),
        2048,
    ),
}


def preset(name: str, mixer: str | Sequence[str] | None, overrides: dict[str, Any]):
    """The fields of a preset as a dict; see `HybridConfig.preset`."""
    if not isinstance(name, str) or name not in _PRESETS:
        hint = nearest(name, _PRESETS)
        known = ", ".join(_PRESETS)
        raise ValueError(f"unknown preset {shown(name)}{hint}; choose one of {known}")
    if mixer is not None and "layer_kinds" in overrides:
        raise ValueError("layer_kinds leaves nothing for mixer to say: give one of the two")
    shape, num_layers, converted, window = _PRESETS[name]
    if mixer is None and name == "tiny":
        kinds: tuple[str, ...] = ("*", "GKA", "GDN", "M2", "BMF", "SWA")
    else:
        mixers = ("GKA",) if mixer is None else (mixer,) if isinstance(mixer, str) else mixer
        if not isinstance(mixers, list | tuple) or not mixers:
            raise ValueError(f"mixer must be a symbol such as 'GKA' or several, got {shown(mixer)}")
        turn = {layer: mixers[n % len(mixers)] for n, layer in enumerate(converted)}
        kinds = tuple(turn.get(layer, BASE) for layer in range(num_layers))
    values: dict[str, Any] = {**shape, "layer_kinds": kinds, **overrides}
    if "SWA" in values["layer_kinds"]:
        values.setdefault("swa", SWAConfig(window))
    if "BMF" in values["layer_kinds"]:
        values.setdefault("bmojo", BMojoConfig(window, ssm_mixer="GKA"))
    return values
