"""FLOPs: how many a training step takes, and how many a device can do."""

from __future__ import annotations

import re
from collections.abc import Mapping

import jax

from hmf_jax import table
from hmf_jax.config import HybridConfig
from hmf_jax.mixers import KINDS
from hmf_jax.model import HybridLM
from hmf_jax.training.step import TrainState

# Dense bfloat16 FLOP/s of one device, from NVIDIA's data sheets; the first name that fits counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}


def peak_flops() -> float | None:
    """Peak bfloat16 FLOP/s of a device of this machine; None if it is not in the table."""
    kind = jax.devices()[0].device_kind
    return next((peak for name, peak in PEAK_FLOPS.items() if name in kind), None)


def training_flops(state: TrainState, length: int) -> float:
    """Model FLOPs of a training step per token of rows of `length` tokens.

    A weight takes part in one multiplication and addition per token forward, in one to pass the
    gradient on, and, if it is trained, in one for its own: 2 (2 N + N_trained), N the matrix
    elements without the embedding table, whose use is no product; of experts those that a token
    goes to. Attention over c keys takes 4 H D c forward and twice that backward, c being their mean
    number in a causal row. What is computed again (remat) does not count, nor do recurrences and
    the GKA solver.
    """
    config = _bare(state).config

    def matrices(params: Mapping[str, jax.Array]) -> float:
        skip = () if config.tie_word_embeddings else ("embed_tokens.embedding",)
        return sum(
            a.size * _uses(config, n)
            for n, a in params.items()
            if a.ndim >= 2 and n not in skip and not n.endswith(".scale")  # of quantised weights
        )

    weights = matrices(state.params) + matrices(state.frozen)
    scores = 12 * config.num_attention_heads * config.head_dim
    visible = sum(_mean_visible(kind, config, length) for kind in config.student_kinds)
    return 4.0 * weights + 2.0 * matrices(state.params) + scores * visible


def _bare(state: TrainState) -> HybridLM:
    """The model without its arrays."""
    return jax.eval_shape(TrainState.model, state)


def _uses(config: HybridConfig, parameter: str) -> float:
    """How often the forward pass of a token multiplies by this parameter."""
    found = re.match(r"layers\.(\d+)\.mixer\.(.+)", parameter)
    if found is None:
        return table.used(config, parameter)
    return KINDS[config.student_kinds[int(found[1])]].uses(config.sections, found[2])


def _mean_visible(kind: str, config: HybridConfig, length: int) -> float:
    """Keys that a token of a causal row attends to, on average."""
    w = min(KINDS[kind].sees(config.sections, length), length)
    return (w * (w + 1) / 2 + (length - w) * w) / length  # i + 1 keys for token i < w, then w
