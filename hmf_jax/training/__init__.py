"""Fine-tuning: data, the loss, the training step, optimizers.

recipe = RECIPES["instruct"]
optimizer = recipe.optimizer(steps=1000)
state = TrainState.create(model, optimizer, trainable="gka, norm, self_attn")
step = make_train_step(optimizer, accumulate=4, remat="block")
for batch in Batches("chats.jsonl", tokenizer, length=4096, batch_size=8):
    state, metrics = step(state, batch)
model = state.model()
"""

from hmf_jax.training.data import Batches, Documents, encode_chat, encode_text
from hmf_jax.training.loss import cross_entropy, next_token_loss, next_token_targets
from hmf_jax.training.optimizer import RECIPES, Recipe, decay_mask
from hmf_jax.training.step import TrainState, make_train_step, select_parameters

__all__ = [
    "RECIPES",
    "Batches",
    "Documents",
    "Recipe",
    "TrainState",
    "cross_entropy",
    "decay_mask",
    "encode_chat",
    "encode_text",
    "make_train_step",
    "next_token_loss",
    "next_token_targets",
    "select_parameters",
]
