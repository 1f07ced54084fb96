"""What is taken where nothing is said: a change of a default is a change of behaviour."""

from __future__ import annotations

import dataclasses
import inspect
import types
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import typer

import hmf_jax
from hmf_jax import composition, pallas_kernels, sampling, verify
from hmf_jax.cli import app
from hmf_jax.config import BMojoConfig, GDNConfig, GKAConfig, HybridConfig, Mamba2Config
from hmf_jax.engine import programs, settings
from hmf_jax.loading import from_pretrained, save_pretrained
from hmf_jax.memory import plan_engine, plan_memory
from hmf_jax.pallas_kernels.shapes import SHAPES
from hmf_jax.priming import (
    distillation_loss,
    prime,
    prime_directory,
    select_layers,
    selection,
)
from hmf_jax.priming.selection import score_directory, score_layers, swa_variant, write_swa_variants
from hmf_jax.priming.unfuse import unfuse_directory
from hmf_jax.training import RECIPES, Batches, Recipe, TrainState, flops, make_train_step
from hmf_jax.training.lora import apply_lora
from hmf_jax.training.loss import next_token_loss
from hmf_jax.training.schema import TrainConfig

MIXERS = {
    GKAConfig: {
        **dict.fromkeys(("use_alpha_connection", "use_v_conv", "use_forgetting_gate"), True),
        **dict.fromkeys(("use_forgetting_gate_kk", "use_beta_gate", "use_gate"), True),
        "gla_rescale": True,
        "bp_lambda": True,
        "num_iter": 30,
        "ridge_strength": 0.02,
        "conv_size": 4,
        "norm_eps": 1e-6,
        "kv_proj_rank": None,
        "kv_learnable_residual": False,
    },
    GDNConfig: {
        "use_gate": True,
        "use_short_conv": True,
        "allow_neg_eigval": False,
        "conv_size": 4,
        "conv_bias": False,
        "norm_eps": 1e-5,
        "kv_proj_rank": None,
        "kv_learnable_residual": False,
    },
    Mamba2Config: {"use_qk_norm": True, "use_pos_emb": False},
    BMojoConfig: {"window_size": 2048, "tie_attn_weights": True, "ssm_mixer": "M2"},
}
READING = {"prefill_chunk": 2048, "num_iter": None}
FUNCTIONS: dict[Callable[..., Any], dict[str, Any]] = {
    hmf_jax.generate: {**READING, "max_new_tokens": None, "logprobs": False, "slots": None},
    hmf_jax.stream: {**READING, "max_new_tokens": None, "tokens_per_dispatch": 8},
    hmf_jax.generate_text: {"max_new_tokens": None, "stop": (), "prefill_chunk": 2048},
    hmf_jax.ChatSession: {**READING, "max_new_tokens": None, "stop": (), "thinking": None},
    hmf_jax.compose: {
        **READING,
        "prefix": (),
        "kv": "concat",
        "ssm": "soup",
        "sequential": False,
        "impl": "auto",
    },
    hmf_jax.warmup: {"batch": 1, "slots": None, "prefill_chunk": 2048},
    hmf_jax.make_mesh: {"dp": 1, "fsdp": 1, "sp": 1, "tp": 1},
    hmf_jax.HybridLM.__call__: {"last_only": False, "num_iter": None, "impl": "auto"},
    hmf_jax.HybridLM.init: {"dtype": jnp.bfloat16, "seed": 0},
    from_pretrained: {"dtype": jnp.bfloat16, "num_iter": None, "mesh": None},
    save_pretrained: {"max_shard_size": "5GB", "overwrite": False, "source": None},
    plan_engine: {"fraction": 0.9, "most_slots": 64, "fill": True, "prefixes": True},
    plan_memory: {"fraction": 0.9, "prefill_chunk": 2048, "dtype": None, "mesh": None},
    prime: {"seed": 0, "dtype": None, "repeat": "rows"},
    prime_directory: {"dtype": jnp.bfloat16, "copy_auxiliary_files": True, "overwrite": False},
    unfuse_directory: {"output": None, "dtype": jnp.bfloat16, "overwrite": False},
    swa_variant: {"window": 2048},
    write_swa_variants: {"window": 2048, "layers": None},
    score_layers: {"window": 2048, "layers": None},
    score_directory: {"length": 8192, "rows": 16, "window": 2048, "dtype": jnp.bfloat16},
    select_layers: {"m": 14, "num_layers": None, "exclude_layer_0": False, "task_filter": None},
    selection.pattern: {"fused": True},
    distillation_loss: {"target": "none", "pre_lm_head": True, "weighted": False},
    next_token_loss: {"chunk_size": 512, "num_iter": None, "impl": "auto"},
    make_train_step: {
        "loss": None,
        "accumulate": 1,
        "remat": "none",
        "max_grad_norm": None,
        "num_iter": None,
        "chunk_size": 512,
    },
    TrainState.create: {"trainable": None, "master_weights": True},
    apply_lora: {"rank": 16, "alpha": 32.0, "modules": "proj", "quantize": None, "seed": 0},
    Batches: {
        "packing": "first_fit",
        "overlong": "cut",
        "on_bad": "skip",
        "padding_side": "right",
        "shuffle": True,
        "seed": 0,
        "epochs": None,
        "window": None,
    },
    pallas_kernels.gka: {
        "num_iter": 30,
        "ridge": 0.02,
        "scale": None,
        "decay_kk": True,
        "bp_lambda": True,
        "chunk_size": 64,
        "solver": "chebyshev",
    },
    pallas_kernels.gka_step: {"num_iter": 30, "ridge": 0.02, "scale": None, "decay_kk": True},
    pallas_kernels.gated_delta_rule: {"scale": None, "chunk_size": 64},
    pallas_kernels.ssd: {"chunk_size": 64},
    pallas_kernels.causal_conv1d: {"activation": "silu", "channels": "h"},
    pallas_kernels.attention: {"window": None, "scale": None},
    TrainConfig: {
        "dtype": "bfloat16",
        "master_weights": True,
        "lora_rank": None,
        "lora_alpha": 32.0,
        "lora_modules": "proj",
        "packing": "first_fit",
        "on_bad": "skip",
        "shuffle": True,
        "seed": 0,
        "remat": "auto",
        "chunk_size": 512,
        **{"dp": 1, "fsdp": None, "sp": 1, "tp": 1},
        "distributed": False,
        "save_every": 500,
        "keep": 2,
    },
    Recipe: {
        "warmup": 0,
        "trainable": None,
        "seq_len": 8192,
        "accumulate": 1,
        "max_grad_norm": 1.0,
        "betas": (0.9, 0.999),
        "eps": 1e-8,
        "weight_decay": 0.0,
        "overlong": "cut",
    },
}
COMMANDS: dict[str, dict[str, Any]] = {
    "generate": {"max_new_tokens": None, "seed": 0, "dtype": "bfloat16", "tp": 1},
    "chat": {"max_new_tokens": None, "seed": 0, "dtype": "bfloat16", "tp": 1, "thinking": None},
    "convert": {"max_shard_size": None, "overwrite": False, "to": None},
    "verify": {"dtype": "float32", "rtol": None},
    "train": {"dry_run": False},
    "demo": {"model": "gka", "seed": 0},
    "prime init": {"overwrite": False},
    "prime unfuse": {"dtype": "bfloat16", "overwrite": False},
    "prime select": {
        "m": 14,
        "exclude_layer_0": False,
        "kind": "GKA",
        **dict.fromkeys(("length", "rows", "window", "dtype")),  # those of `score_directory`
    },
}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__qualname__)
def test_functions(function: Callable[..., Any]) -> None:
    found = {name: p.default for name, p in inspect.signature(function).parameters.items()}
    assert {name: found[name] for name in FUNCTIONS[function]} == FUNCTIONS[function]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command: str) -> None:
    found: Any = typer.main.get_command(app)
    for name in command.split():
        found = found.commands[name]
    values = {p.name: getattr(p.default, "value", p.default) for p in found.params}
    assert {name: values[name] for name in COMMANDS[command]} == COMMANDS[command]


