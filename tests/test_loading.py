"""from_pretrained and the two ways of saving, with the real model."""

from __future__ import annotations

import dataclasses
import json
import shutil
import types
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from hmf_jax import HybridConfig, HybridLM, make_mesh
from hmf_jax.config import GKAConfig
from hmf_jax.convert.safetensors_io import Checkpoint
from hmf_jax.loading import convert_directory, from_pretrained, save_orbax, save_pretrained
from hmf_jax.parameters import abstract_params, flat_params
from tests.convert import synthetic

CONFIG = HybridConfig.preset("tiny", layer_kinds=("*", "GKA", "M2"))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("source")
    synthetic.save(directory, CONFIG, max_shard_size="100KB")
    (directory / "tokenizer.json").write_text("{}")
    return directory


@pytest.fixture(scope="module")
def model(source) -> HybridLM:
    return load(source)


def load(directory: str | Path, **options) -> HybridLM:
    return from_pretrained(directory, progress=False, **options)


def assert_equal(a: HybridLM, b: HybridLM) -> None:
    one, two = flat_params(a), flat_params(b)
    assert one.keys() == two.keys()
    for path, x in one.items():
        assert x.dtype == two[path].dtype, path
        np.testing.assert_array_equal(np.asarray(x), np.asarray(two[path]), err_msg=path)


def same_files(a: Path, b: Path) -> bool:
    one, two = Checkpoint(a), Checkpoint(b)
    assert one.dtypes() == two.dtypes()
    return all(one.read(n).tobytes() == two.read(n).tobytes() for n in one.tensors)


def test_a_loaded_model_runs(source, model):
    values = synthetic.tensors(CONFIG)
    assert model.dtype == jnp.bfloat16 and model.source == str(source)
    assert dataclasses.replace(model.config, extra="{}") == CONFIG
    params = flat_params(model)
    np.testing.assert_array_equal(
        params["layers.1.mixer.q_proj.kernel"], values["model.layers.1.gka.q_proj.weight"].T
    )
    for path, x in params.items():
        float32 = path.rsplit(".", 1)[-1] in ("A_log", "dt_bias", "D")
        assert x.dtype == (jnp.float32 if float32 else jnp.bfloat16), path
    logits, _ = jax.jit(lambda m, t: m(t))(model, jnp.arange(6)[None])
    assert logits.shape == (1, 6, 320) and bool(jnp.isfinite(logits).all())


def test_a_model_with_every_option_fits_the_table():
    model = nnx.eval_shape(lambda: HybridLM(synthetic.FULL))
    wanted = {p: (a.shape, a.dtype) for p, a in synthetic.abstract(synthetic.FULL).items()}
    found = {p: (a.shape, a.dtype) for p, a in abstract_params(model, None).items()}
    assert found == wanted


