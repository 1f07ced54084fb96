"""A full-size checkpoint through the public API: `python -m benchmarks.full_size --help`.

Writes a random model as a Hugging Face directory, loads it, and generates: seconds to load, time to
the first token of a prompt and milliseconds per decoded token as a user of `generate` sees them,
peak host and device memory.
"""

from __future__ import annotations

import argparse
import dataclasses
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

import hmf_jax
from benchmarks.models import Settings
from benchmarks.rows import environment

NEW_TOKENS = 128


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=["tiny", "8B", "32B"], default="8B")
    parser.add_argument("--mixer", default="GKA", help="what replaces attention in half the layers")
    parser.add_argument("--length", type=int, default=8192, help="tokens of the prompt")
    parser.add_argument("--out", type=Path, help="append rows to this file (JSON lines)")
    args = parser.parse_args(argv)
    settings = Settings(args.shape, args.mixer, length=args.length, steps=NEW_TOKENS)
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "model"
        model = hmf_jax.HybridLM.init(settings.config)
        hmf_jax.save_pretrained(model, path, progress=False)
        del model
        start = time.perf_counter()
        model = hmf_jax.from_pretrained(path, progress=False)
        jax.block_until_ready(model)
        load_s = time.perf_counter() - start

    prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, args.length)
    longest = 2 ** (args.length + NEW_TOKENS).bit_length()
    options: dict[str, Any] = dict(eos_ids=(), capacity=longest, prefill_chunk=args.length)

    def seconds(new_tokens: int) -> float:
        def run() -> None:
            model.generate([prompt], max_new_tokens=new_tokens, **options)

        return _median_of(3, run)

    first = seconds(1)
    decode = (seconds(1 + NEW_TOKENS) - first) / NEW_TOKENS
    stats = jax.devices()[0].memory_stats() or {}
    extra = {
        "load_s": load_s,
        "peak_host_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "peak_bytes": stats.get("peak_bytes_in_use"),
    }
    env = environment()
    rows = [
        settings.row("ttft", "fwd", 1e3 * first, extra, env),
        settings.row(
            "decode_throughput", "decode", 1e3 * decode, {"tokens_per_s": 1 / decode}, env
        ),
    ]
    for row in rows:
        row = dataclasses.replace(row, case=f"{row.case} through generate")
        print(row.to_json(), flush=True)
        if args.out is not None:
            with args.out.open("a") as file:
                file.write(row.to_json() + "\n")


def _median_of(times: int, run: Callable[[], None]) -> float:
    """Median seconds of `run`, after one run that compiles."""
    run()
    taken = []
    for _ in range(times):
        start = time.perf_counter()
        run()
        taken.append(time.perf_counter() - start)
    return float(np.median(taken))


if __name__ == "__main__":
    main()
