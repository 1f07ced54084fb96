"""The step of every layer kind follows the slope of an independent float64 evaluator's loss.

The evaluator (tests/parity/oracle.py) is plain NumPy: its derivative along a direction is the
central difference (L(w + h u) - L(w - h u)) / 2h. GKA's backward pass differentiates the exact
solution that its iterations approach (to about 0.754^n): 60 of them, here.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hmf_jax import table
from hmf_jax.config import BMojoConfig
from hmf_jax.convert.rows import by_tensor, tensor_shape
from hmf_jax.training import TrainState, make_train_step, select_parameters
from tests.parity import oracle
from tests.training.test_step import SIX
from tests.util import random_model, tiny_config

NUM_ITER, T = 60, 14
SGD = optax.sgd(1.0, momentum=0.9)  # its momentum is, after one step, the gradient
Params = dict[str, np.ndarray]


def oracle_loss(config, params: Params, tokens: np.ndarray) -> float:
    """Mean cross-entropy of the next token, from the tensors of a checkpoint."""
    tensors: Params = {}
    for name, blocks in by_tensor(table.entries(config)).items():
        rows = [params[e.path].T if e.transposed else params[e.path] for e in blocks]
        tensors[name] = np.concatenate(rows).reshape(tensor_shape(blocks))
    total = 0.0
    for row in tokens:
        run = oracle.evaluate(config.to_dict(), tensors, row, num_iter=NUM_ITER)
        top = run.logits.max(-1, keepdims=True)
        logp = run.logits - top - np.log(np.exp(run.logits - top).sum(-1, keepdims=True))
        total -= logp[np.arange(T - 1), row[1:]].mean()
    return total / len(tokens)


def slope(config, params: Params, tokens, u: Params, h: float) -> float:
    moved = [{n: p + s * h * u.get(n, 0.0) for n, p in params.items()} for s in (1, -1)]
    up, down = (oracle_loss(config, p, tokens) for p in moved)
    return (up - down) / (2 * h)


def gradient(config, dtype, tokens) -> tuple[Params, Params]:
    """Parameters, and the gradient that a training step of a model with them follows."""
    model = random_model(config, dtype)
    params = dict(zip(select_parameters(model), jax.tree.leaves(model), strict=True))
    params = {n: np.asarray(p, np.float64) for n, p in params.items()}
    state = TrainState.create(model, SGD)
    state, _ = make_train_step(SGD, num_iter=NUM_ITER)(state, {"tokens": jnp.asarray(tokens)})
    return params, {n: np.asarray(g, np.float64) for n, g in state.opt_state[0].trace.items()}


CASES = {kind: ((kind,), BMojoConfig(4, False, "GDN")) for kind in SIX}
CASES |= {"BMF tied, GKA": (("BMF",), BMojoConfig(4, True, "GKA"))}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_step_follows_the_slope_of_the_oracle(case):
    """Each parameter's gradient in float64; in float32 all of them together, to 1e-4."""
    kinds, bmojo = CASES[case]
    config = tiny_config(kinds, vocab_size=31, bmojo=bmojo)
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 31, (2, T)).astype(np.int32)
    with jax.enable_x64(True):
        params, grads = gradient(config, jnp.float64, tokens)
    for name, g in grads.items():
        z = rng.standard_normal(g.shape)
        u = {name: g / np.linalg.norm(g) + z / np.linalg.norm(z)}
        error = slope(config, params, tokens, u, 3e-5) - float(np.sum(g * u[name]))
        assert abs(error) < 1e-5 * np.linalg.norm(g), name  # rotary tables are float32

    # An error e of the gradient gives e u, along random directions u of variance |e|^2.
    params, grads = gradient(config, jnp.float32, tokens)
    norm = np.sqrt(sum(np.sum(g * g) for g in grads.values()))
    errors = []
    for _ in range(6):
        u = {n: rng.standard_normal(g.shape) for n, g in grads.items()}
        ours = sum(np.sum(g * u[n]) for n, g in grads.items())
        errors.append((slope(config, params, tokens, u, 1e-6) - ours) / norm)
    assert np.sqrt(np.mean(np.square(errors))) < 1e-4, errors
