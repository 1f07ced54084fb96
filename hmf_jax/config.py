"""Model configuration: reads and writes the `config.json` of primed hybrid Qwen3 models.

One frozen, hashable dataclass describes a model completely; everything else (parameter shapes,
checkpoint names, caches) is derived from it. Geometry lives only at the top level: the copies that
checkpoints store inside their mixer dicts are checked when read and derived again when written.
"""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

LAYER_KINDS = ("*", "SWA", "GKA", "GDN", "M2", "BMF")
SUPPORTED_MODEL_TYPES = ("hybrid_qwen3", "qwen3")
# Base families of the original that this package knows by name but cannot run yet.
KNOWN_MODEL_TYPES = (
    "hybrid_qwen2",
    "hybrid_llama",
    "hybrid_ministral3",
    "hybrid_qwen3_moe",
    "qwen3_next_hmf",
    "qwen3_5_moe_hmf",
    "hybrid_qwen2_5_vl",
)
# Stage-1 symbols: the mixer that is kept, and its teacher in the same layer. "*DA" has none: both
# streams of the distillation run the same attention.
FUSED: dict[str, tuple[str, str | None]] = {
    "*DA": ("*", None),
    **{f"{kind}*": (kind, "*") for kind in LAYER_KINDS[1:]},
    "GDN>GKA": ("GKA", "GDN"),
}
_SSM_ALIASES = {
    "mamba2": "M2",
    "mamba": "M2",
    "m2": "M2",
    "gdn": "GDN",
    "gated_deltanet": "GDN",
    "gka": "GKA",
    "gated_kalmanet": "GKA",
    "parallel_latent_sketch": "GKA",
}
_SSM_NAMES = {"M2": "mamba2", "GDN": "gdn", "GKA": "gka"}  # the names every reader accepts


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
class GKAConfig:
    """Gated KalmaNet settings (`gka_config`); the names are those of config.json."""

    use_alpha_connection: bool = True
    use_v_conv: bool = True
    use_forgetting_gate: bool = True
    use_forgetting_gate_kk: bool = True
    use_beta_gate: bool = True
    use_gate: bool = True
    gla_rescale: bool = True
    bp_lambda: bool = True
    num_iter: int = 30
    ridge_strength: float = 0.02
    conv_size: int = 4
    chunk_size: int = 64
    norm_eps: float = 1e-6
    solver_type: str = "chebyshev"
    kv_proj_rank: int | None = None
    kv_learnable_residual: bool = False

    def __post_init__(self) -> None:
        _check_int("gka_config.num_iter", self.num_iter, 0)
        _check_int("gka_config.conv_size", self.conv_size, 1)
        _check_int("gka_config.chunk_size", self.chunk_size, 1)
        _check_rank("gka_config.kv_proj_rank", self.kv_proj_rank)
        if self.solver_type != "chebyshev":
            raise ValueError(
                f"gka_config.solver_type {self.solver_type!r} is unknown; set it to 'chebyshev'"
            )
        if not self.ridge_strength >= 0:
            raise ValueError(f"gka_config.ridge_strength must be >= 0, got {self.ridge_strength}")


@dataclasses.dataclass(frozen=True)
class GDNConfig:
    """Gated DeltaNet settings (`gdn_config`); the names are those of config.json."""

    use_gate: bool = True
    use_short_conv: bool = True
    allow_neg_eigval: bool = False
    conv_size: int = 4
    conv_bias: bool = False
    norm_eps: float = 1e-5
    kv_proj_rank: int | None = None
    kv_learnable_residual: bool = False

    def __post_init__(self) -> None:
        _check_int("gdn_config.conv_size", self.conv_size, 1)
        _check_rank("gdn_config.kv_proj_rank", self.kv_proj_rank)


@dataclasses.dataclass(frozen=True)
class Mamba2Config:
    """Mamba2 settings (`mamba2_config`); the convolution always has four taps and a bias."""

    use_qk_norm: bool = True
    use_pos_emb: bool = False


