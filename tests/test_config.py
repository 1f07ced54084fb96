"""config.json in every form the original writes or tolerates, and clear errors for all others."""

from __future__ import annotations

import dataclasses
import json
import random
import warnings

import numpy as np
import pytest

from hmf_jax.config import (
    KNOWN_MODEL_TYPES,
    SUPPORTED_MODEL_TYPES,
    BMojoConfig,
    GKAConfig,
    HybridConfig,
    Mamba2Config,
    RopeConfig,
    SWAConfig,
    streams,
)
from hmf_jax.families import REFUSED

# A config as the original saves it: every default spelled out, geometry inside the mixer dicts.
ORIGINAL = {
    "architectures": ["HybridQwen3ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bmojo_config": {
        "head_dim": 64,
        "hidden_size": 128,
        "num_heads": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "ssm_mixer": "gka",
        "tie_attn_weights": False,
        "window_size": 8,
    },
    "bos_token_id": None,
    "dtype": "bfloat16",
    "eos_token_id": None,
    "gdn_config": {
        "allow_neg_eigval": True,
        "conv_bias": True,
        "conv_size": 3,
        "head_dim": 64,
        "hidden_size": 128,
        "kv_learnable_residual": False,
        "kv_proj_rank": None,
        "norm_eps": 1e-05,
        "num_k_heads": 2,
        "num_q_heads": 4,
        "num_v_heads": 2,
        "use_gate": False,
        "use_short_conv": True,
    },
    "gka_config": {
        "bp_lambda": True,
        "chunk_size": 64,
        "conv_size": 4,
        "gla_rescale": True,
        "head_dim": 64,
        "hidden_size": 128,
        "kv_learnable_residual": True,
        "kv_proj_rank": 8,
        "norm_eps": 1e-06,
        "num_iter": 5,
        "num_k_heads": 2,
        "num_q_heads": 4,
        "num_v_heads": 2,
        "ridge_strength": 0.05,
        "solver_type": "chebyshev",
        "use_alpha_connection": True,
        "use_beta_gate": True,
        "use_forgetting_gate": True,
        "use_forgetting_gate_kk": False,
        "use_gate": True,
        "use_v_conv": True,
    },
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 128,
    "hybrid_override_pattern": "*-GKA-GDN-M2-BMF-SWA",
    "initializer_range": 0.02,
    "intermediate_size": 256,
    "layer_types": ["*", "GKA", "GDN", "M2", "BMF", "SWA"],
    "mamba2_config": {
        "d_inner": 256,
        "d_model": 128,
        "d_xb": 128,
        "hidden_act": "silu",
        "intermediate_size": 256,
        "n_layer": 6,
        "rms_norm_eps": 1e-06,
        "ssm_cfg": {"d_state": 64, "expand": 1, "ngroups": 4},
        "use_pos_emb": False,
        "use_qk_norm": False,
    },
    "max_position_embeddings": 1024,
    "max_window_layers": 28,
    "model_type": "hybrid_qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 5000000.0, "rope_type": "default"},
    "sliding_window": None,
    "swa_config": {"window_size": 16},
    "tie_word_embeddings": False,
    "transformers_version": "5.3.0",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": 512,
}

STOCK = {
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 64,
    "hidden_size": 128,
    "intermediate_size": 256,
    "max_window_layers": 2,
    "model_type": "qwen3",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "sliding_window": None,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 512,
}


def original(**changes) -> dict:
    data = json.loads(json.dumps(ORIGINAL))
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(data.get(key), dict):
            data[key].update(value)
        else:
            data[key] = value
    return data


def without(data: dict, *keys: str) -> dict:
    return {k: v for k, v in data.items() if k not in keys}


def test_an_original_config_is_understood_and_written_back_verbatim():
    config = HybridConfig.from_dict(ORIGINAL)
    assert config.layer_kinds == ("*", "GKA", "GDN", "M2", "BMF", "SWA")
    assert config.num_hidden_layers == 6
    assert config.rope == RopeConfig(theta=5e6)
    assert config.gka is not None and config.gka.num_iter == 5 and config.gka.kv_proj_rank == 8
    assert config.gka.ridge_strength == 0.05 and not config.gka.use_forgetting_gate_kk
    assert config.gdn is not None and config.gdn.allow_neg_eigval and not config.gdn.use_gate
    assert config.mamba2 == Mamba2Config(use_qk_norm=False, use_pos_emb=False)
    assert config.bmojo == BMojoConfig(8, tie_attn_weights=False, ssm_mixer="GKA")
    assert config.swa == SWAConfig(16)
    assert config.to_dict() == ORIGINAL
    assert hash(config) == hash(HybridConfig.from_dict(original()))


def test_geometry_in_mixer_dicts_is_optional():
    data = original()
    for key in ("gka_config", "gdn_config", "mamba2_config", "bmojo_config"):
        names = ("head_dim", "hidden_size", "num_", "d_", "ssm_cfg", "n_layer", "rms_norm_eps")
        data[key] = {
            k: v for k, v in data[key].items() if not k.startswith(names) or k == "num_iter"
        }
    assert HybridConfig.from_dict(data) == HybridConfig.from_dict(ORIGINAL)


@pytest.mark.parametrize(
    "change",
    [
        {"gka_config": {"num_q_heads": 8}},
        {"gka_config": {"num_k_heads": 4}},
        {"gdn_config": {"head_dim": 128}},
        {"mamba2_config": {"d_xb": 256}},
        {"mamba2_config": {"ssm_cfg": {"ngroups": 2}}},
        {"bmojo_config": {"num_key_value_heads": 4}},
    ],
)
def test_geometry_that_contradicts_the_top_level(change):
    ((section, fields),) = change.items()
    with pytest.raises(ValueError, match=rf"{section}\.{next(iter(fields))} is .* correct one"):
        HybridConfig.from_dict(original(**change))


def test_mixer_defaults():
    bare = without(original(), "gka_config", "gdn_config", "mamba2_config")
    bare["bmojo_config"] = {}
    config = HybridConfig.from_dict(bare)
    assert config.gka == GKAConfig(num_iter=30)
    assert config.gdn is not None and config.gdn.norm_eps == 1e-5
    assert config.mamba2 == Mamba2Config(use_qk_norm=True, use_pos_emb=False)
    assert config.bmojo == BMojoConfig(2048, True, "M2")


def test_gka_overrides_are_merged_and_the_input_is_left_alone():
    data = original(gka_overrides={"num_iter": 10, "ridge_strength": 0.1})
    before = json.dumps(data)
    gka = HybridConfig.from_dict(data).gka
    assert gka is not None and (gka.num_iter, gka.ridge_strength, gka.kv_proj_rank) == (10, 0.1, 8)
    assert json.dumps(data) == before
    alone = without(original(gka_overrides={"num_iter": 0}), "gka_config")
    assert HybridConfig.from_dict(alone).gka == GKAConfig(num_iter=0)


@pytest.mark.parametrize(
    ("alias", "kind"),
    [
        ("mamba2", "M2"),
        ("Mamba2", "M2"),
        ("gdn", "GDN"),
        ("GATED_DELTANET", "GDN"),
        ("gka", "GKA"),
        ("Gated_KalmaNet", "GKA"),
        ("parallel_latent_sketch", "GKA"),
    ],
)
def test_inner_mixer_aliases(alias, kind):
    config = HybridConfig.from_dict(original(bmojo_config={"ssm_mixer": alias}))
    assert config.bmojo is not None and config.bmojo.ssm_mixer == kind
    assert HybridConfig.from_dict(config.to_dict()) == config


def test_unknown_inner_mixer():
    with pytest.raises(ValueError, match="ssm_mixer 'rwkv' is unknown; use one of"):
        HybridConfig.from_dict(original(bmojo_config={"ssm_mixer": "rwkv"}))


@pytest.mark.parametrize("name", ["use_pos_emb", "use_pos_embed", "use_rotary_emb"])
def test_every_name_of_mamba2_rope(name):
    data = original()
    del data["mamba2_config"]["use_pos_emb"]
    data["mamba2_config"][name] = True
    config = HybridConfig.from_dict(data)
    assert config.mamba2 is not None and config.mamba2.use_pos_emb
    written = config.to_dict()["mamba2_config"]
    assert written["use_pos_emb"] and written["use_pos_embed"] and written["use_rotary_emb"]
    with pytest.raises(ValueError, match="contradicts itself"):
        HybridConfig.from_dict(original(mamba2_config={"use_rotary_emb": True}))


@pytest.mark.parametrize(
    ("keys", "theta"),
    [
        ({"rope_parameters": {"rope_theta": 7.0}, "rope_theta": 3.0}, 7.0),
        ({"rope_parameters": {"rope_type": "default"}, "rope_theta": 3.0}, 3.0),
        ({"rope_theta": 3}, 3.0),
        ({"rope_parameters": {"rope_type": "default"}}, 10000.0),
        ({}, 10000.0),
        # A legacy rope_scaling replaces rope_parameters as a whole.
        ({"rope_parameters": {"rope_theta": 7.0}, "rope_scaling": {"type": "default"}}, 10000.0),
        (
            {
                "rope_parameters": {"rope_theta": 7.0},
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
                "rope_theta": 3.0,
            },
            3.0,
        ),
    ],
)
def test_rope_base_is_resolved_in_the_order_of_transformers(keys, theta):
    data = {**without(original(), "rope_parameters"), **keys}
    assert HybridConfig.from_dict(data).rope.theta == theta


def test_rope_scaling_in_old_and_new_form():
    yarn = {"factor": 4.0, "original_max_position_embeddings": 256, "attention_factor": 1.1}
    new = original(rope_parameters={"rope_type": "yarn", **yarn})
    old = without(original(rope_scaling={"type": "yarn", **yarn}), "rope_parameters")
    old["rope_theta"] = 5e6
    expected = RopeConfig(5e6, "yarn", 4.0, 256, 1.1)
    assert HybridConfig.from_dict(new).rope == expected == HybridConfig.from_dict(old).rope
    again = HybridConfig.from_dict(new).to_dict()["rope_parameters"]
    assert again == {"rope_theta": 5e6, "rope_type": "yarn", **yarn}
    implied = original(rope_parameters={"rope_type": "yarn", "factor": 4.0})
    assert HybridConfig.from_dict(implied).rope.original_max_position_embeddings == 1024


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"rope_type": "llama3", "factor": 8.0}, "needs rope_parameters.low_freq_factor"),
        ({"rope_type": "linear"}, "factor >= 1"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor 0.25"),
        ({"full_attention": {"rope_theta": 1.0}}, "of one layer type"),
    ],
)
def test_unsupported_rope(parameters, message):
    with pytest.raises(ValueError, match=message):
        HybridConfig.from_dict(original(rope_parameters=parameters))


