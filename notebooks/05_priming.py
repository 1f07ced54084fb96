# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Priming: from a Transformer to a hybrid
#
# The whole pipeline on a toy: choose the layers that can do without full attention, replace them by
# Gated KalmaNet layers that start from the attention weights (stage 0), let these imitate the
# attention they replace (stage 1), unfuse, fine-tune (stage 2). The Transformer comes with the
# package: 0.45 million parameters, trained to remember facts (`hmf_jax/embedded/train.py`). With a
# real model the calls are the same; from the shell they are `hmf-jax prime select`, `init`,
# `distill` and `unfuse` ([docs/priming.md](../docs/priming.md)).

# %%
import random
import tempfile
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import hmf_jax
from hmf_jax import embedded, priming, training
from hmf_jax.embedded import corpus
from hmf_jax.embedded.recall import accuracy

base = hmf_jax.from_pretrained(embedded.directory("transformer"), dtype=jnp.float32, progress=False)
print(base.config.hybrid_override_pattern)


# %% [markdown]
# ## The texts
#
# Facts, then something else, then questions about the facts. Names and numbers are random, so an
# answer can only come from the text.


# %%
def batches(seed: int, count: int, rows: int = 16, length: int = 128):
    rng = random.Random(seed)
    for _ in range(count):
        tokens, weights = corpus.rows(rng, rows, length, level=2)
        yield {"tokens": tokens, "loss_mask": weights}


rng = random.Random(1)
asked = corpus.questions(rng, 64, 128, 4, 42)
print(bytes(asked.context[0].tolist()).decode())
question = asked.question[0]
print(bytes(question[question < 256].tolist()).decode())
recall = {"Transformer": accuracy(base, asked)}
print(f"the Transformer answers {recall['Transformer']:.0%}; guessing: 1%")

# %% [markdown]
# ## Which layers?
#
# Each layer in turn sees only the last 16 tokens. The layers whose absence hurts least are the ones
# to replace. The scores are kept in a CSV file, in the original's format.

# %%
work = Path(tempfile.mkdtemp())
score = priming.likelihood(batches(2, 2))
scores = priming.score_layers(base, score, work / "scores.csv", window=16)
chosen = priming.select_layers(scores, m=2)
values = {i: row["log_likelihood"] for i, row in scores.rows.items()}

fig, ax = plt.subplots(figsize=(6, 3))
layers = sorted(i for i in values if i >= 0)
colors = ["#2a6f97" if i in chosen.layers else "#bbbbbb" for i in layers]
ax.bar([str(i) for i in layers], [values[i] - values[-1] for i in layers], color=colors)
ax.set(xlabel="layer that is limited to 16 tokens", ylabel="change of log-likelihood (nats)")
ax.set_title(f"Layers {sorted(chosen.layers)} are missed least")
plt.show()

# %% [markdown]
# ## Stage 0
#
# `*DA` stays attention; `GKA*` holds a new mixer beside the attention that it will learn from. The
# new projections start from those of the attention; convolutions, gates and decays start fresh.

# %%
pattern = priming.selection.pattern(chosen.layers, base.config.num_hidden_layers, "GKA")
fused = priming.prime(base, pattern)
print(pattern)
recall["stage 0"] = accuracy(priming.unfuse(fused), asked)

# %% [markdown]
# ## Stage 1
#
# Every layer runs twice, once with its new mixer and once with the attention that this replaces;
# each new mixer learns to put out what its attention does.

# %%
probe = next(batches(3, 1))["tokens"]
before = priming.distillation_terms(fused, probe)
steps = 40
optimizer = optax.adam(optax.cosine_decay_schedule(4e-3, steps))
state = training.TrainState.create(fused, optimizer, trainable=priming.students(fused.config))
step = priming.make_distill_step(optimizer, target="mixer", max_grad_norm=1.0)
state = training.train(
    state, step, batches(4, steps), steps=steps, directory=work / "stage1", progress=False
)
fused = state.model()
after = priming.distillation_terms(fused, probe)
hybrid = priming.unfuse(fused)
recall["stage 1"] = accuracy(hybrid, asked)

fig, axes = plt.subplots(1, 2, figsize=(9, 3))
losses = [r["loss"] for r in training.read_metrics(work / "stage1")]
axes[0].semilogy(losses)
axes[0].set(xlabel="step", ylabel="distillation loss", title="Stage 1")
x = np.arange(len(layers))
axes[1].bar(x - 0.2, np.asarray(before["mixer"]), 0.4, label="stage 0")
axes[1].bar(x + 0.2, np.asarray(after["mixer"]), 0.4, label="stage 1")
axes[1].set(xlabel="layer", ylabel="mean squared error", title="New mixer against its attention")
axes[1].set_xticks(x)
axes[1].legend()
plt.tight_layout()
plt.show()

# %% [markdown]
# ## Stage 2
#
# The unfused hybrid is an ordinary model, and this is ordinary training.

# %%
optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
state = training.TrainState.create(hybrid, optimizer)
step = training.make_train_step(optimizer, max_grad_norm=1.0)
state = training.train(
    state, step, batches(5, steps), steps=steps, directory=work / "stage2", progress=False
)
hybrid = state.model()
recall["stage 2"] = accuracy(hybrid, asked)
losses = [r["loss"] for r in training.read_metrics(work / "stage2")]

# %% [markdown]
# The package also holds hybrids without any full attention that were trained longer in the same
# way; `docs/embedded.md` says what they remember.

# %%
for name in embedded.HYBRIDS:
    model = hmf_jax.from_pretrained(embedded.directory(name), dtype=jnp.float32, progress=False)
    recall[f"embedded {name}"] = accuracy(model, asked)
fig, axes = plt.subplots(1, 2, figsize=(10, 3))
axes[0].plot(losses)
axes[0].set(xlabel="step", ylabel="loss (nats)", title="Stage 2")
axes[1].bar(list(recall), [100 * r for r in recall.values()])
axes[1].set(ylabel="right answers (%)", ylim=(0, 105), title="Recall over 128 tokens")
axes[1].tick_params(axis="x", rotation=20)
plt.tight_layout()
plt.show()

hmf_jax.save_pretrained(hybrid, work / "hybrid", progress=False)
print("pattern in its config.json:", hybrid.config.hybrid_override_pattern)
