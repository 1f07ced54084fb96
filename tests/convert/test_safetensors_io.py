"""Our reader and writer against the safetensors library, and damaged files."""

from __future__ import annotations

import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from hmf_jax.convert.safetensors_io import (
    INDEX,
    SINGLE,
    Checkpoint,
    Pending,
    dtype_name,
    parse_size,
    read_header,
    write,
)


def example() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "a": rng.standard_normal((5, 3)).astype(ml_dtypes.bfloat16),
        "b": rng.standard_normal((7,)).astype(np.float32),
        "c": rng.standard_normal((2, 1, 4)).astype(np.float16),
        "d": rng.standard_normal(()).astype(np.float32),
        "e": np.zeros((0, 4), np.float32),
    }


def pending(values: dict[str, np.ndarray]) -> list[Pending]:
    return [Pending(n, dtype_name(v.dtype), v.shape, lambda v=v: v) for n, v in values.items()]


def same(a: np.ndarray, b: np.ndarray) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def test_reads_what_the_library_writes(tmp_path):
    values = example()
    save_file(values, tmp_path / SINGLE)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.tensors.keys() == values.keys()
    assert all(same(checkpoint.read(n), v) for n, v in values.items())
    assert same(checkpoint.read("a", 1, 3), values["a"][1:3])
    assert same(checkpoint.read("a", 3, 99), values["a"][3:])
    assert checkpoint.dtypes() == {"a": "BF16", "b": "F32", "c": "F16", "d": "F32", "e": "F32"}
    assert checkpoint.read("a").ctypes.data % 64 == 0


def test_writes_what_the_library_reads(tmp_path):
    values = example()
    write(tmp_path, pending(values))
    loaded = load_file(tmp_path / SINGLE)
    assert loaded.keys() == values.keys()
    assert all(same(loaded[n], v) for n, v in values.items())
    assert not (tmp_path / INDEX).exists()


def test_every_tensor_starts_at_a_multiple_of_its_element_size(tmp_path):
    """Whatever the order of dtypes and odd sizes: others map files into memory as they are."""
    values = {
        "one": np.zeros(3, ml_dtypes.bfloat16),
        "a longer name": np.zeros(5, np.float64),
        "two": np.zeros(1, np.float16),
        "three": np.zeros((3, 1), np.float32),
        "four": np.zeros(1, ml_dtypes.bfloat16),
    }
    for count in range(1, 6):  # headers of several lengths
        some = dict(list(values.items())[:count])
        write(tmp_path, pending(some))
        for name, info in read_header(tmp_path / SINGLE).items():
            assert info.offset % some[name].dtype.itemsize == 0, (count, name)
        length = int.from_bytes((tmp_path / SINGLE).read_bytes()[:8], "little")
        assert length % 8 == 0  # the format asks for it


def test_shards(tmp_path):
    values = {f"t{i}": np.full((4, 4), i, np.float32) for i in range(5)}
    written: list[int] = []
    write(tmp_path, pending(values), max_shard_size=128, done=written.append)
    files = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert files == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 320 == sum(written)
    assert index["weight_map"]["t0"] == files[0] and index["weight_map"]["t4"] == files[2]
    checkpoint = Checkpoint(tmp_path)
    assert all(same(checkpoint.read(n), v) for n, v in values.items())
    (tmp_path / INDEX).unlink()  # the file names still say how many there are
    assert Checkpoint(tmp_path).tensors.keys() == values.keys()


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path):
    values = {"small": np.zeros(2, np.float32), "large": np.zeros(99, np.float32)}
    write(tmp_path, pending(values), max_shard_size=16)
    assert len(list(tmp_path.glob("*.safetensors"))) == 2


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500 MiB", 500 * 2**20), ("1.5kb", 1500), (77, 77), ("2T", 2 * 10**12)],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "five", "-1GB", "0", "5XB"])
def test_bad_sizes(text):
    with pytest.raises(ValueError, match="write e.g. '5GB'"):
        parse_size(text)


def test_missing_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"lacks model\*\.safetensors"):
        Checkpoint(tmp_path)
    values = {f"t{i}": np.full((4, 4), i, np.float32) for i in range(5)}
    write(tmp_path, pending(values), max_shard_size=128)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="lacks model-00002-of-00003.safetensors; download"):
        Checkpoint(tmp_path)
    (tmp_path / INDEX).unlink()
    with pytest.raises(FileNotFoundError, match="2 of 3 weight files"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize("size", [0, 4, 8, 50, -1, -20])
def test_truncated_files(tmp_path, size):
    file = tmp_path / SINGLE
    save_file(example(), file)
    data = file.read_bytes()
    file.write_bytes(data[:size])
    with pytest.raises(ValueError, match="model.safetensors is truncated.*download it again"):
        Checkpoint(tmp_path)


def test_not_safetensors(tmp_path):
    (tmp_path / SINGLE).write_bytes((9).to_bytes(8, "little") + b"not json!" + b"0" * 99)
    with pytest.raises(ValueError, match="no valid safetensors header"):
        Checkpoint(tmp_path)
    (tmp_path / SINGLE).unlink()
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(ValueError, match="not a valid index"):
        Checkpoint(tmp_path)


def test_bytes_that_contradict_the_shape(tmp_path):
    header = json.dumps({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}).encode()
    (tmp_path / SINGLE).write_bytes(len(header).to_bytes(8, "little") + header + b"0" * 8)
    with pytest.raises(ValueError, match=r"a has 8 bytes, not F32\[3\]"):
        Checkpoint(tmp_path)


def test_contradictory_shards(tmp_path):
    one, two = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / one)
    save_file({"a": np.zeros(2, np.float32), "b": np.zeros(2, np.float32)}, tmp_path / two)
    with pytest.raises(ValueError, match="stored in more than one shard: a"):
        Checkpoint(tmp_path)
    save_file({"b": np.zeros(2, np.float32)}, tmp_path / two)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": two, "b": two}}))
    with pytest.raises(ValueError, match="not in the shard the index names: a"):
        Checkpoint(tmp_path)


def test_a_tensor_that_is_not_what_was_planned_is_not_written(tmp_path):
    wrong = Pending("a", "F32", (3,), lambda: np.zeros((2,), np.float32))
    with pytest.raises(ValueError, match="a: made float32"):
        write(tmp_path, [wrong])


def test_unknown_dtype():
    with pytest.raises(ValueError, match="dtype int32 is not supported"):
        dtype_name(np.int32)
