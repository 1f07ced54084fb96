"""Saves that replace a directory at once, locks, checksums, and JSON from strangers."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from hmf_jax.convert import directories
from hmf_jax.convert.directories import (
    check_checksums,
    check_target,
    lock,
    printable,
    read_json,
    recover,
    replacing,
    write_checksums,
)


def fill(directory: Path, text: str) -> None:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text('{"model_type": "qwen3"}')
    (directory / "model.safetensors").write_text(text)


def save(directory: Path, text: str = "new", **options) -> None:
    with replacing(directory, True, **options) as tmp:
        fill(tmp, text)


def content(directory: Path) -> dict[str, str]:
    files = (p for p in directory.rglob("*") if p.is_file())
    return {p.relative_to(directory).as_posix(): p.read_text() for p in files}


@pytest.fixture
def target(tmp_path) -> Path:
    fill(tmp_path / "model", "old")
    return tmp_path / "model"


def test_only_what_a_save_wrote_is_replaced(target):
    for name in ("README.md", ".git/objects/ab", "notes/2026/a.txt", "params/mine.txt"):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text("mine")
    (target / "latest").symlink_to("notes")
    for name in ("model-00001-of-00002.safetensors", "config.json", "tokenizer.json"):
        (target / name).write_text('{"model_type": "qwen3"}')
    target.chmod(0o750)
    save(target)
    kept = {"README.md", ".git/objects/ab", "notes/2026/a.txt", "params/mine.txt", "tokenizer.json"}
    found = content(target)
    assert found.keys() == kept | {"config.json", "model.safetensors"}
    assert found["model.safetensors"] == "new" and found["README.md"] == "mine"
    assert os.readlink(target / "latest") == "notes" and target.stat().st_mode & 0o777 == 0o750
    assert os.listdir(target.parent) == ["model"]


def test_a_new_tokenizer_replaces_the_old_one(target):
    for name in ("tokenizer.json", "merges.txt", "generation_config.json", "tokenizer_notes.md"):
        (target / name).write_text("old")
    with replacing(target, True) as tmp:
        fill(tmp, "new")
        (tmp / "tokenizer.json").write_text("new")
    found = content(target)
    assert found["tokenizer.json"] == "new" and found["tokenizer_notes.md"] == "old"
    assert "merges.txt" not in found and "generation_config.json" not in found


def test_what_is_no_model_is_never_replaced(tmp_path, target):
    files = {"config.json": '{"port": 8080}', "model.safetensors": "x"}
    cases: list[tuple[dict[str, str], str]] = [
        (files, "no model that is known"),
        ({"config.json": '{"model_type": "qwen3"}'}, "no model that is known"),  # no weights
        ({"config.json": '{"model_type": "bert"}', "model.safetensors": "x"}, "no model that is"),
        ({"config.json": "{", "model.safetensors": "x"}, "no model that is known"),
        ({"thesis.tex": "x"}, "no model that is known"),
    ]
    for i, (files, message) in enumerate(cases):
        directory = tmp_path / str(i)
        directory.mkdir()
        for name, text in files.items():
            (directory / name).write_text(text)
        with pytest.raises(FileExistsError, match=message):
            check_target(directory, True, model_types=["qwen3"])
        assert content(directory) == files
    with pytest.raises(FileExistsError, match="pass overwrite=True"), replacing(target):
        pass
    (tmp_path / "file").write_text("x")
    with pytest.raises(FileExistsError, match="is a file"):
        check_target(tmp_path / "file", True)
    with pytest.raises(NotADirectoryError, match="file is not a directory"):
        check_target(tmp_path / "file" / "model", True)
    with pytest.raises(OSError, match="needs 1e\\+09 GB and the disk has .* nothing written"):
        check_target(tmp_path / "new", space=10**18)


def test_links_are_not_followed_into_something_else(tmp_path, target):
    (tmp_path / "link").symlink_to(target)
    with pytest.raises(FileExistsError, match="link is a symbolic link to .*model; name that"):
        save(tmp_path / "link")
    assert content(target)["model.safetensors"] == "old"
    (tmp_path / "empty").symlink_to(tmp_path / "elsewhere")
    save(tmp_path / "empty")
    assert (tmp_path / "empty").is_symlink()
    assert content(tmp_path / "elsewhere")["model.safetensors"] == "new"


def test_the_working_directory_is_not_replaced(target, monkeypatch):
    (target / "notes").mkdir()
    for place, name in ((target, "."), (target / "notes", ".."), (target / "notes", str(target))):
        monkeypatch.chdir(place)
        with pytest.raises(OSError, match="is the working directory"):
            check_target(name, True)


def test_a_failed_save_changes_nothing(tmp_path, target):
    def fail(error: BaseException) -> None:
        with replacing(target, True) as tmp:
            fill(tmp, "half")
            raise error

    for error in (KeyboardInterrupt(), ValueError("not finite")):
        with pytest.raises(type(error)):
            fail(error)
    with pytest.raises(OSError, match="the disk is full; nothing written to .*model"):
        fail(OSError(errno.ENOSPC, "No space left on device"))
    (target / "params").mkdir()
    (target / "params" / "mine").write_text("x")
    with (
        pytest.raises(FileExistsError, match="params is no part of a model"),
        replacing(target, True) as tmp,
    ):
        fill(tmp, "new")
        (tmp / "params").mkdir()
    assert content(target)["model.safetensors"] == "old"
    assert os.listdir(tmp_path) == ["model"]


def test_a_parent_without_permission(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write everywhere
    with pytest.raises(PermissionError, match="model cannot be written: no permission to write in"):
        check_target(tmp_path / "model")


def test_leftovers_are_cleaned_by_the_next_save_only(tmp_path, target):
    dead = tmp_path / f".hmf-jax-save-{directories._host()}-0123456789abcdef"
    fill(dead, "half")
    distant, forgotten = (tmp_path / f".hmf-jax-save-{c * 8}-0123456789abcdef" for c in "01")
    fill(distant, "of another machine, which may still write")
    fill(forgotten, "of another machine, long ago")
    os.utime(forgotten, (0, 0))
    mine = tmp_path / ".hmf-jax-save-notes"
    mine.mkdir()
    with lock(target), pytest.raises(FileExistsError), replacing(target):
        pass
    assert dead.exists()
    with replacing(tmp_path / "other") as tmp:
        fill(tmp, "new")
        save(target)  # does not touch what another save is writing
        assert tmp.exists() and not dead.exists() and not forgotten.exists()
    assert {p.name for p in tmp_path.iterdir()} == {"model", "other", mine.name, distant.name}


# Kills itself at the n-th call that touches the file system, for every n; prints what was visible.
KILL = """
import os, sys
from pathlib import Path
from hmf_jax.convert import directories
from tests.convert.test_directories import content, fill, save

