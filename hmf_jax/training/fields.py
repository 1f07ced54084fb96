"""Fields of a YAML file: how they are read, their types and ranges. An error is one line."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import re
import types
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from hmf_jax.options import nearest, shown

_INT32 = 2**31 - 1  # JAX counts steps and positions in int32
_LARGEST_FILE = 10 * 2**20


class Range(NamedTuple):
    """Values that a number may have: low <= x <= high, or low < x < high if `inside`."""

    low: float
    high: float = _INT32
    inside: bool = False

    def holds(self, x: float) -> bool:
        if self.inside:
            return self.low < x < self.high
        return self.low <= x <= self.high

    def __str__(self) -> str:
        if self.inside and self.high == math.inf:
            return "positive and finite" if self.low == 0 else f"finite and above {self.low}"
        if self.inside:
            return f"above {self.low} and below {self.high}"
        return f"at least {self.low}" + (f", at most {self.high:g}" if self.high < _INT32 else "")


Count = Annotated[int, Range(1)]
Positive = Annotated[float, Range(0, math.inf, inside=True)]


def check_types(config: Any) -> None:
    """Types and ranges of the fields of a frozen dataclass, as its hints say; makes floats of ints,
    tuples of lists and text of paths.

    Raises ValueError naming the field.
    """
    hints = typing.get_type_hints(type(config), include_extras=True)
    for name in (f.name for f in dataclasses.fields(config)):
        object.__setattr__(config, name, typed(name, getattr(config, name), hints[name]))


def typed(name: str, value: Any, hint: Any) -> Any:
    """The value as a field of this type holds it; ValueError if it cannot hold it."""
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    options = typing.get_args(hint) if union else (hint,)
    kinds = [typing.get_args(o)[0] if typing.get_origin(o) is Annotated else o for o in options]
    value = _plain(value)
    for option, kind in zip(options, kinds, strict=True):
        fits, found = _fit(name, value, kind, number_of_text=str not in kinds)
        if not fits:
            continue
        for bounds in getattr(option, "__metadata__", ()):
            if not bounds.holds(found):
                raise ValueError(f"{name}={shown(value)} must be {bounds}")
        return found
    wanted = " or ".join(dict.fromkeys(map(_words, kinds)))
    raise ValueError(f"{name} must be {wanted}, not {shown(value)}")


def _plain(value: Any) -> Any:
    """Numbers of NumPy as Python's; a path as text."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0:
        return value.item()
    return value


def _fit(name: str, value: Any, kind: Any, *, number_of_text: bool) -> tuple[bool, Any]:
    """Whether a type can hold the value, and what it then holds."""
    origin, args = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is Literal:
        return type(value) in map(type, args) and value in args, value
    if origin is float:
        if type(value) is str and number_of_text:
            with contextlib.suppress(ValueError):
                return True, float(value)
        return type(value) in (int, float), _float(value)
    if origin is list and isinstance(value, list | tuple):
        return True, [typed(f"{name}[{i}]", v, args[0]) for i, v in enumerate(value)]
    if origin is tuple and isinstance(value, list | tuple) and len(value) == len(args):
        return True, tuple(typed(name, v, a) for v, a in zip(value, args, strict=True))
    if origin is dict and isinstance(value, Mapping):
        return True, {
            typed(f"a key of {name}", k, args[0]): v
            if args[1] is Any
            else typed(f"{name}.{k}", v, args[1])
            for k, v in value.items()
        }
    return type(value) is origin and origin not in (list, tuple, dict), value


def _float(value: Any) -> Any:
    """The number as a float: infinite if it is too large for one."""
    try:
        return float(value) if type(value) in (int, float) else value
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _words(kind: Any) -> str:
    if typing.get_origin(kind) is Literal:
        return " or ".join(map(repr, typing.get_args(kind)))
    names = {type(None): "null", dict: "a mapping", list: "a list", tuple: "a list", str: "text"}
    origin = typing.get_origin(kind) or kind
    if origin is tuple:
        return f"a list of {len(typing.get_args(kind))} numbers"
    return names.get(origin, getattr(origin, "__name__", str(origin)))


def unknown(name: Any, known: Iterable[str]) -> str:
    """What to say of a field that does not exist: the nearest one that does."""
    names = list(known)
    hint = nearest(name, names).removeprefix(", ") or f"known are {', '.join(names)}"
    return f"unknown field {shown(name)}; {hint}"


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The fields of a YAML file, read strictly: numbers as people write them (1e-4 is one, 010 is
    ten), every key once, no aliases, UTF-8, at most 10 MB.

    Raises:
      ImportError: PyYAML is missing.
      OSError: there is no such file, or it cannot be read.
      ValueError: not YAML, or no fields.
    """
    path = Path(path).expanduser()
    if path.stat().st_size > _LARGEST_FILE:
        raise ValueError(f"{path} has more than 10 MB; is this the file of fields?")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise ValueError(f"{path}: byte {e.start} is not UTF-8; save the file as UTF-8") from e
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict) or not values:
        raise ValueError(f"{path} must hold fields, one `name: value` per line")
    return values


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text, as `read_yaml` reads it; ValueError says where it came from."""
    yaml = yaml_module()
    try:
        return yaml.load(text, _loader())
    except yaml.YAMLError as e:
        mark = getattr(e, "problem_mark", None)
        line = "" if mark is None else f" line {mark.line + 1}:"
        problem = getattr(e, "problem", None) or str(e)
        raise ValueError(f"{where}: no YAML:{line} {' '.join(problem.split())}") from e
    except ValueError as e:
        raise ValueError(f"{where}: no YAML: {e}") from e


@functools.cache
def _loader() -> Any:
    """A loader for the YAML that people write into configs."""
    yaml = yaml_module()

    class Loader(yaml.SafeLoader):
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            mark, problem = self.peek_event().start_mark, None
            if self.check_event(yaml.AliasEvent):  # a few can stand for any number of values
                problem = "aliases are not read; write the value out"
            elif self.depth > 20:
                problem = "nested too deeply"
            if problem:
                raise yaml.composer.ComposerError(None, None, problem, mark)
            self.depth += 1
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[str] = set()
            for key, _ in node.value:
                name = key.value if isinstance(key.value, str) else str(key.tag)
                if name in seen:
                    problem = f"{name!r} is given twice"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(name)
            return super().construct_mapping(node, deep)

    numbers = {"tag:yaml.org,2002:int", "tag:yaml.org,2002:float", "tag:yaml.org,2002:timestamp"}
    Loader.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in rules if tag not in numbers]
        for first, rules in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }
    digits = r"[0-9]+(?:_[0-9]+)*"
    exponent = r"(?:[eE][-+]?[0-9]+)"
    whole = re.compile(rf"^[-+]?{digits}$")
    real = re.compile(
        rf"^(?:[-+]?(?:{digits}\.[0-9]*{exponent}?|\.[0-9]+{exponent}?|{digits}{exponent})"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    )
    Loader.add_implicit_resolver("tag:yaml.org,2002:int", whole, list("-+0123456789"))
    Loader.add_implicit_resolver("tag:yaml.org,2002:float", real, list("-+0123456789."))
    Loader.add_constructor(
        "tag:yaml.org,2002:int", lambda loader, node: int(loader.construct_scalar(node))
    )
    return Loader


def yaml_module() -> Any:
    """PyYAML; ImportError, which says how to install it, if it is missing."""
    try:
        import yaml
    except ImportError as e:
        raise ImportError("configs are read with PyYAML: pip install 'hmf-jax[train]'") from e
    return yaml
