"""Checkpoints of a training run: asynchronous, atomic, with checksums, and exact when restored.

Orbax writes and reads the arrays; what makes a checkpoint of them is here.
"""

from __future__ import annotations

import functools
import json
import logging
import re
import shutil
import sys
import zlib
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from hmf_jax.config import HybridConfig
from hmf_jax.convert.directories import check_checksums, read_json, write_checksums

_STATE, _ABOUT, _UNFINISHED = "state", "about.json", ".unfinished-"


class Best(NamedTuple):
    """The smallest validation loss of a run so far, nats per token, and after which step it was."""

    step: int
    loss: float


class Checkpoints:
    """The checkpoints of one run: a directory with one subdirectory per step.

    A checkpoint holds the arrays of the state, the position in the data of every process, what it
    is a checkpoint of, and checksums of all its files. It gets its name when it is complete: what a
    killed process leaves behind is never taken for one, and is removed by the next save. Arrays in
    a field `frozen` of the state are not saved, as training does not change them, but their
    checksum must agree when a run goes on. One that was damaged later is passed over for the newest
    that is intact.

    Args:
      directory: made by the first save.
      config: the model's; a checkpoint of another config is refused.
      every: steps between checkpoints.
      keep: this many newest checkpoints stay, and the one with the smallest validation loss.

    Attributes:
      best: which one that is; None: none was saved with a validation loss.
      problems: what is wrong with the checkpoints that were passed over, in words.
    """

    def __init__(
        self, directory: str | Path, config: HybridConfig, *, every: int = 500, keep: int = 2
    ) -> None:
        if every < 1 or keep < 1:
            raise ValueError(f"every={every} and keep={keep} must be at least 1.")
        self.directory, self.every = Path(directory).expanduser().absolute(), every
        self.best: Best | None = None
        self.problems: list[str] = []
        self._keep = keep
        self._config = json.loads(json.dumps(config.to_dict()))  # as it comes back from JSON
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None
        self._latest: int | None = None
        self._looked = False

    @property
    def latest(self) -> int | None:
        """The step of the newest intact checkpoint, one that is still being written included.

        Raises ValueError if there are checkpoints and all are damaged.
        """
        if not self._looked:
            self._latest, self.problems = self._newest_intact()
            self._looked = True
        return self._latest

    def save(
        self, step: int, state: Any, batches: Any = None, *, val_loss: float | None = None
    ) -> None:
        """Starts saving; the state may be changed or deleted as soon as this returns.

        Args:
          step: batches trained on.
          state: a pytree of arrays.
          batches: the data; `get_state` gives its position (as JSON). Every process calls this.
          val_loss: the validation loss of this state.

        Raises:
          OSError: this checkpoint or the one before could not be written.
        """
        before = self.latest
        if before is not None and step <= before:
            raise ValueError(f"{self.directory} already has a checkpoint of step {before}")
        self.wait()
        saved, frozen = _split(state)
        if val_loss is not None and (self.best is None or val_loss < self.best.loss):
            self.best = Best(step, val_loss)
        about = {
            "step": step,
            "config": self._config,
            "frozen": _checksum(frozen),
            "data": of_all_processes(
                batches.get_state() if hasattr(batches, "get_state") else None
            ),
            "best": self.best,
        }
        _report_once()
        try:
            tmp = self.directory / f"{_UNFINISHED}{step}"
            if jax.process_index() == 0:
                self.directory.mkdir(parents=True, exist_ok=True)
                self._clean(before)
                tmp.mkdir()
            _wait_for_all()
            checkpointer = ocp.StandardCheckpointer()
            checkpointer.save(tmp / _STATE, saved)
        except Exception as e:
            raise self._failed(e) from e
        self._writing = self._thread.submit(self._finish, checkpointer, tmp, step, about)
        self._latest = step

    def restore[S](
        self, state: S, batches: Any = None, *, step: int | None = None
    ) -> tuple[S, int]:
        """The newest intact checkpoint: the state, on the mesh of the given one, and its step.

        Args:
          state: of the same structure, of arrays or (but for `frozen`) of their shapes; its
            `frozen` arrays are kept.
          batches: the data, made as in the run that saved; is set to where that run stood.
          step: take this checkpoint instead.

        Raises:
          FileNotFoundError: there is no checkpoint.
          ValueError: all are damaged, or this one; one of another model, other trained parameters,
            another optimizer or other data; says what differs. Nothing was changed.
        """
        newest = step is None
        step = self.latest if newest else step
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {self.directory}")
        self.wait()
        where = self.directory / str(step)
        if not newest and (problem := self._damage(step)):
            raise ValueError(problem)
        about = read_json(where / _ABOUT)
        if different := differences(about["config"], self._config):
            raise ValueError(f"checkpoint {where} is of another model: {', '.join(different)}")
        wanted, frozen = _split(state)
        self._check_arrays(where, wanted)
        if about["frozen"] != _checksum(frozen):
            raise ValueError(
                f"checkpoint {where} was trained on top of other weights: the frozen parameters "
                "differ; start from the model that it started from"
            )
        abstract = {
            p: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding)
            for p, a in wanted.items()
        }
        with ocp.StandardCheckpointer() as checkpointer:
            arrays = checkpointer.restore(where / _STATE, abstract)
        if hasattr(batches, "set_state") and about["data"] is not None:
            if len(about["data"]) != jax.process_count():
                raise ValueError(
                    f"checkpoint {where} holds the data of {len(about['data'])} processes; there "
                    f"are {jax.process_count()}"
                )
            batches.set_state(about["data"][jax.process_index()])
        if newest:
            self.best = about["best"] and Best(*about["best"])
        leaves, structure = jax.tree_util.tree_flatten_with_path(state)
        restored = [arrays.get(_name(path), leaf) for path, leaf in leaves]
        return jax.tree.unflatten(structure, restored), step

    def check(self) -> None:
        """Raises OSError if the checkpoint that is being written has failed."""
        if self._writing is not None and self._writing.done():
            error = self._joined()
            if error is not None:
                raise error

    def wait(self) -> None:
        """Waits for the checkpoint that is being written; OSError if that fails."""
        error = self._joined()
        if jax.process_count() > 1:  # the first process writes last, so it alone knows
            problem = (of_all_processes([error and str(error)]) or [[None]])[0][0]
            error = error or (OSError(problem) if problem else None)
        if error is not None:
            raise error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self.wait()
        else:  # another error is on its way: only let the writing end
            self._joined()

    def describe(self) -> str:
        """What a run can go on from, in words."""
        steps = self.steps()
        if not steps:
            return f"there is no checkpoint in {self.directory}."
        return f"the run, started again, goes on from {self.directory / str(steps[-1])}."

    def steps(self) -> list[int]:
        """All that are there, in their order, damaged ones included."""
        names = [p.name for p in self.directory.iterdir()] if self.directory.is_dir() else []
        return sorted(int(name) for name in names if re.fullmatch(r"0|[1-9]\d*", name))

    def _finish(self, checkpointer: Any, tmp: Path, step: int, about: dict[str, Any]) -> None:
        """In its own thread: when the arrays are written, makes a checkpoint of them."""
        with checkpointer:
            checkpointer.wait_until_finished()
        if jax.process_index() != 0:
            return
        (tmp / _ABOUT).write_text(json.dumps(about))
        write_checksums(tmp)
        tmp.rename(self.directory / str(step))
        best = None if self.best is None else self.best.step
        for old in self.steps()[: -self._keep]:
            if old != best:
                shutil.rmtree(self.directory / str(old))

    def _joined(self) -> OSError | None:
        """Lets the writing end; why it failed."""
        writing, self._writing = self._writing, None
        error = None if writing is None else writing.exception()
        if error is None:
            return None
        self._latest = next(reversed(self.steps()), None)
        return self._failed(error)

    def _clean(self, latest: int | None) -> None:
        """Removes what a killed process left behind, and checkpoints that were passed over."""
        for path in self.directory.glob(f"{_UNFINISHED}*"):
            shutil.rmtree(path)
        for step in self.steps():
            if latest is None or step > latest:
                shutil.rmtree(self.directory / str(step))

    def _newest_intact(self) -> tuple[int | None, list[str]]:
        """The step of the newest intact checkpoint, and what is wrong with newer ones."""
        found, problems = None, []
        if jax.process_index() == 0:
            for step in reversed(self.steps()):
                problem = self._damage(step)
                if problem is None:
                    found = step
                    break
                problems.append(problem)
        found, problems = (of_all_processes((found, problems)) or [(None, [])])[0]
        if problems and found is None:
            raise ValueError(
                f"no intact checkpoint in {self.directory}: {'; '.join(problems)}. Restore one "
                "from a copy, or begin anew in another directory"
            )
        return found, problems

    def _damage(self, step: int) -> str | None:
        """What is wrong with the files of a checkpoint; None if nothing is."""
        where = self.directory / str(step)
        try:
            if not check_checksums(where):
                return f"checkpoint {where} has no checksums"
            if read_json(where / _ABOUT).get("step") != step:
                return f"checkpoint {where} is that of another step"
        except FileNotFoundError:
            return f"checkpoint {where} is not complete"
        except ValueError as e:
            return f"checkpoint {where} is damaged: {e}"
        return None

    def _check_arrays(self, where: Path, wanted: dict[str, jax.Array]) -> None:
        """Raises ValueError unless a checkpoint holds arrays of these names, shapes and dtypes."""
        with ocp.StandardCheckpointer() as checkpointer:
            tree: Any = checkpointer.metadata(where / _STATE).item_metadata
        found = {path: (tuple(a.shape), np.dtype(a.dtype)) for path, a in tree.items()}
        only = sorted(set(found) - set(wanted), key=lambda p: (not p.startswith("params."), p))
        problems = [f"only in the checkpoint: {p}" for p in only]
        problems += [f"only in this run: {p}" for p in wanted if p not in found]
        problems += [
            f"{p}: {found[p][1]}{list(found[p][0])} -> {a.dtype}{list(a.shape)}"
            for p, a in wanted.items()
            if p in found and found[p] != (a.shape, a.dtype)
        ]
        if problems:
            shown = "\n  ".join([*problems[:10], *(["..."] if len(problems) > 10 else [])])
            raise ValueError(
                f"checkpoint {where} holds other arrays than this run trains (other trained "
                f"parameters, optimizer or dtypes):\n  {shown}"
            )

    def _failed(self, error: BaseException) -> OSError:
        good = next(reversed(self.steps()), None)
        last = "none" if good is None else f"{self.directory / str(good)}"
        return OSError(
            f"cannot write a checkpoint to {self.directory} (is the disk full?); the last good "
            f"one: {last}. The cause: {' '.join(str(error).split())}"
        )


