"""What happens to every request before and after its route: id, token, length of the body, log line, last resort."""

from __future__ import annotations

import asyncio
import hmac
import re
import secrets
import time
from collections.abc import Awaitable, Callable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.http.errors import ApiError, internal_error
from serving.http.logs import LOGGER, say
from serving.http.metrics import Metrics
from serving.http.options import Settings

OPEN_ROUTES = ("/healthz", "/readyz")
REQUEST_ID = "X-Request-ID"
CLIENT_LEFT = 499  # nginx's number; it reaches nobody but the log


class Guard:
    """Pure ASGI: Starlette's own base class for this hides from a route that its client left."""

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics) -> None:
        self._app = app
        self._settings = settings
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.monotonic(), CLIENT_LEFT
        headers = {name.lower(): value for name, value in scope["headers"]}
        request_id = _request_id(headers)
        scope.setdefault("state", {})

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (REQUEST_ID.lower().encode(), request_id.encode())]
            await send(message)

        async def fail(error: ApiError) -> None:
            if status == CLIENT_LEFT:  # nothing is sent yet
                await error.response()(scope, receive, send_with_id)

        try:
            await self._handle(scope, headers, receive, send_with_id)
        except ClientLeft:
            pass
        except asyncio.CancelledError:
            # The time for an orderly end is over, and uvicorn would answer 500.
            await fail(ApiError(503, "The service ends.", "shutting_down"))
        except Exception:
            LOGGER.exception("a request failed")
            await fail(internal_error())
        finally:
            seconds = time.monotonic() - start
            # Never the path itself: it is the client's.
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.count_request(route, status, seconds)
            state = scope["state"]
            say(
                "request",
                request_id=request_id,
                route=route,
                status=status,
                rows=state.get("rows", 0),
                tokens=state.get("tokens", 0),
                milliseconds=round(seconds * 1000, 1),
                **({"finish": state["finish"]} if "finish" in state else {}),
            )

    async def _handle(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive, send: Send) -> None:
        try:
            if scope["path"] not in OPEN_ROUTES:
                check_token(self._settings.token, headers.get(b"authorization"))
            async with asyncio.timeout(self._settings.timeout_seconds):
                body = await read_body(receive, headers, self._settings.max_body_bytes)
        except TimeoutError:
            # What still comes of the body would be taken for the next request.
            late = ApiError(408, "The body did not arrive in time.", "timeout", headers={"Connection": "close"})
            await late.response()(scope, receive, send)
        except ApiError as error:
            await error.response()(scope, receive, send)
        else:
            await self._app(scope, replay(body, receive), send)


class ClientLeft(Exception):  # noqa: N818 - nothing went wrong here
    """Nobody waits for the answer any more."""


def check_token(token: str | None, authorization: bytes | None) -> None:
    """Refuse a request without the token.

    Raises:
        ApiError: 401.
    """
    if token is None:
        return
    scheme, _, given = (authorization or b"").partition(b" ")
    # In time that does not depend on how much of it is right.
    if scheme.lower() != b"bearer" or not hmac.compare_digest(given.strip(), token.encode()):
        message = "The token is absent or wrong: send the header Authorization: Bearer TOKEN."
        raise ApiError(401, message, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})


async def read_body(receive: Receive, headers: dict[bytes, bytes], most_bytes: int) -> bytes:
    """The whole body of a request.

    Raises:
        ApiError: 413, as soon as it is known to be too long.
        ClientLeft: before its end.
    """
    size = int(headers.get(b"content-length", b"0"))
    body = bytearray()
    more = True
    while size <= most_bytes:
        if not more:
            return bytes(body)
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeft
        body += message.get("body", b"")
        size = max(size, len(body))
        more = message.get("more_body", False)
    too_long = f"The body is longer than {most_bytes:,} bytes. Send fewer texts at a time."
    raise ApiError(413, too_long, "body_too_long", headers={"Connection": "close"})


def replay(body: bytes, receive: Receive) -> Receive:
    """What gives a route the body that was read already, and then whatever comes."""
    given = False

    async def replayed() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replayed


async def while_connected(receive: Callable[[], Awaitable[Any]], work: Awaitable[Any]) -> Any:
    """What `work` gives; it is cancelled when the client leaves.

    Args:
        receive: of a request whose body was read.
        work: a future or coroutine.

    Raises:
        ClientLeft: it did.
    """
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeft
        return await working
    finally:
        working.cancel()
        leaving.cancel()


async def _left(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _request_id(headers: dict[bytes, bytes]) -> str:
    given = headers.get(REQUEST_ID.lower().encode(), b"").decode("latin-1")
    # What a proxy gave is kept; anything else could be a text.
    return given if re.fullmatch(r"[A-Za-z0-9._-]{1,64}", given) else secrets.token_hex(8)
