"""Adapters of experts: W + (alpha / r) A B for each of them, in the files of PEFT."""

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
from safetensors.numpy import load_file, save_file

from hmf_jax.model import HybridLM
from hmf_jax.moe import Experts, MoE
from hmf_jax.options import MoEConfig
from hmf_jax.training import TrainState, make_train_step
from hmf_jax.training.adapters import LoRAExperts
from hmf_jax.training.flops import training_flops
from hmf_jax.training.lora import apply_lora, load_lora, merge_lora, save_lora
from hmf_jax.training.schema import TrainConfig
from hmf_jax.training.step import select_parameters
from tests.training.test_lora import adapted, named
from tests.util import mesh_of, place, random_model, rel, tiny_config

MOE = MoEConfig(4, 3, 12, shared_intermediate_size=20, every=2)
CONFIG = tiny_config(("*",) * 2, vocab_size=64, moe=MOE)  # layer 1 is sparse
EXPERTS = "layers.1.mlp.experts"
STACKS = f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"
STORED = f"model.{STACKS[0]}", f"model.{STACKS[1]}"
HALVES = {f"{stack}_lora.lora_{half}" for stack in STACKS for half in "AB"}


@functools.cache
def plain() -> HybridLM:
    return random_model(CONFIG, jnp.float32)


@functools.cache
def with_experts() -> HybridLM:
    return adapted(plain(), modules="q_proj, experts")


def float64(x: Any) -> np.ndarray:
    return np.asarray(x, np.float64)


def paths(modules: Any) -> set[str]:
    model = jax.eval_shape(lambda m: apply_lora(m, rank=2, modules=modules), plain())
    return {n.removesuffix(".lora_A") for n in named(model) if n.endswith(".lora_A")}


def test_experts_have_adapters_where_asked():
    both = {f"{stack}_lora" for stack in STACKS}
    everything = paths("proj")
    assert not any("experts" in path for path in everything) and len(everything) == 14
    shared = {f"layers.1.mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")}
    assert {path for path in everything if path.startswith("layers.1.mlp")} == shared
    assert paths("proj, experts") == everything | both
    assert paths(["experts"]) == paths("layers.1.mlp.experts") == paths(".experts.") == both
    assert paths("experts.down_proj") == {f"{STACKS[1]}_lora"}
    assert not paths("layers.1., mlp, down_proj") & both
    for pattern in ("gate_up_proj", "mlp.gate.", "shared_expert_gate"):
        with pytest.raises(ValueError, match="selects no projection; .*'experts' selects experts"):
            paths(pattern)
    with pytest.raises(ValueError, match="rank=13 is larger than every projection"):
        apply_lora(plain(), rank=13, modules="experts.down_proj")
    with pytest.raises(ValueError, match="quantize='int8' is for projections"):
        jax.eval_shape(lambda m: apply_lora(m, modules="experts", quantize="int8"), plain())


def test_what_they_begin_with():
    model = apply_lora(plain(), rank=2, modules="experts")
    held = named(model)
    A, B = (held[f"{STACKS[0]}_lora.lora_{half}"] for half in "AB")
    assert A.shape == (4, 32, 2) and B.shape == (4, 2, 24) and A.dtype == B.dtype == jnp.float32
    assert not B.any() and 0.7 < float(jnp.abs(A).max() * 32**0.5) <= 1
    assert len(np.unique(A)) == A.size
    half = nnx.eval_shape(
        lambda: apply_lora(HybridLM(CONFIG, dtype=jnp.bfloat16), modules="experts")
    )
    assert named(half)[f"{STACKS[1]}_lora.lora_A"].dtype == jnp.float32


def test_the_merged_weights_are_the_formula():
    model = with_experts()
    merged, held = merge_lora(model), named(model)
    assert jax.tree.structure(merged) == jax.tree.structure(plain())
    for stack in STACKS:
        A, B = (float64(held[f"{stack}_lora.lora_{half}"]) for half in "AB")
        expected = float64(named(plain())[stack]) + 2 * np.einsum("eir,ero->eio", A, B)
        assert rel(named(merged)[stack], expected) < 1e-6


def experts_of(model: HybridLM) -> Experts:
    found = model.layers[1].mlp
    assert isinstance(found, MoE)
    return found.experts


