"""The real service on a free port: right answers to the right clients, limits, refusals, logs, and an orderly end."""

from __future__ import annotations

import asyncio
import json
import re
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from serving.common.adapter import ADAPTER, read_adapter
from serving.common.listening import listen
from serving.http.application import make_app
from serving.http.options import settings
from serving.http.service import Service, version_of
from serving.predictor import Predictor, load_predictor
from stages.common.errors import UserError
from tests.served import LABELS, Server, fuzz, make_served, serve
from tests.workplace import Workplace

TOKEN = "a-token-of-the-tests"
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
MARKER = "Xyzzyplugh"
# Answers of a text alone and of the same text in a batch: float32 adds up in another order.
ROUNDING = 1e-5
CLIENTS = 64
DECISION = {"rule": "threshold", "positive_label": "good", "threshold": 0.3, "method": "fixed"}
Known = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """An adapter with two labels and a threshold."""
    place = make_served(tmp_path_factory.mktemp("api") / "project", "classification")
    prompt_format = json.loads((place.folder / "models/adapter/prompt.json").read_text())
    place.write("models/adapter/prompt.json", json.dumps(prompt_format | {"labels": ["good", "bad"]}))
    place.write("models/decision.json", json.dumps({"adapter": DECISION}))
    return place


@pytest.fixture(scope="module")
def predictor(place: Workplace) -> Iterator[Predictor]:
    with place.entered():
        yield load_predictor()


@pytest.fixture(scope="module")
def known(predictor: Predictor) -> Known:
    """Texts with their right answers, no two of which could be taken for each other."""
    texts = [f"the film of day {number} was {number % 7} and {number % 11}" for number in range(2_000)]
    found: Known = {}
    taken: set[int] = set()
    for text, answer in zip(texts, predictor.predict(texts), strict=True):
        place = int(answer["probabilities"]["good"] / (10 * ROUNDING))
        if taken.isdisjoint((place - 1, place, place + 1)):
            found[text] = answer
            taken.add(place)
    assert len(found) >= 2 * CLIENTS, "enough for each client"
    return found


@pytest.fixture(scope="module")
def server(place: Workplace) -> Iterator[Server]:
    with serve(
        place, "--queue", "300", "--max-characters", "500", "--max-body-bytes", "20000", API_TOKEN=TOKEN
    ) as server:
        yield server
        assert server.stop() == 0


@pytest.fixture
def client(server: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, headers=HEADERS, timeout=60) as client:
        yield client


def same(found: dict[str, Any], right: dict[str, Any]) -> bool:
    """Whether an answer is the right one up to rounding."""
    return found | {"probabilities": None} == right | {"probabilities": None} and all(
        abs(found["probabilities"][label] - probability) < ROUNDING
        for label, probability in right["probabilities"].items()
    )


# --- answers ----------------------------------------------------------------------------------------------------------


def test_answers_are_the_predictors_own_in_order(client: httpx.Client, predictor: Predictor, known: Known) -> None:
    texts = [*list(known)[:100], "a long film " * 40, " a day\n", "<|im_end|>"]
    answer = client.post("/classify", json={"texts": texts}).json()
    assert answer["model"] == {"name": "adapter", "version": version_of(predictor.adapter)}
    right = predictor.predict([text.strip() for text in texts])
    assert all(map(same, answer["answers"], right)) and len(answer["answers"]) == len(right)
    assert {"label", "probabilities", "threshold", "positive_label"} == set(answer["answers"][0])
    assert {one["label"] for one in answer["answers"]} == {"good", "bad"}
    assert any(one["label"] != max(one["probabilities"], key=one["probabilities"].get) for one in answer["answers"]), (
        "the threshold decides, not the likelier label"
    )


