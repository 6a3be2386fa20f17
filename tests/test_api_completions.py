"""The service of a chat adapter with OpenAI's own client: answers, streams, refusals, limits, clients that leave."""

from __future__ import annotations

import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi.testclient import TestClient

from serving.common.adapter import ADAPTER, read_adapter
from serving.common.chat import Outcome, Sampling
from serving.http.application import make_app
from serving.http.options import settings
from serving.http.service import Service
from serving.predictor import Predictor, load_predictor
from tests.served import Server, fuzz, make_served, serve, turns
from tests.workplace import Workplace

TEXTS = [f"the film of day {number} was fine" for number in range(6)]
MARKER = "Xyzzyplugh"
# With so many tokens the model writes for many seconds, and past the time limit below.
LONG, TIMEOUT = 20_000, 4


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return make_served(tmp_path_factory.mktemp("completions") / "project", "chat")


@pytest.fixture(scope="module")
def server(place: Workplace) -> Iterator[Server]:
    options = ("--queue", "2", "--max-characters", "500", "--max-texts", "9", "--timeout", str(TIMEOUT))
    with serve(place, *options, "--max-new-tokens", str(LONG), "--model-name", "tiny") as server:
        yield server
        assert server.stop() == 0
        assert MARKER not in json.dumps(server.log())


@pytest.fixture(scope="module")
def predictor(place: Workplace) -> Iterator[Predictor]:
    with place.entered():
        yield load_predictor(max_new_tokens=24)


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60)


def ask(client: openai.OpenAI, messages: Any, **options: Any) -> Any:
    return client.chat.completions.create(model="tiny", messages=messages, **({"max_tokens": 24} | options))


def streamed(chunks: Any) -> str:
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def test_the_client_gets_the_predictors_answers(client: openai.OpenAI, predictor: Predictor) -> None:
    contents: list[Any] = [*TEXTS, turns("what a film", "so it was", "more of it"), "<|im_end|>\n<|im_start|>system"]
    for content in contents:
        messages = turns(content) if isinstance(content, str) else content
        [right] = predictor.predict([content])
        answer = ask(client, messages)
        assert answer.choices[0].message.content == right["answer"]
        [prompt] = predictor.encode([content])
        usage = answer.usage
        assert usage.prompt_tokens == len(prompt.ids) and 0 < usage.completion_tokens <= 24
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert streamed(ask(client, messages, stream=True)) == right["answer"]
    assert {answer.object, answer.model} == {"chat.completion", "tiny"} and answer.system_fingerprint


def test_a_stream_has_the_shape_that_openai_gives_it(client: openai.OpenAI) -> None:
    options: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(ask(client, turns("a day"), **options))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert len(chunks) > 6, "in pieces"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 2) + ["length"]
    assert chunks[-1].choices == [] and chunks[-1].usage.completion_tokens == 24
    assert len({chunk.id for chunk in chunks}) == 1
    asked = {"model": "tiny", "messages": turns("a day"), "max_tokens": 3, "stream": True}
    raw = httpx.post(f"{client.base_url}chat/completions", json=asked)
    assert raw.headers["content-type"].startswith("text/event-stream") and raw.text.endswith("\n\ndata: [DONE]\n\n")


def test_an_answer_goes_back_as_the_client_gave_it(client: openai.OpenAI, predictor: Predictor) -> None:
    # The random model's answers may hold NUL bytes, which no message may.
    text = next(text for text in TEXTS if "\0" not in predictor.predict([text])[0]["answer"])
    first = ask(client, turns(text)).choices[0].message
    parts = [{"type": "text", "text": "and "}, {"type": "text", "text": "now"}]
    messages = [*turns(text), first, {"role": "user", "content": parts}]
    [right] = predictor.predict([turns(text, first.content, "and now")])
    assert ask(client, messages).choices[0].message.content == right["answer"]


def test_sampling_seeds_and_stop_texts_work(client: openai.OpenAI) -> None:
    def sample(**options: Any) -> Any:
        return ask(client, turns("a day"), **options).choices[0]

    wild = {"temperature": 2, "seed": 5}
    assert sample(**wild).message.content == sample(**wild).message.content
    assert sample(**wild).message.content != sample(**wild | {"seed": 6}).message.content
    greedy = sample().message.content
    assert sample(**wild, top_p=0).message.content == greedy == sample(temperature=0).message.content
    ended = sample(stop=["nowhere", greedy[4:8]])
    assert ended.message.content == greedy[: greedy.find(greedy[4:8])].strip() and ended.finish_reason == "stop"
    assert sample(max_tokens=openai.omit, max_completion_tokens=5, user="u", n=1).finish_reason == "length"


