"""Stage 0: parameters as the original makes them, from checkpoints and from live models."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hmf_jax.config import BMojoConfig, GDNConfig, HybridConfig, SWAConfig
from hmf_jax.loading import from_pretrained, save_pretrained
from hmf_jax.mixers import all_sections
from hmf_jax.options import LinearHeads
from hmf_jax.parameters import flat_params
from hmf_jax.priming import (
    Origin,
    describe_plan,
    prime,
    prime_directory,
    primed_config,
    read_stage0,
    stage0_plan,
    teacher,
    unfuse,
)
from hmf_jax.priming.stage0 import _gate, _queries
from hmf_jax.sharding import make_mesh
from tests.families.tiny import tiny_family
from tests.goldens import _recipe, cases, expected, golden
from tests.util import random_model, rel, tiny_config

ALL = "GKA*-*DA-GDN*-M2*-BMF*-SWA*-*"
QUICK_FAMILIES = ("priming_qwen3_next",)


FAMILIES = [
    case if case in QUICK_FAMILIES else pytest.param(case, marks=pytest.mark.slow)
    for case in cases("priming", families=True)
    if isinstance(case, str)
]


def base_model(layers: int = 7, dtype=jnp.float32, **changes):
    return random_model(tiny_config(("*",) * layers, **changes), dtype)


def tokens(length: int = 12):
    return jnp.asarray(np.random.default_rng(0).integers(0, 64, (2, length)), jnp.int32)


@pytest.fixture(scope="module")
def base():
    return base_model()


@pytest.fixture(scope="module")
def fused(base):
    return prime(base, ALL, swa={"window_size": 5})


def save_base(directory: Path, recorded: dict) -> None:
    """The random base model that the recorded hybrids were made from."""
    config = recorded.get("base_config")
    if config is None:  # of Qwen3
        config = {k: v for k, v in recorded["config"].items() if not k.endswith("_config")}
        for name in ("hybrid_override_pattern", "layer_types"):
            del config[name]
        config |= {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    params = _recipe().build_base(recorded)
    save_file(params, directory / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("case", cases("priming") + FAMILIES)
@pytest.mark.parametrize("kind", ["fused", pytest.param("pure", marks=pytest.mark.slow)])
def test_parameters_equal_the_recorded_ones(kind, case, tmp_path):
    directory = golden(case)
    recorded = json.loads((directory / "case.json").read_text())[kind]
    save_base(tmp_path / "base", recorded)
    target = HybridConfig.from_dict(recorded["config"])
    sections = {
        section.attribute: target.sections[section.attribute]
        for section in all_sections()
        if section.key in recorded["config"]
    }
    pattern = recorded["config"]["hybrid_override_pattern"]
    options: Any = dict(dtype=jnp.float32, seed=3, progress=False)
    model = prime(tmp_path / "base", pattern, **sections, **options)
    assert dataclasses.replace(model.config, extra=target.extra) == target
    save_pretrained(model, tmp_path / "primed", progress=False)
    written = json.loads((tmp_path / "primed" / "config.json").read_text())
    assert {k: written.get(k) for k in recorded["config"]} == recorded["config"] | {
        "transformers_version": written.get("transformers_version")
    }
    actual = load_file(tmp_path / "primed" / "model.safetensors")
    wanted = {
        name.removeprefix(f"{kind}."): x
        for name, x in expected(directory).items()
        if name.startswith(f"{kind}.")
    }
    partly = {f"{name}.deterministic_rows" for name in recorded["partly"]}
    names = {name for name in wanted if name not in partly}
    assert names | set(recorded["random"]) | set(recorded["partly"]) == set(actual)
    for name in names:
        np.testing.assert_array_equal(actual[name], wanted[name], err_msg=name)
    for name, rows in recorded["partly"].items():
        fixed = wanted[f"{name}.deterministic_rows"]
        assert fixed.shape[0] == rows
        np.testing.assert_array_equal(actual[name][:rows], fixed, err_msg=name)
    unfused = unfuse(model) if kind == "fused" else model
    assert unfused.config.hybrid_override_pattern == recorded["unfused_pattern"]
    assert unfused.config.to_dict()["layer_types"] == recorded["unfused_layer_types"]


@pytest.mark.parametrize("repeat", ["rows", pytest.param("heads", marks=pytest.mark.slow)])
def test_gates_start_from_o_and_v(base, repeat):
    """(W_O^T + R(W_V)) / 2 in the [out, in] layout, entry by entry."""
    model = prime(base, ALL, repeat=repeat, swa={"window_size": 5})
    params, old = flat_params(model), flat_params(base)
    H, Hkv, D, d = 4, 2, 16, 32
    for layer, name in ((0, "mixer.g_proj"), (2, "mixer.g_proj"), (3, "mixer.z_proj")):
        o = np.asarray(old[f"layers.{layer}.mixer.o_proj.kernel"]).T  # W_O [d, H*D]
        v = np.asarray(old[f"layers.{layer}.mixer.v_proj.kernel"]).T  # W_V [Hkv*D, d]
        wanted = np.empty((H * D, d), np.float32)
        for row in range(H * D):
            head, channel = divmod(row, D)
            of_head = (head // (H // Hkv)) * D + channel
            source = row // (H // Hkv) if repeat == "rows" else of_head
            wanted[row] = (o[:, row] + v[source]) / 2
        np.testing.assert_allclose(params[f"layers.{layer}.{name}.kernel"], wanted.T, rtol=1e-6)


@pytest.mark.parametrize("repeat", ["rows", "heads"])
def test_order_of_a_gate(repeat):
    """Of numbers that say where they come from: channel c of key/value head k is 10 k + c."""
    v = jnp.asarray([[0.0, 1, 2, 10, 11, 12]] * 2)  # [d, Hkv D], d = 2, D = 3
    o = jnp.asarray(np.arange(24).reshape(12, 2) * 100.0)  # [H D, d], H = 4
    rows = {
        "rows": [0, 0, 1, 1, 2, 2, 10, 10, 11, 11, 12, 12],
        "heads": [0, 1, 2, 0, 1, 2, 10, 11, 12, 10, 11, 12],
    }[repeat]
    found = _gate(2, 3, repeat, jnp.float32, None)(o, v)
    np.testing.assert_array_equal(found, (np.asarray(o).T + np.asarray(rows)) / 2)


def test_queries_without_their_gates():
    """Each head has its queries first, then its gates; so have biases."""
    x = jnp.asarray([[0, 1, 10, 11, 2, 3, 12, 13]] * 3)  # [d, H 2 D], H = D = 2
    queries = _queries(2, jnp.float32, None)
    np.testing.assert_array_equal(queries(x), [[0, 1, 2, 3]] * 3)
    np.testing.assert_array_equal(queries(x[0]), [0, 1, 2, 3])


def plan_of(base: HybridConfig, pattern: str, **settings):
    return stage0_plan(base, primed_config(base, pattern, **settings))


def test_plan_of_a_base_with_output_gates_and_other_layers():
    kinds = ("*", "*", "*", "GDN", "GDN")
    base = tiny_family("qwen3_next", kinds, qkv_bias=True, gka=None)
    bmojo = BMojoConfig(4, False, "M2")
    plan = plan_of(base, "M2*-BMF*-SWA*-GDN>GKA-GDN", bmojo=bmojo)
    queries = {path: origin.sources for path, origin in plan.items() if origin.queries}
    assert queries == {
        "layers.0.mixer.C_proj.kernel": ("layers.0.mixer.q_proj.kernel",),
        **{
            f"layers.1.mixer.{part}.{name}": (f"layers.1.mixer.q_proj.{name}",)
            for part in ("bmojo_attn.q_proj", "bmojo_attn.q_proj_")
            for name in ("kernel", "bias")
        },
        "layers.1.mixer.inner.C_proj.kernel": ("layers.1.mixer.q_proj.kernel",),
    }
    for path in ("layers.2.mixer.q_proj.bias", "layers.0.teacher.q_proj.kernel"):
        assert plan[path] == Origin("copied", (path.replace("teacher", "mixer"),))
    for path, origin in plan.items():
        if re.match(r"layers\.(3\.teacher|4\.mixer)\.|layers\.\d\.mlp\.", path):
            assert origin == Origin("copied", (path.replace("teacher", "mixer"),))
    fresh = {p for p, o in plan.items() if o.how == "fresh" and p.startswith("layers.3.")}
    parts = ("alpha_proj.kernel", "alpha_proj.bias", "b_proj.bias")
    assert fresh == {f"layers.3.mixer.{part}" for part in parts}


def test_plan_of_a_base_without_biases():
    """All of a Gated DeltaNet that can start from attention does; biases of B'MOJO-F are zero."""
    base = tiny_family("ministral3", ("*", "*"))
    plan = plan_of(base, "GDN*-BMF*", bmojo=BMojoConfig(4, True, "GDN"))
    for prefix in ("layers.0.mixer.", "layers.1.mixer.inner."):
        assert plan[f"{prefix}g_proj.kernel"].how == "initialised"
        assert all(plan[f"{prefix}{s}_proj.kernel"].how == "copied" for s in "qkvo")
    biases = [path for path in plan if path.startswith("layers.1.mixer.bmojo") and "bias" in path]
    assert len(biases) == 3 and all(plan[path].how == "fresh" for path in biases)
    assert not any("norm" in path for path in plan if ".bmojo_attn." in path)


