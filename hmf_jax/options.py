"""The plain options of a decoder's backbone: widths, heads, norms, biases, rotary embedding.

Everything else is built on them. They know no kind of layer and no base family: layers and mixers
read these options, and ask for nothing else.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

# The most that a model can have: far above all that exist, and low enough that a damaged or hostile
# config.json takes neither memory nor time.
MOST_LAYERS, WIDEST, MOST_POSITIONS, LONGEST_WINDOW = 512, 2**20, 2**31 - 1, 2**20
MOST_ITERATIONS = 1000  # of a solver; the one of GKA has converged long before

_ROPE_LIMITS = {
    "theta": (1, 1e15),
    "factor": (1, 1e6),
    "original_max_position_embeddings": (1, MOST_POSITIONS),
    "attention_factor": (1e-3, 1e3),
    "beta_fast": (1e-3, 1e6),
    "beta_slow": (1e-3, 1e6),
    "mscale": (0, 1e3),
    "mscale_all_dim": (0, 1e3),
    "low_freq_factor": (1e-3, 1e6),
    "high_freq_factor": (1e-3, 1e6),
    "partial_rotary_factor": (1e-3, 1),
    "llama_4_scaling_beta": (0, 1e3),
}
# What the scaling of each type of rotary embedding reads.
SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "original_max_position_embeddings",
        "low_freq_factor",
        "high_freq_factor",
    ),
    "yarn": (
        "factor",
        "original_max_position_embeddings",
        "attention_factor",
        "beta_fast",
        "beta_slow",
        "mscale",
        "mscale_all_dim",
        "truncate",
    ),
}
_BACKBONE_LIMITS = {
    "vocab_size": (1, 2**24),
    "hidden_size": (1, WIDEST),
    "intermediate_size": (1, WIDEST),
    "num_attention_heads": (1, WIDEST),
    "num_key_value_heads": (1, WIDEST),
    "head_dim": (1, WIDEST),
    "rms_norm_eps": (1e-30, 1),
    "max_position_embeddings": (1, MOST_POSITIONS),
    "initializer_range": (0, 10),
}
MOST_EXPERTS = 2**14
_MOE_LIMITS = {
    "num_experts": (1, MOST_EXPERTS),
    "experts_per_token": (1, MOST_EXPERTS),
    "intermediate_size": (1, WIDEST),
    "shared_intermediate_size": (1, WIDEST),
    "every": (1, MOST_LAYERS),
    "aux_coef": (0, 1e3),
}
_LINEAR_LIMITS = {
    "num_key_heads": (1, WIDEST),
    "num_value_heads": (1, WIDEST),
    "head_dim": (1, WIDEST),
    "conv_size": (1, 64),
}


def check_fields(settings: Any, limits: Mapping[str, tuple[Any, Any]], prefix: str = "") -> None:
    """Checks every field of a frozen dataclass by its annotation and `limits`, its range.

    Numbers of NumPy become Python's, so that the settings can be written as JSON.

    Raises ValueError, which names the field with `prefix` in front.
    """
    for field in dataclasses.fields(settings):
        name, kind, value = prefix + field.name, str(field.type), getattr(settings, field.name)
        if value is None and kind.endswith("| None"):
            continue
        if kind.startswith("bool"):
            check_bool(name, value)
        elif kind.startswith("int"):
            value = check_int(name, value, *limits[field.name])
        elif kind.startswith("float"):
            value = check_number(name, value, *limits[field.name])
        object.__setattr__(settings, field.name, value)


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def check_int(name: str, value: Any, low: int, high: int | None = None) -> int:
    """The value, an integer of at least `low`, and at most `high`.

    NumPy's integers are fine; a bool is none, and neither is a whole float such as 4.0.

    Raises ValueError for anything else.
    """
    if not _is(value, numbers.Integral) or value < low:
        raise ValueError(f"{name} must be an integer >= {low}, got {shown(value)}")
    if high is not None and value > high:
        raise ValueError(f"{name} must be an integer <= {high}, got {shown(value)}")
    return int(value)


def check_number(
    name: str, value: Any, low: float, high: float | None = None, *, above: bool = False
) -> float:
    """The value, a finite number of at least `low`, and at most `high`.

    With `above` it must be greater than `low`.

    Raises ValueError for anything else.
    """
    finite = _is(value, numbers.Real) and -math.inf < value < math.inf
    if not finite or value < low or (above and value == low):
        least = f"{'>' if above else '>='} {low:g}"
        raise ValueError(f"{name} must be a finite number {least}, got {shown(value)}")
    if high is not None and value > high:
        raise ValueError(f"{name} must be a finite number <= {high:g}, got {shown(value)}")
    return value if isinstance(value, int | float) else float(value)


def check_bool(name: str, value: Any) -> bool:
    """The value, True or False. Raises ValueError for anything else."""
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be true or false, got {shown(value)}")
    return value


def check_object(name: str, value: Any) -> dict[str, Any] | None:
    """A copy of the value, a JSON object; None if it is null. Raises ValueError for others."""
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ValueError(f"{name} must be a JSON object, got {shown(value)}")
    return dict(value)


def check_choice(name: str, value: Any, choices: Iterable[str]) -> str:
    """The value, one of the choices. Raises ValueError for anything else, with a suggestion."""
    known = list(choices)
    if not isinstance(value, str) or value not in known:
        raise ValueError(
            f"{name} {shown(value)} is unknown{nearest(value, known)}; use one of "
            f"{', '.join(known)}"
        )
    return value


def nearest(name: Any, known: Iterable[str]) -> str:
    """ ", did you mean 'x'?" if one of the known names is like this one, else nothing."""
    lower = {candidate.lower(): candidate for candidate in known}
    found = difflib.get_close_matches(str(name)[:80].lower(), list(lower), 1)
    return f", did you mean {lower[found[0]]!r}?" if found else ""


def names(keys: Iterable[Any], most: int = 8) -> str:
    """Keys as messages list them: sorted, and no more than `most` of them."""
    found = sorted({shown(key) for key in keys})
    more = f" and {len(found) - most} more" if len(found) > most else ""
    return ", ".join(found[:most]) + more


def shown(value: Any) -> str:
    """A value as messages show it: on one line, and no longer than is useful."""
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):  # such as an integer of more digits than Python writes
        text = f"a value of type {type(value).__name__} that is too long to show"
    return text if len(text) <= 80 else f"{text[:77]}..."


@dataclasses.dataclass(frozen=True)
class RopeConfig:
    """Rotary embedding: base, rotated part of a head, and long-context scaling by `rope_type`.

    Fields other than `theta` and `rope_type` carry the names and meanings of `rope_parameters` in
    config.json; `None` means "not stored". `partial_rotary_factor` is the part of each head that is
    rotated, its first channels; None: all of it. `llama_4_scaling_beta` scales the rotated queries
    of attention with the token's position p by 1 + beta * log(1 + floor(p / original context)).
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
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None
    partial_rotary_factor: float | None = None
    llama_4_scaling_beta: float | None = None

    def __post_init__(self) -> None:
        prefix = "rope_parameters."
        if not isinstance(self.rope_type, str) or self.rope_type not in SCALINGS:
            raise ValueError(
                f"rope_type {shown(self.rope_type)} is not supported; set {prefix}rope_type to "
                "'default', 'linear', 'llama3' or 'yarn'"
            )
        check_number("rope_theta", self.theta, *_ROPE_LIMITS["theta"])
        check_fields(self, _ROPE_LIMITS, prefix)
        given = {f.name for f in dataclasses.fields(self)[2:] if getattr(self, f.name) is not None}
        known = {*SCALINGS[self.rope_type], "partial_rotary_factor"}
        if self.llama_4_scaling_beta is not None:
            known |= {"llama_4_scaling_beta", "original_max_position_embeddings"}
            if self.original_max_position_embeddings is None:
                raise ValueError(
                    f"{prefix}llama_4_scaling_beta needs {prefix}original_max_position_embeddings"
                )
        if foreign := given - known:
            raise ValueError(f"{names(foreign)} mean nothing with rope_type {self.rope_type!r}")
        if self.rope_type != "default" and self.factor is None:
            raise ValueError(f"rope_type {self.rope_type!r} needs {prefix}factor >= 1, got None")
        if self.rope_type == "yarn" and self.theta == 1:
            raise ValueError("rope_type 'yarn' needs a rope_theta above 1")
        if self.rope_type == "llama3":
            low, high = self.low_freq_factor, self.high_freq_factor
            if low is None or high is None or self.original_max_position_embeddings is None:
                raise ValueError(
                    f"rope_type 'llama3' needs {prefix}low_freq_factor, high_freq_factor and "
                    "original_max_position_embeddings"
                )
            if high <= low:
                raise ValueError(
                    f"{prefix}high_freq_factor {high:g} must be above low_freq_factor {low:g}"
                )


