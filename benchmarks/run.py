"""The runner: `python -m benchmarks.run --help`."""

from __future__ import annotations

import argparse
import itertools
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks import compiling, models, operators, training
from benchmarks.rows import Row, environment
from benchmarks.timing import ceilings
from hmf_jax.pallas_kernels.dispatch import IMPLS
from hmf_jax.pallas_kernels.shapes import SHAPES, TP

PASSES = ("fwd", "fwd_bwd", "decode")
OPS = (*operators.OPERATORS, *models.MODELS, *training.STEPS, models.COMPILE)
COMPILED = (
    "ttft",
    "decode_throughput",
    *training.STEPS,
)  # what can be compiled before it is measured
ON_A_MESH = (*models.ON_A_MESH, *training.STEPS)


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    out: Path | None = args.out
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
    measured = 0
    for row in _rows(args):
        measured += 1
        if out is not None:
            with out.open("a") as file:  # one by one: a run that is cut off keeps its rows
                file.write(row.to_json() + "\n")
        error = "" if row.relative_error is None else f"  error {row.relative_error:.1e}"
        extra = "".join(f"  {name} {_short(value)}" for name, value in row.extra.items())
        print(f"{row.describe():<80} {row.ms:10.3f} ms{error}{extra}", flush=True)
    if not measured and not args.compile_only:
        sys.exit("Nothing was measured: nothing that was asked for could run here.")


def _rows(args: argparse.Namespace) -> Iterator[Row]:
    env = environment()
    if args.ceilings and not args.compile_only:
        yield from ceilings(8192 if jax.default_backend() == "gpu" else 256, env)
    for op in args.ops:
        if op in operators.OPERATORS:
            yield from _operator_rows(op, args, env)
    if any(op not in operators.OPERATORS for op in args.ops):
        yield from _model_rows(args, env)


def _operator_rows(op: str, args: argparse.Namespace, env: dict[str, Any]) -> Iterator[Row]:
    num_iters = args.num_iter if op == "gka" else [None]
    for impl, dtype, tp, batch, pass_, num_iter in itertools.product(
        args.impls or ["chunked"], args.dtypes, args.tp, args.batches, args.passes, num_iters
    ):
        one_token = pass_ == "decode" and op in operators.RECURRENT
        for length in [1] if one_token else args.lengths:
            problem = dict(shape=args.shape, tp=tp, batch=batch, length=length, dtype=dtype)
            problem |= dict(num_iter=num_iter, pass_=pass_, error=args.errors)
            yield from _attempt(operators.measure, op, impl, **problem, env=env)


def _model_rows(args: argparse.Namespace, env: dict[str, Any]) -> Iterator[Row]:
    names = itertools.product(args.impls or ["auto"], args.dtypes, args.mixers)
    sizes = list(itertools.product(args.batches, args.lengths))
    for (impl, dtype, mixer), (batch, length) in itertools.product(names, sizes):
        solves = mixer in ("GKA", "BMF")
        for num_iter in args.num_iter if solves else [None]:
            settings = models.Settings(
                preset=args.shape,
                mixer=mixer,
                batch=batch,
                length=length,
                dtype=dtype,
                layers=args.layers,
                chunk=args.chunk,
                steps=args.steps,
                num_iter=num_iter,
                impl=impl,
                axes=args.mesh or {},
            )
            try:
                settings = settings if batch else models.filling(settings, args.memory)
            except ValueError as error:
                print(f"skipped {settings}: {error}", file=sys.stderr, flush=True)
                continue
            yield from _one_model(args, settings, env)


def _one_model(
    args: argparse.Namespace, settings: models.Settings, env: dict[str, Any]
) -> Iterator[Row]:
    if models.COMPILE in args.ops:
        for inner_jit in (True, False):
            yield from compiling.compile_times(settings, inner_jit=inner_jit, env=env)
    if ops := [op for op in args.ops if op in models.MODELS]:
        bench = models.Bench(settings, env, abstract=args.compile_only)
        for op in ops:
            if args.compile_only:
                bench.compile(op)
            else:
                yield from _attempt(bench.measure, op)
        del bench  # and with it the model
    steps = [op for op in args.ops if op in training.STEPS]
    for op, remat in itertools.product(steps, args.remat):
        if args.compile_only:
            training.compiled(op, settings, remat, args.documents)
        else:
            yield from _attempt(
                training.measure, op, settings, remat, documents=args.documents, env=env
            )


def _attempt(measure: Callable[..., Row], *args: Any, **kwargs: Any) -> Iterator[Row]:
    """The row, or none and a line on stderr where this device cannot run it."""
    try:
        yield measure(*args, **kwargs)
        return
    except ValueError as error:
        reason = str(error)
    except jax.errors.JaxRuntimeError as error:
        reason = str(error).splitlines()[0]
        if "RESOURCE_EXHAUSTED" not in reason:
            raise
    what = " ".join(map(str, args)) + "".join(f" {k}={v}" for k, v in kwargs.items() if k != "env")
    print(f"skipped {what}: {reason}", file=sys.stderr, flush=True)


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ",".join(f"{k}:{v}" for k, v in value.items())
    return f"{value:.4g}"


