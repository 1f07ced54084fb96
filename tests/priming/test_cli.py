"""hmf-jax prime: init, distill, unfuse, select, from a directory to a directory."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from hmf_jax import engine
from hmf_jax.config import HybridConfig
from hmf_jax.demo import write_checkpoint
from hmf_jax.loading import from_pretrained
from hmf_jax.training import read_metrics
from tests.goldens import golden
from tests.test_cli import error_of, run

COMMANDS = ("init", "distill", "unfuse", "select")


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    """The tests must not write to the user's compilation cache."""
    monkeypatch.setattr(engine, "enable_compilation_cache", lambda: None)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prime") / "base"
    write_checkpoint(path, layer_kinds=("*", "*"))
    return path


@pytest.fixture(scope="module")
def fused(base) -> Path:
    path = base.parent / "fused"
    text = run("prime", "init", base, path, "--pattern", "*DA-M2*").output
    for line in ("*-* -> *DA-M2*", "copied from the base", "initialised from", "fresh, random"):
        assert line in text
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command):
    assert command in run("prime", "--help").output
    assert "Traceback" not in run("prime", command, "--help").output


def test_init_and_unfuse(base, fused, tmp_path):
    assert "*DA" in run("info", fused).output and "learning from" in run("info", fused).output
    assert "exists" in error_of("prime", "init", base, fused, "--pattern", "*DA-M2*")
    output = run("prime", "unfuse", fused, tmp_path / "hybrid").output
    assert "*DA-M2* -> *-M2" in output and "of the teacher dropped" in output
    old, new = (load_file(d / "model.safetensors") for d in (fused, tmp_path / "hybrid"))
    assert {n for n in old if n not in new} == {n for n in old if ".1.self_attn." in n}
    assert all(np.array_equal(x, old[n]) for n, x in new.items())
    for directory in (fused, tmp_path / "hybrid"):
        assert (directory / "tokenizer.json").is_file()
    assert "has no fused layers" in error_of("prime", "unfuse", tmp_path / "hybrid")
    assert "exists" in error_of("prime", "unfuse", fused, tmp_path / "hybrid")
    before = {p: p.stat().st_mtime_ns for d in (base, fused) for p in d.iterdir()}
    for output in (fused, fused / "inner"):
        message = error_of("prime", "unfuse", fused, output, "--overwrite")
        assert "would be written over its base" in message
        message = error_of("prime", "init", fused, output, "--pattern", "*-*", "--overwrite")
        assert "would be written over its base" in message
    assert "over its base" in error_of("prime", "unfuse", fused, fused.parent, "--overwrite")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    assert "notes" in error_of("prime", "unfuse", fused, tmp_path / "notes", "--overwrite")
    assert before == {p: p.stat().st_mtime_ns for d in (base, fused) for p in d.iterdir()}
    assert not (tmp_path / "hybrid_unfused").exists()


def test_init_errors(base, tmp_path):
    out = tmp_path / "out"
    assert "say what output and pattern is" in error_of("prime", "init", base)
    message = error_of("prime", "init", base, out, "--pattern", "*DA-M2*-*DA")
    assert "3 symbols but the base has 2 layers" in message
    assert "repeat='x'" in error_of(
        "prime", "init", base, out, "--pattern", "*-M2", "--repeat", "x"
    )
    assert "seed must be an integer >= 0" in error_of(
        "prime", "init", base, out, "--pattern", "*-M2", "--seed", "-1"
    )
    assert not out.exists()


