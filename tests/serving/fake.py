"""An engine whose answers are known beforehand, and a server over it."""

from __future__ import annotations

import collections
import contextlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import httpx

from hmf_jax import HybridConfig
from hmf_jax.engine import Finished, New, Request, Scored, Started
from hmf_jax.engine.books import Stats
from hmf_jax.engine.timings import Timing
from hmf_jax.generation_config import GenerationDefaults
from hmf_jax.serving.background import Running
from hmf_jax.serving.config import ServeConfig
from hmf_jax.serving.served import Served
from tests.text.tokenizers import reasoning

LENGTH = 256
CONFIG = HybridConfig.preset("tiny", layer_kinds=("GKA",), vocab_size=320)


class FakeEngine:
    """Answers with the tokens that `script` makes of a request; as an `Engine` does, turn by turn.

    Attributes:
      script: makes the tokens of an answer; the end token is one of them.
      slots: how many requests run at a time.
      turn: seconds that a turn takes.
      pace: tokens per turn, at most.
      seen: all requests, in order.
      fault: what `step` raises, once unless it is of CUDA.
      broken: which requests, counted from 0, fail.
    """

    def __init__(self, script: Callable[[Request], list[int]], slots: int = 4) -> None:
        self.script, self.slots, self.turn, self.pace = script, slots, 0.0, 64
        self.seen: list[Request] = []
        self.fault: Exception | None = None
        self.broken: set[int] = set()
        self.resets = 0
        self._ids = itertools.count()
        self._waiting: collections.deque[int] = collections.deque()
        self._requests: dict[int, Request] = {}
        self._left: dict[int, list[int]] = {}
        self._made: collections.Counter[int] = collections.Counter()
        self._ended: list[Any] = []

    @property
    def busy(self) -> bool:
        return bool(self._waiting or self._left or self._ended)

    def new_id(self) -> int:
        return next(self._ids)

    def check(self, request: Request) -> Request:
        return request

    def add(self, request: Request, id: int) -> int:
        self.seen.append(request)
        self._requests[id] = request
        self._waiting.append(id)
        return id

    def abort(self, id: int) -> None:
        if id in self._requests:
            self._end(id, "stop")

    def stats(self) -> Stats:
        return Stats(
            slots={"free": 3, "decode": 1},
            pages={"free": 6, "held": 2},
            prefix_bytes={("device", "kv"): 7},
            entries={"device": 3},
            preemptions=5,
        )

    def timings(self) -> list[Timing]:
        return [Timing("decode", 0.5, 0.25)]

    def compiled(self) -> int:
        return 2

    def reset_prefixes(self) -> int:
        self.resets += 1
        return 3

    def recover(self) -> list[Any]:
        ended = [Finished(id, "error", "it was the fault of nobody") for id in self._requests]
        self._waiting.clear()
        self._left, self._requests, self._ended = {}, {}, []
        return ended

    def step(self, steps: int) -> list[Any]:
        if self.fault is not None:
            fault = self.fault
            self.fault = fault if "CUDA" in str(fault) else None
            raise fault
        time.sleep(self.turn)
        steps = min(steps, self.pace)
        events, self._ended = self._ended, []
        for id in list(self._left):
            request, left = self._requests[id], self._left[id]
            room = request.max_new_tokens - self._made[id]
            now, self._left[id] = left[: min(steps, room)], left[steps:]
            self._made[id] += len(now)
            if now:
                events.append(New(id, now, *told(now, request.top_logprobs)))
            reason = "eos" if now and now[-1] in request.eos_ids else "length"
            if id in self.broken or len(self.seen) - 1 in self.broken:
                reason = "error"
            if reason != "length" or not self._left[id] or room <= steps:
                self._end(id, reason)
        while self._waiting and len(self._left) < self.slots:
            id = self._waiting.popleft()
            request = self._requests[id]
            events.append(Started(id, 0.0, cached=len(request.prompt) // 2))
            if request.prompt_logprobs is not None:
                events.append(Scored(id, *told(request.prompt[1:], request.prompt_logprobs)))
            tokens = self.script(request)
            end = next((i + 1 for i, t in enumerate(tokens) if t in request.eos_ids), None)
            self._left[id] = tokens[:end]
        events, self._ended = events + self._ended, []
        return events

    def _end(self, id: int, reason: str) -> None:
        self._left.pop(id, None)
        if id in self._waiting:
            self._waiting.remove(id)
        error = "new token 0: the logits are NaN or infinite" if reason == "error" else None
        self._ended.append(Finished(id, reason, error))
        del self._requests[id]


def told(tokens: Sequence[int], top: int) -> tuple[list[float], list[dict[int, float]]]:
    """Log-probabilities as an engine tells them: token t has -t / 1000; the most likely are 0, 1,
    ... and say so."""
    best = [{token: -token / 1000 for token in range(top)} for _ in tokens] if top else []
    return [-token / 1000 for token in tokens], best


def served(settings: ServeConfig, **changes: Any) -> Served:
    """The demo's tokenizer with tags of tools, a model that there is not."""
    tokenizer = reasoning()
    values: dict[str, Any] = dict(
        config=CONFIG,
        tokenizer=tokenizer,
        settings=settings,
        defaults=GenerationDefaults(),
        ends=(tokenizer.eos_token_id,),
        names=settings.model_names or ("m",),
        length=LENGTH,
        fingerprint="hmf-fake",
        since=1,
    )
    return Served(**(values | changes))


class Site:
    """A server over a fake engine, and a client of it.

    Attributes:
      engine: the fake.
      running: the server.
      tokenizer: of the model.
      http: talks to it.
    """

    def __init__(self, settings: ServeConfig, **changes: Any) -> None:
        self.engine = FakeEngine(lambda request: [])
        self.what = served(settings, **changes)
        self.tokenizer = self.what.tokenizer
        self.running = Running(self.engine, self.what)  # pyright: ignore[reportArgumentType]
        self.url = self.running.url
        self.http = httpx.Client(base_url=self.url, timeout=20)

    def says(self, text: str, *, ends: bool = True) -> None:
        """From now on every answer is this."""
        tokens = self.tokenizer.encode(text, add_special_tokens=False)
        tokens = [*tokens, self.tokenizer.eos_token_id] if ends else tokens
        self.engine.script = lambda request: list(tokens)

    def post(self, path: str, **body: Any) -> httpx.Response:
        return self.http.post(path, json=body)

    def text(self, prompt: Any = "abc", **body: Any) -> dict[str, Any]:
        """The answer to a completion."""
        response = self.post("/v1/completions", prompt=prompt, **body)
        assert response.status_code == 200, response.text
        return response.json()

    def chat(self, content: str = "hi", **body: Any) -> dict[str, Any]:
        """The answer to a message."""
        messages = [{"role": "user", "content": content}]
        response = self.post("/v1/chat/completions", **{"messages": messages, **body})
        assert response.status_code == 200, response.text
        return response.json()

    def stream(self, path: str, **body: Any) -> list[dict[str, Any]]:
        """The chunks of an answer."""
        with self.http.stream("POST", path, json={**body, "stream": True}) as response:
            assert response.status_code == 200
            return events("\n".join(response.iter_lines()))

    def error(self, path: str, status: int, **body: Any) -> dict[str, Any]:
        """The error that a request is answered with."""
        response = self.post(path, **body)
        return error(response, status)


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error in an answer, whose shape is looked at."""
    assert response.status_code == status, response.text
    assert set(response.json()) == {"error"}
    told = response.json()["error"]
    assert set(told) == {"message", "type", "param", "code"}
    assert told["message"] and "\n" not in told["message"]
    assert response.headers["x-request-id"]
    return told


def events(text: str) -> list[dict[str, Any]]:
    """The values of a stream that ends as it should."""
    lines = [line for line in text.strip().split("\n\n") if not line.startswith(":")]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


@contextlib.contextmanager
def site(**settings: Any) -> Iterator[Site]:
    """A server over a fake engine; see `ServeConfig` for the settings."""
    changes = {name: settings.pop(name) for name in ("defaults", "config") if name in settings}
    site = Site(ServeConfig(port=0, slots=4, **settings), **changes)
    try:
        yield site
    finally:
        site.http.close()
        site.running.stop()


def wait(until: Callable[[], bool], seconds: float = 10.0) -> None:
    """Until something is so."""
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end
        time.sleep(0.005)