def test_override_treats_both_names_of_the_rope_base_alike():
    config = HybridConfig.from_dict(ORIGINAL)
    one = config.override({"rope_theta": 3e6, "max_position_embeddings": 4096})
    two = config.override({"rope_parameters.rope_theta": 3e6, "max_position_embeddings": 4096})
    assert one == two and one.rope.theta == 3e6 and one.max_position_embeddings == 4096
    assert config.override({}) == config
    three = config.override({"gka_config.num_iter": 7}).gka
    assert three is not None and three.num_iter == 7


def test_stock_qwen3():
    config = HybridConfig.from_dict(STOCK)
    assert config.layer_kinds == ("*",) * 4 and config.swa is None
    assert config.rope.theta == 1e6 and config.tie_word_embeddings
    written = config.to_dict()
    assert {key: written[key] for key in STOCK} == STOCK  # it comes back as it was read
    assert written["layer_types"] == ["full_attention"] * 4
    again = HybridConfig.from_dict(written)
    assert dataclasses.replace(again, stock=config.stock, extra=config.extra) == config


def test_stock_qwen3_with_sliding_layers():
    by_index = {**STOCK, "use_sliding_window": True, "sliding_window": 32}
    by_name = {**by_index, "layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 2}
    for data in (by_index, by_name):
        config = HybridConfig.from_dict(data)
        assert config.layer_kinds == ("*", "*", "SWA", "SWA") and config.swa == SWAConfig(32)
        assert HybridConfig.from_dict(config.to_dict()).layer_kinds == config.layer_kinds
    with pytest.raises(ValueError, match="set use_sliding_window to true"):
        HybridConfig.from_dict({**by_name, "use_sliding_window": False})


def test_missing_kv_heads_means_no_grouping():
    data = without(STOCK, "num_key_value_heads")
    assert HybridConfig.from_dict(data).num_key_value_heads == 4


@pytest.mark.parametrize("model_type", [*KNOWN_MODEL_TYPES, "gpt2"])
def test_other_model_types(model_type):
    with pytest.raises(ValueError, match="not supported") as error:
        HybridConfig.from_dict(original(model_type=model_type))
    assert all(name in str(error.value) for name in SUPPORTED_MODEL_TYPES)
    assert (f"not supported ({REFUSED.get(model_type)})" in str(error.value)) == (
        model_type in KNOWN_MODEL_TYPES
    )


@pytest.mark.parametrize(
    ("symbol", "kind", "teacher"),
    [("*DA", "*", None), ("GKA*", "GKA", "*"), ("SWA*", "SWA", "*"), ("GDN>GKA", "GKA", "GDN")],
)
def test_fused_symbols(symbol, kind, teacher):
    pattern = f"{symbol}-GKA-GDN-M2-BMF-SWA"
    config = HybridConfig.from_dict(original(hybrid_override_pattern=pattern))
    assert streams(symbol) == (kind, teacher) and config.fused
    assert config.student_kinds == (kind, "GKA", "GDN", "M2", "BMF", "SWA")
    data = config.to_dict()
    assert data["hybrid_override_pattern"] == pattern and data["layer_types"][0] == symbol
    assert HybridConfig.from_dict(data) == config
    assert not HybridConfig(layer_kinds=config.student_kinds, swa=config.swa).fused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"hybrid_override_pattern": "*-GKA-XYZ-M2-BMF-SWA"},
            "hybrid_override_pattern: layer 2 has the unknown symbol 'XYZ'",
        ),
        ({"hybrid_override_pattern": "*-GKA-"}, "layer 2 has the unknown symbol ''"),
        ({"hybrid_override_pattern": "*-GKA"}, "2 symbols but num_hidden_layers is 6"),
        ({"hybrid_override_pattern": 7}, "must be a string"),
        ({"hybrid_override_pattern": None, "layer_types": None}, "pattern is missing"),
        ({"swa_config": None}, "set swa_config.window_size"),
        ({"swa_config": {"window_size": 0}}, "swa_config.window_size must be an integer >= 1"),
        ({"gka_config": {"num_iter": -1}}, r"num_iter must be an integer >= 0, got -1"),
        ({"gka_overrides": {"num_iter": 2.5}}, r"num_iter must be an integer >= 0, got 2.5"),
        ({"gka_config": {"solver_type": "cg"}}, "solver_type 'cg' is unknown"),
        ({"gka_config": {"kv_proj_rank": 0}}, "kv_proj_rank must be an integer >= 1"),
        ({"gka_config": [1]}, "gka_config must be a JSON object"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 must be a multiple of"),
        ({"head_dim": 63}, "head_dim must be even"),
        ({"hidden_size": "128"}, "hidden_size must be an integer"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"quantization_config": {"quant_method": "fp8"}}, "dequantize"),
        ({"linear_num_key_heads": 2}, "linear_num_key_heads .* family qwen3"),
    ],
)
def test_bad_configs_say_what_is_wrong(changes, message):
    with pytest.raises(ValueError, match=message):
        HybridConfig.from_dict(original(**changes))