def test_hugging_face_round_trip_is_bit_exact(tmp_path, source, model):
    save_pretrained(model, tmp_path / "out", progress=False)
    assert same_files(source, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert_equal(load(tmp_path / "out"), model)


def test_stored_dtypes_survive(tmp_path):
    """A bfloat16 A_log is held in float32 and saved as bfloat16 again; mixed dtypes are kept."""
    values = synthetic.tensors(CONFIG)
    values = {n: v.astype("bfloat16") for n, v in values.items()}
    values["model.norm.weight"] = values["model.norm.weight"].astype(np.float32)
    synthetic.save(tmp_path / "in", CONFIG, values)
    for dtype in (None, "auto"):
        model = load(tmp_path / "in", dtype=dtype)
        assert model.dtype == jnp.bfloat16
        for path, x in flat_params(model).items():
            float32 = path.rsplit(".", 1)[-1] in ("A_log", "dt_bias", "D") or path == "norm.weight"
            assert x.dtype == (jnp.float32 if float32 else jnp.bfloat16), path
    save_pretrained(model, tmp_path / "out", progress=False)
    assert same_files(tmp_path / "in", tmp_path / "out")
    save_orbax(model, tmp_path / "orbax")
    again = load(tmp_path / "orbax", dtype="auto")
    assert_equal(again, model)
    save_pretrained(again, tmp_path / "back", progress=False)
    assert same_files(tmp_path / "in", tmp_path / "back")


def test_float32(source):
    params = flat_params(load(source, dtype=jnp.float32))
    assert {x.dtype for x in params.values()} == {jnp.dtype(jnp.float32)}


def test_the_threads_that_read_know_the_callers_context(source):
    with jax.enable_x64(True), jax.default_device(jax.devices()[3]):
        params = flat_params(load(source, dtype=jnp.float64))
    assert params["lm_head.kernel"].dtype == jnp.dtype("float64")
    assert all(x.devices() == {jax.devices()[3]} for x in params.values())


def test_num_iter(source, tmp_path):
    config = load(source, num_iter=0).config
    assert config.gka == GKAConfig(num_iter=0)
    with pytest.raises(ValueError, match="num_iter=-1 must be a whole number"):
        load(source, num_iter=-1)
    synthetic.save(tmp_path, HybridConfig.preset("tiny", layer_kinds=("*",)))
    with pytest.raises(ValueError, match="has no GKA layers: leave num_iter out"):
        load(tmp_path, num_iter=3)


def test_config_overrides(source, tmp_path):
    """A longer context: the angles of RoPE change, no weight does, and the model keeps it."""
    changes = {"rope_parameters.rope_theta": 5e6, "max_position_embeddings": 8192}
    model, plain = load(source, config_overrides=changes), load(source)
    assert_equal(model, plain)
    assert model.config.rope.theta == 5e6 and model.config.max_position_embeddings == 8192
    tokens = jnp.arange(8)[None]
    assert (model(tokens)[0] != plain(tokens)[0]).any()
    save_pretrained(model, tmp_path / "long", progress=False)
    assert HybridConfig.from_json(tmp_path / "long").rope.theta == 5e6


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"tp": 2}, marks=pytest.mark.slow),
        {"fsdp": 4, "tp": 2},
        pytest.param({"dp": 2, "tp": 4}, marks=pytest.mark.slow),
    ],
)
def test_loading_onto_a_mesh(source, model, sizes):
    count = int(np.prod(list(sizes.values())))
    mesh = make_mesh(**sizes, devices=jax.devices()[:count])
    split = load(source, mesh=mesh)
    assert_equal(split, model)
    tp, fsdp = sizes["tp"], sizes.get("fsdp", 1)
    params = flat_params(split)

    def shard(path: str) -> tuple[int, ...]:
        (shape,) = {s.data.shape for s in params[path].addressable_shards}
        return shape

    assert shard("layers.0.mlp.gate_proj.kernel") == (64 // fsdp, 128 // tp)
    assert shard("layers.1.mixer.q_proj.kernel") == (64 // fsdp, 64 // tp)
    assert shard("layers.1.mixer.k_proj.kernel") == (64 // fsdp, 32 // min(tp, 2))
    assert shard("layers.1.mixer.A_log") == (4 // tp,)
    assert shard("layers.2.mixer.out_proj.kernel") == (64 // tp, 64 // fsdp)
    assert shard("norm.weight") == (64,)


@pytest.mark.slow
def test_orbax_restores_on_another_mesh(tmp_path, source, model):
    mesh = make_mesh(fsdp=2, tp=4)
    save_orbax(load(source, mesh=mesh), tmp_path / "orbax")
    assert (tmp_path / "orbax" / "tokenizer.json").exists()
    assert_equal(load(tmp_path / "orbax"), model)
    other = load(tmp_path / "orbax", mesh=make_mesh(tp=2, devices=jax.devices()[:2]))
    assert_equal(other, model)
    kernel = flat_params(other)["layers.1.mixer.q_proj.kernel"]
    assert {s.data.shape for s in kernel.addressable_shards} == {(64, 32)}
    float32 = flat_params(load(tmp_path / "orbax", dtype=jnp.float32))
    np.testing.assert_array_equal(
        float32["lm_head.kernel"], np.asarray(flat_params(model)["lm_head.kernel"], np.float32)
    )
    save_pretrained(other, tmp_path / "hf", progress=False)
    assert same_files(source, tmp_path / "hf")


def test_orbax_that_does_not_fit_its_config(tmp_path, model):
    save_orbax(model, tmp_path)
    data = json.loads((tmp_path / "config.json").read_text())
    data |= {"tie_word_embeddings": True, "vocab_size": 128}
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="config.json has changed since it was saved"):
        load(tmp_path)
    (tmp_path / "checksums.sha256").unlink()
    with pytest.raises(ValueError, match="unexpected: lm_head.kernel") as error:
        load(tmp_path)
    assert "wrong shape: embed_tokens.embedding is [320, 64]" in str(error.value)
    data["hybrid_override_pattern"] = "*-GKA-GDN"
    (tmp_path / "config.json").write_text(json.dumps(data))
    with pytest.raises(ValueError, match="missing: layers.2.mixer.gk_proj.kernel"):
        load(tmp_path)


def test_saving_nan_or_over_something_else(tmp_path, source, model):
    broken = load(source)
    broken.norm.weight[...] = jnp.full(64, jnp.nan, jnp.bfloat16)
    for save, name in ((save_orbax, "norm.weight"), (save_pretrained, "model.norm.weight")):
        with pytest.raises(ValueError, match=f"nothing written.*\n?.*not finite: {name}"):
            save(broken, tmp_path / "out")
        assert not (tmp_path / "out").exists()
        save(model, tmp_path / save.__name__)
        with pytest.raises(FileExistsError, match="pass overwrite=True"):
            save(model, tmp_path / save.__name__)
        save(model, tmp_path / save.__name__, overwrite=True)
        assert_equal(load(tmp_path / save.__name__), model)


def test_a_model_that_was_never_saved(tmp_path):
    fresh = HybridLM(CONFIG)
    save_pretrained(fresh, tmp_path / "out", progress=False)
    assert_equal(load(tmp_path / "out"), fresh)
    stored = Checkpoint(tmp_path / "out").dtypes()
    assert stored["model.layers.1.gka.A_log"] == "F32" and stored["lm_head.weight"] == "BF16"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "bf16"}, "dtype='bf16' is none that models compute in; choose"),
        ({"dtype": "int32"}, "dtype='int32' is none that"),
        ({"dtype": 3}, "dtype=3 is none that"),
        ({"dtype": "float8_e4m3fn"}, "dtype='float8_e4m3fn' is none that"),
        ({"dtype": "float64"}, "dtype=float64 needs jax_enable_x64"),
        ({"mesh": {"tp": 2}}, "mesh must be a jax.sharding.Mesh, see hmf_jax.make_mesh"),
        ({"revision": "main"}, "revision='main' is for repositories, and .* is a directory here"),
        ({"num_iter": 1001}, "num_iter.* 1000"),
        ({"num_iter": 10**9}, "num_iter.* 1000"),
        ({"num_iter": True}, "num_iter"),
        ({"num_iter": "3"}, "num_iter"),
        ({"num_iter": 2.5}, "num_iter"),
    ],
)
def test_arguments_that_mean_nothing(source, options, message):
    with pytest.raises(ValueError, match=message):
        load(source, **options)


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        (["adapter_config.json"], ValueError, "holds LoRA adapters.*hmf_jax.training.load_lora"),
        (["model.Q4_K_M.gguf"], ValueError, "holds a GGUF.*`hmf-jax convert .*Q4_K_M.gguf DIR`"),
        (["model/config.json"], FileNotFoundError, "holds no config.json; .*/model does"),
        (["pytorch_model.bin"], FileNotFoundError, "config.json does not exist"),
        ([], FileNotFoundError, "config.json does not exist"),
    ],
)
def test_directories_of_something_else(tmp_path, files, error, message):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("{}")
    with pytest.raises(error, match=message):
        load(tmp_path)


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_no_name(name):
    with pytest.raises(FileNotFoundError, match="is not the name of a directory or repository"):
        load(name)


