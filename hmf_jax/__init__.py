"""Hybrid language models in JAX: load a checkpoint, run it, generate.

    model = hmf_jax.from_pretrained("path/or/repo")
    chat = hmf_jax.ChatSession(model)
    print(chat.send("Hello!"))

Names are imported when they are first used, so that importing this package costs next to nothing.
"""

from __future__ import annotations

import importlib
import os
from typing import TYPE_CHECKING, Any

if not os.path.isdir(os.path.join(os.path.dirname(__file__), "convert")):
    raise ImportError(
        "hmf_jax/convert should be a symbolic link: clone with git clone -c core.symlinks=true"
    )

if TYPE_CHECKING:  # what `__getattr__` does, for type checkers; a test compares the two
    from hmf_jax.composition import compose
    from hmf_jax.config import HybridConfig
    from hmf_jax.engine import (
        enable_compilation_cache,
        generate,
        sample,
        score,
        stream,
        warmup,
    )
    from hmf_jax.hub import push_to_hub
    from hmf_jax.loading import from_pretrained, save_orbax, save_pretrained
    from hmf_jax.mixers import BMojoConfig, GDNConfig, GKAConfig, Mamba2Config, SWAConfig
    from hmf_jax.model import HybridLM
    from hmf_jax.options import Backbone, RopeConfig
    from hmf_jax.packed import PackedModel
    from hmf_jax.sampling import SamplingParams
    from hmf_jax.sharding import make_mesh
    from hmf_jax.state import ModelState
    from hmf_jax.text import ChatSession, generate_text, load_tokenizer, stream_text

__version__ = "0.2.0.dev0"

_HOME = {
    "BMojoConfig": "mixers",
    "Backbone": "options",
    "ChatSession": "text",
    "GDNConfig": "mixers",
    "GKAConfig": "mixers",
    "HybridConfig": "config",
    "HybridLM": "model",
    "Mamba2Config": "mixers",
    "ModelState": "state",
    "PackedModel": "packed",
    "RopeConfig": "options",
    "SWAConfig": "mixers",
    "SamplingParams": "sampling",
    "compose": "composition",
    "enable_compilation_cache": "engine",
    "from_pretrained": "loading",
    "generate": "engine",
    "generate_text": "text",
    "load_tokenizer": "text",
    "make_mesh": "sharding",
    "push_to_hub": "hub",
    "sample": "engine",
    "save_orbax": "loading",
    "save_pretrained": "loading",
    "score": "engine",
    "stream": "engine",
    "stream_text": "text",
    "warmup": "engine",
}
# `hmf_jax.training.train` needs no import of `hmf_jax.training`.
_MODULES = ("embedded", "engine", "memory", "priming", "serving", "text", "training")

__all__ = [
    "BMojoConfig",
    "Backbone",
    "ChatSession",
    "GDNConfig",
    "GKAConfig",
    "HybridConfig",
    "HybridLM",
    "Mamba2Config",
    "ModelState",
    "PackedModel",
    "RopeConfig",
    "SWAConfig",
    "SamplingParams",
    "compose",
    "enable_compilation_cache",
    "from_pretrained",
    "generate",
    "generate_text",
    "load_tokenizer",
    "make_mesh",
    "push_to_hub",
    "sample",
    "save_orbax",
    "save_pretrained",
    "score",
    "stream",
    "stream_text",
    "warmup",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOME:
        from hmf_jax.moved import ELSEWHERE, moved

        moved(__name__, ELSEWHERE)(name)
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value  # found at once from now on
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
