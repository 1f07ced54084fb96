"""Next-token cross-entropy whose logits never exist as a whole, but in pieces of the sequence.

Shapes: B rows, T tokens, d hidden, V vocabulary.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from hmf_jax.config import HybridConfig
from hmf_jax.layers import exact_dtype
from hmf_jax.model import HybridLM
from hmf_jax.moe import Routing, busiest_expert, load_balancing_loss
from hmf_jax.padding import restore
from hmf_jax.pallas_kernels.sharded import AXES, batch_axes, call

Array = jax.Array


def next_token_targets(
    tokens: Array, loss_mask: Array | None = None, segment_ids: Array | None = None
) -> tuple[Array, Array]:
    """What each position is to predict: the next token of the same document, padding skipped.

    Args:
      tokens: [B, T] integers.
      loss_mask: [B, T], how much predicting *this* token counts (0 or 1, or any weight); None: 1.
      segment_ids: [B, T] as in `HybridLM.__call__`: 0 marks padding, other numbers documents.

    Returns:
      targets [B, T] and their weights [B, T] float32: 0 at padding and at the end of a document.
    """
    for name, a in (("loss_mask", loss_mask), ("segment_ids", segment_ids)):
        if a is not None and a.shape != tokens.shape:
            raise ValueError(f"{name} has shape {a.shape}, but tokens have {tokens.shape}.")
    B, T = tokens.shape
    index = jnp.broadcast_to(jnp.arange(T, dtype=jnp.int32), (B, T))
    if segment_ids is None:  # a scan over constants would be XLA's to fold, in O(T^2)
        valid, following = jnp.ones((B, T), bool), index + 1
    else:
        valid = segment_ids != 0
        here_or_later = jax.lax.cummin(jnp.where(valid, index, T), axis=1, reverse=True)
        following = jnp.pad(here_or_later[:, 1:], ((0, 0), (0, 1)), constant_values=T)

    def at_target(a: Array) -> Array:
        return jnp.take_along_axis(a, jnp.minimum(following, T - 1), axis=1)

    counts = valid & (following < T)
    if segment_ids is not None:
        counts &= segment_ids == at_target(segment_ids)
    weights = counts.astype(jnp.float32)
    if loss_mask is not None:
        weights *= at_target(loss_mask.astype(jnp.float32))
    return at_target(tokens), weights


def next_token_loss(
    model: HybridLM,
    tokens: Array,
    *,
    loss_mask: Array | None = None,
    segment_ids: Array | None = None,
    positions: Array | None = None,
    num_iter: Array | int | None = None,
    impl: str = "auto",
    chunk_size: int = 512,
) -> tuple[Array, Array]:
    """Cross-entropy in nats, summed over targets, and the number of them: loss = sum / count.

    Args: those of `next_token_targets` and `HybridLM.__call__`, and `chunk_size`, see
    `cross_entropy`. Returns two float32 scalars (the sum is float64 in float64 models).
    """
    return _next_token(
        model, tokens, loss_mask, segment_ids, positions, num_iter, impl, chunk_size
    )[:2]


def balanced_loss(
    model: HybridLM,
    tokens: Array,
    *,
    loss_mask: Array | None = None,
    segment_ids: Array | None = None,
    router_aux_loss_coef: float | None = None,
    **options: Any,
) -> tuple[Array, Array] | tuple[Array, Array, dict[str, Array]]:
    """`next_token_loss`, and in models with experts the load-balancing loss, times a coefficient.

    The latter is over the valid tokens of the batch, on all devices together, of all sparse layers;
    see `hmf_jax.moe.load_balancing_loss`.

    Args:
      router_aux_loss_coef: the coefficient; None: the model's. Others: of `next_token_loss`.

    Returns:
      That of a dense model. With experts: the sum of both losses over targets, the number of
      targets, and sums over targets for the metrics: of the cross-entropy alone ("loss"), of the
      load-balancing loss before its coefficient ("aux_loss"), and of `busiest_expert`.

    Raises:
      ValueError: a coefficient for a model without experts.
    """
    coef = aux_coef(router_aux_loss_coef, model.config)
    total, count, routings = _next_token(model, tokens, loss_mask, segment_ids, **options)
    if coef is None:
        return total, count
    aux = load_balancing_loss(routings) * count
    metrics = {"loss": total, "aux_loss": aux, "busiest_expert": busiest_expert(routings) * count}
    return (total + coef * aux).astype(total.dtype), count, metrics


def aux_coef(coef: float | None, config: HybridConfig) -> float | None:
    """The coefficient of the load-balancing loss: this one, or the model's; None without experts.

    Raises ValueError for one that a model without experts is given.
    """
    if config.moe is not None and any(map(config.is_sparse, range(len(config.layer_kinds)))):
        return config.moe.aux_coef if coef is None else coef
    if coef is not None:
        raise ValueError(f"router_aux_loss_coef={coef:g}: the model has no experts; leave it out")
    return None


def _next_token(
    model: HybridLM,
    tokens: Array,
    loss_mask: Array | None,
    segment_ids: Array | None,
    positions: Array | None = None,
    num_iter: Array | int | None = None,
    impl: str = "auto",
    chunk_size: int = 512,
) -> tuple[Array, Array, list[Routing]]:
    """The sum of the cross-entropy, the number of targets, and what the routers decided."""
    targets, weights = next_token_targets(tokens, loss_mask, segment_ids)
    x, ctx = model.embed(
        tokens, positions=positions, segment_ids=segment_ids, num_iter=num_iter, impl=impl
    )
    routings = []
    for layer in model.blocks(x, ctx):
        x = layer.x
        routings += [] if layer.routing is None else [layer.routing]
    hidden = model.norm(restore(x, ctx.place))
    kernel = model.head_kernel().astype(hidden.dtype)
    total = cross_entropy(hidden, kernel, targets, weights, model.mesh, chunk_size)
    return total, jnp.sum(weights), routings


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(
    hidden: Array, kernel: Array, targets: Array, weights: Array, mesh: Mesh | None, chunk_size: int
) -> Array:
    """sum_bt weights * (logsumexp(logits) - logits[target]), logits = hidden @ kernel in float32.

    Gradients are made in the forward pass, where the logits are there anyway: the product with the
    kernel is never computed twice. d logits = weights (softmax - one_hot). Only what is
    differentiated is made, and kept until the backward pass: [B, T, d] and [d, V] in the dtypes of
    the arguments; the latter is summed up in a float32 [d, V] before. On a mesh the vocabulary
    stays split; devices exchange maxima, sums and gradients, no logits.

    Args:
      hidden: [B, T, d]; kernel: [d, V]; targets: [B, T] integers; weights: [B, T] (no gradient).
      mesh: the model's mesh, or None.
      chunk_size: positions per piece, at least 1; a piece of logits takes B * chunk_size * V * 4
        bytes, its gradient as many elements of the dtype of hidden, both divided by the devices
        that split the batch and the vocabulary.
    """
    args = (hidden, kernel, targets, weights)
    return _with_gradients(args, (False, False), mesh, chunk_size)[0]


def _forward(hidden, kernel, targets, weights, mesh, chunk_size):
    wanted = hidden.perturbed, kernel.perturbed
    args = tuple(a.value for a in (hidden, kernel, targets, weights))
    return _with_gradients(args, wanted, mesh, chunk_size)


def _backward(mesh, chunk_size, gradients, g):
    scaled = (None if a is None else (g * a).astype(a.dtype) for a in gradients)
    return *scaled, None, None


cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _with_gradients(
    args: tuple[Array, Array, Array, Array],
    wanted: tuple[bool, bool],
    mesh: Mesh | None,
    chunk_size: int,
) -> tuple[Array, tuple[Array | None, Array | None]]:
    """The sum, and its gradients with respect to hidden and kernel where they are wanted."""
    batch = len(args[0])
    positions, vocab = _axes(mesh, batch)
    split = tuple(a for a in AXES.embed if a in positions)
    if mesh is not None and any(
        mesh.shape.get(a, 1) > 1 and a not in positions for a in AXES.embed
    ):
        split = ()  # a batch that stays whole

    def local(hidden, kernel, targets, weights):
        exact = exact_dtype(hidden.dtype)

        def piece(sums, xs):
            total, d_kernel = sums
            x, target, weight = xs
            logits = jnp.einsum("btd,dv->btv", x, kernel, preferred_element_type=exact)
            lse, own, is_target = _statistics(logits, target, vocab)
            total += jnp.sum(jnp.where(weight != 0, weight * (lse - own), 0))
            d_x = None
            if any(wanted):
                d_logits = (jnp.exp(logits - lse[..., None]) - is_target) * weight[..., None]
                d_logits = d_logits.astype(x.dtype)
            if wanted[0]:
                d_x = jnp.einsum("btv,dv->btd", d_logits, kernel, preferred_element_type=exact)
                d_x = _over(jax.lax.psum, d_x, vocab).astype(x.dtype)
            if wanted[1]:
                d_kernel += jnp.einsum("btd,btv->dv", x, d_logits, preferred_element_type=exact)
            return (total, d_kernel), d_x

        zeros = jnp.zeros((), exact), jnp.zeros(kernel.shape, exact) if wanted[1] else None
        xs = [_pieces(a, chunk_size) for a in (hidden, targets, weights)]
        (total, d_kernel), d_x = jax.lax.scan(piece, zeros, xs)
        total = _over(jax.lax.psum, total, positions)
        if d_x is not None:
            B, T, d = hidden.shape
            d_x = jnp.moveaxis(d_x, 0, 1).reshape(B, -1, d)[:, :T]
        if d_kernel is not None:
            if split:  # each device keeps that part of the sum that it keeps of the kernel
                d_kernel = jax.lax.psum_scatter(d_kernel, split, scatter_dimension=0, tiled=True)
            d_kernel = _over(jax.lax.psum, d_kernel, tuple(a for a in positions if a not in split))
            d_kernel = d_kernel.astype(kernel.dtype)
        return total, (d_x, d_kernel)

    in_dims = ("bT-", "-V", "bT", "bT")
    dims = "bT-", "fV" if split else "-V"
    out_dims = "", tuple(d if w else None for d, w in zip(dims, wanted, strict=True))
    return call(local, mesh, batch, args, in_dims, out_dims)


def _axes(mesh: Mesh | None, batch: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The mesh axes that split positions and the vocabulary inside `call`."""
    if mesh is None:
        return (), ()
    several = [axis for axis, size in mesh.shape.items() if size > 1]
    positions, vocab = batch_axes(mesh, batch) + AXES.tokens, AXES.vocab
    return tuple(a for a in positions if a in several), tuple(a for a in vocab if a in several)


