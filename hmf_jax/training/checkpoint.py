"""Checkpoints of a training run, by Orbax: asynchronous, atomic, and exact when restored."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from hmf_jax.config import HybridConfig

_STATE, _ABOUT = "state", "about"


class Checkpoints:
    """The checkpoints of one run: a directory with one subdirectory per step.

    A checkpoint holds the arrays of the state, the position in the data of every process, and what
    it is a checkpoint of. It gets its name when it is complete: what a killed process leaves behind
    is never taken for one, and is removed by the next run. Arrays in a field `frozen` of the state
    are not saved, as training does not change them, but their checksum must agree when a run goes
    on.

    Args:
      directory: made if it is not there.
      config: the model's; a checkpoint of another config is refused.
      every: steps between checkpoints.
      keep: this many newest checkpoints stay.
    """

    def __init__(
        self, directory: str | Path, config: HybridConfig, *, every: int = 500, keep: int = 2
    ) -> None:
        if every < 1 or keep < 1:
            raise ValueError(f"every={every} and keep={keep} must be at least 1.")
        self.directory, self.every = Path(directory).expanduser().absolute(), every
        self._config = json.loads(json.dumps(config.to_dict()))  # as it comes back from JSON
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True)
        handlers = {_STATE: ocp.StandardCheckpointHandler(), _ABOUT: ocp.JsonCheckpointHandler()}
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_handlers=handlers
        )
        self._good = self._manager.latest_step()

    @property
    def latest(self) -> int | None:
        """The step of the newest checkpoint, one that is still being written included."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, batches: Any = None) -> None:
        """Starts saving; the state may be changed or deleted as soon as this returns.

        Args:
          step: batches trained on.
          state: a pytree of arrays.
          batches: the data; `get_state` gives its position (as JSON). Every process calls this.

        Raises:
          OSError: this checkpoint or the one before could not be written.
        """
        self.wait()
        saved, frozen = _split(state)
        about = {
            "config": self._config,
            "frozen": _checksum(frozen),
            "data": _of_all_processes(
                batches.get_state() if hasattr(batches, "get_state") else None
            ),
        }
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(saved),  # pyright: ignore[reportCallIssue]
            about=ocp.args.JsonSave(about),  # pyright: ignore[reportCallIssue]
        )
        try:
            self._manager.save(step, args=args)
        except Exception as e:
            raise self._failed(e) from e

    def restore[S](self, state: S, batches: Any = None) -> tuple[S, int]:
        """The newest checkpoint: the state, on the mesh of the given one, and its step.

        Args:
          state: of the same structure; its `frozen` arrays are kept.
          batches: the data, made as in the run that saved; is set to where that run stood.

        Raises:
          FileNotFoundError: there is no checkpoint.
          ValueError: one of another model, other trained parameters, another optimizer or other
            data; says what differs. Nothing was changed.
        """
        step = self.latest
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {self.directory}")
        where = f"checkpoint {self.directory / str(step)}"
        args = ocp.args.Composite(about=ocp.args.JsonRestore())  # pyright: ignore[reportCallIssue]
        about = self._manager.restore(step, args=args)[_ABOUT]
        if different := [
            f"{k} {about['config'].get(k)!r} -> {self._config.get(k)!r}"
            for k in sorted({*about["config"], *self._config})
            if about["config"].get(k) != self._config.get(k)
        ]:
            raise ValueError(f"{where} is of another model: {', '.join(different)}")

        wanted, frozen = _split(state)
        found = self._manager.item_metadata(step)[_STATE]
        found = {path: (tuple(a.shape), np.dtype(a.dtype)) for path, a in found.items()}
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
                f"{where} holds other arrays than this run trains (other trained parameters, "
                f"optimizer or dtypes):\n  {shown}"
            )
        if about["frozen"] != _checksum(frozen):
            raise ValueError(
                f"{where} was trained on top of other weights: the frozen parameters differ; start "
                "from the model that it started from"
            )
        abstract = {
            p: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding)
            for p, a in wanted.items()
        }
        args = ocp.args.Composite(
            state=ocp.args.StandardRestore(abstract)  # pyright: ignore[reportCallIssue]
        )
        arrays = self._manager.restore(step, args=args)[_STATE]
        if hasattr(batches, "set_state") and about["data"] is not None:
            if len(about["data"]) != jax.process_count():
                raise ValueError(
                    f"{where} holds the data of {len(about['data'])} processes; there are "
                    f"{jax.process_count()}"
                )
            batches.set_state(about["data"][jax.process_index()])

        leaves, structure = jax.tree_util.tree_flatten_with_path(state)
        restored = [arrays.get(_name(path), leaf) for path, leaf in leaves]
        return jax.tree.unflatten(structure, restored), step

    def check(self) -> None:
        """Raises OSError if the checkpoint that is being written has failed."""
        try:
            self._manager.check_for_errors()
        except Exception as e:
            raise self._failed(e) from e

    def wait(self) -> None:
        """Waits for the checkpoint that is being written; OSError if that fails."""
        writing = self.latest
        try:
            self._manager.wait_until_finished()
            self._manager.check_for_errors()
        except Exception as e:
            raise self._failed(e) from e
        self._good = writing

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.wait()

    def _failed(self, error: Exception) -> OSError:
        good = "none" if self._good is None else f"{self.directory / str(self._good)}"
        return OSError(
            f"cannot write a checkpoint to {self.directory} (is the disk full?); the last good "
            f"one: {good}. The cause: {error}"
        )


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
            a = jax.lax.bitcast_convert_type(a, f"uint{8 * a.dtype.itemsize}")
        return a.astype(jnp.uint32)

    return jnp.stack([jnp.sum(words(a)) for a in arrays])


def _of_all_processes(value: Any) -> list[Any] | None:
    """The JSON values of all processes, in their order; None if they are None."""
    if jax.process_count() == 1 or value is None:
        return None if value is None else [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.asarray(text.size))
    padded = np.pad(text, (0, int(sizes.max()) - text.size))
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(t[:n])) for t, n in zip(texts, sizes, strict=True)]
