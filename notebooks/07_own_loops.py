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
# # Loops of your own: best-of-n, steering, policy gradients
#
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/hmf-jax/hmf-jax/blob/main/notebooks/07_own_loops.ipynb)
#
# Research rarely fits into `generate`. Three pure functions of arrays do what it does inside a
# program of yours: the model itself with a state, `hmf_jax.sample`, which continues prompts, and
# `hmf_jax.score`, whose log-probabilities have gradients. They work under `jit`, `vmap`, `scan` and
# `grad`. This notebook uses them on the tiny trained hybrid that comes with the package; all of it
# runs on a laptop CPU in a minute or two.

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

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import hmf_jax
from hmf_jax import embedded
from hmf_jax.block import run_block
from hmf_jax.embedded import corpus
from hmf_jax.embedded.recall import accuracy

model = hmf_jax.from_pretrained(embedded.directory("gka"), dtype=jnp.float32, progress=False)


def tokens(*texts: str) -> jax.Array:
    """[B, T] token ids; the tokens of this model are bytes."""
    return jnp.array([list(text.encode()) for text in texts])


def text(row: jax.Array) -> str:
    return bytes(t for t in np.asarray(row).tolist() if 0 < t < 256).decode()


# %% [markdown]
# ## A decode loop in one program
#
# A `ModelState` is a pytree whose shapes never change, so it can be the carry of a loop, from the
# start. This loop is greedy decoding, prompt included: it feeds one token at a time.


# %%
@jax.jit
def greedy(model, prompt, steps=12):
    rows, T = prompt.shape
    given = jnp.pad(prompt, ((0, 0), (0, 64 - T)))

    def body(i, carry):
        out, state = carry
        logits, state = model(out[:, i][:, None], state=state)
        new = jnp.where(i + 1 < T, out[:, i + 1], logits[:, 0].argmax(-1))
        return out.at[:, i + 1].set(new), state

    carry = given, model.init_state(rows, capacity=64)
    return jax.lax.fori_loop(0, T + steps - 1, body, carry)[0]


prompt = "Rada has 71. Buse has 84.\nQ: Buse?\nA: "
print(text(greedy(model, tokens(prompt))[0]))

# %% [markdown]
# ## Best of n
#
# `sample` continues prompts; `vmap` over keys draws several continuations of each. Here a cheap
# sampler (one solver iteration, temperature 1) proposes eight answers per question, and the same
# model with all its iterations judges them by `score`.

# %%
asked = corpus.questions(random.Random(0), 32, 128, 4, 42)
first = int(np.argmax(asked.answer))  # where the two digits of the answer begin
prompts = jnp.asarray(np.concatenate([asked.context, asked.question[:, :first]], axis=1))
truth = jnp.asarray(asked.question[:, first : first + 3])  # two digits and a full stop


@jax.jit
def best_of(model, prompts, keys):
    """Answers [n, B, 3] and the judge's log-probability of each [n, B]."""

    def one(key):
        said, *_ = hmf_jax.sample(model, prompts, None, key, steps=3, num_iter=1)
        found = hmf_jax.score(model, jnp.concatenate([prompts, said], axis=1), num_iter=30)
        return said, found[:, -3:].sum(axis=1)

    return jax.lax.map(one, keys)  # one after the other; jax.vmap: together, if the memory allows


said, judged = best_of(model, prompts, jax.random.split(jax.random.key(0), 8))
right = (said == truth).all(axis=-1)  # [n, B]
for n in (1, 2, 4, 8):
    best = judged[:n].argmax(axis=0)
    chosen = jnp.take_along_axis(right[:n], best[None], axis=0)
    print(f"best of {n}: {chosen.mean():.0%} right")

# %% [markdown]
# ## Where is a fact remembered? Tracing and steering
#
# `trace` returns what every layer put out. Two texts that differ in one fact differ, at the place
# where the answer is due, by what the model knows about it. Adding that difference to a layer's
# output in a loop over the blocks *steers* the answer: the text says 23, and the model says 7.

# %%
ours, other = (tokens(f"Rada has {n}. Buse has 84.\nQ: Rada?\nA: Rada has ") for n in (23, 71))
differences = [
    there[:, -1] - here[:, -1]
    for (_, here), (_, there) in zip(model.trace(ours)[2], model.trace(other)[2], strict=True)
]


