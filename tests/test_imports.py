"""Imports: what the facade promises, and rules that import-linter's contracts cannot express."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import hmf_jax

PACKAGE = Path(hmf_jax.__file__).parent


def modules() -> Iterator[tuple[str, ast.Module]]:
    """(path below hmf_jax, syntax tree) of every module, those behind symbolic links too."""
    for directory, _, names in os.walk(PACKAGE, followlinks=True):
        for file in (Path(directory, name) for name in names if name.endswith(".py")):
            yield file.relative_to(PACKAGE).as_posix(), ast.parse(file.read_text())


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_the_tables_of_the_facade_agree():
    """Public names, where they live, and what type checkers are told."""
    tree = ast.parse(Path(hmf_jax.__file__).read_text())
    (block,) = [
        node
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    checked = {
        alias.asname or alias.name: node.module
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert checked == {name: f"hmf_jax.{home}" for name, home in hmf_jax._HOME.items()}
    assert sorted(hmf_jax.__all__) == sorted(checked)
    assert set(hmf_jax.__all__) <= set(dir(hmf_jax))


@pytest.mark.parametrize("name", hmf_jax.__all__)
def test_every_public_name_is_there(name):
    value = getattr(hmf_jax, name)
    assert value.__module__.startswith("hmf_jax.") and value.__doc__


def test_other_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="nonsense"):
        getattr(hmf_jax, "nonsense")  # noqa: B009


def test_private_jax_is_used_in_one_file():
    users = {path for path, tree in modules() if any(m.startswith("jax._") for m in imported(tree))}
    assert users <= {"pallas_kernels/compat.py"}


def test_nothing_is_imported_under_a_name_that_only_the_repository_has():
    """`import convert` works in a clone, and not where the package is installed."""
    for path, tree in modules():
        tops = {name.partition(".")[0] for name in imported(tree)}
        assert not tops & {"convert", "pallas_kernels", "tests", "benchmarks"}, path


def test_no_circles():
    """Between modules; `make lint` also asks that imports go one way."""
    grimp = pytest.importorskip("grimp", reason="comes with import-linter")
    graph = grimp.build_graph("hmf_jax", cache_dir=None, exclude_type_checking_imports=True)
    state: dict[str, str] = {}

    def visit(module: str, path: list[str]) -> None:
        if state.get(module) == "done":
            return
        assert state.get(module) != "open", " -> ".join([*path[path.index(module) :], module])
        state[module] = "open"
        for other in sorted(graph.find_modules_directly_imported_by(module)):
            visit(other, [*path, module])
        state[module] = "done"

    for module in sorted(graph.modules):
        visit(module, [])