def test_64_clients_at_once_each_get_their_own_answers(server: Server, known: Known) -> None:
    texts = list(known)
    sizes: list[int] = []

    async def one(number: int, client: httpx.AsyncClient, end: float) -> int:
        own, done = texts[number::CLIENTS], 0
        while time.monotonic() < end or not done:
            asked = own[done % len(own) :][: 1 + (number + done) % 3]
            response = await client.post("/classify", json={"texts": asked})
            assert response.status_code == 200, response.text
            answers = response.json()["answers"]
            assert len(answers) == len(asked)
            for text, answer in zip(asked, answers, strict=True):
                assert same(answer, known[text]), f"{text}: {answer}, not {known[text]}"
            sizes.append(len(asked))
            done += 1
        return done

    async def all_of_them() -> list[int]:
        async with httpx.AsyncClient(
            base_url=server.url, headers=HEADERS, timeout=60, limits=httpx.Limits(max_connections=CLIENTS)
        ) as client:
            return await asyncio.gather(*(one(number, client, time.monotonic() + 3) for number in range(CLIENTS)))

    done = asyncio.run(all_of_them())
    assert min(done) >= 1 and sum(done) == len(sizes)
    metrics = httpx.get(f"{server.url}/metrics", headers=HEADERS).text
    batches = float(re.findall(r"^batch_rows_count (.*)$", metrics, re.M)[0])
    rows = float(re.findall(r"^batch_rows_sum (.*)$", metrics, re.M)[0])
    assert rows / batches > 2.5, "clients share the model's calls"


def test_a_change_of_whatever_decides_changes_the_version(
    place: Workplace, predictor: Predictor, tmp_path: Path
) -> None:
    first = version_of(predictor.adapter)
    assert first == version_of(predictor.adapter._replace(rule=dict(reversed(DECISION.items()))))
    assert first != version_of(predictor.adapter._replace(rule=None))
    copy = make_copy(place, tmp_path)
    there = predictor.adapter._replace(folder=copy.folder / "models/adapter")
    copy.write("models/adapter/README.md", "for people")
    assert version_of(there) == first
    base = json.loads((copy.folder / "models/adapter/base.json").read_text())
    copy.write("models/adapter/base.json", json.dumps(base | {"source": "elsewhere"}))
    assert version_of(there) == first
    copy.write("models/adapter/base.json", json.dumps(base | {"files": {"a": "b"}}))
    assert version_of(there) != first


def make_copy(place: Workplace, folder: Path) -> Workplace:
    import shutil

    return Workplace(Path(shutil.copytree(place.folder, folder / "project")))


# --- refusals ---------------------------------------------------------------------------------------------------------

REFUSED: list[tuple[str | bytes, int]] = [
    ("", 422),
    ("null", 422),
    ("[]", 422),
    ('{"texts": []}', 422),
    ('{"texts": "%s"}', 422),
    ('{"texts": ["%s", ""]}', 422),
    ('{"texts": ["%s", " \\n"]}', 422),
    ('{"texts": ["%s \\u0000"]}', 422),
    ('{"texts": ["%s \\ud800"]}', 422),
    ('{"texts": ["%s"], "\\ud800 %s": 1}', 422),
    ('{"texts": ["%s", 1]}', 422),
    ('{"texts": ["%s"], "n": NaN}', 422),
    ('{"texts": [-Infinity, "%s"]}', 422),
    ('{"texts": [1' + "0" * 5000 + ', "%s"]}', 422),
    ('{"texts": ["%s' + "x" * 500 + '"]}', 422),
    (json.dumps({"texts": ["%s"] * 257}), 422),
    ('{"texts": ["%s"', 422),
    ('{"texts": ' + "[" * 9000 + '"%s"', 422),
    (b"\xff\xfe%s", 422),
    (b'{"texts": ["%s \xff"]}', 422),
    ('{"texts": ["%s"]}' + " " * 20_000, 413),
]


@pytest.mark.parametrize(("body", "status"), REFUSED)
def test_what_cannot_be_answered_is_refused_in_one_form(client: httpx.Client, body: str | bytes, status: int) -> None:
    raw = (body if isinstance(body, bytes) else body.encode()).replace(b"%s", MARKER.encode())
    response = client.post("/classify", content=raw, headers={"Content-Type": "application/json"})
    assert response.status_code in ({400, 422} if status == 422 else {status}), response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}
    assert MARKER not in response.json()["error"]["message"] or "unknown here" in response.text


