"""What an installation brings: the package hmf_jax, whole, and no other importable name."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import hmf_jax

pytest.importorskip("hatchling", reason="builds the package: pip install -e '.[dev]'")
pytest.importorskip("editables", reason="builds the package: pip install -e '.[dev]'")

ROOT = Path(__file__).resolve().parents[1]
TOP_LEVEL = ("convert", "pallas_kernels", "tests", "benchmarks", "docs", "notebooks")
CLEAN = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}


def run(*command: object, cwd: Path, env: dict[str, str] | None = CLEAN) -> str:
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def build(source: Path, target: str, out: Path) -> Path:
    """Builds with the hatchling that is here, where pip would make an environment for it."""
    command = (sys.executable, "-m", "hatchling", "build", "-t", target, "-d", out)
    run(*command, cwd=source, env=None)
    (file,) = out.iterdir()
    return file


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as file:
        return {name for name in file.namelist() if ".dist-info/" not in name}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))


def installed(where: Path, what: list[object]) -> Path:
    """The Python of a new environment with one package; all others are those of this one."""
    venv.create(where, symlinks=True)
    python = where / "bin" / "python"
    (site,) = where.glob("lib/python*/site-packages")
    specs = [importlib.util.find_spec(name) for name in ("jax", "hatchling", "editables")]
    others = {str(Path(spec.origin).parents[1]) for spec in specs if spec and spec.origin}
    (site / "others.pth").write_text("\n".join(others))
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", python)
    run(*pip, "install", *options, *what, cwd=where)
    return python


def test_the_wheel_holds_every_file_of_the_source(wheel):
    """Python files, py.typed, the embedded models, tables of tuned kernels: whatever is there."""
    source = {
        Path(directory, name).relative_to(ROOT).as_posix()
        for directory, _, names in os.walk(ROOT / "hmf_jax", followlinks=True)
        for name in names
        if not name.endswith(".pyc")
    }
    assert contents(wheel) == source
    assert {f"hmf_jax/{folder}/__init__.py" for folder in ("convert", "pallas_kernels")} <= source
    assert {"hmf_jax/py.typed", "hmf_jax/embedded/gka/model.safetensors"} <= source


def test_an_sdist_makes_the_same_wheel(wheel, tmp_path):
    sdist = build(ROOT, "sdist", tmp_path / "sdist")
    with tarfile.open(sdist) as file:
        file.extractall(tmp_path / "unpacked", filter="data")
    (source,) = (tmp_path / "unpacked").iterdir()
    assert {"README.md", "LICENSE", "pyproject.toml"} <= {p.name for p in source.iterdir()}
    again = build(source, "wheel", tmp_path / "wheel")
    assert contents(again) == contents(wheel) and again.name == wheel.name


SCRIPT = f"""
import importlib.metadata, importlib.util, json
import hmf_jax
print(json.dumps({{
    "found": [n for n in {TOP_LEVEL!r} if importlib.util.find_spec(n) is not None],
    "version": importlib.metadata.version("hmf-jax"),
    "directory": hmf_jax.embedded.directory("gka").is_dir(),
    "file": hmf_jax.__file__,
}}))
"""
BESIDE = """
import convert, pallas_kernels
assert (convert.mine, pallas_kernels.mine) == (1, 2)
from hmf_jax.pallas_kernels import attention
assert hmf_jax.from_pretrained.__module__.startswith("hmf_jax.")
"""


@pytest.mark.parametrize("kind", ["wheel", "editable"])
def test_only_hmf_jax_is_importable(kind, wheel, tmp_path):
    python = installed(tmp_path / "env", ["-e", ROOT] if kind == "editable" else [wheel])
    (tmp_path / "elsewhere").mkdir()
    found = json.loads(run(python, "-c", SCRIPT, cwd=tmp_path / "elsewhere"))
    assert found["found"] == []
    assert found["version"] == hmf_jax.__version__
    assert found["directory"]
    home = ROOT if kind == "editable" else tmp_path
    assert Path(found["file"]).is_relative_to(home)
    # A user's own modules of these names, beside the user's script, neither hurt nor are hurt.
    user = tmp_path / "user"
    (user / "pallas_kernels").mkdir(parents=True)
    (user / "pallas_kernels" / "__init__.py").write_text("mine = 2\n")
    (user / "convert.py").write_text("mine = 1\n")
    script = user / "script.py"
    script.write_text(SCRIPT + BESIDE)
    found = json.loads(run(python, script, cwd=user))
    assert found["found"] == ["convert", "pallas_kernels"]  # the user's


def test_a_clone_without_links_says_so(tmp_path):
    """As git makes one where it may not create symbolic links: files with the link's text."""
    package = tmp_path / "hmf_jax"
    package.mkdir()
    (package / "__init__.py").write_text((ROOT / "hmf_jax" / "__init__.py").read_text())
    (package / "convert").write_text("../convert")
    done = subprocess.run(
        [sys.executable, "-c", "import hmf_jax"], cwd=tmp_path, env=CLEAN, capture_output=True
    )
    (*_, last) = done.stderr.decode().strip().splitlines()
    assert last.startswith("ImportError: ") and "core.symlinks=true" in last


def test_importing_is_quick_and_brings_no_jax():
    code = """
import sys, time
start = time.perf_counter()
import hmf_jax
seconds = time.perf_counter() - start
heavy = {"jax", "flax", "numpy", "transformers"} & set(sys.modules)
assert not heavy, heavy
assert seconds < 0.3, seconds
"""
    run(sys.executable, "-c", code, cwd=ROOT)
