"""One tiny model per base family, with every option of the family at a value that is not Qwen3's.

Original contexts and windows are shorter than the test sequences; heads come in odd groups, and
head_dim is not hidden_size / heads.
"""

from __future__ import annotations

from typing import Any

from hmf_jax.config import BMojoConfig, HybridConfig
from hmf_jax.options import Backbone, LinearHeads, MoEConfig, RopeConfig
from tests.util import tiny_config

SIX = ("*", "GKA", "SWA", "GDN", "BMF", "M2")
_NEXT: dict[str, Any] = dict(
    num_key_value_heads=1,
    qk_norm=True,
    output_gate=True,
    zero_centered_norm=True,
    linear=LinearHeads(num_key_heads=2, num_value_heads=4, head_dim=8, conv_size=3),
)
OPTIONS: dict[str, dict[str, Any]] = {
    "llama": dict(
        num_attention_heads=6,
        head_dim=8,
        qk_norm=False,
        qkv_bias=True,
        o_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        rope=RopeConfig(5e5, "llama3", 8.0, 8, low_freq_factor=1.0, high_freq_factor=4.0),
        bmojo=BMojoConfig(4, False, "M2"),
    ),
    "qwen2": dict(
        num_attention_heads=7,
        num_key_value_heads=1,
        head_dim=8,
        qk_norm=False,
        qkv_bias=True,
    ),
    "ministral3": dict(
        qk_norm=False,
        bmojo_bias=True,
        rms_norm_eps=1e-5,
        rope=RopeConfig(
            1e4, "yarn", 4.0, 8, mscale=1.0, mscale_all_dim=1.0, llama_4_scaling_beta=0.3
        ),
        bmojo=BMojoConfig(4, True, "M2"),
    ),
    "qwen3_moe": dict(
        num_attention_heads=10,
        head_dim=8,
        moe=MoEConfig(8, 3, 12, renormalize=False, dense_layers=(2,)),
    ),
    "qwen3_next": dict(
        **_NEXT,
        rope=RopeConfig(partial_rotary_factor=0.25),
        moe=MoEConfig(8, 3, 12, shared_intermediate_size=20, dense_layers=(1,)),
    ),
    "qwen3_5_moe": dict(
        **_NEXT,
        rope=RopeConfig(partial_rotary_factor=0.5),
        moe=MoEConfig(8, 3, 12, shared_intermediate_size=20),
        intermediate_size=Backbone.intermediate_size,  # all layers have experts; it is not stored
    ),
}


def tiny_family(family: str, kinds: tuple[str, ...] = SIX, **changes) -> HybridConfig:
    """The config of one family's tiny model."""
    return tiny_config(kinds, family=family, **{**OPTIONS[family], **changes})


FAMILIES = tuple(OPTIONS)