def test_an_empty_swa_config_is_fine_without_swa_layers():
    data = original(hybrid_override_pattern="*-GKA-GDN-M2-BMF-*")
    data["swa_config"] = {}
    assert HybridConfig.from_dict(data).swa is None


def test_unknown_keys_are_kept():
    data = original(my_note={"a": [1]}, gka_config={"cache_aprods": True})
    with pytest.warns(UserWarning, match="unknown keys that have no effect: 'my_note'"):
        assert HybridConfig.from_dict(data).to_dict() == data
    data = original(gka_config={"num_iters": 3})
    with pytest.warns(UserWarning, match="gka_config: unknown keys .* no effect: 'num_iters'"):
        config = HybridConfig.from_dict(data)
    assert config.to_dict() == data


def test_several_end_tokens():
    config = HybridConfig.from_dict(original(eos_token_id=[7, 9], pad_token_id=0))
    assert config.eos_token_id == (7, 9) and config.pad_token_id == 0
    assert config.to_dict()["eos_token_id"] == [7, 9]


def test_reading_files(tmp_path):
    with pytest.raises(FileNotFoundError, match="config.json does not exist; pass a Hugging Face"):
        HybridConfig.from_json(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(ORIGINAL))
    assert HybridConfig.from_json(tmp_path) == HybridConfig.from_json(file)
    file.write_text("{")
    with pytest.raises(ValueError, match="not valid JSON"):
        HybridConfig.from_json(tmp_path)
    file.write_text("[]")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        HybridConfig.from_json(tmp_path)
    file.write_text(json.dumps(original(vocab_size=0)))
    with pytest.raises(ValueError, match=r"config\.json: vocab_size must be an integer"):
        HybridConfig.from_json(tmp_path)


