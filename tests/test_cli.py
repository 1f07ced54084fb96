"""The command line: every command, its help, and errors of one line."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
import typer
from flax import nnx
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

import hmf_jax
from hmf_jax import demo, embedded, engine
from hmf_jax.cli import app
from hmf_jax.cli.errors import guarded, settings
from hmf_jax.config import HybridConfig
from hmf_jax.demo import write_checkpoint
from hmf_jax.engine.api import enable_compilation_cache, warmup
from hmf_jax.loading import from_pretrained
from hmf_jax.memory import memory_table, plan_memory, state_memory
from hmf_jax.model import HybridLM
from hmf_jax.sampling import SamplingParams
from hmf_jax.sharding import make_mesh
from hmf_jax.text import ChatSession, generate_text, load_tokenizer
from tests.goldens import golden

COMMANDS = (
    "generate",
    "chat",
    "convert",
    "verify",
    "info",
    "train",
    "prime",
    "demo",
    "bench",
    "bench-serve",
    "serve",
)


@pytest.fixture(autouse=True)
def no_cache(monkeypatch):
    """The tests must not write to the user's compilation cache, nor know of each other."""
    monkeypatch.setitem(settings, "debug", False)
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


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing"], "No such command 'nothing' (see `"),
        (["prime", "nothing"], "prime --help`)"),
        (["info"], "Missing argument 'model' (see `"),
        (["info", "tiny", "--mixr", "GKA"], "No such option: --mixr"),
        (["generate", "m", "x", "--dtype", "int8"], "'int8' is not one of 'bfloat16', 'float32'"),
        (["generate", "m", "x", "--max-new-tokens", "0"], "--max-new-tokens"),
        (["generate", "m", "x", "--tp", "0"], "--tp"),
        (["info", "tiny", "a\x1b[31m\nb"], "a\\x1b[31m"),
    ],
    ids=str,
)
def test_wrong_usage_is_one_line(arguments, says):
    result = run(*arguments, code=2)
    assert len(result.stderr.splitlines()) == 1 and says in result.stderr
    assert result.stderr.startswith("hmf-jax: ") and result.stderr.strip().isprintable()


def test_without_a_command_there_is_help():
    for arguments in ([], ["prime"], ["bench"]):
        assert "Usage" in run(*arguments, code=2).output


def test_names_and_messages_cannot_write_to_the_terminal(tmp_path, monkeypatch):
    assert r"a\x1b[31m b" in error_of("info", "a\x1b[31m\nb")
    folder = tmp_path / "\x1b]0;title\x07"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "\\u001b[2J"}')
    assert error_of("info", folder).isprintable()
    (folder / "config.json").write_text('{"model_type": "qwen3", "\\u001b[2J": 1}')
    monkeypatch.setattr(warnings, "filters", [])  # as outside of tests: said, not recorded
    monkeypatch.setattr(warnings, "_showwarnmsg_impl", lambda m: sys.stderr.write(_text_of(m)))
    said = run("info", folder).stderr.splitlines()
    assert len(said) == 1 and said[0].isprintable() and "warning: " in said[0]


def _text_of(message) -> str:
    return warnings.formatwarning(
        message.message, message.category, message.filename, message.lineno
    )


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["convert", "hmf_jax/embedded/gka", "x", "--max-shard-size", "1GB"], "this writes Orbax"),
        (["convert", "x", "y", "--to", "orbax", "--max-shard-size", "1GB"], "this writes Orbax"),
        (["verify", "x", "--dtype", "bfloat16", "--rtol", "0.1"], "--rtol is for float32"),
        (["verify", "x", "--rtol", "nan"], "--rtol must be a finite number"),
        (["verify", "x", "--rtol", "-1"], "--rtol must be a finite number >= 0"),
        (["bench-serve", "x", "--faults", "0.5"], "--faults is for --mixture"),
        (["bench-serve", "x", "--users", "2", "--prefix-len", "3"], "--prefix-len is for single"),
        (
            ["bench-serve", "x", "--goodput", "speed:1"],
            "--goodput speed:1 is not NAME:MILLISECONDS",
        ),
        (["info", "x", "--mixer", "GKA"], "--mixer is for the built-in shapes"),
        (["info", "tiny", "--mixer", "gka"], "did you mean 'GKA'"),
    ],
    ids=str,
)
def test_options_that_would_be_ignored(arguments, says, monkeypatch):
    monkeypatch.chdir(Path(hmf_jax.__file__).parents[1])
    assert says in error_of(*arguments)


# The commands of a process: what CliRunner does not show. They start without JAX.
ECHO = """
import sys, time, typer
from hmf_jax.cli.errors import Program, guarded
def write(n: int, wait: bool = False):
    typer.echo("\\N{GRINNING FACE}" * n)
    if wait:
        print("ready", file=sys.stderr, flush=True)
        time.sleep(60)
app = typer.Typer(cls=Program, pretty_exceptions_enable=False)
app.command()(guarded(write))
app.command("two")(guarded(write))
app(prog_name="hmf-jax")
"""


