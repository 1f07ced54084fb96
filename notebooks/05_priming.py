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
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/hmf-jax/hmf-jax/blob/main/notebooks/05_priming.ipynb)
#
# The whole pipeline on a toy: choose the layers that can do without full attention, replace them by
# Gated KalmaNet layers that start from the attention weights (stage 0), let these imitate the
# attention they replace (stage 1), unfuse, fine-tune (stage 2). The Transformer comes with the
# package: 0.45 million parameters, trained to remember facts (`hmf_jax/embedded/train.py`). With a
# real model the calls are the same; from the shell they are `hmf-jax prime select`, `init`,
# `distill` and `unfuse` ([docs/priming.md](../docs/priming.md)).

# %%
# On Colab, or wherever hmf-jax is not installed yet.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("hmf_jax") is None:
    source = "hmf-jax[notebooks,train] @ git+https://github.com/hmf-jax/hmf-jax"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", source], check=True)

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
# Each layer in turn sees only the last 16 tokens, and the figure shows how much less likely the
# right answers become. The taller a bar, the more that layer is missed: layer 2 is the one that
# looks the facts up, and it has to stay. The others cost next to nothing; two of them are to become
# layers with a state of fixed size. The scores are kept in a CSV file, in the original's format.

# %%
work = Path(tempfile.mkdtemp())
score = priming.likelihood(batches(2, 2))
scores = priming.score_layers(base, score, work / "scores.csv", window=16)
print(f"missed least: layers {sorted(priming.select_layers(scores, m=3).layers)}")
chosen = (0, 3)
values = {i: row["log_likelihood"] for i, row in scores.rows.items()}

fig, ax = plt.subplots(figsize=(6, 3))
layers = sorted(i for i in values if i >= 0)
colors = ["#2a6f97" if i in chosen else "#bbbbbb" for i in layers]
ax.bar([str(i) for i in layers], [values[i] - values[-1] for i in layers], color=colors)
ax.set(xlabel="layer that is limited to 16 tokens", ylabel="change of log-likelihood (nats)")
ax.set_title("Blue: the layers that are replaced")
plt.show()

# %% [markdown]
# Among layers that are missed equally little, spread the choice, as released hybrids do: with the
# neighbours 0 and 1 replaced, the steps below end at 19% right answers instead of 100.
#
# ## Stage 0
#
# `*DA` stays attention; `GKA*` holds a new mixer beside the attention that it will learn from. The
# new projections start from those of the attention; convolutions, gates and decays start fresh.

# %%
pattern = priming.selection.pattern(chosen, base.config.num_hidden_layers, "GKA")
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
new = [i for i, symbol in enumerate(fused.config.layer_kinds) if symbol.startswith("GKA")]
x = np.arange(len(new))
for place, (label, terms) in enumerate({"stage 0": before, "stage 1": after}.items()):
    errors = np.asarray(terms["mixer"])[new]
    axes[1].bar(x + 0.4 * place - 0.2, errors, 0.4, label=f"after {label}")
axes[1].set(xlabel="layer", ylabel="mean squared error", title="New mixer against its attention")
axes[1].set_xticks(x, [str(i) for i in new])
axes[1].legend()
plt.tight_layout()
plt.show()

# %% [markdown]
# Left: the loss falls steadily, to less than half. Right: each of the new mixers has come nearer
# to the attention that it will replace. It need not become equal: what still differs, the other
# layers learn to take in stage 2.
#
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

fig, axes = plt.subplots(1, 2, figsize=(9, 3))
axes[0].plot(losses)
axes[0].set(xlabel="step", ylabel="loss (nats)", title="Stage 2")
axes[1].bar(list(recall), [100 * r for r in recall.values()])
axes[1].set(ylabel="right answers (%)", ylim=(0, 105), title="Recall over 128 tokens")
plt.tight_layout()
plt.show()

# %% [markdown]
# The right figure is the whole story. The Transformer answers every question. With two layers
# replaced and untrained (stage 0) nothing works. Imitation alone (stage 1) brings part of it back,
# and a little ordinary training (stage 2) the rest.
#
# ## The hybrid
#
# It is saved in the original's format and works like any other model. Half of its layers no longer
# keep the context: what a sequence needs grows half as fast with its length. The hybrids that come
# with the package (`hmf_jax.embedded.HYBRIDS`) keep no full attention at all, and were trained
# longer: `docs/embedded.md`.

# %%
hybrid.save_pretrained(work / "hybrid", source=embedded.directory("transformer"), progress=False)
model = hmf_jax.from_pretrained(work / "hybrid", dtype=jnp.float32, progress=False)
print("pattern in its config.json:", model.config.hybrid_override_pattern)
facts, names = corpus.context(random.Random(3), 128, 4, 42)
print(facts)
chat = hmf_jax.ChatSession(model, system=facts, max_new_tokens=16)
for name, _, _ in names:
    print(f"{name}?  {chat.send(f'{name}?')}")

print(hmf_jax.memory.memory_table(model.config, (1024, 4096)))
