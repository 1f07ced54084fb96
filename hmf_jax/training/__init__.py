"""Fine-tuning: data, the loss, the training step, optimizers.

recipe = RECIPES["instruct"]
optimizer = recipe.optimizer(steps=1000)
state = TrainState.create(model, optimizer, trainable="gka, norm, self_attn")
remat = auto_remat(state, rows=8, length=4096, accumulate=4)
step = make_train_step(optimizer, accumulate=4, remat=remat)
batches = Batches("chats.jsonl", tokenizer, length=4096, batch_size=8)
saved = Checkpoints("run/checkpoints", model.config, every=200)
state = train(state, step, batches, steps=1000, checkpoints=saved, directory="run")
model = state.model()
"""

from hmf_jax.training.batches import Batches
from hmf_jax.training.checkpoint import Checkpoints
from hmf_jax.training.diagnosis import find_not_finite
from hmf_jax.training.documents import Documents
from hmf_jax.training.encode import encode_chat, encode_completion, encode_text
from hmf_jax.training.evaluation import Evaluation
from hmf_jax.training.flops import training_flops
from hmf_jax.training.loop import data_shard, train
from hmf_jax.training.lora import apply_lora, load_lora, merge_lora, save_lora
from hmf_jax.training.loss import cross_entropy, next_token_loss, next_token_targets
from hmf_jax.training.memory import auto_remat, plan_memory
from hmf_jax.training.optimizer import RECIPES, Recipe, decay_mask
from hmf_jax.training.report import plot_loss, read_metrics
from hmf_jax.training.signals import Stopped
from hmf_jax.training.step import TrainState, make_train_step, select_parameters

__all__ = [
    "RECIPES",
    "Batches",
    "Checkpoints",
    "Documents",
    "Evaluation",
    "Recipe",
    "Stopped",
    "TrainState",
    "apply_lora",
    "auto_remat",
    "cross_entropy",
    "data_shard",
    "decay_mask",
    "encode_chat",
    "encode_completion",
    "encode_text",
    "find_not_finite",
    "load_lora",
    "make_train_step",
    "merge_lora",
    "next_token_loss",
    "next_token_targets",
    "plan_memory",
    "plot_loss",
    "read_metrics",
    "save_lora",
    "select_parameters",
    "train",
    "training_flops",
]
