"""Ways to damage a model directory, each with what is right to happen then.

A kind is a function that changes a directory, at a place that `rng` chooses:

    @kind("config", REFUSED)
    def unknown_family(directory: Path, rng: random.Random) -> None: ...

The directory holds one weight file, unless the kind asks for another form. To try a new one alone:
pytest tests/mutated -m "slow or not slow" -k NAME.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

REFUSED = "refused"  # an error that says what is wrong
SAME = "same"  # an error, or a model whose weights are those that were saved
OTHER = "other"  # as well a model with other weights: the format has nothing that would tell
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

type Change = Callable[[Path, random.Random], None]


@dataclasses.dataclass(frozen=True)
class Kind:
    """`form` is "file" (one weight file), "shards", "orbax", "unsummed" (without checksums) or a
    base family (one weight file of a tiny model)."""

    name: str
    group: str
    right: str
    form: str
    change: Change


KINDS: list[Kind] = []


def kind(group: str, right: str, form: str = "file") -> Callable[[Change], Change]:
    def add(change: Change) -> Change:
        KINDS.append(Kind(change.__name__, group, right, form, change))
        return change

    return add


def garbage(rng: random.Random) -> Any:
    """A value of a type or size that no setting has."""
    nested: Any = 1
    for _ in range(50):
        nested = [nested]
    return rng.choice(
        [
            None,
            True,
            -1,
            0.5,
            10**30,
            -1e300,
            "x",
            "\x1b[31m",
            "\ud800",
            [],
            [[]],
            {},
            {"a": 1},
            nested,
        ]
    )


# --- bytes of the weight file


def data(change: Callable[[bytearray, random.Random], bytes | bytearray]) -> Change:
    def apply(directory: Path, rng: random.Random) -> None:
        file = directory / WEIGHTS
        file.write_bytes(change(bytearray(file.read_bytes()), rng))

    apply.__name__ = change.__name__
    return apply


def header_length(raw: bytes | bytearray) -> int:
    return int.from_bytes(raw[:8], "little")


def flip(raw: bytearray, start: int, stop: int, rng: random.Random) -> bytes:
    raw[rng.randrange(start, stop)] ^= 1 << rng.randrange(8)
    return bytes(raw)


@kind("bytes", REFUSED)
@data
def truncated(raw: bytearray, rng: random.Random) -> bytes | bytearray:
    return raw[: rng.randrange(len(raw))]


@kind("bytes", REFUSED)
@data
def truncated_in_the_header(raw: bytearray, rng: random.Random) -> bytes | bytearray:
    return raw[: rng.randrange(8 + header_length(raw))]


@kind("bytes", REFUSED)
@data
def bytes_added(raw: bytearray, rng: random.Random) -> bytes | bytearray:
    return raw + rng.randbytes(rng.randrange(1, 5000))


@kind("bytes", REFUSED)
@data
def bytes_inserted(raw: bytearray, rng: random.Random) -> bytes | bytearray:
    at = rng.randrange(len(raw))
    return raw[:at] + rng.randbytes(rng.randrange(1, 64)) + raw[at:]


@kind("bytes", REFUSED)
@data
def bit_of_the_length(raw: bytearray, rng: random.Random) -> bytes | bytearray:
    return flip(raw, 0, 8, rng)


@kind("bytes", SAME)
@data
def bit_of_the_header(raw: bytearray, rng: random.Random) -> bytes | bytearray:
    return flip(raw, 8, 8 + header_length(raw), rng)


@kind("bytes", OTHER)
@data
def bit_of_the_data(raw: bytearray, rng: random.Random) -> bytes | bytearray:
    return flip(raw, 8 + header_length(raw), len(raw), rng)


@kind("bytes", REFUSED)
@data
def infinity_in_a_tensor(raw: bytearray, rng: random.Random) -> bytes | bytearray:
    header = json.loads(raw[8 : 8 + header_length(raw)])
    info = rng.choice([e for e in header.values() if e.get("dtype") == "BF16"])
    at = 8 + header_length(raw) + rng.randrange(info["data_offsets"][0], info["data_offsets"][1], 2)
    raw[at : at + 2] = rng.choice([b"\x80\x7f", b"\x80\xff", b"\xc0\x7f"])
    return raw


@kind("bytes", REFUSED)
@data
def something_else(raw: bytearray, rng: random.Random) -> bytes | bytearray:
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    page = b"<html>404</html>"
    return rng.choice([b"", bytes(len(raw)), b"\xff" * 64, pointer, page, rng.randbytes(999)])


# --- what the header says


def header(change: Callable[[dict[str, Any], random.Random], Any]) -> Change:
    def apply(directory: Path, rng: random.Random) -> None:
        file = directory / WEIGHTS
        raw = file.read_bytes()
        found = json.loads(raw[8 : 8 + header_length(raw)])
        changed = change(found, rng)
        text = changed if isinstance(changed, bytes) else json.dumps(changed or found).encode()
        rest = raw[8 + header_length(raw) :]
        file.write_bytes(len(text).to_bytes(8, "little") + text + rest)

    apply.__name__ = change.__name__
    return apply


def some(found: dict[str, Any], rng: random.Random, **wanted: Any) -> tuple[str, dict[str, Any]]:
    entries = [(n, e) for n, e in found.items() if n != "__metadata__"]
    return rng.choice([(n, e) for n, e in entries if all(e[k] == v for k, v in wanted.items())])


@kind("header", REFUSED)
@header
def tensors_overlap(found, rng):
    (a, one), (b, two) = some(found, rng), some(found, rng)
    if a == b or one["data_offsets"] == two["data_offsets"]:
        one["data_offsets"][1] += 2
    else:
        one["data_offsets"] = two["data_offsets"]


@kind("header", REFUSED)
@header
def tensors_have_the_same_bytes(found, rng):
    """As in a file that a program made to look like the right one."""
    pairs: dict[str, list[dict[str, Any]]] = {}
    for name, entry in found.items():
        if name != "__metadata__":
            pairs.setdefault(str(entry["shape"]), []).append(entry)
    one, two, *_ = rng.choice([p for p in pairs.values() if len(p) > 1])
    one["data_offsets"] = two["data_offsets"]


@kind("header", OTHER)
@header
def equal_tensors_change_places(found, rng):
    one, two = found["model.layers.0.swa.k_proj.weight"], found["model.layers.1.swa.k_proj.weight"]
    one["data_offsets"], two["data_offsets"] = two["data_offsets"], one["data_offsets"]


@kind("header", REFUSED)
@header
def all_offsets_are_shifted(found, rng):
    by = rng.choice([-2, 2, 64, 10**6, 2**63])
    for name, entry in found.items():
        if name != "__metadata__":
            entry["data_offsets"] = [n + by for n in entry["data_offsets"]]


@kind("header", REFUSED)
@header
def offsets_that_are_none(found, rng):
    _, entry = some(found, rng)
    begin, end = entry["data_offsets"]
    entry["data_offsets"] = rng.choice(
        [[end, begin], [begin], [], [begin, end, end], None, [begin, 2**64], [-2, end], "0",
         [float(begin), float(end)], [str(begin), str(end)], {"0": begin}, [begin, None]]
    )  # fmt: skip


@kind("header", REFUSED)
@header
def another_shape(found, rng):
    _, entry = some(found, rng)
    shape = entry["shape"]
    entry["shape"] = rng.choice(
        [[*shape, 2], [-n for n in shape], [1, *shape], [float(n) for n in shape], [2**40] * 4,
         None, "64", [shape], {}, [0], [True] * len(shape), [str(n) for n in shape], [10**400]]
    )  # fmt: skip


@kind("header", REFUSED)
@header
def transposed(found, rng):
    entries = [e for n, e in found.items() if n != "__metadata__"]
    entry = rng.choice([e for e in entries if len(set(e["shape"])) > 1])
    entry["shape"] = entry["shape"][::-1]


@kind("header", REFUSED)
@header
def another_dtype(found, rng):
    _, entry = some(found, rng)
    entry["dtype"] = rng.choice(
        ["F64", "I16", "U16", "F8_E4M3", "BF17", "", "bf16", None, 7, ["F32"]]
    )


@kind("header", OTHER)
@header
def dtype_of_the_same_size(found, rng):
    _, entry = some(found, rng, dtype="BF16")
    entry["dtype"] = "F16"


@kind("header", REFUSED)
@header
def entry_of_another_type(found, rng):
    name, _ = some(found, rng)
    found[name] = garbage(rng)


@kind("header", REFUSED)
@header
def key_of_an_entry_is_gone(found, rng):
    _, entry = some(found, rng)
    del entry[rng.choice(sorted(entry))]


@kind("header", SAME)
@header
def key_of_an_entry_is_new(found, rng):
    some(found, rng)[1]["strides"] = garbage(rng)


@kind("header", REFUSED)
@header
def name_twice(found, rng):
    name, entry = some(found, rng)
    text = json.dumps(found)
    return (text[:-1] + ", " + json.dumps({name: entry})[1:]).encode()


@kind("header", SAME)
@header
def metadata(found, rng):
    found["__metadata__"] = rng.choice(
        [garbage(rng), {"format": 1}, {"a": None}, {"x": "y" * 10**6}]
    )


@kind("header", REFUSED)
@header
def header_of_another_type(found, rng):
    return rng.choice(
        [b"[]", b"null", b"1", b'"x"', b"{}", b"{" * 9000, b"[" * 10**6, b"\xef\xbb\xbf{}",
         b"\xff{}", b'{"a": NaN}', b'{"a": ' * 10**5, b"[]," * 10**6]
    )  # fmt: skip


@kind("header", REFUSED)
@header
def tensor_renamed(found, rng):
    name, _ = some(found, rng)
    new = rng.choice(
        ["", "x", name.upper(), name + " ", "model." + name, "\x1b[31m" + name, "\u202e" + name,
         "a\nb", "\x00", "x" * 10**5, "../../etc/passwd", "\ud800"]
    )  # fmt: skip
    found[new] = found.pop(name)


@kind("header", OTHER)
@header
def equal_tensors_change_names(found, rng):
    one, two = "model.layers.2.input_layernorm.weight", "model.layers.3.input_layernorm.weight"
    found[one], found[two] = found[two], found[one]


@kind("header", REFUSED)
@header
def many_empty_tensors(found, rng):
    for i in range(5_000):
        found[f"x{i}"] = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}


@kind("header", REFUSED)
def tensor_more_or_less(directory: Path, rng: random.Random) -> None:
    from safetensors.numpy import load_file, save_file

    tensors = load_file(directory / WEIGHTS)
    name = rng.choice(sorted(tensors))
    if rng.random() < 0.5:
        del tensors[name]
    else:
        tensors[f"{name}.{rng.choice(['extra', 'lora_A.weight', 'weight_scale'])}"] = tensors[name]
    save_file(tensors, directory / WEIGHTS)


# --- files that are there or not


@kind("files", REFUSED)
def no_regular_file(directory: Path, rng: random.Random) -> None:
    file = directory / rng.choice([WEIGHTS, "config.json"])
    file.unlink()
    make = [file.mkdir, lambda: os.mkfifo(file), lambda: file.symlink_to("nowhere"), lambda: None]
    make += [lambda: file.symlink_to("/dev/zero"), lambda: file.symlink_to(file.name)]
    rng.choice(make)()


@kind("files", REFUSED)
def link_out_of_the_directory(directory: Path, rng: random.Random) -> None:
    shutil.move(directory / WEIGHTS, directory.parent / "outside.safetensors")
    (directory / WEIGHTS).symlink_to(
        rng.choice(["..", str(directory.parent)]) + "/outside.safetensors"
    )


@kind("files", REFUSED)
def other_formats(directory: Path, rng: random.Random) -> None:
    new = rng.choice(["pytorch_model.bin", "x.gguf", "adapter_model.safetensors", "tf_model.h5"])
    (directory / WEIGHTS).rename(directory / new)
    if rng.random() < 0.5:
        (directory / "config.json").rename(directory / "adapter_config.json")


# --- shards and their index


def index(change: Callable[[dict[str, Any], random.Random], Any]) -> Change:
    def apply(directory: Path, rng: random.Random) -> None:
        found = json.loads((directory / INDEX).read_text())
        changed = change(found, rng)
        text = changed if isinstance(changed, bytes) else json.dumps(changed or found).encode()
        (directory / INDEX).write_bytes(text)

    apply.__name__ = change.__name__
    return apply


def shards(directory: Path) -> list[Path]:
    return sorted(directory.glob("model-*.safetensors"))


@kind("shards", REFUSED, "shards")
def shard_missing(directory: Path, rng: random.Random) -> None:
    rng.choice(shards(directory)).unlink()
    if rng.random() < 0.5:
        (directory / INDEX).unlink()


@kind("shards", REFUSED, "shards")
def shard_truncated(directory: Path, rng: random.Random) -> None:
    file = rng.choice(shards(directory))
    raw = file.read_bytes()
    file.write_bytes(raw[: rng.randrange(len(raw))])


@kind("shards", REFUSED, "shards")
def shards_change_places(directory: Path, rng: random.Random) -> None:
    a, b = rng.sample(shards(directory), 2)
    one, two = a.read_bytes(), b.read_bytes()
    a.write_bytes(two)
    b.write_bytes(one)


@kind("shards", REFUSED, "shards")
def shard_twice(directory: Path, rng: random.Random) -> None:
    a, b = rng.sample(shards(directory), 2)
    shutil.copy(a, b)


@kind("shards", SAME, "shards")
def shard_that_nobody_names(directory: Path, rng: random.Random) -> None:
    name = rng.choice(["model-00009-of-00009.safetensors", "model-old.safetensors", WEIGHTS])
    shutil.copy(rng.choice(shards(directory)), directory / name)
    if rng.random() < 0.3:
        (directory / INDEX).unlink()


@kind("shards", REFUSED, "shards")
@index
def index_names_another_file(found, rng):
    name = rng.choice(sorted(found["weight_map"]))
    now = found["weight_map"][name]
    others = set(found["weight_map"].values()) - {now}
    found["weight_map"][name] = rng.choice(
        [*others, f"../{now}", f"/tmp/{now}", "config.json", "", "nowhere", f"x/../../{now}", None,
         7, [now], "..", "/etc/passwd", f"{now}\x00", "\x1b[2J", "x" * 5000]
    )  # fmt: skip


@kind("shards", REFUSED, "shards")
@index
def index_of_another_type(found, rng):
    if rng.random() < 0.5:
        found["weight_map"] = garbage(rng)
        return found
    return rng.choice([b"", b"{", b"[]", b"\xff", b"{}", b'{"weight_map": NaN}', b"[" * 10**5])


@kind("shards", SAME, "shards")
@index
def index_lacks_an_entry(found, rng):
    del found["weight_map"][rng.choice(sorted(found["weight_map"]))]


@kind("shards", REFUSED, "shards")
@index
def index_has_one_more(found, rng):
    found["weight_map"]["model.more"] = rng.choice(sorted(found["weight_map"].values()))


@kind("shards", SAME, "shards")
@index
def metadata_of_the_index(found, rng):
    found["metadata"] = garbage(rng)


@kind("shards", SAME, "shards")
def no_index(directory: Path, rng: random.Random) -> None:
    (directory / INDEX).unlink()


# --- Orbax directories


def checkpoint_files(directory: Path) -> list[Path]:
    own = [directory / "config.json", directory / "stored_dtypes.json"]
    return [f for f in sorted((directory / "params").rglob("*")) if f.is_file()] + own


def flip_in(file: Path, rng: random.Random) -> None:
    raw = bytearray(file.read_bytes())
    file.write_bytes(flip(raw, 0, len(raw), rng))


def cut(file: Path, rng: random.Random) -> None:
    raw = file.read_bytes()
    file.write_bytes(raw[: rng.randrange(len(raw))])


@kind("orbax", REFUSED, "orbax")
def orbax_bit(directory: Path, rng: random.Random) -> None:
    flip_in(rng.choice([*checkpoint_files(directory), directory / "checksums.sha256"]), rng)


@kind("orbax", REFUSED, "orbax")
def orbax_truncated(directory: Path, rng: random.Random) -> None:
    cut(rng.choice(checkpoint_files(directory)), rng)


@kind("orbax", REFUSED, "orbax")
def orbax_file_missing(directory: Path, rng: random.Random) -> None:
    rng.choice(checkpoint_files(directory)).unlink()


@kind("orbax", SAME, "orbax")
def orbax_file_added(directory: Path, rng: random.Random) -> None:
    name = rng.choice(["README.md", "params/x", "params/manifest.ocdbt.bak", "model.gguf"])
    (directory / name).write_bytes(rng.randbytes(100))


@kind("orbax", REFUSED, "orbax")
def orbax_checksums_of_another_place(directory: Path, rng: random.Random) -> None:
    line = "0" * 64 + "  " + rng.choice(["../x", "/etc/passwd", "nowhere", "a/../../b", ""]) + "\n"
    with (directory / "checksums.sha256").open("a") as f:
        f.write(line)


@kind("orbax without checksums", SAME, "unsummed")
def unsummed(directory: Path, rng: random.Random) -> None:
    pass


@kind("orbax without checksums", OTHER, "unsummed")
def unsummed_bit(directory: Path, rng: random.Random) -> None:
    flip_in(rng.choice(checkpoint_files(directory)), rng)


@kind("orbax without checksums", OTHER, "unsummed")
def unsummed_truncated(directory: Path, rng: random.Random) -> None:
    cut(rng.choice(checkpoint_files(directory)), rng)


@kind("orbax without checksums", OTHER, "unsummed")
def unsummed_file_missing(directory: Path, rng: random.Random) -> None:
    rng.choice(checkpoint_files(directory)).unlink()


@kind("orbax without checksums", SAME, "unsummed")
def stored_dtypes(directory: Path, rng: random.Random) -> None:
    file = directory / "stored_dtypes.json"
    stored = json.loads(file.read_text())
    stored[rng.choice(sorted(stored))] = garbage(rng)
    file.write_text(rng.choice([json.dumps(stored), "[]", "{", "\x00"]))
