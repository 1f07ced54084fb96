"""Experts: the layer is its formula, padding leaves no trace, and what training makes of it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hmf_jax import table
from hmf_jax.config import HybridConfig
from hmf_jax.model import HybridLM
from hmf_jax.moe import MoE, Routing, busiest_expert, load_balancing_loss
from hmf_jax.options import MoEConfig
from hmf_jax.parameters import flat_params
from hmf_jax.training import TrainState, make_train_step, next_token_loss
from hmf_jax.training.flops import training_flops
from hmf_jax.training.loss import aux_coef, balanced_loss
from tests.util import mesh_of, place, random_model, rel, tiny_config

MIXED = MoEConfig(8, 3, 12, shared_intermediate_size=20, every=2, dense_layers=(3,))
CONFIG = tiny_config(("*",) * 2, moe=MIXED)  # layer 1 is sparse


@functools.cache
def model() -> HybridLM:
    return random_model(CONFIG, jnp.float32)


def layer() -> MoE:
    found = model().layers[1].mlp
    assert isinstance(found, MoE)
    return found


def swiglu(x, gate, up, down):
    return (jax.nn.silu(x @ gate) * (x @ up)) @ down


@jax.jit
def plain(moe: MoE, x, chosen=None):
    """The formula, every expert for every token: y, and the experts of each token."""
    p = jax.nn.softmax(x @ moe.gate.kernel[...])
    chosen = jnp.argsort(-p, axis=-1)[..., : moe.k] if chosen is None else chosen
    weights = jnp.take_along_axis(p, chosen, -1)
    if moe.renormalize:
        weights = weights / weights.sum(-1, keepdims=True)
    both, down = moe.experts.gate_up_proj[...], moe.experts.down_proj[...]
    F = down.shape[1]
    each = jnp.moveaxis(
        jax.vmap(swiglu, (None, 0, 0, 0))(x, both[..., :F], both[..., F:], down), 0, -2
    )
    y = jnp.sum(weights[..., None] * jnp.take_along_axis(each, chosen[..., None], -2), -2)
    if moe.shared_expert is not None:
        s: Any = moe.shared_expert
        kernels = (p.kernel[...] for p in (s.gate_proj, s.up_proj, s.down_proj))
        gate: Any = moe.shared_expert_gate
        y = y + jax.nn.sigmoid(x @ gate.kernel[...]) * swiglu(x, *kernels)
    return y, chosen


@jax.jit
def run(moe: MoE, x, lengths, experts=None):
    """The layer on rows of which these many tokens are valid."""
    _, ctx = model().embed(jnp.zeros(x.shape[:2], jnp.int32), lengths=lengths)
    y, routing = moe(x, ctx, experts)
    return y, Routing(**routing)


def inputs(rows: int = 3, length: int = 7) -> jax.Array:
    return jax.random.normal(jax.random.key(1), (rows, length, CONFIG.hidden_size))


FULL = jnp.full(3, 7)


def test_where_experts_are():
    six = tiny_config(("*",) * 6, moe=MIXED)
    sparse = [isinstance(b.mlp, MoE) for b in nnx.eval_shape(lambda: HybridLM(six)).layers]
    assert sparse == [False, True, False, False, False, True]
    assert sparse == [six.is_sparse(i) for i in range(6)]
    assert layer().experts.gate_up_proj.shape == (8, 32, 24)
    assert layer().experts.down_proj.shape == (8, 12, 32)
    shapes = {e.path: e.parameter_shape for e in table.entries(CONFIG)}
    assert shapes == {path: a.shape for path, a in flat_params(model()).items()}


@pytest.mark.parametrize("renormalize", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_layer_is_its_formula(renormalize):
    """Its output and its gradients."""
    x, d_y = inputs(), jax.random.normal(jax.random.key(2), inputs().shape)

    @jax.jit
    def both(moe, x):
        y, vjp, routing = jax.vjp(lambda m, x: run(m, x, FULL), moe, x, has_aux=True)
        y_plain, vjp_plain, chosen = jax.vjp(plain, moe, x, has_aux=True)
        return (y, *vjp(d_y)), (y_plain, *vjp_plain(d_y)), routing.experts == chosen

    moe = jax.tree.map(lambda a: a, layer())
    moe.renormalize = renormalize
    got, expected, same = both(moe, x)
    assert same.all()
    for a, b in zip(*map(jax.tree.leaves, (got, expected)), strict=True):
        assert rel(a, b) < 1e-5


def test_weights_that_need_not_sum_to_one():
    moe = jax.tree.map(lambda a: a, layer())
    moe.renormalize = False
    assert rel(run(moe, inputs(), FULL)[0], plain(moe, inputs())[0]) < 1e-6


def test_padding_goes_to_no_expert():
    """What padding holds changes nothing, and is not counted."""
    x, lengths = inputs(), jnp.array([7, 2, 0])
    whole, _ = run(layer(), x, FULL)
    valid = np.arange(7) < np.asarray(lengths)[:, None]
    noise = jnp.where(valid[..., None], x, jnp.nan)
    y, routing = run(layer(), noise, lengths)
    assert rel(y[valid], whole[valid]) < 1e-6
    counts = np.zeros((3, 8))
    for ids in np.asarray(routing.experts)[valid]:
        counts[np.arange(3), ids] += 1
    np.testing.assert_array_equal(routing.chosen, counts)
    p = jax.nn.softmax(x @ layer().gate.kernel[...])
    np.testing.assert_allclose(routing.probability, p[valid].sum(0), rtol=1e-5)


def test_a_token_alone_is_the_token_in_its_batch():
    x = inputs()
    y, _ = run(layer(), x, FULL)
    for row, at in ((0, 0), (2, 5)):
        alone, _ = run(layer(), x[row : row + 1, at : at + 1], jnp.ones(1, jnp.int32))
        assert rel(alone[0, 0], y[row, at]) < 1e-6


def test_experts_may_be_given():
    """They take the place of the router's choice; layers without experts have none."""
    x, ids = inputs(), jnp.broadcast_to(jnp.array([7, 0, 4]), (3, 7, 3))
    y, routing = run(layer(), x, FULL, ids)
    assert rel(y, plain(layer(), x, ids)[0]) < 1e-6
    np.testing.assert_array_equal(routing.experts, ids)
    tokens = jnp.ones((3, 7), jnp.int32)
    seen = jax.jit(lambda m, ids: [o.routing for o in m.blocks(*m.embed(tokens), experts={1: ids})])
    routings = seen(model(), ids)
    assert [r is None for r in routings] == [True, False]
    np.testing.assert_array_equal(routings[1].experts, ids)
    with pytest.raises(ValueError, match=r"experts of layers \[0, 5\], which have none"):
        next(model().blocks(*model().embed(tokens), experts={0: ids, 5: ids}))


