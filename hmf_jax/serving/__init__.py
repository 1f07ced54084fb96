"""An OpenAI-compatible HTTP server over `hmf_jax.engine` and `hmf_jax.text`.

Needs the extra `serve`: pip install "hmf-jax[serve]".
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hmf_jax.serving.config import EngineConfig, ServeConfig

if TYPE_CHECKING:
    from hmf_jax.serving.server import serve

__all__ = ["EngineConfig", "ServeConfig", "serve"]


def __getattr__(name: str) -> Any:
    if name == "serve":  # brings JAX and the extra, which a client (`load`) can do without
        from hmf_jax.serving.server import serve

        return serve
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
