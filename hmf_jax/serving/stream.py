"""Answers as server-sent events, and clients that go away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import re
from collections.abc import AsyncGenerator, Coroutine, Iterable
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from hmf_jax.serving.errors import ApiError, failed

_LINE_ENDS = re.compile("[\x85\u2028\u2029]")
Batches = AsyncGenerator[Iterable[dict[str, Any]]]

log = logging.getLogger(__name__)
PING = 15.0  # seconds without data, after which a comment is sent
PATIENCE = 60.0  # seconds that a client may take to read what was sent
HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}


def frame(data: Any) -> bytes:
    """One event."""
    return f"data: {dumps(data)}\n\n".encode()


def dumps(data: Any) -> str:
    """JSON text in one line, also for clients that know more line ends than SSE has."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _LINE_ENDS.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


async def while_connected[T](receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """The result of some work, which is cancelled if the client goes away before.

    Raises ClientDisconnect: it did.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait([task, watch], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        for one in (task, watch):
            one.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends events as they come.

    The answer begins with the first event, or after 15 seconds without one: an error that comes
    before is an answer of its own, a later one is an event. The end is marked by [DONE], unless
    there was an error.

    Args:
      batches: lists of JSON values; is closed whatever happens.
    """

    def __init__(self, batches: Batches) -> None:
        self.status_code, self.background, self._batches = 200, None, batches
        self.raw_headers = [(name.encode(), value.encode()) for name, value in HEADERS.items()]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers."""
        with contextlib.suppress(ClientDisconnect):
            await while_connected(receive, self._answer(scope, receive, send))

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        frames = self._frames()
        begun = False

        async def write(data: bytes, more: bool = True) -> None:
            nonlocal begun
            if not begun:
                begun = True
                head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
                await send(head)
            message = {"type": "http.response.body", "body": data, "more_body": more}
            await asyncio.wait_for(send(message), PATIENCE)

        try:
            async for data in frames:
                await write(data)
            await write(b"data: [DONE]\n\n", more=False)
        except TimeoutError:
            log.info("a client has not read for %.0f seconds", PATIENCE)
        except Exception as e:
            if not isinstance(e, ApiError):
                log.exception("a stream has failed")
                e = failed(f"{type(e).__name__}: see the log of the server")
            if not begun:
                await e.response()(scope, receive, send)
            else:
                await write(frame(e.body), more=False)
        finally:
            await frames.aclose()

    async def _frames(self) -> AsyncGenerator[bytes]:
        """What is to be sent, the pings included."""
        pending: asyncio.Future[Any] | None = None
        try:
            while True:
                pending = pending or asyncio.ensure_future(anext(self._batches))
                done, _ = await asyncio.wait([pending], timeout=PING)
                if not done:
                    yield b": ping\n\n"
                    continue
                try:
                    batch = pending.result()
                except StopAsyncIteration:
                    return
                pending = None
                if data := b"".join(frame(value) for value in batch):
                    yield data
        finally:
            if pending is not None:  # whatever becomes of it, nobody waits any more
                pending.cancel()
                await asyncio.gather(pending, return_exceptions=True)
            await self._batches.aclose()
