"""Errors as OpenAI's API words them: {"error": {message, type, param, code}} with a status."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class ApiError(Exception):
    """A request that is answered with an error. `headers` travel with the answer."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.headers = status, dict(headers or {})
        self.body: dict[str, Any] = {
            "error": {"message": message, "type": kind, "param": param, "code": code}
        }


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """What the asker can mend."""
    return ApiError(400, message, param=param, code=code)


def server_error(message: str) -> ApiError:
    """What went wrong here."""
    return ApiError(500, message, kind="server_error", code="internal_error")


def overloaded() -> ApiError:
    """No room for one more."""
    return ApiError(
        429,
        "the queue of this server is full; try again",
        kind="rate_limit_error",
        code="queue_full",
        headers={"Retry-After": "1"},
    )


def shutting_down() -> ApiError:
    """The server stops before the answer is complete."""
    return ApiError(503, "the server is shutting down", kind="server_error", code="shutting_down")