def test_a_body_without_a_length_is_counted_too(client: httpx.Client) -> None:
    parts = (b" " * 1000 for _ in range(100))
    assert client.post("/classify", content=parts).status_code == 413


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data", "x", ""])
def test_other_content_types_are_refused(client: httpx.Client, kind: str) -> None:
    response = client.post("/classify", content=b'{"texts": ["a"]}', headers={"Content-Type": kind})
    assert response.status_code == 422


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", f"/{MARKER}", 404, "route_not_found"),
        ("GET", "/classify", 405, "method_not_allowed"),
        ("POST", "/classify/", 404, "route_not_found"),
        (MARKER.upper(), "/classify", 405, "method_not_allowed"),
        ("GET", f"/v1/models/{MARKER}", 404, "model_not_found"),
    ],
)
def test_other_routes_and_methods_are_refused(
    client: httpx.Client, method: str, path: str, status: int, code: str
) -> None:
    response = client.request(method, path, params={"q": MARKER})
    assert (response.status_code, response.json()["error"]["code"]) == (status, code)


def test_this_adapter_answers_no_chats(client: httpx.Client) -> None:
    asked = {"model": "adapter", "messages": [{"role": "user", "content": MARKER}]}
    response = client.post("/v1/chat/completions", json=asked)
    assert response.status_code == 404 and "POST /classify" in response.json()["error"]["message"]


def test_only_the_token_opens(server: Server) -> None:
    for value in (None, "", TOKEN, "Bearer", f"Bearer {TOKEN}x", f"Basic {TOKEN}", "Bearer \xe9"):
        headers = {} if value is None else {b"Authorization": value.encode("latin-1")}
        for path in ("/classify", "/metrics", "/v1/models", "/docs", "/openapi.json", "/nothing"):
            response = httpx.get(server.url + path, headers=headers)
            assert response.status_code == 401 and response.headers["WWW-Authenticate"] == "Bearer"
            assert response.json()["error"]["code"] == "invalid_api_key"
        for path in ("/healthz", "/readyz"):
            assert httpx.get(server.url + path, headers=headers).status_code == 200
    assert httpx.get(f"{server.url}/metrics", headers={"Authorization": f"bearer {TOKEN}"}).status_code == 200


def test_whatever_its_description_allows_fails_nothing(server: Server, tmp_path: Path) -> None:
    fuzz(server, tmp_path, TOKEN, seconds=8, route="/classify")


# --- what is told about it --------------------------------------------------------------------------------------------


def test_the_description_and_its_page_need_no_network(client: httpx.Client) -> None:
    description = client.get("/openapi.json").json()
    assert {"/classify", "/v1/chat/completions", "/v1/models", "/healthz", "/readyz", "/metrics"} <= set(
        description["paths"]
    )
    page = client.get("/docs").text
    assert not re.search(r"(src|href)=[\"']?(https?:)?//|<script|<link|@import", page)
    assert all(path in page for path in description["paths"]) and "texts" in page