@pytest.mark.parametrize("kind", MIXERS, ids=lambda kind: kind.__name__)
def test_mixers(kind: type) -> None:
    """As the original's configs have them: absent keys of config.json mean these."""
    found = dataclasses.asdict(kind())
    assert {name: found[name] for name in MIXERS[kind]} == MIXERS[kind]


def test_sampling_is_greedy_and_unfiltered() -> None:
    expected = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0}
    found = dataclasses.asdict(sampling.SamplingParams())
    assert expected | {"repetition_penalty": 1.0} == {
        name: found[name] for name in (*expected, "repetition_penalty")
    }


def test_recipes_are_those_of_the_released_models() -> None:
    rows = {
        name: (r.learning_rate, r.schedule, r.warmup, r.trainable, r.seq_len, r.accumulate)
        for name, r in RECIPES.items()
    }
    assert rows == {
        "distill": (1e-4, "constant", 720, "gka", 8192, 4),
        "long_context": (5e-5, "cosine", 209, "gka,norm,self_attn", 131072, 2),
        "instruct": (5e-5, "linear", 0.03, None, 32768, 1),
        "reasoning": (5e-5, "cosine", 0.1, None, 32768, 1),
    }
    lengths = {name: (r.steps, r.epochs, r.overlong) for name, r in RECIPES.items()}
    assert lengths == {
        "distill": (19000, None, "cut"),
        "long_context": (4480, None, "cut"),
        "instruct": (None, 2, "cut"),
        "reasoning": (None, 1, "skip"),
    }
    for recipe in RECIPES.values():
        assert (recipe.betas, recipe.eps, recipe.weight_decay) == ((0.9, 0.999), 1e-8, 0.0)
        assert recipe.max_grad_norm == 1.0


