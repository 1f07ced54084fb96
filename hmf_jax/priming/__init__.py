"""Priming: from a Transformer to a hybrid.

pattern = selection.pattern([1, 3], num_layers=4, kind="GKA")  # "*DA-GKA*-*DA-GKA*"
fused = prime("Qwen/Qwen3-8B", pattern)  # stage 0: new mixers start from attention
optimizer = RECIPES["distill"].optimizer()
state = TrainState.create(fused, optimizer, trainable=students(fused.config))
state = train(state, make_distill_step(optimizer), batches, steps=19000)  # stage 1
hybrid = unfuse(state.model())  # an ordinary model; stage 2 is fine-tuning, hmf_jax.training
"""

from hmf_jax.priming import selection
from hmf_jax.priming.distill import (
    TARGETS,
    DistillConfig,
    distill,
    distillation_loss,
    distillation_terms,
    loss_and_gradients,
    make_distill_step,
    students,
)
from hmf_jax.priming.origins import Origin, describe_plan, stage0_plan
from hmf_jax.priming.scores import LayerScores, read_scores, write_scores
from hmf_jax.priming.selection import (
    Selection,
    likelihood,
    score_layers,
    select_layers,
    swa_variant,
    write_swa_variants,
)
from hmf_jax.priming.stage0 import (
    prime,
    prime_directory,
    primed_config,
    read_stage0,
)
from hmf_jax.priming.unfuse import teacher, unfuse, unfuse_directory

__all__ = [
    "TARGETS",
    "DistillConfig",
    "LayerScores",
    "Origin",
    "Selection",
    "describe_plan",
    "distill",
    "distillation_loss",
    "distillation_terms",
    "likelihood",
    "loss_and_gradients",
    "make_distill_step",
    "prime",
    "prime_directory",
    "primed_config",
    "read_scores",
    "read_stage0",
    "score_layers",
    "select_layers",
    "selection",
    "stage0_plan",
    "students",
    "swa_variant",
    "teacher",
    "unfuse",
    "unfuse_directory",
    "write_scores",
    "write_swa_variants",
]
