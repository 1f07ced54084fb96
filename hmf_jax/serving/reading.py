"""The body of a request: received within limits, and JSON without surprises."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from starlette.requests import Request

from hmf_jax.serving.errors import ApiError, invalid

SECONDS = 30.0  # for the whole body
DEEPEST = 64  # lists and objects inside of each other
_LARGE = 1 << 16  # bytes; more would keep others waiting


class Reader:
    """Reads requests, so that none of them, nor many at once, keep the event loop from others.

    Args:
      most: bytes that a body may have.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        # Few: threads that compute in Python take turns with that of the event loop.
        self._threads = ThreadPoolExecutor(2, "reader")
        self._turn = asyncio.Lock()

    async def read[T](self, request: Request, fields: Callable[[dict[str, Any]], T]) -> T:
        """What `fields` makes of the JSON object that a request brings.

        Raises:
          ApiError: it is too long, takes more than 30 seconds, is not JSON or no object; nested
            more than 64 deep; numbers that are not finite; strings that are no Unicode.
          ClientDisconnect: nobody waits for an answer any more.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        length = request.headers.get("content-length", "0")
        nothing = not kind and length == "0" and "transfer-encoding" not in request.headers
        if kind != "application/json" and not nothing:
            raise ApiError(415, "send JSON, with the header Content-Type: application/json")
        try:
            body = await asyncio.wait_for(_body(request, self._most), SECONDS)
        except TimeoutError:
            message = f"the body of the request did not arrive within {SECONDS:.0f} seconds"
            raise ApiError(408, message, headers={"connection": "close"}) from None
        if len(body) > _LARGE:
            return await self.apart(lambda: fields(parse(body)))
        async with self._turn:  # one in each round of the event loop: others come between
            try:
                return fields(parse(body))
            finally:
                await asyncio.sleep(0)

    async def apart[T](self, work: Callable[..., T], *arguments: Any) -> T:
        """The result of work that takes long, in another thread."""
        run = asyncio.get_running_loop().run_in_executor
        return await run(self._threads, work, *arguments)


async def _body(request: Request, most: int) -> bytes:
    """The body. Of what is too long the rest is not awaited here, but uvicorn receives it: many
    clients look at the answer only after they have sent everything."""
    told = request.headers.get("content-length", "")
    body = bytearray()
    too_long = told.isdigit() and int(told) > most
    if not too_long:
        async for piece in request.stream():
            body += piece
            if too_long := len(body) > most:
                break
    if too_long:
        raise ApiError(413, f"the body of the request has more than {most} bytes")
    return bytes(body)


def parse(body: bytes) -> dict[str, Any]:
    """The JSON object in these bytes; ApiError if there is none, see `Reader.read`."""

    def constant(name: str) -> None:
        raise ValueError(f"{name} is no number in JSON")

    try:
        value = json.loads(body.decode("utf-8-sig"), parse_constant=constant)
    except UnicodeDecodeError as e:
        raise invalid(f"the body is not UTF-8, at byte {e.start}", code="invalid_json") from None
    except RecursionError:
        raise _too_deep() from None
    except ValueError as e:
        raise invalid(f"the body is not JSON: {e}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise invalid("the body must be a JSON object", code="invalid_json")
    _check(value, escapes=b"\\u" in body)
    return value


def _check(value: Any, escapes: bool) -> None:
    """Raises ApiError for what `json` accepts and others do not."""
    level: list[Any] = [value]
    for _ in range(DEEPEST):
        below: list[Any] = []
        for container in level:
            values = container
            if isinstance(container, dict):
                values = container.values()
                if escapes:
                    any(_check_text(key) for key in container)
            for item in values:
                if isinstance(item, dict | list):
                    below.append(item)
                elif isinstance(item, float) and not math.isfinite(item):
                    raise invalid("the body holds a number that is too large", code="invalid_json")
                elif escapes and isinstance(item, str):
                    _check_text(item)
        if not below:
            return
        level = below
    raise _too_deep()


def _too_deep() -> ApiError:
    message = f"the body is nested more than {DEEPEST} deep"
    return invalid(message, code="invalid_json")


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise invalid(
            "the body holds half of a surrogate pair, which is no Unicode", code="invalid_json"
        ) from None