def test_they_compute_what_the_merged_weights_do():
    """The sum of the experts of each row; 4 is none of them."""
    model = with_experts()
    x = jax.random.normal(jax.random.key(1), (10, 32))
    chosen = jnp.arange(30).reshape(10, 3) % 5
    weights = 1 + jnp.cos(jnp.float32(chosen))
    run = jax.jit(lambda experts: experts(x, chosen, weights, "reference"))

    def formula(model: HybridLM) -> np.ndarray:
        into, out = (float64(named(model)[stack]) for stack in STACKS)
        gate, up = np.split(np.einsum("nd,edf->nef", float64(x), into), 2, axis=-1)
        each = np.einsum("nef,efd->ned", gate / (1 + np.exp(-gate)) * up, out)
        share = np.asarray(weights)[..., None] * (np.asarray(chosen)[..., None] == np.arange(4))
        return np.einsum("nke,ned->nd", share, each)

    merged = formula(merge_lora(model))
    assert rel(run(experts_of(model)), merged) < 1e-5 < 0.01 < rel(formula(plain()), merged)
    fresh = jax.tree_util.tree_map_with_path(
        lambda path, x: 0 * x if "lora_B" in jax.tree_util.keystr(path) else x, experts_of(model)
    )
    assert rel(run(fresh), formula(plain())) < 1e-5


def test_the_gradients_of_adapters():
    """By the rule of the product, from those of the merged matrices."""
    experts = experts_of(with_experts())
    assert isinstance(experts, LoRAExperts)
    name, adapters = next(experts.adapters())
    sizes = jnp.array([3, 0, 5, 1])
    x, d_y = (jax.random.normal(jax.random.key(n), (9, n)) for n in (32, 24))

    @jax.jit
    def gradients(experts):
        run = lambda e, x: e.product(name, x, sizes, "reference")  # noqa: E731
        return jax.vjp(run, experts, x)[1](d_y)

    grads, d_x = gradients(experts)
    A, B = float64(adapters.lora_A[...]), float64(adapters.lora_B[...])
    expert = np.repeat(np.arange(4), sizes)
    dW = np.zeros((4, 32, 24))
    np.add.at(dW, expert, float64(x)[:, :, None] * np.asarray(d_y)[:, None])
    got = dict(grads.adapters())[name]
    assert rel(got.lora_A[...], 2 * dW @ B.transpose(0, 2, 1)) < 1e-5
    assert rel(got.lora_B[...], 2 * A.transpose(0, 2, 1) @ dW) < 1e-5
    merged = float64(named(merge_lora(with_experts()))[STACKS[0]])[expert]
    assert rel(d_x, np.einsum("no,nio->ni", np.asarray(d_y), merged)) < 1e-5


def test_what_a_run_trains():
    model = jax.eval_shape(with_experts)
    abstract = TrainState.abstract(model, optax.sgd(1.0), trainable="lora")
    assert {path for path in abstract.params if "experts" in path} == HALVES
    assert set(select_parameters(model, "experts")) == {*STACKS, *HALVES}
    assert not any("lora" in path for path in abstract.frozen)
    needed = {"model": "m", "data": "d", "output": "o", "recipe": "instruct", "lora_rank": 2}
    config = TrainConfig.of({**needed, "lora_modules": "proj, experts"})
    assert (config.trainable, config.lora_modules) == ("lora", "proj, experts")


@functools.cache
def step_on(sizes: tuple[tuple[str, int], ...] = ()):
    """Adapters and metrics after a step in float64, the weights merged, and the model before."""
    config = tiny_config(
        ("*",), num_attention_heads=8, num_key_value_heads=4, moe=MoEConfig(8, 3, 12)
    )
    model = random_model(config, jnp.float64)
    if sizes:
        model = place(model, config, mesh_of(dict(sizes)))
    model = adapted(model, modules="q_proj, experts")
    placed = jax.device_put(model, model.shardings()) if sizes else model
    optimizer = optax.sgd(1.0)
    state = TrainState.create(jax.tree.map(jnp.copy, placed), optimizer, trainable="lora")
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 64, (4, 8)))
    state, metrics = make_train_step(optimizer)(state, {"tokens": tokens})
    return state, metrics, named(merge_lora(state.model())), named(model)


def test_active_flops_count_the_experts_of_a_token():
    def flops(modules: str) -> float:
        abstract = nnx.eval_shape(lambda: apply_lora(plain(), rank=2, modules=modules))
        return training_flops(TrainState.abstract(abstract, optax.sgd(1.0), trainable="lora"), 16)

    one = 2 * (32 + 24) + 2 * (12 + 32)  # of rank 2 beside the two matrices of an expert
    assert flops("q_proj, experts") - flops("q_proj") == 6 * 3 * one


@pytest.mark.slow
@pytest.mark.parametrize(
    "sizes", [(("fsdp", 2), ("tp", 4)), (("dp", 2), ("tp", 2)), (("sp", 2), ("fsdp", 2))]
)
def test_a_mesh_makes_the_same_step(sizes):
    with jax.enable_x64(True):
        state, metrics, merged, _ = step_on(sizes)
        one, alone, weights, before = step_on()
    for name, value in one.params.items():
        assert rel(state.params[name], value) < 1e-10, name
        assert rel(value, before[name]) > 1e-6, name
    for name, W in weights.items():
        assert rel(merged[name], W) < 1e-10, name
    assert rel(metrics["loss"], alone["loss"]) < 1e-6
    if sizes == (("fsdp", 2), ("tp", 4)):
        shards = {n: a.sharding.shard_shape(a.shape) for n, a in state.params.items()}
        into, out = (f"layers.0.mlp.experts.{n}_proj_lora.lora_" for n in ("gate_up", "down"))
        assert shards[f"{into}A"] == (2, 16, 3) and shards[f"{into}B"] == (2, 3, 24)
        assert shards[f"{out}A"] == (2, 12, 3) and shards[f"{out}B"] == (2, 3, 16)


