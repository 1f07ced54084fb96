"""The examples of docs/generation.md run, one after the other."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

TEXT = Path(__file__).parents[2] / "docs" / "generation.md"


@pytest.mark.slow
def test_examples_run():
    names: dict = {}
    for code in re.findall(r"```python\n(.*?)```", TEXT.read_text(encoding="utf-8"), re.DOTALL):
        exec(compile(code, str(TEXT), "exec"), names)
    assert names["gradient"].config == names["model"].config
    assert names["chosen"].shape == (2, 16) and names["state"].length.tolist() == [8, 8]