@pytest.mark.parametrize("name", ["8b", "32b"])
def test_operators_are_measured_on_the_shapes_of_the_models(name: str) -> None:
    config, shape = HybridConfig.preset(name, mixer="BMF"), SHAPES[name.upper()]
    assert (shape.heads, shape.kv_heads, shape.head_dim) == (
        config.num_attention_heads,
        config.num_key_value_heads,
        config.head_dim,
    )
    assert config.bmojo is not None and shape.window == config.bmojo.window_size == 2048


def test_the_part_of_one_device() -> None:
    shape = SHAPES["8B"]
    for tp, heads, kv_heads in ((1, 32, 8), (4, 8, 2), (8, 4, 1), (16, 2, 1), (32, 1, 1)):
        assert shape.per_device(tp) == dataclasses.replace(shape, heads=heads, kv_heads=kv_heads)
    for tp in (3, 24, 64):
        with pytest.raises(ValueError, match=f"tp={tp} does not fit 32 heads and 8 key/value"):
            shape.per_device(tp)


def test_tolerances_of_verify() -> None:
    assert (verify.RTOL, verify.LOSS_RTOL, verify.BF16_FACTOR) == (1e-4, 1e-5, 1.25)


@pytest.mark.parametrize(
    ("device", "teraflops"),
    [
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H200", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("cpu", None),
    ],
)
def test_peak_flops(device: str, teraflops: int | None, monkeypatch) -> None:
    monkeypatch.setattr(jax, "devices", lambda: [types.SimpleNamespace(device_kind=device)])
    assert flops.peak_flops() == (None if teraflops is None else teraflops * 1e12)


def test_sizes_of_programs() -> None:
    """Lengths and capacities are rounded up to these, so that few programs serve all prompts."""
    lengths = (0, 1, 2, 3, 64, 65, 127, 128, 129, 2048)
    found = [programs.power_of_two(n, programs.SMALLEST_CHUNK) for n in lengths]
    assert found == [64, 64, 64, 64, 64, 128, 128, 128, 256, 2048]
    assert [programs.power_of_two(n) for n in (0, 1, 2, 3, 5, 8, 9)] == [1, 1, 2, 4, 8, 8, 16]
    assert (programs.SMALLEST_CHUNK, programs.SMALLEST_CAPACITY) == (64, 256)
    assert (programs.MOST_STEPS, settings.END_IDS, composition.ROOM) == (64, 16, 512)


def test_public_names() -> None:
    """Nothing that was promised has gone."""
    names = """ChatSession HybridConfig HybridLM ModelState PackedModel SamplingParams compose
    enable_compilation_cache from_pretrained generate generate_text make_mesh save_orbax
    save_pretrained stream stream_text warmup"""
    assert set(names.split()) <= set(hmf_jax.__all__)
