"""The training loop: any step function over any batches, with checkpoints, records and progress.

The loop knows nothing of the loss: a step is a function (state, batch) -> (state, metrics).
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import json
import math
import re
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from hmf_jax.config import HybridConfig
from hmf_jax.mixers import KINDS
from hmf_jax.model import HybridLM
from hmf_jax.sharding import BATCH_AXES, row_parts
from hmf_jax.training.checkpoint import Checkpoints
from hmf_jax.training.loss import next_token_loss
from hmf_jax.training.step import Loss, Remat, TrainState

Array = jax.Array
Batch = Mapping[str, Any]
Step = Callable[[Any, Batch], tuple[Any, Mapping[str, Array]]]

METRICS = "metrics.jsonl"
# Dense bfloat16 FLOP/s of one device, from NVIDIA's data sheets; the first name that fits counts.
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
}


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
    progress: bool = True,
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
      directory: gets metrics.jsonl (a line per step), loss.png (if matplotlib is installed) and
        profile/. None: no files.
      loggers: further receivers of the metrics, e.g. `metrax.logging.TensorboardBackend`. They are
        closed at the end.
      flops_per_token: see `training_flops`, for the MFU; None: that of a `TrainState`.
      diagnose: says what is wrong with a state and a batch whose loss is not finite; None:
        `find_not_finite` for a `TrainState`.
      progress: show a bar with loss, tokens/s (padding included), MFU and the remaining time
        (process 0 only).
      profile: trace steps 3 to 5 of this call with `jax.profiler` into directory/profile.

    Returns:
      the state after the last step.

    Raises:
      FloatingPointError: a loss or gradient is not finite; says in which step and where. Neither
        the state before it nor any later one is saved.
      OSError: a checkpoint cannot be written, e.g. the disk is full; those before it are intact.
      ValueError: a checkpoint of another model or other data; a batch that the mesh does not split.
      KeyboardInterrupt: SIGINT or SIGTERM came; the step was finished and saved.
    """
    if steps < 1:
        raise ValueError(f"steps={steps} must be at least 1.")
    if profile and directory is None:
        raise ValueError("profile=True needs a directory to write to.")
    done = 0
    if checkpoints is not None and checkpoints.latest is not None:
        state, done = checkpoints.restore(state, batches)
    if diagnose is None and isinstance(state, TrainState):
        diagnose = find_not_finite  # pyright: ignore[reportAssignmentType]
    several, mesh = jax.process_count() > 1, _mesh(state)
    log = _Log(directory, loggers, done, steps, progress)
    skip = 0 if hasattr(batches, "set_state") else done
    iterator = itertools.islice(batches, skip, None)
    padding: Batch | None = getattr(batches, "padding", lambda: None)() if several else None
    pending: tuple[int, Mapping[str, Any], Batch] | None = None

    def settle() -> bool:
        """Read the metrics of the last step; False if no process had anything to learn from."""
        nonlocal pending, done
        if pending is None:
            return True
        number, metrics, batch = pending
        pending = None
        values = {name: float(x) for name, x in jax.device_get(dict(metrics)).items()}
        values = {"loss": values.pop("loss"), **values}
        if not values.pop("finite", True) or not math.isfinite(values["loss"]):
            numbers = ", ".join(f"{k} {v:g}" for k, v in values.items())
            where = "" if diagnose is None else f" {diagnose(state, batch)}"
            good = None if checkpoints is None else checkpoints.latest
            raise FloatingPointError(
                f"step {number} is not finite: {numbers}.{where} The last checkpoint is "
                + ("none" if good is None else f"that of step {good}")
            )
        if several and values.get("tokens") == 0:
            return False
        done = number
        log.write(number, values, batch["tokens"].size)
        return True

    with contextlib.ExitStack() as stack:
        stack.callback(log.close, batches)
        if checkpoints is not None:
            stack.enter_context(checkpoints)
        stopped = stack.enter_context(_signals())
        tracing = stack.enter_context(contextlib.ExitStack())
        first = done + 1
        for number in range(first, steps + 1):
            batch = next(iterator, padding)
            if batch is None:
                break
            if number == first:
                if flops_per_token is None and isinstance(state, TrainState):
                    flops_per_token = training_flops(state, np.shape(batch["tokens"])[1])
                log.flops_per_token = flops_per_token
            if profile and number == first + 2:
                tracing.enter_context(jax.profiler.trace(str(Path(str(directory)) / "profile")))
            placed = place(batch, mesh)
            state, metrics = step(state, placed)
            if not settle():
                break
            pending = number, metrics, placed
            stop = stopped(number)
            save = checkpoints is not None and (stop or number % checkpoints.every == 0)
            traced = profile and number == first + 4
            if (save or stop or traced) and not settle():
                break
            if traced:
                tracing.close()
            if checkpoints is not None:
                checkpoints.check()
                if save:
                    checkpoints.save(number, state, batches)
            if stop:
                raise KeyboardInterrupt(f"stopped by a signal after step {number}")
        settle()
        if checkpoints is not None and done >= first and checkpoints.latest != done:
            checkpoints.save(done, state, batches)
    return state


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


