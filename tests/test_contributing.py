"""The worked examples of CONTRIBUTING.md work; texts link to files and name what exists."""

from __future__ import annotations

import importlib.util
import pkgutil
import re
import shutil
import tempfile
from pathlib import Path
from types import ModuleType

import pytest

from hmf_jax.pallas_kernels import ops

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "CONTRIBUTING.md").read_text()
BLOCKS = re.findall(r'^```python title="(.+?)"\n(.*?)^```$', TEXT, re.MULTILINE | re.DOTALL)
# Those of a kind and of a family are quotations; other tests run the files.
QUOTED = ("tests/toy_kind.py", "tests/test_families.py")
OPERATOR = {name: code for name, code in BLOCKS if name not in QUOTED}


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
        for name, code in OPERATOR.items():
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
    assert set(OPERATOR) == files | {"tests/kernels/test_decayed_sum.py"}


def test_the_kind_is_quoted_as_it_is():
    """All of it but the imports."""
    quoted = [code for name, code in BLOCKS if name == "tests/toy_kind.py"]
    file = (ROOT / "tests/toy_kind.py").read_text()
    assert "".join(quoted).split() == file[file.index("@dataclasses.dataclass") :].split()
    assert all(code in file for code in quoted)
    assert 'KINDS["EMA"] = toy_kind.EMA' in file and 'KINDS["EMA"] = toy_kind.EMA' in TEXT


def test_the_family_is_quoted_as_it_is():
    (quoted,) = [code for name, code in BLOCKS if name == "tests/test_families.py"]
    assert quoted.startswith("TOY = Family(")
    assert f"\n{quoted}" in (ROOT / "tests/test_families.py").read_text()


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_lead_somewhere(name):
    """Those of docs/ are checked by `make docs`."""
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / name).read_text())
    missing = [x for x in links if "://" not in x and not (ROOT / x).exists()]
    assert links and not missing, missing


PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]


@pytest.mark.parametrize("name", PAGES)
def test_names_exist(name):
    """`hmf_jax.engine.Engine` is a name of the library, `tests/test_laws.py` a file."""
    code = "".join(re.findall(r"```.*?```|`[^`]+`", (ROOT / name).read_text(), re.DOTALL))
    for found in set(re.findall(r"\bhmf_jax(?:\.\w+)+", code)):
        if "decayed_sum" not in found:  # the example
            pkgutil.resolve_name(found)
    paths = set(re.findall(r"`((?:\w+/)+\w+\.(?:py|md|json))`", code))
    missing = {p for p in paths if not (ROOT / p).exists()}
    assert not missing
