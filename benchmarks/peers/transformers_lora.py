"""The LoRA step of transformers and PEFT, on PyTorch: Qwen3-8B's shapes, random weights.

    python -m benchmarks.peers.transformers_lora [--attention flash_attention_2] [--compile]

Needs `pip install torch transformers peft` and a GPU, no JAX. As transformers' Trainer does with
bf16=True: weights in bfloat16, adapters of rank 16 beside every projection in float32, autocast;
AdamW in one kernel. One row per choice of "remat": "none", and "block", which is gradient
checkpointing of every layer. The ceilings of the device are measured first, in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.rows import Row, environment

SHAPES: dict[str, dict[str, Any]] = {
    "8B": dict(
        vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36,
        num_attention_heads=32, num_key_value_heads=8, head_dim=128,
    ),
    "tiny": dict(
        vocab_size=256, hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16,
    ),
}  # fmt: skip
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12}  # dense bfloat16, of the data sheets
STEPS = 5


def main(argv: list[str] | None = None) -> None:
    args = _parse(argv)
    optional = {"flash_attention_2": "flash_attn"}.get(args.attention)
    needs = [name for name in ("torch", "transformers", "peft", optional) if name]
    if missing := [name for name in needs if importlib.util.find_spec(name) is None]:
        sys.exit(f"skipped: not installed here: {', '.join(missing)}")
    import torch

    if args.shape == "8B" and not torch.cuda.is_available():
        sys.exit("skipped: PyTorch sees no GPU here; --shape tiny runs on a CPU")
    for row in _rows(args):
        if args.out is not None:
            with args.out.open("a") as file:
                file.write(row.to_json() + "\n")
        numbers = "".join(f"  {k} {v:.4g}" for k, v in row.extra.items() if not isinstance(v, str))
        print(f"{row.describe():<80} {row.ms:10.3f} ms{numbers}", flush=True)


def _rows(args: argparse.Namespace) -> Iterator[Row]:
    import torch

    gpu = torch.cuda.is_available()
    env = environment(torch.cuda.get_device_name() if gpu else "cpu", jax_version="")
    yield from _ceilings(8192 if gpu else 256, env)
    for remat in args.remat:
        try:
            yield _lora_step(args, remat, env)
        except torch.OutOfMemoryError:
            print(f"skipped remat {remat}: out of memory", file=sys.stderr, flush=True)
        gc.collect()  # modules refer to each other


def _lora_step(args: argparse.Namespace, remat: str, env: dict[str, str]) -> Row:
    import peft
    import torch
    import transformers

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = transformers.Qwen3Config(
        **SHAPES[args.shape], use_cache=False, attn_implementation=args.attention
    )
    torch.set_default_dtype(torch.bfloat16)
    with device:
        model: Any = transformers.AutoModelForCausalLM.from_config(config)
    torch.set_default_dtype(torch.float32)
    model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear"))
    if remat == "block":
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    flops = training_flops(model, config, args.length)
    optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=True)
    forward = torch.compile(model) if args.compile else model
    rows = torch.randint(0, config.vocab_size, (STEPS, 1, args.length), device=device)

    def step(tokens: Any) -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = forward(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    ms = _milliseconds(step, rows)
    extra: dict[str, Any] = {"tokens_per_s": 1e3 * args.length / ms}
    if peak := next((x for name, x in PEAK_FLOPS.items() if name in env["device"]), None):
        extra["mfu"] = extra["tokens_per_s"] * flops / peak
    extra["trained"] = sum(p.numel() for p in trained)
    if device.type == "cuda":
        extra["peak_bytes"] = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    extra |= {p.__name__: p.__version__ for p in (torch, transformers, peft)}
    dims = dict(batch=1, length=args.length, heads=config.num_attention_heads)
    dims |= dict(kv_heads=config.num_key_value_heads, head_dim=config.head_dim)
    impl = f"transformers {args.attention}{' compiled' if args.compile else ''}"
    case = f"{args.shape} * {config.num_hidden_layers} layers, remat {remat}"
    return Row("lora_step", impl, "bfloat16", dims, None, "fwd_bwd", ms, None, case, extra, **env)


def training_flops(model: Any, config: Any, length: int) -> float:
    """As `hmf_jax.training.training_flops`: per token, without what is computed again."""
    named = model.named_parameters()
    matrices = [p for name, p in named if p.ndim >= 2 and "embed_tokens" not in name]
    weights = sum(p.numel() for p in matrices)
    trained = sum(p.numel() for p in matrices if p.requires_grad)
    keys = (length + 1) / 2 * config.num_hidden_layers
    return 4.0 * weights + 2.0 * trained + 12 * config.num_attention_heads * config.head_dim * keys


def _milliseconds(call: Callable[[Any], Any], inputs: Any) -> float:
    """Median time of a call that is waited for, after two that are not timed."""
    import torch

    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    times = []
    for x in [*inputs[:2], *inputs]:
        wait()
        start = time.perf_counter()
        call(x)
        wait()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times[2:])


def _ceilings(size: int, env: dict[str, str]) -> Iterator[Row]:
    """A copy and a matrix product, as in `benchmarks.timing.ceilings`."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    wide = torch.ones((2, 8 * size, size), dtype=torch.int32, device=device)
    copy = _milliseconds(lambda _: wide[1].copy_(wide[0]), range(10))
    a = torch.randn((3, size, size), dtype=torch.bfloat16, device=device)
    product = _milliseconds(lambda _: torch.matmul(a[0], a[1], out=a[2]), range(10))
    dims = dict(batch=1, length=size, heads=1, kv_heads=1, head_dim=size)
    row = Row("ceiling_copy", "torch", "int32", dims, None, "fwd", copy, None, **env)
    yield dataclasses.replace(row, extra={"gb_per_s": 2 * wide[0].nbytes / copy / 1e6})
    row = dataclasses.replace(row, op="ceiling_matmul", dtype="bfloat16", ms=product)
    yield dataclasses.replace(row, extra={"tflop_per_s": 2 * size**3 / product / 1e9})


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=SHAPES, default="8B")
    parser.add_argument("--length", type=int, default=8192, help="tokens of the one row (8192)")
    parser.add_argument("--remat", default="none,block", help="of none, block; default: both")
    parser.add_argument("--attention", default="sdpa", help="attn_implementation of transformers")
    parser.add_argument("--compile", action="store_true", help="torch.compile, which takes minutes")
    parser.add_argument("--out", type=Path, help="append rows to this file (JSON lines)")
    args = parser.parse_args(argv)
    args.remat = args.remat.split(",")
    if wrong := set(args.remat) - {"none", "block"}:
        parser.error(f"--remat {min(wrong)} is unknown; choose none, block")
    return args


if __name__ == "__main__":
    main()
