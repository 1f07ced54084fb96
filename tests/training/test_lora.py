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
from hmf_jax.layers import together
from hmf_jax.loading import from_pretrained, save_pretrained
from hmf_jax.model import HybridLM
from hmf_jax.training import TrainState, make_train_step, next_token_loss, select_parameters
from hmf_jax.training.adapters import Initial
from hmf_jax.training.lora import LoRALinear, apply_lora, load_lora, merge_lora, save_lora
from hmf_jax.training.peft import AdapterConfig
from tests.training.test_step import HEADS, SIX, T, gathered, on_mesh, tokens_for, uneven
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


def test_adapters_of_one_input_are_one_product():
    """Whichever projections have adapters, of whatever rank and scale, forward and backward."""
    with jax.enable_x64(True):
        mlp: Any = random_model(tiny_config(("*",), **ODD), jnp.float64).layers[0].mlp
        rng = np.random.default_rng(0)

        def adapter(linear: nnx.Linear, rank: int, alpha: float) -> LoRALinear:
            A, B = (jnp.asarray(rng.standard_normal(s)) for s in ((32, rank), (rank, 48)))
            return LoRALinear(linear, Initial(A, B, alpha))

        gate, up = adapter(mlp.gate_proj, 2, 3.0), adapter(mlp.up_proj, 3, 1.0)
        x = jnp.asarray(rng.standard_normal((2, T, 32)))

        def apart(x, *projections):
            return [
                x @ p.kernel[...] + p.alpha / p.rank * (x @ p.lora_A[...]) @ p.lora_B[...]
                if isinstance(p, LoRALinear)
                else p(x)
                for p in projections
            ]

        found = (gate, up, mlp.up_proj)

        @functools.partial(jax.jit, static_argnums=2)
        def run(projections, x, made):
            y, back = jax.vjp(lambda p, x: made(x, *p), projections, x)
            return y, back([jnp.sin(a) for a in y])

        got, expected = run(found, x, together), run(found, x, apart)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, 1e-9, 1e-9), got, expected)
        products = [
            str(jax.make_jaxpr(f)(x, *found)).count("dot_general") for f in (together, apart)
        ]
        assert products == [6, 7]
        assert together(x, None, gate, None)[::2] == [None, None]


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
        (dict(modules=[1]), "modules must be a text or a list of texts"),
        (dict(rank=0), "rank must be an integer >= 1, got 0"),
        (dict(rank=2.0), "rank must be an integer"),
        (dict(rank=97), r"rank=97 is larger than every projection"),
        (dict(alpha=0.0), "alpha must be a finite number > 0, got 0.0"),
        (dict(alpha=-1), "alpha must be a finite number > 0, got -1"),
        (dict(alpha=float("nan")), "alpha must be"),
        (dict(alpha=float("inf")), "alpha must be"),
        (dict(seed=-1), "seed must be an integer >= 0"),
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
    with safe_open(good / "adapter_model.safetensors", framework="numpy") as f:
        assert f.metadata()["format"] == "pt"


@pytest.fixture(scope="module")
def two_layers() -> HybridLM:
    return random_model(tiny_config(("*", "*"), **ODD), jnp.float32)


Q = "base_model.model.model.layers.{}.self_attn.q_proj.lora_{}.weight"


