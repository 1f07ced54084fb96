"""An OpenAI-compatible HTTP server over `hmf_jax.engine` and `hmf_jax.text`.

Needs the extra `serve`: pip install "hmf-jax[serve]".
"""

from hmf_jax.serving.config import EngineConfig, ServeConfig
from hmf_jax.serving.server import serve

__all__ = ["EngineConfig", "ServeConfig", "serve"]