@dataclasses.dataclass(frozen=True)
class BMojoConfig:
    """B'MOJO-F settings (`bmojo_config`); `ssm_mixer` is the layer symbol of the inner mixer."""

    window_size: int = 2048
    tie_attn_weights: bool = True
    ssm_mixer: str = "M2"

    def __post_init__(self) -> None:
        _check_int("bmojo_config.window_size", self.window_size, 1)
        if self.ssm_mixer not in _SSM_NAMES:
            kind = _SSM_ALIASES.get(str(self.ssm_mixer).lower())
            if kind is None:
                raise ValueError(
                    f"bmojo_config.ssm_mixer {self.ssm_mixer!r} is unknown; use one of "
                    f"{', '.join(sorted(_SSM_ALIASES))}"
                )
            object.__setattr__(self, "ssm_mixer", kind)


@dataclasses.dataclass(frozen=True)
class SWAConfig:
    """Sliding-window attention: query i sees the `window_size` keys (i - window_size, i]."""

    window_size: int

    def __post_init__(self) -> None:
        _check_int("swa_config.window_size", self.window_size, 1)


@dataclasses.dataclass(frozen=True)
class HybridConfig:
    """A hybrid decoder: the Qwen3 backbone and one mixer symbol per layer.

    `layer_kinds` holds one of "*" (full attention), "SWA", "GKA", "GDN", "M2", "BMF" per layer,
    index 0 first, or in stage 1 of priming a fused symbol ("*DA", "GKA*", ..., see `FUSED`).
    Settings of a mixer that a layer needs and that are left None take their
    defaults; only `swa` has none. `extra` is a JSON object (as text, so that the config stays
    hashable) of config.json keys this package does not interpret; they are written back verbatim.

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
    attention_bias: bool = False
    initializer_range: float = 0.02
    rope: RopeConfig = RopeConfig()
    layer_kinds: tuple[str, ...] = ("*",)
    gka: GKAConfig | None = None
    gdn: GDNConfig | None = None
    mamba2: Mamba2Config | None = None
    bmojo: BMojoConfig | None = None
    swa: SWAConfig | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    extra: str = "{}"

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
            _check_int(name, getattr(self, name), 1)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads {self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even (rotary embedding), got {self.head_dim}")
        _check_kinds(self.layer_kinds)
        needed = {kind for symbol in self.layer_kinds for kind in streams(symbol) if kind}
        if "BMF" in needed:
            if self.bmojo is None:
                object.__setattr__(self, "bmojo", BMojoConfig())
            assert self.bmojo is not None
            needed.add(self.bmojo.ssm_mixer)
        for kind, field, make in (
            ("GKA", "gka", GKAConfig),
            ("GDN", "gdn", GDNConfig),
            ("M2", "mamba2", Mamba2Config),
        ):
            if kind in needed and getattr(self, field) is None:
                object.__setattr__(self, field, make())
        if "SWA" in needed and self.swa is None:
            raise ValueError(
                "the pattern has SWA layers but no window: set swa_config.window_size "
                "(the original's layer-selection recipe uses 2048)"
            )

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layer_kinds)

    @property
    def hybrid_override_pattern(self) -> str:
        """The layer symbols joined by `-`, as stored in config.json."""
        return "-".join(self.layer_kinds)

    @property
    def student_kinds(self) -> tuple[str, ...]:
        """The kind of mixer that each layer has once it is unfused: "GKA*" -> "GKA"."""
        return tuple(streams(symbol)[0] for symbol in self.layer_kinds)

    @property
    def fused(self) -> bool:
        """Whether this is a stage-1 model, which has its teacher inside."""
        return any(symbol in FUSED for symbol in self.layer_kinds)

    @classmethod
    def from_json(cls, path: str | Path) -> HybridConfig:
        """Reads `path`, a config.json or a directory that holds one.

        Raises FileNotFoundError if there is none, ValueError if it describes no supported model.
        """
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} does not exist; pass a Hugging Face model directory (with config.json and "
                "*.safetensors) or a config.json"
            )
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as e:  # broken JSON or not UTF-8
            raise ValueError(f"{file} is not valid JSON ({e}); download it again") from e
        if not isinstance(data, dict):
            raise ValueError(f"{file} must hold a JSON object, found {type(data).__name__}")
        try:
            return cls.from_dict(data)
        except ValueError as e:
            raise ValueError(f"{file}: {e}") from e

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> HybridConfig:
        """Reads a config.json object of model type `hybrid_qwen3` or `qwen3` (stock, the baseline).

        Accepts new (`rope_parameters`) and legacy (`rope_theta`, `rope_scaling`) RoPE keys, mixer
        dicts with or without geometry, every alias of the inner B'MOJO-F mixer, and merges
        `gka_overrides` into `gka_config`.
        """
        rest = dict(data)
        hybrid = _take_model_type(rest)
        if rest.get("quantization_config"):
            raise ValueError(
                "quantized checkpoints are not supported; dequantize the weights to bfloat16 and "
                "remove quantization_config"
            )
        if any(k.startswith("linear_num_") for k in rest):
            raise ValueError(
                "linear_num_*_heads belongs to Qwen3-Next style models, which are not supported yet"
            )
        if (act := rest.pop("hidden_act", "silu")) not in ("silu", "swish"):
            raise ValueError(f"hidden_act {act!r} is not supported, only 'silu' is")

        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            if field.name in _PLAIN and field.name in rest:
                value = rest.pop(field.name)
                values[field.name] = tuple(value) if isinstance(value, list) else value
        heads = values.get("num_attention_heads", cls.num_attention_heads)
        if values.get("num_key_value_heads") is None:
            values["num_key_value_heads"] = heads
        if values.get("head_dim", 0) is None:
            values["head_dim"] = values.get("hidden_size", cls.hidden_size) // heads
        max_positions = values.get("max_position_embeddings", cls.max_position_embeddings)
        values["rope"] = _take_rope(rest, max_positions)
        values["layer_kinds"], window = _take_layers(rest, hybrid)

        overrides = rest.pop("gka_overrides", None)
        if overrides:
            rest["gka_config"] = {**(rest.get("gka_config") or {}), **overrides}
        swa = rest.pop("swa_config", None) or {}
        if swa.get("window_size", window) is not None:
            swa = {"window_size": window, **swa}
            values["swa"] = _section(SWAConfig, "swa_config", swa, {}, rest)
        geometry = _geometry(cls(**{k: v for k, v in values.items() if k in _SHAPE}))
        for field, (key, make) in _SECTIONS.items():
            stored = rest.pop(key, None)
            if stored is not None:
                if field == "mamba2":
                    stored = _merge_pos_emb(stored)
                values[field] = _section(make, key, stored, geometry[field], rest)
        return cls(**values, extra=json.dumps(rest, sort_keys=True))

    def to_dict(self) -> dict[str, Any]:
        """The config.json object the original loads: model type `hybrid_qwen3`.

        The mixer dicts also hold the derived geometry, because the original's serving plugin reads
        it from there.
        """
        extra = json.loads(self.extra)
        out: dict[str, Any] = {
            "architectures": ["HybridQwen3ForCausalLM"],
            "attention_dropout": 0.0,
            "dtype": "bfloat16",
            "hidden_act": "silu",
            "hybrid_override_pattern": self.hybrid_override_pattern,
            "layer_types": list(self.layer_kinds),
            "max_window_layers": 28,
            "model_type": "hybrid_qwen3",
            "num_hidden_layers": self.num_hidden_layers,
            "sliding_window": None,
            "use_cache": True,
            "use_sliding_window": False,
        }
        for name in _PLAIN:
            value = getattr(self, name)
            out[name] = list(value) if isinstance(value, tuple) else value
        rope = {k: v for k, v in dataclasses.asdict(self.rope).items() if v is not None}
        out["rope_parameters"] = {"rope_theta": rope.pop("theta"), **rope}
        geometry = _geometry(self)
        for field, (key, _) in {**_SECTIONS, "swa": ("swa_config", SWAConfig)}.items():
            section = getattr(self, field)
            if section is not None:
                derived = {**geometry.get(field, {}), **_derived(self).get(field, {})}
                out[key] = {**extra.pop(key, {}), **derived, **dataclasses.asdict(section)}
        if self.bmojo:
            out["bmojo_config"]["ssm_mixer"] = _SSM_NAMES[self.bmojo.ssm_mixer]
        if self.mamba2 and self.mamba2.use_pos_emb:
            # The serving plugin reads these two names instead.
            out["mamba2_config"].update(use_pos_embed=True, use_rotary_emb=True)
        return dict(sorted({**out, **extra}.items()))

    def override(self, changes: Mapping[str, Any]) -> HybridConfig:
        """A copy with config.json keys changed; dots reach into dicts ("gka_config.num_iter").

        The bare key `rope_theta` means the same as `rope_parameters.rope_theta`.
        """
        if not changes:
            return self
        data = self.to_dict()
        for path, value in changes.items():
            path = "rope_parameters.rope_theta" if path == "rope_theta" else path
            *parents, leaf = path.split(".")
            node = data
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = value
        return HybridConfig.from_dict(data)

    @classmethod
    def preset(
        cls, name: str, mixer: str | Sequence[str] | None = None, **overrides: Any
    ) -> HybridConfig:
        """A ready-made shape: "tiny" (tests and demos), "8b" or "32b" (Qwen3-8B / Qwen3-32B).

        `mixer` names what replaces attention in the converted half of the layers: one symbol, or
        several that take turns; "*" keeps attention everywhere. The converted layers of 8b and 32b
        are the top half of the original's layer-selection ranking. The default is GKA; the default
        tiny model has one layer of each of the six kinds. `overrides` are fields of this class
        (e.g. `layer_kinds=`).
        """
        if name not in _PRESETS:
            raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(_PRESETS)}")
        shape, num_layers, converted, window = _PRESETS[name]
        if mixer is None and name == "tiny":
            kinds: tuple[str, ...] = ("*", "GKA", "GDN", "M2", "BMF", "SWA")
        else:
            mixers = (mixer,) if isinstance(mixer, str) else tuple(mixer or ("GKA",))
            turn = {layer: mixers[n % len(mixers)] for n, layer in enumerate(converted)}
            kinds = tuple(turn.get(layer, "*") for layer in range(num_layers))
        values: dict[str, Any] = {**shape, "layer_kinds": kinds, **overrides}
        if "SWA" in values["layer_kinds"]:
            values.setdefault("swa", SWAConfig(window))
        if "BMF" in values["layer_kinds"]:
            values.setdefault("bmojo", BMojoConfig(window, ssm_mixer="GKA"))
        return cls(**values)


# Fields stored under their own names at the top level of config.json.
_PLAIN = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "max_position_embeddings",
    "tie_word_embeddings",
    "attention_bias",
    "initializer_range",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)
_SHAPE = _PLAIN[:6]
_SECTIONS: dict[str, tuple[str, type]] = {
    "gka": ("gka_config", GKAConfig),
    "gdn": ("gdn_config", GDNConfig),
    "mamba2": ("mamba2_config", Mamba2Config),
    "bmojo": ("bmojo_config", BMojoConfig),
}
# Stored copies of top-level values that no shape depends on: derived again, never compared.
_DERIVED = ("intermediate_size", "hidden_act", "rms_norm_eps", "n_layer")
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


def streams(symbol: str) -> tuple[str, str | None]:
    """The mixer kind of a layer symbol and its teacher's: "GKA*" -> ("GKA", "*").

    Without a teacher of its own (a plain symbol, "*DA") both streams run the same mixer.
    """
    return FUSED.get(symbol, (symbol, None))


def _check_int(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} must be an integer >= {low}, got {value!r}")


def _check_rank(name: str, value: Any) -> None:
    if value is not None:
        _check_int(name, value, 1)


def _check_kinds(kinds: Sequence[str]) -> None:
    if not kinds:
        raise ValueError("layer_kinds is empty; give one symbol per layer")
    for i, kind in enumerate(kinds):
        if kind not in LAYER_KINDS and kind not in FUSED:
            known = ", ".join([*LAYER_KINDS, *FUSED])
            raise ValueError(f"layer {i} has the unknown symbol {kind!r}; known are {known}")


def _take_model_type(rest: dict[str, Any]) -> bool:
    """True for a hybrid config, False for a stock Qwen3; raises for families that cannot run."""
    architectures = rest.pop("architectures", None) or []
    model_type = rest.pop("model_type", None)
    if model_type is None:
        names = {"HybridQwen3ForCausalLM": "hybrid_qwen3", "Qwen3ForCausalLM": "qwen3"}
        model_type = next((names[a] for a in architectures if a in names), None)
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise ValueError(
            f"model_type {model_type!r} is not supported; supported are "
            f"{', '.join(SUPPORTED_MODEL_TYPES)}. Known base families that are not supported yet: "
            f"{', '.join(KNOWN_MODEL_TYPES)}"
        )
    return model_type == "hybrid_qwen3" or "hybrid_override_pattern" in rest


def _take_rope(rest: dict[str, Any], max_positions: int) -> RopeConfig:
    """RoPE settings from new or legacy keys, resolved in transformers 5's order.

    Base: rope_parameters.rope_theta, then rope_theta, then 10000. A non-null legacy rope_scaling
    replaces rope_parameters as a whole, so the base then comes from rope_theta.
    """
    parameters = rest.pop("rope_parameters", None)
    scaling = rest.pop("rope_scaling", None)
    theta = rest.pop("rope_theta", None)
    stored = dict(scaling or parameters or {})
    stored = {k: v for k, v in stored.items() if v is not None}
    legacy = stored.pop("type", "default")
    values = {"rope_type": stored.pop("rope_type", legacy)}
    values["theta"] = float(stored.pop("rope_theta", 10000.0 if theta is None else theta))
    if (partial := stored.pop("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError(f"partial_rotary_factor {partial} is not supported, only 1.0 is")
    original = rest.pop("original_max_position_embeddings", None)
    if values["rope_type"] == "yarn":
        original = original or stored.pop("original_max_position_embeddings", max_positions)
        stored["original_max_position_embeddings"] = original
    names = {f.name for f in dataclasses.fields(RopeConfig)}
    if unknown := sorted(set(stored) - names):
        raise ValueError(
            f"unknown rope_parameters {', '.join(unknown)}; remove them or use those of 'yarn'"
        )
    return RopeConfig(**values, **stored)


def _take_layers(rest: dict[str, Any], hybrid: bool) -> tuple[tuple[str, ...], int | None]:
    """The layer symbols, and the attention window given by the base model's keys (or None)."""
    layer_types = rest.pop("layer_types", None)
    sliding, first = rest.pop("sliding_window", 4096), rest.pop("max_window_layers", 28)
    window = sliding if rest.pop("use_sliding_window", False) else None
    count = rest.pop("num_hidden_layers", None)
    pattern = rest.pop("hybrid_override_pattern", None)
    if hybrid and pattern is None and not set(layer_types or ["?"]) <= {*LAYER_KINDS, *FUSED}:
        raise ValueError(
            "hybrid_override_pattern is missing; set it to one symbol per layer joined by '-', "
            "e.g. '*-GKA-*-GKA'"
        )
    if pattern is not None:
        if not isinstance(pattern, str):
            raise ValueError(f"hybrid_override_pattern must be a string, got {pattern!r}")
        kinds = tuple(pattern.split("-"))
        _check_kinds(kinds)
    elif hybrid:
        kinds = tuple(layer_types)
    else:
        if layer_types is None:
            count = 32 if count is None else count
            _check_int("num_hidden_layers", count, 1)
            slides = [window is not None and i >= first for i in range(count)]
        else:
            if unknown := set(layer_types) - {"full_attention", "sliding_attention"}:
                raise ValueError(f"layer_types has unknown entries {sorted(map(str, unknown))}")
            slides = [t == "sliding_attention" for t in layer_types]
        if any(slides) and window is None:
            raise ValueError(
                "layer_types has sliding_attention but no window is active: set use_sliding_window "
                "to true and sliding_window to a number of tokens"
            )
        kinds = tuple("SWA" if s else "*" for s in slides)
    if count is not None and count != len(kinds):
        raise ValueError(
            f"the layer pattern has {len(kinds)} symbols but num_hidden_layers is {count}; "
            "give exactly one symbol per layer"
        )
    return kinds, window