@pytest.mark.parametrize("mixer", ["*", "GKA", "GDN", "M2", "BMF", "SWA"])
def test_presets_have_the_released_shapes(mixer):
    small, large = (HybridConfig.preset(n, mixer=mixer) for n in ("8b", "32b"))
    assert (small.num_hidden_layers, large.num_hidden_layers) == (36, 64)
    assert (small.hidden_size, large.hidden_size) == (4096, 5120)
    assert (small.num_attention_heads, large.num_attention_heads) == (32, 64)
    assert small.rope.theta == 5e6 and small.max_position_embeddings == 131072
    if mixer != "*":
        assert small.layer_kinds.count(mixer) == 18 and large.layer_kinds.count(mixer) == 32
        assert small.layer_kinds[0] == "*" and small.layer_kinds[1] == mixer
    for config in (small, large):
        assert HybridConfig.from_dict(config.to_dict()).layer_kinds == config.layer_kinds


def test_preset_options():
    tiny = HybridConfig.preset("tiny")
    assert set(tiny.layer_kinds) == {"*", "SWA", "GKA", "GDN", "M2", "BMF"}
    pair = HybridConfig.preset("tiny", mixer=("GKA", "M2"), vocab_size=64)
    assert pair.layer_kinds == ("*", "GKA", "*", "M2") and pair.vocab_size == 64
    custom = HybridConfig.preset("tiny", layer_kinds=("SWA", "BMF"), gka=GKAConfig(num_iter=3))
    assert custom.swa == SWAConfig(16) and custom.gka == GKAConfig(num_iter=3)
    with pytest.raises(ValueError, match="unknown preset '7b'; choose one of tiny, 8b, 32b"):
        HybridConfig.preset("7b")
    with pytest.raises(ValueError, match="unknown symbol 'LSTM'"):
        HybridConfig.preset("8b", mixer="LSTM")


# Overrides

NEW_ROPE = {"rope_parameters": {"rope_theta": 1e6, "rope_type": "default"}}
SCALED = {"rope_theta": 1e6, "rope_scaling": {"type": "linear", "factor": 2.0}}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
LINEAR = RopeConfig(1e6, "linear", 2.0)


def stock(**changes) -> dict:
    return {**without(STOCK, "rope_theta", "rope_scaling"), **changes}