@functools.cache
def _report_once() -> None:
    """Where an array cannot be written, Orbax raises that, and prints it as tracebacks as well, for
    every array. Here it is raised."""
    logging.getLogger("absl").addFilter(
        lambda r: r.levelno < logging.ERROR or "orbax" not in r.pathname
    )
    logging.getLogger("asyncio").addFilter(lambda r: "never retrieved" not in r.getMessage())
    hook = sys.excepthook

    def other_errors(kind: Any, error: BaseException, trace: Any) -> None:
        if not (kind is RuntimeError and str(error) == "Event loop is closed"):
            hook(kind, error, trace)

    sys.excepthook = other_errors


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two flat dicts, each as "key old -> new"."""
    return [
        f"{k} {old.get(k)!r} -> {new.get(k)!r}"
        for k in sorted({*old, *new})
        if old.get(k) != new.get(k)
    ]


def of_all_processes(value: Any) -> list[Any] | None:
    """The JSON values of all processes, in their order; None if they are None."""
    if jax.process_count() == 1 or value is None:
        return None if value is None else [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(text.size))
    padded = np.pad(text, (0, int(sizes.max()) - text.size))
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(t[:n])) for t, n in zip(texts, sizes, strict=True)]


def _wait_for_all() -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("checkpoint")


def _name(path: Any) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _split(state: Any) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Name -> array, for all that is saved, and for all that is not."""
    named = {_name(path): a for path, a in jax.tree_util.tree_leaves_with_path(state)}
    frozen = {n: a for n, a in named.items() if n.startswith("frozen.")}
    return {n: a for n, a in named.items() if n not in frozen}, frozen


def _checksum(arrays: dict[str, jax.Array]) -> int:
    """Of all bits, wherever they live: integer sums do not depend on the mesh."""
    return zlib.crc32(np.asarray(_sums(list(arrays.values()))).tobytes()) if arrays else 0


@jax.jit
def _sums(arrays: list[jax.Array]) -> jax.Array:
    def words(a: jax.Array) -> jax.Array:
        if jnp.issubdtype(a.dtype, jnp.floating):
            bits = min(32, 8 * a.dtype.itemsize)  # a float64 becomes two words
            a = jax.lax.bitcast_convert_type(a, f"uint{bits}")
        places = jnp.arange(a.size, dtype=jnp.uint32).reshape(a.shape)
        return a.astype(jnp.uint32) * (2 * places + 1)  # numbers that change places count, too

    return jnp.stack([jnp.sum(words(a), dtype=jnp.uint32) for a in arrays])
