"""The config.json of every base family: what absent keys mean, what is written, what is refused."""

from __future__ import annotations

import dataclasses
import json
import random
import warnings
from typing import Any

import pytest

from hmf_jax.config import HybridConfig
from hmf_jax.families import FAMILIES, REFUSED, model_types
from hmf_jax.loading import save_pretrained
from hmf_jax.memory import active_parameters, describe
from hmf_jax.mixers import BMojoConfig, GDNConfig, SWAConfig
from hmf_jax.options import LinearHeads, MoEConfig, RopeConfig
from hmf_jax.presets import PRESETS
from tests.goldens import PACKED

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "vocab_size": 64,
    "max_position_embeddings": 512,
}
EXPERTS = {"moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
NEXT = {**SHAPE, **EXPERTS, **LINEAR, "head_dim": 32, "shared_expert_intermediate_size": 20}
# A base model of each family.
BASES: dict[str, dict[str, Any]] = {
    "qwen3": {**SHAPE, "model_type": "qwen3", "head_dim": 16},
    "llama": {**SHAPE, "model_type": "llama", "rope_parameters": LLAMA3, "mlp_bias": True},
    "qwen2": {**SHAPE, "model_type": "qwen2", "rope_theta": 1000000.0},
    "ministral3": {**SHAPE, "model_type": "ministral3", "head_dim": 16},
    "qwen3_moe": {**SHAPE, **EXPERTS, "model_type": "qwen3_moe", "mlp_only_layers": [2]},
    "qwen3_next": {**NEXT, "model_type": "qwen3_next"},
    "qwen3_5_moe": {
        **{k: v for k, v in NEXT.items() if k != "intermediate_size"},
        "model_type": "qwen3_5_moe_text",
        "rope_parameters": {"rope_theta": 1e7, "mrope_section": [2, 1, 1], "rope_type": "default"},
    },
}


def base(family: str, **changes: Any) -> HybridConfig:
    return HybridConfig.from_dict({**BASES[family], **changes})


def hybrid(family: str, *layer_kinds: str, **changes: Any) -> HybridConfig:
    return dataclasses.replace(base(family), layer_kinds=layer_kinds or ("GKA", "*"), **changes)


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


def test_the_number_of_experts_has_two_names():
    one = base("qwen3_moe")
    data = {**one.to_dict()}
    assert data["num_experts"] == 8 and "num_local_experts" not in data  # as it was read
    other = {**{k: v for k, v in BASES["qwen3_moe"].items() if k != "num_experts"}}
    two = HybridConfig.from_dict({**other, "num_local_experts": 8})
    assert two.moe == one.moe and "num_experts" not in two.to_dict()
    for config in (one, two):
        for name in ("num_experts", "num_local_experts"):
            new = config.override({name: 6})
            assert new.moe is not None and new.moe.num_experts == 6
            back = HybridConfig.from_dict(new.to_dict())
            assert back.moe == new.moe
    fewer = dataclasses.replace(one, moe=MoEConfig(4, 2, 24)).to_dict()
    assert fewer["num_experts"] == 4 and "num_local_experts" not in fewer
    with pytest.raises(ValueError, match="num_experts is 8 but num_local_experts is 9"):
        base("qwen3_moe", num_local_experts=9)
    assert base("qwen3_next", num_experts=0).moe is None
    assert base("qwen3_next").override({"num_local_experts": 5}).moe.num_experts == 5


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("llama", {"attention_bias": 1}, "attention_bias must be true or false"),
        ("llama", {"mlp_bias": None}, "mlp_bias must be true or false"),
        ("llama", {"num_experts": 4}, "num_experts 4 is not supported"),
        ("llama", {"layer_types": ["sliding_attention"] * 4}, "unknown entries"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ("llama", {"linear_num_key_heads": 2}, "not supported in the family llama"),
        ("llama", {"rope_parameters": {**LLAMA3, "high_freq_factor": 1.0}}, "must be above"),
        ("qwen3_moe", {"num_experts_per_tok": 9}, "num_experts_per_tok 9 must be at most"),
        ("qwen3_moe", {"num_experts": True}, "num_local_experts must be an integer"),
        ("qwen3_moe", {"moe_intermediate_size": 0}, "moe_intermediate_size must be an integer"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step must be an integer >= 1"),
        ("qwen3_moe", {"mlp_only_layers": [-1]}, "mlp_only_layers must be an integer"),
        ("qwen3_moe", {"mlp_only_layers": "all"}, "mlp_only_layers must be a list"),
        ("qwen3_moe", {"norm_topk_prob": "yes"}, "norm_topk_prob must be true or false"),
        ("qwen3_moe", {"router_aux_loss_coef": -1}, "router_aux_loss_coef must be"),
        ("qwen3_next", {"linear_value_head_dim": 8}, "only that of linear_key_head_dim, 16, is"),
        ("qwen3_next", {"linear_num_value_heads": 3}, "linear_num_value_heads 3 must be a mult"),
        ("qwen3_next", {"partial_rotary_factor": 0.01}, "must rotate an even number"),
        ("qwen3_next", {"full_attention_interval": 0}, "full_attention_interval must be"),
        ("qwen3_next", {"layer_types": ["sliding_attention"] * 4}, "unknown entries"),
        ("qwen3_5_moe", {"attn_output_gate": False}, "attn_output_gate False is not supported"),
        ("qwen3_5_moe", {"num_experts": 0}, "num_experts must be an integer >= 1"),
        ("ministral3", {"sliding_window": 0}, "sliding_window must be an integer >= 1"),
    ],
    ids=lambda x: str(x)[:40],
)
def test_bad_values_are_named_as_in_the_file(family, changes, message):
    with pytest.raises(ValueError, match=message):
        base(family, **changes)


def test_heads_follow_from_what_is_there():
    assert base("qwen2").head_dim == 8 and "head_dim" not in hybrid("qwen2").to_dict()
    assert base("qwen2", head_dim=32).head_dim == 32
    assert base("qwen2", head_dim=None).head_dim == 8
    assert base("llama", num_key_value_heads=None).num_key_value_heads == 4
    bare = {k: v for k, v in BASES["llama"].items() if k != "num_key_value_heads"}
    assert HybridConfig.from_dict(bare).num_key_value_heads == 4
    assert dataclasses.replace(hybrid("qwen2"), head_dim=32).to_dict()["head_dim"] == 32


def test_biases_of_each_family():
    def of(family, **changes):
        c = base(family, **changes)
        return c.qkv_bias, c.o_bias, c.bmojo_bias, c.mlp_bias

    assert of("llama") == (False, False, None, True)
    assert of("llama", attention_bias=True) == (True, True, None, True)
    assert of("qwen2") == (True, False, None, False)
    assert of("ministral3") == (False, False, True, False)
    assert of("qwen3_moe", attention_bias=True) == (True, True, None, False)


def test_rope_of_llama_and_ministral():
    assert base("llama").rope.low_freq_factor == 1.0
    old = {**LLAMA3, "type": "llama3"}
    del old["rope_type"], old["rope_theta"]
    legacy = base("llama", rope_parameters=None, rope_scaling=old, rope_theta=500000.0)
    assert legacy.rope == base("llama").rope
    without = {k: v for k, v in LLAMA3.items() if k != "original_max_position_embeddings"}
    assert base("llama", rope_parameters=without).rope.original_max_position_embeddings == 512
    rope = base("ministral3").rope
    assert (rope.rope_type, rope.factor, rope.llama_4_scaling_beta) == ("yarn", 16.0, 0.1)
    assert base("ministral3", rope_parameters=None).rope == rope
    plain = base("ministral3", rope_parameters={"rope_theta": 1e6, "rope_type": "default"}).rope
    assert plain == RopeConfig(1e6)
    with pytest.warns(UserWarning, match="rope_theta has no effect"):
        assert base("ministral3", rope_theta=5.0).rope == rope
    with pytest.warns(UserWarning, match="llama_4_scaling_beta"):  # no other family has it
        yarn = {"rope_type": "yarn", "factor": 2.0, "llama_4_scaling_beta": 0.1}
        assert base("llama", rope_parameters=yarn).rope.llama_4_scaling_beta is None


def test_partial_rotation_is_stored_twice():
    assert base("qwen3_next").rope.partial_rotary_factor == 0.25
    assert base("qwen3_next", partial_rotary_factor=0.5).rope.partial_rotary_factor == 0.5
    inside = {"rope_theta": 1e7, "rope_type": "default", "partial_rotary_factor": 0.5}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = base("qwen3_next", rope_parameters=inside)
    assert config.rope.partial_rotary_factor == 0.5
    data = hybrid("qwen3_next", rope=config.rope).to_dict()
    assert data["partial_rotary_factor"] == data["rope_parameters"]["partial_rotary_factor"] == 0.5
    with pytest.warns(UserWarning, match="partial_rotary_factor has no effect"):
        both = base("qwen3_next", rope_parameters=inside, partial_rotary_factor=0.75)
    assert both.rope.partial_rotary_factor == 0.5


def test_layers_of_qwen3_next():
    kinds = ("GDN", "GDN", "GDN", "*")
    assert base("qwen3_next").layer_kinds == base("qwen3_5_moe").layer_kinds == kinds
    assert base("qwen3_next", full_attention_interval=2).layer_kinds == ("GDN", "*") * 2
    names = ["full_attention", "linear_attention", "linear_attention", "full_attention"]
    config = base("qwen3_next", layer_types=names)
    assert config.layer_kinds == ("*", "GDN", "GDN", "*") and config.is_stock
    assert config.to_dict()["layer_types"] == names
    changed = dataclasses.replace(config, gdn=GDNConfig(allow_neg_eigval=True))
    assert not changed.is_stock  # base models have no key for it
    assert not dataclasses.replace(config, layer_kinds=("*", "GKA", "GDN", "*")).is_stock
    assert not dataclasses.replace(base("llama"), layer_kinds=("GDN", "*")).is_stock


def test_settings_of_linear_layers_default_to_the_backbone():
    changes = {"rms_norm_eps": 1e-3, "linear_conv_kernel_dim": 3}
    read = base("qwen3_next", **changes)
    made = dataclasses.replace(read, layer_kinds=("GKA", "GDN", "BMF"), sections={})
    for config in (read, made, HybridConfig.from_dict(made.to_dict())):
        assert (config.gdn.norm_eps, config.gdn.conv_size) == (1e-3, 3)
    assert (made.gka.norm_eps, made.gka.conv_size) == (1e-3, 3)
    data = {**made.to_dict(), "gdn_config": {"conv_size": 2}}
    assert HybridConfig.from_dict(data).gdn == GDNConfig(conv_size=2, norm_eps=1e-3)
    assert hybrid("llama", "GDN").gdn.norm_eps == 1e-5


def test_linear_heads_of_qwen3_5():
    """Without keys of their own, linear layers of hybrids have attention's heads."""
    data = {k: v for k, v in hybrid("qwen3_5_moe").to_dict().items() if not k.startswith("linear")}
    config = HybridConfig.from_dict({**data, "gka_config": {}, "gdn_config": {}})
    assert config.linear is None and config.linear_heads == (4, 2, 2, 32)
    assert HybridConfig.from_dict(config.to_dict()) == config
    stock = {k: v for k, v in BASES["qwen3_5_moe"].items() if not k.startswith("linear")}
    assert HybridConfig.from_dict(stock).linear == LinearHeads(16, 32, 128, 4)


def test_windows_of_base_models():
    assert base("qwen3_moe", sliding_window=9).layer_kinds == ("*",) * 4
    moe = base("qwen3_moe", sliding_window=9, use_sliding_window=True, max_window_layers=3)
    assert moe.layer_kinds == ("SWA",) * 4 and moe.swa == SWAConfig(9)
    ministral = base("ministral3", sliding_window=9)
    assert ministral.layer_kinds == ("SWA",) * 4 and ministral.swa == SWAConfig(9)
    assert "use_sliding_window" not in ministral.to_dict() and ministral.is_stock
    wider = dataclasses.replace(ministral, swa=SWAConfig(11)).to_dict()
    assert wider["sliding_window"] == 11 and HybridConfig.from_dict(wider).swa == SWAConfig(11)
    qwen2 = base("qwen2", sliding_window=9, use_sliding_window=True, max_window_layers=3)
    assert qwen2.layer_kinds == ("*", "*", "*", "SWA")


def test_the_window_of_a_ministral_hybrid():
    """sliding_window is a window of all attention there, or a copy of swa_config's."""
    data = hybrid("ministral3", "*", "GKA", "*").to_dict()
    with pytest.warns(UserWarning, match="are read as SWA"):
        config = HybridConfig.from_dict({**data, "sliding_window": 9})
    assert config.layer_kinds == ("SWA", "GKA", "SWA") and config.swa == SWAConfig(9)
    assert config.to_dict()["sliding_window"] is None
    own = {**data, "sliding_window": 9, "swa_config": {"window_size": 9}}
    assert HybridConfig.from_dict(own).layer_kinds == ("*", "GKA", "*")
    fused = {**data, "sliding_window": 9, "hybrid_override_pattern": "*-GKA*-*DA"}
    with pytest.raises(ValueError, match=r"attention of '\*DA', 'GKA\*' has a window"):
        HybridConfig.from_dict(fused)


def test_mistral_is_read_as_llama():
    data = {**SHAPE, "model_type": "mistral", "sliding_window": None}
    config = HybridConfig.from_dict(data)
    assert config.family == "llama" and config.is_stock
    assert config.to_dict()["model_type"] == "mistral"
    primed = dataclasses.replace(config, layer_kinds=("GKA", "*"))
    assert primed.to_dict()["model_type"] == "hybrid_llama"
    for window in ({"sliding_window": 5}, {}):
        with pytest.raises(ValueError, match="of a mistral model is not supported"):
            HybridConfig.from_dict({**SHAPE, "model_type": "mistral", **window})


VISION = {"vision_config": {"depth": 2}, "image_token_id": 5, "vision_start_token_id": 6}
MROPE = {"type": "mrope", "mrope_section": [2, 1, 1]}


@pytest.mark.parametrize(
    ("data", "family", "model_type"),
    [
        (
            {"model_type": "qwen3_5_moe", "text_config": BASES["qwen3_5_moe"]},
            "qwen3_5_moe",
            "qwen3_5_moe_text",
        ),
        (
            {"model_type": "qwen3_5_moe_hmf", "text_config": hybrid("qwen3_5_moe").to_dict()},
            "qwen3_5_moe",
            "qwen3_5_moe_hmf_text",
        ),
        (
            {"model_type": "hybrid_qwen2_5_vl", "text_config": hybrid("qwen2").to_dict()},
            "qwen2",
            "hybrid_qwen2",
        ),
        (
            {
                "model_type": "qwen2_5_vl",
                "text_config": {**SHAPE, "model_type": "qwen2_5_vl_text", "rope_scaling": MROPE},
            },
            "qwen2",
            "qwen2",
        ),
        ({**SHAPE, "model_type": "qwen2_5_vl", "rope_scaling": MROPE}, "qwen2", "qwen2"),
    ],
    ids=["qwen3_5_moe", "qwen3_5_moe_hmf", "hybrid_qwen2_5_vl", "qwen2_5_vl", "flat"],
)
def test_the_text_part_of_a_composite_model(data, family, model_type):
    data = {**data, **VISION, "architectures": ["XForConditionalGeneration"]}
    (data.get("text_config") or data).update(bos_token_id=1, eos_token_id=2)
    with pytest.warns(UserWarning, match="only the text part is read"):
        config = HybridConfig.from_dict({**data, "tie_word_embeddings": True})
    assert (config.family, config.tie_word_embeddings) == (family, True)
    written = config.to_dict()
    assert written["model_type"] == model_type and not VISION.keys() & written.keys()
    assert written["architectures"][0].endswith("ForCausalLM")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert HybridConfig.from_dict(written).layer_kinds == config.layer_kinds
    if "rope_scaling" in str(data):
        assert config.rope == RopeConfig(1e6) and config.rms_norm_eps == 1e-5
    with pytest.raises(ValueError, match="quantized"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        HybridConfig.from_dict({**data, "quantization_config": {"bits": 8}})


@pytest.mark.parametrize("model_type", REFUSED)
def test_refused_models_say_why(model_type):
    with pytest.raises(ValueError, match=f"model_type '{model_type}' is not supported \\("):
        HybridConfig.from_dict({"model_type": model_type})


@pytest.mark.parametrize(
    ("family", "layer_kinds", "foreign"),
    [
        ("llama", ("*", "GKA", "GDN", "M2", "BMF", "SWA"), ()),
        ("llama", ("GDN>GKA", "*DA"), ("GDN>GKA",)),
        ("qwen3_next", ("GDN>GKA", "*DA", "GKA*", "BMF*", "GDN", "GKA", "*"), ()),
        ("qwen3_next", ("M2", "SWA*", "*", "M2"), ("M2", "SWA*")),
        ("qwen3_5_moe", ("BMF", "GKA"), ("BMF",)),
        ("qwen3_moe", ("BMF", "M2", "SWA"), ()),
    ],
)
def test_layers_that_the_original_does_not_have(family, layer_kinds, foreign, tmp_path):
    swa, bmojo = SWAConfig(4), BMojoConfig(4, ssm_mixer="M2")
    config = hybrid(family, *layer_kinds, swa=swa, bmojo=bmojo)
    assert config.foreign_layers == foreign
    assert HybridConfig.from_dict(config.to_dict()).layer_kinds == layer_kinds
    assert ("only this package can load it" in describe(config)) == bool(foreign)
    if foreign:

        class Model:  # what is looked at first
            pass

        model: Any = Model()
        model.config = config
        with pytest.raises(
            ValueError, match=f"has no {foreign[0].replace('*', '.')}.* for_original"
        ):
            save_pretrained(model, tmp_path / "model")
        assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("name", PRESETS)
def test_presets_come_back(name):
    for mixer in (None, "*", ("GDN", "GKA")):
        config = HybridConfig.preset(name, mixer)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert HybridConfig.from_dict(config.to_dict()) == config
    replaced = HybridConfig.preset(name, "GKA")
    assert replaced.layer_kinds.count("GKA") == len(replaced.layer_kinds) // 2
    base_kinds = HybridConfig.preset(name, "*").layer_kinds
    assert set(base_kinds) == ({"GDN", "*"} if replaced.linear else {"*"})


@pytest.mark.parametrize(
    ("name", "billions"),
    [("llama-3.1-8b", 8.030), ("llama-3.2-1b", 1.236), ("qwen2.5-7b", 7.616)]
    + [("qwen2.5-0.5b", 0.494), ("8b", 8.191)],
)
def test_presets_have_as_many_parameters_as_the_released_models(name, billions):
    assert active_parameters(HybridConfig.preset(name, "*")) / 1e9 == pytest.approx(
        billions, abs=5e-4
    )


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
