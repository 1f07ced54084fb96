"""`hmf-jax train` killed, interrupted, started twice, on a full disk: the same run in the end."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file

from hmf_jax.demo import write_checkpoint
from hmf_jax.training import read_metrics

pytest.importorskip("grain")
pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
STEPS = 24


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A directory with a base model, data and a config, and what the run gives when left alone."""
    place = tmp_path_factory.mktemp("kills")
    write_checkpoint(place / "base", layer_kinds=("SWA",))
    rows = ({"text": f"line {i} " * (1 + i % 3)} for i in range(40))
    (place / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fields = dict(
        model="base", data="data.jsonl", eval_data="data.jsonl", learning_rate=1e-2, seq_len=32,
        schedule="cosine", steps=STEPS, batch_size=2, fsdp=1, save_every=1, eval_every=5,
        dtype="float32", export="best", lora_rank=2, keep=3,
    )  # fmt: skip
    (place / "run.yaml").write_text("".join(f"{k}: {v}\n" for k, v in fields.items()))
    assert start(place, "whole").wait() == 0
    return place


def start(place: Path, output: str, *fields: str, **options: Any) -> subprocess.Popen[str]:
    env = os.environ | {"PYTHONPATH": str(ROOT), "HOME": str(place), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "hmf_jax.cli", "train", "run.yaml", f"output={output}"]
    pipes: Any = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen([*command, *fields], cwd=place, env=env, **pipes, **options)


def wait_for(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(word):
            return


def results(directory: Path) -> dict[str, Any]:
    """All that a run leaves behind, but for times."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, STEPS + 1))
    clocks = ("seconds", "data_wait", "tokens_per_second")
    records = [{k: v for k, v in r.items() if k not in clocks} for r in read_metrics(directory)]
    adapter = load_file(directory / "adapter" / "adapter_model.safetensors")
    steps = sorted(p.name for p in (directory / "checkpoints").iterdir())
    hidden = sorted(p.name for p in directory.iterdir() if p.name.startswith("."))
    return {
        "records": records,
        "checkpoints": steps,
        "hidden": hidden,
        "model": (directory / "model" / "model.safetensors").read_bytes(),
        "adapter": {name: x.tobytes() for name, x in adapter.items()},
    }


def test_kill_9_at_ten_moments(place):
    rng = random.Random(0)
    moments = [*("step" for _ in range(8)), "data", "model"]
    for kill in range(10):
        process = start(place, "killed")
        wait_for(process, moments[kill])
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.communicate()
    process = start(place, "killed")
    out, error = process.communicate()
    assert process.returncode == 0, error
    assert results(place / "killed") == results(place / "whole")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals(place, number):
    output = f"signal{number}"
    process = start(place, output)
    wait_for(process, "step 3/")
    process.send_signal(number)
    out, error = process.communicate()
    assert process.returncode == 128 + number, error
    assert error.count("\n") == 1 and f"Stopped by {number.name} after step" in error, error
    newest = max((place / output / "checkpoints").iterdir(), key=lambda p: int(p.name))
    assert f"saved: the run, started again, goes on from {newest}." in error
    process = start(place, output)
    out, error = process.communicate()
    assert process.returncode == 0 and f"Going on from step {newest.name}." in out, error
    assert results(place / output) == results(place / "whole")


def test_two_runs_in_one_directory(place):
    first = start(place, "twice")
    wait_for(first, "step 2/")
    first.send_signal(signal.SIGSTOP)
    second = start(place, "twice")
    out, error = second.communicate()
    first.send_signal(signal.SIGCONT)
    assert second.returncode == 1 and error.count("\n") == 1, error
    assert f"twice is in use by process {first.pid} on" in error
    assert first.communicate() and first.returncode == 0
    assert results(place / "twice") == results(place / "whole")


@pytest.mark.parametrize("limit", [100, 8000, 100_000])
def test_a_full_disk(place, limit):
    """No file can have more bytes than this: run.json, a checkpoint, the exported model are the
    first that cannot be written. Afterwards the same command goes on."""
    output = f"full{limit}"

    def small() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = start(place, output, preexec_fn=small)
    out, error = process.communicate()
    lines = [line for line in error.splitlines() if "warning" not in line]
    assert process.returncode == 1 and len(lines) == 1, error
    process = start(place, output)
    out, error = process.communicate()
    assert process.returncode == 0, error
    assert results(place / output) == results(place / "whole")
