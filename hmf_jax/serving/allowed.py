"""Answers that are made of some tokens only."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from hmf_jax.engine.request import Constraint


class Allowed:
    """A `Constraint`: only these tokens may come, and only where another one allows them, too."""

    def __init__(self, ids: Sequence[int], vocab_size: int, other: Constraint | None = None):
        bits = np.zeros(-(-vocab_size // 32) * 32, np.uint8)
        bits[list(ids)] = 1
        self._mask = np.packbits(bits, bitorder="little").view("<u4").astype(np.uint32)
        self._other = other

    def mask(self) -> np.ndarray:
        """Allowed tokens as bits; all that the other one allows if nothing else is left."""
        other = None if self._other is None else self._other.mask()
        if other is None:
            return self._mask
        both = self._mask & other
        return both if both.any() else other

    def accept(self, tokens: Sequence[int]) -> None:
        """These tokens were chosen, in this order."""
        if self._other is not None:
            self._other.accept(tokens)
