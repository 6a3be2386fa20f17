"""`POST /v1/chat/completions` and `GET /v1/models`, as OpenAI's clients use them."""

from __future__ import annotations

import asyncio
import json
import secrets
import threading
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from serving.common.chat import Outcome, Sampling, check_messages
from serving.http.errors import ApiError, internal_error, responses
from serving.http.logs import LOGGER
from serving.http.middleware import while_connected
from serving.http.schemas import STREAM, ChatAnswer, ChatRequest, ModelEntry, ModelList, ok
from serving.http.service import Conversation, Service
from stages.common.errors import UserError
from stages.common.prompting.conversations import Message


def router(service: Service) -> APIRouter:
    """The routes.

    Args:
        service: what answers.
    """
    routes = APIRouter(prefix="/v1")

    @routes.post(
        "/chat/completions",
        summary="Answer a conversation or a question",
        response_model=ChatAnswer,
        responses=ok("The answer; with stream: true server-sent events, the last one [DONE].", content=STREAM)
        | responses(400, 401, 404, 405, 408, 413, 429, 500, 503, 504),
    )
    async def complete(request: Request, asked: Annotated[ChatRequest, Body()]) -> Response:
        _require_model(service, asked.model)
        if not service.adapter.answers_with_texts:
            message = "This adapter answers with labels: POST /classify."
            raise ApiError(404, message, "wrong_task")
        messages, sampling = _messages(service, asked), _sampling(service, asked)
        request.state.rows = 1
        pending = _Pending(service, request, messages, sampling)
        head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": service.settings.name,
            "system_fingerprint": service.version,
        }
        # What goes wrong before the first piece still has a status of its own.
        first = await pending.next_piece(request)
        if asked.stream:
            usage = asked.stream_options is not None and asked.stream_options.include_usage
            return StreamingResponse(_events(pending, first, head, usage), media_type="text/event-stream")
        return JSONResponse(await _whole(pending, first, head, request))

    @routes.get("/models", summary="The model", response_model=ModelList, responses=responses(401, 405, 503))
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_entry(service)]}

    @routes.get(
        "/models/{model}", summary="The model", response_model=ModelEntry, responses=responses(401, 404, 405, 503)
    )
    async def model(model: str) -> dict[str, Any]:
        _require_model(service, model)
        return _entry(service)

    return routes


class _Pending:
    """An answer that is queued or being generated."""

    def __init__(self, service: Service, request: Request, messages: list[Message], sampling: Sampling) -> None:
        self._service = service
        self._state = request.state
        self._cancelled = threading.Event()
        self._deadline = asyncio.get_running_loop().time() + service.settings.timeout_seconds
        self._pieces: asyncio.Queue[str | None] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def emit(piece: str) -> None:
            loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

        [self._row] = service.put([Conversation(messages, sampling, emit, self._cancelled)])
        # So it stays where the client leaves, or the service ends.
        self._state.finish = "cancelled"
        self._row.add_done_callback(lambda _: self._pieces.put_nowait(None))

    async def next_piece(self, request: Request | None = None) -> str | None:
        """The next piece; None at the end, when the outcome is known.

        Args:
            request: is watched for its client to leave; None: somebody else does that.

        Raises:
            ApiError: 504, or 400 where the conversation cannot be put into the model's words.
            ClientLeft: it did.
        """
        try:
            async with asyncio.timeout_at(self._deadline):
                piece = self._pieces.get()
                found: str | None = await (while_connected(request.receive, piece) if request else piece)
        except TimeoutError:
            self._state.finish = "timeout"
            self.cancel()
            raise self._service.late() from None
        except BaseException:
            self.cancel()
            raise
        if found is None:
            self._finish()
        return found

    @property
    def outcome(self) -> Outcome:
        """What became of it, after the last piece."""
        outcome: Outcome = self._row.result()
        return outcome

    def _finish(self) -> None:
        self._state.finish = "error"
        try:
            outcome = self.outcome
        except UserError as error:
            raise ApiError(400, str(error), "invalid_request", "messages") from None
        self._state.finish = outcome.finish_reason
        self._state.tokens = outcome.prompt_tokens + outcome.answer_tokens
        self._service.metrics.count_answers(1, outcome.prompt_tokens, outcome.answer_tokens)

    def cancel(self) -> None:
        """End it, or take it out of the queue."""
        self._cancelled.set()
        self._row.cancel()


