"""The plain options of a decoder's backbone: widths, heads, norms, biases, rotary embedding.

Everything else is built on them. They know no kind of layer and no base family: layers and mixers
read these options, and ask for nothing else.
"""

from __future__ import annotations

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base and, for `rope_type` "linear" and "yarn", its long-context scaling.

    Fields other than `theta` and `rope_type` carry the names and meanings of `rope_parameters` in
    config.json; `None` means "not stored".
    """

    theta: float = 10000.0
    rope_type: str = "default"
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None

    def __post_init__(self) -> None:
        if self.rope_type not in ("default", "linear", "yarn"):
            raise ValueError(
                f"rope_type {self.rope_type!r} is not supported; set rope_parameters.rope_type to "
                "'default', 'linear' or 'yarn'"
            )
        if not self.theta > 0:
            raise ValueError(f"rope_theta must be positive, got {self.theta}")
        if self.rope_type != "default" and not (self.factor and self.factor >= 1):
            raise ValueError(
                f"rope_type {self.rope_type!r} needs rope_parameters.factor >= 1, got {self.factor}"
            )


@dataclasses.dataclass(frozen=True)
class Backbone:
    """What all layers of a decoder share; the defaults are those of Qwen3.

    Attributes:
      vocab_size, hidden_size, intermediate_size, num_attention_heads, num_key_value_heads,
        head_dim, rms_norm_eps, max_position_embeddings, tie_word_embeddings, initializer_range:
        as in config.json.
      rope: rotary embedding.
      qk_norm: queries and keys are normalised per head (RMSNorm) before they are rotated.
      qkv_bias, o_bias: biases of the projections of attention.
      mlp_bias: biases of the three projections of the MLP.

    Raises ValueError, saying what to change, for values that cannot form a model.
    """

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_attention_heads: int = 32
    num_key_value_heads: int = 32
    head_dim: int = 128
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    rope: RopeConfig = RopeConfig()
    qk_norm: bool = True
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False

    def __post_init__(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "max_position_embeddings",
        ):
            check_int(name, getattr(self, name), 1)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (rotary embedding), got {self.head_dim}")

    @property
    def query_width(self) -> int:
        """Channels of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Channels of all key heads together; as many as of the values."""
        return self.num_key_value_heads * self.head_dim


def check_int(name: str, value: Any, low: int) -> None:
    """Raises ValueError unless the value is an integer of at least `low`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")


def check_rank(name: str, value: Any) -> None:
    """Raises ValueError unless the value is None or a positive integer."""
    if value is not None:
        check_int(name, value, 1)
