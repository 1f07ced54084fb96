"""Offline tuner of the GPU kernels: `python -m benchmarks.tune`.

For every candidate: the whole operator is first compared with the plain-JAX one in float32 (a
candidate that is off by more than bfloat16 explains is dropped, loudly), then timed. The fastest
values go to pallas_kernels/tuned.json, entries of other devices and sizes stay. Commit the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp

from benchmarks.operators import forget_errors, measure
from benchmarks.rows import environment
from hmf_jax import pallas_kernels
from hmf_jax.pallas_kernels.shapes import SHAPES
from hmf_jax.pallas_kernels.tuning import key, using

FILE = Path(pallas_kernels.__file__).with_name("tuned.json")
TOLERANCE = {"fwd": 3e-2, "decode": 1e-2}


@dataclasses.dataclass(frozen=True)
class Kernel:
    """A tunable part of an operator.

    Attributes:
      op: its name in `pallas_kernels.tuning`; name, candidates: the value to choose.
      pass_: the pass of operator "gka" that runs it.
      sizes: problems to time, as (batch, length); size: the number that picks the bucket.
    """

    op: str
    name: str
    candidates: tuple[int, ...]
    pass_: str
    sizes: tuple[tuple[int, int], ...]
    size: Callable[[int, int, int], int]  # (batch, length, heads)


KERNELS = (
    Kernel(
        op="gka.scan",
        name="stages",
        candidates=(2, 3, 4),
        pass_="fwd",
        sizes=((1, 8192), (1, 32768)),
        size=lambda batch, length, heads: length,
    ),
    Kernel(
        op="gka.decode",
        name="early",
        candidates=(64, 128),
        pass_="decode",
        sizes=((1, 1), (4, 1), (64, 1)),
        size=lambda batch, length, heads: batch * heads,
    ),
)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=[*SHAPES], default="8B")
    parser.add_argument("--out", type=Path, default=FILE)
    args = parser.parse_args(argv)
    env = environment()
    table = json.loads(args.out.read_text()) if args.out.is_file() else {}
    entries = table.setdefault(env["device"], {})
    for kernel in KERNELS:
        for batch, length in kernel.sizes:
            timed = {}
            for value in kernel.candidates:
                jax.clear_caches()
                forget_errors()
                try:
                    with using(kernel.op, **{kernel.name: value}):
                        row = measure(
                            "gka", "mosaic", shape=args.shape, tp=1, batch=batch, length=length,
                            dtype="bfloat16", num_iter=1, pass_=kernel.pass_, env=env,
                        )  # fmt: skip
                except ValueError as error:
                    sys.exit(f"Nothing to tune here: {error}")
                ok = (row.relative_error or 0) < TOLERANCE[kernel.pass_]
                ms = row.extra.get("device_ms", row.ms)
                note = "" if ok else f"  WRONG: error {row.relative_error:.1e}, dropped"
                print(f"{kernel.op} b{batch} l{length} {kernel.name}={value}: {ms:.4f} ms{note}")
                if ok:
                    timed[value] = ms
            if timed:
                size = kernel.size(batch, length, SHAPES[args.shape].heads)
                best = min(timed, key=lambda value: timed[value])
                entries[key(kernel.op, jnp.bfloat16, size)] = {kernel.name: best}
    args.out.write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
