"""What a model has to read and to multiply, counted from its shapes."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from hmf_jax.memory import device_bytes
from hmf_jax.mixers import KINDS, AttentionState
from hmf_jax.model import HybridLM
from hmf_jax.parameters import flat_params
from hmf_jax.state import ModelState
from hmf_jax.table import used


def weight_bytes(model: HybridLM, tokens: int) -> int:
    """Bytes of weights that so many tokens read, on one device: all but the embedding table, which
    some rows are read of, and of E experts E (1 - (1 - k / E)^tokens), as many as tokens that
    choose at random hit."""
    total = device_bytes(model)
    if not model.config.tie_word_embeddings:
        total -= device_bytes(model.embed_tokens)
    if (moe := model.config.moe) is not None:
        missed = (1 - moe.experts_per_token / moe.num_experts) ** tokens
        experts = [a for n, a in flat_params(model).items() if ".mlp.experts." in n]
        total -= round(missed * device_bytes(experts))
    return total


def prompt_flops(model: HybridLM, length: int) -> float:
    """Model FLOPs of a prompt: two per matrix element and token, of experts those that it goes to,
    of the output head for the last token only; and 4 H D for every key that a token attends to.
    Recurrences and the solver of GKA do not count."""
    config, total = model.config, 0.0
    for name, a in flat_params(model).items():
        if a.ndim >= 2 and not name.startswith("embed_tokens."):
            total += (
                2 * a.size * used(config, name) * (1 if name.startswith("lm_head.") else length)
            )
    if config.tie_word_embeddings:
        total += 2 * config.vocab_size * config.hidden_size
    for kind in config.layer_kinds:
        w = min(KINDS[kind].sees(config.sections, length), length)
        keys = w * (w + 1) / 2 + (length - w) * w
        total += 4 * config.num_attention_heads * config.head_dim * keys
    return total


def step_bytes(state: ModelState, length: int) -> int:
    """Bytes of a state that decoding one token of every row has to move, on one device.

    Caches are read as far as they are filled, windows as a whole, except entries that nobody can
    see yet; float32 states are read and written.
    """
    total = 0
    for layer in state.layers:
        for path, x in jax.tree_util.tree_leaves_with_path(layer):
            size = device_bytes(x)
            if x.dtype == jnp.float32:
                total += 2 * size
            elif isinstance(layer, AttentionState):
                total += size * length // x.shape[1]
            elif "pending" not in jax.tree_util.keystr(path):
                total += size
    return total
