"""Requests and answers as the OpenAPI description has them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt

from serving.common.chat import HIGHEST_TEMPERATURE, SEEDS

MOST_STOP_TEXTS = 4  # as OpenAI's API has it
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]


class Request(BaseModel):
    """Unknown fields are refused, not left out."""

    model_config = ConfigDict(extra="forbid")


class Model(BaseModel):
    """What answered.

    Attributes:
        version: a digest of the adapter's files, its base's and its decision rule.
    """

    name: str
    version: str


class ClassifyRequest(Request):
    """Texts to label."""

    texts: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)] = Field(
        examples=[["what a lovely day", "never again"]]
    )


class Answer(BaseModel):
    """The labels of a text, with what they were decided on; which keys there are depends on the task."""

    label: str | None = None
    labels: list[str] | None = None
    probabilities: dict[str, float]
    threshold: float | None = None
    positive_label: str | None = None
    thresholds: dict[str, float] | None = None
    shortened: bool | None = Field(None, description="true: the text was too long, and its end was left out")


class ClassifyAnswer(BaseModel):
    """An answer for each text, in order."""

    model: Model
    answers: list[Answer]


class Part(Request):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(Request):
    """A turn of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]


class StreamOptions(Request):
    """What a stream tells beside the answer."""

    include_usage: StrictBool = False


class ChatRequest(Request):
    """OpenAI's request, as far as this service can do what it asks for; null is as good as absent."""

    model: str = Field(description="as GET /v1/models names it")
    messages: list[ChatMessage] = Field(min_length=1, examples=[[{"role": "user", "content": "Hello"}]])
    temperature: Annotated[Number, Field(ge=0, le=HIGHEST_TEMPERATURE)] | None = Field(
        None, description="0, the default: the likeliest token always, as the metrics are about"
    )
    top_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    stop: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=MOST_STOP_TEXTS)]
        | None
    ) = None
    seed: Annotated[StrictInt, Field(ge=SEEDS.start, lt=SEEDS.stop)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    # Whatever else clients send of their own accord, at the values that mean nothing.
    n: Annotated[StrictInt, Field(ge=1, le=1)] | None = None
    presence_penalty: Annotated[Number, Field(ge=0, le=0)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=0, le=0)] | None = None
    logprobs: StrictBool | None = Field(None, description="true is refused")
    user: str | None = None


class Usage(BaseModel):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AnswerMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"]
    content: str


class Choice(BaseModel):
    """The one answer that there is."""

    index: Literal[0]
    message: AnswerMessage
    logprobs: None
    finish_reason: Literal["stop", "length"]


class ChatAnswer(BaseModel):
    """OpenAI's answer; `system_fingerprint` is the model's version."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage
    shortened: bool | None = Field(None, description="true: the conversation was too long; its oldest turns are out")


class ModelEntry(BaseModel):
    """A model, as OpenAI describes one."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(BaseModel):
    """The one model that there is."""

    object: Literal["list"]
    data: list[ModelEntry]


class Status(BaseModel):
    """How the service is."""

    status: Literal["ok", "ready"]


# Of each event: a chunk as OpenAI's API has it, in JSON, or [DONE].
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
STREAM = {"text/event-stream": {"schema": _EVENT}}


def ok(description: str, **content: Any) -> dict[int | str, dict[str, Any]]:
    """What a route declares of its good answer."""
    return {200: {"description": description, **content}}