def test_attention_with_other_heads_than_the_linear_layers():
    base = tiny_family("qwen3_next", ("*", "GDN"))
    message = (
        r"layer 0: the base has attention there, 4 query and 1 key/value heads of 16 channels; its "
        r"GKA and GDN layers have 2 query, 2 key and 4 value heads of 8, and can only start from"
    )
    for pattern in ("GKA*-GDN", "GDN-GDN", "BMF*-GDN>GKA"):
        with pytest.raises(ValueError, match=message):
            plan_of(base, pattern, bmojo=BMojoConfig(4, True, "GKA"))
    with pytest.raises(ValueError, match=r"layer 1: the base has 'GDN' there, '\*' cannot start"):
        plan_of(base, "*DA-*DA")
    same = LinearHeads(num_key_heads=4, num_value_heads=4, head_dim=16)
    base = tiny_family("qwen3_next", ("*",), num_key_value_heads=4, linear=same)
    plan = plan_of(base, "GKA*")
    assert plan["layers.0.mixer.q_proj.kernel"].queries
    assert plan["layers.0.mixer.k_proj.kernel"].how == "copied"


def test_settings_that_are_not_given_are_those_of_the_base():
    base = tiny_family("qwen3_next", ("*", "GDN"), rms_norm_eps=1e-4, gka=None)
    config = primed_config(base, "*-GDN>GKA", gdn={"use_gate": True}, gka={"num_iter": 5})
    assert config.gdn == GDNConfig(conv_size=3, norm_eps=1e-4)
    assert config.gka.norm_eps == 1e-4 and config.gka.conv_size == 3 and config.gka.num_iter == 5
    config = primed_config(base, "*-GDN>GKA", gka={"norm_eps": 1e-3})
    assert config.gka.norm_eps == 1e-3


