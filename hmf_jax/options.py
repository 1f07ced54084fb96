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
from typing import Any

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
}
# What the scaling of each type of rotary embedding reads.
SCALINGS = {
    "default": (),
    "linear": ("factor",),
    "yarn": tuple(_ROPE_LIMITS)[1:] + ("truncate",),
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
        prefix = "rope_parameters."
        if not isinstance(self.rope_type, str) or self.rope_type not in SCALINGS:
            raise ValueError(
                f"rope_type {shown(self.rope_type)} is not supported; set {prefix}rope_type to "
                "'default', 'linear' or 'yarn'"
            )
        check_number("rope_theta", self.theta, *_ROPE_LIMITS["theta"])
        check_fields(self, _ROPE_LIMITS, prefix)
        given = {f.name for f in dataclasses.fields(self)[2:] if getattr(self, f.name) is not None}
        if foreign := given - set(SCALINGS[self.rope_type]):
            raise ValueError(f"{names(foreign)} mean nothing with rope_type {self.rope_type!r}")
        if self.rope_type != "default" and self.factor is None:
            raise ValueError(f"rope_type {self.rope_type!r} needs {prefix}factor >= 1, got None")
        if self.rope_type == "yarn" and self.theta == 1:
            raise ValueError("rope_type 'yarn' needs a rope_theta above 1")


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
        if not isinstance(self.rope, RopeConfig):
            raise ValueError(f"rope must be a RopeConfig, got {shown(self.rope)}")
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

    @property
    def query_width(self) -> int:
        """Channels of all query heads together."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_width(self) -> int:
        """Channels of all key heads together; as many as of the values."""
        return self.num_key_value_heads * self.head_dim
