"""Two processes of `jax.distributed` on this machine train as one process does."""

from __future__ import annotations

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from safetensors.numpy import load_file, save_file

from hmf_jax.model import HybridLM
from hmf_jax.sharding import make_mesh
from hmf_jax.training import (
    Batches,
    Checkpoints,
    Recipe,
    TrainState,
    apply_lora,
    data_shard,
    make_train_step,
    merge_lora,
    read_metrics,
    select_parameters,
    train,
)
from tests.training.test_data import TOKENIZER
from tests.util import rel, tiny_config

pytest.importorskip("grain")
KINDS, STEPS, HALF = ("GDN", "*"), 4, 2
MESHES = {"dp4": dict(dp=4), "fsdp2 x tp2": dict(fsdp=2, tp=2), "tp4": dict(tp=4)}


def run(name: str, directory: Path, *, lora: bool, steps: int) -> TrainState:
    """Some steps on this process's part of the data; goes on from a checkpoint if there is one."""
    mesh = make_mesh(**MESHES[name], devices=jax.devices()[:4])
    config = tiny_config(KINDS, num_key_value_heads=4, vocab_size=-(-len(TOKENIZER) // 8) * 8)
    model = HybridLM.init(config, dtype=jnp.float64, mesh=mesh)
    model = jax.tree.map(lambda p: p.astype(jnp.float64), model)  # A_log too
    optimizer = Recipe(1e-2, "constant").optimizer(STEPS)
    state = TrainState.create(
        apply_lora(model, rank=2) if lora else model, optimizer, trainable="lora" if lora else None
    )
    index, count = data_shard(model.mesh)
    batches = Batches(
        directory / "texts.jsonl",
        TOKENIZER,
        length=32,
        batch_size=8 // count,
        packing="none",
        overlong="cut",
        shuffle=False,
        process_index=index,
        process_count=count,
    )
    step = make_train_step(optimizer, max_grad_norm=1.0)
    saved = Checkpoints(directory / "checkpoints", config, every=HALF)
    state = train(
        state, step, batches, steps=steps, checkpoints=saved, directory=directory, progress=False
    )
    return state


def main(name: str, directory: str, lora: str, port: str, process: str) -> None:
    """One of two processes, two devices each."""
    jax.config.update("jax_enable_x64", True)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, int(process))
    assert jax.process_count() == 2 and len(jax.local_devices()) == 2
    for steps in (HALF, STEPS):  # the second goes on from the first one's checkpoint
        state = run(name, Path(directory), lora=lora == "1", steps=steps)
    gather = functools.partial(multihost_utils.process_allgather, tiled=True)
    model = jax.tree.map(gather, state.model())
    if process == "0":
        file = Path(directory) / "params.safetensors"
        save_file({n: np.array(p) for n, p in trained(model).items()}, file)


def trained(model: HybridLM) -> dict[str, jax.Array]:
    """All parameters, adapters merged."""
    if any("lora" in name for name in select_parameters(model)):
        model = merge_lora(model)
    return dict(zip(select_parameters(model), jax.tree.leaves(model), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize(("name", "lora"), [("dp4", False), ("fsdp2 x tp2", True), ("tp4", False)])
def test_two_processes_train_as_one(name, lora, tmp_path):
    lines = ["".join(chr(97 + (i * j) % 26) for j in range(5 + i % 20)) for i in range(64)]
    for directory in (tmp_path / "one", tmp_path / "two"):
        directory.mkdir()
        text = "".join(json.dumps({"text": line}) + "\n" for line in lines)
        (directory / "texts.jsonl").write_text(text)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = dict(os.environ, JAX_PLATFORMS="cpu", OPENBLAS_NUM_THREADS="1")
    env["XLA_FLAGS"] = (
        "--xla_force_host_platform_device_count=2 --xla_backend_optimization_level=0 "
        "--xla_llvm_disable_expensive_passes=true"
    )
    code = "import sys; from tests.training.test_processes import main; main(*sys.argv[1:])"
    arguments = [sys.executable, "-c", code, name, str(tmp_path / "two"), str(int(lora)), str(port)]
    root = Path(__file__).resolve().parents[2]
    processes = [
        subprocess.Popen(
            [*arguments, str(i)], cwd=root, env=env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )
        for i in range(2)
    ]  # fmt: skip
    try:
        with jax.enable_x64(True):
            expected = trained(run(name, tmp_path / "one", lora=lora, steps=STEPS).model())
        output = [p.communicate(timeout=300)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0, 0], "\n\n".join(output)
    got = load_file(tmp_path / "two" / "params.safetensors")
    assert set(got) == set(expected)
    for n, p in expected.items():
        assert rel(got[n], p) < 1e-7, n
    losses = [[r["loss"] for r in read_metrics(tmp_path / d)] for d in ("one", "two")]
    assert len(losses[0]) == STEPS and losses[0][-1] < losses[0][0]
    assert rel(losses[1], losses[0]) < 1e-6
