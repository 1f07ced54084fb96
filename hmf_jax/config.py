"""Model configuration: reads and writes the `config.json` of hybrids and of their base models.

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

from hmf_jax import families, presets
from hmf_jax.families import FAMILIES, KNOWN_MODEL_TYPES
from hmf_jax.mixers import (
    KINDS,
    Section,
    Sections,
    check_symbols,
    fused_symbols,
    sections_of,
    split_symbol,
)
from hmf_jax.options import Backbone, RopeConfig

__all__ = ["KNOWN_MODEL_TYPES", "HybridConfig", "RopeConfig", "split_symbol", "streams"]

streams = split_symbol  # its older name


@dataclasses.dataclass(frozen=True, init=False)
class HybridConfig(Backbone):
    """A hybrid decoder: a backbone, and one mixer symbol per layer.

    Beside the fields of `Backbone` and those below, the settings of every kind of layer are
    arguments and attributes under their own name: `gka=`, `gdn=`, `mamba2=`, `bmojo=`, `swa=`.
    Settings that a layer needs and that are left None take their defaults; only `swa` has none.
    `attention_bias=` sets both `qkv_bias` and `o_bias`.

    Attributes:
      layer_kinds: one of "*" (full attention), "SWA", "GKA", "GDN", "M2", "BMF" per layer, index 0
        first, or in stage 1 of priming a fused symbol ("*DA", "GKA*", ...).
      sections: the settings of the kinds.
      pad_token_id, bos_token_id, eos_token_id: as in config.json.
      family: the row of `hmf_jax.families.FAMILIES` that the model belongs to.
      extra: a JSON object (as text, so that the config stays hashable) of config.json keys that
        this package does not interpret; they are written back verbatim.
      stock: of a base model the config.json that it was read from, as text: what is written again
        as long as its layers are those of a base model. None: a hybrid.

    Raises ValueError, saying what to change, for values that cannot form a model.
    """

    layer_kinds: tuple[str, ...] = ("*",)
    sections: Sections = Sections()
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    family: str = "qwen3"
    extra: str = "{}"
    stock: str | None = None

    def __init__(
        self,
        *,
        layer_kinds: tuple[str, ...] = ("*",),
        sections: Mapping[str, Any] | None = None,
        pad_token_id: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | tuple[int, ...] | None = None,
        family: str = "qwen3",
        extra: str = "{}",
        stock: str | None = None,
        attention_bias: bool | None = None,
        **options: Any,
    ) -> None:
        names = [kind.section.attribute for kind in KINDS.values() if kind.section]
        given = {name: options.pop(name) for name in names if name in options}
        if attention_bias is not None:
            options |= {"qkv_bias": attention_bias, "o_bias": attention_bias}
        super().__init__(**options)
        check_symbols(layer_kinds)
        needed = {kind for symbol in layer_kinds for kind in split_symbol(symbol) if kind}
        own = {
            "layer_kinds": layer_kinds,
            "sections": sections_of(needed, {**(sections or {}), **given}),
            "pad_token_id": pad_token_id,
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
            "family": family,
            "extra": extra,
            "stock": stock,
        }
        for name, value in own.items():
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        """The settings of a kind of layer, or None."""
        if any(kind.section and kind.section.attribute == name for kind in KINDS.values()):
            return self.sections.get(name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def attention_bias(self) -> bool:
        """Whether all four projections of attention have a bias."""
        return self.qkv_bias and self.o_bias

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
        return tuple(split_symbol(symbol)[0] for symbol in self.layer_kinds)

    @property
    def fused(self) -> bool:
        """Whether this is a stage-1 model, which has its teacher inside."""
        return any(symbol not in KINDS for symbol in self.layer_kinds)

    @property
    def is_stock(self) -> bool:
        """Whether it is stored as a base model, which other libraries load: it was read as one,
        and all its layers are of kinds that base models have."""
        base = all(symbol in KINDS and KINDS[symbol].layer_type for symbol in self.layer_kinds)
        return self.stock is not None and base

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
        """Reads a config.json object: a hybrid's, or a base model's (`hybrid_qwen3`, `qwen3`).

        Accepts new (`rope_parameters`) and legacy (`rope_theta`, `rope_scaling`) RoPE keys, mixer
        dicts with or without geometry, every alias of the inner B'MOJO-F mixer, and merges
        `gka_overrides` into `gka_config`.
        """
        rest = dict(data)
        family, hybrid = families.take_family(rest)
        rest = {**family.defaults, **rest}
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
        values = families.take_backbone(rest, family)
        for name in _TOKENS:
            value = rest.pop(name, None)
            values[name] = tuple(value) if isinstance(value, list) else value
        values["layer_kinds"] = families.take_layers(rest, family, hybrid)
        options = [field.name for field in dataclasses.fields(Backbone)]
        backbone = Backbone(**{k: v for k, v in values.items() if k in options})
        return cls(
            **values,
            sections=_take_sections(rest, backbone),
            family=family.name,
            extra=json.dumps(rest, sort_keys=True),
            stock=None if hybrid else json.dumps(dict(data), sort_keys=True),
        )

    def to_dict(self) -> dict[str, Any]:
        """The config.json object that the original loads.

        The mixer dicts also hold the derived geometry, because the original's serving plugin reads
        it from there. A base model comes back as it was read, or with what has changed since.
        """
        out = self._keys()
        if not self.is_stock:
            return out
        read, legacy = json.loads(self.stock or "{}"), families.LEGACY_ROPE
        if "torch_dtype" in read and "dtype" not in read:
            del out["dtype"]
        if HybridConfig.from_dict(read)._keys() != self._keys():
            # One value may imply another: only what means nothing here stays as it was read.
            read = {k: v for k, v in read.items() if k not in out and k not in legacy}
        elif "rope_parameters" not in read and any(k in read for k in legacy):
            del out["rope_parameters"]
        return dict(sorted({**out, **read}.items()))

    def _keys(self) -> dict[str, Any]:
        """config.json with every key under its present name."""
        family, kinds = FAMILIES[self.family], [KINDS.get(symbol) for symbol in self.layer_kinds]
        out: dict[str, Any] = {
            **families.backbone_keys(self, family),
            "dtype": "bfloat16",
            "hidden_act": "silu",
            "num_hidden_layers": self.num_hidden_layers,
        }
        for name in _TOKENS:
            value = getattr(self, name)
            out[name] = list(value) if isinstance(value, tuple) else value
        extra = json.loads(self.extra)
        if self.is_stock:
            out["model_type"], out["architectures"] = family.stock[0], [family.architectures[1]]
            out["layer_types"] = [kind.layer_type for kind in kinds if kind]
            for kind in kinds:
                out |= kind.base_keys(self.sections) if kind else {}
        else:
            out |= family.constants
            out["model_type"], out["architectures"] = family.hybrid, [family.architectures[0]]
            out["layer_types"] = list(self.layer_kinds)
            out["hybrid_override_pattern"] = self.hybrid_override_pattern
            for kind in KINDS.values():
                if kind.section and kind.section.attribute in self.sections:
                    key = kind.section.key
                    out[key] = {**extra.pop(key, {}), **_stored(kind.section, self)}
        return dict(sorted({**out, **extra}.items()))

    def override(self, changes: Mapping[str, Any]) -> HybridConfig:
        """A copy with config.json keys changed; dots reach into dicts ("gka_config.num_iter").

        The bare key `rope_theta` means the same as `rope_parameters.rope_theta`.
        """
        if not changes:
            return self
        data = self._keys()
        for path, value in changes.items():
            path = "rope_parameters.rope_theta" if path == "rope_theta" else path
            *parents, leaf = path.split(".")
            node = data
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = value
        new = HybridConfig.from_dict(data)
        return new if new.stock is None else dataclasses.replace(new, stock=self.stock)

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
        return cls(**presets.preset(name, mixer, overrides))


_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")
_QUIET = {"cache_aprods", "use_qk_norm"}  # unknown keys of sections that nobody needs to hear of


def _take_sections(top: dict[str, Any], backbone: Backbone) -> Sections:
    """The settings of all kinds. Unknown keys of a section stay at the top level, under its key."""
    found = {}
    for kind in KINDS.values():
        if kind.section is not None:
            section = kind.section
            stored = section.take(top) if section.take else top.pop(section.key, None)
            if stored is not None:
                found[section.attribute] = _take_section(section, stored, backbone, top)
    return Sections(found)


def _take_section(section: Section, stored: Any, backbone: Backbone, top: dict[str, Any]) -> Any:
    key, geometry = section.key, section.geometry(backbone)
    if not isinstance(stored, Mapping):
        raise ValueError(f"{key} must be a JSON object, got {stored!r}")
    values, unknown = {}, {}
    names = {f.name for f in dataclasses.fields(section.type)}
    copies = {
        name
        for kind in KINDS.values()
        if kind.section is not None
        for name in kind.section.derived(backbone, 1)
    }
    for name, value in section.read(stored).items():
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
        elif name not in copies:
            unknown[name] = value
    if unknown:
        if not set(unknown) <= _QUIET:
            warnings.warn(f"{key}: ignoring unknown keys {sorted(unknown)}", stacklevel=5)
        top[key] = unknown
    return section.type(**values)


def _stored(section: Section, config: HybridConfig) -> dict[str, Any]:
    """A section of config.json: the copies of the backbone's options, and the settings."""
    settings = config.sections[section.attribute]
    copies = {**section.geometry(config), **section.derived(config, config.num_hidden_layers)}
    return {**copies, **dataclasses.asdict(settings), **section.write(settings)}


def __getattr__(name: str) -> Any:
    """What follows from the tables of kinds and families, as it stands when it is asked for:
    LAYER_KINDS, FUSED, SUPPORTED_MODEL_TYPES and the classes of settings ("GKAConfig")."""
    if name == "LAYER_KINDS":
        return tuple(KINDS)
    if name == "FUSED":
        return fused_symbols()
    if name == "SUPPORTED_MODEL_TYPES":
        return families.model_types()
    for kind in KINDS.values():
        if kind.section is not None and kind.section.type.__name__ == name:
            return kind.section.type
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
