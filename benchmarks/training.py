"""Training steps of whole models with random weights, as `hmf_jax.training` makes them.

`python -m benchmarks.training --out rows.jsonl` makes the table of all of them, of every choice of
remat and beside a peer's step (`benchmarks.peers`), in one run: programs are compiled side by side,
then every row is measured by a process of its own, so that its memory is its own. Rows that the
file already holds are not measured again; the table is printed and written to rows.md.

The steps, which `benchmarks.run --ops` measures one by one:

* lora_step: adapters of rank 16 beside every projection; the model's weights stay in bfloat16.
* mixers_step: the mixers that replaced attention (of a "*" model: all attention layers) train, with
  float32 master weights, as in the first stages of the original's recipes; all else is frozen.
* full_step: every parameter trains, with float32 master weights: a state of 12 bytes for each.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks import models, watching
from benchmarks.rows import Row, read
from benchmarks.timing import device_time, milliseconds
from hmf_jax.memory import device_bytes
from hmf_jax.mixers import KINDS
from hmf_jax.model import HybridLM
from hmf_jax.sharding import BATCH_AXES, named_sharding
from hmf_jax.training import TrainState, make_train_step, training_flops
from hmf_jax.training.flops import peak_flops
from hmf_jax.training.lora import apply_lora

STEPS = ("lora_step", "mixers_step", "full_step")


OPTIMIZER = optax.adamw(1e-5, weight_decay=0.0)


def compiled(op: str, s: models.Settings, remat: str, documents: int | None = None) -> Any:
    """The program of one AdamW step, of a state that need not exist; arguments as of `measure`."""
    jax.clear_caches()  # choices are seen when blocks are traced
    model = nnx.eval_shape(lambda: _model(op, s))
    state = TrainState.abstract(model, OPTIMIZER, trainable=_trainable(op, s))
    shape = s.batch, s.length
    split = named_sharding(model.mesh, ("batch", None), shape)
    names = ("tokens", "segment_ids") if documents else ("tokens",)
    batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=split) for name in names}
    step = make_train_step(
        OPTIMIZER, remat=remat, max_grad_norm=1.0, num_iter=s.num_iter, impl=s.impl
    )
    return step.lower(state, batch).compile()


def _model(op: str, s: models.Settings) -> HybridLM:
    model = HybridLM.init(s.config, dtype=jnp.dtype(s.dtype), mesh=s.mesh())
    return apply_lora(model) if op == "lora_step" else model


def _trainable(op: str, s: models.Settings) -> str | None:
    return {"lora_step": "lora", "mixers_step": KINDS[s.mixer].name}.get(op)


def measure(
    op: str, s: models.Settings, remat: str, documents: int | None = None, *, env: dict[str, Any]
) -> Row:
    """Time of one AdamW step on `batch` rows of `length` tokens; the state is donated.

    Args:
      op: one of `STEPS`; remat: see `make_train_step`.
      documents: pack every row of so many documents of random lengths; None: rows are one document.

    Extra numbers, of one device but for trained: tokens_per_s; mfu, the model's FLOP/s
    (`training_flops`, which leaves out what is computed again) over the peak of the device, where
    that is known and rows are one document; trained parameters; bytes of the state, of everything
    the program needs as the compiler planned it, and the largest number in use so far in this
    process (one measurement per process tells it apart). On GPUs also what the profiler saw of one
    step, see `benchmarks.timing.DeviceTime`.

    Raises:
      ValueError: the mesh does not split the rows evenly.
    """
    parts = math.prod(s.axes.get(axis, 1) for axis in BATCH_AXES)
    if s.batch % parts:
        raise ValueError(f"{s.batch} rows cannot be split over {parts} devices: see --batches")
    if documents is not None and not 1 <= documents <= s.length:
        raise ValueError(f"{documents} documents do not fit into rows of {s.length} tokens")
    with watching.watch_dispatch() as ran:
        program = compiled(op, s, remat, documents)  # before anything that takes memory
    model = _model(op, s)
    batches = [{"tokens": tokens} for tokens in s.tokens(model.mesh)]
    if documents:
        for seed, batch in enumerate(batches):
            ids = segment_ids(batch["tokens"].shape, documents, seed)
            batch["segment_ids"] = jax.device_put(ids, batch["tokens"].sharding)
    state = TrainState.create(model, OPTIMIZER, trainable=_trainable(op, s))
    del model  # its trained arrays: the state holds them in float32
    flops = training_flops(state, s.length)
    trained = sum(p.size for p in state.params.values())
    state_bytes = device_bytes(state)

    def call(batch: dict[str, Any]) -> Any:
        nonlocal state
        state, metrics = program(state, batch)
        return metrics

    ms = milliseconds(call, batches)
    rate = 1e3 * s.batch * s.length / ms / s.devices
    extra: dict[str, Any] = {"tokens_per_s": rate}
    if not documents and (peak := peak_flops()) is not None:
        extra["mfu"] = rate * flops / peak
    if profile := device_time(lambda: call(batches[0])):
        extra |= profile.per(1, top=20)
    extra |= {"trained": trained, "state_bytes": state_bytes}
    extra["program_bytes"] = watching.program_bytes(program)
    if (used := watching.peak_bytes()) is not None:
        extra["peak_bytes"] = used
    extra["ran"] = dict(sorted(ran.items()))
    row = s.row(op, "fwd_bwd", ms, extra, env)
    packed = f", {documents} documents" if documents else ""
    return dataclasses.replace(row, case=f"{row.case}, remat {remat}{packed}")


def segment_ids(shape: tuple[int, int], documents: int, seed: int) -> np.ndarray:
    """Numbers 1, 2, ... of documents of random lengths that fill every row, int32 [B, T]."""
    rng = np.random.default_rng(seed)
    starts = np.zeros(shape, np.int32)
    for row in starts:
        row[1 + rng.choice(len(row) - 1, documents - 1, replace=False)] = 1
    return 1 + np.cumsum(starts, axis=1, dtype=np.int32)


class Problem(NamedTuple):
    """A line of the table: what is trained of which model; of `layers` None has all."""

    name: str
    op: str
    mixer: str
    length: int = 8192
    layers: int | None = None

    def settings(self, shape: str) -> models.Settings:
        return models.Settings(shape, self.mixer, length=self.length, layers=self.layers)

    def find(
        self, rows: Sequence[Row], shape: str, remat: str, *, peer: bool = False
    ) -> Row | None:
        """The newest row of this problem, ours or a peer's."""
        layers = len(self.settings(shape).config.layer_kinds)
        case = f"{shape} {self.mixer} {layers} layers, remat {remat}"
        wanted = self.op, case, self.length, not peer
        found = [r for r in rows if (r.op, r.case, r.shape["length"], r.impl == "auto") == wanted]
        return found[-1] if found else None


