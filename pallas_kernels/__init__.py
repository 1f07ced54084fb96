"""Sequence-mixing operators: arrays in, arrays out; each with several implementations.

Every operator takes `impl` ("auto" or a name, see `dispatch`) and `mesh` (see `sharded`), carries
float32 states in and out, and isolates packed documents by `segment_ids`.
"""

from hmf_jax.pallas_kernels.attention import attention, decode_attention
from hmf_jax.pallas_kernels.causal_conv1d import causal_conv1d
from hmf_jax.pallas_kernels.gated_delta_rule import gated_delta_rule, gated_delta_rule_step
from hmf_jax.pallas_kernels.gka import gka, gka_step
from hmf_jax.pallas_kernels.ssd import ssd, ssd_step
from hmf_jax.pallas_kernels.two_window_attention import two_window_attention, two_window_decode

__all__ = [
    "attention",
    "causal_conv1d",
    "decode_attention",
    "gated_delta_rule",
    "gated_delta_rule_step",
    "gka",
    "gka_step",
    "ssd",
    "ssd_step",
    "two_window_attention",
    "two_window_decode",
]