@jax.jit
def steered(model, tokens, direction, layer, strength):
    """Probabilities of the next token if `strength * direction` is added after `layer`."""
    x, ctx = model.embed(tokens)
    for i, block in enumerate(model.layers):
        x, *_ = run_block(block, x, ctx, None)
        x = x.at[:, -1].add(jnp.where(i == layer, strength, 0.0) * direction)
    return jax.nn.softmax(model.norm(x[:, -1]) @ model.head_kernel())[0]


strengths = np.linspace(0, 2, 9)
fig, ax = plt.subplots(figsize=(6, 3))
for layer, direction in enumerate(differences):
    p = [steered(model, ours, direction, layer, s)[ord("7")] for s in strengths]
    ax.plot(strengths, p, "o-", label=f"layer {layer} ({model.config.layer_kinds[layer]})")
ax.set(xlabel="strength", ylabel='probability of "7"', title="The text says 23, the other one 71")
ax.legend()
plt.show()

# %% [markdown]
# Before the layer that recalls, there is nothing to move: the two windows at the bottom only see
# the question. The answer enters in the GKA layers, whose states hold the facts.
#
# ## Policy gradients
#
# Asked about somebody it knows nothing about, the model says some number. A reward wants an even
# one. Each step samples a *group* of answers per prompt, takes as advantage how much better an
# answer is than its group (as GRPO does), and moves the log-probabilities that `score` gives; a
# second term keeps the model near what it was on ordinary text, measured by the frozen model.

# %%
GROUP, NAMES, STEPS = 16, 8, 20
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-4))
frozen = model


@jax.jit
def improve(model, opt_state, prompts, ordinary, key):
    rows = jnp.repeat(prompts, GROUP, axis=0)
    said, *_ = hmf_jax.sample(model, rows, None, key, steps=2)
    digits = (said >= ord("0")) & (said <= ord("9"))
    reward = (digits.all(axis=1) & (said[:, 1] % 2 == 0)).astype(jnp.float32)
    group = reward.reshape(-1, GROUP)
    advantage = group - group.mean(axis=1, keepdims=True)
    advantage = (advantage / (group.std(axis=1, keepdims=True) + 0.1)).reshape(-1, 1)

    def loss(model):
        gain = advantage * hmf_jax.score(model, jnp.concatenate([rows, said], axis=1))[:, -2:]
        drift = hmf_jax.score(model, ordinary) - hmf_jax.score(frozen, ordinary)
        return -gain.mean() + 0.1 * (drift**2).mean()

    updates, opt_state = optimizer.update(jax.grad(loss)(model), opt_state, model)
    return optax.apply_updates(model, updates), opt_state, reward.mean()


rng, key, rewards = random.Random(0), jax.random.key(1), []
opt_state = optimizer.init(model)
exam = corpus.questions(random.Random(2), 64, 128, 4, 42)
print(f"recall before: {accuracy(model, exam):.0%}")
for i in range(STEPS):
    strangers = tokens(*(f"Q: {name}?\nA: {name} has " for name in rng.sample(corpus.NAMES, NAMES)))
    ordinary = jnp.asarray(corpus.rows(rng, 4, 96, level=2).tokens)
    model, opt_state, reward = improve(
        model, opt_state, strangers, ordinary, jax.random.fold_in(key, i)
    )
    rewards.append(float(reward))
early, late = np.mean(rewards[:5]), np.mean(rewards[-5:])
print(f"reward of the first five steps {early:.2f}, of the last five {late:.2f}")
print(f"recall after: {accuracy(model, exam):.0%}")

fig, ax = plt.subplots(figsize=(6, 3))
ax.plot(rewards)
ax.set(xlabel="step", ylabel="mean reward", ylim=(0, 1.05), title="Even numbers")
plt.show()

# %% [markdown]
# The reward rises, and what the model was trained for stays: asked about facts it has read, it
# answers as before. The same loop with a larger model needs its memory to be planned: LoRA
# adapters (`hmf_jax.training.apply_lora`) as the only trained leaves, `jax.checkpoint` inside the
# loss, a mesh (`hmf_jax.make_mesh`) under the model; see docs/generation.md and docs/training.md.