def test_load_balancing_loss():
    """E * sum over slots and experts of f * P, over the tokens of all layers together."""
    rng = np.random.default_rng(0)
    p = [rng.dirichlet(np.ones(4), n) for n in (6, 10)]  # two layers, 4 experts, 2 per token
    slots = [np.argsort(-a, axis=1)[:, :2] for a in p]

    def routing(p, slots) -> Routing:
        chosen = np.stack([np.bincount(s, minlength=4) for s in slots.T])
        logits, chosen = p.astype(np.float32), chosen.astype(np.float32)
        return Routing(logits, slots, chosen, logits.sum(0))  # pyright: ignore[reportArgumentType]

    routings = [routing(*pair) for pair in zip(p, slots, strict=True)]
    probability, ids = np.concatenate(p).mean(0), np.concatenate(slots)
    fractions = np.stack([np.bincount(s, minlength=4) / 16 for s in ids.T])
    loads = [np.bincount(s.ravel(), minlength=4) for s in slots]
    both = jax.jit(lambda routings: (load_balancing_loss(routings), busiest_expert(routings)))
    loss, busiest = both(routings)
    np.testing.assert_allclose(loss, 4 * (fractions * probability).sum(), rtol=1e-6)
    np.testing.assert_allclose(busiest, np.mean([x.max() / x.mean() for x in loads]), rtol=1e-6)
    assert both(jax.tree.map(np.zeros_like, routings)) == (0, 0)


def test_active_parameters_and_flops():
    """Of the experts a token meets 3 of 8, and all of the rest."""
    sizes = {path: a.size for path, a in flat_params(model()).items()}
    stacked = sum(n for path, n in sizes.items() if ".experts." in path)
    assert table.num_parameters(CONFIG) == sum(sizes.values())
    assert table.num_active_parameters(CONFIG) == sum(sizes.values()) - stacked * 5 // 8

    def flops(config: HybridConfig) -> float:
        abstract = nnx.eval_shape(lambda: HybridLM(config, dtype=jnp.float32))
        return training_flops(TrainState.abstract(abstract, optax.sgd(1.0)), 16)

    assert CONFIG.moe is not None
    fewer = dataclasses.replace(CONFIG.moe, experts_per_token=1)
    less = flops(CONFIG) - flops(dataclasses.replace(CONFIG, moe=fewer))
    assert less == 6 * stacked * 2 / 8


def batch() -> dict[str, Any]:
    """Rows with padding, and with two documents."""
    ids = np.ones((4, 8), int)
    ids[0, :3], ids[1, 5:], ids[2, 4:] = 0, 0, 2
    tokens = np.random.default_rng(0).integers(0, 64, ids.shape)
    return {"tokens": jnp.asarray(tokens), "segment_ids": jnp.asarray(ids)}