def test_a_fused_model_holds_its_base_and_shares_nothing_with_it(base):
    before = {path: np.asarray(x) for path, x in flat_params(base).items()}
    fused = prime(base, ALL, swa={"window_size": 5})
    found = teacher(fused)
    assert found.config.layer_kinds == ("*",) * 7
    for path, x in flat_params(found).items():
        np.testing.assert_array_equal(x, before[path], err_msg=path)
    np.testing.assert_array_equal(found(tokens())[0], base(tokens())[0])
    for x in flat_params(fused).values():
        x.delete()  # as the training step does
    assert np.isfinite(base(tokens())[0]).all()


def test_the_student_is_what_the_model_computes():
    fused = prime(base_model(3), "*DA-M2*-*", swa={"window_size": 5})
    hybrid = unfuse(fused)
    assert hybrid.config.layer_kinds == ("*", "M2", "*")
    np.testing.assert_array_equal(hybrid(tokens())[0], fused(tokens())[0])
    state = fused.init_state(2, 16)
    assert rel(fused(tokens(), state=state)[0], fused(tokens())[0]) < 1e-4


def test_fresh_parameters_depend_on_seed_and_layer():
    base = base_model(2)
    one, same, other = (flat_params(prime(base, "GKA-GKA", seed=seed)) for seed in (1, 1, 2))
    a_proj, conv = "layers.0.mixer.a_proj.kernel", "layers.0.mixer.q_conv1d.weight"
    for path in one:
        np.testing.assert_array_equal(one[path], same[path])
    assert (one[a_proj] != one["layers.1.mixer.a_proj.kernel"]).any()
    assert (one[a_proj] != other[a_proj]).any() and (one[conv] != other[conv]).any()
    assert (one["layers.0.mixer.g_proj.kernel"] == other["layers.0.mixer.g_proj.kernel"]).all()


def test_dtype(fused):
    """Of the mixers with parameters that stay exact, one of them inside of B'MOJO-F."""
    params = flat_params(prime(base_model(2), "BMF-M2", dtype=jnp.bfloat16))
    assert {"A_log", "dt_bias", "D"} <= {path.rsplit(".", 1)[-1] for path in params}
    for path, x in params.items():
        exact = path.rsplit(".", 1)[-1] in ("A_log", "dt_bias", "D")
        assert x.dtype == (jnp.float32 if exact else jnp.bfloat16), path
    assert flat_params(fused)["norm.weight"].dtype == jnp.float32