os.fsync = lambda fd: None  # killed, not without power: what was written is seen
root, exchange = Path(sys.argv[1]), sys.argv[2] == "exchange"
if not exchange:
    directories._exchange = lambda a, b: False
calls = last = 0

def count(event, args):
    global calls
    if event.split(".")[0] in ("os", "open", "shutil") and last:
        calls += 1
        if calls == last:
            os._exit(9)

sys.addaudithook(count)
n = 0
while True:
    n += 1
    directory = root / str(n)
    directory.mkdir()
    fill(directory / "model", "old")
    (directory / "model" / "README.md").write_text("mine")
    pid = os.fork()
    if not pid:
        last = n
        save(directory / "model")
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if not exchange:
        directories.recover(directory / "model")
    found = content(directory / "model")
    assert found["README.md"] == "mine" and found["config.json"], (n, found)
    print(found["model.safetensors"])
    if code == 0:
        break
    save(directory / "model", "newer")  # cleans up
    assert os.listdir(directory) == ["model"], n
    assert content(directory / "model")["model.safetensors"] == "newer"
"""


@pytest.mark.parametrize("way", ["exchange", "two renames"])
def test_killed_at_any_moment_old_or_new_is_there(tmp_path, way):
    """Without an exchange of names it is there again after the next load or save."""
    script = [sys.executable, "-c", textwrap.dedent(KILL), str(tmp_path), way]
    done = subprocess.run(script, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    seen = done.stdout.split()
    change = seen.index("new")
    assert seen == ["old"] * change + ["new"] * (len(seen) - change)
    assert change > 10 and len(seen) - change > 3


def test_a_kept_file_of_a_killed_exchange_comes_back(target):
    os.rename(target, directories._aside(target))
    recover(target)
    assert content(target)["model.safetensors"] == "old"
    shutil.copytree(target, directories._aside(target))
    recover(target)  # the name is taken: nothing to do
    save(target)
    assert os.listdir(target.parent) == ["model"]


def test_one_writer_per_directory(tmp_path):
    holder = (
        f"import sys; from hmf_jax.convert.directories import lock\nwith lock({str(tmp_path)!r}):"
    )
    holder += "\n    print('held', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", holder], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout and other.stdin and other.stdout.readline() == "held\n"
    with pytest.raises(BlockingIOError, match=f"in use by process {other.pid} on .*; wait"):
        with lock(tmp_path):
            pass
    other.send_signal(signal.SIGKILL)
    other.wait()
    other.stdin.close()
    other.stdout.close()
    with lock(tmp_path):
        with pytest.raises(BlockingIOError, match=f"process {os.getpid()} on"), lock(tmp_path):
            pass
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_locks(tmp_path, monkeypatch):
    def refuse(fd, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(directories.fcntl, "flock", refuse)
    with pytest.warns(UserWarning, match="has no locks"), lock(tmp_path):
        pass
    save(tmp_path / "model")


def test_a_lock_is_never_a_link(tmp_path):
    (tmp_path / "mine").write_text("mine")
    (tmp_path / ".hmf-jax.lock").symlink_to("mine")
    with pytest.raises(OSError), lock(tmp_path):
        pass
    assert (tmp_path / "mine").read_text() == "mine"


def test_checksums(tmp_path):
    fill(tmp_path, "weights")
    (tmp_path / "params" / "d").mkdir(parents=True)
    (tmp_path / "params" / "d" / "0").write_bytes(bytes(1000))
    assert not check_checksums(tmp_path)
    write_checksums(tmp_path)
    assert check_checksums(tmp_path)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) == 4
    for file in files:
        raw = file.read_bytes()
        for position in (0, len(raw) // 2, len(raw) - 1):
            flipped = bytearray(raw)
            flipped[position] ^= 16
            file.write_bytes(flipped)
            with pytest.raises(ValueError, match="restore") as error:
                check_checksums(tmp_path)
            assert "\n" not in str(error.value)
        file.write_bytes(raw[:-1])
        with pytest.raises(ValueError, match="restore|has changed"):
            check_checksums(tmp_path)
        file.unlink()
        if file.name == "checksums.sha256":
            assert not check_checksums(tmp_path)
        else:
            with pytest.raises(ValueError, match="is missing"):
                check_checksums(tmp_path)
        file.write_bytes(raw)
    (tmp_path / "checksums.sha256").write_text(f"{'0' * 64}  ../outside\n")
    with pytest.raises(ValueError, match="is damaged"):
        check_checksums(tmp_path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[1]", "must hold a JSON object, found list"),
        ("null", "must hold a JSON object, found NoneType"),
        ('{"a": 1, "b": 2, "a": 3}', "the key 'a' is there twice"),
        ('{"x": {"\\u001b[2J": 1, "\\u001b[2J": 1}}', r"the key '\\x1b\[2J' is there twice"),
        ('{"a": NaN}', "NaN is not a finite number"),
        ('{"a": -Infinity}', "-Infinity is not a finite number"),
        ('{"a": 1e999}', "1e999 is not a finite number"),
        ('{"a": ' + "[" * 200 + "]" * 200 + "}", "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        (json.dumps({"a": "x" * 1000}), "is too large: more than 900 bytes"),
        ('{"a": ' + "9" * 5000 + "}", "is too large|limit"),
    ],
)
def test_bad_json_is_one_line(tmp_path, text, message):
    (tmp_path / "config.json").write_text(text)
    limit = 900 if "xxx" in text else 1 << 24
    with pytest.raises(ValueError, match=message) as error:
        read_json(tmp_path / "config.json", limit=limit)
    assert "\n" not in str(error.value) and str(tmp_path / "config.json") in str(error.value)
    assert len(str(error.value)) < 400


def test_json_from_strange_files(tmp_path):
    file = tmp_path / "config.json"
    with pytest.raises(FileNotFoundError, match="config.json does not exist"):
        read_json(file)
    os.mkfifo(file)  # reading would wait for ever
    with pytest.raises(ValueError, match="is not a regular file"):
        read_json(file)
    file.unlink()
    file.write_bytes(b"\xff\xfe{}")
    with pytest.raises(ValueError, match="is not valid JSON"):
        read_json(file)
    file.write_text('\ufeff{"a": [1.5, {"b": "\u00e9"}]}', encoding="utf-8")
    assert read_json(file) == {"a": [1.5, {"b": "\u00e9"}]}


def test_printable():
    assert printable("model.layers.0.\u00e9") == "model.layers.0.\u00e9"
    assert printable("a\x1b[31m\r\n\u202e\ud800") == r"a\x1b[31m\r\n\u202e\ud800"
    assert printable("x" * 1000, 10) == "xxxxxxxxxx... (1,000 characters)"