@pytest.mark.parametrize("read", [{"rope_theta": 1000000}, NEW_ROPE, SCALED], ids=str)
@pytest.mark.parametrize(
    ("changes", "rope"),
    [
        ({"rope_scaling": YARN}, RopeConfig(1e6, "yarn", 4.0, 256)),
        ({"rope_parameters": YARN}, RopeConfig(1e6, "yarn", 4.0, 256)),
        ({"rope_scaling": {**YARN, "rope_theta": 7.0}}, RopeConfig(7.0, "yarn", 4.0, 256)),
        ({"rope_scaling": YARN, "rope_theta": 7.0}, RopeConfig(7.0, "yarn", 4.0, 256)),
        ({"rope_parameters": YARN, "rope_theta": 7.0}, RopeConfig(7.0, "yarn", 4.0, 256)),
        ({"rope_scaling": None}, RopeConfig(1e6)),
        ({"rope_parameters": {}}, RopeConfig(1e6)),
        ({"rope_scaling.type": "linear", "rope_scaling.factor": 2.0}, LINEAR),
        ({"rope_parameters.rope_type": "linear", "rope_scaling.factor": 2.0}, LINEAR),
    ],
    ids=str,
)
def test_override_knows_every_name_of_rope(read, changes, rope):
    """Whatever the file and the change call it; and it is written under one name only."""
    config = HybridConfig.from_dict(stock(**read)).override(changes)
    assert config.rope == rope
    written = config.to_dict()
    assert HybridConfig.from_dict(written).rope == rope
    assert not {"rope_theta", "rope_scaling"} & written.keys()
    hybrid = dataclasses.replace(HybridConfig.from_dict(stock(**read)), layer_kinds=("*", "M2"))
    assert hybrid.override(changes).rope == rope


@pytest.mark.parametrize("name", ["rope_theta", "rope_parameters.rope_theta"])
@pytest.mark.parametrize("read", [{}, {"rope_theta": 1e6}, NEW_ROPE, SCALED], ids=str)
def test_override_of_the_base_keeps_the_scaling(read, name):
    before = HybridConfig.from_dict(stock(**read)).rope
    after = HybridConfig.from_dict(stock(**read)).override({name: 3e6}).rope
    assert after == dataclasses.replace(before, theta=3e6)


@pytest.mark.parametrize(
    "changes",
    [
        {"num_attention_heads": 8},  # the key/value heads that are not given follow
        {"hidden_size": 512},
        {"head_dim": 32},
        {"num_hidden_layers": 2},
        {"layer_types": ["full_attention", "sliding_attention"] * 2, "use_sliding_window": True},
        {"use_sliding_window": True, "max_window_layers": 3},
        {"hybrid_override_pattern": "*-GKA-*-GKA", "gka_config": {"num_iter": 3}},
        {"max_position_embeddings": 4096},  # what yarn takes as the original context follows
        {"eos_token_id": [3, 4], "tie_word_embeddings": False},
        {"rms_norm_eps": 1e-5, "initializer_range": 0.1, "attention_bias": True},
    ],
    ids=str,
)
def test_override_is_an_edit_of_the_file(changes):
    yarn = {"type": "yarn", "factor": 4.0}
    read = without(stock(rope_theta=1e6, rope_scaling=yarn, sliding_window=16), "head_dim")
    read = without(read, "num_key_value_heads")
    config = HybridConfig.from_dict(read).override(changes)
    edited = HybridConfig.from_dict({**read, **changes})
    assert config == edited
    assert config.override(changes) == edited


def test_override_of_settings_under_any_of_their_names():
    config = HybridConfig.from_dict(ORIGINAL)
    for name in ("use_pos_emb", "use_pos_embed", "use_rotary_emb"):
        assert config.override({f"mamba2_config.{name}": True}).mamba2.use_pos_emb
        on = config.override({f"mamba2_config.{name}": True})
        assert not on.override({"mamba2_config.use_rotary_emb": False}).mamba2.use_pos_emb
    for change in ({"gka_overrides.num_iter": 7}, {"gka_overrides": {"num_iter": 7}}):
        gka = config.override(change).gka
        assert gka == dataclasses.replace(config.gka, num_iter=7)
    assert config.override({"gka_config": {"num_iter": 7}}).gka == GKAConfig(num_iter=7)
    wider = config.override({"num_key_value_heads": 4})  # copies in the sections follow
    assert wider.num_key_value_heads == 4
    assert wider.to_dict()["gka_config"]["num_k_heads"] == 4
    swapped = ["GKA", "*", "GDN", "M2", "BMF", "SWA"]
    assert config.override({"layer_types": swapped}).layer_kinds == tuple(swapped)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rms_norm_epsilon": 1e-5}, "did you mean 'rms_norm_eps'"),
        ({"num_iter": 5}, "did you mean 'gka_config.num_iter'"),
        ({"gka_config.num_iters": 5}, "did you mean 'gka_config.num_iter'"),
        ({"gka_config": {"num_iters": 5}}, "did you mean 'gka_config.num_iter'"),
        ({"rope_parameters.rope_thetas": 5}, "rope_thetas.* is not a key"),
        ({"rope_parameters.factor": 4.0}, "factor has no effect as the other keys"),
        ({"rope_theta": 1.0, "rope_parameters.rope_theta": 2.0}, "is given twice"),
        ({"rope_scaling": YARN, "rope_parameters": {}}, "is given twice"),
        ({"gka_config.num_iter": 5, "gka_overrides.num_iter": 6}, "is given twice"),
        ({"vocab_size.x": 5}, "reaches into vocab_size, which is no JSON object"),
        ({"layer_types.0": "*"}, "reaches into layer_types"),
        ({"": 5}, "a key of config.json is a name"),
        ({3: 5}, "a key of config.json is a name"),
        ({"gka_config..num_iter": 5}, "a key of config.json is a name"),
        ({"vocab_size": {1, 2}}, "vocab_size must be a JSON value"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a JSON value"),
        ({"dtype": "float32"}, "pass dtype="),
        ({"torch_dtype": "float32"}, "pass dtype="),
        ({"sliding_window": 8}, "sliding_window alone has no effect: give swa_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
        ({"num_hidden_layers": 2}, "6 symbols but num_hidden_layers is 2"),
        ([1], "must be a dict of keys"),
    ],
    ids=str,
)
def test_overrides_that_cannot_be_obeyed(changes, message):
    with pytest.raises(ValueError, match=message):
        HybridConfig.from_dict(ORIGINAL).override(changes)


