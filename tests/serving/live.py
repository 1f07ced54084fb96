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
from hmf_jax.engine import Engine
from hmf_jax.serving.background import Running, prepare
from hmf_jax.serving.config import ServeConfig
from hmf_jax.serving.load import Client, metrics
from hmf_jax.text import load_tokenizer
from tests.util import random_model, tiny_config


class Live:
    """A server that runs in this process.

    Attributes:
      url: of the server.
      model, tokenizer: that it serves.
      engine: that runs it; only its thread may use it.
      warm: everything was compiled before.
      same: what `generate` is told so that its answers are the same.
    """

    def __init__(
        self,
        server: Running,
        engine: Engine,
        model: Any,
        tokenizer: Any,
        same: dict[str, Any],
        warm: bool,
    ) -> None:
        self.server, self.engine, self.model, self.tokenizer = server, engine, model, tokenizer
        self.same, self.url, self.warm = same, server.url, warm
        self._tasks_before = self._tasks() + 1  # the request that asks for metrics

    @classmethod
    @contextlib.contextmanager
    def of(
        cls,
        model: Any,
        tokenizer: Any,
        *,
        slots: int,
        capacity: int,
        chunk: int,
        prefixes: Any = "exact",
        entries: int = 16,
        page_size: int = 64,
        pages: int | None = None,
        warm: bool = False,
        **options: Any,
    ) -> Iterator[Live]:
        """Serves a model.

        Args:
          entries: snapshots of prefixes that there is room for.
          warm: compile everything before.
          options: of `ServeConfig`.
        """
        same: dict[str, Any] = {"slots": slots, "capacity": capacity, "prefill_chunk": chunk}
        settings = ServeConfig(
            port=0, slots=slots, max_model_len=capacity, prefill_chunk=chunk,
            prefix_cache=prefixes, **options,
        )  # fmt: skip
        probe, served = prepare(model, tokenizer, settings)
        engine = Engine(
            model, **same, page_size=page_size, pages=pages, prefixes=prefixes, spacing=chunk,
            prefix_bytes=entries * probe._limits.snapshot_bytes, fixed=True,
        )  # fmt: skip
        if warm:
            engine.warm()
        server = Running(engine, served)
        try:
            yield cls(server, engine, model, tokenizer, same, warm)
        finally:
            server.stop()

    @classmethod
    def embedded(cls, name: str = "gka", *, chunk: int = 256, **options: Any):
        """Serves an embedded model."""
        model, tokenizer = from_pretrained(directory(name)), load_tokenizer(directory(name))
        return cls.of(model, tokenizer, chunk=chunk, **options)

    @classmethod
    def random(cls, *kinds: str, chunk: int = 64, **options: Any):
        """Serves a model of these kinds of layers with random weights."""
        config = tiny_config(kinds, vocab_size=corpus.VOCAB_SIZE, max_position_embeddings=2048)
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
            stats = self.engine.stats()
            left = {
                "running": told["vllm:num_requests_running"] + stats.running,
                "waiting": told["vllm:num_requests_waiting"] + stats.waiting + stats.swapped,
                "replies": len(self.server.service.replies),
                "slots": self.same["slots"] - stats.slots["free"],
                "pages of rows": stats.pages.get("held", 0),
                "tasks": max(0, self._tasks() - self._tasks_before),
            }
            if not any(left.values()):
                return
            assert time.monotonic() < end, left
            time.sleep(0.02)

    def _tasks(self) -> int:
        """How many tasks the server's event loop has."""
        loop = self.server._loop
        assert loop is not None
        return len(asyncio.all_tasks(loop))
