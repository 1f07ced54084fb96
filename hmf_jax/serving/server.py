"""The life of a server: look at everything, listen, load, compile, be ready, drain, end."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import logging
import os
import signal
import socket
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import uvicorn

from hmf_jax import stored
from hmf_jax.config import HybridConfig
from hmf_jax.engine import Engine, EngineThread, Request, enable_compilation_cache
from hmf_jax.loading import from_pretrained, resolve
from hmf_jax.memory import EnginePlan, size_text
from hmf_jax.model import HybridLM
from hmf_jax.serving import engines
from hmf_jax.serving.app import make_app
from hmf_jax.serving.config import CHUNKS, EngineConfig, ServeConfig
from hmf_jax.serving.router import Router
from hmf_jax.serving.served import describe
from hmf_jax.serving.service import Service
from hmf_jax.text import load_tokenizer

Report = Callable[[str], None]
_LINGER = 5.0  # seconds for connections to close once their answers are sent
log = logging.getLogger(__name__)


def serve(
    model: str | Path,
    config: ServeConfig | None = None,
    engine: EngineConfig | None = None,
    *,
    revision: str | None = None,
    report: Report = log.info,
    progress: bool = False,
    began: float | None = None,
) -> None:
    """Serves a model until SIGTERM or SIGINT, which a second one makes immediate.

    Whatever can be wrong is looked at before the weights are loaded. From then on /health answers;
    /ready does so once all programs are compiled.

    Args:
      model: a directory or a Hugging Face repository, see `hmf_jax.from_pretrained`.
      config: of the HTTP side; engine: of the other. Default: as the device and its memory say.
      revision: of a repository.
      report: gets a line for every step.
      progress: show bars while files are downloaded and read.
      began: `time.perf_counter()` before anything was imported, for what `report` gets; None: now.

    Raises:
      ValueError, OSError: it cannot start.
      RuntimeError: an engine has died.
    """
    entered = time.perf_counter()
    began = entered if began is None else began
    config, options = config or ServeConfig(), engine or EngineConfig()
    enable_compilation_cache()
    directory = resolve(model, revision=revision, progress=progress)
    hybrid = HybridConfig.from_json(directory).override(options.overrides)
    hybrid, options = engines.checked(hybrid, options)
    for name, settings in config.aliases.items():
        try:
            hybrid.check_num_iter(settings.get("num_iter"))
        except ValueError as e:
            raise ValueError(f"alias {name}: {e}") from None
    tokenizer = load_tokenizer(directory)
    dtype = "bfloat16" if options.dtype == "auto" else options.dtype  # until the files are read
    plan = engines.plan(hybrid, options, dtype)
    if config.ssl_certfile is not None:
        _check_ssl(config)
    # How long a thread that computes keeps others from running: HTTP would make engines wait.
    sys.setswitchinterval(5e-4)
    with listener(config.host, config.port) as place:
        life = Life(directory, hybrid, tokenizer, config, options, plan, report, progress, began)
        life.imports = entered - began
        asyncio.run(life.run(place))
        life.end()


class Life:
    """What `serve` does once everything has been looked at."""

    def __init__(
        self,
        directory: Path,
        hybrid: HybridConfig,
        tokenizer: Any,
        config: ServeConfig,
        options: EngineConfig,
        plan: EnginePlan,
        report: Report,
        progress: bool,
        began: float,
    ) -> None:
        self._began, self.imports = began, 0.0
        self._directory, self._hybrid, self._tokenizer = directory, hybrid, tokenizer
        self._options, self._plan, self._progress = options, plan, progress
        self._say = report
        self._config = config
        self._stop, self._died, self._loaded = asyncio.Event(), False, False
        self._devices: list[Any] = jax.devices()[: options.tp * options.dp]

    async def run(self, place: socket.socket) -> None:
        """From listening to the last answer."""
        service = Service(self._config, self._engine_died)
        settings = uvicorn.Config(
            make_app(service),
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_keep_alive=75,
            timeout_graceful_shutdown=int(_LINGER),
            ssl_keyfile=self._config.ssl_keyfile,
            ssl_certfile=self._config.ssl_certfile,
        )
        server = _Server(settings)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._signalled, number)
        listening = asyncio.create_task(server.serve(sockets=[place]))
        seconds = time.perf_counter() - self._began
        text = f"listening at {self._address(place)} after {seconds:.1f} s"
        self._say(text + (f", {self.imports:.1f} s of them imports" if self.imports else ""))
        loading = asyncio.create_task(self._load(service))
        stop = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({listening, loading, stop}, return_when=asyncio.FIRST_COMPLETED)
            if loading.done():
                loading.result()
                await asyncio.wait({listening, stop}, return_when=asyncio.FIRST_COMPLETED)
            if not self._died:
                self._say("no new requests are taken; those that run may come to their end")
            await service.drain()
            self._say_memory()
        finally:
            server.should_exit = True
            await listening
            stop.cancel()
            await service.stop()

    def end(self) -> None:
        """Ends the process if it cannot go on."""
        if self._died:
            raise RuntimeError("an engine has died, see above")
        sys.stderr.flush()
        if not self._loaded:  # a thread that loads or compiles cannot be interrupted
            os._exit(0)

    async def _load(self, service: Service) -> None:
        """From the files to a server that is ready."""
        model, _ = await asyncio.gather(_apart(self._read), _apart(self._compile_ahead))
        made = await _apart(lambda: self._make(model))
        await _apart(lambda: self._warm(made))
        self._loaded = True
        engines.check_memory(self._plan, self._devices)
        self._say_memory()
        threads = [functools.partial(EngineThread, engine) for engine in made]
        served = describe(
            model, self._tokenizer, self._directory, self._config, self._options, self._plan
        )
        service.start(functools.partial(Router, threads), served)
        names = ", ".join(served.names)
        self._say(f"ready: {names}, in {time.perf_counter() - self._began:.1f} s")

    def _say_memory(self) -> None:
        peak = engines.peak(self._devices)
        if peak is not None:
            planned = size_text(self._plan.total)
            self._say(f"memory of a device: {size_text(peak)} at the peak, {planned} planned")

    def _read(self) -> HybridLM:
        options = self._options
        with self._timed(f"loaded {self._directory}"):
            model = from_pretrained(
                self._directory,
                mesh=engines.meshes(options)[0],
                dtype=options.dtype,
                num_iter=options.num_iter,
                config_overrides=options.overrides,
                progress=self._progress,
            )
            # Said to belong there, as `compile_ahead` assumes.
            model = model if model.mesh is not None else jax.device_put(model, jax.devices()[0])
            jax.block_until_ready(model)
        return model

    def _compile_ahead(self) -> None:
        """While files are read, which takes no less time."""
        options = self._options
        if options.tp > 1 or options.dtype == "auto" or options.max_stall is not None:
            return
        with self._timed("programs of a model that is being loaded", programs=True):
            engines.compile_ahead(self._hybrid, options, self._plan)

    def _make(self, model: HybridLM) -> list[Engine]:
        with self._timed("made room for requests"):
            if self._options.max_stall is not None:
                self._options = self._quick_enough(model)
            if self._options.dtype == "auto" or self._options.max_stall is not None:
                self._plan = engines.plan(model.config, self._options, model.dtype)
            self._say("memory of each device:")
            for line in self._plan.table().splitlines():
                self._say(line)
            copies = engines.copies(model, self._options)
            made = [engines.make(copy, self._options, self._plan) for copy in copies]
        return made

    def _warm(self, made: list[Engine]) -> None:
        with self._timed("compiled all programs", programs=True):
            for engine in made:
                engine.warm()
        with self._timed("a first request"):
            for engine in made:
                engines.run_largest(engine, self._options)

    def _quick_enough(self, model: HybridLM) -> EngineConfig:
        """The options with the largest chunk that is read in `max_stall` seconds."""
        for chunk in CHUNKS:
            options = dataclasses.replace(self._options, prefill_chunk=chunk)
            plan = engines.plan(model.config, options, model.dtype)
            if 2 * chunk >= plan.capacity:
                continue
            seconds = _chunk_time(engines.make(model, options, plan), chunk)
            self._say(f"a chunk of {chunk} tokens takes {1e3 * seconds:.0f} ms")
            if seconds <= (self._options.max_stall or 0):
                return options
        raise ValueError(
            f"even chunks of {CHUNKS[-1]} tokens take longer than max_stall="
            f"{self._options.max_stall} s, or are too long for rows of {self._plan.capacity} tokens"
        )

    def _address(self, place: socket.socket) -> str:
        host, port = place.getsockname()[:2]
        name = f"[{host}]" if ":" in host else host
        return f"http{'s' * (self._config.ssl_certfile is not None)}://{name}:{port}"

    def _signalled(self, number: int) -> None:
        if self._stop.is_set():
            os._exit(128 + number)
        self._stop.set()

    def _engine_died(self) -> None:
        self._died = True
        self._stop.set()

    @contextlib.contextmanager
    def _timed(self, what: str, programs: bool = False) -> Iterator[None]:
        """Says how long it took, and what programs were made meanwhile."""
        began, before = time.perf_counter(), len(stored.made)
        yield
        text = f"{what}, in {time.perf_counter() - began:.1f} s"
        if programs and stored.made[before:]:
            text += f" ({stored.summary(stored.made[before:])})"
        self._say(text)


class _Server(uvicorn.Server):
    """uvicorn's, but for signals: it goes on answering while requests come to their end."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # pyright: ignore
        yield


