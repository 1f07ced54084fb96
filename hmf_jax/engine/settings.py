"""What each row of a batch was asked for, as arrays; and the processors of logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from hmf_jax.sampling import SamplingArrays, SamplingParams, stack_params

END_IDS = 16  # end tokens that fit into the smallest table; a larger one is another program
MOST_LIKELY = 20  # log-probabilities per place that are there whatever rows ask for


class Context(NamedTuple):
    """What a processor of logits is told about the rows.

    Attributes:
      token: [B] int32, the newest token of each row, at first the last one of the prompt.
      position: [B] int32, the index in its row of the token that is chosen.
      step: [B] int32, its index among the new tokens.
      seen: [B, V] bool, tokens in the row, those of the prompt included.
      generated: [B, V] int32, how often each token was generated.
    """

    token: jax.Array
    position: jax.Array
    step: jax.Array
    seen: jax.Array
    generated: jax.Array


# (logits [B, V] float32 after biases and penalties, context) -> logits [B, V].
Processor = Callable[[jax.Array, Context], jax.Array]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """What each row was asked for; read only.

    Attributes:
      sampling: see `hmf_jax.sampling`.
      eos: [B, E] int32 end tokens, padded with -1.
      num_iter: [B] int32; None = the config's.
      least: [B] int32, no end token before that many new tokens; None: nobody asks.
      top: [B] int32, how many of the most likely tokens to tell; None: as many as the program
        tells of every row.
    """

    sampling: SamplingArrays
    eos: Any
    num_iter: Any
    least: Any = None
    top: Any = None

    @property
    def counts(self) -> bool:
        """Whether it must be known how often each token was generated."""
        return self.sampling.presence_penalty is not None


def stack_settings(
    own_num_iter: int | None,
    sampling: Sequence[SamplingParams],
    eos: Sequence[Sequence[int]],
    num_iter: Sequence[int | None],
    least: Sequence[int] = (),
    top: Sequence[int] | None = None,
) -> Settings:
    """Settings of all rows as arrays. `own_num_iter`: the config's, None without GKA layers.

    With `top`, all arrays are there whatever is asked for, in one shape: so there is one program.
    """
    width = max([END_IDS, *map(len, eos)])
    table = np.full((len(eos), 1 << (width - 1).bit_length()), -1, np.int32)
    for row, ids in enumerate(eos):
        table[row, : len(ids)] = ids

    # Plain JAX on a GPU asks the host "once more?" in every iteration unless their number is known
    # when compiling, so the config's own is not passed as an array. (Kernels do not care.)
    iterations = None
    if own_num_iter is not None:
        chosen = [own_num_iter if n is None else n for n in num_iter]
        if top is not None or set(chosen) != {own_num_iter}:
            iterations = np.array(chosen, np.int32)
    fewest = np.array(least, np.int32) if top is not None or any(least) else None
    most = None if top is None else np.array(top, np.int32)
    return Settings(stack_params(sampling, top is not None), table, iterations, fewest, most)
