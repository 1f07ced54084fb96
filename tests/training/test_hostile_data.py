"""Damaged training data and adapters: whatever a file holds, one line says what is wrong."""

from __future__ import annotations

import copy
import gzip
import json
import random
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from hmf_jax.demo import build_tokenizer
from hmf_jax.training import Documents, load_lora
from tests.training.test_formats import CALLS, FUNCTION, RESULT, SHAREGPT, TOOLS, A, S, U
from tests.training.test_lora import ODD, write_adapters
from tests.util import random_model, tiny_config

TOKENIZER: Any = build_tokenizer()
ROWS: list[dict[str, Any]] = [
    {"text": "A text."},
    {"messages": [S, U, {**A, "weight": 0}, U, A]},
    {"messages": [U, CALLS, RESULT, A], "tools": TOOLS},
    {"messages": [{**U, "content": [{"type": "text", "text": "ask"}]}, A]},
    {"conversations": SHAREGPT, "tools": json.dumps([FUNCTION]), "system": "Be kind."},
    {"instruction": "ask", "input": "1", "output": "reply", "history": [["a", "b"]]},
    {"prompt": "ask", "completion": "reply"},
    {"prompt": [U], "completion": [A]},
]
ODD_VALUES: list[Any] = [
    None, True, 0, -1, 1 << 70, 0.5, float("nan"), float("inf"), "", " ", "\0", "\ud800",
    "x" * 5000, "[", "[]", "{}", [], {}, [[]], [None], {"a": None}, "\x1b[31m", "user", "\u202e",
]  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside of a value."""
    keys = value.keys() if isinstance(value, dict) else range(len(value))
    if isinstance(value, str):
        return []
    found = [(value, key) for key in keys]
    return found + [
        place for k in keys if isinstance(value[k], dict | list) for place in places(value[k])
    ]


def changed(rng: random.Random, value: Any) -> Any:
    """A copy with one thing in it replaced, removed, renamed, or put there twice."""
    value = copy.deepcopy(value)
    where, key = rng.choice(places(value))
    how = rng.randrange(4)
    if how == 0 or (how == 2 and isinstance(where, list)):
        where[key] = copy.deepcopy(rng.choice(ODD_VALUES))
    elif how == 1:
        del where[key]
    elif how == 2:
        name: Any = rng.choice(["role", "from", "content", "text", "images", "odd\x1b"])
        where[name] = where.pop(key)
    elif isinstance(where, list):
        where.append(copy.deepcopy(where[key]))
    else:
        where[f"{key}2"] = copy.deepcopy(where[key])
    return value


def damaged(rng: random.Random, raw: bytes) -> bytes:
    """Bytes of which some are flipped, cut out, put in, or repeated."""
    at, n = rng.randrange(len(raw) + 1), rng.choice([1, 1, 2, 8, 100])
    put = rng.choice([rng.randbytes(n), raw[at : at + n] * 2, b"\0" * n, b"\n", b"[" * 999, b""])
    return raw[:at] + put + raw[at + rng.choice([0, n]) :]


def check(source: Any) -> int:
    """Reads everything; how much of it is bad."""
    try:
        documents = Documents(source, TOKENIZER)
    except (ValueError, OSError) as e:
        assert "\x1b" not in str(e) and "\n" not in str(e)
        return 1
    bad = 0
    for i in range(len(documents)):
        d = documents[i]
        assert (d.bad is None) == bool(d.targets.any()) and len(d.tokens) == len(d.targets)
        assert d.bad is None or (d.why and d.why.isprintable() and len(d.why) < 700)
        bad += d.bad is not None
    assert documents.describe().isprintable() or "\n" in documents.describe()
    return bad


def some(count: int, all_of_them: int) -> Any:
    """A quick part of the cases, and all of them among the slow tests."""
    return pytest.mark.parametrize(
        "cases", [range(count), pytest.param(range(count, all_of_them), marks=pytest.mark.slow)]
    )


@some(200, 4000)
def test_changed_rows(cases):
    """None of them ends the reading, and few of them can be read as something else."""
    for case in cases:
        rng = random.Random(case)
        row = changed(rng, rng.choice(ROWS))
        check([row if rng.random() < 0.7 else changed(rng, row) if row else row])


@some(60, 2000)
def test_damaged_files(cases, tmp_path):
    lines = "\n".join(json.dumps(row) for row in (ROWS[1], ROWS[1], {"messages": [U, A]})).encode()
    as_list = json.dumps(ROWS[:1] * 3).encode()
    kinds = {"a.jsonl": lines, "a.json": as_list, "a.jsonl.gz": gzip.compress(lines, mtime=0)}
    for case in cases:
        rng = random.Random(case)
        name = rng.choice(list(kinds))
        (tmp_path / name).write_bytes(damaged(rng, kinds[name]))
        check(tmp_path / name)


@some(20, 400)
def test_damaged_tables(cases, tmp_path):
    arrow = pytest.importorskip("pyarrow", reason="needs pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet", reason="needs pyarrow")
    file = tmp_path / "a.parquet"
    parquet.write_table(arrow.Table.from_pylist([{"messages": [U, A]}] * 5), file)
    raw = file.read_bytes()
    for case in cases:
        file.write_bytes(damaged(random.Random(case), raw))
        check(file)


CONFIG: dict[str, Any] = {
    "alpha_pattern": {"q_proj": 4}, "rank_pattern": {}, "use_rslora": False, "bias": "none",
    "target_modules": ["q_proj"], "exclude_modules": None, "layers_to_transform": [0, 1],
    "layers_pattern": None, "init_lora_weights": True, "lora_dropout": 0.0, "r": 2, "lora_alpha": 8,
    "modules_to_save": None, "use_dora": False, "inference_mode": True, "peft_type": "LORA",
}  # fmt: skip


@some(20, 1000)
def test_damaged_adapters(cases, tmp_path):
    """Either the adapters are those of the files, or one error names the file."""
    model = random_model(tiny_config(("*", "*"), **ODD), jnp.float32)
    directory = write_adapters(tmp_path, CONFIG)
    files = [directory / name for name in ("adapter_config.json", "adapter_model.safetensors")]
    good = [file.read_bytes() for file in files]
    config = json.loads(good[0])
    for case in cases:
        rng = random.Random(case)
        which = rng.randrange(3)
        for file, raw in zip(files, good, strict=True):
            file.write_bytes(raw)
        if which == 2:
            files[0].write_text(json.dumps(changed(rng, config)))
        else:
            files[which].write_bytes(damaged(rng, good[which]))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                found = load_lora(model, directory)
            except (ValueError, OSError) as e:
                assert str(tmp_path) in str(e) and "\x1b" not in str(e), case
                continue
        assert all(np.isfinite(a).all() for a in jax.tree.leaves(found)), case