def test_override_of_a_window_that_no_layer_has():
    config = HybridConfig.from_dict({**STOCK, "max_window_layers": 4})
    for changes in ({"sliding_window": 8}, {"use_sliding_window": True, "sliding_window": 8}):
        with pytest.raises(ValueError, match="alone has no effect: give use_sliding_window"):
            config.override(changes)
    changes = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}
    assert config.override(changes).layer_kinds == ("*", "*", "*", "SWA")
    assert config.override({"use_cache": False}).to_dict()["use_cache"] is False  # bookkeeping


# Keys without effect, and keys that would have one


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        ({"rope_scaling": {**YARN, "attn_factor": 0.87}}, "rope_type 'yarn': 'attn_factor'"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mscale": 1}}, "'linear': 'mscale'"),
        ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, "'default': 'factor'"),
        ({"rope_scaling": {**YARN, "type": "linear"}}, "type 'linear' has no effect beside"),
        ({"rope_scaling": YARN, "rope_parameters": YARN}, "rope_parameters has no effect"),
        ({"attention_dropout": 0.1}, "attention_dropout 0.1 has no effect"),
        ({"my_note": 1, "other": [2]}, "unknown keys that have no effect: 'my_note', 'other'"),
        ({"temperature": 0.6}, "unknown keys that have no effect: 'temperature'"),
        ({"eos_token_id": [1, 512]}, "eos_token_id .* is outside the vocabulary of 512"),
        ({"pad_token_id": -1}, "pad_token_id -1 is outside the vocabulary"),
        (
            {
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["full_attention"] * 4,
            },
            "use_sliding_window has no effect",
        ),
    ],
    ids=str,
)
def test_what_has_no_effect_is_said_once(changes, note):
    with pytest.warns(UserWarning, match=note) as said:
        config = HybridConfig.from_dict({**STOCK, **changes})
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # not again by whatever is done with it
        assert {key: config.to_dict()[key] for key in changes} == changes
        assert config.override({"rms_norm_eps": 1e-5}).rms_norm_eps == 1e-5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "awq"}}, "quantized checkpoints"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0 is not supported"),
        ({"logits_scaling": 8.0}, "logits_scaling 8.0 is not supported, only 1 is"),
        ({"use_mup": True}, "use_mup True is not supported"),
        ({"mlp_bias": True}, "mlp_bias True is not supported"),
        ({"num_experts": 8}, "num_experts 8 is not supported"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"is_causal": False}, "is_causal False is not supported, only true is"),
        ({"vision_config": {"depth": 2}}, "vision_config"),
        ({"linear_num_key_heads": 2}, "linear_num_key_heads .* family qwen3"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "partial_rotary_factor": 0.5}}, "0.5"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"rope_scaling": {"full_attention": {"factor": 2.0}}}, "of one layer type"),
    ],
    ids=str,
)
def test_keys_that_would_change_the_model_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        HybridConfig.from_dict({**STOCK, **changes})


def test_what_libraries_write_for_themselves_is_no_news():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        HybridConfig.from_dict(
            {
                **STOCK,
                "_name_or_path": "x",
                "final_logit_softcapping": None,
                "id2label": {"0": "LABEL_0"},
                "is_encoder_decoder": False,
                "logits_scaling": 1.0,
                "num_experts": 0,
                "partial_rotary_factor": 1.0,
                "pruned_heads": {},
                "quantization_config": None,
                "transformers_version": "4.51.0",
                "unsloth_version": "2025.1",
                "use_cache": True,
            }
        )
        HybridConfig.from_dict(ORIGINAL)
        for name in ("tiny", "8b", "32b"):
            config = HybridConfig.preset(name)
            assert HybridConfig.from_dict(config.to_dict()) == config


def test_yarn_as_transformers_reads_it():
    """A null factor follows from the lengths, a null truncate is false, an int is a number."""
    yarn = {"type": "yarn", "factor": None, "original_max_position_embeddings": 8192}
    data = {**STOCK, "max_position_embeddings": 32768}
    rope = HybridConfig.from_dict({**data, "rope_scaling": {**yarn, "truncate": None}}).rope
    assert (rope.factor, rope.truncate) == (4.0, False)
    whole = {**YARN, "attention_factor": 1, "beta_fast": 32, "mscale": 1, "mscale_all_dim": 0}
    assert HybridConfig.from_dict({**STOCK, "rope_scaling": whole}).rope.attention_factor == 1
    top = {**data, "rope_scaling": YARN, "original_max_position_embeddings": 128}
    with pytest.warns(UserWarning, match="in rope_parameters has no effect"):
        assert HybridConfig.from_dict(top).rope.original_max_position_embeddings == 128