@dataclasses.dataclass(frozen=True)
class MoEConfig:
    """A mixture of experts in place of the MLP: a router sends each token to a few SwiGLU experts.

    Attributes:
      num_experts: experts of a layer.
      experts_per_token: how many of them a token goes to.
      intermediate_size: width of an expert.
      renormalize: the weights of a token's experts are divided by their sum.
      shared_intermediate_size: width of a further expert that all tokens go to, behind a sigmoid
        gate of its own; None: there is none.
      every: layer i is sparse if (i + 1) % every == 0.
      dense_layers: layers that keep an MLP all the same.
      aux_coef: weight of the load-balancing loss in training (`router_aux_loss_coef`).
    """

    num_experts: int = 128
    experts_per_token: int = 8
    intermediate_size: int = 768
    renormalize: bool = True
    shared_intermediate_size: int | None = None
    every: int = 1
    dense_layers: tuple[int, ...] = ()
    aux_coef: float = 0.001

    def __post_init__(self) -> None:
        layers = self.dense_layers
        if isinstance(layers, str) or not isinstance(layers, Iterable):
            raise ValueError(f"moe.dense_layers must be a list of layers, got {shown(layers)}")
        layers = tuple(check_int("moe.dense_layers", i, 0, MOST_LAYERS) for i in layers)
        object.__setattr__(self, "dense_layers", layers)
        check_fields(self, _MOE_LIMITS, "moe.")
        if self.experts_per_token > self.num_experts:
            raise ValueError(
                f"moe.experts_per_token {self.experts_per_token} must be at most num_experts "
                f"{self.num_experts}"
            )


