"""`POST /classify`: labels of texts."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from fastapi.responses import JSONResponse

from serving.http.errors import ApiError, responses
from serving.http.schemas import ClassifyAnswer, ClassifyRequest, ok
from serving.http.service import Service
from stages.common.sources.cells import RefusedRow, require_characters


def router(service: Service) -> APIRouter:
    """The route.

    Args:
        service: what answers.
    """
    routes = APIRouter()

    @routes.post(
        "/classify",
        summary="Label texts",
        response_model=ClassifyAnswer,
        responses=ok("An answer for each text, in order.")
        | responses(400, 401, 404, 405, 408, 413, 422, 429, 500, 503, 504),
    )
    async def classify(request: Request, asked: Annotated[ClassifyRequest, Body()]) -> JSONResponse:
        if service.adapter.answers_with_texts:
            message = "This adapter answers with texts: POST /v1/chat/completions."
            raise ApiError(404, message, "wrong_task")
        texts = check_texts(asked.texts, service.settings.max_texts, service.settings.max_characters)
        request.state.rows = len(texts)
        found = await service.answers(request.receive, texts)
        request.state.tokens = tokens = sum(tokens for _, tokens in found)
        service.metrics.count_answers(len(texts), tokens)
        return JSONResponse({"model": model_of(service), "answers": [answer for answer, _ in found]})

    return routes


def model_of(service: Service) -> dict[str, Any]:
    """What answers name as the model."""
    return {"name": service.settings.name, "version": service.version}


def check_texts(texts: list[str], most: int, most_characters: int) -> list[str]:
    """The texts without white space around them, as `ingest` takes it off.

    Args:
        texts: of one request.
        most: how many may be sent at a time.
        most_characters: of a text.

    Raises:
        ApiError: 422, there are too many, or one is too long, empty, or holds what no text can hold.
    """
    if len(texts) > most:
        message = f"texts: {len(texts):,} are more than {most:,}. Send them in several requests."
        raise ApiError(422, message, "too_many_texts", "texts")
    return [_checked(text, f"texts.{index}", most_characters) for index, text in enumerate(texts)]


def _checked(text: str, param: str, most_characters: int) -> str:
    if len(text) > most_characters:
        message = f"{param}: has {len(text):,} characters, and at most {most_characters:,} are taken."
        raise ApiError(422, message, "text_too_long", param)
    stripped = text.strip()
    if not stripped:
        raise ApiError(422, f"{param}: is empty, so there is nothing to answer.", "empty_text", param)
    try:
        require_characters(stripped, "text")
    except RefusedRow as refused:
        raise ApiError(422, f"{param}: {refused.reason}.", "invalid_characters", param) from None
    return stripped
