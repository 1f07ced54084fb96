"""What the keys of a family mean, and what is said of values that they cannot have."""

from __future__ import annotations

import dataclasses
import warnings

import pytest

from hmf_jax.config import HybridConfig
from hmf_jax.mixers import GDNConfig
from hmf_jax.options import LinearHeads, MoEConfig, RopeConfig
from tests.families.bases import BASES, LLAMA3, base, hybrid


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
    other = base("qwen3_next").override({"num_local_experts": 5})
    assert other.moe and other.moe.num_experts == 5


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
    narrower = dataclasses.replace(base("qwen2", head_dim=32), head_dim=8)
    assert HybridConfig.from_dict(narrower.to_dict()).head_dim == 8


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
