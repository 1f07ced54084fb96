"""The optimizer of the recipes: AdamW by hand, and what a step takes over from its caller."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hmf_jax.layers import lookup
from hmf_jax.training import Recipe, TrainState, cross_entropy, make_train_step
from tests.util import random_model, rel, tiny_config


def test_adamw_by_hand():
    """Four steps with numbers that all differ, so that none can stand in for another."""
    beta1, beta2, eps, decay, peak = 0.7, 0.95, 1e-3, 0.1, 0.02
    recipe = Recipe(
        peak, "linear", warmup=1, betas=(beta1, beta2), eps=eps, weight_decay=decay, steps=5
    )
    optimizer = recipe.optimizer()
    rng = np.random.default_rng(0)
    params: Any = {
        "a.kernel": rng.standard_normal((2, 3)),
        "norm.weight": rng.standard_normal(3),  # vectors do not decay
    }
    wanted = dict(params)
    m, v = ({name: np.zeros_like(p) for name, p in params.items()} for _ in range(2))
    params = {name: jnp.asarray(p, jnp.float32) for name, p in params.items()}
    state = optimizer.init(params)
    for t, rate in enumerate((0.0, peak, 0.75 * peak, 0.5 * peak), start=1):
        gradients = {name: rng.standard_normal(p.shape) for name, p in wanted.items()}
        low = {name: jnp.asarray(g, jnp.float32) for name, g in gradients.items()}
        updates, state = optimizer.update(low, state, params)
        params = optax.apply_updates(params, updates)
        for name, g in gradients.items():
            m[name] = beta1 * m[name] + (1 - beta1) * g
            v[name] = beta2 * v[name] + (1 - beta2) * g * g
            direction = m[name] / (1 - beta1**t) / (np.sqrt(v[name] / (1 - beta2**t)) + eps)
            direction = direction + (decay * wanted[name] if wanted[name].ndim > 1 else 0)
            wanted[name] = wanted[name] - rate * direction
            assert rel(params[name], wanted[name]) < 1e-5, (t, name)
        found: Any = optax.tree.get_all_with_path(state, "learning_rate")
        assert abs(float(found[0][1]) - rate) < 1e-8


def test_a_step_takes_the_state_over_and_nothing_else():
    """Donated: otherwise parameters and moments would be in memory twice."""
    optimizer = optax.adam(1e-3)
    state = TrainState.create(random_model(tiny_config(("*",)), jnp.float32), optimizer)
    batch = {"tokens": jnp.ones((2, 8), jnp.int32)}
    (info, batch_info), _ = make_train_step(optimizer).lower(state, batch).args_info
    assert all(
        leaf.donated for leaf in jax.tree.leaves(info, is_leaf=lambda x: hasattr(x, "donated"))
    )
    assert not any(leaf.donated for leaf in batch_info.values())


def low(x: Any) -> np.ndarray:
    """Rounded to bfloat16, as float64."""
    return np.asarray(jnp.asarray(x, jnp.float32).astype(jnp.bfloat16), np.float64)


def test_the_gradient_of_a_frequent_token_is_exact():
    """Sums of its occurrences in bfloat16 are off by 0.03 here."""
    rng = np.random.default_rng(0)
    tokens = np.minimum(rng.geometric(0.5, (4, 512)), 7)
    table, g = (jnp.asarray(rng.random(s) - 0.3, jnp.bfloat16) for s in ((8, 16), (4, 512, 16)))
    rows, back = jax.vjp(lambda table: lookup(table, tokens), table)
    np.testing.assert_array_equal(rows, table[tokens])
    total = np.zeros((8, 16))
    np.add.at(total, tokens, low(g))
    (got,) = back(g)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_array_equal(low(got), low(total))


def test_logits_of_a_bfloat16_model_are_float32():
    """Their gradient is rounded where it meets bfloat16 again, and its sums at the end only."""
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(3 * rng.standard_normal(s), jnp.bfloat16) for s in ((2, 6, 32), (32, 61)))
    targets, weights = rng.integers(0, 61, (2, 6)), jnp.ones((2, 6))
    run = jax.jit(
        jax.value_and_grad(lambda x, w: cross_entropy(x, w, targets, weights, None, 4), (0, 1))
    )
    loss, (d_x, d_w) = run(x, w)
    x, w = low(x), low(w)
    logits = x @ w
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    own = np.take_along_axis(p, targets[..., None], -1)
    assert loss.dtype == jnp.float32 and abs(loss + np.log(own).sum()) < 1e-5 * loss
    d_logits = low(p - np.eye(61)[targets])
    assert d_x.dtype == d_w.dtype == jnp.bfloat16
    for got, exact in ((d_x, d_logits @ w.T), (d_w, np.einsum("btd,btv->dv", x, d_logits))):
        assert np.mean(low(got) != low(exact)) < 0.03  # a second rounding would change a fourth
