"""Rows: blocks of a tensor in any order; experts stored one by one, or stacked."""

from __future__ import annotations

import time
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hmf_jax.convert import hf_to_jax, jax_to_hf, rows
from hmf_jax.convert.safetensors_io import DTYPES, Checkpoint, Pending, write

E, F, D = 4, 6, 8
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def table(split: bool = True) -> list[rows.Entry]:
    """An embedding and the experts of one layer."""
    experts = rows.under("model.layers.0.mlp", rows.experts(E, F, D, "experts", split=split), "mlp")
    return rows.entries([rows.Row("model.embed.weight", "embed", (10, D), "same"), *experts])


def tensors(stacked: bool, dtype=BFLOAT16) -> dict[str, np.ndarray]:
    """The same random checkpoint in either layout."""
    rng = np.random.default_rng(0)
    out = {"model.embed.weight": rng.standard_normal((10, D)).astype(dtype)}
    gate, up = (rng.standard_normal((E, F, D)).astype(dtype) for _ in range(2))
    down = rng.standard_normal((E, D, F)).astype(dtype)
    name = "model.layers.0.mlp.experts"
    if stacked:
        both = np.concatenate([gate, up], axis=1)
        return out | {f"{name}.gate_up_proj": both, f"{name}.down_proj": down}
    for e in range(E):
        out[f"{name}.{e}.gate_proj.weight"] = gate[e]
        out[f"{name}.{e}.up_proj.weight"] = up[e]
        out[f"{name}.{e}.down_proj.weight"] = down[e]
    return out


def write_checkpoint(directory, values):
    directory.mkdir(exist_ok=True)
    names = {dtype: name for name, dtype in DTYPES.items()}
    write(
        directory, [Pending(n, names[v.dtype], v.shape, lambda v=v: v) for n, v in values.items()]
    )
    return directory


def load(directory, entries, mesh=None, dtype="bfloat16", **options):
    def target(e):
        spec = PartitionSpec("x", None, "y") if len(e.shape) == 3 else PartitionSpec()
        sharding = None if mesh is None else NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(e.parameter_shape, dtype, sharding=sharding)

    abstract = {e.path: target(e) for e in entries}
    return hf_to_jax.load(directory, entries, abstract, progress=False, **options)


def contents(directory) -> dict[str, np.ndarray]:
    checkpoint = Checkpoint(directory)
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def same(a, b) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].tobytes() == b[n].tobytes() for n in a
    )


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 5), st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_blocks_of_groups_take_every_row_once(groups, heights):
    found = rows.entries(
        row
        for i, height in enumerate(heights)
        for row in rows.linear(groups * height, 3, "packed", path=f"p{i}", groups=groups)
    )
    count = groups * sum(heights)
    assert rows.tensor_shape(found) == (count, 3)
    numbers = np.arange(count)
    assert sorted(np.concatenate([numbers[e.rows] for e in found])) == list(numbers)
    # Within a group the blocks follow one another: what a checkpoint of packed heads looks like.
    packed = [numbers[e.rows].reshape(groups, -1) for e in found]
    assert np.concatenate(packed, axis=1).reshape(-1).tolist() == list(numbers)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3))
def test_parts_of_experts_take_every_element_once(count, width, d):
    for e in rows.entries(rows.experts(count, width, d, "experts", split=True)):
        seen = np.zeros(e.shape, int)
        for _, index in e.pieces():
            seen[index] += 1
        assert (seen == 1).all()
        assert len({name for name, _ in e.pieces()}) == count * len(e.parts)


