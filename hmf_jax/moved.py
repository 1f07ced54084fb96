"""Names that are no longer where they were: asking for one says where it went."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NoReturn


def moved(module: str, names: Mapping[str, str]) -> Callable[[str], NoReturn]:
    """The `__getattr__` of a module whose `names` went elsewhere: {name: the rest of the error}.

    The error is an ImportError: of an AttributeError `from module import name` keeps no word.
    """

    def find(name: str) -> NoReturn:
        if name in names:
            raise ImportError(f"{module}.{name} {names[name]}.")
        raise AttributeError(f"module {module!r} has no attribute {name!r}")

    return find