def test_what_training_minimises():
    """The mean over targets of the cross-entropy, and the loss of the routers times 0.5."""
    one = random_model(tiny_config(("*",), moe=MoEConfig(8, 3, 12)), jnp.float32)

    @jax.jit
    def all_of(model, batch):
        aux = load_balancing_loss([r for r in routings_of(model, **batch) if r is not None])
        return balanced_loss(model, **batch, **COEF), next_token_loss(model, **batch), aux

    (total, count, metrics), (alone, targets), aux = all_of(one, batch())
    assert count == targets == 21
    np.testing.assert_allclose(metrics["loss"], alone, rtol=1e-6)
    np.testing.assert_allclose(metrics["aux_loss"], aux * count, rtol=1e-6)
    np.testing.assert_allclose(total, alone + 0.5 * aux * count, rtol=1e-6)


COEF: dict[str, Any] = {"router_aux_loss_coef": 0.5}


def routings_of(model: HybridLM, tokens, segment_ids) -> list[Routing | None]:
    x, ctx = model.embed(tokens, segment_ids=segment_ids)
    return [layer.routing for layer in model.blocks(x, ctx)]


@functools.cache
def step_on(mesh_sizes: tuple[tuple[str, int], ...], remat: str = "none"):
    """Parameters and metrics after a step, in float64."""
    config = tiny_config(("GKA", "*"), num_attention_heads=8, num_key_value_heads=4, moe=CONFIG.moe)
    model = random_model(config, jnp.float64)
    if mesh_sizes:
        model = place(model, config, mesh_of(dict(mesh_sizes)))
    optimizer = optax.sgd(1.0)
    step = make_train_step(optimizer, remat=remat, **COEF)
    state, metrics = step(TrainState.create(model, optimizer), batch())
    return state.params, metrics


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sizes", "remat"),
    [
        ((("dp", 2), ("tp", 4)), "none"),
        ((("fsdp", 2), ("tp", 2)), "block"),
        ((("sp", 2), ("fsdp", 2)), "none"),
    ],
)
def test_a_step_on_any_mesh(sizes, remat):
    """The same losses, gradients and counts as on one device; the tokens of all of them count."""
    with jax.enable_x64(True):
        pairs = zip(*map(jax.tree.leaves, (step_on(sizes, remat), step_on(()))), strict=True)
        for a, b in pairs:
            assert rel(a, b) < (1e-6 if a.dtype == jnp.float32 else 1e-10)


def test_parameters_are_gathered_again_for_the_gradient():
    """Under fsdp, what is kept for the backward pass holds no parameter as a whole."""
    split = place(model(), CONFIG, mesh_of(dict(fsdp=4)))
    x, ctx = split.embed(jnp.zeros((4, 2), jnp.int32))
    moe: Any = split.layers[1].mlp
    run = lambda moe, x: jax.vjp(lambda moe, x: moe(x, ctx)[0], moe, x)[1]  # noqa: E731
    kept = max(a.size for a in jax.tree.leaves(jax.eval_shape(run, moe, x)))
    assert kept == moe.experts.gate_up_proj[...].size


@pytest.mark.slow
def test_the_step_says_how_experts_are_used():
    """Micro-batches: the mean of their load-balancing losses, weighted with their targets."""
    optimizer = optax.sgd(0.0)

    def step(rows, **options):
        state = TrainState.create(jax.tree.map(jnp.copy, model()), optimizer)
        part = {name: a[rows] for name, a in batch().items()}
        return make_train_step(optimizer, **options)(state, part)[1]

    whole = step(slice(None), accumulate=2, **COEF)
    even, odd = step(slice(0, None, 2), **COEF), step(slice(1, None, 2), **COEF)
    for name in ("loss", "aux_loss", "busiest_expert"):
        mean = (even[name] * even["tokens"] + odd[name] * odd["tokens"]) / whole["tokens"]
        np.testing.assert_allclose(whole[name], mean, rtol=1e-5)
    with pytest.raises(ValueError, match="is for the loss of the next token"):
        make_train_step(optimizer, loss=next_token_loss, **COEF)


@pytest.mark.slow
def test_tabulate():
    """`nnx.tabulate` shows the parts of a layer with experts."""
    text = nnx.tabulate(model(), jnp.ones((1, 4), jnp.int32), console_kwargs={"width": 200})
    for name in ("mlp", "mlp/gate", "mlp/experts", "mlp/shared_expert"):
        assert f"layers/1/{name} " in text


def test_whose_coefficient():
    dense = tiny_config(("*",))
    only_in_name = tiny_config(("*",), moe=MoEConfig(8, 2, 12, dense_layers=(0,)))
    assert aux_coef(None, CONFIG) == 0.001 and aux_coef(0.0, CONFIG) == 0
    assert aux_coef(None, dense) is None and aux_coef(None, only_in_name) is None
    with pytest.raises(ValueError, match="router_aux_loss_coef=0.1: the model has no experts"):
        aux_coef(0.1, only_in_name)
