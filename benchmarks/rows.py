"""What a measurement is: one JSON object per line."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import subprocess
from pathlib import Path
from typing import Any


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
      op: an operator (gka, gated_delta_rule, ssd, two_window_attention, attention), a program of
        the whole model (model, ttft, decode_throughput, train_step, lora_step, mixers_step,
        full_step, load),
        "compile" (time to compile a model program), or a ceiling of the device (ceiling_copy,
        ceiling_matmul).
      impl: implementation that ran, or a peer's name; "auto" for whole models, where `extra` says
        what each operator ran.
      dtype: of inputs and weights.
      shape: batch, length, heads, kv_heads, head_dim. `length` is tokens per row; for pass "decode"
        it is the tokens already in the state (attention reads that many keys).
      num_iter: Chebyshev iterations of GKA, None for everything else.
      pass_: "fwd", "fwd_bwd" or "decode" (one token per row); stored as "pass".
      ms: median wall time of one call, of one token per row for "decode", milliseconds.
      relative_error: ||a - b|| / ||b|| of the result, see `benchmarks.operators`; None where there
        is nothing to compare with.
      case: what else tells two measurements apart (named shape, layer kinds, mesh).
      extra: further numbers (tokens per second, bytes, seconds to compile), all of one device; and
        on several devices their mesh, {"tp": 2}.
      device, jax_version, commit, date: where, with what and when; date is UTC.
    """

    op: str
    impl: str
    dtype: str
    shape: dict[str, int]
    num_iter: int | None
    pass_: str
    ms: float
    relative_error: float | None
    case: str = ""
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    device: str = ""
    jax_version: str = ""
    commit: str = ""
    date: str = ""

    def to_json(self) -> str:
        data = dataclasses.asdict(self)
        data = {name.rstrip("_"): value for name, value in data.items()}
        return json.dumps(data)

    @classmethod
    def from_json(cls, line: str) -> Row:
        data = json.loads(line)
        data["pass_"] = data.pop("pass")
        return cls(**data)

    @property
    def key(self) -> tuple[Any, ...]:
        """What must agree for two rows to measure the same thing."""
        shape = tuple(sorted(self.shape.items()))
        what = (self.op, self.impl, self.case, self.dtype, self.num_iter, self.pass_)
        return (*what, shape, self.device)

    def describe(self) -> str:
        s = self.shape
        size = f"b{s['batch']} l{s['length']} h{s['heads']}/{s['kv_heads']} d{s['head_dim']}"
        steps = "" if self.num_iter is None else f"iter{self.num_iter}"
        words = (self.op, self.case, self.dtype, size, steps, self.pass_, self.impl)
        return " ".join(word for word in words if word)


def environment(device: str | None = None, jax_version: str | None = None) -> dict[str, str]:
    """The fields of a row that are the same for a whole run.

    `device`: of another process, whose device this one is not to take. `jax_version`: "" where JAX
    had no part in it, and may not be installed.
    """
    if device is None or jax_version is None:
        import jax

        device = jax.devices()[0].device_kind if device is None else device
        jax_version = jax.__version__
    return {
        "device": device,
        "jax_version": jax_version,
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str:
    """Short hash of HEAD, "-dirty" if tracked files differ; HMF_COMMIT where there is no git."""
    if name := os.environ.get("HMF_COMMIT"):
        return name
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        )
        dirty = subprocess.run([*git, "diff", "--quiet", "HEAD", "--"], capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("-dirty" if dirty.returncode else "")


def read(path: str | Path) -> list[Row]:
    """Rows of a file; "path@commit" keeps those whose commit starts like that.

    Raises:
      ValueError: no row is left.
    """
    name, _, commit = str(path).partition("@")
    lines = [line for line in Path(name).read_text().splitlines() if line.strip()]
    rows = [row for row in map(Row.from_json, lines) if row.commit.startswith(commit)]
    if not rows:
        known = ", ".join(sorted({Row.from_json(line).commit for line in lines})) or "none"
        raise ValueError(f"{name} has no row of commit {commit!r}; it has {known}.")
    return rows
