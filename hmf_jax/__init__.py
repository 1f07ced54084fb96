"""Hybrid language models in JAX: load a checkpoint, run it, generate.

model = hmf_jax.from_pretrained("path/or/repo")
chat = hmf_jax.ChatSession(model)
print(chat.send("Hello!"))
"""

from hmf_jax.chat import ChatSession, generate_text, stream_text
from hmf_jax.compose import compose
from hmf_jax.config import HybridConfig
from hmf_jax.generation import enable_compilation_cache, generate, stream, warmup
from hmf_jax.loading import from_pretrained, save_orbax, save_pretrained
from hmf_jax.model import HybridLM, PackedModel
from hmf_jax.sampling import SamplingParams
from hmf_jax.sharding import make_mesh
from hmf_jax.state import ModelState

__all__ = [
    "ChatSession",
    "HybridConfig",
    "HybridLM",
    "ModelState",
    "PackedModel",
    "SamplingParams",
    "compose",
    "enable_compilation_cache",
    "from_pretrained",
    "generate",
    "generate_text",
    "make_mesh",
    "save_orbax",
    "save_pretrained",
    "stream",
    "stream_text",
    "warmup",
]
