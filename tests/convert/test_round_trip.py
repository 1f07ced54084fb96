"""Checkpoint -> arrays -> checkpoint: values, dtypes, shards, and everything that can be wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from hmf_jax import table
from hmf_jax.config import HybridConfig
from hmf_jax.convert import hf_to_jax, jax_to_hf
from hmf_jax.convert.safetensors_io import INDEX, SINGLE, Checkpoint
from tests.convert import synthetic
from tests.convert.synthetic import FULL

TIED = dataclasses.replace(FULL, tie_word_embeddings=True)


def load(directory, config: HybridConfig = FULL, **options):
    wanted = synthetic.abstract(config, **options)
    return read(directory, config, wanted, progress=False)


def read(directory, config: HybridConfig, wanted, **options):
    return hf_to_jax.load(
        directory,
        table.entries(config),
        wanted,
        aliases=table.aliases(config),
        copies=table.copies(config),
        **options,
    )


def save(directory, config: HybridConfig, params, **options):
    jax_to_hf.save(directory, config.to_dict(), table.entries(config), params, **options)


def stored_dtypes(directory, config: HybridConfig):
    aliases = table.aliases(config)
    return hf_to_jax.stored_dtypes(directory, table.entries(config), aliases=aliases)


def same_files(a: Path, b: Path) -> bool:
    one, two = Checkpoint(a), Checkpoint(b)
    assert one.dtypes() == two.dtypes()
    return all(one.read(n).tobytes() == two.read(n).tobytes() for n in one.tensors)


def test_where_each_tensor_goes(tmp_path):
    values = synthetic.save(tmp_path, FULL)
    params = {p: np.asarray(x) for p, x in load(tmp_path).items()}

    def hf(name: str) -> np.ndarray:
        return values[name]

    def equal(path: str, wanted: np.ndarray) -> None:
        np.testing.assert_array_equal(params[path], wanted)
        assert params[path].dtype == wanted.dtype

    equal("embed_tokens.embedding", hf("model.embed_tokens.weight"))
    equal("lm_head.kernel", hf("lm_head.weight").T)
    equal("norm.weight", hf("model.norm.weight"))
    equal("layers.0.mixer.q_proj.kernel", hf("model.layers.0.self_attn.q_proj.weight").T)
    equal("layers.0.mixer.q_proj.bias", hf("model.layers.0.self_attn.q_proj.bias"))
    equal("layers.1.mixer.k_norm.weight", hf("model.layers.1.swa.k_norm.weight"))
    equal("layers.1.mlp.down_proj.kernel", hf("model.layers.1.mlp.down_proj.weight").T)
    equal("layers.2.mixer.A_log", hf("model.layers.2.gka.A_log"))
    equal("layers.2.mixer.k_conv1d.weight", hf("model.layers.2.gka.k_conv1d.weight")[:, 0].T)
    equal("layers.2.mixer.proj_k.linearB.kernel", hf("model.layers.2.gka.proj_k.linearB.weight").T)
    equal("layers.2.mixer.v_rep", hf("model.layers.2.gka.v_rep"))
    equal("layers.3.mixer.v_conv1d.bias", hf("model.layers.3.gdn.v_conv1d.bias"))

    # Mamba2 rows z | x | B | C | dt and channels x | B | C: 64, 32, 32, 64, 4.
    for prefix, path in (
        ("model.layers.4.mamba", "layers.4.mixer"),
        ("model.layers.5.bmojo_f.mamba", "layers.5.mixer.inner"),
    ):
        rows = np.split(hf(f"{prefix}.in_proj.weight"), np.cumsum([64, 32, 32, 64]))
        for name, block in zip(["z", "x", "B", "C", "dt"], rows, strict=True):
            equal(f"{path}.{name}_proj.kernel", block.T)
        channels = np.split(hf(f"{prefix}.conv1d.weight")[:, 0], np.cumsum([32, 32]))
        biases = np.split(hf(f"{prefix}.conv1d.bias"), np.cumsum([32, 32]))
        for name, block, bias in zip(["x", "B", "C"], channels, biases, strict=True):
            equal(f"{path}.{name}_conv1d.weight", block.T)
            equal(f"{path}.{name}_conv1d.bias", bias)
        equal(f"{path}.norm.weight", hf(f"{prefix}.norm.weight"))

    attn = "model.layers.5.bmojo_f.bmojo_attn"
    equal("layers.5.mixer.bmojo_attn.v_proj_.kernel", hf(f"{attn}.v_proj_.weight").T)
    equal("layers.5.mixer.bmojo_attn.q_norm_.weight", hf(f"{attn}.q_norm_.weight"))
    assert len(params) == len(set(params)) == len(synthetic.abstract(FULL))


@pytest.mark.parametrize("max_shard_size", ["5GB", "60KB"])
@pytest.mark.parametrize("config", [FULL, TIED], ids=["untied", "tied"])
def test_round_trip_is_bit_exact(tmp_path, config, max_shard_size):
    synthetic.save(tmp_path / "in", config, max_shard_size=max_shard_size)
    params = load(tmp_path / "in", config)
    save(tmp_path / "out", config, params, max_shard_size=max_shard_size, progress=False)
    assert same_files(tmp_path / "in", tmp_path / "out")
    assert (tmp_path / "out" / INDEX).exists() == (max_shard_size != "5GB")
    written = HybridConfig.from_json(tmp_path / "out")
    assert dataclasses.replace(written, extra="{}") == config
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"


SMALL = dict(
    vocab_size=48, hidden_size=32, intermediate_size=40, num_hidden_layers=4,
    num_attention_heads=6, num_key_value_heads=2, head_dim=8, max_position_embeddings=64,
)  # fmt: skip
EXPERTS = dict(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=24)
NEXT = EXPERTS | dict(
    shared_expert_intermediate_size=16, linear_num_key_heads=2, linear_num_value_heads=6,
    linear_key_head_dim=8, linear_value_head_dim=8,
)  # fmt: skip
BASES = {
    "llama": dict(attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "qwen2": {},
    "ministral3": {},
    "qwen3_moe": EXPERTS | dict(mlp_only_layers=[1], decoder_sparse_step=2),
    "qwen3_next": NEXT,
    "qwen3_5_moe_text": NEXT | {"intermediate_size": None},
}


@pytest.mark.parametrize("base", BASES)
def test_base_models_come_back_with_the_names_of_their_family(tmp_path, base):
    config = HybridConfig.from_dict({"model_type": base, **SMALL, **BASES[base]})
    synthetic.save(tmp_path / "in", config)  # experts stacked, whatever the family
    save(tmp_path / "out", config, load(tmp_path / "in", config), progress=False)
    save(tmp_path / "again", config, load(tmp_path / "out", config), progress=False)
    assert same_files(tmp_path / "out", tmp_path / "again")
    one, two = Checkpoint(tmp_path / "in"), Checkpoint(tmp_path / "out")
    stacks = [name for name in one.tensors if name.endswith("experts.gate_up_proj")]
    assert len(stacks) == {"qwen3_moe": 1, "qwen3_next": 4, "qwen3_5_moe_text": 4}.get(base, 0)
    if base in ("qwen3_moe", "qwen3_next"):
        for name in stacks:
            parts = [
                two.read(name.replace("gate_up_proj", f"{e}.{half}_proj.weight"))
                for e in range(3)
                for half in ("gate", "up")
            ]
            assert np.concatenate(parts).tobytes() == one.read(name).tobytes()
    else:
        assert same_files(tmp_path / "in", tmp_path / "out")
    others = [name for name in one.tensors if ".experts." not in name]
    assert all(one.read(n).tobytes() == two.read(n).tobytes() for n in others)


def test_recorded_dtypes_come_back(tmp_path):
    config = HybridConfig.preset("tiny", layer_kinds=("M2",))
    values = synthetic.tensors(config)
    stored = ["bfloat16", "float16", "float32"]
    values = {n: v.astype(stored[i % 3]) for i, (n, v) in enumerate(values.items())}
    synthetic.save(tmp_path / "in", config, values)
    params = load(tmp_path / "in", config, dtype="float32")
    assert {x.dtype for x in params.values()} == {np.dtype("float32")}
    dtypes = stored_dtypes(tmp_path / "in", config)
    save(tmp_path / "out", config, params, dtypes=dtypes, progress=False)
    assert same_files(tmp_path / "in", tmp_path / "out")
    save(tmp_path / "plain", config, params, progress=False)
    assert set(Checkpoint(tmp_path / "plain").dtypes().values()) == {"F32"}


def test_double_precision_is_read_as_float32(tmp_path):
    values = {n: v.astype(np.float64) for n, v in synthetic.tensors(FULL).items()}
    synthetic.save(tmp_path, FULL, values)
    params = load(tmp_path, dtype="float32")
    wanted = values["lm_head.weight"].T.astype(np.float32)
    np.testing.assert_array_equal(np.asarray(params["lm_head.kernel"]), wanted)


def test_sharded_arrays_hold_their_parts(tmp_path):
    synthetic.save(tmp_path / "in", FULL)
    whole = load(tmp_path / "in")
    mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("x", "y"))
    split = load(tmp_path / "in", mesh=mesh)
    for path, x in split.items():
        np.testing.assert_array_equal(np.asarray(x), np.asarray(whole[path]), err_msg=path)
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(whole[path])[shard.index])
    kernel = split["layers.0.mlp.gate_proj.kernel"]
    assert {s.data.shape for s in kernel.addressable_shards} == {(64 // 4, 128 // 2)}
    save(tmp_path / "out", FULL, split, progress=False)
    assert same_files(tmp_path / "in", tmp_path / "out")


def test_all_problems_are_listed_at_once(tmp_path):
    values = synthetic.tensors(FULL)
    del values["model.layers.2.gka.a_proj.weight"]
    values["model.layers.2.gka.extra.weight"] = np.zeros(3, np.float32)
    values["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
    values["model.norm.weight"] = np.ones(63, np.float32)
    values["lm_head.weight"][3, 5] = np.nan
    values["model.layers.4.mamba.in_proj.weight"][-1, -1] = np.inf
    synthetic.save(tmp_path, FULL, values)
    with pytest.raises(ValueError) as error:
        load(tmp_path)
    lines = [line.strip() for line in str(error.value).split("\n")]
    assert lines[0] == f"{tmp_path}: 5 tensors do not fit the config:"
    assert set(lines[1:]) == {
        "missing: model.layers.2.gka.a_proj.weight [4, 64]",
        "unexpected: model.layers.2.gka.extra.weight",
        "wrong shape: model.norm.weight is [63], must be [64]",
        "not finite: lm_head.weight holds NaN or infinity",
        "not finite: model.layers.4.mamba.in_proj.weight holds NaN or infinity",
    }


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_only_non_finite(tmp_path, bad):
    values = synthetic.tensors(FULL)
    values["model.layers.5.bmojo_f.mamba.conv1d.bias"][-1] = bad
    values["model.layers.3.gdn.A_log"][0] = bad
    synthetic.save(tmp_path, FULL, values)
    with pytest.raises(ValueError, match="2 tensors do not fit") as error:
        load(tmp_path)
    assert "not finite: model.layers.3.gdn.A_log" in str(error.value)
    assert "not finite: model.layers.5.bmojo_f.mamba.conv1d.bias" in str(error.value)


def test_values_too_large_for_the_dtype(tmp_path):
    values = synthetic.tensors(FULL)
    values["model.norm.weight"] = np.full(64, 1e30, np.float32)
    synthetic.save(tmp_path, FULL, values)
    with pytest.raises(ValueError, match="not finite: model.norm.weight"):
        load(tmp_path, dtype="float16")


def test_quantized_tensors_are_refused(tmp_path):
    values = synthetic.save(tmp_path, FULL)
    file = tmp_path / SINGLE
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["lm_head.weight"]["dtype"] = "I16"
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    assert "lm_head.weight" in values
    with pytest.raises(ValueError, match="wrong dtype: lm_head.weight is I16; dequantize"):
        load(tmp_path)


def test_tied_embeddings(tmp_path):
    values = synthetic.tensors(TIED)
    embed = values["model.embed_tokens.weight"]
    synthetic.save(tmp_path / "absent", TIED, values)
    assert "lm_head.kernel" not in load(tmp_path / "absent", TIED)
    synthetic.save(tmp_path / "equal", TIED, values | {"lm_head.weight": embed})
    assert "lm_head.kernel" not in load(tmp_path / "equal", TIED)
    other = embed.copy()
    other[7, 7] += 1
    synthetic.save(tmp_path / "different", TIED, values | {"lm_head.weight": other})
    with pytest.raises(ValueError, match="lm_head.weight differs .* tie_word_embeddings is true"):
        load(tmp_path / "different", TIED)
    synthetic.save(tmp_path / "untied", FULL, {k: v for k, v in synthetic.tensors(TIED).items()})
    with pytest.raises(ValueError, match=r"missing: lm_head.weight \[320, 64\]"):
        load(tmp_path / "untied", FULL)


def test_sliding_window_layers_may_keep_the_name_of_attention(tmp_path):
    values = synthetic.tensors(FULL)
    old, new = "model.layers.1.self_attn.", "model.layers.1.swa."
    renamed = {n.replace(new, old): v for n, v in values.items()}
    synthetic.save(tmp_path / "variant", FULL, renamed)
    params = load(tmp_path / "variant")
    np.testing.assert_array_equal(
        params["layers.1.mixer.q_proj.kernel"], values[f"{new}q_proj.weight"].T
    )
    assert f"{new}q_proj.weight" in stored_dtypes(tmp_path / "variant", FULL)
    both = values | {n: v for n, v in renamed.items() if n.startswith(old)}
    synthetic.save(tmp_path / "both", FULL, both)
    with pytest.raises(ValueError, match=f"unexpected: {old}q_proj.weight"):
        load(tmp_path / "both")


def test_fused_checkpoints_get_a_hint(tmp_path):
    values = synthetic.tensors(FULL)
    values["model.layers.2.self_attn.q_proj.weight"] = np.zeros((64, 64), np.float32)
    synthetic.save(tmp_path, FULL, values)
    with pytest.raises(ValueError, match=r"layers.2.self_attn.q_proj.weight \(.* unfuse first\)"):
        load(tmp_path)


def test_a_model_that_does_not_fit_the_table(tmp_path):
    synthetic.save(tmp_path, FULL)
    wanted = synthetic.abstract(FULL)
    wanted["norm.weight"] = jax.ShapeDtypeStruct((3,), "float32")
    with pytest.raises(ValueError, match=r"norm.weight: table \(64,\), model \(3,\)"):
        read(tmp_path, FULL, wanted, progress=False)


def test_progress_shows_bytes(tmp_path, capsys):
    synthetic.save(tmp_path / "in", FULL)
    params = read(tmp_path / "in", FULL, synthetic.abstract(FULL))
    shown = capsys.readouterr().err
    assert "loading weights: 100%" in shown and "B/s" in shown
    save(tmp_path / "out", FULL, params)
    assert "writing weights: 100%" in capsys.readouterr().err
    load(tmp_path / "in")
    assert capsys.readouterr().err == ""


@pytest.fixture(scope="module")
def params(tmp_path_factory) -> dict[str, jax.Array]:
    directory = tmp_path_factory.mktemp("params")
    synthetic.save(directory, FULL)
    return load(directory)


def test_nothing_is_written_if_parameters_do_not_fit(tmp_path, params):
    bad = dict(params)
    bad["norm.weight"] = bad["norm.weight"][:5]
    bad["surplus"] = bad["lm_head.kernel"]
    del bad["layers.0.mixer.q_norm.weight"]
    with pytest.raises(ValueError, match="nothing written") as error:
        save(tmp_path / "out", FULL, bad, progress=False)
    for text in (
        "missing: layers.0.mixer.q_norm.weight",
        "unexpected: surplus",
        "wrong shape: norm.weight is (5,), must be (64,)",
    ):
        assert text in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_written_if_parameters_are_not_finite(tmp_path, params):
    bad = dict(params)
    bad["norm.weight"] = bad["norm.weight"].at[0].set(np.nan)
    bad["layers.4.mixer.dt_proj.kernel"] = bad["layers.4.mixer.dt_proj.kernel"].at[0, 0].set(np.inf)
    with pytest.raises(ValueError, match="nothing written") as error:
        save(tmp_path / "out", FULL, bad, progress=False)
    assert "not finite: model.norm.weight" in str(error.value)
    assert "not finite: model.layers.4.mamba.in_proj.weight" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_existing_directories(tmp_path, params):
    out = tmp_path / "out"

    def write(**options):
        save(out, FULL, params, progress=False, **options)

    out.mkdir()
    write()  # an empty directory is fine
    before = Checkpoint(out).tensors
    (out / "notes.txt").write_text("old")
    with pytest.raises(FileExistsError, match="is not empty; choose another directory or pass"):
        write()
    assert (out / "notes.txt").exists()
    write(overwrite=True)
    assert (out / "notes.txt").exists() and Checkpoint(out).tensors == before
    (out / "config.json").unlink()
    with pytest.raises(FileExistsError, match="holds no model that is known"):
        write(overwrite=True)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="is a file"):
        save(tmp_path / "file", FULL, params, progress=False)


def test_tokenizer_files_travel(tmp_path, params):
    source = tmp_path / "source"
    (source / "additional_chat_templates").mkdir(parents=True)
    names = [
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "additional_chat_templates/tool.jinja",
    ]
    for name in (*names, "optimizer.bin", "model.safetensors", "config.json"):
        (source / name).write_text(name)
    save(tmp_path / "out", FULL, params, companions=source, progress=False)
    assert all((tmp_path / "out" / n).read_text() == n for n in names)
    assert not (tmp_path / "out" / "optimizer.bin").exists()
    assert HybridConfig.from_json(tmp_path / "out").layer_kinds == FULL.layer_kinds


def test_unknown_target_dtype(tmp_path, params):
    with pytest.raises(ValueError, match="model.norm.weight: cannot write dtype 'I8'"):
        save(tmp_path / "out", FULL, params, dtypes={"model.norm.weight": "I8"}, progress=False)
