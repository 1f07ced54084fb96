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
# # Quickstart: load a hybrid model, chat, stream
#
# A *hybrid* model is a Transformer in which some attention layers were replaced by layers with a
# state of fixed size. This notebook loads one from a Hugging Face directory and talks to it. With
# a GPU, all of it runs there.
#
# The directory below is a tiny model with random weights that the package builds on the spot, so
# its answers are noise, but every step is the one you take with a real model: replace `path` by
# `"amazon/GKA-primed-HQwen3-8B-Instruct"` or a local directory.

# %%
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp

import hmf_jax
from hmf_jax.demo import write_checkpoint

path = Path(tempfile.mkdtemp()) / "tiny-hybrid"
write_checkpoint(path)
sorted(p.name for p in path.iterdir())

# %% [markdown]
# ## Three lines to text

# %%
model = hmf_jax.from_pretrained(path)
chat = hmf_jax.ChatSession(model, max_new_tokens=48)
print(chat.send("What is a Kalman filter?"))

# %% [markdown]
# `stream` yields pieces of text as they are decoded. The session remembers the conversation, and
# what the model has already read stays in its state: the second turn only reads the new words.

# %%
for piece in chat.stream("Say that again."):
    print(repr(piece), end=" ")

# %% [markdown]
# ## Sampling, and the `num_iter` knob
#
# Layers of the kind GKA solve a small ridge regression per token with a few Chebyshev iterations.
# `num_iter` trades accuracy for speed, per call.

# %%
sampling = hmf_jax.SamplingParams(temperature=0.8, top_p=0.95, seed=7)
for num_iter in (30, 10, 1):
    chat = hmf_jax.ChatSession(model, sampling=sampling, num_iter=num_iter, max_new_tokens=24)
    print(num_iter, repr(chat.send("Count to three.").text))

# %% [markdown]
# ## Below the text: tokens, logits, states
#
# A model is a plain JAX pytree. Call it on token ids; give it a state and it continues where the
# state ends, however the tokens are cut into calls.

# %%
tokens = jnp.array([[72, 101, 108, 108, 111, 33]])
whole, _ = model(tokens)

state = model.init_state(batch=1, capacity=16)
_, state = model(tokens[:, :4], state=state)
rest, state = model(tokens[:, 4:], state=state)
print("largest difference:", jnp.abs(whole[:, 4:] - rest).max(), "tokens seen:", state.length)

# %% [markdown]
# Batches of prompts of different lengths, log-probabilities and per-prompt seeds go through
# `model.generate`, which compiles its decode loop once and runs it on the device.

# %%
prompts = [[72, 105], [72, 101, 108, 108, 111], [10]]
for g in model.generate(prompts, max_new_tokens=8, logprobs=True):
    print(g.finish_reason, g.tokens, [round(p, 2) for p in g.logprobs])

# %% [markdown]
# ## Several devices
#
# `from_pretrained(path, mesh=hmf_jax.make_mesh(tp=8))` splits heads, MLP columns and vocabulary
# over eight devices; nothing else changes. Here is what this machine has:

# %%
jax.devices()
