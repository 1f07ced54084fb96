"""What a training run reports: metrics.jsonl, loss.png, a progress bar, further loggers."""

from __future__ import annotations

import collections
import contextlib
import json
import os
import textwrap
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from hmf_jax.training.batches import Batches
from hmf_jax.training.flops import peak_flops
from hmf_jax.training.identity import write_atomically
from hmf_jax.training.schema import TrainConfig

METRICS = "metrics.jsonl"


class Log:
    """Takes the metrics of each step to the files, the bar and the loggers. Process 0 alone writes
    files and shows a bar.

    Args:
      directory: of metrics.jsonl and loss.png; None: no files. Records of steps after `done`, which
        a killed run left behind, are dropped.
      loggers: objects with `log_scalar(name, value, step=)` and `close()`.
      done: steps before this call; steps: in all, where the bar ends.
      progress: show the bar.
      say: is told a line every `log_every` steps, for the first step and for validations.

    Attributes:
      flops_per_token: model FLOPs, for the MFU; None: no MFU.
    """

    def __init__(
        self,
        directory: str | Path | None,
        loggers: Sequence[Any],
        done: int,
        steps: int,
        progress: bool,
        *,
        say: Callable[[str], None] | None = None,
        log_every: int = 1,
    ) -> None:
        self.flops_per_token: float | None = None
        self._steps, self._first, self._log_every = steps, done + 1, log_every
        self._loggers, self._file, self._directory = loggers, None, None
        first = jax.process_index() == 0
        self._say = say if first else None
        if directory is not None and first:
            self._directory = Path(directory).expanduser()
            self._directory.mkdir(parents=True, exist_ok=True)
            path = self._directory / METRICS
            kept = [r for r in read_metrics(self._directory) if r["step"] <= done]
            write_atomically(path, "".join(json.dumps(r) + "\n" for r in kept))
            self._file = path.open("ab", buffering=0)
        self._bar = tqdm(
            total=steps,
            initial=done,
            desc="training",
            unit="step",
            disable=not (progress and first),
        )
        self._times: collections.deque[tuple[float, int]] = collections.deque(maxlen=20)
        self._last = time.perf_counter()
        self._wait, self._waited, self._trained = 0.0, 0.0, 0.0

    def wait(self, seconds: float) -> None:
        """So long the devices have waited for the next batch, or a little less."""
        self._wait += seconds

    def write(self, step: int, values: dict[str, float], tokens: int) -> None:
        """Report a step; `tokens` are those of its batch, padding included."""
        now = time.perf_counter()
        self._times.append((now, tokens))
        record = {"step": step, **values, "seconds": now - self._last, "data_wait": self._wait}
        if len(self._times) > 1:
            self._trained += record["seconds"]
            self._waited += self._wait
        self._last, self._wait = now, 0.0
        if len(self._times) > 1:  # the first step was compiled
            seconds = self._times[-1][0] - self._times[0][0]
            speed = sum(n for _, n in list(self._times)[1:]) / seconds
            record["tokens_per_second"] = speed
            peak = peak_flops()
            if self.flops_per_token and peak:
                record["mfu"] = speed * self.flops_per_token / (peak * jax.device_count())
        self.add(step, record)
        shown = {"loss": f"{values['loss']:.4g}"}
        if "aux_loss" in record:
            shown["aux loss"] = f"{record['aux_loss']:.4g}"
        if "val_loss" in record:
            shown["validation loss"] = f"{record['val_loss']:.4g}"
        if "tokens_per_second" in record:
            shown["tokens/s"] = f"{record['tokens_per_second']:,.0f}"
        if "mfu" in record:
            shown["MFU"] = f"{record['mfu']:.1%}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()
        due = step % self._log_every == 0 or step in (self._first, self._steps)
        if self._say is not None and (due or "val_loss" in record):
            if "learning_rate" in record:
                shown["lr"] = f"{record['learning_rate']:.3g}"
            words = "  ".join(f"{name} {text}" for name, text in shown.items())
            self._say(f"step {step}/{self._steps}  {words}")

    def add(self, step: int, record: Mapping[str, float]) -> None:
        """Numbers of a step for the file and the loggers; a second record adds to the first."""
        if self._file is not None:
            line = json.dumps({"step": step, **record}) + "\n"
            try:
                self._file.write(line.encode())
            except OSError as e:
                raise OSError(
                    f"cannot write {self._file.name} (is the disk full?): {e.strerror}"
                ) from e
        for logger in self._loggers:
            for name, value in record.items():
                if name != "step":
                    logger.log_scalar(f"train/{name}", value, step=step)

    def skip(self, seconds: float) -> None:
        """What has just taken these seconds was no training."""
        self._last += seconds
        shifted = [(time + seconds, tokens) for time, tokens in self._times]
        self._times = collections.deque(shifted, maxlen=self._times.maxlen)

    def flush(self) -> None:
        """The file is on the disk: no checkpoint may be newer than its records."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def close(self, batches: Any) -> None:
        """Close everything, draw loss.png, and warn of what was wrong with the data: rows that were
        left out, or batches that came too late."""
        self._bar.close()
        for logger in self._loggers:
            logger.close()
        if self._file is not None:
            self._file.close()
        if self._directory is not None:
            with contextlib.suppress(OSError):  # a full disk, which has been reported
                plot_loss(self._directory)
        counts = getattr(batches, "counts", {})
        bad = {k: counts[k] for k in ("empty", "malformed", "overlong") if counts.get(k)}
        if bad:
            what = ", ".join(f"{n} {k}" for k, n in bad.items())
            first = next(iter(getattr(batches, "problems", [])), None)
            example = "" if first is None else f" The first that was left out: {first}"
            warnings.warn(f"of {counts['rows']} rows: {what}.{example}", stacklevel=4)
        if self._waited > max(1.0, 0.01 * self._trained):
            warnings.warn(
                f"the devices waited for data for {self._waited:.0f} of {self._trained:.0f} s "
                f"({self._waited / self._trained:.0%}): batches are made more slowly than they are "
                "trained on; see docs/training.md",
                stacklevel=4,
            )


def read_metrics(directory: str | Path) -> list[dict[str, float]]:
    """The records of metrics.jsonl in the directory of a run, one per step; [] if there is none.

    A last line that a killed run left unfinished is skipped.
    """
    path = Path(directory) / METRICS
    records: dict[int, dict[str, float]] = {}
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else ():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            record = json.loads(line)
            step = int(record["step"])
            records[step] = {**records.get(step, {}), **record}
    return [records[step] for step in sorted(records)]


def plot_loss(directory: str | Path) -> Path | None:
    """Draws loss.png from metrics.jsonl; None without matplotlib or without records."""
    records = [r for r in read_metrics(directory) if "loss" in r]
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError:
        return None
    if not records:
        return None
    steps, loss = [r["step"] for r in records], [r["loss"] for r in records]
    width = max(1, len(loss) // 50)
    smooth = np.convolve(loss, np.ones(width) / width, "valid")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, loss, color="tab:blue", alpha=0.3, label="each step")
    axes.plot(steps[width - 1 :], smooth, color="tab:blue", label=f"mean of {width} steps")
    if validated := [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]:
        axes.plot(*zip(*validated, strict=True), "o-", color="tab:orange", label="validation")
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    path = Path(directory) / "loss.png"
    figure.savefig(path, dpi=120)
    return path


def loggers(config: TrainConfig, output: Path) -> list[Any]:
    """Those that a config asks for, of a run in the directory `output`."""
    if not config.tensorboard and config.wandb is None:
        return []
    try:
        from metrax import logging  # pyright: ignore[reportMissingImports]
    except ImportError as e:
        raise ImportError(
            "tensorboard and wandb need google-metrax: pip install 'hmf-jax[train]'"
        ) from e
    loggers: list[Any] = []
    if config.tensorboard:
        loggers.append(logging.TensorboardBackend(str(output / "tensorboard")))
    if config.wandb is not None:
        loggers.append(logging.WandbBackend(config.wandb, name=output.name))
    return loggers


def describe_source(batches: Batches) -> str:
    """Where the rows come from, and what is left out of them."""
    return "data     " + batches.describe().replace("\n", "\n         ")


def describe_data(batches: Batches) -> str:
    """How many rows, documents and tokens were read, of which formats, in words."""
    counts = ", ".join(f"{n:,} {name}" for name, n in batches.counts.items())
    more = textwrap.indent(batches.describe(), " " * 9)
    return f"data     read by this process: {counts}\n{more}"
