"""A run goes on with what it began with, replaces only what it wrote, refuses before it works."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np
import pytest

from hmf_jax.demo import write_checkpoint
from hmf_jax.loading import from_pretrained
from hmf_jax.stored.key import Unknown, key_of
from hmf_jax.text import load_tokenizer
from hmf_jax.training import (
    Batches,
    Checkpoints,
    Evaluation,
    TrainState,
    next_token_loss,
    read_metrics,
)
from hmf_jax.training.identity import MAY_CHANGE, Record, fields_compared, forget
from hmf_jax.training.loop import holding
from hmf_jax.training.run import Run, fine_tune
from hmf_jax.training.schema import TrainConfig
from tests.training.test_checkpoint import flip_a_bit

pytest.importorskip("grain")


def texts(file: Path, word: str, count: int = 12) -> None:
    rows = ({"text": f"{word} {i} " * (1 + i % 4)} for i in range(count))
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def config_of(directory: Path, **values: Any) -> TrainConfig:
    fields = {
        "model": str(directory / "base"),
        "data": str(directory / "a.jsonl"),
        "eval_data": str(directory / "b.jsonl"),
        "output": str(directory / "run"),
        "learning_rate": 0.1,
        "schedule": "constant",
        "steps": 4,
        "seq_len": 32,
        "batch_size": 2,
        "fsdp": 1,
        "save_every": 3,
        "eval_every": 1,
        "dtype": "float32",
        "lora_rank": 2,
    }
    return TrainConfig.of({**fields, **values})


def run(directory: Path, **values: Any) -> list[str]:
    options = {k: values.pop(k) for k in ("overwrite",) if k in values}
    said: list[str] = []
    fine_tune(config_of(directory, **values), progress=False, report=said.append, **options)
    return said


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, list[str]]:
    """A directory with a run that has ended, and what it said."""
    directory = tmp_path_factory.mktemp("finished")
    write_checkpoint(directory / "base", layer_kinds=("SWA",))
    texts(directory / "a.jsonl", "hello")
    texts(directory / "b.jsonl", "other", 5)
    return directory, run(directory)


@pytest.fixture
def there(finished, tmp_path) -> Path:
    shutil.copytree(finished[0], tmp_path / "there")
    return tmp_path / "there"


def content(directory: Path) -> dict[str, bytes]:
    return {
        str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()
    }


def refused(there: Path, message: str, error: type[Exception] = ValueError, **values: Any) -> None:
    """In one line, and everything stays as it was."""
    before = content(there)
    with pytest.raises(error, match=message) as caught:
        run(there, **values)
    assert "\n" not in str(caught.value)
    assert content(there) == before


# --- what a run says and keeps --------------------------------------------------------------------


def test_lines_and_validation(finished):
    directory, said = finished
    records = read_metrics(directory / "run")
    assert [r["step"] for r in records] == [1, 2, 3, 4]
    lines = [text for text in said if text.startswith("step ")]
    for record, line in zip(records, lines, strict=True):
        assert line.startswith(f"step {record['step']}/4  loss {record['loss']:.4g}"), line
        assert f"validation loss {record['val_loss']:.4g}" in line and "lr 0.1" in line, line
    best = min(records, key=lambda r: r["val_loss"])
    where = directory / "run" / "checkpoints" / str(int(best["step"]))
    assert where.is_dir() and any(f"after step {best['step']}: {where}" in t for t in said), said
    assert len(list((directory / "run").glob("checkpoints/*"))) <= 3


def test_the_key_of_a_compiled_step(finished):
    """It is found again by the same run, and by no other."""
    directory, said = finished
    assert any(line.startswith("compiled 1 program: 0 found") for line in said)

    def key(**values: Any) -> str:
        run = Run.prepare(config_of(directory, **{"remat": "block", **values}), None)
        return key_of(run.call(run.abstract_state(), run.config.remat))

    changes: list[dict[str, Any]] = [
        {}, {"learning_rate": 0.2}, {"steps": 5}, {"remat": "none"}, {"lora_alpha": 1.0},
        {"lora_rank": 3}, {"seq_len": 16}, {"dtype": "bfloat16"}, {"chunk_size": 16},
    ]  # fmt: skip
    assert len({key(**values) for values in changes}) == len(changes)
    assert key() == key(output=str(directory / "other"), save_every=1)
    own: Any = lambda *_, **__: (0, 1)  # noqa: E731
    other = Run.prepare(config_of(directory), own)
    with pytest.raises(Unknown):
        key_of(other.call(other.abstract_state(), "block"))


def test_the_validation_loss_is_the_mean_over_targets(finished):
    """Of the exported model, over all rows at once: neither rows nor padding weigh anything."""
    directory, _ = finished
    model = from_pretrained(directory / "run" / "model", dtype="float32", progress=False)
    options: dict[str, Any] = dict(length=32, batch_size=8, epochs=1, shuffle=False)
    batch: Any
    (batch,) = Batches(directory / "b.jsonl", load_tokenizer(directory / "base"), **options)
    total, count = next_token_loss(model, **batch)
    assert count == batch["loss_mask"].sum() > 0
    assert np.isclose(total / count, read_metrics(directory / "run")[-1]["val_loss"], rtol=1e-3)


def test_a_target_weighs_as_much_in_every_batch():
    """Sums of 6 and 1 over 1 and 3 targets: 7/4, not the mean of the means."""

    def batch(total: int, targets: int) -> dict[str, np.ndarray]:
        tokens = np.asarray([[total, 0, 0, 0]], np.int32)
        return {"tokens": tokens, "loss_mask": np.arange(4)[None] < targets}

    def loss(model: Any, tokens: Any, loss_mask: Any, **options: Any) -> Any:
        return tokens.sum() + 0.0, loss_mask.sum()

    @jax.tree_util.register_static
    class State:
        def model(self) -> None: ...

    state = cast(Any, State())
    assert Evaluation([batch(6, 1), batch(1, 3)], loss=loss)(state) == 7 / 4
    with pytest.raises(ValueError, match="nothing to predict in the data to validate on"):
        Evaluation([batch(0, 0)], loss=loss)(state)
    with pytest.raises(ValueError, match="no data to validate on"):
        Evaluation([])


# --- a run goes on with what it began with --------------------------------------------------------


def change_weights(there: Path) -> None:
    """In the middle of the file; sizes and times stay as they are."""
    file = there / "base" / "model.safetensors"
    times = file.stat().st_atime_ns, file.stat().st_mtime_ns
    flip_a_bit(file)
    os.utime(file, ns=times)


def change_tokenizer(there: Path) -> None:
    file = there / "base" / "tokenizer_config.json"
    file.write_text(file.read_text().replace("<|im_end|>", "<|endoftext|>"))


def change_template(there: Path) -> None:
    (there / "base" / "chat_template.jinja").write_text("{{ messages }}")


def change_data(there: Path) -> None:
    file = there / "a.jsonl"
    file.write_text(file.read_text().replace("hello", "hullo"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_weights, r"base weights \(other bytes than before\)"),
        (change_tokenizer, r"tokenizer \(other bytes than before\)"),
        (change_template, r"chat template \(other bytes than before\)"),
        (change_data, r"data \S*a.jsonl -> \S*a.jsonl \(other bytes\)"),
    ],
)
def test_other_inputs_are_refused(there, change, message):
    """Also where the run has ended: another model would be the answer."""
    change(there)
    refused(there, f"run holds another run: .*{message}. Choose another output, or begin anew")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (dict(learning_rate=0.05), "learning_rate 0.1 -> 0.05"),
        (dict(seed=1, seq_len=64), "seed 0 -> 1; seq_len 32 -> 64"),
        (dict(schedule="linear"), r"schedule 'constant' -> 'linear'; steps 4 -> 4|schedule"),
        (dict(lora_rank=None), "lora_rank 2 -> None; trainable 'lora' -> None"),
        (dict(batch_size=4), "rows of a batch 2 -> 4"),
        (dict(column="text"), "column None -> 'text'"),
        (dict(template_options={"enable_thinking": False}), "template_options {} -> {'enable_th"),
        (
            dict(config_overrides={"rms_norm_eps": 0.1}),
            "config rms_norm_eps .* -> 0.1",
        ),
        (dict(steps=3), r"steps 4 -> 3 \(4 are done\)"),
        (dict(eval_data=None, eval_every=None), r"eval_data 1 file\(s\) -> 0"),
        (dict(dtype="bfloat16"), "dtype 'float32' -> 'bfloat16'"),
    ],
)
def test_another_recipe_is_refused(there, values, message):
    refused(there, message, **values)


def test_what_may_change(finished):
    """Where things are, how the same is computed, and what is kept; nothing else."""
    directory, _ = finished
    config = config_of(directory)
    (directory / "moved").mkdir(exist_ok=True)
    shutil.copy(directory / "a.jsonl", directory / "moved" / "a.jsonl")
    record = Record.load(directory / "run")
    assert record is not None
    new = dataclasses.replace(
        config, data=str(directory / "moved" / "a.jsonl"), steps=9, save_every=7, keep=5, tp=2,
        remat="none", accumulate=2, impl="chunked", log_every=3, export="best", eval_every=2,
    )  # fmt: skip
    assert record.changes(Run.prepare(new, None).identity(), done=4) == []
    names = {f.name for f in dataclasses.fields(TrainConfig)}
    assert MAY_CHANGE < names and set(fields_compared(config)) - {"stage"} == names - MAY_CHANGE


@pytest.mark.parametrize("values", [dict(schedule="cosine"), dict(warmup=0.5)])
def test_the_length_may_not_change_where_the_learning_rate_depends_on_it(finished, values):
    directory, _ = finished
    prepared = [Run.prepare(config_of(directory, steps=n, **values), None) for n in (4, 9)]
    old, new = (r.identity() for r in prepared)
    changes = Record(directory, old, {}).changes(new, done=2)
    assert changes == ["steps 4 -> 9 (the learning rate depends on them)"]


def test_a_longer_run_goes_on(there):
    said = run(there, steps=5, export="best")
    assert "Going on from step 4." in said
    assert [r["step"] for r in read_metrics(there / "run")] == [1, 2, 3, 4, 5]


def test_damaged_checkpoints(there):
    newest = max((there / "run" / "checkpoints").iterdir(), key=lambda p: int(p.name))
    flip_a_bit(newest / "about.json")
    config = config_of(there)
    checkpoints = Checkpoints(
        there / "run" / "checkpoints", Run.prepare(config, None).model_config, every=3
    )
    assert checkpoints.latest == 3 and "4 is damaged" in checkpoints.problems[0]
    for directory in (there / "run" / "checkpoints").iterdir():
        (directory / "about.json").unlink(missing_ok=True)
    refused(there, "no intact checkpoint in .*Restore one from a copy, or begin anew")


def test_a_damaged_record(there):
    (there / "run" / "run.json").write_text("{")
    refused(there, r"run\.json is not valid JSON")
    (there / "run" / "run.json").write_text("{}")
    refused(there, r"run\.json is no record of a run; choose another output")


# --- a run replaces only what it wrote ------------------------------------------------------------


def test_the_base_is_never_replaced(there, monkeypatch):
    base = there / "base"
    (there / "link").symlink_to(base)
    shutil.copytree(base, there / "other" / "model")
    inside = f"would write to {there}/other/model, where its model is"
    for output in (base, there / "link", there / "run" / ".." / "base"):
        refused(there, "where its model is", output=str(output))
    refused(there, inside, model=str(there / "other" / "model"), output=str(there / "other"))
    (there / "linked").symlink_to(there / "other")
    refused(there, inside, model=str(there / "linked" / "model"), output=str(there / "other"))
    monkeypatch.chdir(there / "other")
    refused(there, "where its model is", model="model", output=".")
    refused(there, "holds a model", FileExistsError, output=str(there / "run" / "model"))
    shutil.copytree(base, there / "third")
    refused(there, "third holds a model", FileExistsError, output=str(there / "third"))
    refused(there, "a.jsonl is a file", NotADirectoryError, output=str(there / "a.jsonl"))
    (there / "new" / "model").mkdir(parents=True)
    shutil.copy(there / "a.jsonl", there / "new" / "model")
    data = str(there / "new" / "model" / "a.jsonl")
    refused(there, "where its data is", output=str(there / "new"), data=data)


@pytest.mark.parametrize(
    "name", ["adapter/mine.bin", "model/mine.txt", "checkpoints/3/a", "loss.png"]
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_others_wrote_is_never_replaced(there, name, overwrite):
    file = there / "new" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    message = f"{file.relative_to(there / 'new').parts[0]} is there, and no run has written it"
    output = str(there / "new")
    refused(there, message, FileExistsError, output=output, overwrite=overwrite)


def test_a_model_that_took_the_place_of_the_exported_one(there):
    flip_a_bit(there / "run" / "model" / "model.safetensors")
    refused(there, "model has changed since the run wrote it", FileExistsError, steps=5)
    shutil.rmtree(there / "run" / "model")
    shutil.copytree(there / "base", there / "other")
    (there / "run" / "model").symlink_to(there / "other")
    refused(there, "model is a symbolic link", FileExistsError, steps=5)


@pytest.mark.slow
def test_overwrite_begins_anew(there):
    (there / "run" / "notes.txt").write_text("mine")
    said = run(there, overwrite=True, steps=1, learning_rate=0.05, eval_data=None, eval_every=None)
    assert not any(text.startswith("Going on") for text in said)
    assert [r["step"] for r in read_metrics(there / "run")] == [1]
    assert {p.name for p in (there / "run" / "checkpoints").iterdir()} == {"1"}
    assert TrainConfig.load(there / "run" / "config.yaml").learning_rate == 0.05
    assert (there / "run" / "notes.txt").read_text() == "mine"


def test_what_is_forgotten(there):
    (there / "run" / "notes.txt").write_text("mine")
    (there / "run" / "checkpoints" / "3" / "more").write_text("")
    record = Record.load(there / "run")
    assert record is not None
    forget(record)
    left = {p.name for p in (there / "run").iterdir()}
    assert left == {"model", "run.json", "notes.txt"} and set(record.wrote) == {"model"}


# --- one run per directory ------------------------------------------------------------------------


def test_a_second_run_in_the_directory_is_refused(there):
    found: list[Exception] = []

    def second() -> None:
        try:
            run(there)
        except BlockingIOError as e:
            found.append(e)

    with holding(there / "run"), holding(there / "run" / "checkpoints"):
        before = content(there)
        thread = threading.Thread(target=second)
        thread.start()
        thread.join()
        assert content(there) == before
    assert len(found) == 1 and f"run is in use by process {os.getpid()} on" in str(found[0])
    with holding(there / "run"):
        pass


def test_the_config_must_be_one(there):
    with pytest.raises(TypeError, match="must be a TrainConfig, not dict; TrainConfig.load reads"):
        fine_tune({"model": "x"})  # pyright: ignore[reportArgumentType]


def test_moments_are_float32(finished):
    """Whatever the model and the trained parameters are held in."""
    directory, _ = finished
    values: dict[str, Any] = dict(dtype="bfloat16", lora_rank=None, master_weights=False)
    state: TrainState = Run.prepare(config_of(directory, **values), None).abstract_state()
    assert {str(p.dtype) for p in state.params.values()} == {"bfloat16"}
    moments = [a for a in jax.tree.leaves(state.opt_state) if a.ndim > 0]
    assert len(moments) == 2 * len([p for p in state.params.values() if p.ndim > 0])
    assert {str(a.dtype) for a in moments} == {"float32"}


@pytest.mark.slow
def test_remat_is_chosen_once(finished, tmp_path, monkeypatch, caplog):
    """The program that shows that the choice fits is the one that runs, and a run that goes on has
    the choice that it began with."""
    for name in ("base", "a.jsonl", "b.jsonl"):
        source = finished[0] / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    monkeypatch.setattr("hmf_jax.training.run.device_limit", lambda: 10**9)
    with jax.log_compiles(), caplog.at_level("WARNING"):
        run(tmp_path, steps=2)
    made = [
        r.getMessage() for r in caplog.records if "XLA compilation of jit(step)" in r.getMessage()
    ]
    assert not made  # it was compiled in a thread before, which this log leaves out
    record = Record.load(tmp_path / "run")
    assert record is not None and record.remat == ["none"]
    record.remat = ["dots"]
    record.save()
    run(tmp_path, steps=3)
    record = Record.load(tmp_path / "run")
    assert record is not None and record.remat == ["dots"]
