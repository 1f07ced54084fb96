"""The config.json of every family: read, written, and read again as the same model."""

from __future__ import annotations

import dataclasses
import json
import random
import warnings
from typing import Any

import pytest

from hmf_jax.config import HybridConfig
from hmf_jax.families import FAMILIES, model_types
from hmf_jax.options import LinearHeads, MoEConfig, RopeConfig
from tests.families.bases import BASES, base, hybrid
from tests.goldens import PACKED


def test_every_family_has_a_base_model_here():
    assert BASES.keys() == FAMILIES.keys()
    assert len(model_types()) == len(set(model_types()))


@pytest.mark.parametrize(
    "model_type",
    [name for family in FAMILIES.values() for name in family.stock] + ["mistral"],
)
def test_absent_keys_mean_what_they_mean_to_transformers(model_type):
    transformers = pytest.importorskip("transformers")
    known = transformers.AutoConfig.for_model(model_type)
    named = {"model_type": model_type}
    if model_type == "mistral":
        named["sliding_window"] = known.sliding_window = None
    bare = HybridConfig.from_dict(named)
    full = HybridConfig.from_dict({**known.to_dict(), **named})
    assert dataclasses.replace(bare, extra=full.extra, stock=full.stock) == full
    again = transformers.AutoConfig.for_model(**full.to_dict()).to_dict()
    before = known.to_dict()
    assert {key: again[key] for key in before} == before


def test_recorded_files_come_back():
    """Every config.json that the original wrote: the same keys, and settings spelled out."""
    path = PACKED / "families_cases.json"
    if not path.is_file():
        pytest.skip("HMF_GOLDENS has no families_cases.json")
    for name, case in json.loads(path.read_text()).items():
        cases = [case] if "config" in case else [case["fused"], case["pure"]]
        for data in [c[key] for c in cases for key in ("config", "base_config") if key in c]:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                written = HybridConfig.from_dict(data).to_dict()
            for key, value in data.items():
                if isinstance(value, dict):
                    assert value.items() <= written[key].items(), (name, key)
                elif key != "sliding_window" or "swa_config" not in data:
                    assert written[key] == value, (name, key)
            spelled_out = {"bmojo_config", "gka_config", "gdn_config"}
            assert written.keys() <= data.keys() | spelled_out, name


# What each family's hybrids have in their config.json beside the keys of all families.
KEYS = {
    "qwen3": "attention_bias head_dim max_window_layers sliding_window use_sliding_window",
    "llama": "attention_bias head_dim mlp_bias pretraining_tp",
    "qwen2": "max_window_layers sliding_window use_sliding_window",
    "ministral3": "head_dim sliding_window",
    "qwen3_moe": """attention_bias decoder_sparse_step head_dim mlp_only_layers
        moe_intermediate_size norm_topk_prob num_experts_per_tok num_local_experts
        output_router_logits router_aux_loss_coef sliding_window use_sliding_window""",
    "qwen3_next": """attention_bias decoder_sparse_step head_dim linear_conv_kernel_dim
        linear_key_head_dim linear_num_key_heads linear_num_value_heads linear_value_head_dim
        mlp_only_layers moe_intermediate_size norm_topk_prob num_experts num_experts_per_tok
        output_router_logits partial_rotary_factor router_aux_loss_coef
        shared_expert_intermediate_size""",
    "qwen3_5_moe": """attention_bias head_dim linear_conv_kernel_dim linear_key_head_dim
        linear_num_key_heads linear_num_value_heads linear_value_head_dim moe_intermediate_size
        num_experts num_experts_per_tok output_router_logits partial_rotary_factor
        router_aux_loss_coef shared_expert_intermediate_size""",
}


@pytest.mark.parametrize("family", BASES)
def test_keys_of_hybrids(family):
    data = hybrid(family).to_dict()
    common = set(
        """architectures attention_dropout bos_token_id dtype eos_token_id gka_config hidden_act
        hidden_size hybrid_override_pattern initializer_range intermediate_size layer_types
        max_position_embeddings model_type num_attention_heads num_hidden_layers
        num_key_value_heads pad_token_id rms_norm_eps rope_parameters tie_word_embeddings use_cache
        vocab_size""".split()
    )
    common -= {"ministral3": {"layer_types"}, "qwen3_5_moe": {"intermediate_size"}}.get(
        family, set()
    )
    if "linear_num_key_heads" in data:
        common.add("gdn_config")  # of the base model's layers
    assert data.keys() == common | set(KEYS[family].split())
    names = {"GKA": "linear_attention", "*": "full_attention"}
    if family in ("qwen3_next", "qwen3_5_moe"):
        assert data["layer_types"] == [names["GKA"], names["*"]]
    back = HybridConfig.from_dict(data)
    assert back.to_dict() == data and not back.is_stock


