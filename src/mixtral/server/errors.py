"""Errors as HTTP answers: one body shape for every status, stable codes, nothing internal in the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from mixtral.errors import CapacityError, MessagesError, MixtralError, NumericalError, RequestError, TokenizerError

__all__ = ["ApiError", "ClientGone", "as_api_error", "error_response", "overloaded", "show"]

_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
_NO_RETRY: Mapping[str, str] = {"x-should-retry": "false"}
_MESSAGE_LIMIT = 4000
# Errors of any class with these codes are the client's.
_CLIENT_CODES = frozenset(
    {"schema_invalid", "schema_unsupported", "regex_invalid", "grammar_invalid", "grammar_too_complex"}
)


class ApiError(Exception):
    """An error and all that its HTTP answer needs; ``code`` is stable, ``param`` a path like ``messages[3].role``."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.param = param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """``{"error": {"message", "type", "param", "code"}}``: the whole body, and the data of an error event."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {
            "error": {
                "message": _clean(self.message, _MESSAGE_LIMIT),
                "type": kind,
                "param": None if self.param is None else _clean(self.param, 256),
                "code": self.code,
            }
        }


class ClientGone(Exception):
    """The client left; there is nobody to answer."""


def error_response(error: ApiError) -> JSONResponse:
    """The HTTP answer of an error."""
    return JSONResponse(error.body(), status_code=error.status, headers=error.headers)


def as_api_error(error: Exception) -> ApiError:
    """Any exception as an answer: user errors are 400 with their text, all others are 500 and say nothing internal."""
    if isinstance(error, ApiError):
        return error
    client = isinstance(error, RequestError | MessagesError | TokenizerError | CapacityError)
    if isinstance(error, MixtralError) and (client or error.code in _CLIENT_CODES):
        return ApiError(400, error.code, str(error), param=error.param)
    if isinstance(error, MixtralError) and error.code == "server_overloaded":
        return overloaded(error.code, str(error), retry_after_s=2)
    if isinstance(error, MemoryError):
        message = "the server has no memory left for this request; try again later, or send less at once"
        return overloaded("server_overloaded", message, retry_after_s=2)
    if isinstance(error, NumericalError):
        message = "the model produced a number that is not finite; this request was ended, others are not affected"
        return ApiError(500, error.code, message, headers=_NO_RETRY)
    return ApiError(
        500, MixtralError.code, "the server failed on this request; its log has the reason under the request id"
    )


def overloaded(code: str, message: str, *, retry_after_s: int) -> ApiError:
    """A 503: the request is good, the server has no room for it now."""
    return ApiError(503, code, message, headers={"retry-after": str(retry_after_s)})


def show(value: object) -> str:
    """A value of the request, fit for a message: at most 64 characters, control characters escaped."""
    shown = repr(value)
    return shown if len(shown) <= 64 else f"{shown[:61]}..."


def _clean(text: str, limit: int) -> str:
    """At most ``limit`` characters, all of them encodable as UTF-8."""
    return text[:limit].encode("utf-8", "backslashreplace").decode()
