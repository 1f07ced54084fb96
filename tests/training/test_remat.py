"""What the backward pass keeps: kernels that do not run twice, and choices that fill a device."""

from __future__ import annotations

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from hmf_jax.model import HybridLM
from hmf_jax.pallas_kernels import gated_delta_rule, ssd
from hmf_jax.pallas_kernels.ops.attention import mosaic as attention_mosaic
from hmf_jax.pallas_kernels.ops.gka import mosaic as gka_mosaic
from hmf_jax.training import TrainState, make_train_step
from hmf_jax.training.identity import Record
from hmf_jax.training.memory import Layer, StepMemory, fit, plan_memory
from hmf_jax.training.remat import LADDER, REMAT, check_remat, remat_choices, remat_text
from tests.util import random_model, tiny_config

SGD = optax.sgd(0.1, momentum=0.9)


def kernels(jaxpr: Any) -> list[str]:
    """Names of the Mosaic kernels of a trace, once for each call."""
    found = []
    for eqn in jaxpr.eqns:
        name = eqn.params.get("name")
        if isinstance(name, str) and name.endswith(("_body", "attention_forward")):
            found.append(name)
            continue
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                found += kernels(inner) if hasattr(inner, "eqns") else []
    return found


@pytest.mark.parametrize(("kind", "kernel"), [("GKA", "solve_body"), ("*", "attention_forward")])
def test_kernels_run_once(monkeypatch, kind, kernel):
    """Traced as on a Hopper GPU; under "block" the search does find two."""
    for module in (gka_mosaic, attention_mosaic):
        monkeypatch.setattr(module, "why_no_hopper", lambda: None)
    config = tiny_config((kind,), head_dim=64)
    model = nnx.eval_shape(lambda: HybridLM(config, dtype=jnp.bfloat16))
    state = TrainState.abstract(model, SGD)
    tokens = jax.ShapeDtypeStruct((1, 64), jnp.int32)
    counts = {}
    for choice in REMAT:
        step = make_train_step(SGD, remat=choice)
        traced = step.trace(state, {"tokens": tokens, "segment_ids": tokens})
        counts[choice] = kernels(traced.jaxpr.jaxpr).count(kernel)
    assert counts == {name: 2 if name == "block" else 1 for name in REMAT}


@pytest.mark.parametrize("op", [gated_delta_rule, ssd])
def test_scans_run_once(op):
    """In plain JAX: once forward, once backward."""
    rng = np.random.default_rng(0)
    a, b, c = (jnp.asarray(rng.normal(size=(1, 16, 2, 4)), jnp.float32) for _ in range(3))
    g = -jnp.abs(a[..., 0])
    rest = (g, -g) if op is gated_delta_rule else (-g, g[0, 0], None)

    def loss(a: jax.Array, choice: str) -> jax.Array:
        def run(a: jax.Array) -> jax.Array:
            return jnp.sin(op(jnp.sin(a), b, c, *rest, chunk_size=8)[0])

        return jnp.sum(jax.checkpoint(run, policy=REMAT[choice])(a))

    def count(choice: str) -> int:
        return str(jax.make_jaxpr(jax.grad(loss), static_argnums=1)(a, choice)).count("= scan[")

    assert [count(choice) for choice in ("dots", "named", "block")] == [2, 2, 3]


@pytest.mark.parametrize("kind", ["*", pytest.param("GKA", marks=pytest.mark.slow)])
def test_gradients_are_the_same(kind):
    """To the bit where XLA rounds alike, as it does in attention layers here."""
    model = random_model(tiny_config((kind, kind), vocab_size=61), jnp.float32)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 61, (1, 24)), jnp.int32)

    def gradients(remat: Any) -> list[jax.Array]:
        state = TrainState.create(jax.tree.map(jnp.copy, model), SGD)
        state, _ = make_train_step(SGD, remat=remat)(state, {"tokens": tokens})
        return jax.tree.leaves(state.opt_state)

    expected = gradients("none")
    for a, b in zip(gradients(("dots", "named")), expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=0 if kind == "*" else 1e-4)


