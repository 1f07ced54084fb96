"""The command line: every command, its help, and errors of one line."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import hmf_jax
from hmf_jax import demo, embedded, engine
from hmf_jax.cli import app
from hmf_jax.cli.errors import guarded
from hmf_jax.config import HybridConfig
from hmf_jax.demo import write_checkpoint
from hmf_jax.loading import from_pretrained
from hmf_jax.memory import memory_table
from hmf_jax.sampling import SamplingParams
from hmf_jax.text import ChatSession, generate_text, load_tokenizer
from tests.goldens import golden

COMMANDS = ("generate", "chat", "convert", "verify", "info", "train", "prime", "demo", "bench")


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    """The tests must not write to the user's compilation cache."""
    monkeypatch.setattr(engine, "enable_compilation_cache", lambda: None)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "model"
    write_checkpoint(path, layer_kinds=("*", "M2"))
    return path


def run(*args, text: str | None = None, code: int = 0):
    result = CliRunner().invoke(app, [str(a) for a in args], input=text)
    assert result.exit_code == code, result.output
    return result


def error_of(*args) -> str:
    """The one line on stderr of a command that fails."""
    result = run(*args, code=1)
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("hmf-jax: ") and "Traceback" not in result.output
    return lines[0]


@pytest.mark.parametrize("command", COMMANDS)
def test_help(command):
    assert command in run("--help").output
    text = re.sub(r"\x1b\[[0-9;]*m", "", run(command, "--help").output)
    assert "Usage" in text and "Options" in text
    for word in {"generate": ["--temperature", "--num-iter", "prompt"], "verify": ["--rtol"]}.get(
        command, []
    ):
        assert word in text


def test_generate_is_generate_text(checkpoint):
    model = from_pretrained(checkpoint, dtype="float32", progress=False)
    texts = ["The fox", "A dog"]
    sampling = SamplingParams(temperature=0.9, top_k=40, seed=5)
    expected = [r.text for r in generate_text(model, texts, sampling=sampling, max_new_tokens=12)]
    options = ("--dtype", "float32", "--max-new-tokens", 12, "--temperature", 0.9)
    options += ("--top-k", 40, "--seed", 5)
    out = run("generate", checkpoint, *texts, *options).stdout
    assert out == "".join(f"{t}{e}\n---\n" for t, e in zip(texts, expected, strict=True))
    single = run("generate", checkpoint, texts[0], *options).stdout
    assert single == f"{texts[0]}{expected[0]}\n"


def test_chat(checkpoint):
    model = from_pretrained(checkpoint, dtype="float32", progress=False)
    session = ChatSession(model, system="Be brief.", thinking=False, max_new_tokens=8)
    expected = [session.send("Hi").text, session.send("Why?").text]
    options = ("--dtype", "float32", "--max-new-tokens", 8, "--system", "Be brief.")
    talk = "Hi\nWhy?\n\n/reset\nHi\n/exit\nnever read\n"
    out = run("chat", checkpoint, "--no-thinking", *options, text=talk).stdout
    assert out == "".join(f"{e}\n" for e in [*expected, expected[0]])


def test_convert_there_and_back(checkpoint, tmp_path):
    assert "orbax format" in run("convert", checkpoint, tmp_path / "orbax").output
    assert "hf format" in run("convert", tmp_path / "orbax", tmp_path / "back").output
    name = "model.safetensors"
    before, after = load_file(checkpoint / name), load_file(tmp_path / "back" / name)
    assert before.keys() == after.keys()
    for n in before:
        assert before[n].dtype == after[n].dtype and before[n].tobytes() == after[n].tobytes(), n
    # The converted directories are complete: configs, tokenizer, end tokens.
    for path in (tmp_path / "orbax", tmp_path / "back"):
        assert run("info", path).stdout == run("info", checkpoint).stdout
        assert load_tokenizer(path).chat_template
        assert (path / "generation_config.json").is_file()
    assert "not a directory" in error_of("convert", tmp_path / "nothing", tmp_path / "x")
    assert "--overwrite" in error_of("convert", checkpoint, tmp_path / "orbax")
    run("convert", checkpoint, tmp_path / "orbax", "--overwrite")


def test_verify(tmp_path):
    case = golden("attn")
    out = run("verify", case).stdout
    assert "decode" in out and "FAIL" not in out and "all tensors pass" in out
    broken = tmp_path / "broken"
    shutil.copytree(case, broken)
    tensors = load_file(broken / "expected.safetensors")
    tensors["logits"] = tensors["logits"] * np.float32(1.001)
    save_file(tensors, broken / "expected.safetensors")
    out = run("verify", broken, case, code=1).stdout  # one bad directory is enough
    assert re.search(r"FAIL  9\.9\de-04  logits ", out) and "all tensors pass" in out
    run("verify", broken, "--rtol", 0.01)


def test_info_of_directories_files_and_shapes(checkpoint, tmp_path):
    config = HybridConfig.from_json(checkpoint)
    out = run("info", checkpoint).stdout
    assert "2 layers: *-M2" in out and "Mamba-2" in out and memory_table(config) in out
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config.to_dict()))
    assert run("info", file).stdout == out
    big = run("info", "8b", "--mixer", "BMF").stdout
    assert "18 x BMF" in big and "9.00 GiB" in big
    assert "built-in shapes" in error_of("info", checkpoint, "--mixer", "GKA")


