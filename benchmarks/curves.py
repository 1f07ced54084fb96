"""Do quick and slow ways of training learn the same? `python -m benchmarks.curves --help`.

One model is trained on the same rows, in the same order, from the same start, in several ways:

* reference: float32, "highest" products, plain-JAX operators, whole logits, nothing remade.
* exact: the reference with the piecewise cross-entropy and `--remat`.
* slow: the reference in bfloat16.
* fast: bfloat16, as a run does it: that, and kernels where there are any.

and its loss is compared, step by step. What "slow" differs by from the reference is the noise of
bfloat16, which "fast" is to have, too; "exact" is to have none. A line of `--out` (JSON) holds each
curve; ways that it holds already are not run again.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from hmf_jax.loading import from_pretrained
from hmf_jax.model import HybridLM
from hmf_jax.priming import prime
from hmf_jax.text import load_tokenizer
from hmf_jax.training import (
    Batches,
    TrainState,
    apply_lora,
    make_train_step,
    next_token_targets,
    train,
)
from hmf_jax.training.memory import auto_remat

WAYS = ("reference", "exact", "slow", "fast")
FLOAT32 = WAYS[:2]
RATES = {"lora": 1e-3, "all": 1e-4}  # learning rates, after 20 steps of warmup


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    known = read(args.out) if args.out.is_file() else {}
    for trained, way in itertools.product(args.train, args.ways):
        if (args.mixer, trained, way) in known:
            continue
        start = time.perf_counter()
        losses = curve(args, trained, way)
        line = dict(mixer=args.mixer, trained=trained, way=way, losses=losses)
        line |= dict(device=jax.devices()[0].device_kind, seconds=time.perf_counter() - start)
        with args.out.open("a") as file:
            file.write(json.dumps(line) + "\n")
    print(compare(read(args.out)))


def curve(args: argparse.Namespace, trained: str, way: str) -> list[float]:
    """The loss of every step."""
    rate = optax.linear_schedule(0.0, RATES[trained], 20)
    optimizer = optax.adamw(rate, weight_decay=0.0)
    state = TrainState.create(
        model(args, way, lora=trained == "lora"), optimizer,
        trainable="lora" if trained == "lora" else None,
    )  # fmt: skip
    options: dict[str, Any] = dict(remat="none", impl="chunked", loss=whole_loss)
    if way in ("exact", "fast"):
        choices = args.remat
        if choices == "auto":
            choices = auto_remat(state, args.batch, args.length, impl=args.impl)
        options = dict(remat=choices, impl=args.impl if way == "fast" else "chunked")
    precision = "highest" if way in FLOAT32 else "default"
    losses: list[float] = []

    class Losses:
        def log_scalar(self, name: str, value: float, *, step: int) -> None:
            if name == "train/loss":
                losses.append(value)

        def close(self) -> None: ...

    with jax.default_matmul_precision(precision):
        step = make_train_step(optimizer, max_grad_norm=1.0, **options)
        train(state, step, rows(args), steps=args.steps, loggers=[Losses()], progress=False)
    return losses


def model(args: argparse.Namespace, way: str, *, lora: bool) -> HybridLM:
    """The model of the directory, every second layer of it a new mixer if there is one to be."""
    found = from_pretrained(args.model, dtype=jnp.float32, progress=False)
    if args.mixer != "*":
        kinds = [args.mixer if i % 2 else "*" for i in range(len(found.layers))]
        found = prime(found, kinds)
    found = found if way in FLOAT32 else found.astype(jnp.bfloat16)
    return apply_lora(found, rank=16) if lora else found


def rows(args: argparse.Namespace) -> Any:
    tokenizer = load_tokenizer(args.model)
    return Batches(
        args.data, tokenizer, length=args.length, batch_size=args.batch, overlong="split"
    )


def whole_loss(
    model: HybridLM,
    tokens: jax.Array,
    *,
    loss_mask: jax.Array | None = None,
    segment_ids: jax.Array | None = None,
    **options: Any,
) -> tuple[jax.Array, jax.Array]:
    """`next_token_loss` in one piece, differentiated by JAX."""
    targets, weights = next_token_targets(tokens, loss_mask, segment_ids)
    logits = model(tokens, segment_ids=segment_ids, **options)[0]
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    own = jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(weights != 0, weights * own, 0)), jnp.sum(weights)


def read(file: Path) -> dict[tuple[str, str, str], list[float]]:
    """(mixer, what is trained, way) -> losses."""
    lines = map(json.loads, file.read_text().splitlines())
    return {(x["mixer"], x["trained"], x["way"]): x["losses"] for x in lines}


def compare(curves: dict[tuple[str, str, str], list[float]]) -> str:
    """Markdown: where each curve begins and ends, and how far it is from others (root of the mean
    square over the second half of the steps, nats per token)."""
    others = ("reference", "slow")
    head = ["model", "trained", "way", "first 10 steps", "last 10", *(f"from {w}" for w in others)]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for mixer, trained, way in sorted(curves, key=lambda key: (*key[:2], WAYS.index(key[2]))):
        found = curves[mixer, trained, way]
        cells = [mixer, trained, way, *(f"{np.mean(x):.4f}" for x in (found[:10], found[-10:]))]
        for other in others:
            theirs = curves.get((mixer, trained, other))
            if theirs is None or len(theirs) != len(found):
                cells.append("–")
            else:
                off = np.subtract(found, theirs)[len(found) // 2 :]
                cells.append(f"{np.sqrt(np.mean(off**2)):.4f}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.curves",
        description="Do quick and slow ways of training learn the same?",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def some(text: str, choices: tuple[str, ...]) -> list[str]:
        if wrong := set(text.split(",")) - set(choices):
            raise argparse.ArgumentTypeError(f"{min(wrong)!r}: choose from {', '.join(choices)}")
        return text.split(",")

    parser.add_argument("model", type=Path, help="directory of a Transformer and its tokenizer")
    parser.add_argument("--data", required=True, help="files of rows, see docs/training.md")
    parser.add_argument("--out", type=Path, required=True, help="curves (JSON lines); goes on")
    parser.add_argument("--mixer", default="*", help="put it into every second layer")
    parser.add_argument(
        "--train", default=",".join(RATES), type=lambda x: some(x, tuple(RATES)),
        help="adapters of rank 16, or all parameters",
    )  # fmt: skip
    parser.add_argument("--ways", default=",".join(WAYS), type=lambda x: some(x, WAYS))
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--length", type=int, default=2048, help="tokens per row")
    parser.add_argument("--batch", type=int, default=1, help="rows per step")
    parser.add_argument("--remat", default="auto", help="of the fast way")
    parser.add_argument("--impl", default="auto", help="of the fast way's operators")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