# Every option, and a value that is no family's default.
OPTIONS: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 40,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "rms_norm_eps": 1e-4,
    "max_position_embeddings": 999,
    "tie_word_embeddings": True,
    "initializer_range": 0.5,
    "qkv_bias": True,
    "o_bias": True,
    "attention_bias": True,
    "bmojo_bias": True,
    "mlp_bias": True,
    "output_gate": True,
    "zero_centered_norm": True,
    "qk_norm": True,
    "rope": RopeConfig(3e4, "linear", factor=2.0),
    "rope partial": RopeConfig(3e4, partial_rotary_factor=0.5),
    "rope scale": RopeConfig(3e4, llama_4_scaling_beta=0.3, original_max_position_embeddings=9),
    "rope llama3": RopeConfig(
        3e4,
        "llama3",
        factor=2.0,
        original_max_position_embeddings=99,
        low_freq_factor=1.5,
        high_freq_factor=3.0,
    ),
    "moe": None,
    "moe other": MoEConfig(9, 4, 44, False, None, 2, (1, 3), 0.5),
    "moe shared": MoEConfig(9, 4, 44, True, 12, 1, (), 0.5),
    "linear": None,
    "linear other": LinearHeads(3, 6, 8, 3),
    "pad_token_id": 7,
    "bos_token_id": None,
    "eos_token_id": (4, 5),
    "layer_kinds": ("GDN", "GKA", "*", "BMF", "M2"),
}


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("stock", [True, False])
def test_every_option_comes_back_or_is_refused(family, stock):
    """Nothing is written that is read as another model."""
    config, kept = (base(family) if stock else hybrid(family)), set()
    for option, value in OPTIONS.items():
        new = dataclasses.replace(config, **{option.split()[0]: value})
        try:
            written = new.to_dict()
        except ValueError as e:
            assert "cannot be written for the family" in str(e), option
            continue
        back = HybridConfig.from_dict(json.loads(json.dumps(written)))
        own = {"extra": back.extra, "stock": back.stock}
        if option == "intermediate_size" and family == "qwen3_5_moe":
            own["intermediate_size"] = back.intermediate_size  # no layer has it
        assert dataclasses.replace(new, **own) == back, option
        kept.add(option)
    assert {"vocab_size", "head_dim", "rope", "rope llama3", "eos_token_id"} <= kept
    assert ("rope partial" in kept) == ("linear other" in kept) == (family in _LINEAR)
    assert ("moe shared" in kept) == (family in _LINEAR)
    assert ("mlp_bias" in kept) == (family == "llama")
    assert ("rope scale" in kept) == (family == "ministral3")


_LINEAR = ("qwen3_next", "qwen3_5_moe")


@pytest.mark.parametrize("family", BASES)
@pytest.mark.parametrize("stock", [True, False])
def test_override_of_every_key_is_an_edit_of_the_file(family, stock):
    config = base(family) if stock else hybrid(family)
    data = {k: {} if k.endswith("_config") else v for k, v in config.to_dict().items()}
    for key, value in data.items():
        if isinstance(value, bool):
            new: Any = not value
        elif isinstance(value, int) and key not in ("num_hidden_layers", "num_experts_per_tok"):
            new = 2 * value
        elif isinstance(value, float):
            new = value / 2
        else:
            continue
        joined = {"linear_key_head_dim", "linear_value_head_dim"}
        changes = {k: new for k in joined} if key in joined else {key: new}
        if key in ("sliding_window", "use_sliding_window", "max_window_layers"):
            continue  # these are asked for together, below
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = {**(BASES[family] if stock else data), **changes}
            if key == "partial_rotary_factor":
                expected["rope_parameters"] = {**data["rope_parameters"], **changes}
            read = HybridConfig.from_dict(expected)
            try:
                got = config.override(changes)
            except ValueError as e:
                assert "attention_dropout" in str(e), key
                continue
        stored = {"stock": got.stock, "extra": got.extra, "sections": got.sections}
        assert dataclasses.replace(read, **stored) == got, key


def test_a_damaged_file_of_any_family_is_a_clear_error():
    """Values of other types: read, or refused with one line that says where."""
    values: list[Any] = [None, True, -1, 0, 3, 1.5, "x", [], [1], {}, {"a": 1}]
    rng = random.Random(3)
    for family in BASES:
        for data in (BASES[family], hybrid(family).to_dict()):
            for key in data:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    try:
                        config = HybridConfig.from_dict({**data, key: rng.choice(values)})
                        HybridConfig.from_dict(config.to_dict())
                    except ValueError as e:
                        assert str(e) and "\n" not in str(e)
