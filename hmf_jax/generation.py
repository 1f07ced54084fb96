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
from hmf_jax.engine.programs import MOST_STEPS, SMALLEST_CAPACITY, SMALLEST_CHUNK, SMALLEST_HALF
from hmf_jax.engine.rows import Program

__all__ = [
    "GREEDY",
    "MOST_STEPS",
    "SMALLEST_CAPACITY",
    "SMALLEST_CHUNK",
    "SMALLEST_HALF",
    "Decoder",
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
    """Is gone: `hmf_jax.engine.Engine` runs a batch step by step."""

    def __init__(self, *args: Any, **options: Any) -> None:
        raise TypeError("hmf_jax.generation.Decoder is gone; use hmf_jax.engine.Engine")

    @classmethod
    def begin(cls, *args: Any, **options: Any) -> Decoder:
        return cls()


def __getattr__(name: str) -> Any:
    if name == "Step":
        raise ImportError(
            "hmf_jax.generation.Step is gone; Engine.step returns a list of hmf_jax.engine.Event"
        )
    if isinstance(program := getattr(programs, name.removeprefix("_"), None), Program):
        return program
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
