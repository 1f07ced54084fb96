"""Gated KalmaNet on Hopper GPUs: Pallas Mosaic kernels, forward and backward.

Tokens are cut into chunks of C = 64; per row and query head, with S and U the states of key
covariance and key-value products at the start of a chunk, i, j tokens of it,

    M_ij = exp(sum of g over (j, i]) for j <= i in one document, else 0
    a_i  = exp(sum of g up to i), 0 where another document began
    H_i x = a_i S x + sum_j M_ij beta_j^2 k_j (k_j . x)        (the Gram form of H_i x)

Five kernels, each reading q, k, v as they lie in memory [B, T, heads, D] (key/value heads are
shared, never repeated; beta only enters M and the weights of the scans):

    scan            states at all chunk starts (ends, in reverse); one CTA walks a head's chunks
                    (mosaic_scan.py)
    solve           ||H_i||_F, Chebyshev iteration, blend with q, readout; one CTA per chunk
                    (mosaic_forward.py)
    solve_backward  the same iteration on the gradient of x; implicit differentiation
    read_backward   gradients of k and v through the readout: inside a chunk, from suffix states
    gram_backward   gradient of k through H, likewise; those of g and beta (mosaic_backward.py)

Products have bfloat16 operands and float32 accumulators; the iterate, the norms, the scans and all
decays are float32. States at chunk starts are stored in bfloat16 (they are operands only: the scan
itself never rounds).
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from hmf_jax.pallas_kernels.dispatch import kept, why_no_hopper
from hmf_jax.pallas_kernels.ops.gka.inputs import Inputs, Options, Result
from hmf_jax.pallas_kernels.ops.gka.mosaic_backward import (
    gram_backward,
    read_backward,
    solve_backward,
)
from hmf_jax.pallas_kernels.ops.gka.mosaic_forward import solve
from hmf_jax.pallas_kernels.ops.gka.mosaic_scan import (
    D_ALPHA,
    D_BETA,
    D_G,
    FORWARD,
    GRAM,
    MU,
    REVERSE,
    START,
    START_KK,
    C,
    bf16,
    f32,
    scan,
)


def gka_mosaic(inputs: Inputs, options: Options, *, interpret: bool = False) -> Result:
    """See `pallas_kernels.gka`.

    q, k, v bfloat16 with D = 64 or 128, states float32. Gradients are implicit, as in chunked.py.

    Raises:
      ValueError: other dtypes or head dims.
    """
    if reason := _unsupported(inputs):
        raise ValueError(f"gka_mosaic: {reason}.")
    T = inputs.q.shape[1]
    doc = jnp.zeros(inputs.q.shape[:2], jnp.int32) if inputs.doc is None else inputs.doc
    inputs = inputs._replace(num_iter=jnp.asarray(inputs.num_iter), doc=doc)
    if pad := -T % C:  # tokens of zeros neither write nor decay
        wide = [(0, 0), (0, pad)]
        q, k, v = (jnp.pad(a, [*wide, (0, 0), (0, 0)]) for a in inputs[:3])
        alpha, g, beta = (jnp.pad(a, [*wide, (0, 0)]) for a in inputs[3:6])
        doc = jnp.pad(doc, wide, mode="edge")
        inputs = inputs._replace(q=q, k=k, v=v, alpha=alpha, g=g, beta=beta, doc=doc)
    o, states = _gka(_Static(*options, interpret), inputs)
    return o[:, :T], states


def why_not(inputs: Inputs, solver: str) -> str | None:
    """Why the kernels cannot run these arguments on this machine; None if they can."""
    if solver != "chebyshev":
        return f"its kernels have the Chebyshev solver, not {solver!r}"
    return why_no_hopper() or _unsupported(inputs)


def _unsupported(inputs: Inputs) -> str | None:
    if inputs.q.shape[-1] not in (64, 128):
        return f"its kernels take head_dim 64 and 128, got {inputs.q.shape[-1]}"
    q, k, v = inputs[:3]
    if any(jnp.dtype(a.dtype) != bf16 for a in (q, k, v)):
        return f"its kernels take bfloat16, got {q.dtype}, {k.dtype}, {v.dtype}"
    if any(jnp.dtype(a.dtype) != f32 for a in (inputs.h_kk, inputs.h_kv)):
        return f"its kernels keep float32 states, got {inputs.h_kk.dtype}, {inputs.h_kv.dtype}"
    return None


class _Static(NamedTuple):
    """`Options`, and whether kernels run in the interpreter."""

    ridge: float
    scale: float
    decay_kk: bool
    bp_lambda: bool
    interpret: bool


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gka(static: _Static, inputs: Inputs) -> Result:
    """`inputs` with whole chunks and `doc` given."""
    return _run_forward(static, inputs, save=False)[0]


def _forward(static: _Static, inputs: Inputs):
    (out, last), saved = _run_forward(static, inputs, save=True)
    out, x, f = kept((out, *saved))
    return (out, last), (inputs, x, f)


def _run_forward(static: _Static, inputs: Inputs, *, save: bool):
    gates = _gates(inputs, static.decay_kk)
    states, last = scan(
        FORWARD,
        (inputs.k, inputs.v),
        gates,
        jnp.stack([inputs.h_kk, inputs.h_kv]),
        split=True,
        interpret=static.interpret,
    )
    out, *saved = solve(
        inputs.q, inputs.k, inputs.v, states, gates, jnp.asarray(inputs.num_iter),
        ridge=static.ridge, scale=static.scale, save=save, interpret=static.interpret,
    )  # fmt: skip
    return (out, (last[0], last[1])), saved


def _backward(static: _Static, saved, cotangents):
    given, x, f = saved  # x: the solution
    q, k, v, alpha, g, beta, num_iter, _, h_kk, h_kv = given
    do, (dh_kk, dh_kv) = cotangents
    ridge, scale, decay_kk, bp_lambda, interpret = static
    gates = _gates(given, decay_kk)
    initial = jnp.stack([h_kk, h_kv])
    states, _ = scan(FORWARD, (k, v), gates, initial, split=True, interpret=interpret)
    dq, y, blend, rows = solve_backward(
        do, q, k, v, x, f, states, gates, num_iter,
        ridge=ridge, scale=scale, bp_lambda=bp_lambda, interpret=interpret,
    )  # fmt: skip

    start, mu, read = gates[..., START_KK, :], rows[..., MU, :], gates[..., START, :]
    coef = jnp.broadcast_to(-2 * jnp.sum(start * start * mu, -1, keepdims=True), mu.shape)
    weights = (scale * read, read, -start, start, rows[..., GRAM, :], coef)
    suffix, first, products = scan(
        REVERSE,
        (blend, do, x, y, k),
        jnp.stack(weights, axis=3),
        jnp.stack([dh_kk + jnp.swapaxes(dh_kk, -1, -2), dh_kv]),
        states,
        reverse=True,
        stages=2,
        interpret=interpret,
    )
    dk, dv, kdk = read_backward(blend, do, k, v, suffix, gates, scale=scale, interpret=interpret)
    dk, steps = gram_backward(
        x, y, k, dk, kdk, states, suffix, gates, rows, decay_kk=decay_kk, interpret=interpret
    )

    # Reads after a chunk of what was written before it: <suffix, state>, half for the symmetric Z.
    across = jnp.sum(products[1], -1) + (jnp.sum(products[0], -1) / 2 if decay_kk else 0)
    d_g = steps[..., D_G, :] + across[..., None]
    d_alpha = jnp.where((num_iter > 0)[:, None, None, None], rows[..., D_ALPHA, :], 0)

    def shared(d, like):  # sum over the query heads of a key/value head
        B, T, K, D = like.shape
        return jnp.sum(d.reshape(B, T, K, -1, D), axis=3, dtype=f32).astype(like.dtype)

    gradients: Any = Inputs(
        q=dq,
        k=shared(dk, k),
        v=shared(dv, v),
        alpha=_join(d_alpha, alpha),
        g=_join(d_g, g),
        beta=_join(steps[..., D_BETA, :], beta) * jnp.sign(beta),
        num_iter=cast(Any, None),
        doc=None,
        h_kk=first[0] / 2,
        h_kv=first[1],
    )
    return (gradients,)


_gka.defvjp(_forward, _backward)


def _split(x: jax.Array) -> jax.Array:
    """[B, T, H] -> [B, H, n, C]"""
    B, T, H = x.shape
    return jnp.moveaxis(x.reshape(B, T // C, C, H), 3, 1)


def _join(x: jax.Array, like: jax.Array) -> jax.Array:
    """[B, H, n, C] -> [B, T, H], dtype of `like`"""
    return jnp.moveaxis(x, 1, 3).reshape(like.shape).astype(like.dtype)


def _gates(inputs: Inputs, decay_kk: bool) -> jax.Array:
    """Everything per token that kernels need, float32 [B, H, n, ROWS, C]."""
    assert inputs.doc is not None
    g, beta2 = inputs.g, jnp.square(_split(inputs.beta.astype(f32)))
    doc = inputs.doc.reshape(inputs.doc.shape[0], 1, -1, C)
    before = jnp.concatenate([jnp.zeros_like(doc[:, :, :1, -1:]), doc[:, :, :-1, -1:]], axis=2)

    def decays(g):
        """Sums of g inside chunks; weights from a chunk's start, and to its end."""
        # exp(-100) is 0 in float32; a larger sum would cost the digits of all differences.
        total = jnp.cumsum(jnp.maximum(_split(g.astype(f32)), -100.0), axis=-1)
        start = jnp.where(doc == before, jnp.exp(total), 0)
        tail = jnp.where(doc == doc[..., -1:], jnp.exp(total[..., -1:] - total), 0)
        return total, start, tail * beta2

    decayed = decays(g)
    kk = decayed if decay_kk else decays(jnp.zeros_like(g))
    alpha = jnp.where((inputs.num_iter > 0)[:, None, None], inputs.alpha.astype(f32), 0)
    rows = (*kk, *decayed, beta2, _split(alpha), jnp.broadcast_to(doc.astype(f32), beta2.shape))
    return jnp.stack(rows, axis=3)
