"""A full-size checkpoint through the public API: `python -m benchmarks.full_size --help`.

Writes a random model as a Hugging Face directory, loads it on one device or several, and generates.
Three rows: "load", from the call of `from_pretrained` to the first token of a prompt, everything
compiled on the way (peak_host_bytes is that of loading alone); then the time to the first token and
milliseconds per decoded token as a user of `generate` sees them. The files come from the page cache
if they were just written and fit in.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import multiprocessing
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import hmf_jax
from benchmarks.models import PRESETS, Settings
from benchmarks.rows import environment
from hmf_jax import table
from hmf_jax.config import HybridConfig
from hmf_jax.convert import jax_to_hf
from hmf_jax.convert.directories import replacing
from hmf_jax.convert.rows import Entry, by_tensor, tensor_shape
from hmf_jax.convert.safetensors_io import DTYPES, Pending, dtype_name, write
from hmf_jax.model import HybridLM
from hmf_jax.parameters import flat_params

NEW_TOKENS = 128


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=PRESETS, default="8B")
    parser.add_argument("--mixer", default="GKA", help="what replaces attention in half the layers")
    parser.add_argument("--layers", type=int, help="keep this many layers")
    parser.add_argument("--length", type=int, default=8192, help="tokens of the prompt")
    parser.add_argument("--tp", type=int, default=1, help="devices to split the model over")
    parser.add_argument(
        "--directory", type=Path,
        help="where the checkpoint is, or is written to and stays; default: a temporary directory",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="append rows to this file (JSON lines)")
    args = parser.parse_args(argv)
    settings = Settings(
        args.shape, args.mixer, length=args.length, steps=NEW_TOKENS, layers=args.layers,
        axes={"tp": args.tp} if args.tp > 1 else {},
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as temporary:
        path = args.directory or Path(temporary) / "model"
        if not (path / "config.json").is_file():
            # In a process of its own, whose memory does not count.
            run = multiprocessing.get_context("spawn").Process
            (writer := run(target=_write_on_cpu, args=(settings.config, path))).start()
            writer.join()
            if writer.exitcode:
                raise SystemExit(f"{path} could not be written, see above")
        elif HybridConfig.from_json(path).to_dict() != settings.config.to_dict():
            parser.error(f"{path} holds another model; choose another --directory")
        rows = _measure(settings, path)
    for row in rows:
        row = dataclasses.replace(row, case=f"{row.case} through generate")
        print(row.to_json(), flush=True)
        if args.out is not None:
            with args.out.open("a") as file:
                file.write(row.to_json() + "\n")


def _measure(settings: Settings, path: Path) -> list[Any]:
    mesh, new = settings.mesh(), settings.steps
    before = _peak_host_bytes()
    start = time.perf_counter()
    model = hmf_jax.from_pretrained(path, mesh=mesh, progress=False)
    jax.block_until_ready(model)
    load_s, peak = time.perf_counter() - start, _peak_host_bytes()

    prompt = np.random.default_rng(0).integers(0, model.config.vocab_size, settings.length)
    longest = 2 ** (settings.length + new).bit_length()
    options: dict[str, Any] = dict(
        eos_ids=(), capacity=longest, prefill_chunk=settings.length, num_iter=settings.num_iter
    )

    def seconds(new_tokens: int) -> Callable[[], float]:
        def run() -> float:
            start = time.perf_counter()
            model.generate([prompt], max_new_tokens=new_tokens, **options)
            return time.perf_counter() - start

        return run

    cold = seconds(1)()
    total = time.perf_counter() - start
    stats = jax.devices()[0].memory_stats() or {}
    extra = {
        "load_s": load_s,
        "first_token_s": cold,
        "checkpoint_bytes": sum(f.stat().st_size for f in path.glob("*.safetensors")),
        "peak_host_bytes": peak,
        "peak_host_bytes_before": before,
        "peak_bytes": stats.get("peak_bytes_in_use"),
    }
    first = _median_of(3, seconds(1))
    decode = (_median_of(3, seconds(1 + new)) - first) / new
    env = environment()
    rate = {"tokens_per_s": 1 / decode / settings.devices}
    return [
        settings.row("load", "fwd", 1e3 * total, extra, env),
        settings.row("ttft", "fwd", 1e3 * first, {}, env),
        settings.row("decode_throughput", "decode", 1e3 * decode, rate, env),
    ]


def write_checkpoint(config: HybridConfig, directory: Path, *, alike: bool = False) -> None:
    """A random checkpoint in bfloat16, written tensor by tensor.

    Matrices are N(0, initializer_range), of which they take 256 values; convolutions, norms, gates'
    parameters are those of a new model, the same ones in all layers of a kind. `alike`: matrices of
    one shape are the same, which is quicker.

    Raises:
      FileExistsError: the directory is not empty.
    """
    rng = np.random.default_rng(0)
    normal = statistics.NormalDist(0, config.initializer_range)
    levels = np.array([normal.inv_cdf((i + 0.5) / 256) for i in range(256)], DTYPES["BF16"])
    entries = table.entries(config)
    small = _small_parameters(config)

    made: dict[tuple[int, ...], np.ndarray] = {}

    def value(entry: Entry) -> np.ndarray:
        if entry.shape in made:
            return made[entry.shape]
        if (x := small.get(_place(entry.path, config))) is not None:
            return (x.T if entry.transposed else x).reshape(entry.shape)
        out, step = np.empty(math.prod(entry.shape), levels.dtype), 1 << 22  # indices are 8 bytes
        for at in range(0, out.size, step):
            part = out[at : at + step]
            part[:] = levels[rng.integers(0, 256, part.size, np.uint8)]
        if alike:
            made[entry.shape] = out.reshape(entry.shape)
        return out.reshape(entry.shape)

    def tensor(name: str, blocks: list[Entry]) -> Pending:
        x = small.get(_place(blocks[0].path, config))
        dtype = "BF16" if x is None else dtype_name(x.dtype)
        make = lambda: np.concatenate([value(e) for e in blocks])  # noqa: E731
        return Pending(name, dtype, tensor_shape(blocks), make)

    tensors = [tensor(*item) for item in by_tensor(entries).items()]
    with replacing(directory) as tmp:
        write(tmp, tensors)
        jax_to_hf.write_config(tmp, config.to_dict(), "BF16")


def _small_parameters(config: HybridConfig) -> dict[str, np.ndarray]:
    """Of a model with one layer of each kind: all but the matrices, which are not even made."""
    kinds = tuple(dict.fromkeys(config.layer_kinds))
    one = dataclasses.replace(config, layer_kinds=kinds)
    matrices = {
        e.path for e in table.entries(one) if e.layout == "linear" or "embed_tokens" in e.path
    }

    def make() -> dict[str, jax.Array]:
        params = flat_params(HybridLM(one, rngs=nnx.Rngs(0)))
        return {_place(p, one): x for p, x in params.items() if p not in matrices}

    return jax.tree.map(np.asarray, jax.jit(make)())


def _place(path: str, config: HybridConfig) -> str:
    """A parameter's path with the kind of its layer in the place of the layer's number."""
    first, *rest = path.split(".")
    if first != "layers":
        return path
    return ".".join([config.layer_kinds[int(rest[0])], *rest[1:]])


def _write_on_cpu(config: HybridConfig, directory: Path) -> None:
    jax.config.update("jax_platforms", "cpu")  # the devices are for what is measured
    write_checkpoint(config, directory)


def _peak_host_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _median_of(times: int, seconds: Callable[[], float]) -> float:
    """Median of some runs after one that compiles."""
    seconds()
    return statistics.median(seconds() for _ in range(times))


if __name__ == "__main__":
    main()
