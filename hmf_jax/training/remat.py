"""What the backward pass of a block keeps, and what it computes again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax

from hmf_jax.block import Block
from hmf_jax.mixers import KINDS, Context
from hmf_jax.pallas_kernels.compat import is_cudnn_attention
from hmf_jax.pallas_kernels.dispatch import OPERATOR, PRODUCT

Array = jax.Array



def _keeping(*names: str) -> Callable[..., bool]:
    """A policy that keeps what has one of these names, and the results of cuDNN's attention."""
    named = jax.checkpoint_policies.save_only_these_names(*names)

    def policy(primitive: Any, *args: Any, **params: Any) -> bool:
        return named(primitive, *args, **params) or is_cudnn_attention(primitive)

    return policy


# Remat choice -> policy of `jax.checkpoint`; "none" keeps everything. The fewer bytes, the later.
REMAT: dict[str, Any] = {
    "none": None,
    "dots": _keeping(OPERATOR, PRODUCT),
    "named": _keeping(OPERATOR),
    "block": jax.checkpoint_policies.nothing_saveable,
}


class Remat(Block):
    """A block that keeps for its backward pass only what the policy says."""

    def __init__(self, block: Block, choice: str):
        self.block, self.choice = block, choice

    def __call__(self, x: Array, ctx: Context, state: Any, experts: Array | None = None) -> Any:
        def run(block: Block, *args: Any):
            return block(*args)

        return jax.checkpoint(run, policy=REMAT[self.choice])(self.block, x, ctx, state, experts)


def remat_choices(remat: str | Mapping[str, str]) -> dict[str, str]:
    """Layer kind -> key of `REMAT`."""
    if isinstance(remat, str):
        remat = dict.fromkeys(KINDS, remat)
    choices = dict(remat)
    for kind, choice in choices.items():
        if kind not in KINDS or choice not in REMAT:
            raise ValueError(
                f"remat {kind!r}: {choice!r} is unknown; kinds are {tuple(KINDS)}, choices "
                f"{tuple(REMAT)}."
            )
    return choices
