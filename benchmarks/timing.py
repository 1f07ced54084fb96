"""How times are taken.

Inputs rotate through several sets so that no cache holds them; compilation and the first calls are
left out; calls are queued back to back until a sample lasts `SAMPLE_S`, then waited for, which
hides the cost of launching from Python behind the device as a real loop does. The result is the
median sample.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.rows import Row

SETS = 3
SAMPLE_S = 0.02
BUDGET_S = 1.0
LONG_S = 2.0  # calls that last longer are warm after two, and two more are timed
# NCCL's kernels, and XLA's own.
COLLECTIVE = re.compile(r"nccl|all_?(reduce|gather|to_?all)|reduce_?scatter", re.IGNORECASE)


def milliseconds(fn: Callable[[Any], Any], sets: Sequence[Any], *, queue: bool = True) -> float:
    """Median time of `fn(x)` with x from `sets` in turn, in milliseconds.

    With `queue` False every call is waited for: what one caller sees who needs the answer.
    """
    once = 0.0
    for n, x in enumerate([sets[0], *sets]):
        if n > 1 and once > LONG_S:
            break
        start = time.perf_counter()
        jax.block_until_ready(fn(x))
        once = time.perf_counter() - start
    calls = max(1, min(1000, round(SAMPLE_S / once))) if queue else 1
    fewest = 3 if once < LONG_S else 2
    samples = max(fewest, min(50, round(BUDGET_S / (once * calls))))
    turn = itertools.cycle(sets)
    times = []
    for _ in range(samples):
        start = time.perf_counter()
        for x in itertools.islice(turn, calls):
            out = fn(x)
        jax.block_until_ready(out)
        times.append((time.perf_counter() - start) / calls)
    return 1e3 * statistics.median(times)


@dataclasses.dataclass(frozen=True)
class DeviceTime:
    """What the profiler saw the GPUs do, on average over those that did anything.

    Attributes:
      ms: time in kernels and copies; launches: how many there were.
      by_name: milliseconds and launches by kernel name, longest first. On several GPUs the time of
        a collective includes waiting for the last one to arrive.
    """

    ms: float
    launches: float
    by_name: dict[str, tuple[float, float]]

    def per(self, calls: int, top: int = 12) -> dict[str, Any]:
        """The numbers of one of `calls` equal calls, and the longest kernels, for a row's extra."""
        longest = list(self.by_name.items())[:top]
        collectives = sum(ms for name, (ms, _) in self.by_name.items() if COLLECTIVE.search(name))
        return {
            "device_ms": self.ms / calls,
            "collectives_ms": collectives / calls,
            "launches": self.launches / calls,
            "kernels_ms": {name: round(ms / calls, 5) for name, (ms, _) in longest},
        }


def device_time(call: Callable[[], Any]) -> DeviceTime | None:
    """Profile one call (waited for); None where there is no GPU."""
    if jax.default_backend() != "gpu":
        return None
    found: dict[str, list[float]] = collections.defaultdict(list)
    gpus: set[str] = set()
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            jax.block_until_ready(call())
        for path in Path(directory).rglob("*.xplane.pb"):
            for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
                lines = [x for x in plane.lines if "GPU" in plane.name and "Stream" in x.name]
                for event in itertools.chain.from_iterable(line.events for line in lines):
                    found[event.name].append(event.duration_ns / 1e6)
                    gpus.add(plane.name)
    n = max(1, len(gpus))
    total = {name: (sum(times) / n, len(times) / n) for name, times in found.items()}
    by_name = dict(sorted(total.items(), key=lambda item: -item[1][0]))
    ms, launches = (sum(x[i] for x in total.values()) for i in (0, 1))
    return DeviceTime(ms, launches, by_name)


def ceilings(size: int, env: dict[str, Any]) -> list[Row]:
    """What this device can do: a copy (GB/s) and a size^3 bf16 matrix product (TFLOP/s).

    The copy reads and writes 32 size^2 bytes each (2 GiB at 8192) and counts both.
    """
    keys = jax.random.split(jax.random.key(0), 2 * SETS)
    wide = [jax.random.bits(key, (8 * size, size), jnp.uint32) for key in keys[:SETS]]
    # The new value depends on the old one, so the compiler has to move every byte.
    copy_ms = milliseconds(jax.jit(lambda x: x ^ jnp.uint32(1)), wide)
    moved = 2 * wide[0].nbytes
    del wide
    square = [jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys[SETS:]]
    pairs = list(itertools.pairwise([*square, square[0]]))
    matmul_ms = milliseconds(jax.jit(lambda ab: ab[0] @ ab[1]), pairs)

    def row(op: str, dtype: str, ms: float, unit: str, amount: float) -> Row:
        shape = dict(batch=1, length=size, heads=1, kv_heads=1, head_dim=size)
        rate = {unit: amount / ms}
        return Row(op, "xla", dtype, shape, None, "fwd", ms, None, extra=rate, **env)

    return [
        row("ceiling_copy", "uint32", copy_ms, "gb_per_s", moved / 1e6),
        row("ceiling_matmul", "bfloat16", matmul_ms, "tflop_per_s", 2 * size**3 / 1e9),
    ]