def write_adapters(
    directory: Path, config: dict[str, Any], layers: tuple[int, ...] = (0, 1), **more: Any
) -> Path:
    """Adapters as PEFT writes them: A and B of ones, rank 2, beside the q_proj of these layers."""
    directory.mkdir(exist_ok=True)
    base = {"peft_type": "LORA", "r": 2, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (directory / "adapter_config.json").write_text(json.dumps({**base, **config}))
    tensors = {Q.format(i, "A"): np.ones((2, 32), np.float32) for i in layers}
    tensors |= {Q.format(i, "B"): np.ones((64, 2), np.float32) for i in layers}
    tensors = {k: v for k, v in {**tensors, **more}.items() if v is not None}
    save_file(tensors, directory / "adapter_model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.parametrize(
    ("config", "alphas"),
    [
        ({}, (8, 8)),
        ({"alpha_pattern": {"q_proj": 64}}, (64, 64)),
        ({"alpha_pattern": {"model.layers.0.self_attn.q_proj": 64}}, (64, 8)),
        ({"alpha_pattern": {"0.self_attn.q_proj": 64, "q_proj": 16}}, (64, 16)),
        ({"alpha_pattern": {"q_proj": 16, "0.self_attn.q_proj": 64}}, (16, 16)),  # the first
        ({"alpha_pattern": {r"layers\.[1-3]\.self_attn\.(q|k)_proj": 2.5}}, (8, 2.5)),
        ({"use_rslora": True}, (8 * 2**0.5, 8 * 2**0.5)),
        ({"r": 4, "rank_pattern": {"self_attn.q_proj": 2}}, (8, 8)),
        ({"target_modules": r".*\.q_proj", "layers_pattern": None}, (8, 8)),
        ({"target_modules": "all-linear", "init_lora_weights": "eva"}, (8, 8)),
        ({"target_modules": None, "init_lora_weights": False, "lora_dropout": 0.1}, (8, 8)),
        ({"use_dora": False, "modules_to_save": None, "new_variant": False}, (8, 8)),
    ],
)
def test_the_scale_is_that_of_peft(config, alphas, tmp_path, two_layers):
    model = load_lora(two_layers, write_adapters(tmp_path, config))
    found: list[Any] = [layer.mixer for layer in model.layers]
    found = [mixer.q_proj for mixer in found]
    assert [(a.alpha, a.rank) for a in found] == [(pytest.approx(alpha), 2) for alpha in alphas]


@pytest.mark.parametrize(
    ("config", "modules"),
    [
        ({"target_modules": ["q_proj"]}, "0q 1q 11q"),
        ({"target_modules": ["proj"]}, ""),
        ({"target_modules": "q_proj"}, ""),  # a regular expression for the whole name
        ({"target_modules": r".*\.1\..*"}, "1q 1k"),
        ({"target_modules": ["q_proj"], "exclude_modules": ["1.self_attn.q_proj"]}, "0q 11q"),
        ({"target_modules": ["q_proj"], "exclude_modules": r".*1\.self.*"}, "0q"),
        ({"target_modules": ["q_proj"], "layers_to_transform": 1}, "1q"),
        ({"target_modules": ["k_proj", "q_proj"], "layers_to_transform": [0, 11]}, "0q 11q"),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "layers"},
            "0q",
        ),
        ({"target_modules": ["q_proj"], "layers_to_transform": [0], "layers_pattern": "h"}, ""),
        ({"target_modules": ["model.layers.1.self_attn.k_proj"], "layers_to_transform": 0}, "1k"),
    ],
)
def test_modules_are_chosen_as_peft_does(config, modules, tmp_path):
    names = {f"{i}{p}": f"model.layers.{i}.self_attn.{p}_proj" for i, p in ("0q", "1q", "1k")}
    names["11q"] = "model.layers.11.self_attn.q_proj"
    read = AdapterConfig.read(write_adapters(tmp_path, config) / "adapter_config.json")
    assert [short for short, name in names.items() if read.targets(name)] == modules.split()
    if modules == "":
        with pytest.raises(ValueError, match="means no projection of this model"):
            read.check_modules(names.values())