async def _whole(pending: _Pending, piece: str | None, head: dict[str, Any], request: Request) -> dict[str, Any]:
    pieces = []
    while piece is not None:
        pieces.append(piece)
        piece = await pending.next_piece(request)
    outcome = pending.outcome
    message = {"role": "assistant", "content": "".join(pieces)}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": outcome.finish_reason}
    answer = head | {"object": "chat.completion", "choices": [choice], "usage": _usage(outcome)}
    return answer | _shortened(outcome)


async def _events(pending: _Pending, piece: str | None, head: dict[str, Any], usage: bool) -> AsyncIterator[str]:
    """Server-sent events: the role, pieces, why it ended, maybe the tokens; or an error in their midst."""
    head = head | {"object": "chat.completion.chunk"}

    def chunk(delta: dict[str, str], finish: str | None = None) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        return _event(head | {"choices": [choice]})

    try:
        yield chunk({"role": "assistant", "content": ""})
        while piece is not None:
            yield chunk({"content": piece})
            piece = await pending.next_piece()
        outcome = pending.outcome
        head |= _shortened(outcome)
        yield chunk({}, outcome.finish_reason)
        if usage:
            yield _event(head | {"choices": [], "usage": _usage(outcome)})
    except ApiError as error:
        yield _event({"error": error.detail.model_dump()})
    except Exception:
        # The status is sent already, and an end without a word could be taken for the answer's.
        LOGGER.exception("a stream failed")
        yield _event({"error": internal_error().detail.model_dump()})
    finally:
        pending.cancel()
    yield "data: [DONE]\n\n"


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value)}\n\n"


def _shortened(outcome: Outcome) -> dict[str, bool]:
    return {"shortened": True} if outcome.shortened else {}


def _usage(outcome: Outcome) -> dict[str, int]:
    read, written = outcome.prompt_tokens, outcome.answer_tokens
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def _messages(service: Service, asked: ChatRequest) -> list[Message]:
    """The messages as `ingest` would take them.

    Raises:
        ApiError: 400, there are too many, one is too long, or their order or contents are not such as are answered.
    """
    settings = service.settings
    if len(asked.messages) > settings.max_texts:
        raise ApiError(400, f"messages: more than {settings.max_texts:,} are not taken.", "too_many_texts", "messages")
    messages = []
    for index, message in enumerate(asked.messages):
        content = message.content
        text = content if isinstance(content, str) else "".join(part.text for part in content)
        if len(text) > settings.max_characters:
            too_long = (
                f"messages.{index}: has {len(text):,} characters, and at most {settings.max_characters:,} are taken."
            )
            raise ApiError(400, too_long, "text_too_long", f"messages.{index}.content")
        messages.append({"role": message.role, "content": text})
    try:
        return check_messages(service.adapter.kind, messages)
    except UserError as error:
        raise ApiError(400, str(error), "invalid_request", "messages") from None


def _sampling(service: Service, asked: ChatRequest) -> Sampling:
    """How tokens are to be drawn.

    Raises:
        ApiError: 400, options contradict each other or ask for more than there is.
    """
    limits = {asked.max_tokens, asked.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise ApiError(
            400, "max_tokens and max_completion_tokens differ. Leave one out.", "invalid_request", "max_tokens"
        )
    most = service.longest_answer
    limit = limits.pop() if limits else most
    assert limit is not None
    if limit > most:
        message = f"{limit:,} tokens are asked for, and this service gives at most {most:,}."
        raise ApiError(400, message, "answer_too_long", "max_tokens")
    stop = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())
    if asked.logprobs:
        raise ApiError(400, "logprobs: are not offered here; leave it out.", "invalid_request", "logprobs")
    if asked.stream_options is not None and not asked.stream:
        raise ApiError(400, "stream_options: are for stream: true.", "invalid_request", "stream_options")
    top_p = 1.0 if asked.top_p is None else asked.top_p
    return Sampling(asked.temperature or 0.0, top_p, limit, stop, asked.seed)


def _require_model(service: Service, name: str) -> None:
    if name != service.settings.name:
        message = f"There is no such model here; this service has {service.settings.name!r} (GET /v1/models)."
        raise ApiError(404, message, "model_not_found", "model")


def _entry(service: Service) -> dict[str, Any]:
    service.room()
    return {"id": service.settings.name, "object": "model", "created": service.loaded_at, "owned_by": "local"}
