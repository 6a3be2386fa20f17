"""How the service is, for probes, Prometheus and people: no route here needs the model."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.responses import HTMLResponse, PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST

from serving.http.errors import responses
from serving.http.schemas import Status
from serving.http.service import Service


def router(service: Service, app: FastAPI) -> APIRouter:
    """The routes.

    Args:
        service: what is told about.
        app: has the description.
    """
    routes = APIRouter()

    @routes.get("/healthz", summary="The process lives", response_model=Status, responses=responses(405))
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @routes.get("/readyz", summary="The model is loaded", response_model=Status, responses=responses(405, 503))
    async def readyz() -> dict[str, str]:
        service.room()
        return {"status": "ready"}

    @routes.get(
        "/metrics",
        summary="Counters for Prometheus",
        response_class=PlainTextResponse,
        responses=responses(401, 405),
    )
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @routes.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return HTMLResponse(page(app.openapi()))

    return routes


def page(description: dict[str, Any]) -> str:
    """An OpenAPI description for people, in one file of HTML: the usual pages load their scripts from elsewhere."""
    parts = []
    for path, methods in description["paths"].items():
        for method, route in methods.items():
            parts.append(f"<h2><code>{method.upper()} {escape(path)}</code></h2><p>{escape(route['summary'])}</p>")
            if "requestBody" in route:
                content = route["requestBody"]["content"]["application/json"]["schema"]
                parts.append("<h3>Request</h3>" + _schema(content, description))
            for status, answer in route["responses"].items():
                parts.append(f"<h3>{status}</h3><p>{escape(answer['description'])}</p>")
                content = answer.get("content", {}).get("application/json", {}).get("schema")
                if content and status == "200":
                    parts.append(_schema(content, description))
    title = escape(description["info"]["title"])
    head = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
    about = escape(description["info"]["description"])
    intro = f'<h1>{title}</h1><p>{about}</p><p><a href="openapi.json">openapi.json</a></p>'
    return head + "<body>" + intro + "".join(parts) + "</body></html>"


def _schema(content: dict[str, Any], description: dict[str, Any]) -> str:
    return f"<pre>{escape(json.dumps(_resolved(content, description), indent=2, ensure_ascii=False))}</pre>"


def _resolved(value: Any, description: dict[str, Any]) -> Any:
    """A schema with the schemas that it names in their places; none names itself."""
    if isinstance(value, list):
        return [_resolved(part, description) for part in value]
    if not isinstance(value, dict):
        return value
    if "$ref" in value:
        return _resolved(description["components"]["schemas"][value["$ref"].rpartition("/")[2]], description)
    return {key: _resolved(part, description) for key, part in value.items() if key != "title"}
