"""Runs from a file: what the fields mean, bad ones, a dry run, the command, several processes."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from hmf_jax import engine
from hmf_jax.cli import app
from hmf_jax.demo import write_checkpoint
from hmf_jax.loading import from_pretrained
from hmf_jax.parameters import flat_params
from hmf_jax.training import RECIPES, read_metrics, train
from hmf_jax.training.report import loggers
from hmf_jax.training.schema import TrainConfig

pytest.importorskip("grain")
NEEDED = {"model": "m", "data": "d.jsonl", "output": "o"}


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """A directory with a model, texts with two bad rows, and a config."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(engine, "enable_compilation_cache", lambda: None)
    write_checkpoint(Path("model"), layer_kinds=("SWA",))
    rows = [{"text": "abc" * (2 + i % 5)} for i in range(12)]
    rows[7] = {"text": ""}
    text = "".join(json.dumps(row) + "\n" for row in rows)
    Path("texts.jsonl").write_text(text + "{nonsense\n")
    fields = {
        "model": "model",
        "data": "texts.jsonl",
        "output": "run",
        "learning_rate": "1e-2",
        "schedule": "cosine",
        "steps": 4,
        "seq_len": 32,
        "dp": 1,
        "fsdp": 1,
        "save_every": 2,
    }
    Path("run.yaml").write_text(yaml.safe_dump(fields))
    return tmp_path


def run(*args: str, code: int = 0) -> Any:
    result = CliRunner().invoke(app, ["train", *args])
    assert result.exit_code == code, result.output
    return result


def test_recipes_fill_in():
    config = TrainConfig.of({**NEEDED, "recipe": "long_context", "learning_rate": 1e-6})
    recipe = RECIPES["long_context"]
    assert config.learning_rate == 1e-6
    for field in dataclasses.fields(recipe):
        if field.name != "learning_rate":
            assert getattr(config, field.name) == getattr(recipe, field.name), field.name
    steps = TrainConfig.of({**NEEDED, "recipe": "instruct", "steps": 7})
    assert (steps.steps, steps.epochs) == (7, None)  # not also the recipe's two epochs
    lora = {**NEEDED, "recipe": "long_context", "lora_rank": 4}
    assert TrainConfig.of(lora).trainable == "lora"
    assert TrainConfig.of({**lora, "trainable": "lora, norm"}).trainable == "lora, norm"


def test_overrides(files):
    config = TrainConfig.load(
        "run.yaml",
        ["learning_rate=3e-4", "warmup=0.1", "remat={GKA: block}", "data=[a.jsonl, b.jsonl]"],
    )
    assert config.learning_rate == 3e-4 and config.warmup == 0.1 and config.steps == 4
    assert config.remat == {"GKA": "block"} and config.data == ["a.jsonl", "b.jsonl"]
    config = TrainConfig.load("run.yaml", ["epochs=2", "trainable=self_attn", "num_iter=null"])
    assert (config.steps, config.epochs, config.trainable) == (None, 2, "self_attn")
    Path("again.yaml").write_text(yaml.safe_dump(dataclasses.asdict(config)))
    assert TrainConfig.load("again.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("learning_rat=1", "unknown field 'learning_rat'; did you mean 'learning_rate'?"),
        ("zzz=1", "unknown field 'zzz'; known are .*save_every"),
        ("learning_rate", "'learning_rate' is no field=value"),
        ("learning_rate=fast", "learning_rate must be float, not 'fast'"),
        ("learning_rate=true", "learning_rate must be float, not True"),
        ("steps=1.5", r"steps must be int or null, not 1.5"),
        ("master_weights=1", "master_weights must be bool, not 1"),
        ("dtype=float16", "dtype must be 'bfloat16' or 'float32', not 'float16'"),
        ("betas=[0.9]", r"betas must be .*, not \[0.9\]"),
        ("recipe=instuct", "unknown recipe 'instuct'; there are .*instruct"),
        ("schedule=cos", "schedule must be"),
        ("batch_size=0", "batch_size=0 must be at least 1"),
        ("steps=null", "either steps or epochs"),
        ("x=[", "no YAML"),
        ("batch_size=3 accumulate=2", "batch_size=3 is not a multiple of accumulate x dp x fsdp"),
        ("fsdp=2 batch_size=5", "batch_size=5 is not a multiple of .* 1 x 2"),
        ("dp=3 fsdp=3", r"dp=3 x fsdp=3 x sp=1 x tp=1 does not fit the 8 device\(s\)"),
        ("dp=3 fsdp=null", "does not fit the 8"),
        ("tp=3", "tp=3 does not divide num_attention_heads=4"),
        ("sp=4", "sp=4 x tp=1 does not divide num_key_value_heads=2"),
        ("fsdp=7", "fsdp=7 x sp=1 does not divide hidden_size=64"),
        ("trainable=gka", "'gka' matches no parameter"),
        ("data=nothing.jsonl", "nothing.jsonl"),
        ("model=nowhere", "nowhere is not a directory"),
    ],
)
def test_bad_fields(files, override, message):
    """All of them before anything is written."""
    error = run("run.yaml", *re.split(r" (?=\w+=)", override), "--dry-run", code=1).stderr
    assert re.search(message, error.replace("\n", " ")) and error.count("\n") == 1, error
    assert not Path("run").exists()


def test_missing_fields(files):
    with pytest.raises(ValueError, match="missing: model, data, output"):
        TrainConfig.of({"recipe": "instruct"})
    with pytest.raises(ValueError, match="missing: learning_rate, schedule, or a recipe"):
        TrainConfig.of(NEEDED)
    Path("list.yaml").write_text("- a")
    assert "must hold fields" in run("list.yaml", code=1).stderr
    assert "no.yaml" in run("no.yaml", code=1).stderr


