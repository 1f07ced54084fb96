"""config.json in every form the original writes or tolerates, and clear errors for all others."""

from __future__ import annotations

import dataclasses
import json

import pytest

from hmf_jax.config import (
    KNOWN_MODEL_TYPES,
    BMojoConfig,
    GKAConfig,
    HybridConfig,
    Mamba2Config,
    RopeConfig,
    SWAConfig,
    streams,
)

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
        ({"rope_type": "llama3", "factor": 8.0}, "rope_type 'llama3' is not supported"),
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


@pytest.mark.parametrize("model_type", [*KNOWN_MODEL_TYPES, "llama", "gpt2"])
def test_other_model_types(model_type):
    with pytest.raises(ValueError, match="not supported") as error:
        HybridConfig.from_dict(original(model_type=model_type))
    assert all(name in str(error.value) for name in ("hybrid_qwen3", *KNOWN_MODEL_TYPES))


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
            "layer 2 has the unknown symbol 'XYZ'",
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
        ({"linear_num_key_heads": 2}, "Qwen3-Next"),
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
