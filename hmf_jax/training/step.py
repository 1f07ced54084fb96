"""The training step: gradients of the trainable parameters, clipping, optimizer, in one program."""

from __future__ import annotations

import dataclasses
import difflib
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hmf_jax import table
from hmf_jax.layers import exact, exact_dtype
from hmf_jax.model import HybridLM
from hmf_jax.packed import Origin
from hmf_jax.parameters import abstract_params, flat_params
from hmf_jax.sharding import constrain
from hmf_jax.training.loss import balanced_loss
from hmf_jax.training.remat import Choices, Remat, check_remat, remat_choices

Array = jax.Array
Params = dict[str, Array]
Metrics = dict[str, Array]
# (model, **batch, num_iter=, impl=) -> a sum over tokens and their number (or weight); if it wants
# also further sums, which become metrics divided by that number ("loss": in place of the first)
Loss = Callable[..., tuple[Array, Array] | tuple[Array, Array, Metrics]]

BATCH = ("tokens", "loss_mask", "segment_ids", "positions")


def select_parameters(model: HybridLM, trainable: str | Sequence[str] | None = None) -> list[str]:
    """The parameters that these patterns select, as paths ("layers.3.mixer.q_proj.kernel").

    Args:
      model: the model, or its abstract twin.
      trainable: substrings, a comma-separated string or a list of them. A parameter is selected if
        any occurs in its name in the checkpoint ("model.layers.3.gka.q_proj.weight") or in its
        path. Spaces around a pattern do not count. None selects everything.

    Raises:
      ValueError: no patterns, or one that selects nothing (it may be a slip of the pen).
    """
    names = list(flat_params(model))
    if trainable is None:
        return names
    stored = {e.path: e.name for e in table.entries(model.config)}
    text = {path: f"{stored.get(path, '')} {path}" for path in names}
    given = trainable if isinstance(trainable, str) else ",".join(trainable)
    patterns = [p for p in map(str.strip, given.split(",")) if p]
    if not patterns:
        raise ValueError(f"trainable={trainable!r} holds no pattern; use None to train everything.")
    for pattern in patterns:
        if not any(pattern in t for t in text.values()):
            words = sorted({w for t in text.values() for w in t.replace(" ", ".").split(".")})
            words = [w for w in words if w and not w.isdigit()]
            near = difflib.get_close_matches(pattern, words, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {words}."
            raise ValueError(f"trainable pattern {pattern!r} matches no parameter; {hint}")
    return [path for path in names if any(p in text[path] for p in patterns)]


@dataclasses.dataclass(frozen=True)
class Template:
    """A model without its arrays: structure, origin, and the path and dtype of each parameter."""

    structure: Any
    names: tuple[str, ...]
    dtypes: tuple[np.dtype, ...]
    origin: tuple[str | None, bool, bool]  # that in the structure equals all others

    @classmethod
    def of(cls, model: HybridLM) -> Self:
        """That of this model, or of its abstract twin."""
        params = flat_params(model)
        dtypes = tuple(np.dtype(a.dtype) for a in params.values())
        return cls(
            jax.tree.structure(model), tuple(params), dtypes, dataclasses.astuple(model.origin)
        )

    def model(self, params: Params) -> HybridLM:
        """The model with these parameters, each in the dtype that it came with."""
        pairs = zip(self.names, self.dtypes, strict=True)
        leaves = [params[name].astype(dtype) for name, dtype in pairs]
        model = jax.tree.unflatten(self.structure, leaves)
        model.origin = Origin(*self.origin)
        return model


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What a training run is made of; a pytree of arrays that Orbax saves as it is.

    Attributes:
      params: path -> the trained parameters (float32 master weights, unless switched off).
      frozen: path -> all others, in the dtype of the model.
      opt_state: of the trained parameters only.
      step: int32, updates applied so far.
      template: static; the model that the parameters belong to.
    """

    params: Params
    frozen: Params
    opt_state: Any
    step: Array
    template: Template = dataclasses.field(metadata={"static": True})

    @classmethod
    def create(
        cls,
        model: HybridLM,
        optimizer: optax.GradientTransformation,
        *,
        trainable: str | Sequence[str] | None = None,
        master_weights: bool = True,
    ) -> Self:
        """A run that starts from this model. It takes the model's arrays over: training deletes
        them, so use `state.model()` from then on.

        Args:
          model: the model; it computes in its own dtype (load it in bfloat16 for bfloat16).
          optimizer: any optax optimizer; its state is float32.
          trainable: what to train, see `select_parameters`.
          master_weights: hold trained parameters in float32. False keeps the dtype of the model
            and saves 2 bytes per bfloat16 parameter, but such a parameter w stays what it is where
            an update is smaller than |w| / 512.
        """
        state, mesh = cls._make(model, optimizer, trainable, master_weights), model.mesh
        if mesh is None:  # committed, as restored arrays are: both run the same compiled step
            (device,) = jax.tree.leaves(model)[0].devices()
            return jax.device_put(state, device)
        return jax.tree.map(lambda a: jax.device_put(a, _canonical(a.sharding, mesh)), state)

    @classmethod
    def abstract(
        cls,
        model: HybridLM,
        optimizer: optax.GradientTransformation,
        *,
        trainable: str | Sequence[str] | None = None,
        master_weights: bool = True,
    ) -> Self:
        """`create` for an abstract model (from `nnx.eval_shape`): shapes, dtypes and shardings.

        With them a step can be lowered and compiled before any weight is loaded.
        """
        state = jax.eval_shape(lambda m: cls._make(m, optimizer, trainable, master_weights), model)
        mesh = model.mesh
        if mesh is None:
            return state
        shardings = _shardings(model)

        def place(path: Any, a: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
            sharding = shardings.get(getattr(path[-1], "key", ""))  # of a parameter or a moment
            return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=_canonical(sharding, mesh))

        return jax.tree_util.tree_map_with_path(place, state)

    @classmethod
    def _make(cls, model: HybridLM, optimizer: Any, trainable: Any, master_weights: bool) -> Self:
        everything = flat_params(model)
        chosen = set(select_parameters(model, trainable))
        params = {n: p for n, p in everything.items() if n in chosen}
        frozen = {n: p for n, p in everything.items() if n not in chosen}
        opt_state = optimizer.init({n: exact(p) for n, p in params.items()})
        if master_weights:
            params = {n: exact(p) for n, p in params.items()}
        return cls(params, frozen, opt_state, jnp.zeros((), jnp.int32), Template.of(model))

    def model(self) -> HybridLM:
        """The model as trained so far, in the dtypes it came with."""
        return self.template.model(self.frozen | self.params)


def make_train_step(
    optimizer: optax.GradientTransformation,
    *,
    loss: Loss | None = None,
    accumulate: int = 1,
    remat: Choices = "none",
    max_grad_norm: float | None = None,
    num_iter: int | None = None,
    impl: str = "auto",
    chunk_size: int = 512,
    router_aux_loss_coef: float | None = None,
) -> jax.stages.Wrapped:
    """One optimizer step as a jitted function: (state, batch) -> (state, metrics).

    The batch is a dict: tokens [B, T] and, if wanted, loss_mask, segment_ids and positions [B, T],
    see `next_token_loss`. The loss is the mean over all (target) tokens of the batch, so that
    neither accumulation nor the split over devices changes their weights. The state is donated.
    In models with experts the load-balancing loss is added, see `balanced_loss`; of micro-batches
    it is the mean, weighted with their targets.

    Metrics, float32 scalars: loss (nats per token), grad_norm (before clipping), tokens (weight of
    all targets), finite (bool), and learning_rate if the optimizer says it (`Recipe.optimizer` or
    `optax.inject_hyperparams`); with experts aux_loss, the load-balancing loss that `loss` does not
    include, before its coefficient, and busiest_expert (see `hmf_jax.moe`). If the loss or a
    gradient is not finite, or the batch has no target, the state stays as it was: the first makes
    finite False, the second tokens 0.

    Args:
      optimizer: the one that `TrainState.create` was given.
      loss: a function of the model and the batch, default `balanced_loss`: it returns a sum over
        tokens, which is differentiated with respect to the model, and their number; if it wants
        also a dict of further sums, which become metrics ("loss": in place of the first).
      accumulate: micro-batches that the batch is cut into; must divide B.
      remat: what the backward pass computes again: "none"; "dots": all but products with weights
        and what operators (attention, solvers) hand to their own backward pass; "named": all but
        the latter; "block": everything inside a block, whose input [B, T, d] alone is kept;
        "offload": as "named", that input in pinned memory of the host. Or one choice
        per layer kind, {"GKA": "block", "*": "dots"}, where kinds left out keep everything; or one
        per layer, as `plan_memory` chooses them.
      max_grad_norm: gradients are scaled down to this global norm.
      num_iter: Chebyshev iterations of GKA layers; None: the config's.
      impl: operator implementation, see `hmf_jax.pallas_kernels.dispatch`.
      chunk_size: positions whose logits exist at once in the default loss, see `cross_entropy`.
      router_aux_loss_coef: coefficient of the load-balancing loss; None: the model's.

    Raises:
      ValueError: bad arguments; when called, a batch with unknown keys or wrong shapes.
    """
    _check_settings(accumulate, max_grad_norm, chunk_size)
    check_remat(remat)
    if loss is None:
        loss = functools.partial(
            balanced_loss, chunk_size=chunk_size, router_aux_loss_coef=router_aux_loss_coef
        )
    elif router_aux_loss_coef is not None:
        raise ValueError("router_aux_loss_coef is for the loss of the next token, not another one.")

    def objective(params: Params, frozen: Params, template: Template, batch: Mapping[str, Any]):
        model = template.model(frozen | params)
        choices = remat_choices(remat, model.config.student_kinds)
        pairs = zip(model.layers, choices, strict=True)
        model.layers = nnx.List([b if c == "none" else Remat(b, c) for b, c in pairs])
        total, tokens, *more = loss(model, **batch, num_iter=num_iter, impl=impl)
        sums = {"loss": total, **(more[0] if more else {})}
        return total, (sums, tokens)

    def step(state: TrainState, batch: Mapping[str, Any]) -> tuple[TrainState, Metrics]:
        model = state.model()
        shardings = _shardings(model)
        _check(batch, accumulate)
        batch = {k: constrain(jnp.asarray(a), model.mesh, "batch", None) for k, a in batch.items()}

        def gradients(micro: Params):
            args = (state.params, state.frozen, state.template, micro)
            grads, sums = jax.grad(objective, has_aux=True)(*args)
            return {n: _like(exact(g), shardings[n]) for n, g in grads.items()}, sums

        if accumulate == 1:
            grads, (sums, tokens) = gradients(batch)
        else:
            zeros = {
                n: _like(jnp.zeros(p.shape, exact_dtype(p.dtype)), shardings[n])
                for n, p in state.params.items()
            }
            grads, (sums, tokens) = _accumulated(gradients, batch, accumulate, zeros)

        share = 1.0 / jnp.where(tokens > 0, tokens, 1)
        sums, grads = jax.tree.map(lambda x: x * share, (sums, grads))
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(sums["loss"]) & jnp.isfinite(norm)
        if max_grad_norm is not None:
            scale = jnp.minimum(1.0, max_grad_norm / norm)
            grads = jax.tree.map(lambda g: g * scale, grads)
        new, rate = _updated(optimizer, state, grads, shardings, finite & (tokens > 0))
        metrics = {**sums, "grad_norm": norm, "tokens": tokens}
        metrics = {name: x.astype(jnp.float32) for name, x in metrics.items()} | {"finite": finite}
        return new, metrics if rate is None else {**metrics, "learning_rate": rate}

    return jax.jit(step, donate_argnums=0)


def _accumulated(
    gradients: Callable[[Params], Any], batch: Params, accumulate: int, zeros: Params
) -> Any:
    """The sum of `gradients` over micro-batches, one after the other; `zeros` are no gradients.

    Micro-batch i has the rows i, i + accumulate, ...: they stay on their devices.
    """
    micros = {
        k: jnp.swapaxes(a.reshape(len(a) // accumulate, accumulate, -1), 0, 1)
        for k, a in batch.items()
    }

    def add(total: Any, micro: Params) -> Any:
        grads, sums = gradients(micro)
        return jax.tree.map(jnp.add, total, grads), sums

    grads, sums = jax.lax.scan(add, zeros, micros)
    return grads, jax.tree.map(lambda x: jnp.sum(x, axis=0), sums)


def _updated(
    optimizer: optax.GradientTransformation,
    state: TrainState,
    grads: Params,
    shardings: Mapping[str, NamedSharding | None],
    apply: Array,
) -> tuple[TrainState, Array | None]:
    """The state after the optimizer's update if `apply`, else as it is; and the learning rate."""
    old = jax.tree.map(exact, state.params)
    result: Any = optimizer.update(grads, state.opt_state, old)
    updates, opt_state = result
    params = {
        n: _like((old[n] + updates[n]).astype(p.dtype), shardings[n])
        for n, p in state.params.items()
    }
    new = jax.tree.map(
        lambda a, b: jnp.where(apply, a, b),
        (params, opt_state, state.step + 1),
        (state.params, state.opt_state, state.step),
    )
    rates: Any = optax.tree.get_all_with_path(opt_state, "learning_rate")
    rate = jnp.asarray(rates[0][1], jnp.float32) if rates else None
    return TrainState(new[0], state.frozen, new[1], new[2], state.template), rate


def _check_settings(accumulate: int, max_grad_norm: float | None, chunk_size: int) -> None:
    if accumulate < 1:
        raise ValueError(f"accumulate={accumulate} must be at least 1.")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm={max_grad_norm} must be positive; None does not clip.")
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1.")


def _check(batch: Mapping[str, Any], accumulate: int) -> None:
    """Raises ValueError unless the batch can be cut into `accumulate` micro-batches."""
    unknown = sorted(set(batch) - set(BATCH))
    if unknown or "tokens" not in batch:
        raise ValueError(f"A batch has tokens and may have {BATCH[1:]}; this has {sorted(batch)}.")
    shapes = {name: np.shape(a) for name, a in batch.items()}
    B = shapes["tokens"][0] if len(shapes["tokens"]) == 2 else 0
    if B == 0 or len(set(shapes.values())) > 1:
        raise ValueError(f"All arrays of a batch must be [B, T], at least one row; got {shapes}.")
    if B % accumulate:
        raise ValueError(f"accumulate={accumulate} does not divide the {B} rows of the batch.")


def _shardings(model: HybridLM) -> dict[str, NamedSharding | None]:
    """Path -> sharding of each parameter; None without a mesh."""
    params = abstract_params(model, model.mesh)
    return {path: a.sharding for path, a in params.items()}  # pyright: ignore[reportReturnType]


def _canonical(sharding: Any, mesh: Mesh) -> NamedSharding:
    """This sharding, or that of a whole array, spelled as jit spells that of its results.

    Else the second step, whose state is the result of the first, would compile again.
    """
    split = sharding.spec if isinstance(sharding, NamedSharding) else ()
    dims: list[Any] = []
    for axes in split:
        axes = (axes,) if isinstance(axes, str) else axes or ()
        axes = tuple(name for name in axes if mesh.shape[name] > 1)
        dims.append(axes[0] if len(axes) == 1 else axes or None)
    while dims and dims[-1] is None:
        dims.pop()
    return NamedSharding(mesh, PartitionSpec(*dims))


def _like(x: Array, sharding: NamedSharding | None) -> Array:
    return x if sharding is None else jax.lax.with_sharding_constraint(x, sharding)