@pytest.mark.slow
def test_distill_goes_on_and_is_unfused(base, fused, tmp_path):
    texts = [{"text": f"The number of {w} is {n}. " * 8} for n, w in enumerate("abcdefgh")]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts))
    (tmp_path / "distill.yaml").write_text(
        f"model: {fused}\ndata: {tmp_path / 'data.jsonl'}\noutput: {tmp_path / 'run'}\n"
        "target: decoder\nseq_len: 64\naccumulate: 1\nbatch_size: 2\nsave_every: 2\n"
        "dtype: float32\nwarmup: 0\nlearning_rate: 1e-3\nfsdp: 1\n"
    )
    plan = run("prime", "distill", tmp_path / "distill.yaml", "steps=4", "--dry-run").output
    assert "mixer.x_proj.kernel" in plan and "self_attn" not in plan
    assert not (tmp_path / "run").exists()
    whole = tmp_path / "whole"
    run("prime", "distill", tmp_path / "distill.yaml", "steps=4", f"output={whole}")
    run("prime", "distill", tmp_path / "distill.yaml", "steps=2")
    again = run("prime", "distill", tmp_path / "distill.yaml", "steps=4").output
    assert "Going on from step 2" in again
    one, two = ([r["loss"] for r in read_metrics(d)] for d in (whole, tmp_path / "run"))
    assert one == two and len(one) == 4
    run("prime", "unfuse", tmp_path / "run" / "model", "--dtype", "float32")
    old, new = (load_file(d / "model.safetensors") for d in (base, tmp_path / "run" / "model"))
    assert all(np.array_equal(x, new[n]) for n, x in old.items())
    start = load_file(fused / "model.safetensors")
    assert {n for n, x in new.items() if not np.array_equal(x, start[n])} <= {
        n for n in new if ".mamba." in n
    }
    model = from_pretrained(tmp_path / "run" / "model_unfused", dtype=jnp.float32, progress=False)
    assert model.config.layer_kinds == ("*", "M2")
    message = error_of("prime", "distill", tmp_path / "distill.yaml", f"model={base}", "steps=1")
    assert "cannot distil this model: its pattern *-* has no fused layers" in message


def test_select(tmp_path):
    file = tmp_path / "scores.csv"
    file.write_text("layer_num,task\n-1,9\n0,1\n1,3\n2,2\n3,3\n")
    text = run("prime", "select", file, "-M", 1, "--kind", "BMF").output
    assert "layers: 1\n" in text and "pattern: *DA-BMF*-*DA-*DA" in text
    assert "tie: layers [1, 3] share the score 3" in text
    assert re.search(r"^ +1 +3\.0000  chosen$", text, re.MULTILINE)
    assert "no row for layers [4]" in error_of("prime", "select", file, "--num-layers", 5)
    assert "need the model" in error_of("prime", "select", file, "--data", file)
    assert "needs --data" in error_of("prime", "select", file, "--base", tmp_path)
    for option, value in {"rows": 3, "length": 9, "dtype": "float32", "window": 8}.items():
        message = error_of("prime", "select", file, "-M", 1, f"--{option}", value)
        assert f"--{option} is for scoring: it needs --data" in message
    for m in (0, -1, 5):
        assert f"m={m}: choose between 1 and 4" in error_of("prime", "select", file, "-M", m)
    assert "layers, but there are" in error_of("prime", "select", file, "--num-layers", 0)
    assert "kind 'x' is unknown" in error_of("prime", "select", file, "-M", 1, "--kind", "x")


def test_select_checks_first(base, tmp_path):
    scores, options = tmp_path / "s.csv", ["--base", base, "--data", tmp_path / "none.jsonl"]
    for more, message in (
        (["-M", 3], "--m must be an integer <= 2"),
        (["-M", 2, "--exclude-layer-0"], "--m must be an integer <= 1"),
        (["-M", 1, "--num-layers", 3], "--num-layers 3, but the base has 2 layers"),
        (["-M", 1, "--rows", 0], "rows must be an integer >= 1"),
        (["-M", 1, "--window", 0], "--window must be an integer >= 1"),
        (["-M", 1, "--length", 1], "length must be an integer >= 2"),
        (["-M", 1], "none.jsonl is no file"),
    ):
        assert message in error_of("prime", "select", scores, *options, *more)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_select_scores_and_writes_variants(base, tmp_path):
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "One two three. " * 30}) + "\n")
    options = ["--window", 8, "--base", base, "--dtype", "float32"]
    args = [*options, "--data", tmp_path / "data.jsonl", "--length", 64, "--rows", 1]
    text = run("prime", "select", tmp_path / "s.csv", "-M", 1, *args).output
    assert "scored the base" in text and "scored layer 1" in text and "pattern: " in text
    assert "scored" not in run("prime", "select", tmp_path / "s.csv", "-M", 1, *args).output
    (tmp_path / "data.jsonl").write_text(json.dumps({"text": "Four five six. " * 30}) + "\n")
    message = error_of("prime", "select", tmp_path / "s.csv", "-M", 1, *args)
    assert "s.csv holds scores of other data; choose another file" in message
    variants = tmp_path / "variants"
    run("prime", "select", tmp_path / "none.csv", *options, "--variants", variants)
    config = HybridConfig.from_json(variants / "layer_1")
    assert config.layer_kinds == ("*", "SWA") and not (tmp_path / "none.csv").exists()


def test_verify_names_the_kinds_it_runs():
    message = error_of("verify", golden("op_gka"))
    assert "is a case of kind 'op'; verify runs kind 'model' or 'stage1'" in message