@pytest.mark.parametrize("modules", ["q_proj, experts", "experts.gate_up", "experts.down_proj"])
def test_adapters_travel_alone(modules, tmp_path: Path):
    """The files say W + (alpha / r) B A of each expert, laid out as PEFT does."""
    model = adapted(plain(), modules=modules)
    save_lora(model, tmp_path / "a")
    again = load_lora(plain(), tmp_path / "a")
    assert jax.tree.structure(again) == jax.tree.structure(model)
    jax.tree.map(np.testing.assert_array_equal, again, model)

    config = json.loads((tmp_path / "a/adapter_config.json").read_text())
    held = [stored for stored in STORED if modules.split(", ")[-1] in stored]
    assert config["target_parameters"] == held
    assert all("q_proj" in name for name in config["target_modules"])
    tensors = load_file(tmp_path / "a/adapter_model.safetensors")
    outer = "base_model.model.model.layers.1.mlp.experts"
    for name, prefix in zip(held, (f"{outer}.base_layer", outer)[-len(held) :], strict=True):
        A, B = (tensors.pop(f"{prefix}.lora_{half}.weight") for half in "AB")
        delta = np.einsum("ore,eri->eio", B.reshape(len(B), 3, 4), A.reshape(4, 3, -1))
        path = name.removeprefix("model.")
        assert rel(named(merge_lora(model))[path], named(plain())[path] + 2 * delta) < 1e-6
    assert not any("experts" in name for name in tensors)


def write(model: HybridLM, directory: Path, **changes: Any) -> Path:
    save_lora(model, directory)
    file = directory / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    return directory


def test_files_of_peft(tmp_path: Path):
    """Ends of names, patterns for the names of weights, the scale of rank-stabilised LoRA."""
    ends = ["experts.down_proj", "mlp.experts.gate_up_proj"]
    changes = {"target_parameters": ends, "peft_version": "0.21.2", "use_rslora": True, "r": 5}
    changes |= {"rank_pattern": {".*proj": 3}, "alpha_pattern": {r"experts\.down_proj": 9.0}}
    model = load_lora(plain(), write(with_experts(), tmp_path / "a", **changes))
    experts: Any = model.layers[1].mlp
    experts = experts.experts
    assert isinstance(experts, LoRAExperts)
    scales = {name: a.alpha / a.rank for name, a in experts.adapters()}
    assert scales == pytest.approx({"gate_up_proj": 6 / 3**0.5, "down_proj": 9 / 3**0.5})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_parameters": "experts.down_proj"}, "target_parameters must be a list of names"),
        ({"target_parameters": ["mlp.weight"]}, "no such projection"),
        ({"target_parameters": list(STORED) + ["mlp.gate.weight"]}, "gate.weight.*no such experts"),
        ({"target_parameters": list(STORED[1:])}, "base_layer.lora_A.weight: no such projection"),
        ({"target_parameters": None}, "experts.lora_A.weight: no such projection"),
        ({"peft_version": "0.18.1"}, "peft_version must be at least 0.19.0 .* is '0.18.1'"),
        ({"peft_version": None}, "peft_version must be at least 0.19.0"),
        ({"r": 4}, "experts.down_proj: rank 3, but adapter_config.json says 4"),
    ],
)
def test_files_that_are_something_else(changes, message, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        load_lora(plain(), write(with_experts(), tmp_path / "a", **changes))


def test_tensors_that_do_not_fit(tmp_path: Path):
    directory = write(with_experts(), tmp_path / "a")
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.1.mlp.experts.lora_{}.weight"
    other = {**tensors, key.format("A"): tensors[key.format("A")][:, :10]}
    save_file(other, file, {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"experts.down_proj: lora_A \(12, 10\), lora_B \(32, 12\)"
    ):
        load_lora(plain(), directory)
    del other[key.format("A")]
    save_file(other, file, {"format": "pt"})
    with pytest.raises(ValueError, match="experts.down_proj: only one of lora_A and lora_B"):
        load_lora(plain(), directory)
    del other[key.format("B")]
    save_file(other, file, {"format": "pt"})
    with pytest.warns(UserWarning, match=f"lacks the adapters of {STORED[1]}"):
        load_lora(plain(), directory)