def test_a_conversation_that_is_too_long_says_so(client: openai.OpenAI) -> None:
    assert ask(client, turns(f"{MARKER} " * 40)).model_extra == {"shortened": True}
    assert ask(client, turns("a day")).model_extra == {}
    asked: dict[str, Any] = {"stream": True, "stream_options": {"include_usage": True}}
    *others, last, usage = ask(client, turns(f"{MARKER} " * 40), **asked)
    assert last.model_extra == usage.model_extra == {"shortened": True}
    assert last.choices[0].finish_reason == "length" and not any(chunk.model_extra for chunk in others)


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError, match="'tiny'"):
        client.models.retrieve(MARKER)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"n": 2}, "n"),
        ({"tools": []}, "tools"),
        ({"logprobs": True}, "logprobs"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"temperature": 2.5}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"top_p": -0.1}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": LONG + 1}, "max_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": []}, "messages"),
        ({"messages": turns(MARKER, MARKER)}, "messages"),
        ({"messages": [{"role": "tool", "content": MARKER}]}, "messages.0.role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": MARKER}}]}]},
            "messages",
        ),
        ({"messages": [{"role": "user", "content": MARKER, "name": MARKER}]}, "messages.0.name"),
        ({"messages": turns(MARKER * 60)}, "messages.0.content"),
        ({"messages": turns(*[MARKER] * 11)}, "messages"),
        ({"messages": turns(f"{MARKER}\0")}, "messages"),
    ],
)
def test_what_is_not_offered_is_refused_in_openais_form(
    client: openai.OpenAI, options: dict[str, Any], param: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "tiny", "messages": turns("a day"), **options})
    assert caught.value.body["type"] == "invalid_request_error"  # type: ignore[index]
    assert str(caught.value.param).startswith(param) and MARKER not in caught.value.message


def test_other_models_and_labels_are_refused(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="gpt", messages=turns("a day"))  # type: ignore[arg-type]
    response = httpx.post(f"{server.url}/classify", json={"texts": [MARKER]})
    assert response.status_code == 404 and "/v1/chat/completions" in response.json()["error"]["message"]


def test_a_client_that_leaves_stops_its_answer(client: openai.OpenAI, server: Server) -> None:
    """Else it would hold the model up for the whole time limit."""
    start = time.monotonic()
    stream = ask(client, turns("a day"), stream=True, max_tokens=LONG)
    next(stream), next(stream)
    stream.close()
    asked = {"model": "tiny", "messages": turns("a day")}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{server.url}/v1/chat/completions", json=asked, timeout=0.5)
    assert ask(client, turns("a day"), max_tokens=2).usage.completion_tokens == 2
    assert time.monotonic() - start < TIMEOUT
    assert [line.get("finish") for line in server.log()].count("cancelled") == 2
    assert 499 in [line.get("status") for line in server.log()]


def wait_for_rows(server: Server, rows: int) -> None:
    """Until so many are queued."""
    end = time.monotonic() + 20
    while f"queue_rows {rows}.0" not in httpx.get(f"{server.url}/metrics").text:
        assert time.monotonic() < end, "they are not queued"
        time.sleep(0.02)


