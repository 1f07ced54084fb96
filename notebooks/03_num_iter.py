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
# # How many solver iterations does Gated KalmaNet need?
#
# [![Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/hmf-jax/hmf-jax/blob/main/notebooks/03_num_iter.ipynb)
#
# For every token GKA solves $(H + \lambda I)\,x = q$, $\lambda = 0.02\,\lVert H\rVert_F$, by 30
# Chebyshev steps.
#
# **The answer.** Keep the 30 that a checkpoint says, unless you have measured that fewer do: a
# model answers with far fewer, but its logits move. Conjugate gradients (`solver="cg"`) are as
# accurate as 30 Chebyshev steps after 20 at most, whatever the keys, and mostly after 8 to 15. Both
# are options of a call, and changing `num_iter` compiles nothing:
#
# ```python
# logits, state = model(tokens, num_iter=20, solver="cg")
# ```
#
# First the answer on a trained model, then where it comes from: easy and ill-conditioned keys, the
# spectrum, two ideas, rounding and gradients.

# %%
# On Colab, or wherever hmf-jax is not installed yet.
import importlib.util
import subprocess
import sys

if importlib.util.find_spec("hmf_jax") is None:
    source = "hmf-jax[notebooks,train] @ git+https://github.com/hmf-jax/hmf-jax"
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", source], check=True)

# %%
import contextlib
import os
import pathlib
import random
import subprocess
import sys
import tempfile
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import ml_dtypes
import numpy as np
from IPython.display import Markdown

from hmf_jax import embedded, from_pretrained
from hmf_jax.embedded import corpus
from hmf_jax.pallas_kernels import gka, gka_step

D, RIDGE = 128, 0.02
rng = np.random.default_rng(0)


def unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-30)


# %% [markdown]
# ## The answer, on a trained model
#
# One of the package's small models: two GKA layers, trained with 30 Chebyshev steps to recall facts
# from 512 tokens. Left: how far its logits are from those of the exact solution. Right: what that
# does to its answers about six facts at the beginning of 256 tokens (guessing: 1%).

# %%
model = from_pretrained(embedded.directory("gka"), dtype="float32", progress=False)
asked = corpus.questions(random.Random(0), 24, 256, 6, 40)
rows = jnp.concatenate([asked.context, asked.question], axis=1)
answer = np.flatnonzero(asked.answer) + asked.context.shape[1]


@partial(jax.jit, static_argnames="solver")
def answer_logits(model, rows, num_iter, solver):
    """Logits of the digits of the answers, [N, 2, V]."""
    return model(rows, num_iter=num_iter, solver=solver)[0][:, answer - 1]


COUNTS = [0, 1, 2, 3, 5, 7, 10, 15, 20, 30]
exact = np.asarray(answer_logits(model, rows, 60, "cg"))
fig, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained")
for solver, style in {"chebyshev": "s--", "cg": "o-"}.items():
    found = [np.asarray(answer_logits(model, rows, n, solver)) for n in COUNTS]
    off = [np.linalg.norm(x - exact) / np.linalg.norm(exact) for x in found]
    right = [(x.argmax(-1) == np.asarray(rows)[:, answer]).all(axis=1).mean() for x in found]
    axes[0].semilogy(COUNTS, off, style, label=solver)
    axes[1].plot(COUNTS, 100 * np.array(right), style, label=solver)
    print(f"{solver}, error:", dict(zip(COUNTS, (f"{x:.0e}" for x in off), strict=True)))
    print(f"{solver}, right:", dict(zip(COUNTS, (f"{x:.0%}" for x in right), strict=True)))
axes[0].set(xlabel="num_iter", ylabel="relative error", title="Logits")
axes[1].set(xlabel="num_iter", ylabel="%", ylim=(-3, 103), title="Questions answered right")
for ax in axes:
    ax.axvline(30, color="grey", lw=0.8)
    ax.grid(alpha=0.3)
    ax.legend()
plt.show()

