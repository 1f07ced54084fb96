"""Learning rates and AdamW as the original's training recipes set them."""

from __future__ import annotations

import dataclasses
import math
from typing import Annotated, Any, Literal

import jax
import optax

from hmf_jax.training.fields import Count, Positive, Range, check_types


def decay_mask(params: Any) -> Any:
    """True for what weight decay acts on: matrices; not A_log, dt_bias, D, norms and biases."""
    return jax.tree.map(lambda p: p.ndim >= 2, params)


_Beta = Annotated[float, Range(0, 1 - 1e-9)]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """AdamW with a warm-up from 0 and a schedule, and what the training step is to do with it.

    Attributes:
      learning_rate: the peak.
      schedule: what follows the warm-up: "constant", "linear" or "cosine" (both down to 0).
      warmup: steps, or, as a float below 1, a fraction of all steps (rounded up).
      trainable: patterns of trained parameters (see `select_parameters`); None: all.
      seq_len: tokens per row.
      accumulate: micro-batches per step.
      steps: length of the training; None: as many as the epochs of the data take.
      epochs: passes over the data, where these set the length.
      max_grad_norm, betas, eps, weight_decay: of the step and AdamW.
      router_aux_loss_coef: coefficient of the load-balancing loss of models with experts, see
        `make_train_step`; None: the model's.
      overlong: what becomes of documents longer than a row, see `Batches`.
      config_overrides: config.json keys of the model to change, see `HybridConfig.override`.

    Raises:
      ValueError: a value of another type or out of its range.
    """

    learning_rate: Positive
    schedule: Literal["constant", "linear", "cosine"]
    warmup: Annotated[int, Range(0)] | Annotated[float, Range(0, 1)] = 0
    trainable: str | None = None
    seq_len: Annotated[int, Range(2)] = 8192
    accumulate: Count = 1
    steps: Count | None = None
    epochs: Count | None = None
    max_grad_norm: Positive | None = 1.0
    betas: tuple[_Beta, _Beta] = (0.9, 0.999)
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Range(0, 1e9)] = 0.0
    router_aux_loss_coef: Annotated[float, Range(0, 1e3)] | None = None
    overlong: str = "cut"
    config_overrides: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        check_types(self)
        if type(self.warmup) is float and self.warmup >= 1:
            raise ValueError(
                f"warmup={self.warmup} must be a number of steps (an int) or a fraction below 1."
            )

    def learning_rates(self, steps: int | None = None) -> optax.Schedule:
        """Optimizer step -> learning rate, over `steps` steps (default: the recipe's)."""
        steps = self.steps if steps is None else steps
        if steps is None or steps < 1:
            raise ValueError(f"steps={steps}: this recipe's length depends on the data; pass it.")
        w = self.warmup
        warmup = math.ceil(w * steps) if isinstance(w, float) else w
        peak, rest = self.learning_rate, max(steps - warmup, 1)
        after = {
            "constant": optax.constant_schedule(peak),
            "linear": optax.linear_schedule(peak, 0.0, rest),
            "cosine": optax.cosine_decay_schedule(peak, rest),
        }[self.schedule]
        if warmup == 0:
            return after
        return optax.join_schedules([optax.linear_schedule(0.0, peak, warmup), after], [warmup])

    def optimizer(self, steps: int | None = None) -> optax.GradientTransformation:
        """AdamW with these learning rates, which the training step reports."""
        fixed = ("b1", "b2", "eps", "eps_root", "mu_dtype", "weight_decay", "mask", "nesterov")
        adamw = optax.inject_hyperparams(optax.adamw, static_args=fixed)
        return adamw(
            self.learning_rates(steps),
            b1=self.betas[0],
            b2=self.betas[1],
            eps=self.eps,
            weight_decay=self.weight_decay,
            mask=decay_mask,
        )


# The released models' stages after the start from a Transformer; AdamW without weight decay.
RECIPES: dict[str, Recipe] = {
    "distill": Recipe(1e-4, "constant", 720, "gka", 8192, accumulate=4, steps=19000),
    "long_context": Recipe(
        5e-5,
        "cosine",
        209,
        "gka,norm,self_attn",
        131072,
        accumulate=2,
        steps=4480,
        config_overrides={
            "rope_parameters.rope_theta": 5_000_000.0,
            "max_position_embeddings": 131072,
        },
    ),
    "instruct": Recipe(5e-5, "linear", 0.03, seq_len=32768, epochs=2),
    "reasoning": Recipe(5e-5, "cosine", 0.1, seq_len=32768, epochs=1, overlong="skip"),
}
