"""Golden cases of the original code, unpacked on demand into Hugging Face directories.

Four small ones are in tests/data/goldens. HMF_GOLDENS (default: ../shared/goldens, beside the
repository) names a directory with all of them, in the same format, which is read instead if it is
there; tests of cases that are not there are skipped, saying so.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import save_file

SMALL = Path(__file__).parent / "data" / "goldens"
_GIVEN = Path(os.environ.get("HMF_GOLDENS", Path(__file__).parents[2] / "shared" / "goldens"))
PACKED = _GIVEN if (_GIVEN / "cases.json").is_file() else SMALL
MISSING = (
    f"not among the golden cases of {PACKED}; HMF_GOLDENS names the directory with all of them"
)


@functools.cache
def _cases() -> dict[str, Any]:
    """Of Qwen3, and of the other base families, whose cases have a `family`."""
    files = [PACKED / name for name in ("cases.json", "families_cases.json")]
    return {
        n: c for file in files if file.is_file() for n, c in json.loads(file.read_text()).items()
    }


def cases(kind: str, *, families: bool = False) -> list[Any]:
    """Names of the cases of one kind ("model", "op", "compose", ...), for pytest.parametrize.

    Those of Qwen3, or of the other base families.
    """
    of_kind = {name: case for name, case in _cases().items() if case["kind"] == kind}
    names = [name for name, case in of_kind.items() if families == ("family" in case)]
    return names or [pytest.param("", marks=pytest.mark.skip(reason=MISSING), id="missing")]


def recorded(name: str) -> tuple[dict[str, Any], dict[str, tuple[int, ...]]]:
    """config.json and the tensor shapes of one case's checkpoint, without unpacking it."""
    case = _cases()[name]
    return case["config"], {n: tuple(shape) for n, shape in case["shapes"].items()}


@functools.cache
def _target() -> Path:
    path = Path(tempfile.mkdtemp(prefix="goldens-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


@functools.cache
def _recipe():
    spec = importlib.util.spec_from_file_location("golden_recipe", PACKED / "recipe.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _params(case: dict[str, Any]) -> dict[str, np.ndarray]:
    if "family" in case:
        return _recipe().build_case(case)
    return _recipe().build(case["shapes"], case["seed"])


@functools.cache
def golden(name: str) -> Path:
    """Directory of one case: case.json, expected.safetensors and, for models, a checkpoint.

    Unpacked once per session; skips the calling test if the case is not there.
    """
    if name not in _cases():
        pytest.skip(f"{name}: {MISSING}")
    case = dict(_cases()[name])
    shapes, config = case.pop("shapes", None), case.pop("config", None)
    directory = _target() / name
    directory.mkdir()
    (directory / "case.json").write_text(json.dumps(case))
    prefix = f"{name}/"
    found: dict[str, np.ndarray] = {}
    for file in sorted(PACKED.glob("*expected_*.safetensors")):
        with safe_open(file, framework="numpy") as f:
            found |= {
                k.removeprefix(prefix): f.get_tensor(k) for k in f.keys() if k.startswith(prefix)
            }
    save_file(
        {k: np.ascontiguousarray(v) for k, v in found.items()}, directory / "expected.safetensors"
    )
    if shapes is not None:
        params = _params(case | {"shapes": shapes})
        assert _recipe().digest(params) == case["sha"], f"{name}: not the recorded parameters"
        bf16 = {k: v.astype(ml_dtypes.bfloat16) for k, v in params.items()}
        save_file(bf16, directory / "model.safetensors", metadata={"format": "pt"})
    if config is not None:
        (directory / "config.json").write_text(json.dumps(config))
    return directory


def expected(directory: Path) -> dict[str, np.ndarray]:
    """All tensors of a case's expected.safetensors."""
    with safe_open(directory / "expected.safetensors", framework="numpy") as f:
        return {k: f.get_tensor(k) for k in f.keys()}
