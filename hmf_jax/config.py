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

import numpy as np

from hmf_jax import families, keys, overrides, presets
from hmf_jax.convert.reading import read_json
from hmf_jax.families import FAMILIES, KNOWN_MODEL_TYPES
from hmf_jax.keys import TOKENS
from hmf_jax.mixers import (
    BASE,
    KINDS,
    Sections,
    all_sections,
    check_symbols,
    fused_symbols,
    kinds_within,
    sections_of,
    split_symbol,
)
from hmf_jax.options import (
    MOST_ITERATIONS,
    Backbone,
    RopeConfig,
    check_choice,
    names,
    nearest,
    shown,
)
from hmf_jax.pallas_kernels.compat import is_traced
from hmf_jax.sections import check_sections, stored_section, take_sections

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
    extra: str = dataclasses.field(default="{}", repr=False)
    stock: str | None = dataclasses.field(default=None, repr=False)

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
        kinds = [section.attribute for section in all_sections()]
        given = {name: options.pop(name) for name in kinds if name in options}
        if attention_bias is not None:
            options |= {"qkv_bias": attention_bias, "o_bias": attention_bias}
        fields = [field.name for field in dataclasses.fields(Backbone)]
        if foreign := [name for name in options if name not in fields]:
            hint = nearest(foreign[0], [*fields, *kinds, *_OWN])
            raise TypeError(f"HybridConfig has no option {foreign[0]!r}{hint}")
        super().__init__(**options)
        if isinstance(layer_kinds, str):
            raise ValueError(f"layer_kinds must be a tuple of symbols, got {shown(layer_kinds)}")
        layer_kinds = tuple(layer_kinds)
        check_symbols(layer_kinds)
        needed = {kind for symbol in layer_kinds for kind in split_symbol(symbol) if kind}
        check_choice("family", family, FAMILIES)
        own = {
            "layer_kinds": layer_kinds,
            "sections": sections_of(needed, check_sections({**(sections or {}), **given}), self),
            "pad_token_id": keys.check_token("pad_token_id", pad_token_id),
            "bos_token_id": keys.check_token("bos_token_id", bos_token_id),
            "eos_token_id": keys.check_tokens("eos_token_id", eos_token_id),
            "family": family,
            "extra": _check_text("extra", extra),
            "stock": None if stock is None else _check_text("stock", stock),
        }
        for name, value in own.items():
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        """The settings of a kind of layer, or None."""
        if any(section.attribute == name for section in all_sections()):
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
        if self.stock is None or not set(self.layer_kinds) <= {*FAMILIES[self.family].base_kinds}:
            return False
        kinds = [KINDS[symbol] for symbol in self.layer_kinds]
        unsaid = [k.section for k in kinds if k.section and not k.base_keys(self.sections)]
        # What base models do not say must be what it always is there.
        return all(self.sections[s.attribute] == s.type(**s.defaults(self)) for s in unsaid)

    @property
    def foreign_layers(self) -> tuple[str, ...]:
        """The symbols of layers that the original has not in this family: it cannot load them."""
        lacks, found = FAMILIES[self.family].unreadable, []
        for symbol in dict.fromkeys(() if self.is_stock else self.layer_kinds):
            kinds = [kind for kind in split_symbol(symbol) if kind]
            inner = [f"{k}:{i}" for k in kinds for i in KINDS[k].inner(self.sections)]
            if any(name in lacks for name in (symbol, *kinds, *inner)):
                found.append(symbol)
        return tuple(found)

    def check_for_original(self, directory: str | Path) -> None:
        """Raises ValueError if the original could not load this model from `directory`."""
        if foreign := self.foreign_layers:
            raise ValueError(
                f"nothing written to {directory}: the original has no {', '.join(foreign)} layers "
                f"in the family {self.family}; for_original=False (hmf-jax convert "
                "--not-for-original) writes them for this package alone"
            )

    @property
    def solves(self) -> bool:
        """Whether there are layers that iterate: GKA, also inside B'MOJO-F, or as a teacher."""
        kinds = {kind for symbol in self.layer_kinds for kind in split_symbol(symbol) if kind}
        return any(kind.solves for kind in kinds_within(kinds, self.sections))

    def check_num_iter(self, value: Any) -> None:
        """Looks at a number of solver iterations that a call gives in place of the config's.

        Raises ValueError unless it is None, or the model has layers that iterate (GKA, also inside
        B'MOJO-F) and the number, or each one of an array of them, is from 0 to 1000. What is known
        only when a program runs is not looked at.
        """
        if value is None:
            return
        if not is_traced(value):
            given = np.asarray(value)
            whole = given.dtype.kind in "iu" and given.ndim < 2 and given.size > 0
            if not whole or given.min() < 0 or given.max() > MOST_ITERATIONS:
                limits = f">= 0 and <= {MOST_ITERATIONS}"
                raise ValueError(f"num_iter={shown(value)} must be a whole number {limits}")
        if not self.solves:
            raise ValueError("this model has no GKA layers: leave num_iter out")

    @classmethod
    def from_json(cls, path: str | Path) -> HybridConfig:
        """Reads `path`, a config.json or a directory that holds one.

        Raises FileNotFoundError if there is none, ValueError if it describes no supported model.
        """
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        if not file.exists():
            raise FileNotFoundError(
                f"{file} does not exist; pass a Hugging Face model directory (with config.json and "
                "*.safetensors) or a config.json"
            )
        data = read_json(file, limit=1 << 22)
        try:
            config, notes = cls._read(data)
        except ValueError as e:
            raise ValueError(f"{file}: {e}") from e
        _warn(notes, file)
        return config

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> HybridConfig:
        """Reads a config.json object: a hybrid's, a base model's, or the text part of a model with
        images; `hmf_jax.families.model_types()` lists the model types.

        Accepts new (`rope_parameters`) and legacy (`rope_theta`, `rope_scaling`) RoPE keys, mixer
        dicts with or without geometry, every alias of the inner B'MOJO-F mixer, and merges
        `gka_overrides` into `gka_config`.
        """
        config, notes = cls._read(data)
        _warn(notes)
        return config

    @classmethod
    def _read(cls, data: Mapping[str, Any]) -> tuple[HybridConfig, list[str]]:
        """`from_dict`, and a line for everything in `data` that has no effect."""
        if not isinstance(data, Mapping):
            raise ValueError(f"config.json must be a JSON object, got {shown(data)}")
        notes: list[str] = []
        data = families.text_part(data, notes)
        rest = dict(data)
        family, hybrid = families.take_family(rest)
        rest = families.fill_in(rest, family, hybrid, notes)
        if rest.get("quantization_config"):
            raise ValueError(
                "quantized checkpoints are not supported; dequantize the weights to bfloat16 and "
                "remove quantization_config"
            )
        if (act := rest.pop("hidden_act", "silu")) not in ("silu", "swish"):
            raise ValueError(f"hidden_act {shown(act)} is not supported, only 'silu' is")
        values = keys.take_backbone(rest, family, notes)
        values["layer_kinds"] = keys.take_layers(rest, family, hybrid, notes)
        options = [field.name for field in dataclasses.fields(Backbone)]
        backbone = Backbone(**{k: v for k, v in values.items() if k in options})
        values |= keys.take_tokens(rest, backbone.vocab_size, notes)
        sections = take_sections(rest, backbone, len(values["layer_kinds"]), notes)
        kept = {section.key for section in all_sections()} | {"rope_parameters"}
        keys.check_rest({k: v for k, v in rest.items() if k not in kept}, family, notes)
        known = _constants(family) if hybrid else {}  # written in any case
        config = cls(
            **values,
            sections=sections,
            family=family.name,
            extra=_text({k: v for k, v in rest.items() if k not in known or v != known[k]}),
            stock=None if hybrid else _text(data),
        )
        return config, notes

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
        for name, other in (families.EXPERTS, families.EXPERTS[::-1]):
            if name in read and other in out:  # its name there
                out[name] = out.pop(other)
        if not self._as_read(read):
            # One value may imply another: only what means nothing here stays as it was read.
            implied = {*legacy, *keys.read_by(FAMILIES[self.family])}
            read = {k: v for k, v in read.items() if k not in out and k not in implied}
        elif "rope_parameters" not in read and any(k in read for k in legacy):
            del out["rope_parameters"]
        return dict(sorted({**out, **read}.items()))

    def _as_read(self, read: Mapping[str, Any]) -> bool:
        """Whether nothing has changed since a base model was read from this config.json."""
        return HybridConfig._read(read)[0]._keys() == self._keys()

    def _keys(self, *, copies: bool = True) -> dict[str, Any]:
        """config.json with every key under its present name; `copies`: see `Section`."""
        family, kinds = FAMILIES[self.family], [KINDS.get(symbol) for symbol in self.layer_kinds]
        out: dict[str, Any] = {
            **keys.backbone_keys(self, family),
            "dtype": "bfloat16",
            "hidden_act": "silu",
            "num_hidden_layers": self.num_hidden_layers,
        }
        for name in TOKENS:
            value = getattr(self, name)
            out[name] = list(value) if isinstance(value, tuple) else value
        extra = json.loads(self.extra)
        out["rope_parameters"] |= extra.pop("rope_parameters", {})
        if self.is_stock:
            out["model_type"], out["architectures"] = family.stock[0], [family.architectures[1]]
            if "GDN" in family.base_kinds or family.windows == "from":
                out["layer_types"] = [kind.layer_type for kind in kinds if kind]
            for kind in kinds:
                out |= kind.base_keys(self.sections) if kind else {}
            if family.windows == "always":
                out.pop("use_sliding_window", None)
        else:
            out |= _constants(family)
            out["model_type"], out["architectures"] = family.hybrid, [family.architectures[0]]
            if family.layer_types:
                out["layer_types"] = keys.layer_types(self.layer_kinds, family)
            out["hybrid_override_pattern"] = self.hybrid_override_pattern
            for section in all_sections():
                if section.attribute in self.sections:
                    settings = self.sections[section.attribute]
                    stored = stored_section(
                        section, settings, self, self.num_hidden_layers, copies=copies
                    )
                    out[section.key] = {**extra.pop(section.key, {}), **stored}
        return dict(sorted({**out, **extra}.items()))

    def override(self, changes: Mapping[str, Any]) -> HybridConfig:
        """A copy with config.json keys changed; dots reach into dicts ("gka_config.num_iter").

        It is what config.json would be read as with these values written into it. Where a setting
        has several names there, each of them changes it (`rope_theta` is
        `rope_parameters.rope_theta`, `rope_scaling` is `rope_parameters`, `gka_overrides.num_iter`
        is `gka_config.num_iter`), and new `rope_parameters` without a base keep the base.

        Raises ValueError for keys that nothing reads, for changes that contradict each other or
        have no effect, and for values that cannot form a model.
        """
        if not isinstance(changes, Mapping):
            raise ValueError(f"config_overrides must be a dict of keys, got {shown(changes)}")
        if not changes:
            return self
        if changed := {"dtype", "torch_dtype"} & changes.keys():
            raise ValueError(
                f"{changed.pop()} of config.json has no effect: pass dtype= when the model is made"
            )
        read = json.loads(self.stock or "{}")
        if not self.is_stock:
            data = self._keys(copies=False)
        else:
            data = read if self._as_read(read) else self.to_dict()
        before = HybridConfig._read(data)[1]
        data, paths = overrides.edit(data, changes)
        if not self.is_stock and ("layer_types",) in paths:
            if ("hybrid_override_pattern",) not in paths:  # which would come first
                del data["hybrid_override_pattern"]
        new, notes = HybridConfig._read(data)
        for path in overrides.unread(new.extra) - overrides.unread(self.extra):
            if {path, path[:1]} & set(paths) and not keys.is_known(path[0]):
                raise ValueError(overrides.unknown(path, self._keys()))
        hybrid = new.stock is None
        for key in families.WINDOW_KEYS:
            if (key,) in paths and data[key] and (hybrid or set(new.layer_kinds) == {BASE}):
                where = "swa_config.window_size" if hybrid else " and ".join(families.WINDOW_KEYS)
                raise ValueError(f"{key} alone has no effect: give {where}")
        _warn([note for note in notes if note not in before])
        return new

    @classmethod
    def preset(
        cls, name: str, mixer: str | Sequence[str] | None = None, **overrides: Any
    ) -> HybridConfig:
        """A ready-made shape: "tiny" (tests and demos), "8b" or "32b" (Qwen3-8B / Qwen3-32B), or a
        model of another family by its name, "llama-3.1-8b"; `hmf_jax.presets.PRESETS` has all.

        `mixer` names what replaces half of the layers: one symbol, or several that take turns; "*"
        keeps the base model's layers. In 8b and 32b it is the top half of the original's
        layer-selection ranking, in the others (no ranking was published) every second layer, and of
        Qwen3-Next two of the three Gated DeltaNet layers in front of each layer of attention. The
        default is GKA; the default tiny model has one layer of each of the six kinds. `overrides`
        are fields of this class (e.g. `layer_kinds=`).
        """
        return cls(**presets.preset(name, mixer, overrides))