def echo(*arguments, **options):
    command = [sys.executable, "-c", ECHO, "write", *map(str, arguments)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)


def test_a_reader_that_has_gone():
    process = echo(10**6, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.communicate()[1] == "" and process.returncode == 1


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_an_output_that_is_full():
    with open("/dev/full", "w") as full:
        process = echo(1, stdout=full)
        assert process.communicate()[1].startswith("hmf-jax: [Errno 28]")
    assert process.returncode == 1


def test_an_output_without_these_characters():
    process = echo(1, stdout=subprocess.PIPE, env={**os.environ, "PYTHONIOENCODING": "latin-1"})
    assert process.communicate() == ("\\U0001f600\n", "") and process.returncode == 0


@pytest.mark.parametrize(
    ("signum", "code", "says"),
    [(signal.SIGTERM, 143, "hmf-jax: stopped by SIGTERM\n"), (signal.SIGINT, 130, "")],
)
def test_signals(signum, code, says):
    process = echo(1, "--wait", stdout=subprocess.DEVNULL)
    assert process.stderr is not None and process.stderr.readline() == "ready\n"
    process.send_signal(signum)
    assert process.communicate()[1] == says and process.returncode == code


@pytest.fixture
def cache():
    """The setting of the compilation cache, as it was before."""
    name = "jax_compilation_cache_dir"
    before = getattr(jax.config, name)
    yield lambda: getattr(jax.config, name)
    jax.config.update(name, before)


def test_a_cache_that_cannot_be_written_is_done_without(cache, tmp_path, monkeypatch):
    monkeypatch.setattr(jax.config, "update", jax.config.update)
    file = tmp_path / "file"
    file.write_text("not a directory")
    for wrong in (file, file / "below", "/proc/cache", "a\0b"):
        with pytest.warns(UserWarning, match="programs are not kept: .* cannot be written") as said:
            assert enable_compilation_cache(wrong) is None
        assert len(said) == 1 and cache() is None
    assert enable_compilation_cache(tmp_path / "new") == tmp_path / "new"
    assert cache() == str(tmp_path / "new") and not any((tmp_path / "new").iterdir())

    def unknown(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    monkeypatch.setattr(Path, "expanduser", unknown)
    with pytest.warns(UserWarning, match="Could not determine home"):
        assert enable_compilation_cache() is None


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"context": 0}, "context must be an integer >= 1"),
        ({"context": 2**40}, "context must be an integer <="),
        ({"context": 64.0}, "context must be an integer"),
        ({"memory": float("nan")}, "memory must be a finite number > 0, got nan"),
        ({"memory": -1}, "memory must be a finite number > 0"),
        ({"memory": float("inf")}, "memory must be a finite number"),
        ({"fraction": 1.5}, "fraction must be a finite number <= 1"),
        ({"fraction": 0}, "fraction must be a finite number > 0"),
        ({"prefill_chunk": 0}, "prefill_chunk must be an integer >= 1"),
    ],
    ids=str,
)
def test_plans_of_nothing(changes, says):
    options = {"context": 64, "memory": 1e9, **changes}
    with pytest.raises(ValueError, match=says):
        plan_memory(HybridConfig.preset("tiny"), **options)
    if "context" in changes:
        with pytest.raises(ValueError, match=says):
            state_memory(HybridConfig.preset("tiny"), (changes["context"],))


@pytest.mark.parametrize("size", [0, -1, 1.0, True, "1", None])
def test_meshes_of_nothing(size):
    for axis in ("dp", "fsdp", "sp", "tp"):
        with pytest.raises(ValueError, match=f"{axis} must be an integer >= 1"):
            make_mesh(**{axis: size})


def test_meshes_of_more_than_there_is():
    devices = jax.devices()
    with pytest.raises(ValueError, match="needs 1000000000 devices, but there are [0-9]+.$"):
        make_mesh(tp=10**9)
    with pytest.raises(ValueError, match="to use fewer"):
        make_mesh(devices=devices * 2)


@pytest.mark.parametrize("size", [0, 1.5, True, "3", 2**40])
def test_states_of_nothing(size):
    model = nnx.eval_shape(lambda: HybridLM(HybridConfig.preset("tiny", layer_kinds=("*",))))
    with pytest.raises(ValueError, match="batch must be an integer"):
        model.init_state(size, 8)
    with pytest.raises(ValueError, match="capacity must be an integer"):
        model.init_state(1, size)
    with pytest.raises(ValueError, match="batch=.* must be a whole number"):
        warmup(model, capacity=8, batch=size)
