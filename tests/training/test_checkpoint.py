"""Checkpoints: exact on any mesh, refused where they do not belong, intact on a full disk."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hmf_jax.convert.directories import write_checksums
from hmf_jax.training import Checkpoints, Recipe, TrainState
from tests.training.test_step import on_mesh, same
from tests.util import random_model, tiny_config

CONFIG = tiny_config(("*",))
OPTIMIZER = Recipe(1e-3, "constant").optimizer(10)


class Data:
    """Batches that are nowhere but at a number."""

    def __init__(self, at: int = 0) -> None:
        self.at = at

    def get_state(self) -> dict[str, int]:
        return {"at": self.at}

    def set_state(self, state: dict[str, int]) -> None:
        self.at = state["at"]


def state_of(seed: int = 0, mesh: dict[str, int] | None = None, **options: Any) -> TrainState:
    """A state whose every array is random; with float32 master weights of a bfloat16 model."""
    model = random_model(CONFIG, jnp.bfloat16, seed=0)
    model = model if mesh is None else on_mesh(model, mesh)
    state = TrainState.create(model, options.pop("optimizer", OPTIMIZER), **options)
    rng = np.random.default_rng(seed)

    def fill(a: jax.Array) -> jax.Array:
        values = np.asarray(100 * rng.standard_normal(a.shape)).astype(a.dtype)
        return jax.device_put(values, a.sharding)

    changed = jax.tree.map(fill, (state.params, state.opt_state, state.step))
    return dataclasses.replace(state, params=changed[0], opt_state=changed[1], step=changed[2])


@pytest.fixture
def saved(tmp_path) -> Path:
    """Step 3, with only attention trained."""
    with Checkpoints(tmp_path / "saved", CONFIG) as checkpoints:
        checkpoints.save(3, state_of(1, trainable="self_attn"), Data(7))
    return tmp_path / "saved"


@pytest.mark.parametrize(
    "mesh",
    [
        dict(fsdp=2, tp=2),
        *(pytest.param(m, marks=pytest.mark.slow) for m in (None, dict(dp=2, tp=4))),
    ],
)
def test_a_checkpoint_is_exact_on_any_mesh(tmp_path, mesh):
    expected = state_of(1, dict(fsdp=4), trainable="self_attn,embed")
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(3, expected, Data(7))
    start, data = state_of(2, mesh, trainable="self_attn,embed"), Data()
    got, step = Checkpoints(tmp_path, CONFIG).restore(start, data)
    assert step == 3 and data.at == 7
    same(jax.tree.leaves(got), jax.tree.leaves(expected))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(start), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim) and a.dtype == b.dtype
    written = sum(f.stat().st_size for f in tmp_path.rglob("*") if f.is_file())
    assert written > sum(a.nbytes for a in jax.tree.leaves((expected.params, expected.opt_state)))


def test_the_state_may_be_deleted_while_it_is_saved(tmp_path):
    """Steps donate it."""
    state = state_of(1)
    expected = jax.device_get(state)
    overwrite = jax.jit(lambda s: jax.tree.map(jnp.zeros_like, s), donate_argnums=0)
    with Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(1, state)
        overwrite(state)
    same(checkpoints.restore(state_of(2))[0], expected)


def test_the_newest_are_kept(tmp_path):
    with Checkpoints(tmp_path, CONFIG, keep=2) as checkpoints:
        assert checkpoints.latest is None
        for step in range(1, 5):
            checkpoints.save(step, state_of(step))
    assert {p.name for p in tmp_path.iterdir()} == {"3", "4"}
    again = Checkpoints(tmp_path, CONFIG)
    assert again.latest == 4
    same(again.restore(state_of(0))[0].params, state_of(4).params)


def test_what_does_not_fit_is_refused(saved):
    data = Data(1)

    def refused(message: str, state: TrainState, config=CONFIG) -> None:
        with pytest.raises(ValueError, match=message):
            Checkpoints(saved, config).restore(state, data)
        assert data.at == 1

    fits: dict[str, Any] = dict(trainable="self_attn")
    Checkpoints(saved, CONFIG).restore(state_of(2, **fits), Data())
    wider = dataclasses.replace(CONFIG, intermediate_size=96)
    refused("of another model: intermediate_size 48 -> 96", state_of(2, **fits), wider)
    refused(r"only in the checkpoint: params\.\S*q_norm", state_of(2, trainable="q_proj"))
    refused(r"only in this run: params\.lm_head", state_of(2))
    refused(r"only in the checkpoint: opt_state", state_of(2, optimizer=optax.sgd(1.0), **fits))
    refused(
        r"q_proj.kernel: float32\[32, 64\] -> bfloat16\[32, 64\]",
        state_of(2, master_weights=False, **fits),
    )
    other = state_of(2, **fits)
    other.frozen["norm.weight"] = other.frozen["norm.weight"].at[3].add(0.01)
    refused("on top of other weights", other)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        Checkpoints(saved / "none", CONFIG).restore(other)
    with pytest.raises(ValueError, match="every=0"):
        Checkpoints(saved, CONFIG, every=0)


def test_data_of_more_processes_is_refused(saved):
    file = saved / "3" / "about.json"
    about = json.loads(file.read_text())
    file.write_text(json.dumps(about | {"data": about["data"] * 2}))
    write_checksums(saved / "3")
    with pytest.raises(ValueError, match="data of 2 processes; there are 1"):
        Checkpoints(saved, CONFIG).restore(state_of(2, trainable="self_attn"), Data())


FITS: dict[str, Any] = dict(trainable="self_attn")


def files_of(directory: Path) -> list[Path]:
    return sorted(p for p in directory.rglob("*") if p.is_file())


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 4
    file.write_bytes(data)


DAMAGES = {
    "a bit": flip_a_bit,
    "half of it is lost": lambda file: os.truncate(file, file.stat().st_size // 2),
    "missing": Path.unlink,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over(saved, tmp_path, damage):
    """Whatever happens to whichever file: what is read is the intact one before it."""
    with Checkpoints(saved, CONFIG) as checkpoints:
        checkpoints.save(6, state_of(2, **FITS), Data(9))
    whole = tmp_path / "whole"
    shutil.copytree(saved, whole)
    wanted = state_of(1, **FITS)
    files = files_of(saved / "6")
    assert len(files) > 8
    for number, file in enumerate(files):
        DAMAGES[damage](file)
        again = Checkpoints(saved, CONFIG)
        assert again.latest == 3, file
        assert len(again.problems) == 1 and "/6 " in again.problems[0], again.problems
        if number % 8 == 0:
            data = Data()
            got, step = again.restore(state_of(0, **FITS), data)
            assert step == 3 and data.at == 7
            same((got.params, got.opt_state), (wanted.params, wanted.opt_state))
        shutil.rmtree(saved)
        shutil.copytree(whole, saved)
    flip_a_bit(files[0])
    with Checkpoints(saved, CONFIG) as again:  # a run that goes on from step 3 writes its own
        again.save(6, wanted)
    assert Checkpoints(saved, CONFIG).latest == 6


def test_no_intact_checkpoint_is_refused(saved):
    flip_a_bit(files_of(saved / "3")[-1])
    before = [(p, p.read_bytes()) for p in files_of(saved)]
    with pytest.raises(ValueError, match=r"no intact checkpoint in \S*saved: .*/3 is damaged"):
        Checkpoints(saved, CONFIG).restore(state_of(2, **FITS))
    assert [(p, p.read_bytes()) for p in files_of(saved)] == before
    (saved / "3").rename(saved / "5")
    with pytest.raises(ValueError, match="no intact checkpoint"):
        Checkpoints(saved, CONFIG).restore(state_of(2, **FITS))


def test_a_checkpoint_under_the_name_of_another_step(saved):
    (saved / "3").rename(saved / "5")
    with pytest.raises(ValueError, match="/5 is that of another step"):
        assert Checkpoints(saved, CONFIG).latest


def test_what_a_killed_save_leaves_is_removed(saved):
    shutil.copytree(saved / "3" / "state", saved / ".unfinished-6" / "state.tmp")
    with Checkpoints(saved, CONFIG) as again:
        assert again.latest == 3 and not again.problems
        again.save(6, state_of(2, **FITS))
    assert {p.name for p in saved.iterdir()} == {"3", "6"}
    with pytest.raises(ValueError, match="already has a checkpoint of step 6"):
        again.save(6, state_of(2, **FITS))


def test_the_best_is_kept(tmp_path):
    with Checkpoints(tmp_path, CONFIG, keep=1) as checkpoints:
        for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None)):
            checkpoints.save(step, state_of(step), val_loss=loss)
    assert {p.name for p in tmp_path.iterdir()} == {"2", "4"}
    again = Checkpoints(tmp_path, CONFIG, keep=1)
    assert again.restore(state_of(0))[1] == 4 and again.best == (2, 1.0)
    same(again.restore(state_of(0), step=2)[0].params, state_of(2).params)
    with again:
        again.save(5, state_of(5), val_loss=0.5)
    assert {p.name for p in tmp_path.iterdir()} == {"5"} and again.best == (5, 0.5)
    flip_a_bit(files_of(tmp_path / "5")[-1])
    with pytest.raises(ValueError, match="damaged"):
        again.restore(state_of(0), step=5)


def test_frozen_numbers_that_change_places_are_noticed(saved):
    """The sum of all numbers would be the same."""
    other = state_of(2, **FITS)
    name = "layers.0.mlp.up_proj.kernel"
    other.frozen[name] = other.frozen[name][::-1]
    with pytest.raises(ValueError, match="on top of other weights"):
        Checkpoints(saved, CONFIG).restore(other)


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file can grow beyond 4 KiB."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# What Orbax was about to write when it failed.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore:coroutine:RuntimeWarning")
def test_a_full_disk(saved):
    checkpoints = Checkpoints(saved, CONFIG)
    state = state_of(5, trainable="self_attn")
    with pytest.raises(OSError, match=r"disk full\?\); the last good one: \S*saved/3"):
        with full_disk():
            checkpoints.save(4, state)
            checkpoints.wait()
    again = Checkpoints(saved, CONFIG)
    got, step = again.restore(state_of(2, trainable="self_attn"))
    assert step == 3
    same(got.params, state_of(1, trainable="self_attn").params)
    with again:
        again.save(5, state)
    assert {p.name for p in saved.iterdir()} == {"3", "5"}  # nothing half-written is left
