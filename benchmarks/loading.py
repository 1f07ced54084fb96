"""How fast training data are made, and whether a step waits: `python -m benchmarks.loading --help`.

Rows are read, tokenized and packed as in a run, by `hmf_jax.training.Batches`, and handed to its
loop, with a step that does nothing but take `--step-ms`, as a device would. ms is per batch; extra
numbers: tokens_per_s, padding included; tokens_per_cpu_s, for each second of each core in use;
wait, the part of the time in which the device waited for a batch after the first. With
`--step-ms 0` the loader is all there is, and tokens_per_s is what it can do.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks.rows import Row, environment
from hmf_jax.text import load_tokenizer
from hmf_jax.training import Batches, read_metrics, train


class Device:
    """A step that takes so long while its caller goes on; and its loss, which is waited for."""

    def __init__(self, seconds: float) -> None:
        self._seconds, self._free = seconds, 0.0

    def step(self, state: Any, batch: Any) -> tuple[Any, dict[str, Any]]:
        result = Device(self._seconds)
        self._free = result._free = max(time.perf_counter(), self._free) + self._seconds
        return state, {"loss": result}

    def is_ready(self) -> bool:
        return time.perf_counter() >= self._free

    def __array__(self) -> np.ndarray:
        time.sleep(max(0.0, self._free - time.perf_counter()))
        return np.float32(0)  # pyright: ignore[reportReturnType]


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    batches = Batches(
        args.data, load_tokenizer(args.tokenizer),
        length=args.length, batch_size=args.batch, threads=args.threads,
    )  # fmt: skip
    state: Any = {"w": jnp.zeros(())}
    with tempfile.TemporaryDirectory() as directory:
        start, busy = time.perf_counter(), time.process_time()
        train(
            state, Device(args.step_ms / 1e3).step, batches,
            steps=args.steps, directory=directory, progress=False,
        )  # fmt: skip
        seconds, busy = time.perf_counter() - start, time.process_time() - busy
        records = read_metrics(directory)
    tokens, later = args.steps * args.batch * args.length, records[1:]
    row = Row(
        "loading", "grain", "int32",
        dict(batch=args.batch, length=args.length, heads=0, kv_heads=0, head_dim=0),
        None, "fwd", 1e3 * seconds / args.steps, None,
        f"{Path(args.data).stem}, steps of {args.step_ms:g} ms, {args.threads} threads",
        {
            "tokens_per_s": tokens / seconds,
            "tokens_per_cpu_s": tokens / busy,
            "wait": sum(r["data_wait"] for r in later) / sum(r["seconds"] for r in later),
        },
        **environment(),
    )  # fmt: skip
    print(row.to_json())
    if args.out is not None:
        with args.out.open("a") as file:
            file.write(row.to_json() + "\n")


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loading",
        description="How fast training data are made, and whether a step waits for them.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="directory of a model")
    parser.add_argument("--data", required=True, help="files of rows, see docs/training.md")
    parser.add_argument("--length", type=int, default=8192, help="tokens per row")
    parser.add_argument("--batch", type=int, default=8, help="rows per step")
    parser.add_argument("--steps", type=int, default=50, help="at least 2")
    parser.add_argument("--step-ms", type=float, default=550, help="what a step takes")
    parser.add_argument("--threads", type=int, default=4, help="that read and tokenize")
    parser.add_argument("--out", type=Path, help="append a row to this file (JSON lines)")
    args = parser.parse_args(argv)
    if args.steps < 2:
        parser.error(f"--steps {args.steps}: at least 2")
    return args


if __name__ == "__main__":
    main()