def test_metrics_count_what_was_done(client: httpx.Client) -> None:
    def values() -> dict[str, float]:
        lines = [line for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    before = values()
    client.post("/classify", json={"texts": ["a", "b", "c"]})
    after = values()
    name = 'http_requests_total{route="/classify",status="200"}'
    assert after[name] == before[name] + 1
    assert after["rows_total"] == before["rows_total"] + 3
    assert after['tokens_total{direction="read"}'] > before['tokens_total{direction="read"}'] + 3
    assert after["batch_rows_sum"] == before["batch_rows_sum"] + 3
    assert (
        after['http_request_seconds_count{route="/classify"}'] > before['http_request_seconds_count{route="/classify"}']
    )
    assert after["queue_rows"] == 0


def test_logs_say_what_happened_and_never_a_text(server: Server, client: httpx.Client) -> None:
    """All that a client can write into a request holds the marker."""
    good = {"texts": [MARKER, f"{MARKER} {MARKER}"]}
    response = client.post("/classify", json=good, headers={"X-Request-ID": "from.a-proxy_1"}, params={"q": MARKER})
    assert response.headers["X-Request-ID"] == "from.a-proxy_1"
    wrong = client.post("/classify", json=good | {MARKER: 1}, headers={"X-Request-ID": f"{MARKER} {MARKER}"})
    assert re.fullmatch("[0-9a-f]{16}", wrong.headers["X-Request-ID"])
    for body, _ in REFUSED:
        raw = body if isinstance(body, bytes) else body.encode()
        client.post("/classify", content=raw.replace(b"%s", MARKER.encode()))
    client.request(MARKER, f"/{MARKER}", headers={"Authorization": MARKER, MARKER: MARKER})
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as connection:
        connection.sendall(f"{MARKER}\r\n\r\n".encode())
        connection.recv(1000)
    time.sleep(0.2)  # a line is written after its answer
    log = server.log()
    assert MARKER.casefold() not in json.dumps(log).casefold() and TOKEN not in json.dumps(log)
    [line] = [line for line in log if line.get("request_id") == "from.a-proxy_1"]
    assert (line["route"], line["status"], line["rows"], line["event"]) == ("/classify", 200, 2, "request")
    assert line["tokens"] > 10 and line["milliseconds"] > 0 and line["time"].endswith("+00:00")


# --- too much, and the end --------------------------------------------------------------------------------------------


def test_a_full_queue_refuses_and_loses_nothing(place: Workplace, known: Known) -> None:
    """And a signal in the midst of it: what was taken is answered, and the exit code is 0."""
    texts = list(known)
    statuses: list[int] = []
    answered: list[str] = []

    async def one(number: int, client: httpx.AsyncClient) -> None:
        for _ in range(1000):
            asked = texts[number::CLIENTS][:8]
            try:
                response = await client.post("/classify", json={"texts": asked})
            except httpx.NetworkError:
                return  # it takes no more; that it never took this one, the log says below
            statuses.append(response.status_code)
            if response.status_code == 429:
                assert int(response.headers["Retry-After"]) >= 1
                assert response.json()["error"]["code"] == "queue_full"
                await asyncio.sleep(0.01)
                continue
            assert response.status_code == 200, response.text
            assert all(same(a, known[t]) for a, t in zip(response.json()["answers"], asked, strict=True))
            answered.append(asked[0])

    async def all_of_them(server: Server) -> None:
        async with httpx.AsyncClient(
            base_url=server.url, timeout=60, limits=httpx.Limits(max_connections=CLIENTS)
        ) as client:
            clients = [asyncio.create_task(one(number, client)) for number in range(CLIENTS)]
            await asyncio.sleep(2)
            server.process.send_signal(signal.SIGINT)
            await asyncio.gather(*clients)

    with serve(place, "--batch-rows", "2", "--queue", "16", "--max-texts", "8") as server:
        asyncio.run(all_of_them(server))
        assert server.process.wait(30) == 0
        log = server.log()
    assert log[-1]["event"] == "ended"
    assert statuses.count(429) > 10 and statuses.count(200) == len(answered) > 10
    logged = [line["status"] for line in log if line["event"] == "request"]
    assert {status: logged.count(status) for status in set(logged)} == {
        status: statuses.count(status) for status in set(statuses)
    }


def test_several_labels_are_the_predictors_own(tmp_path: Path) -> None:
    place = make_served(tmp_path / "project", "multi_label")
    texts = [f"the film of day {number}" for number in range(40)]
    with place.entered() as patch:
        patch.setattr(sys, "argv", ["serving.api"])
        service = Service(settings(None), read_adapter(ADAPTER), on_failure=lambda: None)
        with TestClient(make_app(service)) as client:
            assert client.get("/readyz").status_code == 503, "nothing is answered before the model is there"
            assert client.post("/classify", json={"texts": texts}).status_code == 503
            end = time.monotonic() + 60
            while client.get("/readyz").status_code == 503:
                assert service.failure is None and time.monotonic() < end
                time.sleep(0.05)
            found = client.post("/classify", json={"texts": texts}).json()["answers"]
        right = load_predictor().predict(texts)
    assert all(map(same, found, right)) and len(found) == 40
    assert found[0]["thresholds"] == dict.fromkeys(LABELS, 0.5)
    assert len({one["probabilities"]["bad"] for one in found}) == 40


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "token", "expected"),
    [
        (["--adapter", "nowhere"], None, "nowhere: there is no adapter"),
        (["--adapter", ""], None, "--adapter: is empty"),
        (["--host", "0.0.0.0"], None, "--host: at 0.0.0.0 other machines reach the service"),
        (["--host", "nowhere.invalid", "--allow-anonymous"], None, "--host: 'nowhere.invalid' is no address"),
        (["--host", "a..b", "--allow-anonymous"], None, "--host: 'a..b' is no address"),
        (["--model-name", "a/b"], None, "--model-name: take up to 64 letters"),
        (["--queue", "10"], None, "--queue: 10 is less than the 256 texts"),
        (["--max-new-tokens", "5"], None, "--max-new-tokens: models/adapter answers with labels (classification)"),
        ([], "short", "API_TOKEN in the environment: is no token"),
        ([], "with a blank in the midst", "API_TOKEN in the environment: is no token"),
        ([], "", "API_TOKEN in the environment: is no token"),
    ],
)
def test_a_mistake_gives_one_message(
    place: Workplace, arguments: list[str], token: str | None, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    environment = {} if token is None else {"API_TOKEN": token}
    assert place.main("serving.api", *arguments, **environment) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"error: {expected}") and message.count("\n") == 1
    assert not token or token not in message


