"""Gated KalmaNet (GKA): gated linear attention whose queries are filtered by a ridge solve.

Per row and query head, with k and v scaled by beta:

    H_t = e^{g_t} H_{t-1} + k_t k_t^T          h_kk, key covariance
    U_t = e^{g_t} U_{t-1} + k_t v_t^T          h_kv, layout [key, value]
    x_t ~ (H_t + lambda_t I)^{-1} q_t          lambda_t = ridge ||H_t||_F, Chebyshev iteration
    o_t = scale U_t^T (q_t + alpha_t (x_t - q_t))

Source: Gated KalmaNet, Chebyshev iteration on the interval [lambda, lambda + ||H||_F].
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from hmf_jax.pallas_kernels import sharded
from hmf_jax.pallas_kernels.compat import is_traced
from hmf_jax.pallas_kernels.dispatch import check_whole, finite, resolve
from hmf_jax.pallas_kernels.ops.gka import mosaic, mosaic_decode, triton, triton_decode
from hmf_jax.pallas_kernels.ops.gka.chunked import gka_chunked
from hmf_jax.pallas_kernels.ops.gka.inputs import Inputs, Options, Token
from hmf_jax.pallas_kernels.ops.gka.reference import gka_reference
from hmf_jax.pallas_kernels.ops.gka.step import at_slots
from hmf_jax.pallas_kernels.recurrent import check, check_heads, check_padding, mask_padding

__all__ = ["gka", "gka_step"]

MOST_STEPS = 1000  # far beyond what float64 can use


def gka(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    alpha: jax.Array | None = None,
    g: jax.Array | None = None,
    beta: jax.Array | None = None,
    *,
    num_iter: int | jax.Array | np.ndarray = 30,
    ridge: float = 0.02,
    scale: float | None = None,
    decay_kk: bool = True,
    bp_lambda: bool = True,
    initial_state: tuple[jax.Array, jax.Array] | None = None,
    segment_ids: jax.Array | None = None,
    lengths: jax.Array | None = None,
    chunk_size: int = 64,
    solver: str = "chebyshev",
    impl: str = "auto",
    mesh: Mesh | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """Gated KalmaNet over a sequence, from a state to a state.

    Gradients reach every float array, `initial_state` included. Through the solver they are
    implicit: those of the exact solution, with every solve replaced by `num_iter` solver steps
    (impl "reference" differentiates the truncated Chebyshev iteration). Forward mode is not
    supported.

    The solver amplifies rounding by up to 1 / ridge. On GPUs float32 products are TF32 by
    default, for errors near 0.5% after 30 steps; set jax_default_matmul_precision to "highest"
    where that matters.

    Args:
      q: [B, T, H, D] L2-normalised queries, T >= 1.
      k: [B, T, K, D] L2-normalised keys; K divides H, query head e uses key/value head e // (H/K).
      v: [B, T, K, D] values.
      alpha: [B, T, H] blend of query and solution, in [0, 1]; None = 1.
      g: [B, T, H] log-decay per token, <= 0, best float32; None = no decay.
      beta: [B, T, H] factor on k and on v; None = 1.
      num_iter: solver steps, 0 to 1000, for all rows or per row [B]; may be traced. 0 leaves the
        query as it is (alpha is ignored), h_kk is still updated.
      ridge: lambda over the Frobenius norm of H, >= 0.
      scale: factor on the output; None = D**-0.5.
      decay_kk: whether H decays; U always does.
      bp_lambda: whether gradients flow through lambda.
      initial_state: (h_kk, h_kv), each [B, H, D, D], h_kk symmetric; None = zeros.
      segment_ids: [B, T] integers; 0 = padding, which changes nothing, wherever it is; a change
        between non-zero neighbours starts a new document. The first one continues `initial_state`.
      lengths: [B] integers in 0..T, leading tokens of each row that are valid, the rest being
        padding. Cheaper than to look for it in `segment_ids`; with both, these have no 0 among
        the valid tokens, and only say where documents change.
      chunk_size: tokens per chunk of impl "chunked"; changes speed and memory only.
      solver: whose steps num_iter counts: "chebyshev", or "cg", conjugate gradients: 20 steps are
        as accurate as 30 of Chebyshev, mostly fewer are enough (docs/num_iter.md). Needs ridge > 0.
      impl: "auto", "mosaic" (NVIDIA Hopper; bfloat16 q, k, v with D 64 or 128, float32 states,
        solver "chebyshev"), "triton" (NVIDIA GPUs since compute capability 8.0, needs
        `pip install hmf-jax[triton]`; q, k, v all bfloat16 or all float32 with D 32, 64 or 128,
        float32 states, solver "chebyshev"), "chunked" or "reference".
      mesh: device mesh (see `hmf_jax.pallas_kernels.sharded`), or None.

    Returns:
      o: [B, T, H, D], dtype of v; zero at padding. Where H is zero, x is zero.
      (h_kk, h_kv): float32 (float64 for float64 inputs) states [B, H, D, D] of the last document.

    Raises:
      ValueError: an argument has the wrong shape or value.
    """
    inputs = _inputs(q, k, v, alpha, g, beta, num_iter, initial_state, segment_ids, lengths)
    _check_solver(solver, ridge)
    check_whole("gka", "chunk_size", chunk_size)
    options = Options(float(ridge), _scale(scale, q), decay_kk, bp_lambda)
    impls = {
        "mosaic": mosaic.gka_mosaic,
        "triton": triton.gka_triton,
        "chunked": partial(gka_chunked, solver=solver, chunk_size=chunk_size),
        "reference": partial(gka_reference, solver=solver),
    }
    usable = dict.fromkeys(impls) | {
        "mosaic": mosaic.why_not(inputs, solver),
        "triton": triton.why_not(inputs, solver),
    }
    acc = jnp.promote_types(q.dtype, jnp.float32)
    return sharded.run(
        partial(impls[resolve("gka", impl, usable)], options=options),
        mesh,
        inputs._replace(h_kk=inputs.h_kk.astype(acc), h_kv=inputs.h_kv.astype(acc)),
        ("bthd", ("bhde", "bhde")),
        rename=sharded.rename_kv(q.shape[2], k.shape[2]),
    )


def gka_step(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    alpha: jax.Array | None,
    g: jax.Array | None,
    beta: jax.Array | None,
    state: tuple[jax.Array, jax.Array] | None,
    *,
    slots: jax.Array | None = None,
    active: jax.Array | None = None,
    num_iter: int | jax.Array | np.ndarray = 30,
    ridge: float = 0.02,
    scale: float | None = None,
    decay_kk: bool = True,
    solver: str = "chebyshev",
    impl: str = "auto",
    mesh: Mesh | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """One token of `gka`: the same arguments without the time axis, q [B, H, D], alpha [B, H].

    Products are full float32 whatever jax_default_matmul_precision says: memory bounds this call.

    Args:
      slots: [B] int32, the rows of `state` (then [S, H, D, D], any S) that the B rows use, no two
        equal. Outside [0, S) a row is inactive: no state changes, its output is 0. State rows
        that no slot names keep their content. None: row b uses state row b. A mesh that splits
        the batch (dp or fsdp) cannot be combined with slots: they number all state rows.
      active: [B] bool, without slots: rows where it is False keep their state, their output is
        unspecified, and kernels spend no time on them. None: all rows are active.
      impl: "auto", "mosaic" (NVIDIA Hopper; D 64 or 128, bfloat16 or float32 inputs, float32
        states, solver "chebyshev"), "triton" (as in `gka`), "chunked" or "reference". Gradients
        of "mosaic" and "triton" are those of "chunked".

    Returns:
      o: [B, H, D], dtype of v, and the new state; under jit with a donated state, "mosaic" and
      "triton" update it in place.
    """
    _check_solver(solver, ridge)
    B, H, _ = _check_token(q, k, v, slots, state, mesh)
    if active is not None:
        if slots is not None or active.shape != (B,):
            raise ValueError(f"gka_step: active must be [{B}] bool, without slots.")
        k, v = _where(active, k), _where(active, v)
        alpha, g, beta = (x if x is None else _where(active, x) for x in (alpha, g, beta))
    token = _token(q, k, v, alpha, g, beta, num_iter, slots, state)
    usable = {
        "mosaic": mosaic_decode.why_not(token, solver),
        "triton": triton.why_not(token, solver),
        "chunked": None,
        "reference": None,
    }
    name = resolve("gka_step", impl, usable)
    kernels = {"mosaic": mosaic_decode.gka_decode, "triton": triton_decode.gka_decode}
    if name in kernels:
        kernel = partial(kernels[name], options=Options(float(ridge), _scale(scale, q), decay_kk))

        def run(token: Token):
            """`active` as slots, which on a mesh are those of the device's own rows."""
            if active is not None and token.slots is not None:
                here = jnp.arange(len(token.q), dtype=jnp.int32)
                token = token._replace(slots=jnp.where(token.slots > 0, here, -1))
            return kernel(token)

        return sharded.run(
            run,
            mesh,
            token if active is None else token._replace(slots=active.astype(jnp.int32)),
            ("bhd", ("bhde", "bhde")),
            rename=sharded.rename_kv(H, k.shape[1]),
        )

    def step(h_kk, h_kv):
        o, state = gka(
            q[:, None],
            k[:, None],
            v[:, None],
            *(None if x is None else x[:, None] for x in (alpha, g, beta)),
            num_iter=num_iter,
            ridge=ridge,
            scale=scale,
            decay_kk=decay_kk,
            initial_state=(h_kk, h_kv),
            solver=solver,
            impl=name,
            mesh=mesh,
        )
        return o[:, 0], state

    h_kk, h_kv = token.h_kk, token.h_kv
    with jax.default_matmul_precision("highest"):
        if slots is None:
            return step(h_kk, h_kv)
        acc = jnp.promote_types(q.dtype, jnp.float32)
        return at_slots(step, slots, h_kk.astype(acc), h_kv.astype(acc))


