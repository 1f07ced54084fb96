"""The worked examples of CONTRIBUTING.md work; texts at the top of the repository link to files."""

from __future__ import annotations

import importlib.util
import re
import shutil
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ops: Any = pytest.importorskip("hmf_jax.pallas_kernels.ops")
ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
BLOCKS = dict(re.findall(r'^```python title="(.+?)"\n(.*?)^```$', TEXT, re.MULTILINE | re.DOTALL))


def load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def operator_example() -> type:
    """The test class of the operator, whose folder is beside the real ones while it is imported."""
    directory = Path(tempfile.mkdtemp())
    try:
        for name, code in BLOCKS.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_text(code)
        ops.__path__.append(str(directory / "pallas_kernels" / "ops"))
        try:
            test = "tests/kernels/test_decayed_sum.py"
            return load(directory / test, "contributing_operator").TestDecayedSum
        finally:
            ops.__path__.pop()
    finally:
        shutil.rmtree(directory)


class TestOperator(operator_example()):
    test_named_implementation_never_falls_back = None  # it has no kernels yet


def test_the_operator_example_is_whole():
    folder = "pallas_kernels/ops/decayed_sum"
    files = {f"{folder}/{name}.py" for name in ("api", "inputs", "reference", "chunked")}
    assert set(BLOCKS) == files | {"tests/kernels/test_decayed_sum.py"}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name):
    """Those of docs/ are checked by `make docs`."""
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / name).read_text())
    missing = [x for x in links if "://" not in x and not (ROOT / x).exists()]
    assert links and not missing, missing
