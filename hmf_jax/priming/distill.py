"""Stage 1: every converted layer learns to do what the attention in its place did.

A fused model runs every layer twice, the student's x_s through its own mixers and the teacher's x_a
through the base's, with the same norms and MLPs; both start from the embeddings:

    m = mixer(norm1(x)),  r = x + m,  f = mlp(norm2(r)),  y = r + f

The loss compares them layer by layer (`TARGETS`), and before the output head:

    loss = 1/layers sum_i l_i + MSE(norm(x_s), norm(x_a))

MSE is the mean over features and valid tokens, if wanted with their weights, in float32. A layer
without a teacher of its own ("*DA", "*") runs the same mixer for both. Nothing of the teacher's
side is differentiated.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hmf_jax import table
from hmf_jax.block import Block
from hmf_jax.config import HybridConfig
from hmf_jax.convert.jax_to_hf import tensors
from hmf_jax.layers import exact
from hmf_jax.loading import resolve
from hmf_jax.mixers import Context, split_symbol
from hmf_jax.model import HybridLM
from hmf_jax.padding import arrange
from hmf_jax.parameters import flat_params
from hmf_jax.priming.unfuse import check_fused
from hmf_jax.training.loss import next_token_targets
from hmf_jax.training.plan import plan
from hmf_jax.training.remat import Remat, rematerialized
from hmf_jax.training.run import fine_tune
from hmf_jax.training.schema import TrainConfig
from hmf_jax.training.step import make_train_step

Array = jax.Array

# hybrid_lw_distill_target -> what is compared in each layer: y, m or f.
TARGETS: dict[str, tuple[str, ...]] = {
    "none": (),
    "decoder": ("decoder",),
    "mixer": ("mixer",),
    "residuals": ("mixer", "mlp"),
    "all": ("decoder", "mixer", "mlp"),
}
PRE_LM_HEAD = "pre_lm_head"


def distillation_loss(
    model: HybridLM,
    tokens: Array,
    *,
    target: str = "none",
    pre_lm_head: bool = True,
    weighted: bool = False,
    loss_mask: Array | None = None,
    segment_ids: Array | None = None,
    positions: Array | None = None,
    num_iter: Array | int | None = None,
    impl: str = "auto",
) -> tuple[Array, Array]:
    """The loss summed over valid tokens, and their number or weight: loss = sum / count.

    Args:
      model: a fused model.
      tokens, segment_ids, positions, num_iter, impl: as in `HybridLM.__call__`. Padding (segment 0)
        does not count; without segment_ids every token does, as in the original.
      target: what is compared in each layer, a key of `TARGETS`.
      pre_lm_head: compare the final hidden states too.
      weighted: a token counts as much as predicting its successor does in `next_token_loss`: by
        the loss_mask of the successor, not at all at the end of a document. The original has no
        such weights.
      loss_mask: [B, T], how much predicting each token counts; without `weighted` it is ignored.

    Returns two float32 scalars (the sum is float64 in float64 models).

    Raises:
      ValueError: the model has no teacher, an unknown target, or no loss at all.
    """
    _check(target, pre_lm_head)
    weights = next_token_targets(tokens, loss_mask, segment_ids)[1] if weighted else None
    terms, count = _student_and_teacher(
        model,
        tokens,
        TARGETS[target],
        pre_lm_head,
        segment_ids,
        positions,
        num_iter,
        impl,
        weights,
    )
    per_layer = [jnp.sum(x) for name, x in terms.items() if name != PRE_LM_HEAD]
    total = sum(per_layer, jnp.zeros(())) / len(model.layers) + terms.get(PRE_LM_HEAD, 0.0)
    return total, count


def distillation_terms(
    model: HybridLM,
    tokens: Array,
    *,
    segment_ids: Array | None = None,
    positions: Array | None = None,
    num_iter: Array | int | None = None,
    impl: str = "auto",
) -> dict[str, Array]:
    """Each MSE by itself: "decoder", "mixer", "mlp" [layers] and "pre_lm_head", a scalar.

    Arguments and errors as for `distillation_loss`. Says which layers are not learned yet.
    """
    terms, count = _student_and_teacher(
        model, tokens, TARGETS["all"], True, segment_ids, positions, num_iter, impl
    )
    return {name: x / jnp.maximum(count, 1) for name, x in terms.items()}


def loss_and_gradients(
    model: HybridLM, tokens: Array, target: str = "none", pre_lm_head: bool = True
) -> tuple[Array, dict[str, np.ndarray]]:
    """The mean distillation loss of tokens [B, T], and its gradients by checkpoint name and layout.

    Every parameter has one; those that only the teacher uses are zero. For comparing with the
    original; arguments and errors as for `distillation_loss`.
    """

    def loss(model: HybridLM) -> Array:
        total, count = distillation_loss(model, tokens, target=target, pre_lm_head=pre_lm_head)
        return total / count

    value, gradients = jax.jit(jax.value_and_grad(loss))(model)
    return value, tensors(table.entries(model.config), flat_params(gradients))


def make_distill_step(
    optimizer: optax.GradientTransformation,
    *,
    target: str = "none",
    pre_lm_head: bool = True,
    weighted: bool = False,
    **options: Any,
) -> jax.stages.Wrapped:
    """A step (state, batch) -> (state, metrics) of stage 1, for the training loop.

        fused = prime(base, "*DA-GKA*")
        state = TrainState.create(fused, optimizer, trainable=students(fused.config))
        step = make_distill_step(optimizer, target="decoder")
        for batch in batches:
            state, metrics = step(state, batch)
        hybrid = unfuse(state.model())

    Args:
      optimizer: the one that `TrainState.create` was given.
      target, pre_lm_head, weighted: the loss, see `distillation_loss`.
      options: those of `make_train_step`: accumulate, remat, max_grad_norm, num_iter, impl.

    Batches, metrics and errors are those of `make_train_step`; `loss` is the distillation loss and
    `tokens` the number of valid tokens or their weight.
    """
    _check(target, pre_lm_head)
    loss = functools.partial(
        distillation_loss, target=target, pre_lm_head=pre_lm_head, weighted=weighted
    )
    return make_train_step(optimizer, loss=loss, **options)


def students(config: HybridConfig) -> str:
    """Patterns that select the mixers with a teacher, of any kind, for `TrainState.create`.

    Raises ValueError if there is none.
    """
    check_fused(config, "distil")
    layers = [
        i for i, symbol in enumerate(config.layer_kinds) if split_symbol(symbol)[1] is not None
    ]
    if not layers:
        raise ValueError(
            "no layer of this model has a teacher, so there is nothing to distil: prime it with "
            "fused symbols such as 'GKA*'"
        )
    return ",".join(f"layers.{i}.mixer." for i in layers)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig(TrainConfig):
    """One stage-1 run: the fields of `TrainConfig` (default recipe: "distill") and these.

    Attributes:
      model: directory of a fused model; what the run writes is one, too.
      trainable: by default "students", the mixers with a teacher, of any kind.
      target, pre_lm_head, weighted: the loss, see `distillation_loss`.
    """

    stages: ClassVar[tuple[str, ...]] = ("hkd",)  # of the original

    target: str = "none"
    pre_lm_head: bool = True
    weighted: bool = False

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Self:
        return super().of({"recipe": "distill", "trainable": "students", **values})

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self.target, self.pre_lm_head)
        if self.lora_rank is not None:
            raise ValueError("lora_rank is for fine-tuning; in stage 1 the new mixers learn whole.")


def distill(
    config: DistillConfig,
    *,
    progress: bool = True,
    report: Callable[[str], None] = lambda text: None,
    lines: bool | None = None,
    overwrite: bool = False,
    dry_run: bool = False,
) -> Path | None:
    """Runs stage 1 from the data to a fused model in output/model; goes on where a run was killed.

    Arguments, errors and result as for `hmf_jax.training.run.fine_tune`; with dry_run only the
    report of `plan`, and None.
    """
    chosen = students(HybridConfig.from_json(resolve(config.model, progress=progress)))
    if config.trainable == "students":
        config = dataclasses.replace(config, trainable=chosen)
    loss = functools.partial(
        distillation_loss,
        target=config.target,
        pre_lm_head=config.pre_lm_head,
        weighted=config.weighted,
    )
    if dry_run:
        report(plan(config, loss=loss))
        return None
    options: Any = dict(progress=progress, report=report, lines=lines, overwrite=overwrite)
    return fine_tune(config, loss=loss, **options)


def _check(target: str, pre_lm_head: bool) -> None:
    if target not in TARGETS:
        raise ValueError(f"target {target!r} is unknown; use one of {', '.join(TARGETS)}.")
    if target == "none" and not pre_lm_head:
        raise ValueError("target 'none' without pre_lm_head leaves no loss; choose a target.")


def _student_and_teacher(
    model: HybridLM, tokens, parts: tuple[str, ...], pre_lm_head: bool, segment_ids, positions,
    num_iter, impl: str, weights: Array | None = None,
) -> tuple[dict[str, Array], Array]:  # fmt: skip
    """{part: [layers] sums over tokens of weight * mean square error}, and the sum of the weights.

    weights [B, T], in the order of tokens; None: 1 for valid tokens, 0 for padding.
    """
    students(model.config)
    x, ctx = model.embed(
        tokens, positions=positions, segment_ids=segment_ids, num_iter=num_iter, impl=impl
    )
    if weights is None:
        weights = ctx.mask(jnp.ones(tokens.shape, jnp.float32))
    else:
        weights = arrange(weights, ctx.place)
    student, teacher = x, jax.lax.stop_gradient(x)
    rows: list[tuple[Array, ...]] = []
    for block in model.layers:
        block, choice = _bare(block)
        student, teacher, errors = _run_pair(block, student, teacher, ctx, weights, parts, choice)
        rows.append(errors)
    terms = {part: jnp.stack([row[n] for row in rows]) for n, part in enumerate(parts)}
    if pre_lm_head:
        goal = jax.lax.stop_gradient(model.norm(teacher))
        terms[PRE_LM_HEAD] = _square_error(model.norm(student), goal, weights)
    return terms, jnp.sum(weights)


def _bare(block: Block) -> tuple[Block, str]:
    """The block itself, and what its backward pass is to compute again."""
    return (block.block, block.choice) if isinstance(block, Remat) else (block, "none")


@functools.partial(jax.jit, static_argnums=(5, 6))
def _run_pair(
    block: Block, student: Array, teacher: Array, ctx: Context, weights: Array,
    parts: tuple[str, ...], choice: str,
) -> tuple[Array, Array, tuple[Array, ...]]:  # fmt: skip
    """One layer for student and teacher, and its errors. One inner jit: equal layers are traced
    once."""

    def run(pair: tuple[Array, Array], block: Block, ctx: Context):
        student, teacher = pair
        frozen = jax.tree.map(jax.lax.stop_gradient, block)
        mixer = frozen.mixer if frozen.teacher is None else frozen.teacher
        y_a, m_a, f_a, *_ = frozen.run(mixer, teacher, ctx)
        y_s, m_s, f_s, *_ = block.run(block.mixer, student, ctx)
        pairs = {"decoder": (y_s, y_a), "mixer": (m_s, m_a), "mlp": (f_s, f_a)}
        return y_s, y_a, tuple(_square_error(*pairs[part], weights) for part in parts)

    return rematerialized(run, choice)((student, teacher), block, ctx)


def _square_error(a: Array, b: Array, weights: Array) -> Array:
    """sum_bt weights mean_d (a - b)^2, in float32; what weighs nothing may be anything."""
    errors = jnp.mean(jnp.square(exact(a) - exact(b)), axis=-1)
    return jnp.sum(jnp.where(weights != 0, weights * errors, 0))
