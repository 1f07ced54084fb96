"""Base families: base models come back as they were read; a new family is one row of data."""

from __future__ import annotations

import dataclasses
import json

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from safetensors.numpy import load_file

from hmf_jax.config import HybridConfig, SWAConfig
from hmf_jax.convert.safetensors_io import SINGLE
from hmf_jax.families import FAMILIES, Family
from hmf_jax.loading import from_pretrained, save_orbax, save_pretrained
from hmf_jax.model import HybridLM
from hmf_jax.parameters import flat_params
from hmf_jax.priming import prime, swa_variant, unfuse
from hmf_jax.training import TrainState, make_train_step
from tests.util import random_model

SHAPE = {
    "model_type": "qwen3",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 3,
    "vocab_size": 64,
    "max_position_embeddings": 512,
}
# As published before and since transformers 5.
OLD = {
    **SHAPE,
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "max_window_layers": 36,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.0",
    "use_cache": False,
    "use_sliding_window": False,
}
NEW = {
    **SHAPE,
    "architectures": ["Qwen3ForCausalLM"],
    "attention_bias": True,
    "attention_dropout": 0.1,
    "dtype": "bfloat16",
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    "max_window_layers": 1,
    "rope_parameters": {"rope_theta": 5e6, "rope_type": "yarn", "factor": 2.0},
    "sliding_window": 7,
    "use_sliding_window": True,
}
WINDOWS = {**OLD, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
YARN = {**OLD, "rope_scaling": {"type": "yarn", "factor": 4.0}}
STOCK = {"bare": SHAPE, "old": OLD, "new": NEW, "windows": WINDOWS, "yarn": YARN}


def written(directory) -> dict:
    return json.loads((directory / "config.json").read_text())


@pytest.mark.parametrize("name", STOCK)
def test_a_base_model_comes_back_as_it_was_read(name, tmp_path):
    """Every key and every tensor, and nothing that another library does not know."""
    read = STOCK[name]
    save_pretrained(HybridLM.init(HybridConfig.from_dict(read)), tmp_path / "a", progress=False)
    config = written(tmp_path / "a")
    assert {key: config[key] for key in read} == read
    assert config["model_type"] == "qwen3" and config["architectures"] == ["Qwen3ForCausalLM"]
    assert not {"hybrid_override_pattern", "swa_config"} & config.keys()
    stored = load_file(tmp_path / "a" / SINGLE)
    assert all(".self_attn." in n for n in stored if n.endswith("q_proj.weight"))

    save_pretrained(from_pretrained(tmp_path / "a", progress=False), tmp_path / "b", progress=False)
    assert written(tmp_path / "b") == config
    assert (tmp_path / "a" / SINGLE).read_bytes() == (tmp_path / "b" / SINGLE).read_bytes()
    save_orbax(from_pretrained(tmp_path / "a", progress=False), tmp_path / "c")
    assert written(tmp_path / "c") == config


@pytest.mark.parametrize("name", STOCK)
def test_transformers_reads_it_alike(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    config = HybridConfig.from_dict(STOCK[name])
    found = []
    for directory, data in (("read", STOCK[name]), ("written", config.to_dict())):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "config.json").write_text(json.dumps(data))
        found.append(transformers.AutoConfig.from_pretrained(tmp_path / directory))
    before, after = found
    assert type(after).__name__ == "Qwen3Config"
    for key in ("layer_types", "sliding_window", "head_dim", "num_key_value_heads"):
        assert getattr(before, key) == getattr(after, key), key
    assert before.rope_parameters == after.rope_parameters or name == "yarn"  # spelled out there
    assert after.rope_parameters["rope_theta"] == config.rope.theta


@pytest.mark.parametrize("read", [OLD, NEW, WINDOWS, YARN])
def test_changes_are_written_in_place_of_what_was_read(read):
    config = HybridConfig.from_dict(read)
    new = config.override({"rope_theta": 3e6, "max_position_embeddings": 1024, "use_cache": True})
    again = new.to_dict()
    back = HybridConfig.from_dict(again)
    assert (back.rope, back.layer_kinds, back.is_stock) == (new.rope, new.layer_kinds, True)
    assert (again["max_position_embeddings"], again["use_cache"]) == (1024, True)
    assert not {"rope_theta", "rope_scaling"} & again.keys()
    other = {"rope_parameters", "rope_theta", "rope_scaling", "max_position_embeddings"}
    untouched = [key for key in read if key not in other | {"use_cache"}]
    assert {key: again[key] for key in untouched} == {key: read[key] for key in untouched}
    edited = HybridConfig.from_dict({**read, "max_position_embeddings": 1024})
    assert new.rope == dataclasses.replace(edited.rope, theta=3e6)
    assert new.layer_kinds == config.layer_kinds and new.is_stock


def test_what_was_implied_does_not_change_with_what_implied_it():
    """Without a word on it, yarn's original context is max_position_embeddings."""
    config = HybridConfig.from_dict(YARN)
    longer = dataclasses.replace(config, max_position_embeddings=2048)
    assert HybridConfig.from_dict(longer.to_dict()).rope == config.rope


def test_windows_of_a_base_model():
    config = HybridConfig.from_dict(WINDOWS)
    assert config.layer_kinds == ("*", "SWA", "SWA")
    wider = dataclasses.replace(config, swa=SWAConfig(9)).to_dict()
    assert wider["sliding_window"] == 9 and "swa_config" not in wider
    fewer = dataclasses.replace(config, layer_kinds=("*", "*", "SWA")).to_dict()
    assert fewer["layer_types"] == ["full_attention", "full_attention", "sliding_attention"]
    assert HybridConfig.from_dict(fewer).layer_kinds == ("*", "*", "SWA")


def test_what_is_made_of_a_base_model_is_a_hybrid():
    base = random_model(HybridConfig.from_dict(WINDOWS), jnp.float32)
    assert base.config.is_stock and not HybridConfig.preset("tiny", mixer="*").is_stock
    kept, fused = prime(base, "*-SWA-SWA"), prime(base, "GKA*-SWA-SWA")
    variant = swa_variant(base, 0, window=7)
    for model in (kept, fused, unfuse(fused), variant):
        data = model.config.to_dict()
        assert data["model_type"] == "hybrid_qwen3"
        assert data["hybrid_override_pattern"] == "-".join(model.config.layer_kinds)
        assert data["swa_config"] == {"window_size": 7} and data["use_sliding_window"] is False
    replaced = dataclasses.replace(base.config, layer_kinds=("*", "GKA", "SWA"))
    assert replaced.to_dict()["model_type"] == "hybrid_qwen3"


# A new family: no norms of queries and keys, biases where Qwen3 has none, keys of its own.
TOY = Family(
    name="toy",
    hybrid="hybrid_toy",
    stock=("toy",),
    architectures=("HybridToyForCausalLM", "ToyForCausalLM"),
    num_hidden_layers=2,
    defaults={"rms_norm_eps": 1e-5, "head_dim": None},
    options={"qk_norm": False, "qkv_bias": True},
    keys={"o_bias": "out_bias", "mlp_bias": "mlp_bias"},
)
TOY_MODEL = {
    "model_type": "toy",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "max_position_embeddings": 512,
    "mlp_bias": True,
}


@pytest.fixture
def toy(monkeypatch) -> HybridConfig:
    monkeypatch.setitem(FAMILIES, "toy", TOY)  # the one row
    return HybridConfig.from_dict(TOY_MODEL)


def test_toy_config(toy):
    assert toy.family == "toy" and toy.layer_kinds == ("*", "*")
    assert (toy.head_dim, toy.rms_norm_eps, toy.num_key_value_heads) == (8, 1e-5, 2)
    assert (toy.qk_norm, toy.qkv_bias, toy.o_bias, toy.mlp_bias) == (False, True, False, True)
    data = toy.to_dict()
    assert {key: data[key] for key in TOY_MODEL} == TOY_MODEL and data["out_bias"] is False
    assert HybridConfig.from_dict({**TOY_MODEL, "out_bias": True}).o_bias
    hybrid = dataclasses.replace(toy, layer_kinds=("*", "M2"))
    data = hybrid.to_dict()
    assert (data["model_type"], data["architectures"]) == ("hybrid_toy", ["HybridToyForCausalLM"])
    assert HybridConfig.from_dict(data).layer_kinds == ("*", "M2")
    by_name = {k: v for k, v in data.items() if k != "model_type"}
    assert HybridConfig.from_dict(by_name).family == "toy"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"qk_norm": True}, "qk_norm=True cannot be written for the family 'toy'"),
        ({"family": "qwen3"}, "qk_norm=False cannot be written for the family 'qwen3'"),
        ({"family": "qwen3", "qk_norm": True}, "o_bias=False .* attention_bias is True"),
        ({"family": "qwen3", "qk_norm": True, "qkv_bias": False}, "mlp_bias=True"),
    ],
)
def test_options_that_a_family_does_not_have(toy, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(toy, **changes).to_dict()


def test_toy_weights(toy, tmp_path):
    model = random_model(toy, jnp.float32)
    save_pretrained(model, tmp_path / "toy", progress=False)
    names = {n.removeprefix("model.layers.0.") for n in load_file(tmp_path / "toy" / SINGLE)}
    assert {"self_attn.q_proj.bias", "mlp.down_proj.bias"} <= names
    assert not {"self_attn.o_proj.bias", "self_attn.q_norm.weight"} & names
    again = from_pretrained(tmp_path / "toy", dtype=jnp.float32, progress=False)
    for path, x in flat_params(model).items():
        np.testing.assert_array_equal(flat_params(again)[path], x, err_msg=path)
    hybrid = prime(tmp_path / "toy", "GKA-M2", progress=False)  # needs no norms to start from
    assert hybrid.config.to_dict()["model_type"] == "hybrid_toy"
    assert not any("B_norm" in path for path in flat_params(hybrid))


def test_toy_queries_and_keys_are_rotated(toy):
    """Without rotation one layer of attention does not see the order of the tokens before."""
    model = random_model(dataclasses.replace(toy, layer_kinds=("*",)), jnp.float32)
    logits = model(jnp.asarray([[3, 4, 5, 6], [4, 3, 5, 6]]))[0][:, -1]
    assert abs(logits[0] - logits[1]).max() > 1e-3


def test_toy_generation_and_training(toy):
    model = random_model(toy, jnp.float32)
    (one,) = model.generate([[5, 9, 7]], max_new_tokens=2)
    first = int(model(jnp.asarray([[5, 9, 7]]))[0][0, -1].argmax())
    assert one.tokens[0] == first and len(one.tokens) == 2
    optimizer = optax.adam(1e-2)
    state, step, losses = TrainState.create(model, optimizer), make_train_step(optimizer), []
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 64, (2, 11)), jnp.int32)
    for _ in range(6):
        state, metrics = step(state, {"tokens": tokens})
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0]
