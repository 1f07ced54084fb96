"""Hybrid language models in JAX: load a checkpoint, run it, generate, fine-tune, prime your own."""

from hmf_jax.config import HybridConfig
from hmf_jax.model import HybridLM
from hmf_jax.sharding import make_mesh

__all__ = ["HybridConfig", "HybridLM", "make_mesh"]
