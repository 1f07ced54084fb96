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
# # Inside a hybrid layer
#
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/hmf-jax/hmf-jax/blob/main/notebooks/02_inside_a_hybrid_layer.ipynb)
#
# What a layer remembers decides what a long context costs. This notebook plots the memory of each
# layer kind against context length, then opens Gated KalmaNet (GKA): a layer that, for every token,
# solves a ridge regression over all keys it has seen, and keeps only two matrices to do so. It ends
# with a picture of what a query of B'MOJO-F sees.

# %%
# On Colab, or wherever hmf-jax is not installed yet.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("hmf_jax") is None:
    source = "hmf-jax[notebooks,train] @ git+https://github.com/hmf-jax/hmf-jax"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", source], check=True)

# %%
import dataclasses

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from hmf_jax import HybridConfig, HybridLM
from hmf_jax.pallas_kernels import gka, two_window_attention

# %% [markdown]
# ## Memory against context
#
# Sizes of the states of one layer of each kind, at the shape of Qwen3-8B (32 query heads, 8
# key/value heads, head size 128), in bfloat16 with float32 recurrent states. `jax.eval_shape`
# tells the sizes without allocating anything.

# %%
kinds = ["*", "SWA", "GKA", "GDN", "M2", "BMF"]
names = {"*": "full attention", "SWA": "sliding window", "M2": "Mamba2", "BMF": "B'MOJO-F"}
contexts = 2 ** np.arange(10, 18)


def layer_bytes(kind: str, context: int) -> int:
    config = HybridConfig.preset("8b", mixer=kind)
    one = dataclasses.replace(config, layer_kinds=(kind,), vocab_size=8)
    state = jax.eval_shape(lambda: HybridLM(one).init_state(1, int(context)))
    return sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(state.layers))


fig, ax = plt.subplots(figsize=(7, 4))
for kind in kinds:
    sizes = [layer_bytes(kind, c) / 2**20 for c in contexts]
    style = "s-" if kind == "GDN" else "o--"
    size = 8 if kind == "GDN" else 5  # GDN and Mamba2 coincide: show both
    ax.plot(contexts, sizes, style, markersize=size, label=names.get(kind, kind))
ax.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel="MiB per layer and sequence")
ax.set_xticks(contexts, [f"{c // 1024}K" for c in contexts])
ax.set_title("What one layer remembers (8B shape)")
ax.grid(alpha=0.3)
ax.legend()
plt.show()

# %% [markdown]
# Full attention grows with every token. All other kinds are constant: a sliding window of 2048
# tokens, three such windows and the state of an inner GKA layer for B'MOJO-F, one or two float32
# matrices per head for the recurrent kinds (Gated DeltaNet and Mamba2 coincide).
#
# ## The ridge regression of Gated KalmaNet
#
# GKA keeps $H_t = \sum_s \gamma_{s,t}\, k_s k_s^\top$ and
# $U_t = \sum_s \gamma_{s,t}\, k_s v_s^\top$ and answers the query with $o_t = U_t^\top x_t$, where
#
# $$ (H_t + \lambda_t I)\, x_t = q_t, \qquad
#    \lambda_t = \rho \lVert H_t \rVert_F, \quad \rho = 0.02. $$
#
# The system is solved by Chebyshev iteration. All eigenvalues of $H_t + \lambda_t I$ lie in
# $[\lambda_t, \lambda_t + \lVert H_t \rVert_F]$, which fixes the step sizes in advance, and with
# them the rate: a factor of about 0.75 per iteration. Below: the residual
# $\lVert (H + \lambda I) x - q \rVert / \lVert q \rVert$ of the operator itself. We read $x$ off
# the operator by giving it a state whose readout is the identity.

# %%
D, T = 64, 256
keys = jax.random.split(jax.random.key(0), 3)


def unit(key):
    x = jax.random.normal(key, (1, T, 1, D))
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


q, k = unit(keys[0]), unit(keys[1])
g = jnp.full((1, T, 1), -0.01)  # each step forgets one percent

_, (H, _) = gka(q, k, k, None, g, num_iter=0)  # H does not depend on the number of iterations
H = np.asarray(H[0, 0], np.float64)
lam = 0.02 * np.linalg.norm(H)
last = np.asarray(q[0, -1, 0], np.float64)


def solve(num_iter: int) -> np.ndarray:
    # A last token with zero key leaves H as it is; a state U = I makes the readout return x itself.
    state = (jnp.asarray(H, jnp.float32)[None, None], jnp.eye(D)[None, None])
    nothing = jnp.zeros((1, 1, 1, D))
    o, _ = gka(
        q[:, -1:], nothing, nothing, None, None, num_iter=num_iter, scale=1.0, initial_state=state
    )
    return np.asarray(o[0, 0, 0], np.float64)


