"""What others need for the same work, in rows of the same form.

    python -m benchmarks.peers.transformers_lora --out rows.jsonl

A peer runs where its own packages are, without JAX; see the docstring of each module.
"""
