"""Named shapes of the operators, shared by tests and benchmarks."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Shape:
    """What one layer of a model asks of an operator.

    Attributes:
      heads: query heads; recurrent operators keep one state per query head.
      kv_heads: key/value heads, a divisor of `heads`.
      head_dim: size of a head; recurrent states are head_dim x head_dim.
      window: keys per window of sliding-window and two-window attention.
    """

    heads: int
    kv_heads: int
    head_dim: int
    window: int

    def per_device(self, tp: int) -> Shape:
        """The part of one of `tp` tensor parallel devices; with fewer key/value heads than devices
        each device keeps a copy of one.

        Raises:
          ValueError: `tp` does not divide the heads.
        """
        if self.heads % tp or (self.kv_heads % tp and tp % self.kv_heads):
            raise ValueError(
                f"tp={tp} does not fit {self.heads} heads and {self.kv_heads} key/value heads; "
                f"choose a tp that divides the heads, and divides or is a multiple of the latter."
            )
        return dataclasses.replace(
            self, heads=self.heads // tp, kv_heads=max(1, self.kv_heads // tp)
        )


# "8B" and "32B" are Qwen3-8B and Qwen3-32B; "tiny" divides by every TP too.
SHAPES = {
    "tiny": Shape(heads=8, kv_heads=2, head_dim=16, window=16),
    "8B": Shape(heads=32, kv_heads=8, head_dim=128, window=2048),
    "32B": Shape(heads=64, kv_heads=8, head_dim=128, window=2048),
}
TP = (1, 2, 4, 8)
