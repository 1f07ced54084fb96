"""Adapters beside projections compute, learn, merge and travel as the formula W + (alpha / r) A B
says, for every layer kind, on meshes and on quantised projections."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from hmf_jax.config import BMojoConfig, GDNConfig
from hmf_jax.loading import from_pretrained, save_pretrained
from hmf_jax.model import HybridLM
from hmf_jax.training import TrainState, make_train_step, next_token_loss, select_parameters
from hmf_jax.training.lora import LoRALinear, apply_lora, load_lora, merge_lora, save_lora
from tests.training.test_step import HEADS, SIX, gathered, on_mesh, tokens_for, uneven
from tests.util import random_model, rel, tiny_config

ODD = dict(vocab_size=61)
logits = jax.jit(lambda model, tokens: model(tokens)[0])


def adapted(model: HybridLM, **options: Any) -> HybridLM:
    """The model with adapters that matter: fresh ones have B = 0."""
    model = apply_lora(model, **{"rank": 3, "alpha": 6.0, **options})
    rng = np.random.default_rng(0)

    def fill(path, x):
        name = jax.tree_util.keystr(path)
        return jnp.asarray(0.1 * rng.standard_normal(x.shape), x.dtype) if "lora" in name else x

    return jax.tree_util.tree_map_with_path(fill, model)


def named(model: HybridLM) -> dict[str, jax.Array]:
    return dict(zip(select_parameters(model), jax.tree.leaves(model), strict=True))


@pytest.mark.parametrize("kinds", [pytest.param(SIX[:3], marks=pytest.mark.slow), SIX[3:]])
def test_merged_is_unmerged_in_every_layer_kind(kinds):
    gdn = GDNConfig(kv_proj_rank=4)
    config = tiny_config(kinds, gdn=gdn, bmojo=BMojoConfig(4, False, "GKA"), **ODD)
    plain = random_model(config, jnp.float32)
    model, tokens = adapted(plain), tokens_for(0)
    merged = merge_lora(model)
    assert jax.tree.structure(merged) == jax.tree.structure(plain)
    with_adapters = {n.removesuffix(".lora_A") for n in named(model) if n.endswith("lora_A")}
    for name, W in named(plain).items():
        new, path = named(merged)[name], name.removesuffix(".kernel")
        projection = name.endswith("kernel") and name.startswith("layers")
        assert projection == (path in with_adapters), name
        if projection:
            A, B = named(model)[f"{path}.lora_A"], named(model)[f"{path}.lora_B"]
            W = np.asarray(W, np.float64) + 2 * np.asarray(A, np.float64) @ np.asarray(B)
        assert rel(new, W) < (1e-6 if projection else 1e-30), name
    assert rel(logits(model, tokens), logits(merged, tokens)) < 1e-5
    assert rel(logits(model, tokens), logits(plain, tokens)) > 0.1


def test_fresh_adapters_change_nothing_and_come_from_the_seed():
    plain = random_model(tiny_config(("*",), attention_bias=True, **ODD), jnp.bfloat16)
    model = apply_lora(plain, rank=2)
    np.testing.assert_array_equal(
        *(logits(m, tokens_for(0)).astype(jnp.float32) for m in (model, plain))
    )
    new = {n: p for n, p in named(model).items() if "lora" in n}
    assert all(p.dtype == jnp.float32 for p in new.values())
    assert not any(p.any() for n, p in new.items() if n.endswith("B"))
    A = np.asarray(new["layers.0.mlp.up_proj.lora_A"])
    assert A.shape == (32, 2) and abs(A.std() * 96**0.5 - 1) < 0.3
    q, k = (new[f"layers.0.mixer.{n}_proj.lora_A"] for n in "qk")
    assert not np.array_equal(q, k)
    again = named(apply_lora(plain, rank=2, modules="up_proj"))
    np.testing.assert_array_equal(again["layers.0.mlp.up_proj.lora_A"], A)
    other = named(apply_lora(plain, rank=2, seed=1))
    assert not np.array_equal(other["layers.0.mlp.up_proj.lora_A"], A)


@pytest.mark.parametrize("remat", ["none", pytest.param("block", marks=pytest.mark.slow)])
def test_step_is_that_of_the_formula(remat):
    """With dW the gradient of the merged weight: dA = (alpha / r) dW B', dB = (alpha / r) A' dW."""
    with jax.enable_x64(True):
        model, batch = adapted(random_model(tiny_config(("SWA",), **ODD), jnp.float64)), uneven()
        before = named(jax.device_get(model))

        def loss(model):
            total, count = next_token_loss(model, **batch)
            return total / count

        value, grads = jax.jit(jax.value_and_grad(loss))(merge_lora(model))
        dW = named(grads)
        optimizer = optax.sgd(1.0)
        state = TrainState.create(model, optimizer, trainable="lora")
        assert all("lora" in n for n in state.params) and len(state.params) == 14
        state, metrics = make_train_step(optimizer, remat=remat)(state, batch)
        assert rel(metrics["loss"], value) < 1e-6
        after = named(state.model())
        for name, old in before.items():
            step = old - np.asarray(after[name])
            path = name.rpartition(".")[0]
            if name.endswith("lora_A"):
                expected = 2 * dW[f"{path}.kernel"] @ before[f"{path}.lora_B"].T
            elif name.endswith("lora_B"):
                expected = 2 * before[f"{path}.lora_A"].T @ dW[f"{path}.kernel"]
            else:
                np.testing.assert_array_equal(after[name], old)
                continue
            assert rel(step, expected) < 1e-7, name


@pytest.mark.parametrize(
    ("kind", "dtype", "error"),
    [pytest.param("int8", "int8", 0.01, marks=pytest.mark.slow), ("nf4", "uint4", 0.1)],
)
def test_quantised_projections(kind, dtype, error):
    plain = random_model(tiny_config(("*",), intermediate_size=128, **ODD), jnp.float32)
    model, tokens = adapted(plain, quantize=kind, modules="self_attn, down_proj"), tokens_for(0)
    held, mixer = named(model), "layers.0.mixer.q_proj"
    assert f"{mixer}.kernel" not in held and held[f"{mixer}.qvalue"].dtype == dtype
    rows = {"int8": 1, "nf4": 2}[kind]  # of scales: one, or one per 64 rows of 128
    assert held["layers.0.mlp.down_proj.scale"].shape == (rows, 32)
    assert "layers.0.mlp.up_proj.kernel" in held  # has no adapter
    merged = merge_lora(model)
    assert rel(logits(model, tokens), logits(merged, tokens)) < 1e-5
    delta = 2 * held[f"{mixer}.lora_A"] @ held[f"{mixer}.lora_B"]
    W = named(plain)[f"{mixer}.kernel"]
    assert 1e-4 < rel(named(merged)[f"{mixer}.kernel"] - delta, W) < error

    # The backward pass keeps the integers, not the weights made of them.
    layer, x = q_projection(model), jnp.ones((2, 32))
    assert isinstance(layer, LoRALinear)
    kept = jax.tree.leaves(jax.vjp(lambda x, A: _with_A(layer, A)(x), x, layer.lora_A[...])[1])
    shapes = {(a.shape, a.dtype.name) for a in kept}
    assert ((32, 64), dtype) in shapes and ((32, 64), "float32") not in shapes

    optimizer = optax.adam(1e-2)
    state, batch = TrainState.create(model, optimizer, trainable="lora"), {"tokens": tokens}
    step, losses = make_train_step(optimizer), []
    for _ in range(8):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.9 * losses[0], losses


def q_projection(model: HybridLM) -> Any:
    mixer: Any = model.layers[0].mixer
    return mixer.q_proj


def _with_A(layer: LoRALinear, A: jax.Array) -> LoRALinear:
    layer = jax.tree.map(lambda x: x, layer)
    layer.lora_A[...] = A
    return layer


@functools.cache
def on_one_device(quantize) -> tuple[Any, ...]:
    """Model, gradients of the adapters and merged parameters after a step, all in float64."""
    config = tiny_config(("*",), **HEADS)
    model = adapted(random_model(config, jnp.float64, seed=1), quantize=quantize)
    return jax.device_get((model, *step_and_merge(model)[:2]))


def step_and_merge(model: HybridLM):
    optimizer = optax.sgd(0.1, momentum=0.9)
    state = TrainState.create(jax.tree.map(jnp.copy, model), optimizer, trainable="lora")
    program = make_train_step(optimizer).lower(state, uneven()).compile()
    state, _ = program(state, uneven())
    merged = merge_lora(state.model())
    return state.opt_state[0].trace, named(merged), state, program.as_text()


SLOW = pytest.mark.slow
TP4, MIXED = dict(tp=4), dict(fsdp=2, tp=2)


@pytest.mark.parametrize(
    ("sizes", "quantize"),
    [
        (MIXED, None),
        pytest.param(TP4, None, marks=SLOW),
        *(pytest.param(s, q, marks=SLOW) for s in (TP4, MIXED) for q in ("int8", "nf4")),
    ],
)
@jax.enable_x64(True)
def test_a_mesh_makes_the_same_step(sizes, quantize):
    """Adapters are split like their projections, and tp gathers nothing."""
    model, grads, weights = on_one_device(quantize)
    plain = random_model(model.config, jnp.float64, seed=1)
    model = adapted(on_mesh(plain, sizes), quantize=quantize)
    placed = jax.device_put(jax.tree.leaves(model), jax.tree.leaves(model.shardings()))
    model = jax.tree.unflatten(jax.tree.structure(model), placed)
    got, merged, state, text = step_and_merge(model)
    for name, g in grads.items():
        assert rel(got[name], g) < 1e-7, name
    for name, W in weights.items():
        assert rel(merged[name], W) < 1e-7, name
    q, o = "layers.0.mixer.q_proj", "layers.0.mixer.o_proj"
    shards = {n: p.sharding.shard_shape(p.shape) for n, p in state.params.items()}
    if sizes == MIXED:
        assert shards[f"{q}.lora_A"] == (16, 3) and shards[f"{q}.lora_B"] == (3, 64)
        assert shards[f"{o}.lora_A"] == (64, 3) and shards[f"{o}.lora_B"] == (3, 16)
    else:
        assert gathered(text) == []
    whole, split = named(on_mesh(plain, sizes))[f"{q}.kernel"], merged[f"{q}.kernel"]
    assert split.sharding.is_equivalent_to(whole.sharding, 2)


def test_adapters_travel_alone(tmp_path: Path):
    """The files say W + (alpha / r) B A under the names of the checkpoint, as PEFT does."""
    plain = random_model(tiny_config(("M2", "*"), **ODD), jnp.float32)
    model = adapted(plain, modules="mamba, self_attn.q_proj, o_proj")
    save_lora(model, tmp_path / "adapters")
    again = load_lora(plain, tmp_path / "adapters")
    assert jax.tree.structure(again) == jax.tree.structure(model)
    jax.tree.map(np.testing.assert_array_equal, again, model)

    save_pretrained(plain, tmp_path / "plain", progress=False)
    with pytest.raises(ValueError, match="lora_A.*merge_lora adds it to the weights"):
        save_pretrained(model, tmp_path / "merged", progress=False)
    save_pretrained(merge_lora(model), tmp_path / "merged", progress=False)
    before, after = (load_file(tmp_path / n / "model.safetensors") for n in ("plain", "merged"))
    weights = load_file(tmp_path / "adapters" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    for module in config["target_modules"]:
        A, B = (weights.pop(f"base_model.model.{module}.lora_{half}.weight") for half in "AB")
        rank = config["rank_pattern"].get(module, config["r"])
        alpha = config["alpha_pattern"].get(module, config["lora_alpha"])
        assert len(A) == B.shape[1] == rank == (15 if "in_proj" in module else 3)
        before[f"{module}.weight"] = before[f"{module}.weight"] + alpha / rank * B @ A
    assert not weights and len(config["target_modules"]) == 4
    for name, value in after.items():
        assert rel(value, before[name]) < 1e-6, name

    # PEFT itself does not say which part of a merged tensor an adapter belongs to.
    file = tmp_path / "adapters" / "adapter_model.safetensors"
    save_file(load_file(file), file, {"format": "pt"})
    foreign = load_lora(plain, tmp_path / "adapters")
    for name, value in named(merge_lora(foreign)).items():
        assert rel(value, named(merge_lora(model))[name]) < 1e-6, name


def test_the_export_of_a_merged_model(tmp_path: Path):
    """bfloat16: what is saved and loaded computes what the adapters did, up to rounding."""
    plain = random_model(tiny_config(("SWA",), **ODD), jnp.bfloat16)
    save_pretrained(plain, tmp_path / "base", progress=False)
    model = adapted(from_pretrained(tmp_path / "base", progress=False))
    save_pretrained(merge_lora(model), tmp_path / "export", progress=False)
    exported = from_pretrained(tmp_path / "export", progress=False)
    assert exported.config == model.config
    adapters, after, before = (
        jnp.float32(logits(m, tokens_for(0))) for m in (model, exported, plain)
    )
    assert rel(after, adapters) < 0.02 < 10 * 0.02 < rel(before, adapters)


def test_selection_and_bad_arguments():
    plain = nnx.eval_shape(lambda: HybridLM(tiny_config(("GKA", "*", "BMF"), **ODD)))

    def lora(model, **options):
        return jax.eval_shape(lambda m: apply_lora(m, **options), model)

    def paths(modules):
        names = named(lora(plain, rank=1, modules=modules))
        return sorted(n.removesuffix(".lora_A") for n in names if n.endswith(".lora_A"))

    assert paths("self_attn.q_proj, layers.0.mlp.up") == [
        "layers.0.mlp.up_proj",
        "layers.1.mixer.q_proj",
    ]
    assert paths(["q_proj"]) == [
        "layers.0.mixer.q_proj",
        "layers.1.mixer.q_proj",
        "layers.2.mixer.bmojo_attn.q_proj",
        "layers.2.mixer.inner.q_proj",
    ]
    everything = paths("proj")
    assert not any("head" in p or "embed" in p for p in everything) and len(everything) == 33
    arguments: list[tuple[dict[str, Any], str]] = [
        (dict(modules="q_prj"), "'q_prj' matches no parameter; did you mean 'q_proj'"),
        (dict(modules="norm"), "'norm' selects no projection; there are .*mixer.q_proj"),
        (dict(modules="lm_head"), "'lm_head' selects no projection"),
        (dict(modules=" , "), "holds no pattern"),
        (dict(rank=0), "rank=0"),
        (dict(alpha=0.0), "alpha=0.0"),
        (dict(quantize="int3"), "quantize='int3'"),
    ]
    for bad, message in arguments:
        with pytest.raises(ValueError, match=message):
            lora(plain, **bad)
    with pytest.raises(ValueError, match="has no adapters"):
        merge_lora(plain)
    with pytest.raises(ValueError, match="has adapters already"):
        lora(lora(plain, modules="q_proj"), modules="k_proj")


def test_bad_files(tmp_path: Path):
    plain = random_model(tiny_config(("*",), **ODD), jnp.bfloat16)
    model, good = adapted(plain, modules="q_proj"), tmp_path / "good"
    save_lora(model, good)
    with pytest.raises(FileExistsError, match="not empty"):
        save_lora(model, good)
    broken = jax.tree.map(lambda x: x * jnp.nan, model)
    with pytest.raises(ValueError, match="not finite: .*q_proj.lora_A"):
        save_lora(broken, tmp_path / "broken")
    assert [p.name for p in tmp_path.iterdir()] == ["good"]
    with pytest.raises(FileNotFoundError, match="no adapter_config.json"):
        load_lora(plain, tmp_path)
    with pytest.raises(ValueError, match=r"q_proj: lora_A \(3, 32\), lora_B \(64, 3\)"):
        load_lora(random_model(tiny_config(("*",), hidden_size=48), jnp.bfloat16), good)
    with pytest.raises(ValueError, match="layers.0.self_attn.q_proj.lora_A.weight: no such proj"):
        load_lora(random_model(tiny_config(("GKA",)), jnp.bfloat16), good)
    file = good / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "use_dora": True}))
    with pytest.raises(ValueError, match="not use_dora=True"):
        load_lora(plain, good)
    with safe_open(good / "adapter_model.safetensors", framework="numpy") as f:
        assert f.metadata()["format"] == "pt"
