"""What the pages print can be typed: their Python runs, their commands run, their links lead.

A block that cannot run in a test has the reason in a comment above it: `<!-- not run: ... -->`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
import shlex
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
import typer
from typer.testing import CliRunner

import hmf_jax
from hmf_jax import embedded, loading
from hmf_jax.cli import app
from hmf_jax.demo import write_checkpoint

ROOT = Path(__file__).resolve().parents[1]
PYTORCH = ROOT / "docs" / "from_pytorch.md"  # a table whose rows are code: tested below
PAGES = [ROOT / "README.md", *sorted({*(ROOT / "docs").glob("*.md")} - {PYTORCH})]
BLOCK = re.compile(r"(<!-- not run: .+? -->\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CHATS = [
    {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"{n}."}]}
    for n in ("Rada", "Buse", "Make", "Ruga")
]
# What makes the commands of a page small: other words, and fields of runs in addition.
WORDS = {
    "-M 18": "-M 2",
    "*DA-GKA*-...": "*DA-GKA*-*DA-GKA*",
    "steps=1000": "steps=2",
    "length=4096": "length=64",
}
FIELDS = "steps=2 seq_len=64 batch_size=2 accumulate=1 dtype=float32 fsdp=1".split()
SMALL = {
    "train": FIELDS,
    "prime distill": FIELDS,
    "prime select": ["--length", "64", "--rows", "2", "--window", "16", "--dtype", "float32"],
}
ADDRESS = "http://127.0.0.1:8000"  # of the server that pages speak of
QUICK = ("README.md", "index.md")  # the others compile for half a minute


def blocks(page: Path, *languages: str) -> list[str]:
    """The blocks of a page that are to be run, in order."""
    found = BLOCK.findall(page.read_text())
    return [code for excuse, language, code in found if language in languages and not excuse]


def small(text: str) -> str:
    for word, other in WORDS.items():
        text = text.replace(word, other)
    return text


def pages(*languages: str) -> list[Any]:
    """The pages that have such blocks, as parameters of a test."""
    return [
        pytest.param(page, id=page.name, marks=() if page.name in QUICK else pytest.mark.slow)
        for page in PAGES
        if blocks(page, *languages)
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of one layer, which compiles quickly."""
    path = tmp_path_factory.mktemp("tiny") / "model"
    write_checkpoint(path, layer_kinds=("GKA",))
    return path


@pytest.fixture
def released(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Released models are not at hand: their names give tiny ones."""
    local = loading.resolve

    def resolve(name, **options):
        if str(name).startswith("amazon/"):
            return tiny
        if str(name).startswith("Qwen/"):
            return embedded.directory("transformer")
        return local(name, **options)

    monkeypatch.setattr(loading, "resolve", resolve)
    return tiny


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current directory with the data that pages speak of."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps(row) + "\n" for row in CHATS))
    texts = [{"text": f"Rada has {n}. Buse has {n + 1}. " * 8} for n in range(8)]
    for name in ("texts.jsonl", "long_texts.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in texts))
    return tmp_path


@pytest.fixture(scope="module")
def address(tiny: Path) -> Iterator[Callable[[], str]]:
    """Says where a server of the tiny model is, which starts when it is first asked for."""
    with contextlib.ExitStack() as stack:

        @functools.cache
        def start() -> str:
            from hmf_jax.serving import running

            small: dict[str, Any] = dict(port=0, slots=2, prefill_chunk=64, max_model_len=512)
            return stack.enter_context(running(hmf_jax.from_pretrained(tiny), **small)).url

        yield start


def variables(path: Path) -> dict[str, object]:
    """What the pages take for granted before their first line; `path` is that of a model."""
    key = jax.random.key(0)
    B, T, H, D = 2, 128, 2, 16
    qkv = [jax.random.normal(jax.random.fold_in(key, i), (B, T, H, D)) for i in range(3)]
    gates = dict(alpha=jnp.full((B, T, H), 0.5), g=jnp.full((B, T, H), -0.1))
    gates |= dict(beta=jnp.full((B, T, H), 0.5))
    step = {f"{name}1": x[:, 0] for name, x in zip("qkv", qkv, strict=True)}
    step |= {f"{name}1": x[:, 0] for name, x in gates.items()}
    return dict(
        jax=jax, jnp=jnp, hmf_jax=hmf_jax, model=hmf_jax.from_pretrained(path),
        tokenizer=hmf_jax.load_tokenizer(path),
        tokens=jnp.ones((B, T), jnp.int32), ids=jnp.ones((B, T), jnp.int32),
        lengths=jnp.array([T, 7]), context=list(range(64)), instructions=[1, 2], question=[3, 4],
        **dict(zip("qkv", qkv, strict=True)), **gates, **step,
    )  # fmt: skip


@pytest.mark.parametrize("page", pages("python"))
def test_python_of_a_page_runs(page: Path, released, workplace, address, capsys):
    names = variables(released)
    for code in blocks(page, "python"):
        if ADDRESS in code:
            code = code.replace(ADDRESS, address())
        exec(compile(small(code), str(page), "exec"), names)


@pytest.mark.parametrize("page", pages("bash"))
def test_commands_of_a_page_run(page: Path, released, workplace, address):
    for text in blocks(page, "yaml"):
        if found := re.match(r"# ([\w.]+\.yaml)", text):
            (workplace / found[1]).write_text(text)
    targets = set(re.findall(r"^(\w[\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    commands = "\n".join(blocks(page, "bash")).replace("\\\n", " ")
    for line in small(commands).splitlines():
        if ADDRESS in line and not line.startswith("hmf-jax"):
            line = line.replace(ADDRESS, address())
        words = shlex.split(line, comments=True)
        if words[:1] == ["make"]:
            assert words[1] in targets, line
        elif words[:2] == ["hmf-jax", "serve"]:  # what follows finds a server
            options = [word for word in words[2:] if word != "&"]
            serve: Any = typer.main.get_command(app)
            serve.commands["serve"].make_context("serve", options)
        elif words[:1] == ["curl"]:
            found = subprocess.run(
                ["curl", "--fail-with-body", "-sS", *words[1:]], capture_output=True, text=True
            )
            assert found.returncode == 0, f"{line}\n{found.stdout}{found.stderr}"
        elif words[:1] == ["hmf-jax"]:
            command = " ".join(words[1 : 3 if words[1] == "prime" else 2])
            arguments = words[1:] + SMALL.get(command, [])
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


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.py"))


@pytest.mark.parametrize("script", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_open_in_colab(script: Path) -> None:
    """A badge leads to the notebook, and a cell installs the package where it is not."""
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    name = urls["Repository"].removeprefix("https://github.com/")
    text = script.read_text()
    colab = f"https://colab.research.google.com/github/{name}/blob/main/notebooks/{script.stem}"
    assert f"({colab}.ipynb)" in text
    assert f"@ git+{urls['Repository']}" in text and 'find_spec("hmf_jax")' in text
    cells = json.loads(script.with_suffix(".ipynb").read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert all(source in text for source in code), "run `make notebooks` and save the notebook"
    assert all(cell["outputs"] for cell in cells if "plt.show()" in "".join(cell["source"]))