def test_packed_heads_become_parameters_and_come_back(tmp_path):
    packed = [("q", 2), ("k", 2), ("v", 4), ("z", 4)]  # rows per group, of 3 groups
    entries = rows.entries(
        row for n, height in packed for row in rows.linear(3 * height, D, "qkvz", path=n, groups=3)
    )
    tensor = np.arange(36 * D, dtype=np.float32).reshape(36, D)
    write_checkpoint(tmp_path / "in", {"qkvz.weight": tensor})
    params = load(tmp_path / "in", entries, dtype="float32")
    v = np.concatenate([tensor[g * 12 + 4 : g * 12 + 8] for g in range(3)])
    np.testing.assert_array_equal(params["v.kernel"], v.T)
    jax_to_hf.save(tmp_path / "out", {}, entries, params, progress=False)
    assert same(contents(tmp_path / "out"), {"qkvz.weight": tensor})


@pytest.mark.parametrize("split", [True, False])
@pytest.mark.parametrize("stacked", [True, False])
def test_both_layouts_are_read_and_the_own_one_is_written(tmp_path, stacked, split):
    entries = table(split)
    write_checkpoint(tmp_path / "in", tensors(stacked))
    params = load(tmp_path / "in", entries)
    want = tensors(stacked=True)
    for half in ("gate_up_proj", "down_proj"):
        stack = want[f"model.layers.0.mlp.experts.{half}"]
        np.testing.assert_array_equal(params[f"mlp.experts.{half}"], stack.swapaxes(1, 2))
    jax_to_hf.save(tmp_path / "out", {}, entries, params, progress=False)
    assert same(contents(tmp_path / "out"), tensors(stacked=not split))
    assert same(jax_to_hf.tensors(entries, params), tensors(stacked=not split))


def test_one_expert(tmp_path):
    entries = rows.entries(rows.experts(1, F, D, "experts", split=True))
    shapes = {"gate": (F, D), "up": (F, D), "down": (D, F)}
    values = {f"experts.0.{n}_proj.weight": np.ones(s, np.float32) for n, s in shapes.items()}
    write_checkpoint(tmp_path, values)
    params = load(tmp_path, entries)
    assert params["experts.down_proj"].shape == (1, F, D)


