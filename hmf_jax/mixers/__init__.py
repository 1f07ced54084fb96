"""Layer kinds: the symbols of `hybrid_override_pattern` and the mixers they stand for."""

from __future__ import annotations

from flax import nnx

from hmf_jax.config import HybridConfig
from hmf_jax.mixers.attention import Attention
from hmf_jax.mixers.base import Context, Mixer
from hmf_jax.mixers.bmojo import BMojo
from hmf_jax.mixers.gdn import GatedDeltaNet
from hmf_jax.mixers.gka import GatedKalmaNet
from hmf_jax.mixers.mamba2 import Mamba2

__all__ = ["Context", "Mixer", "make_mixer"]

RECURRENT = {"GKA": GatedKalmaNet, "GDN": GatedDeltaNet, "M2": Mamba2}


def make_mixer(kind: str, config: HybridConfig, *, dtype, rngs: nnx.Rngs) -> Mixer:
    """Build the mixer for one symbol: "*", "SWA", "GKA", "GDN", "M2" or "BMF"."""
    if kind == "*":
        return Attention(config, dtype=dtype, rngs=rngs)
    if kind == "SWA":
        assert config.swa is not None
        return Attention(config, dtype=dtype, rngs=rngs, window=config.swa.window_size)
    if kind == "BMF":
        assert config.bmojo is not None
        inner = RECURRENT[config.bmojo.ssm_mixer]
        return BMojo(config, inner, dtype=dtype, rngs=rngs)
    return RECURRENT[kind](config, dtype=dtype, rngs=rngs)