def _where(active: jax.Array, x: jax.Array) -> jax.Array:
    """x [B, ...] with zeros in rows that are not active."""
    return jnp.where(active.reshape(-1, *([1] * (x.ndim - 1))), x, 0)


def _inputs(q, k, v, alpha, g, beta, num_iter, initial_state, segment_ids, lengths) -> Inputs:
    """The arguments of `gka`, checked, all given, with zeros at padding."""
    if q.ndim != 4 or k.ndim != 4 or q.shape[1] < 1:
        raise ValueError(
            f"gka: q, k have shapes {q.shape}, {k.shape}, expected [B, T, H, D], [B, T, K, D] "
            "with T >= 1."
        )
    B, T, H, D = q.shape
    K = k.shape[2]
    acc = jnp.promote_types(q.dtype, jnp.float32)
    check_heads("gka", H, K)
    alpha = jnp.ones((B, T, H), acc) if alpha is None else alpha
    beta = jnp.ones((B, T, H), acc) if beta is None else beta
    g = jnp.zeros((B, T, H), acc) if g is None else g
    h_kk, h_kv = (jnp.zeros((B, H, D, D), acc),) * 2 if initial_state is None else initial_state
    check("gka", "q", q, (B, T, H, D), "B, T, H, D")
    check("gka", "k", k, (B, T, K, D), "B, T, K, D")
    check("gka", "v", v, (B, T, K, D), "B, T, K, D")
    for name, gate in {"alpha": alpha, "g": g, "beta": beta}.items():
        check("gka", name, gate, (B, T, H), "B, T, H")
    for name, state in {"h_kk": h_kk, "h_kv": h_kv}.items():
        check("gka", f"initial_state {name}", state, (B, H, D, D), "B, H, D, D")
    check_padding("gka", segment_ids, lengths, (B, T))
    doc, (q, k, v, alpha, g, beta) = mask_padding(segment_ids, lengths, q, k, v, alpha, g, beta)
    return Inputs(q, k, v, alpha, g, beta, _per_row(num_iter, B), doc, h_kk, h_kv)


