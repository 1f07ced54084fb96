"""The table of names against the original's checkpoints."""

from __future__ import annotations

import dataclasses

import pytest

from hmf_jax import table
from hmf_jax.config import BMojoConfig, GDNConfig, GKAConfig, HybridConfig, Mamba2Config
from hmf_jax.convert.rows import by_tensor, tensor_shape
from tests.convert.synthetic import FULL
from tests.goldens import cases, recorded


def shapes(config: HybridConfig) -> dict[str, tuple[int, ...]]:
    tensors = by_tensor(table.entries(config))
    return {name: tensor_shape(blocks) for name, blocks in tensors.items()}


@pytest.mark.parametrize("case", cases("model") + cases("compose"))
def test_names_and_shapes_of_the_originals_checkpoints(case: str):
    config, wanted = recorded(case)
    assert shapes(HybridConfig.from_dict(config)) == wanted


def test_every_optional_tensor():
    d, nq, nk, H, K, D, V, F = 64, 64, 32, 4, 2, 16, 320, 128

    def linear(name, n_out, n_in, bias=False):
        weight = {f"{name}.weight": (n_out, n_in)}
        return weight | {f"{name}.bias": (n_out,)} if bias else weight

    def attention(end=""):
        return {
            **linear(f"q_proj{end}", nq, d, True),
            **linear(f"k_proj{end}", nk, d, True),
            **linear(f"v_proj{end}", nk, d, True),
            f"q_norm{end}.weight": (D,),
            f"k_norm{end}.weight": (D,),
        }

    def linear_attention(taps):
        return {
            **linear("q_proj", nq, d),
            **linear("k_proj", nk, d),
            **linear("v_proj", nk, d),
            **linear("o_proj", d, nq),
            **linear("g_proj", nq, d),
            "q_conv1d.weight": (nq, 1, taps),
            "k_conv1d.weight": (nk, 1, taps),
            "v_conv1d.weight": (nk, 1, taps),
            "A_log": (H,),
            "dt_bias": (H,),
            "o_norm.weight": (D,),
        }

    mamba = {
        **linear("in_proj", 2 * nq + 2 * nk + H, d),
        "conv1d.weight": (nq + 2 * nk, 1, 4),
        "conv1d.bias": (nq + 2 * nk,),
        "dt_bias": (H,),
        "A_log": (H,),
        "D": (H,),
        "norm.weight": (nq,),
        "B_norm.weight": (D,),
        "C_norm.weight": (D,),
        **linear("out_proj", d, nq),
    }
    full_attention = {**attention(), **linear("o_proj", d, nq, True)}
    gka = {
        **linear_attention(3),
        **linear("a_proj", H, d),
        **linear("b_proj", H, d, True),
        **linear("alpha_proj", H, d, True),
        **linear("proj_k.linearA", 3, nk),
        **linear("proj_k.linearB", nq, 3),
        **linear("proj_v.linearA", 3, nk),
        **linear("proj_v.linearB", nq, 3),
        "k_rep": (H, K),
        "v_rep": (H, K),
    }
    gdn = {
        **linear_attention(5),
        **linear("gk_proj", H, d),
        **linear("b_proj", H, d),
        "q_conv1d.bias": (nq,),
        "k_conv1d.bias": (nk,),
        "v_conv1d.bias": (nk,),
    }
    bmojo = {f"bmojo_attn.{n}": s for n, s in (full_attention | attention("_")).items()}
    bmojo |= {f"mamba.{n}": s for n, s in mamba.items()}
    wanted = {
        "model.embed_tokens.weight": (V, d),
        "model.norm.weight": (d,),
        "lm_head.weight": (V, d),
    }
    mixers = {
        "self_attn": full_attention,
        "swa": full_attention,
        "gka": gka,
        "gdn": gdn,
        "mamba": mamba,
        "bmojo_f": bmojo,
    }
    for i, (prefix, tensors) in enumerate(mixers.items()):
        layer = {f"{prefix}.{n}": s for n, s in tensors.items()}
        layer |= {"input_layernorm.weight": (d,), "post_attention_layernorm.weight": (d,)}
        layer |= {**linear("mlp.gate_proj", F, d), **linear("mlp.up_proj", F, d)}
        layer |= linear("mlp.down_proj", d, F)
        wanted |= {f"model.layers.{i}.{n}": s for n, s in layer.items()}
    assert shapes(FULL) == wanted


@pytest.mark.parametrize(
    ("field", "settings", "gone"),
    [
        ("gka", GKAConfig(use_v_conv=False), ["v_conv1d.weight"]),
        ("gka", GKAConfig(use_beta_gate=False), ["b_proj.weight", "b_proj.bias"]),
        ("gka", GKAConfig(use_alpha_connection=False), ["alpha_proj.weight", "alpha_proj.bias"]),
        ("gka", GKAConfig(use_gate=False), ["g_proj.weight"]),
        ("gka", GKAConfig(use_forgetting_gate=False), []),
        (
            "gdn",
            GDNConfig(use_short_conv=False, conv_bias=True),
            ["q_conv1d.weight", "k_conv1d.weight", "v_conv1d.weight"],
        ),
        ("gdn", GDNConfig(use_gate=False), ["g_proj.weight"]),
        ("mamba2", Mamba2Config(use_qk_norm=False), ["B_norm.weight", "C_norm.weight"]),
    ],
)
def test_switched_off_parts_have_no_tensors(field, settings, gone):
    kind, module = {"gka": ("GKA", "gka"), "gdn": ("GDN", "gdn"), "mamba2": ("M2", "mamba")}[field]
    base = HybridConfig.preset("tiny", layer_kinds=(kind,))
    less = dataclasses.replace(base, **{field: settings})
    difference = set(shapes(base)) ^ set(shapes(less))
    assert difference == {f"model.layers.0.{module}.{n}" for n in gone}


def test_low_rank_needs_groups():
    gka = GKAConfig(kv_proj_rank=3, kv_learnable_residual=True)
    grouped = HybridConfig.preset("tiny", layer_kinds=("GKA",), gka=gka)
    alone = dataclasses.replace(grouped, num_key_value_heads=4)
    assert any("proj_k.linearA" in n for n in shapes(grouped))
    assert not any("linearA" in n or "_rep" in n for n in shapes(alone))


def test_inner_mixers_and_tied_weights():
    for kind, module in (("GKA", "gka"), ("GDN", "gdn"), ("M2", "mamba")):
        bmojo = BMojoConfig(8, ssm_mixer=kind)
        config = HybridConfig.preset("tiny", layer_kinds=("BMF",), bmojo=bmojo)
        names = [n.removeprefix("model.layers.0.bmojo_f.") for n in shapes(config) if "bmojo" in n]
        assert {n.split(".")[0] for n in names} == {"bmojo_attn", module}
        assert not any("_." in n for n in names)
    tied = dataclasses.replace(FULL, tie_word_embeddings=True)
    assert set(shapes(FULL)) - set(shapes(tied)) == {"lm_head.weight"}


def test_parameter_counts_of_the_released_sizes():
    count = {n: table.num_parameters(HybridConfig.preset(n)) / 1e9 for n in ("8b", "32b")}
    assert 8.4 < count["8b"] < 8.6 and 33.5 < count["32b"] < 34.5
    bmojo = table.num_parameters(HybridConfig.preset("8b", mixer="BMF")) / 1e9
    assert 8.9 < bmojo < 9.5


def test_parameters_do_not_collide():
    paths = [e.path for e in table.entries(FULL)]
    assert len(set(paths)) == len(paths)