# Values


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 2**31}, "vocab_size must be an integer <= "),
        ({"hidden_size": 4.0}, "hidden_size must be an integer >= 1, got 4.0"),
        ({"hidden_size": True}, "hidden_size must be an integer"),
        ({"intermediate_size": None}, "intermediate_size must be an integer"),
        ({"num_attention_heads": 2**14, "head_dim": 128}, "must be at most"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers must be an integer <= 512"),
        ({"hybrid_override_pattern": "-".join("*" * 9999)}, "at most 512 layers"),
        ({"hybrid_override_pattern": "x" * 10**6}, r"unknown symbol 'xxx.*\.\.\."),
        ({"hybrid_override_pattern": ""}, "hybrid_override_pattern: layer 0"),
        ({"layer_types": "full_attention"}, "layer_types must be a list"),
        ({"layer_types": [["*"]]}, "layer_types must be a list"),
        ({"layer_types": []}, "layer_types must be a list"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a finite number"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number .*, got nan"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps must be a finite number"),
        ({"initializer_range": float("inf")}, "initializer_range must be a finite number"),
        ({"initializer_range": -0.1}, "initializer_range must be a finite number >= 0"),
        ({"rope_parameters": {"rope_theta": -1.0}}, "rope_theta must be a finite number"),
        ({"rope_parameters": {"rope_theta": "1e6"}}, "rope_theta must be a finite number"),
        ({"rope_parameters": {"rope_theta": 10**400}}, "rope_theta must be a finite number <="),
        ({"rope_parameters": [1]}, "rope_parameters must be a JSON object"),
        ({"rope_scaling": "yarn"}, "rope_scaling must be a JSON object"),
        ({"rope_parameters": {**YARN, "factor": 0.5}}, "rope_parameters.factor must be .* >= 1"),
        ({"rope_parameters": {**YARN, "factor": True}}, "rope_parameters.factor must be"),
        ({"rope_parameters": {**YARN, "beta_fast": -1}}, "rope_parameters.beta_fast must be"),
        ({"rope_parameters": {**YARN, "attention_factor": -1.0}}, "attention_factor must be"),
        ({"rope_parameters": {**YARN, "truncate": 1}}, "truncate must be true or false"),
        ({"rope_parameters": {"rope_type": ["yarn"]}}, "rope_type .* is not supported"),
        ({"attention_bias": 1}, "attention_bias must be true or false, got 1"),
        ({"tie_word_embeddings": "false"}, "tie_word_embeddings must be true or false"),
        ({"use_sliding_window": "no"}, "use_sliding_window must be true or false"),
        ({"use_sliding_window": True, "sliding_window": 0}, "sliding_window must be an integer"),
        ({"max_window_layers": -1}, "max_window_layers must be an integer >= 0"),
        ({"eos_token_id": [1, None]}, "eos_token_id must be an integer"),
        ({"eos_token_id": "2"}, "eos_token_id must be an integer"),
        ({"bos_token_id": 2**31}, "bos_token_id must be an integer <="),
        ({"architectures": "Qwen3ForCausalLM"}, "architectures must be a list"),
        ({"model_type": ["qwen3"]}, "model_type .* is not supported"),
        ({"gka_config": {"num_iter": 10**9}}, "gka_config.num_iter must be an integer <= 1000"),
        ({"gka_config": {"use_gate": 1}}, "gka_config.use_gate must be true or false"),
        ({"gka_config": {"ridge_strength": float("nan")}}, "ridge_strength must be a finite"),
        ({"gka_config": {"chunk_size": 10**6}}, "chunk_size must be an integer <= 4096"),
        ({"gka_config": {"norm_eps": 0.0}}, "gka_config.norm_eps must be a finite number"),
        ({"gka_overrides": [1]}, "gka_overrides must be a JSON object"),
        ({"gdn_config": {"conv_size": 0}}, "gdn_config.conv_size must be an integer >= 1"),
        ({"gdn_config": "default"}, "gdn_config must be a JSON object"),
        ({"mamba2_config": {"use_pos_emb": "yes"}}, "mamba2_config.use_pos_emb must be true"),
        ({"bmojo_config": {"window_size": 2**31}}, "bmojo_config.window_size must be an integer"),
        ({"bmojo_config": {"ssm_mixer": 5}}, "ssm_mixer 5 is unknown"),
        ({"swa_config": {"window_size": None, "a": 5}}, "swa_config.window_size is missing"),
        ({"my_note": float("nan")}, "'my_note' of config.json is not a JSON value"),
    ],
    ids=lambda x: str(x)[:60],
)
def test_every_value_has_a_type_and_a_range(changes, message):
    with pytest.raises(ValueError, match=message) as error:
        HybridConfig.from_dict(original(**changes))
    text = str(error.value)
    assert len(text) < 400 and text.isprintable()


