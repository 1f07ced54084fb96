"""Helpers shared by the tests."""

from __future__ import annotations

import numpy as np


def rel(actual, expected) -> float:
    """Relative error ||a - b|| / ||b|| over the whole tensor, in float64."""
    a = np.asarray(actual, np.float64)
    b = np.asarray(expected, np.float64)
    assert a.shape == b.shape, f"shape {a.shape}, expected {b.shape}"
    return float(np.linalg.norm(a - b) / max(float(np.linalg.norm(b)), 1e-30))


def tiny_config(kinds: tuple[str, ...], **changes):
    """A config small enough to compile in a second; windows are shorter than the test sequences."""
    from hmf_jax.config import BMojoConfig, GKAConfig, HybridConfig, SWAConfig

    fields = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        layer_kinds=kinds,
        initializer_range=0.2,
        gka=GKAConfig(chunk_size=8),
        swa=SWAConfig(5),
        bmojo=BMojoConfig(window_size=4, tie_attn_weights=True, ssm_mixer="GKA"),
    )
    return HybridConfig(**{**fields, **changes})
