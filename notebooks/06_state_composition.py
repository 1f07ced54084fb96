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
# # Contexts longer than training, without training
#
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/hmf-jax/hmf-jax/blob/main/notebooks/06_state_composition.ipynb)
#
# A model that was trained on short rows fails on long ones. State composition
# ([PICASO](https://arxiv.org/abs/2502.17605)) cuts a long context into parts that are short enough,
# reads them side by side, and merges what they leave behind into *one* state: keys and values of
# the parts follow each other, recurrent states are averaged (or summed). Whatever continues a state
# continues a composed one.

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
import numpy as np
from IPython.display import Markdown

from hmf_jax import compose, from_pretrained
from hmf_jax.embedded import corpus, directory

# %% [markdown]
# ## The models
#
# Two of the package's small models: a Transformer and the hybrid made of it (two layers with
# windows of 16 tokens, two GKA layers). Tokens are bytes; they were trained to recall facts from
# rows of at most 512. We ask them about 1024 tokens: 16 facts at first, then other text.

# %%
models = {
    name: from_pretrained(directory(name), dtype=jnp.float32, progress=False)
    for name in ("transformer", "gka")
}
asked = corpus.questions(random.Random(0), 48, 1024, 16, 340)
print(corpus.decode(asked.context[0].tolist()[:140]), "...")
print(corpus.decode(asked.question[0].tolist()))

# %% [markdown]
# ## One call
#
# `compose` returns a state of one row. It holds all 1024 tokens, and the next one takes the rotary
# position after a *part*: parts share positions, so that none is new to the model.

# %%
model, context, question = models["transformer"], asked.context[1], asked.question[1].tolist()
begun = question[: np.argmax(asked.answer)]
for chunks in (4, 1):
    state = compose(model, context, chunks)
    (out,) = model.generate([begun], state=state, max_new_tokens=3, eos_ids=())
    held, position = int(state.length[0]), int(state.position[0])
    print(f"{chunks} parts: {held} tokens held, the next one at position {position}")
    print(corpus.decode(begun + out.tokens))
print("right:", corpus.decode(question))

# %% [markdown]
# ## Does it remember?
#
# Right answers among 48 questions (guessing: 1%), against the number of parts.

# %%
read = jax.jit(lambda model, state, tokens: model(tokens, state=state)[0][:, :-1].argmax(-1))


def right(model, chunks):
    hits = 0
    for context, question in zip(asked.context, asked.question, strict=True):
        state = compose(model, context, chunks)
        said = np.asarray(read(model, state, question[None]))
        hits += (said == question[None, 1:])[:, asked.answer[1:]].all()
    return hits / len(asked.context)


PARTS = (1, 2, 4, 8)
lines = ["| | as it is | 2 parts | 4 parts | 8 parts |", "|---|---|---|---|---|"]
for name, model in models.items():
    lines.append(" | ".join([f"| {name}", *(f"{right(model, n):.0%}" for n in PARTS)]) + " |")
Markdown("\n".join(lines))

# %% [markdown]
# The Transformer has never seen position 600: as it is it fails, composed it answers. The hybrid
# has no positions in its states and needs no help; averaging states costs it nothing until parts
# get short.
#
# `kv="last"` keeps the keys and values of the last part only, `ssm="fuse"` adds instead of
# averaging (for Mamba2: averages over all orders of the parts), `prefix=` puts instructions in
# front of every part. `kv="full"` reads the context once for attention and composes the other
# states only.
