"""Benchmarks: one runner, one JSON row per measurement, one comparison.

    python -m benchmarks.run --ops gka,ssd --impls chunked --shapes 8B --out results.jsonl
    python -m benchmarks.run --ops ttft,decode_throughput --mixers GKA,BMF --shapes 8B --out ...
    python -m benchmarks.compare before.jsonl after.jsonl

See `benchmarks.rows` for what a row holds and `benchmarks.timing` for how times are taken.
"""
