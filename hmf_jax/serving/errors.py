"""What clients are told when something is wrong, in the shape that OpenAI's interface has."""

from __future__ import annotations

from typing import Any

from starlette.responses import JSONResponse

TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
    499: "aborted_error",
    500: "server_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """An answer that is an error.

    Args:
      status: the HTTP status.
      message: one line that says what to do.
      param: the field of the request that is wrong.
      code: for programs, such as "context_length_exceeded".
      headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The JSON value that clients get."""
        error = {
            "message": self.message,
            "type": TYPES.get(self.status, "server_error"),
            "param": self.param,
            "code": self.code,
        }
        return {"error": error}

    def response(self) -> JSONResponse:
        """The same as an answer."""
        return JSONResponse(self.body, self.status, self.headers)


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """Something in the request is wrong."""
    return ApiError(400, message, param=param, code=code)


def unsupported(param: str, what: str) -> ApiError:
    """Something in the request is right, but not to be had here."""
    return invalid(f"{param}: {what} is not supported", param, "unsupported")


def busy(message: str, code: str, seconds: int, status: int = 503) -> ApiError:
    """The server cannot take the request now; the client may try again in so many seconds."""
    return ApiError(status, message, code=code, headers={"Retry-After": str(seconds)})


def failed(message: str, code: str = "engine_error", *, again: bool = False) -> ApiError:
    """The request failed; unless it may work `again`, clients need not repeat it."""
    headers = {} if again else {"x-should-retry": "false"}
    return ApiError(500, message, code=code, headers=headers)