ONES = np.ones((2, 32), np.float32)


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        *(
            ({name: value}, {}, f"only plain LoRA can be loaded, not {name}=")
            for name, value in {
                "use_dora": True,
                "use_qalora": True,
                "lora_bias": True,
                "bias": "all",
                "fan_in_fan_out": True,
                "modules_to_save": ["lm_head"],
                "trainable_token_indices": [1],
                "layer_replication": [[0, 2], [1, 2]],
                "alora_invocation_tokens": [1, 2],
                "megatron_config": {"x": 1},
                "init_lora_weights": "pissa_niter_4",
                "use_new_variant": True,
                "new_config": {"a": 1},
            }.items()
        ),
        ({"init_lora_weights": "olora"}, {}, "it changes the base weights"),
        ({"init_lora_weights": 1}, {}, "init_lora_weights=1"),
        ({"peft_type": "LOHA"}, {}, "peft_type is 'LOHA', not LORA"),
        ({"r": 0}, {}, "r must be an integer of at least 1, is 0"),
        ({"r": True}, {}, "r must be"),
        ({"r": None}, {}, "r must be there"),
        ({"lora_alpha": 0}, {}, "lora_alpha must be a positive number, is 0"),
        ({"lora_alpha": -8}, {}, "lora_alpha must be"),
        ({"lora_alpha": "8"}, {}, "lora_alpha must be"),
        ({"lora_alpha": float("nan")}, {}, "NaN"),
        ({"alpha_pattern": {"q_proj": 0}}, {}, "alpha_pattern must be positive numbers by name"),
        ({"alpha_pattern": [8]}, {}, "alpha_pattern must be"),
        ({"alpha_pattern": {"(q": 8}}, {}, r"alpha_pattern '\(q' is no usable pattern"),
        ({"alpha_pattern": {"(q+)+x": 8}}, {}, "nested repetition"),
        ({"rank_pattern": {"q_proj": 2.0}}, {}, "rank_pattern must be"),
        ({"target_modules": [3]}, {}, "target_modules must be a name or a list of names"),
        ({"target_modules": ["k_proj"]}, {}, "0.*q_proj: not among the target_modules"),
        ({"layers_to_transform": [-1]}, {}, "layers_to_transform must be layer numbers"),
        ({"layers_to_transform": [1]}, {}, "layers.0.self_attn.q_proj: not among the target"),
        ({"r": 4}, {}, "q_proj: rank 2, but adapter_config.json says 4"),
        ({}, {Q.format(1, "B"): None}, "1.self_attn.q_proj: only one of lora_A and lora_B"),
        ({}, {Q.format(1, "A"): ONES * np.nan}, "1.self_attn.q_proj: holds NaN or infinity"),
        ({}, {Q.format(1, "A"): ONES[0]}, r"lora_A \(32,\), lora_B \(64, 2\) for a \(64, 32\)"),
        ({}, {Q.format(1, "A"): ONES.astype(np.int8)}, "is I8, adapters are"),
        ({}, {Q.format(2, "A"): ONES}, "layers.2.self_attn.q_proj.lora_A.weight: no such proj"),
        ({}, {Q.format(1, "magnitude_vector"): ONES}, "lora_magnitude_vector.weight: no such"),
        ({}, {"base_model.model.lm_head.weight": ONES}, "lm_head.weight: no such projection"),
    ],
)
def test_adapters_that_are_something_else(config, tensors, message, tmp_path, two_layers):
    directory = write_adapters(tmp_path / "a", config, **tensors)
    with pytest.raises(ValueError, match=message) as error:
        load_lora(two_layers, directory)
    assert str(tmp_path / "a") in str(error.value)


def test_adapters_that_are_warned_of(tmp_path, two_layers):
    config = {"note": "mine", "alpha_pattern": {"up": 4}, "base_model_name_or_path": "org/other"}
    directory, base = (
        write_adapters(tmp_path, config, layers=(0,)),
        jax.tree.map(jnp.copy, two_layers),
    )
    base.source = "/cache/models--org--base/snapshots/0123"
    with pytest.warns() as record:
        model = load_lora(base, directory)
    said = " / ".join(str(w.message) for w in record)
    assert "trained on org/other, and this model is org/base" in said
    assert "unknown keys note" in said and "alpha_pattern up match nothing" in said
    assert "lacks the adapters of model.layers.1.self_attn.q_proj" in said
    assert isinstance(q_projection(model), LoRALinear)


def test_damaged_adapter_files(tmp_path, two_layers):
    weights = write_adapters(tmp_path, {}) / "adapter_model.safetensors"
    good, config = weights.read_bytes(), tmp_path / "adapter_config.json"
    for damage in (good[:-8], good[:20], b"", good[:8] + b"[" + good[9:]):
        weights.write_bytes(damage)
        with pytest.raises(ValueError, match="adapter_model.safetensors"):
            load_lora(two_layers, tmp_path)
    weights.write_bytes(good)
    for damage in ("", "[]", "{", '{"r": 2, "r": 3}', "[" * 9999):
        config.write_text(damage)
        with pytest.raises(ValueError, match="adapter_config.json"):
            load_lora(two_layers, tmp_path)