def test_dry_run(files):
    out = run("run.yaml", "--dry-run", "trainable=swa", "fsdp=2", "sp=2", "accumulate=2").output
    assert not Path("run").exists()
    assert "fsdp 2 x sp 2 (cpu)" in out
    assert "4 steps of 4 rows of 32 tokens, 2 micro-batch(es)" in out
    assert "1 empty, 1 malformed" in out and "texts.jsonl:13: malformed row" in out
    model = from_pretrained("model", progress=False)
    kernels = {p: a for p, a in flat_params(model).items() if p.startswith("layers.0.mixer.")}
    trained, total = (sum(a.size for a in x.values()) for x in (kernels, flat_params(model)))
    assert f"{len(kernels)} tensors, {trained:,} of {total:,} parameters" in out
    assert "1 x layers.*.mixer.q_proj.kernel [64, 64]" in out
    norms = sum(a.size for a in kernels.values() if a.ndim == 1)  # whole on all four devices
    trained_bytes = 4 * ((trained - norms) / 4 + norms) / 1024
    assert re.search(rf"{trained_bytes:.1f} KiB  trained weights", out)
    assert re.search(r"[\d.]+ \wi?B  gradients, activations, workspace", out)
    assert re.search(r"128 tokens, \S+ model FLOPs", out) and "FLOPs, " in out


def test_the_command(files):
    """Trains, saves, exports; another time it goes on where it was, here at the end."""
    with pytest.warns(UserWarning, match="of 26 rows: 2 empty, 2 malformed"):
        result = run("run.yaml", "lora_rank=2", "lora_alpha=4", "epochs=2")
    assert "2 empty, 2 malformed" in result.stdout and "Wrote run/model" in result.stdout
    out = Path("run")
    assert {p.name for p in out.iterdir()} >= {
        "adapter", "checkpoints", "config.yaml", "metrics.jsonl", "model",
    }  # fmt: skip
    records = read_metrics(out)
    steps = len(records)
    assert steps > 4 and records[-1]["loss"] < records[0]["loss"]
    assert TrainConfig.load("run/config.yaml").epochs == 2
    before, after = (
        flat_params(from_pretrained(p, dtype=None, progress=False)) for p in ("model", "run/model")
    )
    assert {p: a.dtype for p, a in after.items()} == {p: a.dtype for p, a in before.items()}
    for path, a in before.items():  # adapters beside projections, and nothing else
        assert np.array_equal(a, after[path]) != ("proj" in path), path
    assert (
        Path("run/model/tokenizer.json").read_bytes() == Path("model/tokenizer.json").read_bytes()
    )

    again = run("run.yaml", "lora_rank=2", "lora_alpha=4", "epochs=2")
    assert f"Going on from step {steps}." in again.stdout and read_metrics(out) == records
    kept = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    error = run("run.yaml", "lora_rank=3", "lora_alpha=4", "epochs=2", code=1).stderr
    assert "run holds another run: lora_rank 2 -> 3. Choose" in error and error.count("\n") == 1
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == kept


def test_tensorboard(files):
    pytest.importorskip("metrax")
    made = loggers(TrainConfig.load("run.yaml", ["tensorboard=true"]), files)

    def step(state, batch):
        return state, {"loss": jnp.float32(0.5)}

    batches = [{"tokens": np.zeros((1, 2), np.int32)}]
    train(jnp.zeros(1), step, batches, steps=1, loggers=made, progress=False)
    (events,) = Path("tensorboard").glob("events*")
    assert b"train/loss" in events.read_bytes()


@pytest.mark.slow
def test_two_processes(files):
    """Documents are split unevenly: one process has nothing left while the other goes on. A run
    that goes on from a checkpoint gives the same numbers."""
    rows = [{"text": "abc" * 8 if i % 2 else "ab"} for i in range(24)]
    Path("texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    root = str(Path(__file__).parents[2])
    flags = os.environ["XLA_FLAGS"].replace("device_count=8", "device_count=2")

    def processes(*overrides: str) -> list[dict[str, float]]:
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        env = os.environ | {
            "PYTHONPATH": root,
            "XLA_FLAGS": flags,
            "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
            "JAX_NUM_PROCESSES": "2",
        }
        command = [sys.executable, "-m", "hmf_jax.cli", "train", "run.yaml", "distributed=true"]
        command += ["fsdp=null", "shuffle=false", "dtype=float32", *overrides]
        ours = [
            subprocess.Popen(command, env=env | {"JAX_PROCESS_ID": str(i)}, stderr=subprocess.PIPE)
            for i in range(2)
        ]
        try:
            for process in ours:
                _, error = process.communicate(timeout=300)
                assert process.returncode == 0, error.decode()[-2000:]
        finally:
            for process in ours:
                process.kill()
        return read_metrics("run")

    options = "epochs=1", "eval_data=texts.jsonl"
    records = processes(*options)
    assert len(records) > 2 and all(r["tokens"] > 0 for r in records)
    config = from_pretrained("run/model", dtype=jnp.float32).config
    assert config.layer_kinds == ("SWA",)
    checkpoints = sorted(Path("run/checkpoints").iterdir(), key=lambda p: int(p.name))
    for newest in checkpoints[1:]:
        newest.rename(Path("run") / f"moved-{newest.name}")
    again = processes(*options)
    assert [r["loss"] for r in again] == [r["loss"] for r in records]
    assert again[-1]["val_loss"] == records[-1]["val_loss"]
    assert 0 < records[-1]["val_loss"] < records[0]["loss"]
