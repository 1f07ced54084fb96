"""What the pages print can be typed: their Python runs, their commands run, their links lead.

A block that cannot run in a test has the reason in a comment above it: `<!-- not run: ... -->`.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from typer.testing import CliRunner

import hmf_jax
from hmf_jax import embedded, loading
from hmf_jax.cli import app

ROOT = Path(__file__).resolve().parents[1]
PYTORCH = ROOT / "docs" / "from_pytorch.md"  # a table whose rows are code: tested below
PAGES = [ROOT / "README.md", *sorted({*(ROOT / "docs").glob("*.md")} - {PYTORCH})]
BLOCK = re.compile(r"(<!-- not run: .+? -->\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CHATS = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}."}]}
    for n in ("Rada", "Buse", "Make", "Ruga")
]
# A run of a page, made small: what its commands get in addition.
SMALL = {
    "train": "steps=2 seq_len=32 batch_size=2 dtype=float32 mesh=none fsdp=1".split(),
}


def blocks(page: Path, *languages: str) -> list[str]:
    """The blocks of a page that are to be run, in order."""
    found = BLOCK.findall(page.read_text())
    return [code for excuse, language, code in found if language in languages and not excuse]


def has(*languages: str) -> list[Path]:
    return [page for page in PAGES if blocks(page, *languages)]


@pytest.fixture
def released(monkeypatch: pytest.MonkeyPatch) -> None:
    """Released models are not at hand: their names give a model that comes with the package."""
    local = loading.resolve

    def resolve(name, **options):
        if str(name).startswith("amazon/"):
            return embedded.directory("gka")
        if str(name).startswith("Qwen/"):
            return embedded.directory("transformer")
        return local(name, **options)

    monkeypatch.setattr(loading, "resolve", resolve)


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory with the data that pages speak of."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    texts = [{"text": f"Rada has {n}. Buse has {n + 1}. " * 8} for n in range(8)]
    for name in ("texts.jsonl", "long_texts.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in texts))
    return tmp_path


def variables() -> dict[str, object]:
    """What the pages take for granted before their first line."""
    key = jax.random.key(0)
    B, T, H, D = 2, 128, 2, 16
    qkv = [jax.random.normal(jax.random.fold_in(key, i), (B, T, H, D)) for i in range(3)]
    gates = dict(alpha=jnp.full((B, T, H), 0.5), g=jnp.full((B, T, H), -0.1))
    gates |= dict(beta=jnp.full((B, T, H), 0.5))
    step = {f"{name}1": x[:, :1] for name, x in zip("qkv", qkv, strict=True)}
    step |= {f"{name}1": x[:, :1] for name, x in gates.items()}
    return dict(
        jax=jax, jnp=jnp, hmf_jax=hmf_jax,
        tokens=jnp.ones((B, T), jnp.int32), ids=jnp.ones((B, T), jnp.int32),
        lengths=jnp.array([T, 7]), context=list(range(64)), instructions=[1, 2], question=[3, 4],
        **dict(zip("qkv", qkv, strict=True)), **gates, **step,
    )  # fmt: skip


@pytest.mark.parametrize("page", has("python"), ids=lambda page: page.name)
def test_python_of_a_page_runs(page: Path, released, workplace, capsys):
    names = variables()
    for code in blocks(page, "python"):
        exec(compile(code, str(page), "exec"), names)
        if "model" in names and "tokenizer" not in names:
            names["tokenizer"] = hmf_jax.text.load_tokenizer(embedded.directory("gka"))


@pytest.mark.parametrize("page", has("bash"), ids=lambda page: page.name)
def test_commands_of_a_page_run(page: Path, released, workplace):
    for text in blocks(page, "yaml"):
        if found := re.match(r"# ([\w.]+\.yaml)", text):
            (workplace / found[1]).write_text(text)
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in "\n".join(blocks(page, "bash")).splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert words[1] in targets, line
        elif words[:1] == ["hmf-jax"]:
            arguments = words[1:] + SMALL.get(words[1], [])
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == 0, f"{line}\n{result.output}"
        else:
            assert not words or words[0] in ("pip", "git"), f"{page.name}: not run: {line}"


INLINE = sorted(
    {
        found
        for page in (*PAGES, ROOT / "CONTRIBUTING.md")
        for found in re.findall(r"`(hmf-jax [^`|]+)`", page.read_text())
    }
)


@pytest.mark.parametrize("line", INLINE)
def test_commands_in_a_sentence_exist(line: str):
    """Command and options are known; values such as DIR are not tried."""
    words = shlex.split(line)[1:]
    names = [word for word in words if re.fullmatch(r"[a-z]+", word)]
    depth = 2 if names and names[0] in ("prime", "bench") else 1
    shown = CliRunner().invoke(app, [*names[:depth], "--help"], terminal_width=200)
    assert shown.exit_code == 0, shown.output
    for option in re.findall(r"--[\w-]+", line):
        assert option in shown.output or option == "--help", f"{line}: no {option}"


# What takes seconds.
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
    text = PYTORCH.read_text()
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
