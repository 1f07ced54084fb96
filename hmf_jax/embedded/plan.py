"""What is trained for the embedded models: architectures, and how long on which texts."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from hmf_jax.config import HybridConfig
from hmf_jax.embedded import corpus

WINDOW = 16  # tokens that sliding windows see; a question is about facts far behind them
BMOJO = "B'MOJO-F"

# Name -> pattern. No layer keeps full attention: what is older than the windows is in the states.
# The Transformers recall in their layer 2, seed 2's in layer 3 too: with a window there they forget
# (the rows "window in layer .."). So these are the layers that get a state.
HYBRIDS = {
    "GKA": "SWA-SWA-GKA-GKA",
    BMOJO: "SWA-SWA-BMF-BMF",
    "GKA only": "GKA-GKA-GKA-GKA",
    "GDN": "SWA-SWA-GDN-GDN",
    "Mamba2": "SWA-SWA-M2-M2",
    "SWA": "SWA-SWA-SWA-SWA",
}
# B'MOJO-F reads what its inner mixer made of a token a window later. "Gove has 47": the inner mixer
# knows the number at the end of the name, five tokens before it is said; so the window is shorter,
# and 2 learns pairs within 200 steps; 4 did not within 240 ("k====4") and 360 ("k has 47").
MIXERS: dict[str, Any] = dict(
    swa={"window_size": WINDOW}, bmojo={"window_size": 2, "ssm_mixer": "GKA"}
)
TARGET = "none"  # what stage 1 compares beside the states before the output head; best of all
PRIMED, PLAIN = "primed", "not distilled"  # stages 1 and 2; as many steps without a teacher
NUM_ITER = (30, 10, 5, 1, 0)


@dataclasses.dataclass(frozen=True)
class Phase:
    """`steps` batches of documents of `length` tokens at a level of `corpus.rows`."""

    steps: int
    length: int
    level: int = 2


@dataclasses.dataclass(frozen=True)
class Course:
    """How a hybrid is trained.

    Attributes:
      distill, tune: phases of stage 1 and of stage 2.
      distill_rate, tune_rate: their learning rates (all of it is `tune_rate` without stage 1).
      tokens: per batch.
    """

    distill: tuple[Phase, ...]
    tune: tuple[Phase, ...]
    distill_rate: float
    tune_rate: float
    tokens: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is trained, how long, and on what it is tested.

    Attributes:
      base: phases of the Transformer; the steps of all phases are multiples of `block`.
      hybrid, bmojo: the course of most hybrids; that of B'MOJO-F, which learns only where a value
        comes later than its key, so it sees levels 3 to 6.
      tokens: per batch of the Transformer.
      row: tokens per row of a batch, a multiple of every phase's length; new states start with a
        memory of as many tokens.
      block: steps per call of the device.
      learning_rate: of the Transformer. Learning rates are Muon's, for matrices; a quarter is
        Adam's, for all else.
      contexts: lengths of tested contexts; one fact per 32 tokens, then filler.
      questions: per tested length.
      hidden_size, layers: of the models.
    """

    base: tuple[Phase, ...] = (
        Phase(200, 64, 0),
        Phase(400, 64, 1),
        Phase(800, 128),
        Phase(400, 256),
        Phase(400, 512),
    )
    hybrid: Course = Course(
        distill=(Phase(100, 128), Phase(80, 256)),
        tune=(Phase(60, 256), Phase(60, 512)),
        distill_rate=0.04,
        tune_rate=0.02,
        tokens=4096,
    )
    bmojo: Course = Course(
        distill=(Phase(40, 128, 3),),
        tune=(
            Phase(200, 128, 3),
            Phase(100, 64, 4),
            Phase(220, 128, 5),
            Phase(80, 256, 5),
            Phase(80, 512, 5),
            Phase(80, 128, 6),
            Phase(80, 256, 6),
            Phase(80, 512, 6),
        ),
        distill_rate=0.01,
        tune_rate=0.01,
        tokens=2048,
    )
    tokens: int = 8192
    row: int = 512
    block: int = 20
    learning_rate: float = 0.02
    contexts: tuple[int, ...] = (128, 256, 512)
    questions: int = 256
    hidden_size: int = 96
    layers: int = 4

    def scaled(self, factor: float) -> Plan:
        """The plan with this many times the steps."""

        def scale(phases: tuple[Phase, ...]) -> tuple[Phase, ...]:
            blocks = [max(1, round(factor * phase.steps / self.block)) for phase in phases]
            pairs = zip(phases, blocks, strict=True)
            return tuple(dataclasses.replace(p, steps=n * self.block) for p, n in pairs)

        def course(c: Course) -> Course:
            return dataclasses.replace(c, distill=scale(c.distill), tune=scale(c.tune))

        return dataclasses.replace(
            self, base=scale(self.base), hybrid=course(self.hybrid), bmojo=course(self.bmojo)
        )

    def course(self, name: str) -> Course:
        """Of a hybrid of `HYBRIDS`."""
        return self.bmojo if name == BMOJO else self.hybrid

    def rates(self, steps: int) -> np.ndarray:
        """Learning rate of each step: a short warm-up, constant, in the second half down to 0."""
        step = np.arange(steps)
        up, down = (step + 1) / min(20, steps), 2 * (steps - step) / steps
        return (self.learning_rate * np.minimum(1.0, np.minimum(up, down))).astype(np.float32)


SMALL = Plan(
    base=(Phase(4, 64, 0), Phase(4, 128)),
    hybrid=Course((Phase(4, 64),), (Phase(4, 64), Phase(4, 128)), 0.04, 0.02, 256),
    bmojo=Course(
        (Phase(4, 64, 3),), (Phase(4, 64, 4), Phase(4, 128, 5), Phase(4, 128, 6)), 0.01, 0.01, 256
    ),
    tokens=256,
    row=128,
    block=2,
    contexts=(64, 128),
    questions=4,
    hidden_size=32,
)


def base_config(plan: Plan) -> HybridConfig:
    """The Transformer: Qwen3's architecture, tiny."""
    return HybridConfig(
        vocab_size=corpus.VOCAB_SIZE,
        hidden_size=plan.hidden_size,
        intermediate_size=2 * plan.hidden_size,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
        layer_kinds=("*",) * plan.layers,
        tie_word_embeddings=True,
        max_position_embeddings=4096,
        eos_token_id=corpus.END_ID,
        pad_token_id=corpus.PAD_ID,
    )
