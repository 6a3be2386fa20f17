"""The service as an ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException

from serving.http import classify, completions, health
from serving.http.errors import ApiError, on_api_error, on_http_error, on_invalid_request
from serving.http.middleware import Guard
from serving.http.service import Service


def make_app(service: Service) -> FastAPI:
    """The application, which loads the model when it starts.

    Args:
        service: not started.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.start()
        yield
        await service.stop()

    app = FastAPI(
        title="A fine-tuned adapter",
        description="Labels of texts, or answers in chats; an adapter gives the one or the other.",
        version="1",
        lifespan=lifespan,
        # Both pages load scripts from elsewhere; /docs is our own.
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    # What the guard checks, told to whoever reads the description.
    secured = [Depends(HTTPBearer(auto_error=False))] if service.settings.token else []
    for routes in (classify.router(service), completions.router(service)):
        app.include_router(routes, dependencies=secured)
    app.include_router(health.router(service, app))
    app.add_exception_handler(ApiError, on_api_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(RequestValidationError, on_invalid_request)
    app.add_middleware(Guard, settings=service.settings, metrics=service.metrics)
    add_limits(app.openapi(), service)
    return app


def add_limits(description: dict[str, Any], service: Service) -> None:
    """Say in an OpenAPI description, in place, what this service in particular takes.

    Args:
        description: FastAPI's own, which it makes once and keeps.
        service: has the limits.
    """
    settings = service.settings
    fields = {name: schema.get("properties", {}) for name, schema in description["components"]["schemas"].items()}
    texts, chat = fields["ClassifyRequest"]["texts"], fields["ChatRequest"]
    texts["maxItems"] = chat["messages"]["maxItems"] = settings.max_texts
    # Neither empty nor with a NUL byte in it.
    texts["items"] |= {"maxLength": settings.max_characters, "pattern": "^[^\\u0000]*[^\\s\\u0000][^\\u0000]*$"}
    chat["model"]["enum"] = [settings.name]
    for name in ("max_tokens", "max_completion_tokens"):
        chat[name]["anyOf"][0]["maximum"] = service.longest_answer
