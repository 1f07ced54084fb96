"""YAML files and their fields: read as people write them, or refused in one line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hmf_jax.priming import DistillConfig, read_stage0
from hmf_jax.training import Recipe
from hmf_jax.training.fields import parse_yaml, read_yaml
from hmf_jax.training.schema import TrainConfig

NEEDED: dict[str, Any] = {
    "model": "m", "data": "d", "output": "o", "learning_rate": 1e-3, "schedule": "linear",
    "steps": 3,
}  # fmt: skip


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.0e-05", 1e-5),
        ("-.5", -0.5),
        ("010", 10),
        ("1_000", 1000),
        ("yes", True),
        ("~", None),
        ("1:30", "1:30"),
        ("0x10", "0x10"),
        ("2020-01-01", "2020-01-01"),
        ("'1e-4'", "1e-4"),
        ("[1, a, 2.5]", [1, "a", 2.5]),
    ],
)
def test_values_are_what_they_look_like(text, value):
    found = parse_yaml(text, "here")
    assert found == value and type(found) is type(value)


BOMB = "a: &a [x, x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}]\n" for a, b in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must hold fields"),
        (b"# nothing\n", "must hold fields"),
        (b"- a\n- b\n", "must hold fields"),
        (b"just text", "must hold fields"),
        (b"a: 1\nb: 2\na: 3\n", "line 3: 'a' is given twice"),
        (b"a: {b: 1, b: 2}\n", "line 1: 'b' is given twice"),
        (BOMB.encode(), "line 2: aliases are not read"),
        (b"a: 1\nb: [", "no YAML: line 2"),
        (b"a: \xff\n", "byte 3 is not UTF-8"),
        ("a: 1\n".encode("utf-16"), "not UTF-8"),
        (b"a: \x00", "no YAML"),
        (b"a: " + b"[" * 5000, "nested too deeply"),
        (b"a: " + b"9" * 5000, "no YAML"),
        (b"a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        (b"a: 1\n---\nb: 2\n", "no YAML"),
        (b"\ta: 1", "no YAML"),
    ],
)
def test_files_that_are_refused(tmp_path, content, message):
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    for read in (read_yaml, TrainConfig.load, read_stage0):
        with pytest.raises(ValueError, match=message) as caught:
            read(file)
        assert "\n" not in str(caught.value) and str(file) in str(caught.value)
        assert len(str(caught.value)) < 300


def test_a_file_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_yaml(tmp_path / "none.yaml")
    with pytest.raises(OSError):
        read_yaml(tmp_path)
    (tmp_path / "big.yaml").write_bytes(b"#" * (10 * 2**20 + 1))
    with pytest.raises(ValueError, match=r"big.yaml has more than 10 MB"):
        read_yaml(tmp_path / "big.yaml")
    (tmp_path / "bom.yaml").write_bytes(b"\xef\xbb\xbfa: 1")
    assert read_yaml(tmp_path / "bom.yaml") == {"a": 1}


COUNTS = (
    "steps accumulate batch_size per_device_batch_size lora_rank chunk_size dp fsdp sp tp "
    "save_every keep log_every eval_every seq_len"
).split()
FLOATS = "learning_rate max_grad_norm eps weight_decay lora_alpha".split()
BOOLS = "master_weights shuffle distributed tensorboard profile".split()


@pytest.mark.parametrize("name", COUNTS)
def test_counts(name):
    for value in (0, -1, True, 1.5, "3", 2**31, 10**5000, math.nan, [1], {}):
        with pytest.raises(ValueError, match=rf"^{name}\b.* must be") as caught:
            TrainConfig.of({**NEEDED, "eval_data": "e", name: value})
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 200, value
    config = TrainConfig.of({**NEEDED, "eval_data": "e", name: np.int64(7)})
    assert getattr(config, name) == 7 and type(getattr(config, name)) is int


@pytest.mark.parametrize("name", FLOATS)
def test_numbers(name):
    for value in (math.nan, math.inf, -math.inf, -1, True, "fast", 10**400, "nan", [], None):
        if value is None and name == "max_grad_norm":
            continue  # which means no clipping
        with pytest.raises(ValueError, match=rf"^{name}\b.* must be") as caught:
            TrainConfig.of({**NEEDED, name: value})
        assert "\n" not in str(caught.value), value
    for value in (2, "2", "2e0", np.float32(2)):
        found = getattr(TrainConfig.of({**NEEDED, name: value}), name)
        assert found == 2.0 and type(found) is float


@pytest.mark.parametrize(
    ("values", "message"),
    [
        *((dict.fromkeys([name], v), f"{name} must be bool") for name in BOOLS for v in (1, "yes")),
        (dict(seed=-1), "seed=-1 must be at least 0"),
        (dict(num_iter=-1), "num_iter=-1 must be at least 0"),
        (dict(warmup=1.0), "warmup=1.0 must be a number of steps"),
        (dict(warmup=-0.1), "warmup=-0.1 must be at least 0"),
        (dict(warmup=math.nan), "warmup=nan must be at least 0"),
        (dict(betas=[0.9, 1.0]), "betas=1.0 must be at least 0, at most 1"),
        (dict(betas=[0.9, math.nan]), "betas=nan must be"),
        (dict(data=[]), "data is empty"),
        (dict(data=["a", ""]), "data is empty"),
        (dict(data=["a", 3]), "data[1] must be text, not 3"),
        (dict(data=None), "data must be text or a list, not None"),
        (dict(output=" "), "output is empty"),
        (dict(model=3), "model must be text"),
        (dict(remat={"GKA": 1}), "remat.GKA must be text, not 1"),
        (dict(template_options={1: 2}), "a key of template_options must be text, not 1"),
        (dict(config_overrides=[1]), "config_overrides must be a mapping"),
        (dict(dtype="float64"), "dtype must be 'bfloat16' or 'float32'"),
        (dict(epochs=2), "either steps or epochs"),
        (dict(batch_size=2, per_device_batch_size=2), "either batch_size or per_device_batch_size"),
        (dict(eval_every=3), "eval_every needs eval_data"),
        (dict(export="best"), "export: best needs eval_data"),
        (dict(export="worst"), "export must be 'last' or 'best'"),
        (dict(learnig_rate=1), "unknown field 'learnig_rate'; did you mean 'learning_rate'?"),
        (dict(cutoff_len=8), "unknown field 'cutoff_len'; here it is 'seq_len'"),
    ],
)
def test_values_that_are_refused(values, message):
    with pytest.raises(ValueError) as caught:
        TrainConfig.of({**NEEDED, **values})
    assert message in str(caught.value)


def test_python_is_checked_like_yaml():
    with pytest.raises(ValueError, match="steps must be int or null, not '3'"):
        TrainConfig(**{**NEEDED, "steps": "3"})
    with pytest.raises(ValueError, match="learning_rate=nan must be positive and finite"):
        Recipe(math.nan, "constant")
    config = TrainConfig(**{**NEEDED, "model": Path("a") / "b", "betas": [0.5, 0.6]})
    assert config.model == "a/b" and config.betas == (0.5, 0.6)


def test_overrides_are_fields_once(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("".join(f"{k}: {v}\n" for k, v in NEEDED.items()))
    with pytest.raises(ValueError, match="seed is given twice: 'seed=2' comes after another"):
        TrainConfig.load(file, ["seed=1", "seed=2"])
    with pytest.raises(ValueError, match="either steps or epochs"):
        TrainConfig.load(file, ["steps=1", "epochs=2"])
    with pytest.raises(ValueError, match="run.yaml: seed=-1 must be"):
        TrainConfig.load(file, ["seed=-1"])
    assert TrainConfig.load(file, ["epochs=2", "betas=[0.5, 0.75]"]).betas == (0.5, 0.75)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("base_model: x", "unknown field 'base_model'; did you mean"),
        ("dtype: 3", "dtype must be text, not 3"),
        ("dtype: bf32", "dtype 'bf32' is not one of bf16"),
        ("seed: -1", "seed=-1 must be at least 0"),
        ("copy_auxiliary_files: 1", "copy_auxiliary_files must be bool, not 1"),
        ("gka: 30", "gka must be a mapping, not 30"),
        ("hybrid_override_pattern: [GKA]", "hybrid_override_pattern must be text"),
        ("repeat: columns", "repeat must be 'rows' or 'heads'"),
    ],
)
def test_stage_0(tmp_path, lines, message):
    file = tmp_path / "stage0.yaml"
    file.write_text(lines)
    with pytest.raises(ValueError) as caught:
        read_stage0(file)
    assert message in str(caught.value) and str(file) in str(caught.value)


def test_stage_1_fields():
    for values in (dict(pre_lm_head=1), dict(weighted="yes"), dict(target=None)):
        with pytest.raises(ValueError, match="must be|unknown"):
            DistillConfig.of({**NEEDED, **values})
