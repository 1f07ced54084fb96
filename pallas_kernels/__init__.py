"""Sequence-mixing operators: arrays in, arrays out; each with several implementations.

Every operator takes `impl` ("auto" or a name, see `dispatch`) and `mesh` (see `sharded`), carries
float32 states in and out, and isolates packed documents by `segment_ids`.
"""

from hmf_jax.pallas_kernels.ops.attention.api import (
    attention,
    decode_attention,
    paged_decode_attention,
)
from hmf_jax.pallas_kernels.ops.attention.pages import PageTable
from hmf_jax.pallas_kernels.ops.causal_conv1d.api import causal_conv1d
from hmf_jax.pallas_kernels.ops.causal_conv1d.inputs import L2Norm, l2_normalize
from hmf_jax.pallas_kernels.ops.gated_delta_rule.api import gated_delta_rule, gated_delta_rule_step
from hmf_jax.pallas_kernels.ops.gka.api import gka, gka_step
from hmf_jax.pallas_kernels.ops.grouped_matmul.api import grouped_matmul
from hmf_jax.pallas_kernels.ops.ssd.api import ssd, ssd_step
from hmf_jax.pallas_kernels.ops.two_window_attention.api import (
    two_window_attention,
    two_window_decode,
)

__all__ = [
    "L2Norm",
    "PageTable",
    "attention",
    "causal_conv1d",
    "decode_attention",
    "gated_delta_rule",
    "gated_delta_rule_step",
    "gka",
    "gka_step",
    "grouped_matmul",
    "l2_normalize",
    "paged_decode_attention",
    "ssd",
    "ssd_step",
    "two_window_attention",
    "two_window_decode",
]
