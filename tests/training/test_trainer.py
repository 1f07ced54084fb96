"""The loop: what it trains is what its steps train, and no run is lost, however it ends."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmf_jax.config import BMojoConfig
from hmf_jax.convert.directories import lock
from hmf_jax.demo import build_tokenizer
from hmf_jax.model import HybridLM
from hmf_jax.training import (
    Checkpoints,
    Recipe,
    TrainState,
    data_shard,
    find_not_finite,
    make_train_step,
    next_token_loss,
    plot_loss,
    read_metrics,
    report,
    select_parameters,
    train,
    training_flops,
)
from tests.training.test_step import on_mesh, same
from tests.util import random_model, rel, tiny_config

TOKENIZER: Any = build_tokenizer()
CONFIG = tiny_config(("SWA", "*"), vocab_size=len(TOKENIZER))
OPTIMIZER = Recipe(1e-2, "constant", warmup=3).optimizer(20)
STEP = make_train_step(OPTIMIZER, max_grad_norm=1.0)  # compiled once for most tests


def state_of(seed: int = 0) -> TrainState:
    return TrainState.create(random_model(CONFIG, jnp.float32, seed), OPTIMIZER)


def batches_of(count: int) -> list[dict[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    ids = np.ones((2, 32), np.int32)
    ids[1, 20:] = 0
    tokens = rng.integers(0, CONFIG.vocab_size, (count, 2, 32), np.int32)
    return [{"tokens": t, "segment_ids": ids, "loss_mask": ids > 0} for t in tokens]


def losses(directory: Path) -> list[float]:
    records = read_metrics(directory)
    assert [r["step"] for r in records] == list(range(1, len(records) + 1))
    return [r["loss"] for r in records]


def test_the_loop_is_its_steps(tmp_path):
    """Also: records of all metrics, the plot, loggers; no file without a directory."""
    expected, wanted = state_of(), []
    for batch in batches_of(6):
        expected, metrics = STEP(expected, batch)
        wanted.append(float(metrics["loss"]))

    class Logger:
        seen: list[tuple[str, float, int]] = []
        closed = False

        def log_scalar(self, event: str, value: float, step: int) -> None:
            self.seen.append((event, value, step))

        def close(self) -> None:
            self.closed = True

    logger = Logger()
    got = train(
        state_of(),
        STEP,
        batches_of(9),
        steps=6,
        directory=tmp_path,
        loggers=[logger],
        progress=False,
    )
    same(got, expected)
    assert losses(tmp_path) == wanted
    record = read_metrics(tmp_path)[-1]
    assert {"grad_norm", "learning_rate", "seconds", "tokens_per_second"} < set(record)
    assert record["tokens"] == 31 + 19 and "finite" not in record
    assert [(v, s) for e, v, s in logger.seen if e == "train/loss"] == [
        (x, i) for i, x in enumerate(wanted, 1)
    ]
    assert logger.closed
    pytest.importorskip("matplotlib")
    assert (tmp_path / "loss.png").read_bytes()[1:4] == b"PNG"
    assert plot_loss(tmp_path / "nothing") is None


def test_one_run_writes_to_a_directory(tmp_path):
    saved = Checkpoints(tmp_path / "saved", CONFIG)
    saved.directory.mkdir()
    for where in (tmp_path, saved.directory):
        with lock(where), pytest.raises(BlockingIOError, match=f"{where} is in use by process"):
            train(
                state_of(), STEP, batches_of(1), steps=1, checkpoints=saved,
                directory=tmp_path / "metrics" if where == saved.directory else tmp_path,
            )  # fmt: skip


def test_batches_may_end_first(tmp_path):
    state = train(state_of(), STEP, batches_of(2), steps=5, directory=tmp_path, progress=False)
    assert int(state.step) == 2 and len(losses(tmp_path)) == 2


def test_any_step_function(tmp_path):
    """A loss that the loop does not know, a state that is no TrainState, metrics of its own."""

    @jax.jit
    def step(state, batch):
        error = jnp.mean(batch["tokens"]) - state["mean"]
        return {"mean": state["mean"] + error / 2}, {"loss": error**2, "error": error}

    batches = [{"tokens": np.full((1, 2), 8.0, np.float32)}] * 4
    saved = Checkpoints(tmp_path / "saved", CONFIG, every=2)
    options: dict[str, Any] = dict(checkpoints=saved, directory=tmp_path, progress=False)
    state = train({"mean": jnp.zeros(())}, step, batches, steps=3, **options)
    assert float(state["mean"]) == 7.0
    assert [r["error"] for r in read_metrics(tmp_path)] == [8.0, 4.0, 2.0]
    state = train({"mean": jnp.zeros(())}, step, batches, steps=4, **options)
    assert float(state["mean"]) == 7.5 and losses(tmp_path) == [64.0, 16.0, 4.0, 1.0]
    with pytest.raises(FloatingPointError, match="step 5 is not finite: loss nan"):
        bad = [*batches, {"tokens": np.full((1, 2), np.nan, np.float32)}]
        train(state, step, bad, steps=6, **options)
    assert saved.latest == 4
    for options, message in (
        (dict(steps=0), "steps=0"),
        (dict(steps=1, profile=True), "directory"),
    ):
        with pytest.raises(ValueError, match=message):
            train(state, step, batches, **options)


# --- a run that is killed -------------------------------------------------------------------------


def run(directory: Path, kill_at: int | None = None) -> TrainState:
    """12 steps on the texts of a file, saved every third; killed as it asks for batch `kill_at`."""
    from hmf_jax.training import Batches

    class Texts(Batches):
        asked = 0

        def __next__(self) -> dict[str, np.ndarray]:
            self.asked += 1
            if self.asked == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().__next__()

    file = directory / "texts.jsonl"
    rng = np.random.default_rng(1)
    texts = ["".join(rng.choice(list("abc "), rng.integers(3, 30))) + "." for _ in range(30)]
    file.write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    return train(
        state_of(),
        STEP,
        Texts(file, TOKENIZER, length=32, batch_size=2, window=4, seed=3),
        steps=12,
        checkpoints=Checkpoints(directory / "checkpoints", CONFIG, every=3),
        directory=directory,
        progress=False,
    )


def test_killed_and_resumed_is_uninterrupted(tmp_path):
    pytest.importorskip("grain")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    code = (
        f"import pathlib, tests.training.test_trainer as t; t.run(pathlib.Path({str(parts)!r}), 9)"
    )
    setup = "import tests.conftest; "  # the flags of this process
    child = subprocess.run([sys.executable, "-c", setup + code], cwd=Path(__file__).parents[2])
    assert child.returncode == -signal.SIGKILL
    with (parts / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # as if it had been killed while it wrote
    before = losses(parts)
    assert 6 <= len(before) < 9
    latest = max(int(p.name) for p in (parts / "checkpoints").iterdir() if p.name.isdigit())
    assert latest in (3, 6)  # the last one may have been on its way
    same(run(parts), run(whole))
    assert losses(parts) == losses(whole) and losses(parts)[: len(before)] == before
    assert len(losses(parts)) == 12


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves(tmp_path, number):
    def interrupted() -> Iterator[dict[str, np.ndarray]]:
        for i, batch in enumerate(batches_of(6), 1):
            if i == 4:
                os.kill(os.getpid(), number)
            yield batch

    saved = Checkpoints(tmp_path / "saved", CONFIG, every=100)
    options: dict[str, Any] = dict(steps=6, checkpoints=saved, progress=False)
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt, match="after step 4"):
        train(state_of(), STEP, interrupted(), **options)
    assert signal.getsignal(number) == before and saved.latest == 4
    resumed = train(state_of(), STEP, batches_of(6), **options)
    same(resumed, train(state_of(), STEP, batches_of(6), steps=6, progress=False))


# --- a loss that is not finite --------------------------------------------------------------------


def poisoned(name: str, factor: float, at: int):
    """STEP, but the state of step `at` has one parameter times a factor."""
    count = 0

    def step(state: TrainState, batch: Any):
        nonlocal count
        count += 1
        if count == at:
            params = state.params | {name: state.params[name] * factor}
            state = dataclasses.replace(state, params=params)
        return STEP(state, batch)

    return step


@pytest.mark.parametrize(
    ("name", "factor", "where"),
    [
        ("layers.1.mlp.up_proj.kernel", 3e38, r"The block of layer 1 \(\*\)"),
        ("layers.1.mixer.v_proj.kernel", 3e38, r"The mixer of layer 1 \(\*\)"),
        ("lm_head.kernel", 3e38, "All layers are finite; the logits or the loss"),
        ("layers.0.mixer.q_norm.weight", math.nan, "Parameter layers.0.mixer.q_norm.weight"),
    ],
)
def test_not_finite_stops_and_says_where(tmp_path, name, factor, where):
    saved = Checkpoints(tmp_path / "saved", CONFIG, every=2)
    with pytest.raises(FloatingPointError, match=f"step 4 is not finite.*{where}.*step 2"):
        step = poisoned(name, factor, at=4)
        train(
            state_of(), step, batches_of(8), steps=8, checkpoints=saved, directory=tmp_path,
            progress=False,
        )  # fmt: skip
    assert saved.latest == 2 and len(losses(tmp_path)) == 3
    expected = train(state_of(), STEP, batches_of(2), steps=2, progress=False)
    same(saved.restore(state_of())[0], expected)


@pytest.mark.slow
def test_gradients_that_are_not_finite():
    """The derivative of sqrt at 0 is infinite: 0 times that is not a number."""

    def loss(model: HybridLM, tokens: jax.Array, **options: Any):
        total, count = next_token_loss(model, tokens, **options)
        layer: Any = model.layers[1]
        kernel = getattr(layer, "block", layer).mlp.up_proj.kernel[...]
        return total + jnp.sqrt(jnp.sum(0 * kernel)), count

    batch = batches_of(1)[0]
    text = find_not_finite(state_of(), batch, loss)
    assert re.search(r"forward pass is finite.* layer 1 \(\*\): layers.1.mlp.up_proj.kernel", text)
    assert "Nothing is found" in find_not_finite(state_of(), batch)


# --- devices --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_mesh(tmp_path):
    """The loop spreads the rows, and refuses those that it cannot; here it also goes on alone."""
    saved = Checkpoints(tmp_path, CONFIG, every=2)

    def start(mesh: dict[str, int]) -> TrainState:
        return TrainState.create(on_mesh(random_model(CONFIG, jnp.float32), mesh), OPTIMIZER)

    expected = train(state_of(), STEP, batches_of(4), steps=4, progress=False)
    mesh = dict(fsdp=2, tp=2)
    train(start(mesh), STEP, batches_of(4), steps=2, checkpoints=saved, progress=False)
    got = train(state_of(), STEP, batches_of(4), steps=4, checkpoints=saved, progress=False)
    for name, p in expected.params.items():
        assert rel(got.params[name], p) < 1e-4, name
    with pytest.raises(ValueError, match="dp x fsdp = 4 does not divide the 2 rows"):
        train(start(dict(dp=2, fsdp=2)), STEP, batches_of(4), steps=1, progress=False)


@dataclasses.dataclass(frozen=True)
class Device:
    id: int
    process_index: int


@pytest.mark.parametrize(
    ("sizes", "processes", "expected"),
    [
        (dict(fsdp=8), 2, [(0, 2), (1, 2)]),
        (dict(fsdp=2, tp=4), 4, [(0, 2), (0, 2), (1, 2), (1, 2)]),  # two processes per row
        (dict(tp=8), 2, [(0, 1), (0, 1)]),
        (dict(dp=2, fsdp=2, tp=2), 2, [(0, 2), (1, 2)]),
        (dict(dp=8), 1, [(0, 1)]),
        (dict(fsdp=2, tp=4), 3, None),
    ],
)
def test_what_a_process_reads(monkeypatch, sizes, processes, expected):
    devices = [Device(i, i * processes // 8) for i in range(8)]
    mesh: Any = type("Mesh", (), {})()
    mesh.devices = np.asarray(devices).reshape([sizes.get(a, 1) for a in ("dp", "fsdp", "tp")])
    mesh.axis_names = ("dp", "fsdp", "tp")
    mesh.shape = dict(zip(mesh.axis_names, mesh.devices.shape, strict=True))
    if expected is None:
        with pytest.raises(ValueError, match="multiple or a divisor of the number of processes"):
            data_shard(mesh)
        return
    got = []
    for i in range(processes):
        monkeypatch.setattr(jax, "process_index", lambda i=i: i)
        got.append(data_shard(mesh))
    assert got == expected


def test_flops(monkeypatch, tmp_path):
    """6 per weight and token, 4 for a frozen one, 12 heads x head_dim per key of attention."""
    config = tiny_config(("GKA", "*", "SWA"))
    model = jax.eval_shape(lambda: HybridLM(config))
    everything = TrainState.abstract(model, OPTIMIZER)
    sizes = dict(zip(select_parameters(model), map(np.shape, jax.tree.leaves(model)), strict=True))
    weights = {n: math.prod(s) for n, s in sizes.items() if len(s) > 1 and "embed" not in n}
    keys = sum(i + 1 for i in range(100)), sum(min(i + 1, 5) for i in range(100))
    attention = 12 * 4 * 16 * sum(keys) / 100
    full = training_flops(everything, 100)
    assert rel(full, 6 * sum(weights.values()) + attention) < 1e-12
    some = training_flops(TrainState.abstract(model, OPTIMIZER, trainable="gka"), 100)
    still = sum(n for name, n in weights.items() if name not in select_parameters(model, "gka"))
    assert rel(full - some, 2 * still) < 1e-12

    # Tied weights of B'MOJO-F serve both windows; untied ones differ by a second q_proj.
    both = (tiny_config(("BMF",), bmojo=BMojoConfig(4, tied, "GKA")) for tied in (True, False))
    tied, untied = (
        training_flops(TrainState.abstract(jax.eval_shape(lambda c=c: HybridLM(c)), OPTIMIZER), 64)
        for c in both
    )
    assert untied - tied == 6 * 32 * 64

    monkeypatch.setattr(report, "peak_flops", lambda: 1e9)
    train(state_of(), STEP, batches_of(3), steps=3, directory=tmp_path, progress=False)
    record = read_metrics(tmp_path)[-1]
    flops = training_flops(state_of(), 32)
    assert rel(record["mfu"], record["tokens_per_second"] * flops / 8e9) < 1e-6


def test_profile(tmp_path):
    train(
        state_of(), STEP, batches_of(6), steps=6, directory=tmp_path, progress=False, profile=True
    )
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))


def test_waiting_for_data_is_reported(tmp_path, monkeypatch):
    """Of each step but the first, which is compiled, the time that its batch took."""

    def step(state, batch):
        return state, {"loss": jnp.float32(1)}

    def batches(seconds: float) -> Iterator[dict[str, np.ndarray]]:
        for batch in batches_of(4):
            clock[0] += seconds  # while the batch is made
            yield batch

    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    state, options = {"w": jnp.zeros(())}, {"steps": 4, "progress": False}
    with pytest.warns(UserWarning, match=r"waited for data for 4 of 4 s \(100%\)"):
        train(state, step, batches(2.0), directory=tmp_path, **options)
    assert [r["data_wait"] for r in read_metrics(tmp_path)] == [2, 2, 2, 0]
    train(state, step, batches(0.001), **options)  # not worth a word


def test_bad_rows_are_reported(tmp_path):
    class Data(list):
        counts = {"rows": 9, "empty": 2, "malformed": 1, "overlong": 0}
        problems = ["file:3: empty row: empty text"]

    with pytest.warns(UserWarning, match="of 9 rows: 2 empty, 1 malformed.*file:3: empty row"):
        train(state_of(), STEP, Data(batches_of(1)), steps=1, progress=False)
