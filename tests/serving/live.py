"""Servers of real models for tests, and what must be so when nothing runs."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp

from hmf_jax import from_pretrained
from hmf_jax.embedded import corpus, directory
from hmf_jax.serving.background import Running, running
from hmf_jax.serving.load import Client, metrics
from hmf_jax.text import load_tokenizer
from tests.util import random_model, tiny_config


class Live:
    """A server that runs in this process.

    Attributes:
      url: of the server.
      model, tokenizer: that it serves.
      engine: what `generate` is told so that its answers are the same: slots, capacity,
        prefill_chunk.
    """

    def __init__(self, server: Running, model: Any, tokenizer: Any, engine: dict[str, Any]) -> None:
        self.server, self.model, self.tokenizer, self.engine = server, model, tokenizer, engine
        self.url = server.url

    @classmethod
    @contextlib.contextmanager
    def of(
        cls, model: Any, tokenizer: Any, *, slots: int, capacity: int, chunk: int, **options: Any
    ) -> Iterator[Live]:
        """Serves a model; `options` are of `ServeConfig`."""
        engine = {"slots": slots, "capacity": capacity, "prefill_chunk": chunk}
        settings = {"slots": slots, "max_model_len": capacity, "prefill_chunk": chunk, **options}
        with running(model, tokenizer, port=0, **settings) as server:
            yield cls(server, model, tokenizer, engine)

    @classmethod
    def embedded(cls, name: str = "gka", *, chunk: int = 256, **options: Any):
        """Serves an embedded model."""
        model, tokenizer = from_pretrained(directory(name)), load_tokenizer(directory(name))
        return cls.of(model, tokenizer, chunk=chunk, **options)

    @classmethod
    def random(cls, *kinds: str, chunk: int = 64, **options: Any):
        """Serves a model of these kinds of layers with random weights."""
        config = tiny_config(kinds, vocab_size=corpus.VOCAB_SIZE, max_position_embeddings=1024)
        config = dataclasses.replace(config, eos_token_id=corpus.END_ID)
        model = random_model(config, jnp.float32)
        return cls.of(model, corpus.build_tokenizer(), chunk=chunk, model_names=("m",), **options)

    def metrics(self) -> dict[str, float]:
        """The values of /metrics."""

        async def read() -> dict[str, float]:
            client = Client(self.url)
            try:
                return await metrics(client)
            finally:
                await client.close()

        return asyncio.run(read())

    def rests(self, seconds: float = 10.0) -> None:
        """Waits until nothing runs, and looks for what should have gone with it."""
        end = time.monotonic() + seconds
        while True:
            told = self.metrics()
            left = {
                "running": told["vllm:num_requests_running"],
                "waiting": told["vllm:num_requests_waiting"],
                "replies": len(self.server.service.replies),
            }
            if not any(left.values()):
                return
            assert time.monotonic() < end, left
            time.sleep(0.02)
