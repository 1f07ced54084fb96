"""What holds for every request: a name, a key, and errors that all look the same."""

from __future__ import annotations

import hmac
import http
import logging
import re
import uuid

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hmf_jax.serving.errors import ApiError, failed

log = logging.getLogger(__name__)
OPEN = {"/", "/health", "/ready", "/version"}  # paths that need no key: they tell nothing
_ID = re.compile(r"[\x21-\x7e]{1,256}")


class Guard:
    """ASGI middleware. Every answer has the header x-request-id, the client's own or a new one; a
    path that is not open needs one of the keys, if there are any; whatever goes wrong is told in
    the shape of `ApiError`.

    Args:
      app: what answers.
      keys: of clients.
    """

    def __init__(self, app: ASGIApp, keys: tuple[str, ...] = ()) -> None:
        self._app, self._keys = app, [key.encode() for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        id = given if _ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = id
        begun = False

        async def named(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                MutableHeaders(scope=message)["x-request-id"] = id
            await send(message)

        try:
            self._check(scope)
            await self._app(scope, receive, named)
        except ClientDisconnect:
            log.info("request %s: the client has gone (499)", id)
        except Exception as e:
            if begun:
                raise
            await _error(e).response()(scope, receive, named)

    def _check(self, scope: Scope) -> None:
        if not self._keys or scope["path"] in OPEN:
            return
        scheme, _, key = Headers(scope=scope).get("authorization", "").partition(" ")
        sent = key.strip().encode("latin-1", "replace")
        # All are compared, each in a time that does not depend on what is wrong.
        right = [hmac.compare_digest(sent, own) for own in self._keys]
        if scheme.lower() != "bearer" or not any(right):
            raise ApiError(
                401,
                "a key is needed: send the header Authorization: Bearer KEY",
                code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )


def _error(error: Exception) -> ApiError:
    """What the client is told."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, HTTPException):
        told = {404: "there is no such path", 405: "this path has another method"}
        message = told.get(error.status_code, http.HTTPStatus(error.status_code).phrase)
        return ApiError(error.status_code, message, headers=dict(error.headers or {}))
    log.error("a request has failed", exc_info=error)
    return failed(f"{type(error).__name__}: see the log of the server", "internal_error")


async def told(request: Request, error: Exception) -> Response:
    """The answer to what a route has raised."""
    return _error(error).response()
