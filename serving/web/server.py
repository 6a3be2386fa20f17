"""The page served on this machine: nothing loaded from elsewhere, nobody told about it, and everything limited."""

from __future__ import annotations

import hmac
import os
import signal
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any

from serving.predictor import Predictor
from serving.web.inputs import MOST_FILE_MIB

# Events that wait for the model, each somebody's click.
MOST_WAITING = 16
MOST_BODY_BYTES = 16 * 1024 * 1024
MOST_SESSIONS = 100
SECONDS_TO_FINISH = 3
# Pages that Gradio makes run scripts in their text, and its HTML component compiles templates.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
    "form-action 'self'; frame-ancestors 'self'"
)
HEADERS = [
    (b"content-security-policy", POLICY.encode()),
    (b"referrer-policy", b"no-referrer"),
    (b"x-content-type-options", b"nosniff"),
]


@contextmanager
def private_folder() -> Iterator[Path]:
    """A folder for what is uploaded and downloaded, gone with the server; and Gradio told to keep to itself.

    It has to be open before Gradio is imported.
    """
    # So that a service manager ends the app as Ctrl-C does, the folder removed.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="app-") as name:
        os.environ |= {
            "GRADIO_TEMP_DIR": str(Path(name, "gradio")),
            "GRADIO_ANALYTICS_ENABLED": "False",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }
        folder = Path(name, "offered")
        folder.mkdir()
        yield folder


def make_app(predictor: Predictor, folder: Path, password: str | None) -> Any:
    """The whole application, an ASGI callable.

    Args:
        predictor: of any adapter; of a chat or question answering one as `load_for_page` gives it.
        folder: from `private_folder`.
        password: that a login asks for; None: no login.
    """
    import gradio as gr
    from fastapi import FastAPI

    from serving.web import chat_page, classify_page
    from serving.web.events import ending
    from serving.web.look import CSS, TITLES, heading, theme

    title = TITLES[predictor.adapter.kind]
    with gr.Blocks(title=title, analytics_enabled=False, delete_cache=(300, 3600)) as blocks:
        gr.HTML(heading(title, predictor.adapter), apply_default_css=False)
        if predictor.adapter.answers_with_texts:
            chat_page.build(predictor, blocks)
        else:
            classify_page.build(predictor, folder)
    blocks.queue(max_size=MOST_WAITING, api_open=False)
    blocks.state_session_capacity = MOST_SESSIONS

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        # Whatever still runs ends at its next step.
        ending.set()

    app = gr.mount_gradio_app(
        FastAPI(lifespan=lifespan, openapi_url=None), blocks, path="/",
        auth=None if password is None else lambda _, given: hmac.compare_digest(given.encode(), password.encode()),
        auth_message="Any user name, and the password that this app was started with.",
        allowed_paths=[str(folder)], max_file_size=MOST_FILE_MIB * 1024 * 1024,
        theme=theme(), css_paths=CSS,
        # Gradio's links, its history in the browser, and whatever GRADIO_… variables may ask for.
        footer_links=[], run_history=False, show_error=False, enable_monitoring=False,
        ssr_mode=False, pwa=False, mcp_server=False,
    )  # fmt: skip
    return guarded(app)


class TooLongError(Exception):
    """More was sent than MOST_BODY_BYTES."""


def guarded(app: Any) -> Any:
    """The application with a limit on what is sent to it and a policy that forbids its pages to load from elsewhere."""

    async def call(scope: Any, receive: Any, send: Any) -> None:
        # What was announced, or what came, since nobody has to announce anything.
        announced, received = int(dict(scope.get("headers", [])).get(b"content-length", 0)), 0

        async def receive_counted() -> Any:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > MOST_BODY_BYTES:
                raise TooLongError
            return message

        async def send_with_policy(message: Any) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *HEADERS]
                # However the application takes the exception.
                message["status"] = 413 if received > MOST_BODY_BYTES else message["status"]
            await send(message)

        if scope["type"] != "http":
            await app(scope, receive, send)
        elif announced > MOST_BODY_BYTES:
            await send({"type": "http.response.start", "status": 413, "headers": []})
            await send({"type": "http.response.body", "body": b"too large"})
        else:
            with suppress(TooLongError):
                await app(scope, receive_counted, send_with_policy)

    return call


def serve(app: Any, listener: socket.socket) -> None:
    """Serve until Ctrl-C or SIGTERM; what is being answered then has a moment to finish."""
    import uvicorn

    server = uvicorn.Server(
        uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=SECONDS_TO_FINISH, lifespan="on")
    )
    with suppress(KeyboardInterrupt):
        server.run(sockets=[listener])
