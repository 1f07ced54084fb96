"""The sizes that programs are compiled for: few, so that most requests find theirs compiled."""

from __future__ import annotations

from hmf_jax.config import HybridConfig

SMALLEST_CHUNK = 64  # tokens; the last chunk of a prompt is padded to this times a power of two
SMALLEST_CAPACITY = 256  # tokens


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n, or `least` if that is larger."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def capacity_for(config: HybridConfig, needed: int, capacity: int | None = None) -> int:
    """`capacity`, or the bucket for `needed` tokens: a power of two, at most what RoPE covers."""
    if capacity is not None:
        return capacity
    return min(power_of_two(needed, SMALLEST_CAPACITY), config.max_position_embeddings)
