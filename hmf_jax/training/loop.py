"""The training loop: any step function over any batches, with checkpoints, records and progress.

The loop knows nothing of the loss: a step is a function (state, batch) -> (state, metrics).
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import math
import signal
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from hmf_jax.convert.directories import lock
from hmf_jax.sharding import BATCH_AXES, row_parts
from hmf_jax.training.checkpoint import Checkpoints, of_all_processes
from hmf_jax.training.diagnosis import find_not_finite
from hmf_jax.training.flops import training_flops
from hmf_jax.training.report import Log
from hmf_jax.training.signals import Stopped, stop_signals
from hmf_jax.training.step import TrainState

Array = jax.Array
Batch = Mapping[str, Any]
Step = Callable[[Any, Batch], tuple[Any, Mapping[str, Array]]]


def train[S](
    state: S,
    step: Step,
    batches: Iterable[Batch],
    *,
    steps: int,
    checkpoints: Checkpoints | None = None,
    directory: str | Path | None = None,
    loggers: Sequence[Any] = (),
    flops_per_token: float | None = None,
    diagnose: Callable[[S, Batch], str] | None = None,
    evaluate: Callable[[S], float] | None = None,
    eval_every: int | None = None,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
    log_every: int = 1,
    profile: bool = False,
) -> S:
    """Runs `step` until `steps` batches in all are trained on or the batches end.

    The host reads the metrics of a step while the devices run the next one, so that neither waits
    for the other. A run that was killed goes on from its last checkpoint, with the very numbers
    that it would have had (`batches` must be made as before).

        optimizer = RECIPES["instruct"].optimizer(steps=1000)
        state = TrainState.create(model, optimizer)
        batches = Batches("chats.jsonl", tokenizer, length=4096, batch_size=8)
        saved = Checkpoints("run/checkpoints", model.config, every=200)
        step = make_train_step(optimizer)
        state = train(state, step, batches, steps=1000, checkpoints=saved, directory="run")

    Args:
      state: a pytree of arrays, see `TrainState`. The step may delete ("donate") it.
      step: (state, batch) -> (state, metrics), see `make_train_step`. Metrics are scalars: `loss`
        is needed; `finite` False stops the run, as does a loss that is not finite; `tokens` 0 says
        that the batch had nothing to learn from (needed for several processes, see `batches`).
      batches: dicts of arrays [B, T], this process's part of the batch (see `data_shard`). If they
        have `get_state` and `set_state`, as `Batches`, checkpoints hold their position; others are
        read from the beginning again. Where those of one process end before those of others, it
        goes on with `batches.padding()`, if there is such a method, until all end.
      steps: in all, those before a restart included.
      checkpoints: where to save and to go on from; None: nowhere.
      directory: gets metrics.jsonl (a line per step; `data_wait`: seconds in which the devices had
        to wait for a batch, at most), loss.png (if matplotlib is installed) and
        profile/. None: no files. This call alone may write there and to the checkpoints meanwhile.
      loggers: further receivers of the metrics, e.g. `metrax.logging.TensorboardBackend`. They are
        closed at the end.
      flops_per_token: see `training_flops`, for the MFU; None: that of a `TrainState`.
      diagnose: says what is wrong with a state and a batch whose loss is not finite; None:
        `find_not_finite` for a `TrainState`.
      evaluate: the validation loss of a state, see `Evaluation`: `val_loss` of the metrics. The
        checkpoint of the smallest is kept (`checkpoints.best`).
      eval_every: steps between validations; None: only one at the end.
      progress: show a bar with loss, tokens/s (padding included), MFU and the remaining time
        (process 0 only).
      say: is told a line of the metrics every `log_every` steps, and each validation loss (by
        process 0 only).
      profile: trace steps 3 to 5 of this call with `jax.profiler` into directory/profile.

    Returns:
      the state after the last step.

    Raises:
      FloatingPointError: a loss or gradient is not finite; says in which step and where. Neither
        the state before it nor any later one is saved.
      BlockingIOError: another run writes to the directory or the checkpoints.
      OSError: a checkpoint cannot be written, e.g. the disk is full; those before it are intact.
      ValueError: a checkpoint of another model or other data; all checkpoints are damaged; a batch
        that the mesh does not split.
      Stopped: SIGINT (Ctrl-C), SIGTERM or SIGHUP came; the step was finished and saved. It is a
        KeyboardInterrupt.
    """
    for name, value in (("steps", steps), ("log_every", log_every), ("eval_every", eval_every)):
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    if profile and directory is None:
        raise ValueError("profile=True needs a directory to write to.")
    with holding(directory, None if checkpoints is None else checkpoints.directory):
        done = 0
        if checkpoints is not None and checkpoints.latest is not None:
            for problem in checkpoints.problems:
                warnings.warn(f"passed over: {problem}", stacklevel=2)
            state, done = checkpoints.restore(state, batches)
        if diagnose is None and isinstance(state, TrainState):
            diagnose = find_not_finite  # pyright: ignore[reportAssignmentType]
        log = Log(directory, loggers, done, steps, progress, say=say, log_every=log_every)
        log.flops_per_token = flops_per_token
        loop: _Loop[Any] = _Loop(state, step, done, checkpoints, diagnose, log)
        loop.evaluate, loop.eval_every = evaluate, eval_every
        del state  # the loop has it, and lets go of what a step has replaced
        loop.run(batches, steps, Path(str(directory)) / "profile" if profile else None)
        return loop.state


# What this run holds, for the functions that it calls; not for other threads.
_held: contextvars.ContextVar[frozenset[Path]] = contextvars.ContextVar("held", default=frozenset())


@contextlib.contextmanager
def holding(*directories: str | Path | None) -> Iterator[None]:
    """Locks directories for this run, made if they are not there; those inside others that it holds
    are locked by that.

    Raises BlockingIOError on all processes if another run has one of them.
    """
    paths = {Path(d).expanduser().resolve() for d in directories if d is not None}
    held = _held.get()
    outer = [p for p in sorted(paths) if not any(p.is_relative_to(q) for q in paths - {p} | held)]
    problem = None
    with contextlib.ExitStack() as stack:
        if jax.process_index() == 0:
            try:
                for path in outer:
                    path.mkdir(parents=True, exist_ok=True)
                    stack.enter_context(lock(path))
            except OSError as e:
                if jax.process_count() == 1:
                    raise
                problem = str(e)
        if problem := (of_all_processes([problem]) or [[None]])[0][0]:
            raise BlockingIOError(problem)
        token = _held.set(held | set(outer))
        stack.callback(_held.reset, token)
        yield


class _Loop[S]:
    """The state of `train`, and the step whose metrics the host has not read yet."""

    evaluate: Callable[[S], float] | None
    eval_every: int | None

    def __init__(
        self,
        state: S,
        step: Step,
        done: int,
        checkpoints: Checkpoints | None,
        diagnose: Callable[[S, Batch], str] | None,
        log: Log,
    ) -> None:
        self.state, self.done = state, done  # done: steps whose metrics are known and finite
        self._step, self._checkpoints, self._diagnose, self._log = step, checkpoints, diagnose, log
        self._mesh, self._several = mesh_of(state), jax.process_count() > 1
        self._pending: tuple[int, Mapping[str, Any], Batch] | None = None
        self._validated: tuple[int, float | None] = done, None  # a step, and its validation loss

    def run(self, batches: Iterable[Batch], steps: int, profile: Path | None) -> None:
        """All that is left of `steps`; traces the third to the fifth step into `profile`."""
        first, checkpoints = self.done + 1, self._checkpoints
        skip = 0 if hasattr(batches, "set_state") else self.done
        iterator = itertools.islice(batches, skip, None)
        padding = getattr(batches, "padding", lambda: None)() if self._several else None
        with contextlib.ExitStack() as stack:
            stack.callback(self._log.close, batches)
            if checkpoints is not None:
                stack.enter_context(checkpoints)
            stopped = stack.enter_context(stop_signals())
            tracing = stack.enter_context(contextlib.ExitStack())
            for number in range(first, steps + 1):
                batch = self._next(iterator, padding)
                if batch is None:
                    break
                if number == first:
                    self._reckon_flops(batch)
                if profile is not None and number == first + 2:
                    tracing.enter_context(jax.profiler.trace(str(profile)))
                if not self._dispatch(number, batch):
                    break
                stop = stopped(number)
                save = checkpoints is not None and (stop or number % checkpoints.every == 0)
                validate = self._is_validated_after(number, steps)
                traced = profile is not None and number == first + 4
                if (save or stop or validate or traced) and not self._settle(validate):
                    break
                if traced:
                    tracing.close()
                if checkpoints is not None:
                    checkpoints.check()
                    if save or (validate and self._is_best(number)):
                        self._save(batches)
                if stop:
                    raise self._stopped(stop)
            self._finish(batches, first)

    def _next(self, batches: Iterator[Batch], default: Batch | None) -> Batch | None:
        """The next batch; the log is told how long the devices had nothing to do meanwhile."""
        start = time.perf_counter()
        batch = next(batches, default)
        if self._pending is not None:
            metrics = jax.tree.leaves(dict(self._pending[1]))
            if all(a.is_ready() for a in metrics if hasattr(a, "is_ready")):
                self._log.wait(time.perf_counter() - start)
        return batch

    def _finish(self, batches: Iterable[Batch], first: int) -> None:
        """What is to be done after the last step, if it has not been done."""
        self._settle(validate=self.evaluate is not None)
        if self.done < first:
            return
        if self.evaluate is not None and self._validated[0] != self.done:
            self._log.add(self.done, {"val_loss": self._validate(self.done)})
        if self._checkpoints is not None and self._checkpoints.latest != self.done:
            self._save(batches)

    def _save(self, batches: Iterable[Batch]) -> None:
        step, loss = self._validated
        assert self._checkpoints is not None
        self._log.flush()
        loss = loss if step == self.done else None
        self._checkpoints.save(self.done, self.state, batches, val_loss=loss)

    def _stopped(self, signum: int) -> Stopped:
        """What to raise when a signal came; the checkpoint is on the disk by then."""
        name = signal.Signals(signum).name
        said = f"Stopped by {name} after step {self.done}; "
        if self._checkpoints is None:
            return Stopped(f"{said}nothing is saved, as there are no checkpoints.", signum)
        self._checkpoints.wait()
        return Stopped(f"{said}saved: {self._checkpoints.describe()}", signum)

    def _is_validated_after(self, number: int, steps: int) -> bool:
        if self.evaluate is None:
            return False
        return number == steps or (self.eval_every is not None and number % self.eval_every == 0)

    def _is_best(self, number: int) -> bool:
        step, loss = self._validated
        best = None if self._checkpoints is None else self._checkpoints.best
        return step == number and loss is not None and (best is None or loss < best.loss)

    def _validate(self, number: int) -> float:
        """The validation loss of the state after this step."""
        assert self.evaluate is not None
        start = time.perf_counter()
        loss = float(self.evaluate(self.state))
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the validation loss after step {number} is not finite: {loss:g}. {self._last()}"
            )
        self._validated = number, loss
        self._log.skip(time.perf_counter() - start)
        return loss

    def _reckon_flops(self, batch: Batch) -> None:
        """The log needs them for the MFU; the caller may have said how many there are."""
        if self._log.flops_per_token is None and isinstance(self.state, TrainState):
            length = np.shape(batch["tokens"])[1]
            self._log.flops_per_token = training_flops(self.state, length)

    def _dispatch(self, number: int, batch: Batch) -> bool:
        """Start a step on the devices, and meanwhile settle the one before it."""
        placed = place(batch, self._mesh)
        self.state, metrics = self._step(self.state, placed)
        if not self._settle():
            return False
        self._pending = number, metrics, placed
        return True

    def _settle(self, validate: bool = False) -> bool:
        """Read the metrics of the last step; False if no process had anything to learn from."""
        if self._pending is None:
            return True
        number, metrics, batch = self._pending
        self._pending = None
        values = {name: float(x) for name, x in jax.device_get(dict(metrics)).items()}
        values = {"loss": values.pop("loss"), **values}
        if not values.pop("finite", True) or not math.isfinite(values["loss"]):
            raise FloatingPointError(self._what_is_not_finite(number, values, batch))
        if self._several and values.get("tokens") == 0:
            return False
        self.done = number
        if validate:
            values["val_loss"] = self._validate(number)
        self._log.write(number, values, batch["tokens"].size)
        return True

    def _what_is_not_finite(self, number: int, values: Mapping[str, float], batch: Batch) -> str:
        numbers = ", ".join(f"{k} {v:g}" for k, v in values.items())
        where = "" if self._diagnose is None else f" {self._diagnose(self.state, batch)}"
        return f"step {number} is not finite: {numbers}.{where} {self._last()}"

    def _last(self) -> str:
        good = None if self._checkpoints is None else self._checkpoints.latest
        return "There is no checkpoint." if good is None else f"The last checkpoint: step {good}."


def data_shard(mesh: Mesh | None) -> tuple[int, int]:
    """Which part of the data this process reads, and how many parts there are.

    Processes whose devices hold the same rows of a batch (tensor parallelism over hosts) read the
    same part: `Batches(..., process_index=index, process_count=count)`.

    Raises:
      ValueError: the processes' rows overlap in part.
    """
    if mesh is None:
        return 0, 1
    axes = tuple(a for a in mesh.axis_names if a in BATCH_AXES)
    others = tuple(a for a in mesh.axis_names if a not in BATCH_AXES)
    order = [mesh.axis_names.index(a) for a in (*axes, *others)]
    parts = row_parts(mesh)
    rows: dict[int, set[int]] = {}
    for row, devices in enumerate(np.transpose(mesh.devices, order).reshape(parts, -1)):
        for device in devices:
            rows.setdefault(device.process_index, set()).add(row)
    shares = sorted({tuple(sorted(r)) for r in rows.values()})
    if sum(map(len, shares)) != parts or len({len(s) for s in shares}) > 1:
        raise ValueError(
            f"the processes' devices do not split the rows of a batch evenly on "
            f"{dict(mesh.shape)}; "
            "choose dp x fsdp as a multiple or a divisor of the number of processes"
        )
    return shares.index(tuple(sorted(rows[jax.process_index()]))), len(shares)


def place(batch: Batch, mesh: Mesh | None) -> dict[str, jax.Array]:
    """The global batch on the devices, its rows split over the data axes of the mesh.

    Args:
      batch: arrays [B, T], this process's rows (see `data_shard`).
      mesh: the model's, or None.

    Raises:
      ValueError: the mesh does not divide the rows.
    """
    if mesh is None:
        return {name: jnp.asarray(a) for name, a in batch.items()}
    axes = tuple(a for a in mesh.axis_names if a in BATCH_AXES)
    sharding = NamedSharding(mesh, PartitionSpec(axes))
    _, count = data_shard(mesh)
    out = {}
    for name, a in batch.items():
        rows, parts = np.shape(a)[0] * count, row_parts(mesh)
        if rows % parts:
            raise ValueError(
                f"dp x fsdp = {parts} does not divide the {rows} rows of a batch; "
                "change one of them"
            )
        shape = (rows, *np.shape(a)[1:])
        out[name] = jax.make_array_from_process_local_data(sharding, np.asarray(a), shape)
    return out


def mesh_of(state: Any) -> Mesh | None:
    """The mesh that the arrays of a state live on."""
    shardings = (getattr(a, "sharding", None) for a in jax.tree.leaves(state))
    return next((s.mesh for s in shardings if isinstance(s, NamedSharding)), None)  # pyright: ignore
