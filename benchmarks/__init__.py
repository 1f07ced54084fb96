"""Benchmarks: one runner, one JSON row per measurement, one comparison.

    python -m benchmarks.run --ops gka,ssd --impls chunked --shape 8B --out results.jsonl
    python -m benchmarks.run --ops ttft,decode_throughput --mixers GKA,BMF --shape 8B --out ...
    python -m benchmarks.run --ops full_step --batches 2 --shape 8B --mesh fsdp=2 --out ...
    python -m benchmarks.training --out training.jsonl
    python -m benchmarks.serve_table --tp 2 --out table.jsonl
    python -m benchmarks.full_size --tp 2 --directory DIR --out results.jsonl
    python -m benchmarks.compare before.jsonl after.jsonl

`hmf-jax bench run`, `training`, `serve-table`, `full-size` and `compare` are the same programs;
`benchmarks.peers` does the same work with other libraries.
See `benchmarks.rows` for what a row holds and `benchmarks.timing` for how times are taken.
"""
