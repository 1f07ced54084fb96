"""What a run is a run of, and what it wrote: run.json in its directory.

A run goes on only with the inputs that it began with. What is compared: the bytes of the base's
weights, its tokenizer and chat template, its config, the bytes of the data files, and every field
of the config that changes the result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hmf_jax.convert.directories import holds_model, read_json
from hmf_jax.training.checkpoint import differences
from hmf_jax.training.schema import TrainConfig
from hmf_jax.training.sources import files_of

RECORD, MODEL, ADAPTER, CHECKPOINTS = "run.json", "model", "adapter", "checkpoints"
# All that a run writes into its directory.
WRITES = (MODEL, ADAPTER, CHECKPOINTS, "config.yaml", "metrics.jsonl", "loss.png")

# Fields that may change from one start of a run to the next: where things are (their content is
# compared), how the same numbers are computed, and what is kept and shown. The length and the rows
# of a batch are compared as what they amount to.
MAY_CHANGE = frozenset(
    "model data eval_data output recipe steps epochs batch_size per_device_batch_size accumulate "
    "remat impl chunk_size dp fsdp sp tp distributed on_bad eval_every export save_every keep "
    "log_every tensorboard wandb profile".split()
)


def fields_compared(config: TrainConfig) -> dict[str, Any]:
    """The fields of a config that make its run what it is, as JSON holds them."""
    values = {k: v for k, v in dataclasses.asdict(config).items() if k not in MAY_CHANGE}
    return json.loads(json.dumps({"stage": type(config).__name__, **values}))


def depends_on_length(config: TrainConfig) -> bool:
    """Whether the learning rate of a step depends on how long the run is."""
    return config.schedule != "constant" or type(config.warmup) is float


def fingerprint(files: Iterable[Path]) -> str:
    """SHA-256 of the names and contents of these files; several are read at a time."""
    files = sorted(files)

    def digest(file: Path) -> str:
        with file.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        digests = list(threads.map(digest, files))
    lines = [f"{d}  {f.name}\n" for d, f in zip(digests, files, strict=True)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def weight_files(directory: Path) -> list[Path]:
    """The files with the weights of a model or of adapters."""
    orbax = [p for p in (directory / "params").rglob("*") if p.is_file()]
    return [*directory.glob("*.safetensors"), *orbax]


def data_files(data: str | list[str] | None) -> list[Path]:
    """The files that a field names: files, directories of them, patterns."""
    names = [] if data is None else [data] if isinstance(data, str) else data
    return [file for name in names for file in files_of(name)]


def tokenizer_identity(directory: Path, tokenizer: Any) -> dict[str, str]:
    """Fingerprints of what a tokenizer is made from, and of its chat template."""
    patterns = ("tokenizer.*", "vocab.*", "merges.txt", "added_tokens.json", "special_tokens_map.*")
    files = [p for pattern in patterns for p in directory.glob(pattern) if p.is_file()]
    settings = directory / "tokenizer_config.json"
    values = read_json(settings) if settings.is_file() else {}
    values.pop("chat_template", None)  # it may be there or in a file of its own
    return {
        "tokenizer": _digest([fingerprint(files), values]),
        "chat template": _digest(tokenizer.chat_template),
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


_IDENTITY = {
    "fields", "rows", "steps", "config", "base weights", "tokenizer", "chat template", "data",
    "eval_data",
}  # fmt: skip


@dataclasses.dataclass
class Record:
    """The run.json of a run.

    Attributes:
      directory: of the run.
      identity: what it is a run of.
      wrote: the directories that it exported, each with the fingerprint of its weights; None: it
        was about to.
      remat: what `remat: auto` chose for each layer; None: nothing yet.
    """

    directory: Path
    identity: dict[str, Any]
    wrote: dict[str, str | None]
    remat: list[str] | None = None

    @classmethod
    def load(cls, directory: Path) -> Record | None:
        """That of the run in this directory; None if no run has begun there.

        Raises ValueError if it is damaged.
        """
        file = directory / RECORD
        if not file.is_file():
            return None
        values = read_json(file)
        identity, wrote = values.get("identity"), values.get("wrote")
        if not (
            isinstance(identity, dict) and isinstance(wrote, dict) and _IDENTITY <= set(identity)
        ):
            raise ValueError(f"{file} is no record of a run; choose another output")
        return cls(directory, identity, wrote, values.get("remat"))

    def save(self) -> None:
        values = {"identity": self.identity, "wrote": self.wrote, "remat": self.remat}
        write_atomically(self.directory / RECORD, json.dumps(values, indent=1) + "\n")

    @contextlib.contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """For the time in which a directory of the run is written: it is noted before and after."""
        self.wrote[name] = None
        self.save()
        yield self.directory / name
        self.wrote[name] = fingerprint(weight_files(self.directory / name))
        self.save()

    def changes(self, new: Mapping[str, Any], done: int | None) -> list[str]:
        """What of this run differs from a new one that is to go on after `done` steps."""
        old = self.identity
        found = differences(old["fields"], new["fields"])
        if old["rows"] != new["rows"]:
            found.append(f"rows of a batch {old['rows']} -> {new['rows']}")
        found += [f"config {text}" for text in differences(old["config"], new["config"])]
        for name in ("base weights", "tokenizer", "chat template"):
            if old[name] != new[name]:
                found.append(f"{name} (other bytes than before)")
        for name in ("data", "eval_data"):
            found += _changed_files(name, old[name], new[name])
        was, steps = old["steps"], new["steps"]
        if was["of"] != steps["of"] and (was["decide"] or steps["decide"]):
            found.append(f"steps {was['of']} -> {steps['of']} (the learning rate depends on them)")
        elif done is not None and steps["of"] < done:
            found.append(f"steps {was['of']} -> {steps['of']} ({done} are done)")
        return [text if len(text) < 200 else f"{text[:197]}..." for text in found]


def _changed_files(name: str, old: Sequence[Any], new: Sequence[Any]) -> list[str]:
    if len(old) != len(new):
        return [f"{name} {len(old)} file(s) -> {len(new)}"]
    return [
        f"{name} {a if a == b else f'{a} -> {b}'} (other bytes)"
        for (a, one), (b, two) in zip(old, new, strict=True)
        if one != two
    ]


def check_output(
    output: Path,
    inputs: Mapping[str, Iterable[Path]],
    writes: Sequence[str],
    *,
    contents: bool = True,
) -> None:
    """Refuses a directory in which a run would replace what it reads, or what it did not write.

    Args:
      output: of the run.
      inputs: the field of the config -> files and directories that it names.
      writes: what the run writes there.
      contents: read what earlier runs exported, to see that it is still theirs.

    Raises:
      FileExistsError, NotADirectoryError, ValueError: says what is in the way, and what to do.
    """
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"output: {output} is a file; name a directory")
    real = output.resolve()
    for field, paths in inputs.items():
        for path in map(Path.resolve, paths):
            inside = next((w for w in writes if path.is_relative_to((real / w).resolve())), None)
            if path == real or inside is not None:
                where = output if inside is None else output / inside
                raise ValueError(
                    f"output: the run would write to {where}, where its {field} is ({path}); "
                    "choose another output"
                )
    record = Record.load(output)
    if record is None and holds_model(output):
        raise FileExistsError(f"output: {output} holds a model; choose another output")
    for name in writes:
        path = output / name
        if not os.path.lexists(path):
            continue
        if record is None or (name in (MODEL, ADAPTER) and name not in record.wrote):
            raise FileExistsError(
                f"output: {path} is there, and no run has written it; choose another output or "
                "move it away"
            )
        if path.is_symlink() and name in (MODEL, ADAPTER):
            raise FileExistsError(f"output: {path} is a symbolic link; move it away")
        wrote = record.wrote.get(name) if contents else None
        if wrote is not None and fingerprint(weight_files(path)) != wrote:
            raise FileExistsError(
                f"output: {path} has changed since the run wrote it; choose another output or move "
                "it away"
            )


def forget(record: Record) -> None:
    """Removes what a run wrote, for another one that begins anew there. Its exported model stays
    until the new one replaces it."""
    for name in (ADAPTER, CHECKPOINTS):
        if name != ADAPTER or name in record.wrote:
            shutil.rmtree(record.directory / name, ignore_errors=True)
    record.wrote.pop(ADAPTER, None)
    for name in ("config.yaml", "metrics.jsonl", "loss.png"):
        (record.directory / name).unlink(missing_ok=True)


def write_atomically(file: Path, text: str) -> None:
    """The file has the old text or this one at every moment. Raises OSError naming it."""
    new = file.with_name(f".{file.name}.new")
    try:
        with new.open("w", encoding="utf-8") as f:
            f.write(text)
            f.flush()
            os.fsync(f.fileno())
        new.replace(file)
    except OSError as e:
        new.unlink(missing_ok=True)
        raise OSError(f"cannot write {file} (is the disk full?): {e.strerror}") from e


def refusal(record: Record, found: Sequence[str]) -> str:
    """Why a run cannot go on, in one line."""
    return (
        f"{record.directory} holds another run: {'; '.join(found)}. Choose another output, or "
        "begin anew there with --overwrite (overwrite=True)"
    )