def test_errors_are_one_clear_line(checkpoint, tmp_path):
    assert "not a directory" in error_of("generate", tmp_path / "none", "Hi")
    assert "config.json" in error_of("info", tmp_path)
    assert "nothing to compare with" in error_of("verify", checkpoint)
    assert "num_iter=-1" in error_of("generate", checkpoint, "Hi", "--num-iter", -1)
    assert "leave num_iter out" in error_of("generate", checkpoint, "Hi", "--num-iter", 5)
    assert "temperature=-1" in error_of("generate", checkpoint, "Hi", "--temperature", -1)
    assert "is empty" in error_of("generate", checkpoint, "")
    assert "no room in a capacity" in error_of("generate", checkpoint, "Hi" * 9, "--capacity", 8)
    assert "--tp 99 needs 99 devices" in error_of("generate", checkpoint, "Hi", "--tp", 99)
    bare = tmp_path / "bare"
    shutil.copytree(checkpoint, bare)
    (bare / "chat_template.jinja").unlink()
    assert "no chat template" in error_of("chat", bare)
    (bare / "tokenizer.json").unlink()
    (bare / "tokenizer_config.json").unlink()
    assert "no tokenizer" in error_of("chat", bare)


def test_debug_shows_the_traceback(tmp_path):
    result = CliRunner().invoke(app, ["--debug", "info", str(tmp_path)])
    assert isinstance(result.exception, FileNotFoundError)


@pytest.mark.parametrize("module", ["hmf_jax", "hmf_jax.cli"])
def test_as_a_process(tmp_path, module):
    command = [sys.executable, "-m", module, "info", str(tmp_path / "none")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout == ""
    assert len(result.stderr.strip().splitlines()) == 1


def test_version():
    assert run("--version").stdout == f"hmf-jax {hmf_jax.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["prime", "init", "--help"]])
def test_help_does_not_wait_for_jax(arguments):
    code = (
        "import sys, hmf_jax.cli as cli\n"
        f"try: cli.app({arguments!r}, standalone_mode=False)\n"
        "finally: assert not {'jax', 'flax', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (ValueError("a=3 is bad"), 1, "hmf-jax: a=3 is bad\n"),
        (FileNotFoundError("no x"), 1, "hmf-jax: no x\n"),
        (PermissionError("not yours"), 1, "hmf-jax: not yours\n"),
        (RuntimeError("odd"), 1, "hmf-jax: RuntimeError: odd (`hmf-jax --debug ...` shows where)"),
        (KeyError("k"), 1, "hmf-jax: KeyError: 'k' (`hmf-jax --debug"),
        (KeyboardInterrupt(), 130, ""),
        (typer.Exit(3), 3, ""),
        (typer.Exit(0), 0, ""),
        (typer.Abort(), 1, "Aborted"),
        (None, 0, ""),
    ],
)
def test_exit_codes(error, code, says):
    def command():
        if error is not None:
            raise error

    one = typer.Typer(pretty_exceptions_enable=False)
    one.command()(guarded(command))
    result = CliRunner().invoke(one, [])
    assert result.exit_code == code
    assert result.stderr.startswith(says) if says else not result.stderr


def commands(found, *names: str):
    """(names, command) of every command that does something."""
    for name, command in getattr(found, "commands", {}).items():
        yield from commands(command, *names, name)
    if not hasattr(found, "commands"):
        yield names, found


EVERY = dict(commands(typer.main.get_command(app)))


def test_every_command_is_guarded():
    """So that all of them end as `test_exit_codes` says."""
    assert {names[0] for names in EVERY} == set(COMMANDS)
    for names, command in EVERY.items():
        function = command.callback
        while not hasattr(function, "__code__") or function.__code__.co_name != "guarded":
            assert hasattr(function, "__wrapped__"), names  # typer's own layer
            function = function.__wrapped__
        assert function.__code__.co_filename.endswith("errors.py"), names


@pytest.mark.parametrize("names", [n for n in EVERY if n[0] != "bench"], ids=" ".join)
def test_wrong_usage(names):
    """Unknown options and missing arguments: exit code 2, as everywhere."""
    assert "No such option: --nonsense" in run(*names, "--nonsense", code=2).stderr
    if any(p.param_type_name == "argument" and p.required for p in EVERY[names].params):
        assert "Missing argument" in run(*names, code=2).stderr


def test_an_unknown_command():
    assert "No such command 'nonsense'" in run("nonsense", code=2).stderr


@pytest.mark.parametrize("passed", [True, False])
def test_a_demo_that_failed_says_so(monkeypatch, passed):
    asked = []
    monkeypatch.setattr(demo, "run_demo", lambda say, *args: asked.append(args) or passed)
    assert "Took " in run("demo", "--seed", 3, code=0 if passed else 1).stdout
    assert asked == [("gka", 3)]


@pytest.mark.slow
@pytest.mark.parametrize("name", embedded.HYBRIDS)
def test_demo(name):
    out = run("demo", "--model", name).stdout
    assert "It remembers." in out and "tokens/s" in out and "128K" in out


def test_demo_of_a_model_that_is_not_there():
    assert "no embedded hybrid 'x'; choose gka" in error_of("demo", "--model", "x")
