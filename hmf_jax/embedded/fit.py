"""Training on generated texts: blocks of steps that run on the device in one call."""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import statistics
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from optax import contrib

from hmf_jax.embedded import corpus
from hmf_jax.embedded.plan import MIXERS, Phase, Plan
from hmf_jax.model import HybridLM
from hmf_jax.parameters import abstract_params, flat_params, with_params
from hmf_jax.priming import prime
from hmf_jax.training import TrainState


def optimizer() -> optax.GradientTransformation:
    """Muon for the matrices of linear layers, Adam for everything else; the rate is in its state.

    Muon (orthogonalised momentum, arXiv 2502.16982) finds the circuits of recall in a fraction of
    Adam's steps. Parameters of equal shape are stacked, so that a step is a few large operations.
    """

    @optax.inject_hyperparams
    def rule(learning_rate: Any) -> optax.GradientTransformation:
        def shapes(groups: Mapping[str, Any]) -> dict[str, Any]:
            matrix = contrib.MuonDimensionNumbers(reduction_axis=1, output_axis=2)
            return {key: matrix if key.startswith("kernel") else None for key in groups}

        matrices: Any = shapes
        return contrib.muon(
            learning_rate,
            adam_b2=0.98,
            adam_learning_rate=learning_rate / 4,
            muon_weight_dimension_numbers=matrices,
        )

    def key(name: str, x: jax.Array) -> str:
        return f"{name.rsplit('.')[-1]} {x.shape}"

    def stack(params: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        groups: dict[str, list[jax.Array]] = defaultdict(list)
        for name in sorted(params):
            groups[key(name, params[name])].append(params[name])
        return {k: jnp.stack(group) for k, group in groups.items()}

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        new, state = inner.update(stack(updates), state, stack(params))
        parts: dict[str, Any] = {k: iter(x) for k, x in cast(dict, new).items()}
        return {name: next(parts[key(name, updates[name])]) for name in sorted(updates)}, state

    inner = rule(learning_rate=0.0)
    return optax.GradientTransformation(lambda params: inner.init(stack(params)), update)


def start(base: HybridLM, kinds: Sequence[str], seed: int, memory: int) -> HybridLM:
    """Stage 0, and states that start with a memory of `memory` tokens in every head.

    As drawn (A ~ U(0, 16)), most heads forget within some tens of tokens. Of many heads some
    remember long; of two it would be luck. The decay per token, exp(A_log) softplus(dt_bias),
    becomes 1 / memory.
    """
    model = prime(base, kinds, seed=seed, **MIXERS)
    params = dict(flat_params(model))
    for name in [name for name in params if name.endswith(".A_log")]:
        dt_bias = params[name.removesuffix("A_log") + "dt_bias"]
        params[name] = -jnp.log(memory * jax.nn.softplus(dt_bias))
    return with_params(model, params)


def fit(
    model: HybridLM,
    make_step: Callable[..., Any],
    phases: Sequence[Phase],
    plan: Plan,
    *,
    trainable: str | None = None,
    seed: int,
    say: Callable[[str], None],
    after: Callable[[HybridLM, int], None] = lambda model, steps: None,
) -> tuple[HybridLM, list[float]]:
    """Train through the phases: the model and the loss of every step.

    Documents of all lengths are packed into rows of plan.row tokens, and blocks of steps run on the
    device in one call, so that a stage is one program. `after` is called after each phase but the
    last, with the model and the steps done; training goes on with the model's arrays.
    """
    opt = optimizer()
    state = TrainState.create(model, opt, trainable=trainable)
    step = make_step(opt, max_grad_norm=1.0)

    @functools.partial(jax.jit, donate_argnums=0)
    def run(state: TrainState, rates: jax.Array, batches: dict[str, jax.Array]) -> Any:
        def one(state: TrainState, xs: Any) -> Any:
            hyperparams = {**state.opt_state.hyperparams, "learning_rate": xs[0]}
            opt_state = state.opt_state._replace(hyperparams=hyperparams)
            state, metrics = step(dataclasses.replace(state, opt_state=opt_state), xs[1])
            return state, metrics["loss"]

        return jax.lax.scan(one, state, (rates, batches))

    rates = plan.rates(sum(phase.steps for phase in phases))
    rng, losses = random.Random(seed), []
    for phase in phases:
        pending, start = [], len(losses)
        for done in range(0, phase.steps, plan.block):
            shape = (plan.block, plan.tokens // plan.row, plan.row)
            count = math.prod(shape) // phase.length
            rows = corpus.rows(rng, count, phase.length, phase.level)
            ids = np.repeat(
                np.arange(1, plan.row // phase.length + 1, dtype=np.int32), phase.length
            )
            batches = {
                "tokens": rows.tokens.reshape(shape),
                "loss_mask": rows.weights.reshape(shape),
                "segment_ids": np.broadcast_to(ids, shape),
            }
            state, loss = run(state, rates[start + done :][: plan.block], batches)
            pending.append(loss)
        losses += np.concatenate(pending).tolist()
        say(
            f"  {phase.steps} steps, documents of {phase.length}: "
            f"loss {losses[start]:.3f} -> {statistics.mean(losses[-20:]):.3f}"
        )
        if phase is not phases[-1]:
            after(state.model(), len(losses))
    return state.model(), losses


def in_dtype(model: HybridLM, dtype: Any) -> HybridLM:
    """The same model in another dtype."""
    abstract = nnx.eval_shape(lambda: HybridLM(model.config, dtype=dtype))
    shapes = abstract_params(abstract, None)
    params = {path: x.astype(shapes[path].dtype) for path, x in flat_params(model).items()}
    return with_params(abstract, params)