def _mesh(state: Any) -> Mesh | None:
    """The mesh that the arrays of a state live on."""
    shardings = (getattr(a, "sharding", None) for a in jax.tree.leaves(state))
    return next((s.mesh for s in shardings if isinstance(s, NamedSharding)), None)  # pyright: ignore


@contextlib.contextmanager
def _signals() -> Iterator[Callable[[int], bool]]:
    """A function that says, once per step, whether SIGINT or SIGTERM asked for the end.

    With several processes, only SIGTERM does, and all processes say so at the same step.
    """
    if jax.process_count() > 1:
        yield multihost_utils.reached_preemption_sync_point
        return
    asked: list[int] = []

    def ask(signum: int, _: Any) -> None:
        if asked:  # twice: at once
            raise KeyboardInterrupt
        asked.append(signum)

    main = threading.current_thread() is threading.main_thread()
    before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM) if main}
    try:
        yield lambda _: bool(asked)
    finally:
        for s, handler in before.items():
            signal.signal(s, handler)


class _Log:
    """Metrics of the steps, to whoever wants to see them; silent but on process 0."""

    def __init__(
        self,
        directory: str | Path | None,
        loggers: Sequence[Any],
        done: int,
        steps: int,
        progress: bool,
    ) -> None:
        self.flops_per_token: float | None = None
        self._loggers, self._file, self._directory = loggers, None, None
        first = jax.process_index() == 0
        if directory is not None and first:
            self._directory = Path(directory).expanduser()
            self._directory.mkdir(parents=True, exist_ok=True)
            path = self._directory / METRICS
            kept = [r for r in read_metrics(self._directory) if r["step"] <= done]
            new = path.with_suffix(".tmp")
            new.write_text("".join(json.dumps(r) + "\n" for r in kept))
            new.replace(path)
            self._file = path.open("a")
        self._bar = tqdm(
            total=steps,
            initial=done,
            desc="training",
            unit="step",
            disable=not (progress and first),
        )
        self._times: collections.deque[tuple[float, int]] = collections.deque(maxlen=20)
        self._last = time.perf_counter()

    def write(self, step: int, values: dict[str, float], tokens: int) -> None:
        now = time.perf_counter()
        self._times.append((now, tokens))
        record = {"step": step, **values, "seconds": now - self._last}
        self._last = now
        if len(self._times) > 1:  # the first step was compiled
            seconds = self._times[-1][0] - self._times[0][0]
            speed = sum(n for _, n in list(self._times)[1:]) / seconds
            record["tokens_per_second"] = speed
            peak = peak_flops()
            if self.flops_per_token and peak:
                record["mfu"] = speed * self.flops_per_token / (peak * jax.device_count())
        if self._file is not None:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
        for logger in self._loggers:
            for name, value in record.items():
                if name != "step":
                    logger.log_scalar(f"train/{name}", value, step=step)
        shown = {"loss": f"{values['loss']:.4g}"}
        if "tokens_per_second" in record:
            shown["tokens/s"] = f"{record['tokens_per_second']:,.0f}"
        if "mfu" in record:
            shown["MFU"] = f"{record['mfu']:.1%}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def close(self, batches: Any) -> None:
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


def read_metrics(directory: str | Path) -> list[dict[str, float]]:
    """The records of metrics.jsonl in the directory of a run, one per step; [] if there is none.

    A last line that a killed run left unfinished is skipped.
    """
    path, records = Path(directory) / METRICS, []
    for line in path.read_text().splitlines() if path.is_file() else ():
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


def plot_loss(directory: str | Path) -> Path | None:
    """Draws loss.png from metrics.jsonl; None without matplotlib or without records."""
    records = read_metrics(directory)
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
    axes.set(xlabel="step", ylabel="loss")
    axes.legend()
    path = Path(directory) / "loss.png"
    figure.savefig(path, dpi=120)
    return path


def peak_flops() -> float | None:
    """Peak bfloat16 FLOP/s of a device of this machine; None if it is not in the table."""
    kind = jax.devices()[0].device_kind
    return next((peak for name, peak in PEAK_FLOPS.items() if name in kind), None)


def training_flops(state: TrainState, length: int) -> float:
    """Model FLOPs of a training step per token of rows of `length` tokens.

    A weight takes part in one multiplication and addition per token forward, in one to pass the
    gradient on, and, if it is trained, in one for its own: 2 (2 N + N_trained), N the matrix
    elements without the embedding table, whose use is no product. Attention over c keys takes
    4 H D c forward and twice that backward, c being their mean number in a causal row. What is
    computed again (remat) does not count, nor do recurrences and the GKA solver.
    """
    config = _bare(state).config

    def matrices(params: Mapping[str, jax.Array]) -> int:
        skip = () if config.tie_word_embeddings else ("embed_tokens.embedding",)
        return sum(
            a.size * _uses(config, n)
            for n, a in params.items()
            if a.ndim >= 2 and n not in skip and not n.endswith(".scale")  # of quantised weights
        )

    weights = matrices(state.params) + matrices(state.frozen)
    scores = 12 * config.num_attention_heads * config.head_dim
    visible = sum(_mean_visible(kind, config, length) for kind in config.student_kinds)
    return 4.0 * weights + 2.0 * matrices(state.params) + scores * visible


