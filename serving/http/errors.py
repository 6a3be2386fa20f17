"""Every error in one shape, OpenAI's: {"error": {"message", "type", "param", "code"}}, without the request's texts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

MOST_SHOWN_CHARACTERS = 600


class ErrorDetail(BaseModel):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is not 2xx."""

    error: ErrorDetail


class ApiError(Exception):
    """An answer other than 2xx.

    Args:
        status: of HTTP.
        message: for people: what is wrong, what is allowed.
        code: for programs.
        param: the request's field that is at fault, if one is.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.detail = ErrorDetail(message=_printable(message), type=_type(status), param=param, code=code)
        self.headers = dict(headers or {})

    def response(self) -> JSONResponse:
        """The answer."""
        return JSONResponse({"error": self.detail.model_dump()}, self.status, self.headers)


def internal_error() -> ApiError:
    """The error of whatever nobody foresaw."""
    return ApiError(500, "The service failed; its log says where.", "internal_error")


STATUSES = {
    400: "The request is not understood, or asks for what is not offered.",
    401: "The token is absent or wrong.",
    404: "There is no such route or model, or this adapter does not answer this kind of request.",
    405: "The route has other methods.",
    408: "The request's body did not arrive in time.",
    413: "The request's body is too long.",
    422: "A field is missing, unknown, of another type, or out of its limits.",
    429: "The queue is full; Retry-After says when to come again.",
    500: "The model failed; the log says where.",
    503: "The model is not loaded, or the service ends.",
    504: "There was no answer in time.",
}


def responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route declares of its errors."""
    return {status: {"model": ErrorBody, "description": STATUSES[status]} for status in statuses}


async def on_api_error(request: Request, error: Exception) -> JSONResponse:
    """Answer with an error that a route raised."""
    assert isinstance(error, ApiError)
    return error.response()


async def on_http_error(request: Request, error: Exception) -> JSONResponse:
    """Answer with an error of the framework's: no such route, no such method, a body that cannot be parsed."""
    assert isinstance(error, HTTPException)
    code = {404: "route_not_found", 405: "method_not_allowed"}.get(error.status_code)
    return ApiError(error.status_code, str(error.detail), code, headers=error.headers).response()


async def on_invalid_request(request: Request, error: Exception) -> JSONResponse:
    """Answer that fields cannot be used: 400 where OpenAI's clients expect that, 422 elsewhere."""
    assert isinstance(error, RequestValidationError)
    status = 400 if request.url.path.startswith("/v1/") else 422
    problem = error.errors()[0]
    # Of a union's members the location names each; the request knows none of them.
    param = ".".join(str(part) for part in problem["loc"] if part != "body")
    said = "is unknown here, or not offered; leave it out" if problem["type"] == "extra_forbidden" else problem["msg"]
    message = f"{param or 'the body'}: {said}"
    return ApiError(status, message, "invalid_request", _printable(param) or None).response()


def _type(status: int) -> str:
    if status >= 500:
        return "server_error"
    return "rate_limit_error" if status == 429 else "invalid_request_error"


def _printable(text: str) -> str:
    # The name of an unknown field is the client's own, of any length and with half surrogates.
    return text[:MOST_SHOWN_CHARACTERS].encode("utf-8", "backslashreplace").decode()
