"""A server in a thread of its own, for notebooks and tests."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import uvicorn

from hmf_jax.engine import Engine, EngineThread
from hmf_jax.model import HybridLM
from hmf_jax.serving import engines
from hmf_jax.serving.app import make_app
from hmf_jax.serving.config import EngineConfig, ServeConfig
from hmf_jax.serving.router import Router
from hmf_jax.serving.served import Served, describe
from hmf_jax.serving.service import Service
from hmf_jax.text.tokenizer import directory_of, tokenizer_of


@contextlib.contextmanager
def running(
    model: HybridLM, tokenizer: Any = None, config: ServeConfig | None = None, **options: Any
) -> Iterator[Running]:
    """Serves a model meanwhile.

        with running(model, port=0) as server:
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")

    Programs are compiled when they are first needed.

    Args:
      model: the model.
      tokenizer: its Hugging Face tokenizer; None: the one in the model's directory.
      config: how the server is set up.
      options: fields of `ServeConfig`, instead of `config`.

    Raises:
      ValueError, FileNotFoundError: something is wrong with the model, tokenizer or config.
      OSError: the port is taken.
    """
    if config is not None and options:
        raise ValueError("pass config, or its fields, not both")
    server = Running(*prepare(model, tokenizer, config or ServeConfig(**options)))
    try:
        yield server
    finally:
        server.stop()


class Running:
    """A server that runs in another thread, see `running`.

    Args:
      engine: what answers.
      served: the model, and how the server is set up.

    Attributes:
      service: what answers.
      url: where it is, "http://127.0.0.1:8000".
    """

    def __init__(self, engine: Engine, served: Served) -> None:
        settings = served.settings
        self.service = Service(settings)
        self._engine, self._served = engine, served
        config = uvicorn.Config(
            make_app(self.service),
            host=settings.host,
            port=settings.port,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_keep_alive=75,
            timeout_graceful_shutdown=5,
        )
        self._server = uvicorn.Server(config)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="server", daemon=True)
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise OSError(f"cannot listen at {settings.host}:{settings.port}; is it taken?")
            time.sleep(0.005)
        host, port = self._server.servers[0].sockets[0].getsockname()[:2]
        self.url = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def stop(self) -> None:
        """Takes no more requests, lets those that run end, and ends."""
        loop, stop = self._loop, self._stop
        if loop is not None and not loop.is_closed():
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                loop.call_soon_threadsafe(stop.set)
        self._thread.join()

    def _run(self) -> None:
        with contextlib.suppress(SystemExit):  # uvicorn's way to say that the port is taken
            asyncio.run(self._serve())

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        thread = functools.partial(EngineThread, self._engine)
        self.service.start(functools.partial(Router, [thread]), self._served)
        listening = asyncio.create_task(self._server.serve())
        stop = asyncio.create_task(self._stop.wait())
        await asyncio.wait({listening, stop}, return_when=asyncio.FIRST_COMPLETED)
        await self.service.drain()
        self._server.should_exit = True
        try:
            await listening
        finally:
            stop.cancel()
            await self.service.stop()


def prepare(model: HybridLM, tokenizer: Any, settings: ServeConfig) -> tuple[Engine, Served]:
    """An engine for a model, and what is served; raises what is wrong with them."""
    tokenizer = tokenizer_of(model, tokenizer)
    directory = directory_of(model, tokenizer)
    longest = settings.max_model_len or model.config.max_position_embeddings
    options = EngineConfig(
        slots=settings.slots,
        max_model_len=longest,
        prefill_chunk=min(settings.prefill_chunk, longest),
        prefix_cache=settings.prefix_cache,
    )
    _, options = engines.checked(model.config, options)
    plan = engines.plan(model.config, options, model.dtype)
    where = None if directory is None else Path(directory)
    served = describe(model, tokenizer, where, settings, options, plan)
    return engines.make(model, options, plan), served
