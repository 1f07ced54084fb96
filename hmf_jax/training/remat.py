"""What the backward pass of a block keeps, and what it computes again.

The choices, from most bytes to fewest, per token of a Gated KalmaNet layer at 8B size (hidden 4096,
MLP 12288, 32 heads of 128, bfloat16), beside the 8 KiB of the block's input:

    none     about 170 KiB, whatever XLA makes of it
    dots     92 KiB: products with weights and what operators hand to their backward pass
    named    16 KiB: the latter alone; attention, solvers and their like do not run twice
    block     0
    offload  as named, and the block's input waits in the memory of the host

A product with a weight of n rows costs n FLOPs per byte of its result to make again (4096 here), a
kernel of attention or GKA two to four times that, all else next to nothing: so bytes are best spent
in this order, and of products none is better than another.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from hmf_jax.block import Block
from hmf_jax.mixers import KINDS, Context
from hmf_jax.pallas_kernels.compat import is_cudnn_attention
from hmf_jax.pallas_kernels.dispatch import OPERATOR, PRODUCT, kept

Array = jax.Array
Choices = str | Mapping[str, str] | Sequence[str]

AUTO, INPUT = "auto", "block_input"


def _keeping(policy: Callable[..., Any]) -> Callable[..., Any]:
    """This policy, which also keeps what cuDNN's attention, which names nothing, returns."""

    def keep(primitive: Any, *args: Any, **params: Any) -> Any:
        return is_cudnn_attention(primitive) or policy(primitive, *args, **params)

    return keep


_POLICIES = jax.checkpoint_policies
# Remat choice -> policy of `jax.checkpoint`; "none" keeps everything.
REMAT: dict[str, Any] = {
    "none": None,
    "dots": _keeping(_POLICIES.save_only_these_names(OPERATOR, PRODUCT)),
    "named": _keeping(_POLICIES.save_only_these_names(OPERATOR)),
    "block": _POLICIES.nothing_saveable,
    "offload": _keeping(
        _POLICIES.save_and_offload_only_these_names(
            names_which_can_be_saved=[OPERATOR],
            names_which_can_be_offloaded=[INPUT],
            offload_src="device",
            offload_dst="pinned_host",
        )
    ),
}
# Those that "auto" chooses from, the fewest bytes last.
LADDER = ("none", "dots", "named", "block")


def rematerialized[R](run: Callable[..., R], choice: str) -> Callable[..., R]:
    """run(x, ...), whose backward pass keeps what the choice says; x: what a block is given."""
    if choice == "none":
        return run

    def named(x: Any, *args: Any) -> R:
        return run(kept(x, INPUT), *args)

    return jax.checkpoint(named, policy=REMAT[choice])


class Remat(Block):
    """A block that keeps for its backward pass only what the choice says."""

    def __init__(self, block: Block, choice: str):
        self.block, self.choice = block, choice

    def __call__(self, x: Array, ctx: Context, state: Any, experts: Array | None = None) -> Any:
        def run(x: Array, block: Block, *args: Any) -> Any:
            return block(x, *args)

        return rematerialized(run, self.choice)(x, self.block, ctx, state, experts)


def check_remat(remat: Choices) -> None:
    """Raises ValueError for choices that do not exist, and for "auto", which is none of a step."""
    kinds: tuple[str, ...] = ()
    if isinstance(remat, str):
        choices = (remat,)
    elif isinstance(remat, Mapping):
        kinds, choices = tuple(remat), tuple(remat.values())
    else:
        choices = tuple(remat)
    if AUTO in choices:
        raise ValueError(
            "remat='auto' needs to know the rows of a batch: give the choices of `plan_memory`, or "
            "let `TrainConfig` do it."
        )
    for what, given, known in (("kinds", kinds, KINDS), ("choices", choices, REMAT)):
        for name in given:
            if name not in known:
                raise ValueError(f"remat {name!r} is unknown; {what} are {', '.join(known)}.")


def remat_choices(remat: Choices, kinds: Sequence[str]) -> tuple[str, ...]:
    """The choice of each layer, of layers of these kinds.

    Raises ValueError if there is one per layer, but of another number of layers.
    """
    if isinstance(remat, str):
        return (remat,) * len(kinds)
    if isinstance(remat, Mapping):
        return tuple(remat.get(kind, "none") for kind in kinds)
    if len(remat) != len(kinds):
        raise ValueError(f"remat has choices for {len(remat)} layers, the model has {len(kinds)}.")
    return tuple(remat)


def remat_text(choices: Sequence[str]) -> str:
    """The choices of layers in words: "dots in layers 0-7, none in layers 8-35"."""
    groups, first = [], 0
    for choice, group in itertools.groupby(choices):
        last = first + len(list(group)) - 1
        where = f"layers {first}-{last}" if last > first else f"layer {first}"
        groups.append(f"{choice} in {where}")
        first = last + 1
    return ", ".join(groups) if len(groups) > 1 else f"{choices[0]} in all layers"