def test_saving_over_the_directory_it_came_from(tmp_path, source):
    """Its own notes stay; converting it in place replaces the weights by the other format."""
    here = tmp_path / "model"
    shutil.copytree(source, here)
    (here / "README.md").write_text("mine")
    (here / "notes").mkdir()
    own = load(here)
    save_pretrained(own, here, overwrite=True, progress=False)
    assert same_files(source, here) and (here / "README.md").read_text() == "mine"
    assert convert_directory(here, here, overwrite=True, progress=False) == "orbax"
    assert not list(here.glob("*.safetensors")) and (here / "notes").is_dir()
    assert (here / "tokenizer.json").exists() and list(tmp_path.iterdir()) == [here]
    assert_equal(load(here), own)
    assert convert_directory(here, here, overwrite=True, progress=False) == "hf"
    assert same_files(source, here) and not (here / "params").exists()
    assert not (here / "checksums.sha256").exists()


def test_a_target_is_checked_before_the_work(tmp_path, source, monkeypatch):
    def never(*_, **__):
        raise AssertionError("loaded")

    (tmp_path / "file").write_text("x")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("x")
    monkeypatch.setattr("hmf_jax.loading.from_pretrained", never)
    cases: list[tuple[str, dict[str, Any], type[Exception], str]] = [
        ("file", {}, FileExistsError, "is a file"),
        ("other", {"overwrite": True}, FileExistsError, "holds no model that is known"),
        ("new", {"max_shard_size": "huge"}, ValueError, "is not a size"),
        ("new", {"to": "gguf"}, ValueError, "to must be 'orbax', 'hf' or None"),
    ]
    for target, options, error, message in cases:
        with pytest.raises(error, match=message):
            convert_directory(source, tmp_path / target, progress=False, **options)


