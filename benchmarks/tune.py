"""Offline tuner of the GPU kernels: `python -m benchmarks.tune`, about 3 minutes on an H200.

Every value that a kernel takes (`pallas_kernels.tuning.TUNABLE`) is first compared with the
plain-JAX operator in float32 (one that is off by more than bfloat16 explains is dropped, loudly),
then timed on the sizes of an 8B model. A value replaces the kernel's own choice only where it is at
least `GAIN` faster. What was found goes to pallas_kernels/tuned.json; other devices stay. Commit
the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.operators import forget_errors, measure
from benchmarks.rows import environment
from hmf_jax import pallas_kernels
from hmf_jax.pallas_kernels.shapes import SHAPES
from hmf_jax.pallas_kernels.tuning import TUNABLE, check, key, using

FILE = Path(pallas_kernels.__file__).with_name("tuned.json")
TOLERANCE = {"fwd": 3e-2, "decode": 1e-2}
GAIN = 0.01


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How a tunable part of an operator is timed.

    Attributes:
      op, name: its key in `TUNABLE`, and the value to choose.
      pass_: the pass of operator "gka" that runs it.
      sizes: problems to time, as (batch, length); size: the number that picks the bucket.
    """

    op: str
    name: str
    pass_: str
    sizes: tuple[tuple[int, int], ...]
    size: Callable[[int, int, int], int]  # (batch, length, heads)


KERNELS = (
    Kernel(
        op="gka.scan",
        name="stages",
        pass_="fwd",
        sizes=((1, 8192), (1, 32768)),
        size=lambda batch, length, heads: length,
    ),
    Kernel(
        op="gka.decode",
        name="early",
        pass_="decode",
        sizes=((1, 1), (8, 1), (64, 1)),
        size=lambda batch, length, heads: batch * heads,
    ),
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=[*SHAPES], default="8B")
    parser.add_argument("--out", type=Path, default=FILE)
    args = parser.parse_args(argv)
    env = environment()
    table: dict[str, Any] = check(json.loads(args.out.read_text())) if args.out.is_file() else {}
    entries: dict[str, dict[str, int]] = {}
    for kernel in KERNELS:
        checked: dict[int | None, bool] = {}
        for batch, length in kernel.sizes:
            best = fastest(kernel, args.shape, batch, length, env, checked)
            if best is not None:
                size = kernel.size(batch, length, SHAPES[args.shape].heads)
                entries[key(kernel.op, jnp.bfloat16, size)] = {kernel.name: best}
    device = {"jax": env["jax_version"], "date": env["date"][:10], "entries": entries}
    table = check(table | {env["device"]: device})
    args.out.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")
    print(f"{len(entries)} values better than the kernels' own choice; wrote {args.out}")


def fastest(
    kernel: Kernel,
    shape: str,
    batch: int,
    length: int,
    env: dict[str, str],
    checked: dict[int | None, bool],
) -> int | None:
    """The value that is right and at least `GAIN` faster than the kernel's own choice, or None.

    `checked` remembers which values were right: errors are taken on one short problem.
    """
    times: dict[int | None, float] = {}
    for value in (None, *TUNABLE[kernel.op][kernel.name]):  # None: the kernel's own choice
        if checked.get(value) is False:
            continue
        jax.clear_caches()
        forget_errors()
        chosen = {} if value is None else {kernel.name: value}
        try:
            with using(kernel.op, **chosen):
                row = measure(
                    "gka", "mosaic", shape=shape, tp=1, batch=batch, length=length,
                    dtype="bfloat16", num_iter=1, pass_=kernel.pass_, env=env,
                    error=value not in checked,
                )  # fmt: skip
        except ValueError as error:
            sys.exit(f"Nothing to tune here: {error}")
        right = (row.relative_error or 0) < TOLERANCE[kernel.pass_]
        ms = row.extra.get("device_ms", row.ms)
        note = "" if right else f"  WRONG: error {row.relative_error:.1e}, dropped"
        print(f"{kernel.op} b{batch} l{length} {kernel.name}={value}: {ms:.4f} ms{note}")
        checked[value] = right
        if right:
            times[value] = ms
    best = min(times, key=lambda value: times[value], default=None)
    own = times.get(None, float("inf"))
    return best if best is not None and times[best] < (1 - GAIN) * own else None


if __name__ == "__main__":
    main()
