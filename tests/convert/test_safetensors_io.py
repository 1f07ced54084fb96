"""Our reader and writer against the safetensors library, and damaged files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import SafetensorError, safe_open
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


@pytest.mark.parametrize(
    "text", ["", "five", "-1GB", "0", "5XB", "0.4", "nan", "1e9", True, None, 1.5, [5], "9" * 5000]
)
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


def write_raw(file: Path, header: object, data: bytes = bytes(24)) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def entry(*ends: Any, dtype: Any = "F32", shape: Any = None) -> dict[str, Any]:
    shape = [(ends[1] - ends[0]) // 4] if shape is None else shape
    return {"dtype": dtype, "shape": shape, "data_offsets": list(ends)}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"a": entry(0, 12), "b": entry(8, 24)}, "a and b share bytes"),
        ({"a": entry(0, 24), "b": entry(0, 24)}, "a and b share bytes"),
        ({"a": entry(0, 8), "b": entry(12, 24)}, "4 bytes before b belong to no tensor"),
        ({"a": entry(4, 24)}, "4 bytes before a belong to no tensor"),
        ({"a": entry(0, 20)}, "the last 4 bytes belong to no tensor"),
        ({}, "the last 24 bytes belong to no tensor"),
        ({"a": entry(0, 28)}, "is truncated: it should have 4 bytes more"),
        ({"a": entry(0, 10**15)}, "is truncated"),
        ({"a": entry(0, 24, shape=[5])}, r"a has 24 bytes, not F32\[5\]"),
        ({"a": entry(0, 24, shape=[2**62, 4])}, "a has 24 bytes, not"),  # 2^64 elements: 0 in C
        ({"a": entry(0, 24, shape=[-2, -3])}, r"a has the shape \[-2, -3\], must be"),
        ({"a": entry(0, 24, shape=[6.0])}, r"a has the shape \[6.0\], must be"),
        ({"a": entry(0, 24, shape=[True, 6])}, "a has the shape"),
        ({"a": entry(0, 24, shape="6")}, "a has the shape 6, must be"),
        ({"a": entry(24, 0, shape=[6])}, r"a has data_offsets \[24, 0\], must be \[begin, end\]"),
        ({"a": entry(0, 24, 24, shape=[6])}, "a has data_offsets"),
        ({"a": entry(-4, 20, shape=[6])}, "a has data_offsets"),
        ({"a": entry("0", "24", shape=[6])}, "a has data_offsets"),
        ({"a": entry(0, 24, dtype="BF17", shape=[6])}, "a has the unknown dtype BF17"),
        ({"a": entry(0, 24, dtype=["F32"], shape=[6])}, "a has the unknown dtype"),
        ({"a": [0, 24]}, "a must be a JSON object"),
        ({"a": entry(0, 24), "__metadata__": {"format": 1}}, "__metadata__ must be an object of"),
        ({"a": entry(0, 24), "__metadata__": ["pt"]}, "__metadata__ must be an object of strings"),
        ([1], "no valid safetensors header"),
        (b'{"a": 1, "a": 2}', "the key 'a' is there twice"),
        (b'\xef\xbb\xbf{"a": 1}', "no valid safetensors header"),
        (b'{"a": ' + b"[" * 5000 + b"]" * 5000 + b"}", "nested too deeply"),
        (b'{"a": [' + b"[]," * 2_600_000 + b"[]]}", "far too many entries"),
        (b'{"a": NaN}', "is not a finite number"),
        (b"\xff\xfe", "no valid safetensors header"),
        ({"\x1b[2Jx": entry(0, 20)}, "belong to no tensor"),
        ({"\x1b[2Jx": entry(0, 24, shape=[7])}, r"\\x1b\[2Jx has 24 bytes"),
        ({"x" * 10_000: entry(0, 24, shape=[7])}, r"xxx\.\.\. \(10,000 characters\) has 24 bytes"),
    ],
)
def test_headers_that_lie(tmp_path, header, message):
    file = tmp_path / SINGLE
    write_raw(file, header)
    with pytest.raises(ValueError, match=message) as error:
        Checkpoint(tmp_path)
    text = str(error.value)
    assert "\n" not in text and "\x1b" not in text and str(file) in text and len(text) < 800
    with pytest.raises(SafetensorError):  # the library refuses all of them, too
        safe_open(file, framework="numpy")


def test_headers_that_are_unusual_but_right(tmp_path):
    header = {
        "__metadata__": {"format": "pt"},
        "empty": entry(8, 8, shape=[0, 3]),
        "b": entry(8, 24),
        "a": entry(0, 8),
        "scalar": entry(24, 28, shape=[]),
    }
    write_raw(tmp_path / SINGLE, json.dumps(header).encode() + b"   ", bytes(28))
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.read("b").shape == (4,) and checkpoint.read("empty").shape == (0, 3)
    assert load_file(tmp_path / SINGLE).keys() == checkpoint.tensors.keys()


def test_an_absurd_header_is_not_read(tmp_path):
    with (tmp_path / SINGLE).open("wb") as f:  # sparse: takes no space
        f.write((200_000_000).to_bytes(8, "little"))
        f.truncate(300_000_000)
    with pytest.raises(ValueError, match="has a header of 200,000,000 bytes; 100,000,000 may be"):
        Checkpoint(tmp_path)


def test_weights_that_git_lfs_has_not_fetched(tmp_path):
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5000000000\n"
    (tmp_path / SINGLE).write_text(pointer)
    with pytest.raises(ValueError, match="is a git-lfs pointer, .* run `git lfs pull`"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a.gguf", "hmf-jax convert FILE.gguf DIR"),
        ("pytorch_model.bin", "convert them to safetensors"),
    ],
)
def test_weights_of_other_formats(tmp_path, name, message):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(FileNotFoundError, match=message):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ({"weight_map": {"a": "../other/model.safetensors"}}, "is not the name of a file in it"),
        ({"weight_map": {"a": "/etc/passwd"}}, "/etc/passwd is not the name of a file in it"),
        ({"weight_map": {"a": "x" * 5000}}, "is not the name of a file in it"),
        ({"weight_map": {"a": "\u00e9" * 200}}, "is not the name of a file in it"),
        ({"weight_map": {"a": "\ud800"}}, r"\\ud800 is not the name of a file in it"),
        ({"weight_map": {"a": "loop.safetensors"}}, "lacks loop.safetensors"),
        ({"weight_map": {"a": "x/../../y"}}, "is not the name of a file in it"),
        ({"weight_map": {"a": "link.safetensors"}}, "link.* is a symbolic link that leads out of"),
        ({"weight_map": {"a": 1}}, "is not a valid index"),
        ({"weight_map": {"a": ""}}, "is not a valid index"),
        ({"weight_map": ["a"]}, "is not a valid index"),
        ({"weight_map": {}}, "is not a valid index"),
        ([], "must hold a JSON object"),
        ({"weight_map": {"a": "x\x1b[2J.safetensors"}}, r"lacks x\\x1b\[2J.safetensors"),
        (
            {"weight_map": {str(i): f"{i}.safetensors" for i in range(10_001)}},
            "10,001 weight files",
        ),
        ({"weight_map": {"a": "one.safetensors", "b": "one.safetensors"}}, "index names: b"),
    ],
)
def test_indices_that_lie(tmp_path, index, message):
    model, outside = tmp_path / "model", tmp_path / "other"
    for directory in (model, outside):
        directory.mkdir()
        save_file({"a": np.zeros(2, np.float32)}, directory / "one.safetensors")
    (outside / "one.safetensors").rename(outside / SINGLE)
    (model / "link.safetensors").symlink_to(outside / SINGLE)
    (model / "loop.safetensors").symlink_to("loop.safetensors")
    (model / INDEX).write_text(json.dumps(index))
    with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
        Checkpoint(model)
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)


def test_weights_and_an_index_of_others(tmp_path):
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / SINGLE)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": SINGLE}}))
    assert Checkpoint(tmp_path).tensors.keys() == {"a"}
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "one.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    with pytest.raises(ValueError, match="holds both model.safetensors and model.safe.*: remove"):
        Checkpoint(tmp_path)


def test_a_file_that_is_replaced_while_it_is_read(tmp_path):
    """Its header would say where the tensors of another file are."""
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / SINGLE)
    checkpoint = Checkpoint(tmp_path)
    assert checkpoint.read("a").tolist() == [0, 0]
    save_file({"a": np.ones(2, np.float32)}, tmp_path / "new")
    (tmp_path / "new").rename(tmp_path / SINGLE)
    with pytest.raises(ValueError, match="was replaced while it was read; load it again"):
        checkpoint.read("a")


def test_shards_of_two_saves(tmp_path):
    for name in ("model-00001-of-00002.safetensors", "model-00001-of-00003.safetensors"):
        save_file({name: np.zeros(2, np.float32)}, tmp_path / name)
    with pytest.raises(ValueError, match="weight files that do not belong together and no"):
        Checkpoint(tmp_path)


def test_links_inside_and_those_of_the_cache(tmp_path):
    """Where the hub keeps them: snapshots/REVISION has links to blobs of the same repository."""
    repository = tmp_path / "models--org--name"
    (repository / "blobs").mkdir(parents=True)
    (repository / "snapshots" / "abc").mkdir(parents=True)
    save_file({"a": np.zeros(2, np.float32)}, repository / "blobs" / "0123")
    link = repository / "snapshots" / "abc" / SINGLE
    link.symlink_to("../../blobs/0123")
    assert Checkpoint(link.parent).tensors.keys() == {"a"}
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / SINGLE).symlink_to(repository / "blobs" / "0123")
    with pytest.raises(ValueError, match="leads out of the directory"):
        Checkpoint(tmp_path / "elsewhere")
    (tmp_path / "whole").symlink_to(link.parent)  # what the user names is followed
    assert Checkpoint(tmp_path / "whole").tensors.keys() == {"a"}


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
