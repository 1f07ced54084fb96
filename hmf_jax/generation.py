"""The engine's names as they were called here before; see `hmf_jax.engine`."""

from __future__ import annotations

from typing import Any

from hmf_jax.engine import (
    GREEDY,
    Tokens,
    capacity_for,
    check_prompts,
    enable_compilation_cache,
    generate,
    programs,
    stream,
    warmup,
)
from hmf_jax.engine import Output as Generation

__all__ = [
    "GREEDY",
    "Generation",
    "Tokens",
    "capacity_for",
    "check_prompts",
    "enable_compilation_cache",
    "generate",
    "stream",
    "warmup",
]


class Decoder:
    """What `hmf_jax.engine.Engine` has replaced."""

    def __init__(self, *args: Any, **kwargs: Any):
        raise TypeError("hmf_jax.generation.Decoder is gone; use hmf_jax.engine.Engine")


def __getattr__(name: str) -> Any:
    if isinstance(program := getattr(programs, name.removeprefix("_"), None), programs.Program):
        return program
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