@dataclasses.dataclass(frozen=True)
class LinearHeads:
    """Heads of GKA and GDN where they are not those of attention (Qwen3-Next).

    Attributes:
      num_key_heads: of queries and keys; they are repeated to the number of value heads.
      num_value_heads: a multiple of them.
      head_dim: of all three.
      conv_size: taps of the convolutions of layers whose settings do not say.
    """

    num_key_heads: int = 16
    num_value_heads: int = 32
    head_dim: int = 128
    conv_size: int = 4

    def __post_init__(self) -> None:
        check_fields(self, _LINEAR_LIMITS, "linear.")
        if self.num_value_heads % self.num_key_heads:
            raise ValueError(
                f"linear.num_value_heads {self.num_value_heads} must be a multiple of "
                f"num_key_heads {self.num_key_heads}"
            )


class Heads(NamedTuple):
    """Heads of queries, of keys and of values, and the channels of each."""

    q: int
    k: int
    v: int
    dim: int


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
      bmojo_bias: biases of q, k and v in the attention of B'MOJO-F; None: as `qkv_bias`.
      mlp_bias: biases of the three projections of the MLP.
      output_gate: the outputs of attention are multiplied by the sigmoid of a gate, which q_proj
        makes beside the queries. Not in B'MOJO-F.
      zero_centered_norm: the norms of the blocks, of queries and keys, and the last one store
        their weight minus one.
      moe: experts in place of the MLP; None: all layers are dense.
      linear: heads of GKA and GDN; None: those of attention.

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
    bmojo_bias: bool | None = None
    mlp_bias: bool = False
    output_gate: bool = False
    zero_centered_norm: bool = False
    moe: MoEConfig | None = None
    linear: LinearHeads | None = None

    def __post_init__(self) -> None:
        parts = (("rope", RopeConfig), ("moe", MoEConfig), ("linear", LinearHeads))
        for name, kind in parts:
            value = getattr(self, name)
            if not isinstance(value, kind) and (name == "rope" or value is not None):
                raise ValueError(f"{name} must be a {kind.__name__}, got {shown(value)}")
        check_fields(self, _BACKBONE_LIMITS)
        if max(self.query_width, self.key_width) > WIDEST:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} x head_dim {self.head_dim} must "
                f"be at most {WIDEST}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (rotary embedding), got {self.head_dim}")
        if self.rotary_dim < 2 or self.rotary_dim % 2:
            raise ValueError(
                f"rope_parameters.partial_rotary_factor {self.rope.partial_rotary_factor:g} must "
                f"rotate an even number of the {self.head_dim} channels of a head"
            )
        if self.linear is not None:
            heads = self.linear_heads
            if max(heads.q, heads.v) * heads.dim > WIDEST:
                raise ValueError(f"linear heads x head_dim must be at most {WIDEST}")

    @property
    def query_width(self) -> int:
        """Channels of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Channels of all key heads together; as many as of the values."""
        return self.num_key_value_heads * self.head_dim

    @property
    def rotary_dim(self) -> int:
        """Channels of a head that are rotated, the first ones."""
        return int(self.head_dim * (self.rope.partial_rotary_factor or 1))

    @property
    def linear_heads(self) -> Heads:
        """The heads of GKA and GDN: those of `linear`, or else of attention."""
        if self.linear is None:
            kv = self.num_key_value_heads
            return Heads(self.num_attention_heads, kv, kv, self.head_dim)
        c = self.linear
        return Heads(c.num_key_heads, c.num_key_heads, c.num_value_heads, c.head_dim)

    def is_sparse(self, layer: int) -> bool:
        """Whether the MLP of this layer is a mixture of experts."""
        moe = self.moe
        return moe is not None and layer not in moe.dense_layers and (layer + 1) % moe.every == 0
