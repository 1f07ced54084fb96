"""The page for those who come from PyTorch: its code runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from hmf_jax import embedded

PAGE = Path(__file__).parent.parent / "docs" / "from_pytorch.md"
COMPILES = (
    "model(tokens",
    "trace",
    "generate",
    "ChatSession",
    "make_mesh",
    "jax.grad",
    "apply_lora",
)


@pytest.mark.parametrize("everything", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_from_pytorch(tmp_path, everything: bool) -> None:
    """Row by row in one namespace; without `everything` what takes seconds is left out."""
    text = PAGE.read_text()
    rows = [line.split(" | ")[1] for line in text.splitlines() if line.startswith("| `")]
    code = [re.findall(r"`([^`]+)`", row)[0] for row in rows]
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(code) > 20 and len(blocks) == 2
    space: dict[str, Any] = {"path": embedded.directory("gka"), "directory": tmp_path / "saved"}
    exec(blocks[0], space)
    for line in code:
        if everything or not any(name in line for name in COMPILES):
            if everything or "gradients" not in line:
                exec(line, space)
    if everything:
        exec(blocks[1], space)
    assert space["half"].dtype == "float16" and (tmp_path / "saved/config.json").is_file()