def test_a_source_that_is_gone(tmp_path, model):
    with pytest.raises(FileNotFoundError, match="source=.*nowhere is not a directory"):
        save_pretrained(model, tmp_path / "out", source=tmp_path / "nowhere")
    lost = jax.tree.map(lambda x: x, model)
    lost.source = str(tmp_path / "nowhere")
    with pytest.warns(UserWarning, match="nowhere, which the model was loaded from, is gone"):
        save_pretrained(lost, tmp_path / "out", progress=False)


def test_tokenizer_files_that_are_links_to_elsewhere(tmp_path, source, model):
    shutil.copytree(source, tmp_path / "in")
    (tmp_path / "secret").write_text("key")
    (tmp_path / "in" / "tokenizer.model").symlink_to(tmp_path / "secret")
    for save in (save_pretrained, save_orbax):
        with pytest.raises(ValueError, match="tokenizer.model is a symbolic link that leads out"):
            save(model, tmp_path / "out", source=tmp_path / "in")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["manifest.ocdbt", "_METADATA"])
def test_a_damaged_orbax_directory_is_one_line(tmp_path, model, name, capfd):
    save_orbax(model, tmp_path)
    file = tmp_path / "params" / name
    file.write_bytes(file.read_bytes()[:10])
    with pytest.raises(ValueError, match=f"params/{name} has changed since it was saved"):
        load(tmp_path)
    (tmp_path / "checksums.sha256").unlink()
    with pytest.raises(ValueError, match="params is damaged or incomplete") as error:
        load(tmp_path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def remove(pattern: str):
    return lambda directory: [path.unlink() for path in directory.glob(pattern)]


def truncate(directory: Path) -> None:
    file = next(directory.glob("model-00001*"))
    file.write_bytes(file.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (remove("config.json"), FileNotFoundError, "config.json does not exist"),
        (remove("model*"), FileNotFoundError, r"lacks model\*\.safetensors files; download"),
        (remove("model-00002*"), FileNotFoundError, "lacks model-00002-of-.*; download"),
        (truncate, ValueError, "model-00001-of-.* is truncated: .*download it again"),
    ],
)
def test_incomplete_directories(tmp_path, source, damage, error, message):
    shutil.copytree(source, tmp_path / "copy")
    damage(tmp_path / "copy")
    with pytest.raises(error, match=message):
        load(tmp_path / "copy")


def test_nan_weights(tmp_path):
    values = synthetic.tensors(CONFIG)
    values["model.layers.1.gka.o_proj.weight"][0, 0] = np.nan
    synthetic.save(tmp_path, CONFIG, values)
    with pytest.raises(ValueError, match="not finite: model.layers.1.gka.o_proj.weight"):
        load(tmp_path)


def test_a_tensor_parallel_size_that_does_not_divide(source):
    with pytest.raises(ValueError, match="tp=3 does not divide"):
        load(source, mesh=make_mesh(tp=3, devices=jax.devices()[:3]))


def test_names_that_are_no_model(tmp_path, source):
    with pytest.raises(FileNotFoundError, match="nor a Hugging Face repository id"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="nor a Hugging Face repository id"):
        load("./nowhere/model")
    with pytest.raises(FileNotFoundError, match="is a file; pass the directory that holds it"):
        load(source / "config.json")


def test_a_repository_is_downloaded_once_into_the_cache(tmp_path, source, model, monkeypatch):
    """A repository that is in the cache loads without a network; one that is not says so."""
    cached = tmp_path / "models--org--tiny"
    shutil.copytree(source, cached / "snapshots" / "abc")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("abc")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    assert_equal(load("org/tiny"), model)
    with pytest.raises(FileNotFoundError, match="org/other is not in the local cache and"):
        load("org/other")
    with pytest.raises(FileNotFoundError, match="not in the local cache"):
        load("org/tiny", revision="v2")


def test_download_arguments_and_errors(source, model, monkeypatch):
    calls = []

    def download(repo: str, **options):
        calls.append((repo, options))
        return str(source)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert_equal(load("org/tiny", revision="v1"), model)
    ((repo, options),) = calls
    assert repo == "org/tiny" and options["revision"] == "v1"
    assert "*.safetensors" in options["allow_patterns"]
    assert not any("bin" in p for p in options["allow_patterns"])

    response: Any = types.SimpleNamespace(headers={}, status_code=404, request=None)
    for error, message in (
        (RepositoryNotFoundError("404", response=response), "hf auth login"),
        (LocalEntryNotFoundError("offline"), "cannot be reached"),
        (OSError(28, "No space left on device"), "download of org/tiny stopped .*No space left"),
        (RuntimeError("peer closed\nconnection"), r"stopped \(peer closed\); try again"),
    ):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(OSError, match=message):
            load("org/tiny")