def test_biases_are_copied_where_both_sides_have_one():
    plan = plan_of(tiny_config(("*",) * 3, attention_bias=True), "GKA-BMF-SWA")
    assert "layers.0.mixer.q_proj.bias" not in plan
    for path in ("layers.1.mixer.bmojo_attn.o_proj.bias", "layers.2.mixer.v_proj.bias"):
        assert plan[path] == Origin("copied", (path.replace("bmojo_attn.", ""),))


def test_gka_starts_from_gated_delta_net():
    base = random_model(tiny_config(("GDN", "*", "GDN")), jnp.float32)
    fused = prime(base, "GDN>GKA-*DA-GDN")
    params, old = flat_params(fused), flat_params(base)
    same = ["q_proj.kernel", "g_proj.kernel", "b_proj.kernel", "v_conv1d.weight", "A_log"]
    for new, source in [(n, n) for n in same] + [("a_proj.kernel", "gk_proj.kernel")]:
        np.testing.assert_array_equal(
            params[f"layers.0.mixer.{new}"], old[f"layers.0.mixer.{source}"]
        )
    assert (params["layers.0.mixer.b_proj.bias"] == 0).all()
    np.testing.assert_array_equal(teacher(fused)(tokens())[0], base(tokens())[0])


@pytest.mark.slow
def test_on_a_mesh(tmp_path):
    save_pretrained(base_model(2), tmp_path / "base", progress=False)
    mesh = make_mesh(fsdp=2, tp=2, devices=jax.devices()[:4])
    options: Any = dict(dtype=jnp.float32, progress=False)
    plain = flat_params(prime(tmp_path / "base", "GKA*-M2*", **options))
    assert len({x.unsafe_buffer_pointer() for x in plain.values()}) == len(plain)
    model = prime(tmp_path / "base", "GKA*-M2*", mesh=mesh, **options)
    assert model.mesh is not None
    for path, x in flat_params(model).items():
        assert len(x.sharding.device_set) == 4, path
        np.testing.assert_allclose(x, plain[path], rtol=1e-5, atol=1e-6, err_msg=path)


def test_round_trip_of_a_fused_model(fused, tmp_path):
    save_pretrained(fused, tmp_path / "fused", progress=False)
    stored = load_file(tmp_path / "fused" / "model.safetensors")
    for name in ("0.gka", "0.self_attn", "1.self_attn", "4.bmojo_f.bmojo_attn", "5.swa"):
        assert f"model.layers.{name}.q_proj.weight" in stored
    config = json.loads((tmp_path / "fused" / "config.json").read_text())
    assert config["hybrid_override_pattern"] == ALL
    again = from_pretrained(tmp_path / "fused", dtype=None, progress=False)
    assert dataclasses.replace(again.config, extra=fused.config.extra) == fused.config
    for path, x in flat_params(again).items():
        np.testing.assert_array_equal(x, flat_params(fused)[path], err_msg=path)
    save_pretrained(unfuse(again), tmp_path / "hybrid", progress=False)
    left = load_file(tmp_path / "hybrid" / "model.safetensors")
    kept = {n: x for n, x in stored.items() if ".self_attn." not in n or n.split(".")[2] in "16"}
    assert left.keys() == kept.keys()
    for name, x in kept.items():
        np.testing.assert_array_equal(left[name], x, err_msg=name)


def test_plan_says_what_comes_from_where(base):
    model = prime(base, "GKA*-*DA-M2-*-*-*-*")
    plan = stage0_plan(base.config, model.config)
    assert plan.keys() == flat_params(model).keys()
    assert plan["layers.0.teacher.q_norm.weight"].sources == ("layers.0.mixer.q_norm.weight",)
    assert plan["layers.2.mixer.C_proj.kernel"].sources == ("layers.2.mixer.q_proj.kernel",)
    assert plan["layers.0.mixer.g_proj.kernel"].how == "initialised"
    assert plan["layers.0.mixer.a_proj.kernel"].how == "fresh"
    text = describe_plan(plan, model.config)
    total = sum(int(n.replace(",", "")) for n in re.findall(r"([\d,]+) parameters", text))
    assert total == sum(x.size for x in flat_params(model).values())
    assert "GKA*: g_proj.kernel" in text and "alpha_proj.bias" in text