# %% [markdown]
# ## Keys
#
# 256 keys of head size 128 per family, with a decay of about 1.6% per token unless the family says
# otherwise. "After SiLU" is what the layer makes of random activations: its keys share a direction.

# %%
T = 256
powers = np.arange(1, D + 1)
draw = rng.standard_normal
raw = draw((T, D))
noise = unit(draw((T, D)))
decay = -0.02 * np.abs(draw(T))
KEYS = {
    "random": (noise, decay),
    "near-orthogonal": (np.tile(np.eye(D), (T // D, 1)) + 0.02 * draw((T, D)), decay),
    "after SiLU": (unit(raw / (1 + np.exp(-raw))), decay),
    "common direction": (unit(noise + 1.5 * unit(draw(D))), decay),
    "one key, repeated": (np.tile(unit(draw(D)), (T, 1)), decay),
    "four keys, repeated": (np.tile(unit(draw((4, D))), (T // 4, 1)), decay),
    "rank 8": (unit(draw((T, 8)) @ draw((8, D))), decay),
    "power law": (unit(draw((T, D)) / powers), decay),
    "power law, slow": (unit(draw((T, D)) / powers**0.5), decay),
    "geometric": (unit(draw((T, D)) * 0.9**powers), decay),
    "tiny, 1e-6": (1e-6 * noise, decay),
    "norms 1e-3 to 1e3": (noise * np.exp(2.3 * draw((T, 1))), decay),
    "half are zero": (noise * (rng.random((T, 1)) < 0.5), decay),
    "extreme decay": (noise, np.where(rng.random(T) < 0.1, -30.0, -2.0)),
}


def systems(k, g):
    """(H [N, D, D], q [N, D]) at eight tokens, each with a random query and one near its key."""
    h, found = np.zeros((D, D)), []
    for t, (k_t, g_t) in enumerate(zip(k, g, strict=True)):
        h = np.exp(g_t) * h + np.outer(k_t, k_t)
        if h.any() and t in (0, 7, 31, 63, 95, 127, 191, 255):
            found += [(h, unit(draw(D))), (h, unit(unit(k_t) + 0.3 * unit(draw(D))))]
    return tuple(np.stack(x) for x in zip(*found, strict=True))


SYSTEMS = {name: systems(*keys) for name, keys in KEYS.items()}

# %% [markdown]
# One more is built to be as hard as possible for conjugate gradients: 21 eigenvalues at the extrema
# of the Chebyshev polynomial $T_{20}$, stretched as far as their Frobenius norm allows.


# %%
def hardest(n):
    angle = np.pi * np.arange(n + 1) / n
    e, q = np.zeros(D), np.zeros(D)
    e[: n + 1] = np.sqrt(8 / (3 * n + 4)) * (1 + np.cos(angle)) / 2
    q[: n + 1] = np.where((angle == 0) | (angle == np.pi), 0.5**0.5, 1)
    basis = np.linalg.qr(draw((D, D)))[0]
    return ((basis * e) @ basis.T)[None], unit(basis @ q)[None]


SYSTEMS["hardest for cg"] = hardest(20)

# %% [markdown]
# If a checkpoint with recorded layers is at hand (`HMF_GOLDENS`), the covariances of its four GKA
# layers join: random weights, but the real path from tokens to keys.

# %%
GOLDENS = os.environ.get("HMF_GOLDENS")


@contextlib.contextmanager
def golden_model(name="gka"):
    with tempfile.TemporaryDirectory() as directory:
        script = pathlib.Path(str(GOLDENS)) / "unpack.py"
        subprocess.run([sys.executable, script, directory, name], check=True, capture_output=True)
        yield from_pretrained(f"{directory}/{name}", dtype="float32", progress=False)


if GOLDENS:
    with golden_model() as model:
        prompt = rng.integers(0, model.config.vocab_size, (1, 150))
        state, hs = model.init_state(1, 150), []
        for piece in np.split(prompt, [2, 8, 40, 90], axis=1):
            _, state = model(jnp.asarray(piece), state=state)
            hs += [np.asarray(layer.h_kk[0], np.float64) for layer in state.layers]
    h = np.concatenate(hs)
    SYSTEMS["layers of a tiny model"] = h, unit(draw(h.shape[:2]))
print({name: len(q) for name, (_, q) in SYSTEMS.items()})

# %% [markdown]
# ## The operator against a direct solve
#
# The operator returns $x$ itself for a token with a zero key whose states are $H$ and the identity.
# All in float64, so that only the iteration counts.


# %%
@partial(jax.jit, static_argnames="solver")
def solve(h, q, num_iter, solver):
    none = jnp.zeros_like(q)[:, None]
    states = (h[:, None], jnp.broadcast_to(jnp.eye(D, dtype=h.dtype), h.shape)[:, None])
    x, _ = gka_step(
        q[:, None], none, none, None, None, None, states,
        num_iter=num_iter, ridge=RIDGE, scale=1.0, solver=solver,
    )  # fmt: skip
    return x[:, 0]


H = np.concatenate([h for h, _ in SYSTEMS.values()])
Q = np.concatenate([q for _, q in SYSTEMS.values()])
family = np.repeat(list(SYSTEMS), [len(q) for _, q in SYSTEMS.values()])
F = np.linalg.norm(H, axis=(1, 2))
A = H + RIDGE * F[:, None, None] * np.eye(D)
X = np.linalg.solve(A, Q[..., None])[..., 0]
STEPS = np.arange(1, 41)


def error(x):
    return np.linalg.norm(x - X, axis=-1) / np.linalg.norm(X, axis=-1)


def residual(x):
    return np.linalg.norm((A @ x[..., None])[..., 0] - Q, axis=-1)


with jax.enable_x64(True):
    solutions = {
        solver: [np.asarray(solve(jnp.asarray(H), jnp.asarray(Q), n, solver)) for n in STEPS]
        for solver in ("chebyshev", "cg")
    }
err = {solver: np.stack([error(x) for x in xs]) for solver, xs in solutions.items()}  # [n, N]
res = {solver: np.stack([residual(x) for x in xs]) for solver, xs in solutions.items()}


def chebyshev_t(n, x):
    return np.cosh(n * np.arccosh(x))


COLORS = dict(zip(SYSTEMS, plt.get_cmap("tab20")(np.arange(len(SYSTEMS)) % 20), strict=True))


def curves(ax, values):
    for name, color in COLORS.items():
        ax.semilogy(STEPS, values[:, family == name].max(axis=1), color=color, label=name)


def legend_below(fig, ax):
    fig.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncol=6, fontsize=8)


fig, axes = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True, layout="constrained")
for ax, values, what in zip(
    axes, (err, res), ("error $|x - x^*| / |x^*|$", "residual $|Ax - q| / |q|$"), strict=True
):
    curves(ax, values["chebyshev"])
    theory = 1 / chebyshev_t(STEPS + 1.0, 1 + 2 * RIDGE)
    ax.semilogy(STEPS, theory, "k--", label="bound $1 / T_{n+1}(1.04)$", zorder=3)
    ax.set(xlabel="num_iter", title=f"Chebyshev: {what}", ylim=(1e-6, 1.5))
    ax.grid(alpha=0.3)
legend_below(fig, axes[0])
plt.show()
n30 = list(STEPS).index(30)
print(f"30 steps: error {np.median(err['chebyshev'][n30]):.1e} median,",
      f"{err['chebyshev'][n30].max():.1e} worst; bound {theory[n30]:.1e}")  # fmt: skip
assert (res["chebyshev"].max(axis=1) < theory * (1 + 1e-6)).all()

# %% [markdown]
# Chebyshev's error is what its bound says on every family (the curves lie on top of each other): a
# factor of 0.754 per step, and 0.03% after 30. An easy spectrum does not help it: the interval
# $[\lambda, \lambda + \lVert H\rVert_F]$ is all that it knows.
#
# ## What the spectrum really looks like
#
# $\lVert H\rVert_F^2$ is the sum of the squared eigenvalues, so the $j$-th largest is at most
# $\lVert H\rVert_F/\sqrt j$: the upper half of Chebyshev's interval holds four eigenvalues at most.

# %%
eigenvalues = np.linalg.eigvalsh(H)[:, ::-1]
fig, ax = plt.subplots(figsize=(9, 5), layout="constrained")
for name, color in COLORS.items():
    last = np.flatnonzero(family == name)[-1]
    ax.loglog(powers, np.maximum(eigenvalues[last] / F[last], 1e-6), color=color, label=name)
ax.loglog(powers, powers**-0.5, "k--", label=r"limit $1/\sqrt{j}$")
ax.axhline(RIDGE, color="grey", lw=0.8)
ax.text(1.05, RIDGE * 1.1, r"$\lambda$", color="grey")
ax.set(xlabel="j", ylabel=r"$j$-th eigenvalue / $|H|_F$", ylim=(1e-4, 1.5))
ax.set_title("Spectra of $H$ at the last token")
legend_below(fig, ax)
plt.show()

# %% [markdown]
# ## Two ideas
#
# **A tighter interval.** Trace and Frobenius norm bound the largest eigenvalue of a positive
# semidefinite $H$ of rank $r$ (Wolkowicz and Styan, 1980):
# $\mu = t/r + \sqrt{(1 - 1/r)(\lVert H\rVert_F^2 - t^2/r)}$, $t = \operatorname{tr} H$.
# Chebyshev then runs on $[\lambda, \lambda + \mu]$.
#
# **Conjugate gradients.** One product with $H$ and two inner products per step, no interval: it
# removes the few large eigenvalues in a step each, and then sees the short interval that is left.
#
# The table counts steps until each reaches the error that 30 plain steps have on the same token.


# %%
def chebyshev(matvec, q, mu, n):
    """n Chebyshev steps for matvec(x) = q, spectrum in [RIDGE, RIDGE + mu] (H / f, numpy)."""
    mu = np.broadcast_to(mu, q.shape[:1])[:, None]
    step, c4 = 2 / (2 * RIDGE + mu), (0.5 * mu / (2 * RIDGE + mu)) ** 2
    x, x_prev, omega = step * q, np.zeros_like(q), 2.0
    for _ in range(n):
        omega = 1 / (1 - c4 * omega)
        x, x_prev = omega * (x - step * (matvec(x) - q)) - (omega - 1) * x_prev, x
        yield x


def conjugate_gradients(matvec, q, n):
    x, r, p = np.zeros_like(q), q, q
    for _ in range(n):
        ap, rr = matvec(p), np.sum(r * r, -1, keepdims=True)
        pap = np.sum(p * ap, -1, keepdims=True)
        step = np.where(rr > 1e-30, rr / np.maximum(pap, 1e-30), 0)
        x, r = x + step * p, r - step * ap
        p = r + np.sum(r * r, -1, keepdims=True) / np.maximum(rr, 1e-30) * p
        yield x


def exact_product(x):
    return (A / F[:, None, None] @ x[..., None])[..., 0]


trace = np.trace(H, axis1=1, axis2=2)
rank = np.maximum((eigenvalues > 1e-12 * F[:, None]).sum(axis=1), 1)
mu = trace / rank + np.sqrt(np.maximum((1 - 1 / rank) * (F**2 - trace**2 / rank), 0))
mu = np.maximum(np.minimum(mu, trace), eigenvalues[:, 0]) / F  # (maximum: rounding only)
tight = np.stack([error(x / F[:, None]) for x in chebyshev(exact_product, Q, mu, 40)])


def steps_needed(errors):
    reached = errors <= np.maximum(err["chebyshev"][n30], 1e-12) * (1 + 1e-6)
    assert reached.any(axis=0).all()
    return STEPS[reached.argmax(axis=0)]


needed = {"interval": steps_needed(tight), "cg": steps_needed(err["cg"])}
rows = [
    "| keys | error of 30 plain steps, median / worst | tighter interval: steps, median / worst "
    "| cg: steps, median / worst | error of 20 cg steps, worst |",
    "|---|---|---|---|---|",
]
for name in [*SYSTEMS, "all"]:
    i = np.ones(len(family), bool) if name == "all" else family == name
    plain, cg20 = err["chebyshev"][n30, i], err["cg"][list(STEPS).index(20), i]
    counts = [f"{np.median(n[i]):.0f} / {n[i].max()}" for n in needed.values()]
    plain = f"{np.median(plain):.1e} / {plain.max():.1e}"
    rows.append(f"| {name} | {plain} | {' | '.join(counts)} | {cg20.max():.0e} |")
assert needed["cg"].max() <= 20
worse = (err["cg"] > err["chebyshev"] + 1e-12).any(axis=1)
print("steps at which cg is less accurate than Chebyshev somewhere:", STEPS[worse].tolist())
Markdown("\n".join(rows))

# %% [markdown]
# The tighter interval helps only where the spectrum is flat: not early in a sequence, not with a
# dominant direction, and in the worst case it gains nothing. Conjugate gradients need at most 20
# steps everywhere, and few where keys repeat or share a direction. They are the option. They lose
# only among the first few steps, where n Chebyshev steps make a polynomial of one degree more.

# %%
fig, axes = plt.subplots(1, 2, figsize=(11, 4.8), sharey=True, layout="constrained")
curves(axes[0], err["cg"])
axes[0].semilogy(STEPS, err["chebyshev"].max(axis=1), "k--", label="Chebyshev, worst")
axes[0].axhline(err["chebyshev"][n30].max(), color="grey", lw=0.8)
axes[0].set(xlabel="num_iter", ylabel="error", title='solver="cg": worst token of each family')
legend_below(fig, axes[0])


def energy(x):
    d = lambda y: np.einsum("nd,nde,ne->n", y, A, y) ** 0.5  # noqa: E731
    return d(x - X) / d(X)


bound = [
    min(1 / chebyshev_t(n - m, 1 + 2 * RIDGE * (m + 1) ** 0.5) for m in range(n + 1)) for n in STEPS
]
hard = 1 / chebyshev_t(STEPS, 1 + 2 * RIDGE * ((3 * STEPS + 4) / 8) ** 0.5)
measured = np.stack([energy(x) for x in solutions["cg"]])
axes[1].semilogy(STEPS, theory, "k--", label="Chebyshev, bound")
axes[1].semilogy(STEPS, bound, color="C3", label="cg, bound")
axes[1].semilogy(STEPS, hard, color="C1", label="cg, hardest system for each $n$ (formula)")
axes[1].semilogy(STEPS, measured.max(axis=1), color="C0", label="cg, worst measured")
axes[1].set(
    xlabel="num_iter", title="energy norm, $(d^T A\\, d)^{1/2}$ of the error", ylim=(1e-7, 1.5)
)
axes[1].legend(fontsize=8)
for ax in axes:
    ax.grid(alpha=0.3)
plt.show()
assert (measured.max(axis=1) < np.array(bound) + 1e-12).all()

# %% [markdown]
# Right: of $n$ steps, $m$ can remove the $m$ largest eigenvalues while $n - m$ work on
# $[\lambda, \lambda + \lVert H\rVert_F/\sqrt{m+1}]$, so that for **any** $H$
#
# $$ \text{energy error} \le \min_m \; 1 / T_{n-m}\!\left(1 + 2\rho\sqrt{m+1}\right). $$
#
# By this bound 25 steps always suffice; the hardest systems known need 20. The jump of
# "hardest for cg" after step 20 is no mistake: it has 21 eigenvalues.
#
# ## Rounding
#
# On a GPU the products have bfloat16 or TF32 operands. Their rounding sets a floor that no number
# of steps gets below, the same for both solvers; with bfloat16 operands cg is there after 12 steps,
# Chebyshev after 25.


# %%
def rounded(bits):
    """The product with H and x rounded to `bits` bits of mantissa, accumulated in float32."""

    def cut(x):
        if bits == 7:
            return np.asarray(x, ml_dtypes.bfloat16).astype(np.float32)
        i = np.asarray(x, np.float32).view(np.uint32)
        half = np.uint32(1 << (22 - bits))
        return ((i + half) & ~np.uint32((1 << (23 - bits)) - 1)).view(np.float32)

    h = cut(H / F[:, None, None])
    return lambda x: (h @ cut(x)[..., None])[..., 0] + np.float32(RIDGE) * x


fig, axes = plt.subplots(1, 2, figsize=(11, 3.6), sharey=True)
q32 = Q.astype(np.float32)
for ax, (bits, name) in zip(axes, {7: "bfloat16", 10: "TF32"}.items(), strict=True):
    product = rounded(bits)
    for label, xs in {
        "Chebyshev": chebyshev(product, q32, np.float32(1), 40),
        "cg": conjugate_gradients(product, q32, 40),
    }.items():
        e = np.stack([error(x / F[:, None]) for x in xs])
        line = ax.semilogy(STEPS, np.median(e, axis=1), label=f"{label}, median")[0]
        ax.semilogy(STEPS, e.max(axis=1), ":", color=line.get_color(), label=f"{label}, worst")
        print(f"{name}, {label}, worst:", {n: f"{e[n - 1].max():.1e}" for n in (10, 15, 20, 30)})
    ax.set(xlabel="num_iter", ylabel="error", title=f"operands in {name}")
    ax.grid(alpha=0.3)
    ax.legend(fontsize=8)
plt.tight_layout()
plt.show()

# %% [markdown]
# ## Gradients
#
# Gradients are those of the exact solution, with a second solve by the same solver. Their error
# against the converged gradient, with respect to queries, keys, log-decays:

# %%
with jax.enable_x64(True):
    B, S, d = 1, 96, 32
    q, k, v = (jnp.asarray(unit(draw((B, S, 1, d)))) for _ in range(3))
    g = jnp.asarray(-0.02 * np.abs(draw((B, S, 1))))
    weight = jnp.asarray(draw((B, S, 1, d)))

    @partial(jax.jit, static_argnames="solver")
    def gradient(num_iter, solver):
        def loss(q, k, g):
            o, _ = gka(q, k, v, None, g, num_iter=num_iter, solver=solver)
            return jnp.sum(o * weight)

        return jax.grad(loss, argnums=(0, 1, 2))(q, k, g)

    converged = gradient(120, "chebyshev")
    fig, ax = plt.subplots(figsize=(7, 3.6))
    for solver, style in {"chebyshev": "--", "cg": "-"}.items():
        gradients = [gradient(n, solver) for n in STEPS]
        for i, name in enumerate("qkg"):
            size = np.linalg.norm(converged[i])
            values = [np.linalg.norm(x[i] - converged[i]) / size for x in gradients]
            ax.semilogy(STEPS, values, style, color=f"C{i}", label=f"{solver}, d{name}")
            print(f"{solver}, d{name}:", {n: f"{values[n - 1]:.0e}" for n in (10, 15, 20, 30)})
ax.set(xlabel="num_iter", ylabel="relative error", ylim=(1e-9, 3), title="Gradients, random keys")
ax.grid(alpha=0.3)
ax.legend(fontsize=8)
plt.show()

# %% [markdown]
# ## Using it
#
# ```python
# logits, state = model(tokens, num_iter=20, solver="cg")
# o, state = gka(q, k, v, alpha, g, beta, num_iter=20, solver="cg")
# ```
#
# The default stays Chebyshev with 30 steps: it is what the checkpoints were trained with, and what
# GPU kernels have. Methods, numbers and limits are in `docs/num_iter.md`.