def test_python_is_checked_as_files_are():
    tiny = HybridConfig.preset("tiny")
    for changes, message in [
        ({"vocab_size": 4.0}, "vocab_size must be an integer"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps must be a finite number"),
        ({"layer_kinds": "GKA"}, "layer_kinds must be a tuple of symbols"),
        ({"layer_kinds": ("gka",)}, "did you mean 'GKA'"),
        ({"layer_kinds": ("*",) * 513}, "at most 512 layers"),
        ({"eos_token_id": 1.5}, "eos_token_id must be an integer"),
        ({"gka": {"num_iter": 3}}, "gka must be a GKAConfig"),
        ({"rope": {"theta": 1e6}}, "rope must be a RopeConfig"),
        ({"sections": {"rwkv": None}}, "settings of 'rwkv' is unknown"),
        ({"family": "lama"}, "family 'lama' is unknown, did you mean 'llama'"),
        ({"extra": "[]"}, "extra must be a JSON object"),
    ]:
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(tiny, **changes)
    with pytest.raises(TypeError, match="no option 'vocabsize', did you mean 'vocab_size'"):
        HybridConfig(vocabsize=5)
    with pytest.raises(ValueError, match="'factor' mean nothing with rope_type 'default'"):
        RopeConfig(factor=4.0)
    lists = dataclasses.replace(tiny, layer_kinds=["*", "GKA"], eos_token_id=[1, 2])
    assert (lists.layer_kinds, lists.eos_token_id) == (("*", "GKA"), (1, 2)) and hash(lists)
    numpy = dataclasses.replace(tiny, vocab_size=np.int64(64), rms_norm_eps=np.float32(0.5))
    assert json.loads(json.dumps(numpy.to_dict()))["vocab_size"] == 64


def test_reading_a_hostile_file(tmp_path):
    file = tmp_path / "config.json"
    for text, message in [
        (json.dumps(STOCK)[:-1] + ', "vocab_size": 8}', "vocab_size' is there twice"),
        ('{"model_type": "qwen3", "rms_norm_eps": NaN}', "NaN is not a finite number"),
        ('{"a": ' + "[" * 10**5 + "]" * 10**5 + "}", "nested too deeply"),
        ('{"a": "' + "x" * 2**23 + '"}', "too large"),
        ("", "not valid JSON"),
    ]:
        file.write_text(text)
        with pytest.raises(ValueError, match=message) as error:
            HybridConfig.from_json(tmp_path)
        assert str(file) in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize("mixer", ["GKA", "BMF"])  # GKA is the inner mixer of BMF
def test_numbers_of_iterations(mixer):
    config = HybridConfig.preset("tiny", mixer)
    for good in (None, 0, 1000, np.int32(3), [0, 5], np.array([7])):
        config.check_num_iter(good)
    for bad in (-1, 1001, 2**31, 10**30, True, 2.0, float("nan"), "3", [1, -1], [], [[1]]):
        with pytest.raises(ValueError, match="num_iter=.* must be a whole number >= 0 and <= 1000"):
            config.check_num_iter(bad)
    plain = HybridConfig.preset("tiny", "*", gka=GKAConfig())
    plain.check_num_iter(None)
    with pytest.raises(ValueError, match="no GKA layers: leave num_iter out"):
        plain.check_num_iter(3)


WINDOWED = {
    **STOCK,
    "layer_types": ["full_attention", "sliding_attention"] * 2,
    "original_max_position_embeddings": 128,
    "rope_scaling": {**YARN, "attention_factor": 1.0, "beta_fast": 32, "mscale": 1.0},
    "sliding_window": 32,
    "use_sliding_window": True,
}
VALUES = [
    None,
    True,
    0,
    -1,
    4.0,
    float("nan"),
    float("inf"),
    2**31,
    10**400,
    "",
    "\x1b[31m",
    [],
    {},
]
VALUES += [[1], [None], {"a": {}}, "-" * 10**5, ["*"] * 5000, 10**5000]


def _check_mutated(read: dict, path: tuple[str, ...], value) -> None:
    """Either one line that is fit for a terminal, or a config that comes back from its JSON."""
    data = json.loads(json.dumps(read))
    node = data
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    changes = {".".join(path): value}
    for make in (
        lambda: HybridConfig.from_dict(data),
        lambda: HybridConfig.from_dict(read).override(changes),
    ):
        try:
            config = make()
        except ValueError as e:
            assert len(str(e)) < 400 and str(e).isprintable()
        else:
            again = HybridConfig.from_dict(json.loads(json.dumps(config.to_dict())))
            assert hash(config) and again.to_dict() == config.to_dict()
            assert (again.layer_kinds, again.sections) == (config.layer_kinds, config.sections)


def _paths(data: dict, start: tuple[str, ...] = ()):
    for key, value in data.items():
        yield (*start, key)
        if isinstance(value, dict):
            yield from _paths(value, (*start, key))


MUTATIONS = [
    (read, path, value)
    for read in (ORIGINAL, STOCK, WINDOWED)
    for path in _paths(read)
    for value in VALUES
]


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_mutated_configs():
    for mutation in random.Random(0).sample(MUTATIONS, 250):
        _check_mutated(*mutation)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_all_mutated_configs():
    for mutation in MUTATIONS:
        _check_mutated(*mutation)