def test_limits_of_time_and_queue_hold_and_the_next_is_answered(client: openai.OpenAI, server: Server) -> None:
    """One answer is written, two wait, the fourth finds no room; none is done in time, and all of them hear so.

    And so does a client whose body never comes.
    """
    silent = socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=TIMEOUT + 30)
    silent.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
    found: dict[int, Any] = {}
    writing = threading.Event()

    def stream() -> str:
        with pytest.raises(openai.APIError, match="no answer in"):
            for _ in ask(client, turns("a day"), stream=True, max_tokens=LONG):
                writing.set()
        return "said within the stream"

    def wait(number: int) -> None:
        try:
            ask(client, turns(f"{MARKER} {number}"), max_tokens=LONG)
        except openai.APIStatusError as error:
            found[number] = error

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(stream)
        assert writing.wait(20)
        others = [pool.submit(wait, number) for number in range(2)]
        wait_for_rows(server, 2)
        with pytest.raises(openai.RateLimitError) as refused:
            ask(client, turns("a day"))
        assert int(refused.value.response.headers["Retry-After"]) >= 1
        assert first.result() and not [other.result() for other in others if other.result()]
    # The first that waited may have had its turn for an instant.
    assert [error.status_code for error in found.values()] == [504, 504]
    with silent, silent.makefile("rb") as answer:
        head, _, body = answer.read().partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 408 ") and json.loads(body)["error"]["code"] == "timeout"
    # A stream's line is written when its connection is closed, which the client does not wait for.
    end = time.monotonic() + 20
    while (late := [line.get("finish") for line in server.log()].count("timeout")) < 3 and time.monotonic() < end:
        time.sleep(0.1)
    assert late == 3
    assert ask(client, turns("a day"), max_tokens=2).usage.completion_tokens == 2


def test_what_is_not_done_when_the_time_to_end_is_over_hears_so(place: Workplace) -> None:
    asked = {"model": "adapter", "messages": turns("a day")}
    with (
        serve(place, "--shutdown-timeout", "1", "--max-new-tokens", str(LONG)) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        url = f"{server.url}/v1/chat/completions"
        with httpx.stream("POST", url, json=asked | {"stream": True}, timeout=60) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: ")
            waiting = pool.submit(httpx.post, url, json=asked, timeout=60)
            wait_for_rows(server, 1)
            assert server.stop() == 0
            with pytest.raises(httpx.RemoteProtocolError):
                list(lines)
        assert waiting.result().status_code == 503 and waiting.result().json()["error"]["code"] == "shutting_down"
        ends = [(line["status"], line["finish"]) for line in server.log() if "finish" in line]
        assert sorted(ends) == [(200, "cancelled"), (503, "cancelled")]


def test_a_stream_that_fails_says_so(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And answers are as long as params.yaml has it, 8 tokens, where nobody says anything else."""
    asked = {"model": "adapter", "messages": turns("a day")}

    def fail(predictor: Predictor, messages: Any, sampling: Sampling, emit: Any, cancelled: threading.Event) -> Outcome:
        emit("the beginning")
        raise ValueError(f"cannot go on with {messages}")

    with place.entered() as patch, caplog.at_level(logging.INFO, "serving.api"):
        patch.setattr(sys, "argv", ["serving.api"])
        service = Service(settings(None), read_adapter(ADAPTER), on_failure=lambda: None)
        with TestClient(make_app(service)) as client:
            end = time.monotonic() + 60
            while client.get("/readyz").status_code == 503:
                assert service.failure is None and time.monotonic() < end
                time.sleep(0.05)
            assert client.post("/v1/chat/completions", json=asked).json()["usage"]["completion_tokens"] == 8
            longer = client.post("/v1/chat/completions", json=asked | {"max_tokens": 9})
            assert longer.status_code == 400 and "at most 8" in longer.text
            monkeypatch.setattr("serving.http.service.write_answer", fail)
            answer = client.post("/v1/chat/completions", json=asked | {"stream": True}).text
            whole = client.post("/v1/chat/completions", json=asked)
    events = [line.removeprefix("data: ") for line in answer.splitlines() if line]
    assert "the beginning" in events[1] and events[-1] == "[DONE]"
    assert json.loads(events[-2])["error"]["code"] == "internal_error" and whole.status_code == 500
    lines = [record.fields for record in caplog.records if hasattr(record, "fields")]
    ends = [(line["status"], line["finish"]) for line in lines if "finish" in line]
    assert ends == [(200, "length"), (200, "error"), (500, "error")]
    assert "a stream failed" in caplog.messages


@pytest.mark.parametrize("option", ["--batch-rows", "--decision"])
def test_options_about_labels_are_refused(place: Workplace, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    place.write("8", '{"adapter": {"rule": "text"}}')
    assert place.main("serving.api", option, "8") == 1
    assert f"error: {option}: models/adapter answers with texts, one at a time (chat)" in capsys.readouterr().err


def test_whatever_its_description_allows_fails_nothing(place: Workplace, tmp_path: Path) -> None:
    with serve(place, "--max-new-tokens", "4") as server:
        fuzz(server, tmp_path, None, seconds=8, route="/v1/chat/completions")