def _apart[T](function: Callable[[], T]) -> asyncio.Future[T]:
    """Runs it in a thread that nobody waits for when the process ends."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(settling: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(lambda: None if future.done() else settling())

    def run() -> None:
        try:
            result = function()
        except BaseException as e:
            settle(functools.partial(future.set_exception, e))
        else:
            settle(functools.partial(future.set_result, result))

    threading.Thread(target=run, daemon=True).start()
    return future


@contextlib.contextmanager
def listener(host: str, port: int) -> Iterator[socket.socket]:
    """A socket at this address, not listening yet.

    Raises:
      OSError: somebody else has it, or there is no such address here.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as e:
        raise OSError(f"there is no address {host}: {e.strerror}") from None
    with socket.socket(family, kind, protocol) as place:
        place.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            place.bind(address)
        except OSError as e:
            raise OSError(f"cannot listen at {host}:{port}: {e.strerror}; see --port") from None
        yield place


def _check_ssl(config: ServeConfig) -> None:
    assert config.ssl_certfile is not None
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(
            config.ssl_certfile, config.ssl_keyfile
        )
    except (OSError, ssl.SSLError) as e:
        raise ValueError(
            f"{config.ssl_certfile} and {config.ssl_keyfile} are no certificate and its key: {e}"
        ) from None


def _chunk_time(engine: Engine, chunk: int) -> float:
    """Seconds that a chunk of a prompt takes, once compiled."""
    seconds = 0.0
    for _ in range(2):
        began = time.perf_counter()
        engine.add(Request([0] * (2 * chunk), max_new_tokens=1))
        while engine.busy:
            engine.step(1)
        seconds = (time.perf_counter() - began) / 2
        engine.reset_prefixes()
    return seconds