def _merge_pos_emb(stored: Mapping[str, Any]) -> dict[str, Any]:
    """The original's model code writes use_pos_emb; its serving plugin reads the other names."""
    out = dict(stored)
    names = ("use_pos_emb", "use_pos_embed", "use_rotary_emb")
    found = {n: bool(out.pop(n)) for n in names if out.get(n) is not None}
    if len(set(found.values())) > 1:
        raise ValueError(f"mamba2_config contradicts itself: {found}; make them equal")
    if found:
        out["use_pos_emb"] = any(found.values())
    return out


def _section[T](
    make: type[T], key: str, stored: Any, geometry: Mapping[str, Any], rest: dict[str, Any]
) -> T:
    """Builds a mixer config, checks stored geometry, and leaves unknown keys in `rest[key]`."""
    if not isinstance(stored, Mapping):
        raise ValueError(f"{key} must be a JSON object, got {stored!r}")
    values, unknown = {}, {}
    names = {f.name for f in dataclasses.fields(make)}  # type: ignore[arg-type]
    for name, value in stored.items():
        if name in names:
            values[name] = value
        elif name in geometry:
            if isinstance(value, Mapping):  # a partial ssm_cfg is checked as far as it goes
                wrong = any(value[k] != geometry[name].get(k, value[k]) for k in value)
            else:
                wrong = value is not None and value != geometry[name]
            if wrong:
                raise ValueError(
                    f"{key}.{name} is {value!r} but the top level of the config gives "
                    f"{geometry[name]!r}; correct one of them"
                )
        elif name not in _DERIVED:
            unknown[name] = value
    if unknown:
        if not set(unknown) <= {"cache_aprods", "use_qk_norm"}:
            warnings.warn(f"{key}: ignoring unknown keys {sorted(unknown)}", stacklevel=4)
        rest[key] = unknown
    return make(**values)