def test_what_is_kept():
    """Of an attention layer, known to the byte."""
    config = tiny_config(("*", "*"), vocab_size=61)
    model = nnx.eval_shape(lambda: HybridLM(config, dtype=jnp.float32))
    memory = plan_memory(TrainState.abstract(model, SGD), 2, 32, packed=False)
    c, token = config, 2 * 32 * 4
    x = token * c.hidden_size
    o = token * c.query_width + token * c.num_attention_heads  # and the log-sum-exp
    products = token * (c.query_width + 2 * c.key_width + c.hidden_size + 2 * c.intermediate_size)
    kept = memory.layers[0].kept
    assert memory.layers[0] is memory.layers[1] and set(kept) == set(REMAT)
    assert (kept["block"], kept["named"], kept["dots"]) == (x, x + o, x + o + products)
    assert kept["none"] > kept["dots"]
    whole = sum(a.size for a in jax.tree.leaves(model))
    assert memory.parts["trained weights"] == memory.parts["optimizer"] == 4 * whole
    embeddings = 4 * 61 * c.hidden_size
    inside = sum(layer.gradients for layer in memory.layers)
    assert inside + memory.parts["other gradients"] + memory.last == 4 * whole
    assert memory.last == embeddings


def step_memory(layers: int = 6) -> StepMemory:
    kept: dict[str, int] = {"none": 100, "dots": 50, "named": 20, "block": 10}
    return StepMemory({"frozen weights": 1000}, (Layer(kept, 5),) * layers, loss=30)


def test_the_choices_fill_the_memory():
    memory = step_memory()
    assert memory.choose(10**9) == ("none",) * 6
    assert memory.choose(0) == ("block",) * 6
    seen = set()
    for limit in range(1000, 1700, 10):
        choices = memory.choose(limit)
        seen.add(choices)
        order = [LADDER.index(c) for c in choices]
        assert order == sorted(order, reverse=True) and order[0] - order[-1] <= 1
        if choices == ("block",) * 6:
            continue
        assert memory.total(choices) <= limit
        cheap = choices.count(choices[0]) if len(set(choices)) > 1 else 0
        if cheap:  # one layer more would be too much
            dearer = choices[: cheap - 1] + (choices[-1],) * (7 - cheap)
            assert memory.total(dearer) > limit
    assert len(seen) > 10


def program(size: int) -> Any:
    analysis = types.SimpleNamespace(
        argument_size_in_bytes=size, output_size_in_bytes=3, temp_size_in_bytes=0,
        alias_size_in_bytes=3,
    )  # fmt: skip
    return types.SimpleNamespace(memory_analysis=lambda: analysis)


def test_what_does_not_fit_is_replaced():
    memory, said, tried = step_memory(), [], []

    def compile(choices: tuple[str, ...]) -> Any:
        tried.append(choices)
        return program(memory.total(choices) + 200)

    choices = fit(memory, 1500, compile, say=said.append)
    assert tried == [memory.choose(1500), memory.choose(1300)] and choices == tried[-1]
    assert len(said) == 1 and "would take 1.6 KiB of 1.5 KiB" in said[0], said
    choices = fit(memory, 1100, compile, say=said.append)
    assert choices == ("block",) * 6 and "shorter rows" in said[-1]


def test_a_run_keeps_its_choices(tmp_path):
    memory = step_memory()
    before = memory.choose(1300)

    def chosen(limit: int, before: Any) -> tuple[str, ...]:
        return fit(memory, limit, lambda c: program(memory.total(c)), before=before)

    assert chosen(1700, before) == before != memory.choose(1700)
    assert chosen(1200, before) == memory.choose(1200)  # no longer fits
    assert chosen(1700, before[:-1]) == memory.choose(1700)
    identity = dict.fromkeys(
        ("fields", "rows", "steps", "config", "base weights", "tokenizer", "chat template")
    )
    record = Record(tmp_path, {**identity, "data": [], "eval_data": []}, {}, list(before))
    record.save()
    loaded = Record.load(tmp_path)
    assert loaded is not None and loaded.remat == list(before)


def test_choices():
    assert remat_choices({"GKA": "block"}, ("GKA", "*")) == ("block", "none")
    assert remat_choices(["dots", "none"], ("GKA", "*")) == ("dots", "none")
    with pytest.raises(ValueError, match="choices for 1 layers, the model has 2"):
        remat_choices(["dots"], ("GKA", "*"))
    with pytest.raises(ValueError, match="'keep' is unknown; choices are none, dots"):
        check_remat(["none", "keep"])
    with pytest.raises(ValueError, match="needs to know the rows"):
        make_train_step(SGD, remat="auto")
    assert remat_text(("dots", "dots", "none")) == "dots in layers 0-1, none in layer 2"
    assert remat_text(("named",) * 3) == "named in all layers"