def _parse(argv: list[str] | None) -> argparse.Namespace:
    on_gpu = jax.default_backend() == "gpu"
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description="Time operators and models; one JSON row (benchmarks/rows.py) per measurement.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def many(
        flag: str,
        default: object,
        kind: Callable[[str], Any],
        help: str,
        choices: Sequence[Any] = (),
    ) -> None:
        def parse(text: str) -> list[Any]:
            values = [kind(part) for part in text.split(",")]
            if unknown := [v for v in values if choices and v not in choices]:
                raise argparse.ArgumentTypeError(
                    f"{unknown[0]!r} is unknown; choose from {', '.join(map(str, choices))}"
                )
            return values

        parser.add_argument(flag, type=parse, default=default, help=help)

    many("--ops", ",".join(operators.OPERATORS), str, f"of {', '.join(OPS)}", OPS)
    many("--impls", None, str, "implementations; default: chunked, for models auto", IMPLS)
    parser.add_argument("--shape", choices=models.PRESETS, default="8B" if on_gpu else "tiny")
    many("--tp", "1", int, "operators: measure one device's part of this many", TP)
    parser.add_argument(
        "--mesh", type=_mesh,
        help="models: devices to spread over, such as tp=2 or fsdp=2,tp=4 (hmf_jax.make_mesh); "
        f"for {', '.join(ON_A_MESH)}. Numbers in rows are those of one device",
    )  # fmt: skip
    many(
        "--batches", "1", lambda n: 0 if n == "full" else int(n),
        "rows; full: as many sequences of `length` + `steps` tokens as fit, for models",
    )  # fmt: skip
    many("--lengths", "8192" if on_gpu else "128", int, "tokens per row")
    many("--num-iter", "30", int, "Chebyshev iterations of GKA")
    many("--passes", ",".join(PASSES), str, "of operators", PASSES)
    many("--dtypes", "bfloat16", str, "of inputs and weights", ("bfloat16", "float32", "float16"))
    many("--mixers", "GKA", str, "models: what replaces attention in the converted layers")
    parser.add_argument("--layers", type=int, help="models: keep this many layers")
    parser.add_argument("--chunk", type=int, help="models: tokens per prefill call")
    parser.add_argument("--steps", type=int, default=64, help="models: tokens per decode call")
    parser.add_argument(
        "--memory",
        type=float,
        help="GB per device that --batches full may use; default: 95%% of JAX's pool",
    )
    parser.add_argument(
        "--compile-only", action="store_true",
        help=f"of {' and '.join(COMPILED)}: only fill JAX_COMPILATION_CACHE_DIR, on one device",
    )  # fmt: skip
    many("--remat", "block", str, "of training steps, see hmf_jax.training.make_train_step")
    parser.add_argument(
        "--documents", type=int, help="training steps: of which every row is packed; default: one"
    )
    parser.add_argument(
        "--ceilings", action=argparse.BooleanOptionalAction, default=on_gpu,
        help="measure copy bandwidth and matrix product rate first",
    )  # fmt: skip
    parser.add_argument(
        "--errors", action=argparse.BooleanOptionalAction, default=True,
        help="compare operators with a reference, which takes longer to compile than to time them",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="append rows to this file (JSON lines)")
    args = parser.parse_args(argv)
    if args.shape not in SHAPES and (
        single := [op for op in args.ops if op in operators.OPERATORS]
    ):
        parser.error(f"--shape {args.shape} is for models; for {single[0]} use {', '.join(SHAPES)}")
    if args.compile_only and (args.mesh or not {*args.ops} <= {*COMPILED}):
        parser.error(f"--compile-only is for --ops {','.join(COMPILED)}, without --mesh")
    if args.mesh and (single := [op for op in args.ops if op not in ON_A_MESH]):
        parser.error(f"{single[0]} runs on one device: leave --mesh out, or choose --ops")
    if args.mesh and math.prod(args.mesh.values()) > jax.device_count():
        needs = math.prod(args.mesh.values())
        parser.error(f"--mesh needs {needs} devices, but there are {jax.device_count()}")
    return args


def _mesh(text: str) -> dict[str, int]:
    """ "fsdp=2,tp=4" -> {"fsdp": 2, "tp": 4}"""
    axis = r"(dp|fsdp|sp|tp)=[1-9]\d*"
    if not re.fullmatch(f"{axis}(,{axis})*", text):
        raise argparse.ArgumentTypeError(f"{text!r}: give some of dp, fsdp, sp and tp, as in tp=2")
    return {axis: int(n) for axis, n in (part.split("=") for part in text.split(","))}


if __name__ == "__main__":
    main()
