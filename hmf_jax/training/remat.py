"""What the backward pass of a block keeps, and what it computes again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from hmf_jax.block import Block
from hmf_jax.mixers import KINDS, Context

Array = jax.Array

# Remat choice -> policy of `jax.checkpoint`; "none" keeps everything.
REMAT: dict[str, Any] = {
    "none": None,
    "block": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
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
