"""Other values for keys of a config.json, as `HybridConfig.override` takes them.

A setting that has several names there is changed whichever of them is used, in the file or in the
change: nothing that is asked for has no effect because another name comes first.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping
from typing import Any

from hmf_jax.families import EXPERTS, LEGACY_ROPE
from hmf_jax.mixers import all_sections
from hmf_jax.options import SCALINGS, check_object, nearest, shown

_ROPE, _THETA = "rope_parameters", "rope_theta"
_ORIGINAL, _PARTIAL = "original_max_position_embeddings", "partial_rotary_factor"
Path = tuple[str, ...]


def edit(data: Mapping[str, Any], changes: Mapping[str, Any]) -> tuple[dict[str, Any], list[Path]]:
    """A copy of a config.json with `changes` ("a.b" reaches into a), and the paths that changed.

    Raises ValueError for changes that are no JSON, contradict each other, or reach into a value
    that is no object.
    """
    out: dict[str, Any] = json.loads(json.dumps(data))
    wanted: dict[Path, Any] = {}
    for name, value in changes.items():
        for path, new in _present_names(name, _as_json(name, value)):
            if path[0] in EXPERTS and path[0] not in out:  # its name in this file
                path = (next((known for known in EXPERTS if known in out), path[0]), *path[1:])
            if path in wanted and wanted[path] != new:
                raise ValueError(f"{'.'.join(path)} is given twice, under two of its names")
            wanted[path] = new
    if any(path[0] == _ROPE for path in wanted):
        _join_rope(out)
    if (_ROPE, _ORIGINAL) in wanted:
        out.pop(_ORIGINAL, None)  # it would come first
    if (_ROPE, _PARTIAL) in wanted:
        out[_PARTIAL] = wanted[_ROPE, _PARTIAL]  # it is stored twice
    for path in sorted(wanted, key=len):  # whole objects before what is in them
        _put(out, path, wanted[path])
    return out, list(wanted)


def unread(extra: str) -> set[Path]:
    """The keys of config.json that nothing has read, `HybridConfig.extra`."""
    found: set[Path] = set()
    inside = {section.key for section in all_sections()} | {_ROPE}
    for key, value in json.loads(extra).items():
        found |= {(key, leaf) for leaf in value} if key in inside else {(key,)}
    return found


def unknown(path: Path, top: Iterable[str]) -> str:
    """The error of a change of a key that nothing reads; `top`: keys of the top level that are."""
    rope = {f"{_ROPE}.{name}" for names in SCALINGS.values() for name in ("rope_type", *names)}
    settings = [
        f"{section.key}.{field.name}"
        for section in all_sections()
        for field in dataclasses.fields(section.type)
    ]
    known = [*top, *LEGACY_ROPE, *sorted(rope), *settings]
    name, leaf = ".".join(path), path[-1]
    if name in known:
        return f"{name} has no effect as the other keys of {path[0]} are"
    inside = [k for k in known if k != name and k.rsplit(".")[-1] == leaf]
    hint = f", did you mean {inside[0]!r}?" if inside else nearest(name, known)
    return f"{shown(name)} is not a key of config.json that has an effect{hint}"


def _as_json(name: Any, value: Any) -> Any:
    if not isinstance(name, str) or not all(name.split(".")):
        raise ValueError(f"a key of config.json is a name such as 'rope_theta', got {shown(name)}")
    try:
        number = getattr(value, "item", None)  # NumPy's numbers
        return json.loads(json.dumps(value if number is None else number(), allow_nan=False))
    except (TypeError, ValueError, RecursionError):
        raise ValueError(f"{name} must be a JSON value, got {shown(value)}") from None


def _present_names(name: str, value: Any) -> list[tuple[Path, Any]]:
    """The changes that a change under any name is: names of today, and what they become."""
    path = tuple(name.split("."))
    if path in ((_THETA,), (_PARTIAL,)):
        path = (_ROPE, *path)
    elif path[0] == "rope_scaling":
        path = (_ROPE, *path[1:])
    if path == (_ROPE, "type"):
        path = (_ROPE, "rope_type")
    for section in all_sections():
        if section.patch is not None and path[0] == section.patch:
            if len(path) > 1:
                return [((section.key, *path[1:]), value)]
            return [((section.key, k), v) for k, v in (check_object(name, value) or {}).items()]
    return [(path, value)]


def _join_rope(data: dict[str, Any]) -> None:
    """RoPE under its present names: what was in force becomes `rope_parameters`."""
    rope = dict(data.pop("rope_scaling", None) or data.get(_ROPE) or {})
    theta = data.pop(_THETA, None)
    if rope.get(_THETA) is None and theta is not None:
        rope[_THETA] = theta
    data[_ROPE] = _with_type(rope)


def _with_type(rope: dict[str, Any]) -> dict[str, Any]:
    legacy = rope.pop("type", None)
    if legacy is not None and rope.get("rope_type") is None:
        rope["rope_type"] = legacy
    return rope


def _put(data: dict[str, Any], path: Path, value: Any) -> None:
    if path == (_ROPE,):
        # Scaling is what such a change is about: the base stays, unless it is in there, too.
        new = _with_type(check_object(_ROPE, value) or {})
        kept = data[_ROPE].get(_THETA)
        if new.get(_THETA) is None and kept is not None:
            new[_THETA] = kept
        value = new
    node: Any = data
    for parent in path[:-1]:
        if node.get(parent) is None:
            node[parent] = {}
        node = node[parent]
        if not isinstance(node, dict):
            raise ValueError(f"{'.'.join(path)} reaches into {parent}, which is no JSON object")
    for section in all_sections():
        if len(path) == 2 and path[0] == section.key:  # keys may have several names in there, too
            new = dict(section.read({path[1]: value}))
            read = dict(section.read(node))
            node.clear()
            node.update({**read, **new})
            return
    node[path[-1]] = value