def _geometry(config: HybridConfig) -> dict[str, dict[str, Any]]:
    """Per mixer, the geometry keys the original stores, derived from the top level."""
    d, head_dim = config.hidden_size, config.head_dim
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    linear = {
        "hidden_size": d,
        "head_dim": head_dim,
        "num_q_heads": heads,
        "num_k_heads": kv_heads,
        "num_v_heads": kv_heads,
    }
    mamba2 = {
        "d_model": d,
        "d_inner": heads * head_dim,
        "d_xb": kv_heads * head_dim,
        "ssm_cfg": {"expand": 1, "ngroups": heads, "d_state": head_dim},
    }
    bmojo = {
        "hidden_size": d,
        "head_dim": head_dim,
        "num_heads": heads,
        "num_key_value_heads": kv_heads,
    }
    return {"gka": linear, "gdn": linear, "mamba2": mamba2, "bmojo": bmojo}


def _derived(config: HybridConfig) -> dict[str, dict[str, Any]]:
    return {
        "mamba2": {
            "intermediate_size": config.intermediate_size,
            "hidden_act": "silu",
            "rms_norm_eps": config.rms_norm_eps,
            "n_layer": config.num_hidden_layers,
        },
        "bmojo": {"rms_norm_eps": config.rms_norm_eps},
    }