def test_yaml_of_the_original(tmp_path):
    save_pretrained(base_model(2), tmp_path / "base", progress=False)
    (tmp_path / "base" / "tokenizer.json").write_text("{}")
    (tmp_path / "stage0.yaml").write_text(
        f"base_model_name_or_path: {tmp_path / 'base'}\n"
        "hybrid_override_pattern: GKA*-BMF*\n"
        f"output_dir: {tmp_path / 'out'}\n"
        "dtype: bf16\n"
        "gka: {num_iter: 7}\n"
        "bmojo: {window_size: 16, ssm_mixer: gka, tie_attn_weights: false}\n"
    )
    said = []
    prime_directory(**read_stage0(tmp_path / "stage0.yaml"), progress=False, report=said.append)
    config = HybridConfig.from_json(tmp_path / "out")
    assert config.gka is not None and config.gka.num_iter == 7
    assert config.bmojo == BMojoConfig(16, False, "GKA")
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    for name, x in load_file(tmp_path / "out" / "model.safetensors").items():
        exact = name.rsplit(".", 1)[-1] in ("A_log", "dt_bias")  # the base is float32
        assert x.dtype == ("float32" if exact else "bfloat16"), name
    assert "*-* -> GKA*-BMF*" in said[0]
    with pytest.raises(FileExistsError, match="out exists"):
        prime_directory(**read_stage0(tmp_path / "stage0.yaml"), progress=False)
    (tmp_path / "bad.yaml").write_text("pattern: GKA*\n")
    with pytest.raises(
        ValueError, match=r"bad.yaml: unknown field 'pattern'; known are base_model"
    ):
        read_stage0(tmp_path / "bad.yaml")


@pytest.mark.parametrize(
    ("pattern", "settings", "message"),
    [
        ("GKA*-*DA-*DA", {}, "the pattern has 3 symbols but the base has 2 layers"),
        ("GKA*", {}, "the pattern has 1 symbols but the base has 2"),
        ("GKA*-XYZ", {}, "layer 1 has the unknown symbol 'XYZ'"),
        ("BMF*-*DA", {}, "give their settings, bmojo="),
        ("SWA*-*DA", {}, "set swa_config.window_size"),
        ("SWA*-*DA", {"swa": {}}, "swa needs window_size"),
        ("GKA*-*DA", {"gka": {"iterations": 3}}, "gka has no iterations; its settings are"),
        ("GKA*-*DA", {"gka": {"num_iter": -1}}, "num_iter must be an integer >= 0"),
        ("GKA*-*DA", {"gka": 3}, "gka must be a GKAConfig or a dict"),
        ("GKA*-*DA", {"repeat": "columns"}, "repeat='columns' is unknown"),
        ("GDN>GKA-*DA", {}, "layer 0: the teacher of 'GDN>GKA' is 'GDN', but the base has '\\*'"),
    ],
)
def test_bad_patterns_and_settings(pattern, settings, message):
    base = random_model(tiny_config(("*", "*"), swa=None, bmojo=None), jnp.float32)
    with pytest.raises(ValueError, match=message):
        prime(base, pattern, **settings)


def test_bases_that_cannot_be_primed(base, fused, tmp_path):
    with pytest.raises(ValueError, match="fused stage-1 model: unfuse it first"):
        prime(fused, ALL)
    with pytest.raises(ValueError, match=r"layer 2: the base has 'M2' there, 'GKA' cannot start"):
        prime(random_model(tiny_config(("*", "*", "M2")), jnp.float32), "*-*-GKA")
    windowed = random_model(tiny_config(("SWA", "SWA")), jnp.float32)
    with pytest.raises(ValueError, match=r"the teacher of '\*DA' is '\*', but the base has 'SWA'"):
        prime(windowed, "*DA-GKA")
    assert prime(windowed, "SWA-GKA").config.layer_kinds == ("SWA", "GKA")
    mixed = random_model(tiny_config(("GDN", "*"), gdn=GDNConfig(conv_size=3)), jnp.float32)
    with pytest.raises(
        ValueError, match=r"layers.0.mixer.q_conv1d.weight is \(4, 64\), .* \(3, 64\)"
    ):
        prime(mixed, "GKA-*")

    save_pretrained(base, tmp_path / "base", progress=False)
    file = tmp_path / "base" / "model.safetensors"
    tensors = load_file(file)
    del (
        tensors["model.layers.1.mlp.up_proj.weight"],
        tensors["model.layers.3.self_attn.k_norm.weight"],
    )
    save_file(tensors, file)
    with pytest.raises(ValueError, match="missing: ") as error:
        prime_directory(tmp_path / "base", ALL, tmp_path / "out", swa=SWAConfig(5), progress=False)
    assert "model.layers.1.mlp.up_proj.weight" in str(error.value)
    assert "model.layers.3.self_attn.k_norm.weight" in str(error.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(FileNotFoundError):
        prime(tmp_path / "nowhere", ALL)