iterations = [1, 2, 3, 5, 7, 10, 15, 20, 30, 40]
residual = [
    np.linalg.norm((H + lam * np.eye(D)) @ solve(n) - last) / np.linalg.norm(last)
    for n in iterations
]
exact = np.linalg.solve(H + lam * np.eye(D), last)
error = [np.linalg.norm(solve(n) - exact) / np.linalg.norm(exact) for n in iterations]

fig, ax = plt.subplots(figsize=(7, 4))
ax.semilogy(iterations, residual, marker="o", label="residual of the operator")
ax.semilogy(iterations, error, marker="s", label="error against a direct solve")
ax.semilogy(iterations, 0.754 ** np.array(iterations), "--", color="grey", label="$0.754^n$")
ax.set(xlabel="num_iter", ylabel="relative size", title="Chebyshev iteration inside a GKA layer")
ax.grid(alpha=0.3)
ax.legend()
plt.show()
assert residual[-2] < 1e-2, "30 iterations solve the system to better than one percent"

# %% [markdown]
# `num_iter` is an argument of every call (`model(tokens, num_iter=10)`,
# `generate(..., num_iter=10)`) and may differ from row to row of a batch.
# `num_iter=0` skips the solver: plain gated linear attention.
#
# ## What the solver changes
#
# With orthogonal keys, linear attention already returns the right value. With correlated keys it
# mixes values up, and the ridge solution un-mixes them. Store pairs $(k_s, v_s)$ whose keys share a
# common direction, ask for each one, and compare.

# %%
n_pairs = 32
common = unit(keys[2])[:, :1]
pair_keys = unit(keys[0])[:, :n_pairs] + 1.5 * common
pair_keys = pair_keys / jnp.linalg.norm(pair_keys, axis=-1, keepdims=True)
values = unit(keys[1])[:, :n_pairs]
_, state = gka(pair_keys, pair_keys, values, None, None)


def recall(num_iter: int) -> float:
    """Cosine between what is read for each key and the value that was stored with it."""
    hits = []
    for s in range(n_pairs):
        nothing = jnp.zeros((1, 1, 1, D))
        o, _ = gka(
            pair_keys[:, s : s + 1], nothing, nothing, None, None,
            num_iter=num_iter, initial_state=state,
        )  # fmt: skip
        a, b = o[0, 0, 0], values[0, s, 0]
        hits.append(float(a @ b / (jnp.linalg.norm(a) * jnp.linalg.norm(b) + 1e-9)))
    return float(np.mean(hits))


steps = [0, 1, 3, 5, 10, 30]
fig, ax = plt.subplots(figsize=(7, 3.5))
ax.bar([str(n) for n in steps], [recall(n) for n in steps])
ax.set(xlabel="num_iter", ylabel="mean cosine to the stored value", ylim=(0, 1))
ax.set_title("Recall of 32 values stored under correlated keys")
plt.show()

# %% [markdown]
# ## Which token sees which: B'MOJO-F
#
# A B'MOJO-F layer runs an inner mixer (here it would be GKA) over the whole sequence. A query then
# attends to the last $W$ tokens as they are, and to the $W$ before those as the inner mixer has
# summarised them ("fading" tokens), under one softmax. What is older is reached only through those
# summaries. The picture is not a drawing of the definition: it is read off the operator. With equal
# scores for all keys and a one-hot value for each, the output of a query lists what it sees.

# %%
T, W = 48, 12
same = jnp.zeros((1, T, 1, T))  # queries and keys: all scores are 0
one_hot, nothing = jnp.eye(T)[None, :, None], jnp.zeros((1, T, 1, T))


def seen(values, fading_values) -> np.ndarray:
    """[query, key]: the weight with which the query reads the key."""
    return np.asarray(
        two_window_attention(same, same, values, same, fading_values, window=W)[0, :, 0]
    )


in_context, fading = seen(one_hot, nothing), seen(nothing, one_hot)
kind = np.where(in_context > 0, 2, np.where(fading > 0, 1, 0))
kind = np.where(np.tri(T) > 0, kind, np.nan)  # a query cannot see what comes later

fig, ax = plt.subplots(figsize=(6, 5.2))
colors = plt.matplotlib.colors.ListedColormap(["#dddddd", "#f2a65a", "#2a6f97"])
image = ax.imshow(kind, cmap=colors, vmin=-0.5, vmax=2.5)
bar = fig.colorbar(image, ticks=[0, 1, 2], shrink=0.7)
bar.ax.set_yticklabels(["only through\nsummaries", "fading", "in context"])
ax.set(xlabel="key (token)", ylabel="query (token)", title=f"B'MOJO-F, window {W}")
plt.show()

counts = (in_context > 0).sum(1), (fading > 0).sum(1)
print(f"the last query sees {counts[0][-1]} tokens as they are and {counts[1][-1]} summaries;")
print(f"query {W - 1} sees {counts[0][W - 1]} and {counts[1][W - 1]}")
assert not np.any((in_context > 0) & (fading > 0)), "no token is seen twice"
np.testing.assert_allclose((in_context + fading).sum(1), 1, rtol=1e-5)  # one softmax
