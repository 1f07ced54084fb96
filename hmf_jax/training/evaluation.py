"""The validation loss: the mean over all targets of some data that is not trained on."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from hmf_jax.training.loop import mesh_of, place
from hmf_jax.training.loss import next_token_loss
from hmf_jax.training.step import Loss, TrainState


class Evaluation:
    """A function: a `TrainState` -> its loss on these batches, nats per token; for `train`.

    The loss is the sum over all batches divided by their number of targets (or weight of them), so
    that neither the size of a batch nor padding counts.

    Args:
      batches: an iterator that ends, of dicts like those of `train`; they are kept in memory. With
        several processes each has its part, and those that end first go on with
        `batches.padding()`.
      loss: of `make_train_step`; None: of the next token.
      num_iter, impl, chunk_size: of `make_train_step`.

    Raises:
      ValueError: no batch; when called, no target in all of them.
    """

    def __init__(
        self,
        batches: Iterable[Mapping[str, Any]],
        *,
        loss: Loss | None = None,
        num_iter: int | None = None,
        impl: str = "auto",
        chunk_size: int | None = None,
    ) -> None:
        self._batches = list(batches)
        if jax.process_count() > 1:
            counts = multihost_utils.process_allgather(np.asarray(len(self._batches)))
            padding: Any = getattr(batches, "padding", None)
            while len(self._batches) < counts.max():
                self._batches.append(padding())
        if not self._batches:
            raise ValueError("no data to validate on")
        loss = loss or functools.partial(next_token_loss, chunk_size=chunk_size)

        def sums(state: TrainState, batch: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
            total, count, *_ = loss(state.model(), **batch, num_iter=num_iter, impl=impl)
            return total.astype(jnp.float32), jnp.asarray(count, jnp.float32)

        self._sums = jax.jit(sums)

    def __call__(self, state: TrainState) -> float:
        mesh = mesh_of(state)
        pairs = jax.device_get([self._sums(state, place(b, mesh)) for b in self._batches])
        total, count = np.asarray(pairs, np.float64).sum(0)
        if count == 0:
            raise ValueError("there is nothing to predict in the data to validate on")
        return float(total / count)
