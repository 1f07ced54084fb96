"""Servers that run: in the foreground, or in a thread for notebooks and tests."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import uvicorn

import hmf_jax
from hmf_jax.engine import Engine
from hmf_jax.generation_config import generation_defaults
from hmf_jax.model import HybridLM
from hmf_jax.serving.app import make_app
from hmf_jax.serving.asks import Served
from hmf_jax.serving.config import ServeConfig
from hmf_jax.serving.service import Service
from hmf_jax.text.tokenizer import directory_of, stop_ids, tokenizer_of

log = logging.getLogger(__name__)
KEEP_ALIVE = 75  # seconds that a connection may be silent between two requests
Model = HybridLM | Callable[[], HybridLM]


def serve(model: Model, tokenizer: Any = None, config: ServeConfig | None = None) -> None:
    """Serves a model until SIGTERM or Ctrl-C.

    Then requests that run go on for `config.shutdown_timeout` seconds; a second signal ends them.

    Args:
      model: the model, or a function that loads it; the server answers /health meanwhile.
      tokenizer: its Hugging Face tokenizer; None: the one in the model's directory.
      config: how the server is set up.

    Raises:
      OSError: the port is taken.
      RuntimeError: the engine has died.
      Whatever loading the model raises.
    """
    server = _Server(model, tokenizer, config or ServeConfig())
    server.run()
    if server.failure is not None:
        raise server.failure


@contextlib.contextmanager
def running(
    model: Model, tokenizer: Any = None, config: ServeConfig | None = None, **options: Any
) -> Iterator[Running]:
    """A server in a thread of its own, for notebooks and tests.

        with running(model, port=0) as server:
            client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none")

    Args:
      model, tokenizer, config: see `serve`.
      options: fields of `ServeConfig`, instead of `config`.

    Raises:
      What `serve` raises, when the server starts.
    """
    if config is not None and options:
        raise ValueError("pass config, or its fields, not both")
    config = config or ServeConfig(**options)
    server = _Server(model, tokenizer, config)
    thread = threading.Thread(target=server.run, name="server", daemon=True)
    thread.start()
    try:
        server.wait(thread)
        yield Running(server)
    finally:
        server.end()
        thread.join()


class Running:
    """A server that runs in another thread.

    Attributes:
      url: where it is, "http://127.0.0.1:8000".
      service: what answers.
    """

    def __init__(self, server: _Server) -> None:
        self.service = server.service
        host, port = server.servers[0].sockets[0].getsockname()[:2]
        self.url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """Uvicorn, with the model: it is loaded when the server listens, and ends when it ends."""

    def __init__(self, model: Model, tokenizer: Any, settings: ServeConfig) -> None:
        self.service = Service(settings, self._died)
        self.failure: BaseException | None = None
        self._model, self._tokenizer = model, tokenizer
        self._loop: asyncio.AbstractEventLoop | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        config = uvicorn.Config(
            make_app(self.service, self._lifespan),
            host=settings.host,
            port=settings.port,
            log_level="warning",
            access_log=False,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=5,
            lifespan="on",
        )
        super().__init__(config)

    def run(self, sockets: Any = None) -> None:
        try:
            super().run(sockets)
        except SystemExit:  # uvicorn's way to say that it could not start; the log has the reason
            if self.failure is None:
                settings = self.service.settings
                self.failure = OSError(f"cannot listen on {settings.host}:{settings.port}")

    def wait(self, thread: threading.Thread) -> None:
        """Until requests are taken. Raises what has gone wrong."""
        while self.service.state == "starting" or not self.started:
            if self.failure is not None:
                raise self.failure
            if not thread.is_alive():
                raise RuntimeError("the server has ended before it was ready")
            time.sleep(0.01)

    def end(self) -> None:
        """As a signal does."""
        if self._loop is not None and not self._loop.is_closed():
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._drain)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal lets requests end, the second one does not wait."""
        if self.service.state == "draining" or self._loop is None:
            self.should_exit = self.force_exit = True
        else:
            self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        async def drain() -> None:
            await self.service.drain()
            self.should_exit = True

        self._spawn(drain())

    def _died(self) -> None:
        self.failure = RuntimeError("the engine has died, see the log")

        async def leave() -> None:
            await asyncio.sleep(1.0)  # so that clients hear of it
            self.should_exit = True

        self._spawn(leave())

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Any) -> Any:
        self._loop = asyncio.get_running_loop()

        async def load() -> None:
            try:
                engine, served = await asyncio.to_thread(
                    prepare, self._model, self._tokenizer, self.service.settings
                )
            except BaseException as e:
                self.failure, self.should_exit = e, True
                return
            if not self.should_exit:
                self.service.start(engine, served)

        self._spawn(load())
        yield
        await self.service.stop()


def prepare(model: Model, tokenizer: Any, settings: ServeConfig) -> tuple[Engine, Served]:
    """The engine for a model, and what is served; raises what is wrong with either."""
    if not isinstance(model, HybridLM):
        model = model()
    tokenizer = tokenizer_of(model, tokenizer)
    directory = directory_of(model, tokenizer)
    longest = model.config.max_position_embeddings
    length = min(settings.max_model_len or longest, longest)
    for name, values in settings.aliases.items():
        for value in values.values():
            try:
                model.config.check_num_iter(value)
            except ValueError as e:
                raise ValueError(f"alias {name}: {e}") from None
    engine = Engine(
        model, settings.slots, capacity=length, prefill_chunk=min(settings.prefill_chunk, length)
    )
    source = Path(model.source).name if model.source else "model"
    served = Served(
        config=model.config,
        tokenizer=tokenizer,
        settings=settings,
        defaults=generation_defaults(model, directory),
        ends=stop_ids(model.config, tokenizer, directory),
        names=settings.model_names or (source,),
        length=length,
        fingerprint=fingerprint(model, settings),
        since=int(time.time()),
    )
    return engine, served


def fingerprint(model: HybridLM, settings: ServeConfig) -> str:
    """Of what decides about the bits of an answer: weights, precision, devices, programs."""
    digest = hashlib.blake2b(digest_size=8)
    said = (
        model.config,
        model.dtype,
        [str(device.device_kind) for device in jax.devices()],
        (jax.__version__, hmf_jax.__version__),
        (settings.slots, settings.prefill_chunk, settings.prefix_cache),
    )
    digest.update(repr(said).encode())
    if model.source:
        for file in sorted(Path(model.source).glob("*.safetensors")):
            with open(file, "rb") as f:  # the ends of large files stand for them
                digest.update(f.read(1 << 16))
                f.seek(max(os.path.getsize(file) - (1 << 16), 0))
                digest.update(f.read())
    return f"hmf-{digest.hexdigest()}"