PROBLEMS = (
    Problem("LoRA, Qwen3", "lora_step", "*"),
    Problem("LoRA, GKA", "lora_step", "GKA"),
    Problem("LoRA, B'MOJO-F", "lora_step", "BMF"),
    Problem("all parameters, GKA, 18 layers", "full_step", "GKA", layers=18),
    Problem("LoRA, GKA, 32768 tokens", "lora_step", "GKA", 32768),
)


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    known = read(args.out) if args.out.is_file() else []
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(args.out.with_suffix(".cache")))
    env = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", **os.environ}
    env["JAX_COMPILATION_CACHE_DIR"] = cache

    def run(problem: Problem, remat: str, *more: str, **also: str) -> None:
        command = f"--shape {args.shape} --ops {problem.op} --lengths {problem.length}"
        command += f" --mixers {problem.mixer} --remat {remat}"
        command += "" if problem.layers is None else f" --layers {problem.layers}"
        module = [sys.executable, "-m", "benchmarks.run", *command.split(), *more]
        subprocess.run(module, env=env | also, check=False)  # what cannot run says so

    problems = [p for p in PROBLEMS if args.only in p.name]
    missing = [
        (p, remat) for p in problems for remat in args.remat if not p.find(known, args.shape, remat)
    ]
    with ThreadPoolExecutor(args.jobs) as pool:
        for problem, remat in missing:
            quiet = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
            pool.submit(run, problem, remat, "--compile-only", **quiet)
    for problem in problems if args.peer else ():
        if problem.op == "lora_step" and problem.mixer == "*":
            module = [sys.executable, "-m", "benchmarks.peers.transformers_lora"]
            options = f"--shape {args.shape} --length {problem.length} --out {args.out}"
            subprocess.run([*module, *options.split()], check=False)
    for i, (problem, remat) in enumerate(missing):
        ceilings = "--ceilings" if i == 0 else "--no-ceilings"
        run(problem, remat, ceilings, "--out", str(args.out))
    if not args.out.is_file():
        sys.exit("Nothing was measured: nothing that was asked for could run here.")
    text = table(read(args.out), args.shape)
    args.out.with_suffix(".md").write_text(text + "\n")
    print(text)


def table(rows: Sequence[Row], shape: str) -> str:
    """Markdown: a line per problem, a column per implementation and choice of remat."""
    lines: dict[str, dict[tuple[bool, str, str], str]] = {}
    for problem in PROBLEMS:
        for row in rows:
            remat = row.case.partition(", remat ")[2]
            same = [r for r in rows if r.impl == row.impl]
            ours = row.impl == "auto"
            if found := problem.find(same, shape, remat, peer=not ours):
                lines.setdefault(problem.name, {})[ours, row.impl, remat] = _cell(found)
    columns = sorted({column for cells in lines.values() for column in cells})
    names = [f"remat {remat}" if ours else f"{impl}, {remat}" for ours, impl, remat in columns]
    text = [["step", *names], ["---"] * (1 + len(columns))]
    text += [[name, *(cells.get(c, "–") for c in columns)] for name, cells in lines.items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in text)


def _cell(row: Row) -> str:
    taken = row.extra.get("program_bytes", row.extra.get("peak_bytes"))
    notes = [f"{row.extra['mfu']:.0%}"] if "mfu" in row.extra else []
    notes += [] if taken is None else [f"{taken / 1e9:.0f} GB"]
    return f"{row.ms:.0f} ms" + (f" ({', '.join(notes)})" if notes else "")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description="The table of training steps, in one run.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="rows; goes on with this file")
    parser.add_argument("--shape", choices=models.PRESETS, default="8B")
    parser.add_argument("--remat", default="auto,block,none", type=lambda text: text.split(","))
    parser.add_argument("--only", default="", help="problems whose name has this part")
    parser.add_argument(
        "--peer", action=argparse.BooleanOptionalAction, default=True,
        help="measure the peer's step, too, which needs PyTorch, transformers and PEFT",
    )  # fmt: skip
    parser.add_argument(
        "--jobs", type=int, default=max(1, (os.cpu_count() or 1) // 4),
        help="programs to compile side by side",
    )  # fmt: skip
    args = parser.parse_args(argv)
    names = [p.name for p in PROBLEMS]
    if not any(args.only in name for name in names):
        parser.error(f"--only {args.only!r} fits none of: {'; '.join(names)}")
    return args


if __name__ == "__main__":
    main()