@pytest.mark.parametrize("stacked", [True, False])
def test_experts_go_straight_to_their_devices(tmp_path, stacked):
    write_checkpoint(tmp_path / "in", tensors(stacked))
    mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("x", "y"))
    split, whole = load(tmp_path / "in", table(), mesh), load(tmp_path / "in", table())
    for path, x in split.items():
        for shard in x.addressable_shards:
            np.testing.assert_array_equal(shard.data, np.asarray(whole[path])[shard.index])
    shards = split["mlp.experts.gate_up_proj"].addressable_shards
    assert {s.data.shape for s in shards} == {(E // 4, D, 2 * F // 2)}
    jax_to_hf.save(tmp_path / "out", {}, table(), split, progress=False)
    assert same(contents(tmp_path / "out"), tensors(stacked=False))


def test_each_part_keeps_its_dtype(tmp_path):
    values = tensors(stacked=False)
    name = "model.layers.0.mlp.experts.2.up_proj.weight"
    values[name] = values[name].astype(np.float32)
    values["model.layers.0.mlp.experts.0.up_proj.weight"] = np.full((F, D), 0.1, np.float16)
    write_checkpoint(tmp_path / "in", values)
    stored = hf_to_jax.stored_dtypes(tmp_path / "in", table())
    assert stored["model.layers.0.mlp.experts.down_proj"] == "BF16"
    assert stored[name] == "F32" and hf_to_jax.held_dtype(stored, table()[1]) == np.float32
    params = load(tmp_path / "in", table(), dtype="float32")
    jax_to_hf.save(tmp_path / "out", {}, table(), params, dtypes=stored, progress=False)
    assert same(contents(tmp_path / "out"), values)


def test_what_is_wrong_with_experts_is_said(tmp_path):
    values = tensors(stacked=False)
    name = "model.layers.0.mlp.experts"
    del values[f"{name}.3.up_proj.weight"]
    values[f"{name}.2.gate_proj.weight"] = np.zeros((F + 1, D), np.float32)
    values[f"{name}.1.down_proj.weight"][2, 3] = np.nan
    values[f"{name}.4.gate_proj.weight"] = np.zeros((F, D), np.float32)
    with pytest.raises(ValueError) as error:
        load(write_checkpoint(tmp_path / "parts", values), table())
    assert {line.strip() for line in str(error.value).split("\n")[1:]} == {
        f"missing: {name}.3.up_proj.weight [6, 8]",
        f"wrong shape: {name}.2.gate_proj.weight is [7, 8], must be [6, 8]",
        f"not finite: {name}.1.down_proj.weight holds NaN or infinity",
        f"unexpected: {name}.4.gate_proj.weight",
    }
    only = {"model.embed.weight": values["model.embed.weight"]}
    with pytest.raises(ValueError) as error:
        load(write_checkpoint(tmp_path / "none", only), table())
    assert f"missing: {name}.down_proj [4, 8, 6], or {name}.0.down_proj.weight and so on" in str(
        error.value
    )
    both = tensors(stacked=True) | tensors(stacked=False)
    with pytest.raises(ValueError, match=f"unexpected: {name}.0.down_proj.weight"):
        load(write_checkpoint(tmp_path / "both", both), table())


def test_the_expert_that_is_not_finite_is_named(tmp_path):
    values = tensors(stacked=False)
    values["model.layers.0.mlp.experts.1.down_proj.weight"][2, 3] = np.inf
    with pytest.raises(ValueError, match="not finite: model.layers.0.mlp.experts.1.down_proj.weig"):
        load(write_checkpoint(tmp_path, values), table())


def test_prefixes_and_tensors_that_nothing_needs(tmp_path):
    values = tensors(stacked=False)
    renamed = {n.replace("model.", "model.language_model.", 1): v for n, v in values.items()}
    renamed["model.visual.proj.weight"] = renamed["mtp.x"] = np.zeros(3, np.float32)
    write_checkpoint(tmp_path, renamed)
    rules: dict[str, Any] = {"prefixes": {"model.language_model.": "model."}}
    params = load(tmp_path, table(), ignored=("model.visual.", "mtp."), **rules)
    np.testing.assert_array_equal(params["embed"], values["model.embed.weight"])
    stored = hf_to_jax.stored_dtypes(tmp_path, table(), **rules)
    assert stored["model.embed.weight"] == "BF16"
    with pytest.raises(ValueError, match="unexpected: model.visual.proj.weight"):
        load(tmp_path, table(), ignored=("mtp.",), **rules)
    both = renamed | {"model.embed.weight": values["model.embed.weight"]}
    write_checkpoint(tmp_path, both)
    with pytest.raises(ValueError, match="unexpected: model.language_model.embed.weight"):
        load(tmp_path, table(), ignored=("model.visual.", "mtp."), **rules)


def test_many_experts_are_checked_quickly_and_said_briefly(tmp_path):
    found = []
    for i in range(48):
        found += rows.under(f"model.layers.{i}", rows.experts(64, 1, 1, "experts", split=True))
    entries = rows.entries(found)
    names = [name for e in entries for name, _ in e.pieces()]
    one = np.zeros((1, 1), BFLOAT16)
    write(tmp_path, [Pending(n, "BF16", (1, 1), lambda: one) for n in names])
    began = time.monotonic()
    checkpoint, sources = hf_to_jax.check(tmp_path, entries)
    assert time.monotonic() - began < 2 and len(checkpoint.tensors) == 48 * 64 * 3
    assert len(sources) == 96
    fewer = rows.entries(row._replace(shape=(60, *row.shape[1:])) for row in found)
    with pytest.raises(ValueError, match="576 tensors do not fit") as error:
        hf_to_jax.check(tmp_path, fewer)
    assert str(error.value).count("\n") < 60


def test_a_vector_has_no_parts():
    (entry,) = rows.entries(rows.vector(3, "bias"))
    assert list(entry.pieces()) == []