def _over(reduce, x: Array, axes: tuple[str, ...]) -> Array:
    return reduce(x, axes) if axes else x


def _statistics(logits: Array, target: Array, vocab) -> tuple[Array, Array, Array]:
    """Log-sum-exp and the target's logit [B, C], and where that is [B, C, V], of the logits of this
    device's part of the vocabulary."""
    V = logits.shape[-1]
    here = target - (jax.lax.axis_index(vocab) * V if vocab else 0)
    own = jnp.take_along_axis(logits, here[..., None], axis=-1, mode="clip")[..., 0]
    own = _over(jax.lax.psum, jnp.where((here >= 0) & (here < V), own, 0), vocab)
    most, exps = _max_and_exps(logits)
    top = _over(jax.lax.pmax, most, vocab)
    exps = _over(jax.lax.psum, exps * jnp.exp(most - top), vocab)
    return top + jnp.log(exps), own, here[..., None] == jnp.arange(V)


def _max_and_exps(logits: Array) -> tuple[Array, Array]:
    """The maximum over the vocabulary, and the sum of exp(logits - maximum)."""
    top = jnp.max(logits, axis=-1)
    return top, jnp.sum(jnp.exp(logits - top[..., None]), axis=-1)


def _pieces(a: Array, size: int) -> Array:
    """[B, T, ...] -> [n, B, C, ...] with equal C <= size; zeros fill the last piece."""
    B, T = a.shape[:2]
    n = -(-T // size)
    C = -(-T // n)
    a = jnp.pad(a, ((0, 0), (0, n * C - T), *((0, 0),) * (a.ndim - 2)))
    return jnp.moveaxis(a.reshape(B, n, C, *a.shape[2:]), 1, 0)