def _check_token(q, k, v, slots, state, mesh) -> tuple[int, ...]:
    """Check the arguments of `gka_step` that are not those of `gka`; returns the shape of q."""
    op = "gka_step"
    if q.ndim != 3 or k.ndim != 3 or v.ndim != 3:
        raise ValueError(
            f"{op}: q, k, v have shapes {q.shape}, {k.shape}, {v.shape}, expected [B, H, D], "
            "[B, K, D], [B, K, D]; use gka for sequences."
        )
    if slots is not None:
        B = q.shape[0]
        if slots.shape != (B,) or not jnp.issubdtype(slots.dtype, jnp.integer):
            raise ValueError(
                f"{op}: slots is {slots.dtype}{list(slots.shape)}, expected integers of shape "
                f"{(B,)}."
            )
        if state is None:
            raise ValueError(f"{op}: slots number the rows of a state; give one.")
        if mesh is not None and sharded.batch_parts(mesh) > 1:
            raise ValueError(
                f"{op}: slots number all rows of the state, but the mesh splits them "
                f"({dict(mesh.shape)}); use a mesh with {' = '.join(sharded.AXES.batch)} = 1, one "
                "per replica."
            )
    return q.shape


def _token(q, k, v, alpha, g, beta, num_iter, slots, state) -> Token:
    """The arguments of `gka_step`, all given but `slots`."""
    B, H, D = q.shape
    acc = jnp.promote_types(q.dtype, jnp.float32)
    h_kk, h_kv = (jnp.zeros((B, H, D, D), acc),) * 2 if state is None else state
    ones = jnp.ones((B, H), jnp.float32)
    alpha, beta = (ones if x is None else x for x in (alpha, beta))
    g = 0 * ones if g is None else g
    slots = None if slots is None else slots.astype(jnp.int32)
    return Token(q, k, v, alpha, g, beta, jnp.asarray(_per_row(num_iter, B)), slots, h_kk, h_kv)


