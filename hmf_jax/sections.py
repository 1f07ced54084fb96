"""The settings of the kinds of layers in config.json: read, checked, and written."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from hmf_jax.mixers import Section, Sections, all_sections
from hmf_jax.options import Backbone, check_choice, check_object, names, shown

_QUIET = {"cache_aprods", "use_qk_norm"}  # unknown keys that nobody needs to hear of


def check_sections(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings by attribute, {"gka": GKAConfig(...)}. Raises ValueError for those of no kind."""
    types = {section.attribute: section.type for section in all_sections()}
    for name, settings in given.items():
        check_choice("settings of", name, types)
        if settings is not None and not isinstance(settings, types[name]):
            raise ValueError(f"{name} must be a {types[name].__name__}, got {shown(settings)}")
    return given


def take_sections(
    top: dict[str, Any], backbone: Backbone, layers: int, notes: list[str]
) -> Sections:
    """The settings of all kinds. Unknown keys of a section stay at the top level, under its key."""
    found = {}
    for section in all_sections():
        stored = section.take(top) if section.take else top.pop(section.key, None)
        stored = check_object(section.key, stored)
        if section.patch is not None:
            patch = check_object(section.patch, top.pop(section.patch, None))
            stored = {**(stored or {}), **patch} if patch else stored
        if stored is not None:
            found[section.attribute] = _take_section(section, stored, backbone, layers, top, notes)
    return Sections(found)


def _take_section(
    section: Section,
    stored: Mapping[str, Any],
    backbone: Backbone,
    layers: int,
    top: dict[str, Any],
    notes: list[str],
) -> Any:
    key, geometry = section.key, section.geometry(backbone)
    values, unknown = {}, {}
    fields = {f.name for f in dataclasses.fields(section.type)}
    copies: dict[str, Any] = {}
    for other in all_sections():
        copies |= other.derived(backbone, layers)
    for name, value in section.read(stored).items():
        if name in fields:
            values[name] = value
        elif name in geometry:
            if isinstance(value, Mapping) and isinstance(geometry[name], Mapping):
                # A partial ssm_cfg is checked as far as it goes.
                wrong = any(value[k] != geometry[name].get(k, value[k]) for k in value)
            else:
                wrong = value is not None and value != geometry[name]
            if wrong:
                raise ValueError(
                    f"{key}.{name} is {shown(value)} but the top level of the config gives "
                    f"{geometry[name]!r}; correct one of them"
                )
        elif name not in copies:
            unknown[name] = value
        elif value is not None and value != copies[name]:
            notes.append(f"{key}.{name} {shown(value)} has no effect: it is {copies[name]!r} here")
    if unknown:
        if foreign := unknown.keys() - _QUIET:
            notes.append(f"{key}: unknown keys that have no effect: {names(foreign)}")
        top[key] = unknown
    values = {**section.defaults(backbone), **values}
    for field in dataclasses.fields(section.type):
        needed = field.default is field.default_factory is dataclasses.MISSING
        if needed and values.get(field.name) is None:
            raise ValueError(f"{key}.{field.name} is missing")
    return section.type(**values)


def stored_section(
    section: Section, settings: Any, backbone: Backbone, layers: int, *, copies: bool = True
) -> dict[str, Any]:
    """A section of config.json; `copies`: with those of the backbone's options."""
    out = dataclasses.asdict(settings)
    if not copies:
        return out
    copied = {**section.geometry(backbone), **section.derived(backbone, layers)}
    return {**copied, **out, **section.write(settings)}