def _bare(state: TrainState) -> HybridLM:
    """The model without its arrays."""
    return jax.eval_shape(TrainState.model, state)


def _uses(config: HybridConfig, parameter: str) -> int:
    """How often the forward pass of a token multiplies by this parameter."""
    found = re.match(r"layers\.(\d+)\.mixer\.(.+)", parameter)
    if found is None:
        return 1
    return KINDS[config.student_kinds[int(found[1])]].uses(config.sections, found[2])


def _mean_visible(kind: str, config: HybridConfig, length: int) -> float:
    """Keys that a token of a causal row attends to, on average."""
    w = min(KINDS[kind].sees(config.sections, length), length)
    return (w * (w + 1) / 2 + (length - w) * w) / length  # i + 1 keys for token i < w, then w


def find_not_finite(state: TrainState, batch: Batch, loss: Loss | None = None) -> str:
    """Where the first value that is not finite arises: in a parameter, in the output of a layer, in
    the logits, or in the gradients (the last layer that has one: they flow backwards).

    Looks at as few rows of the batch at a time as the mesh allows. `loss` is that of
    `make_train_step`.
    """
    for name, p in (state.frozen | state.params).items():
        if jnp.issubdtype(p.dtype, jnp.floating) and not jnp.isfinite(p).all():
            return f"Parameter {name} is not finite."
    bare = _bare(state)
    kinds, mesh, rows = bare.config.layer_kinds, bare.mesh, len(batch["tokens"])
    groups = max(1, rows // row_parts(mesh)) if mesh is not None else rows
    for i in range(groups):
        some = {name: jnp.asarray(a)[i::groups] for name, a in batch.items()}
        mixers, blocks, value = jax.device_get(_finite_forward(state, some, loss))
        for layer, (mixer, block) in enumerate(zip(mixers, blocks, strict=True)):
            if not block:
                part = "block" if mixer else "mixer"
                return (
                    f"The {part} of layer {layer} ({kinds[layer]}) is the first to be not finite."
                )
        if not value:
            return "All layers are finite; the logits or the loss are not."
    bad: set[str] = set()
    for i in range(groups):
        some = {name: jnp.asarray(a)[i::groups] for name, a in batch.items()}
        bad |= {
            n for n, ok in jax.device_get(_finite_gradients(state, some, loss)).items() if not ok
        }
    if not bad:
        return "Nothing is found now: the parameters have changed since."

    def depth(name: str) -> int:
        if name.startswith("layers."):
            return int(name.split(".")[1])
        return -1 if name.startswith("embed_tokens") else len(kinds)

    top = max(map(depth, bad))
    what = f"layer {top} ({kinds[top]})" if 0 <= top < len(kinds) else "no layer"
    names = ", ".join(sorted(n for n in bad if depth(n) == top))
    return f"The forward pass is finite; the first gradients that are not are in {what}: {names}."


@functools.partial(jax.jit, static_argnums=2)
def _finite_forward(
    state: TrainState, batch: Batch, loss: Loss | None
) -> tuple[list[Array], list[Array], Array]:
    """For each layer whether the mixer's output is finite, and the block's; and the loss."""
    model = state.model()
    positions, segment_ids = batch.get("positions"), batch.get("segment_ids")
    x, _, ctx = model._enter(batch["tokens"], positions, segment_ids, None, None, "auto")
    _, _, seen = model._run(x, ctx, None)
    valid = jnp.ones(x.shape[:2], bool)
    if ctx.lengths is not None:  # padding is last here, and may hold anything
        valid = jnp.arange(x.shape[1]) < ctx.lengths[:, None]

    def finite(a: Array) -> Array:
        return jnp.all(jnp.isfinite(a) | ~valid[..., None])

    value = jnp.isfinite((loss or next_token_loss)(model, **batch)[0])
    return [finite(mixed) for mixed, _ in seen], [finite(x) for _, x in seen], value


@functools.partial(jax.jit, static_argnums=2)
def _finite_gradients(state: TrainState, batch: Batch, loss: Loss | None) -> dict[str, Array]:
    """For each trained parameter whether its gradient is finite."""

    def objective(params: dict[str, Array]) -> Array:
        model = state.template.model(state.frozen | params)
        model.layers = nnx.List([Remat(block, "block") for block in model.layers])
        return (loss or next_token_loss)(model, **batch)[0]

    return jax.tree.map(lambda g: jnp.all(jnp.isfinite(g)), jax.grad(objective)(state.params))