def _check_solver(solver: str, ridge: float) -> None:
    if solver not in ("chebyshev", "cg"):
        raise ValueError(f"gka: solver={solver!r} is unknown; choose chebyshev or cg.")
    if solver == "cg" and ridge == 0:
        raise ValueError("gka: solver='cg' needs ridge > 0: H alone may be singular.")
    if finite("gka", "ridge", ridge, 0.0) < 0:
        raise ValueError(f"gka: ridge={ridge}, expected a number >= 0.")


def _scale(scale: float | None, q: jax.Array) -> float:
    return finite("gka", "scale", scale, q.shape[-1] ** -0.5)


def _per_row(num_iter: int | jax.Array | np.ndarray, batch: int) -> jax.Array | np.ndarray:
    """`num_iter` as int32 [B]; where its value is known, checked and kept as a numpy array."""
    xp = jnp if is_traced(num_iter) else np
    steps = xp.asarray(num_iter)
    if steps.shape not in ((), (batch,)) or not jnp.issubdtype(steps.dtype, jnp.integer):
        raise ValueError(
            f"gka: num_iter is {steps.dtype}{list(steps.shape)}, expected an integer or integers "
            f"of shape {(batch,)}."
        )
    if isinstance(steps, np.ndarray) and ((steps < 0) | (steps > MOST_STEPS)).any():
        raise ValueError(f"gka: num_iter={num_iter}, expected integers from 0 to {MOST_STEPS}.")
    return xp.broadcast_to(steps.astype(np.int32), (batch,))