_OWN = ("layer_kinds", "sections", "family", "extra", "stock", "attention_bias", *TOKENS)


def _constants(family: families.Family) -> dict[str, Any]:
    """What every hybrid of the family is written with."""
    return {"dtype": "bfloat16", **family.constants}


def _check_text(name: str, value: Any) -> str:
    try:
        if isinstance(value, str) and isinstance(json.loads(value), dict):
            return value
    except (ValueError, RecursionError):
        pass
    raise ValueError(f"{name} must be a JSON object as text, got {shown(value)}")


def _text(data: Mapping[str, Any]) -> str:
    """JSON text. Raises ValueError for what cannot be written as such."""

    def is_json(value: Any) -> bool:
        try:
            return bool(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError, RecursionError):
            return False

    if wrong := [k for k, v in data.items() if not isinstance(k, str) or not is_json(v)]:
        raise ValueError(f"{names(wrong)} of config.json is not a JSON value")
    return json.dumps(dict(data), sort_keys=True)


def _warn(notes: Sequence[str], file: str | Path = "config.json") -> None:
    for note in notes:
        warnings.warn(f"{file}: {note}", skip_file_prefixes=(str(Path(__file__).parent),))


def __getattr__(name: str) -> Any:
    """What follows from the tables of kinds and families, as it stands when it is asked for:
    LAYER_KINDS, FUSED, SUPPORTED_MODEL_TYPES and the classes of settings ("GKAConfig")."""
    if name == "LAYER_KINDS":
        return tuple(KINDS)
    if name == "FUSED":
        return fused_symbols()
    if name == "SUPPORTED_MODEL_TYPES":
        return families.model_types()
    for section in all_sections():
        if section.type.__name__ == name:
            return section.type
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