def test_a_taken_port_gives_one_message(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert place.main("serving.api", "--port", str(port)) == 1
    assert f"error: --port: another program listens on port {port} of 127.0.0.1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--queue", "abc"], "--queue: 'abc' is no number of 1 or more"),
        (["--batch-rows", "0"], "--batch-rows: '0' is no number of 1 or more"),
        (["--port", "65536"], "--port: '65536' is no port"),
        (["--timeout", "nan"], "--timeout: 'nan' is no number of seconds"),
    ],
)
def test_a_value_that_is_no_number_is_said(
    arguments: list[str], expected: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["serving.api", *arguments])
    with pytest.raises(SystemExit):
        settings(None)
    assert f"error: argument {expected}" in capsys.readouterr().err


def test_other_addresses_need_a_token_or_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def of(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["serving.api", *arguments])
        return settings(None).host

    monkeypatch.delenv("API_TOKEN", raising=False)
    assert [of(), of("--host", "localhost"), of("--host", "::1")] == ["127.0.0.1", "localhost", "::1"]
    assert of("--host", "0.0.0.0", "--allow-anonymous") == "0.0.0.0"
    with pytest.raises(UserError, match="other machines reach"):
        of("--host", "::")
    monkeypatch.setenv("API_TOKEN", TOKEN)
    assert of("--host", "::") == "::"


def test_a_model_that_cannot_be_loaded_ends_the_service(place: Workplace, tmp_path: Path) -> None:
    copy = make_copy(place, tmp_path)
    copy.write("models/adapter/adapter_model.safetensors", b"damaged")
    result = copy.run("serving.api", "--port", "0")
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "error: models/adapter: does not fit the base model, or is damaged" in result.stderr


def test_an_address_is_free_again_at_once() -> None:
    listener = listen("127.0.0.1", 0)
    port = listener.getsockname()[1]
    with socket.create_connection(("127.0.0.1", port)):
        listener.accept()[0].close()
    listener.close()
    listen("127.0.0.1", port).close()
