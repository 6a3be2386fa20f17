"""The inference entry point: a real server on a job's model, each kind of task, form of body and mistake."""

from __future__ import annotations

import csv
import io
import json
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fastapi.testclient import TestClient

from serving.common.adapter import read_adapter
from serving.predictor import MAX_NEW_TOKENS, Predictor, load_predictor
from serving.sagemaker import bodies, serve
from tests.image import ROOT, Container, make_image
from tests.served import LABELS, make_served, turns
from tests.workplace import Workplace

TEXTS = ["the fine film of day 7 was poor", "a great, lovely day", "awful"]
JSON, LINES, CSV = bodies.FORMS


class Answered(NamedTuple):
    status: int
    form: str
    body: str

    def json(self) -> Any:
        return json.loads(self.body)


class Endpoint:
    """A container that serves at a port of 127.0.0.1, and the project that its model is from."""

    def __init__(self, port: int, place: Workplace) -> None:
        self.port = port
        self.place = place

    def ask(self, body: str | bytes, form: str | None = JSON, accept: str | None = None) -> Answered:
        headers = {"Content-Type": form or "", **({"Accept": accept} if accept is not None else {})}
        raw = body if isinstance(body, bytes) else body.encode()
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}/invocations", raw, headers)
        try:
            with urllib.request.urlopen(request, timeout=120) as response:
                status, content, kind = response.status, response.read(), response.headers["Content-Type"]
        except urllib.error.HTTPError as error:
            status, content, kind = error.code, error.read(), error.headers["Content-Type"]
        return Answered(status, kind.split(";")[0], content.decode())

    def is_up(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/ping", timeout=2) as response:
                return bool(response.status == 200)
        except OSError:
            return False


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.fixture(scope="module")
def labels(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Endpoint]:
    """A container that serves an adapter of labels, and is stopped as SageMaker does it."""
    root = tmp_path_factory.mktemp("labels")
    place = make_served(root / "project", "classification")
    container = Container(make_image(root / "app"), root / "ml")
    for name in ("adapter", "base", "base.json"):
        origin, target = place.folder / "models" / name, container.root / "model" / name
        shutil.copytree(origin, target) if origin.is_dir() else shutil.copyfile(origin, target)
    before = sorted(container.root.joinpath("model").rglob("*"))
    port, log = free_port(), container.root / "log"
    process = container.start("serve", log, SAGEMAKER_BIND_TO_PORT=str(port))
    endpoint = Endpoint(port, place)
    try:
        deadline = time.monotonic() + 120
        while not endpoint.is_up():
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.1)
        yield endpoint
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == -signal.SIGTERM
    finally:
        process.kill()
    assert sorted(container.root.joinpath("model").rglob("*")) == before, "SageMaker's folder is read-only"
    text = log.read_text()
    assert "error" not in text and "Traceback" not in text
    assert not any(asked in text for asked in TEXTS), "texts are nobody's business"


@pytest.fixture(scope="module")
def own(labels: Endpoint) -> Predictor:
    """The Python API on the same adapter."""
    with labels.place.entered():
        return load_predictor()


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> tuple[TestClient, Predictor]:
    """The routes on an adapter of chats, in this process."""
    place = make_served(tmp_path_factory.mktemp("chats"), "chat")
    with place.entered():
        predictor = load_predictor(place.folder / "models/adapter", max_new_tokens=8)
    return TestClient(serve.application(predictor)), predictor


def test_labels_are_the_predictors_own_in_every_form(labels: Endpoint, own: Predictor) -> None:
    expected = own.predict(TEXTS)
    rows = [{"text": text} for text in TEXTS]
    table = io.StringIO()
    csv.writer(table).writerows([text] for text in TEXTS)
    asked = {
        JSON: json.dumps({"instances": [TEXTS[0], *rows[1:]]}),
        LINES: "\n".join(map(json.dumps, rows)),
        CSV: table.getvalue(),
    }
    for form, body in asked.items():
        for wanted in bodies.FORMS:
            found = labels.ask(body, form, wanted)
            assert (found.status, found.form) == (200, wanted)
            if wanted == CSV:
                answers = [
                    {"label": label, "probabilities": dict(zip(LABELS, map(float, cells), strict=True))}
                    for label, *cells, shortened in csv.reader(io.StringIO(found.body))
                    if shortened == "false"
                ]
            else:
                lines = [json.loads(line) for line in found.body.splitlines()]
                answers = lines if wanted == LINES else lines[0]["predictions"]
            for answer, direct in zip(answers, expected, strict=True):
                assert answer["label"] == direct["label"]
                assert answer["probabilities"] == pytest.approx(direct["probabilities"], abs=1e-5)


def test_one_row_is_answered_by_one_object_and_without_accept_in_its_own_form(labels: Endpoint) -> None:
    found = labels.ask(json.dumps({"text": f"  {TEXTS[0]} "}))
    assert set(found.json()) == {"label", "probabilities"}
    assert labels.ask(TEXTS[0] + "\n", CSV).form == CSV
    assert labels.ask(TEXTS[0], CSV, "text/html;q=1, */*;q=0.1").form == CSV
    assert labels.ask(TEXTS[0], "text/csv; charset=utf-8", "application/x-ndjson").form == LINES
    long = labels.ask(json.dumps({"text": "day " * 500})).json()
    assert long["shortened"] is True
    assert labels.ask("day " * 500, CSV).body.endswith(",true\n")


@pytest.mark.parametrize(
    ("body", "form", "accept", "status", "message"),
    [
        ("x", "text/plain", None, 415, "Content-Type 'text/plain' is not read here; application/json, applic"),
        ("x", None, None, 415, "Content-Type '' is not read here"),
        ("x", "text/csv; charset=latin-1", None, 415, "in UTF-8 are"),
        ("x", CSV, "text/html", 406, "Accept 'text/html' is not answered here"),
        ("x", CSV, "text/csv;q=high", 406, "has a q that is no number"),
        ("{", JSON, None, 400, "the body is not valid JSON"),
        ("[1]", JSON, None, 400, 'the body has to be one row, as {"text": "…"}, or {"instances"'),
        ('{"instances": []}', JSON, None, 400, "the body holds no rows"),
        ("", CSV, None, 400, "the body holds no rows"),
        ("\n", LINES, None, 400, "the body holds no rows"),
        ('{"text": "a"}\n{"text"', LINES, None, 400, "line 2 is not valid JSON"),
        ("a,b\n", CSV, None, 400, "CSV has one column, the text, and no header; rows 1 have more"),
        ('"a', CSV, None, 400, "the body is no CSV"),
        (b"\xff", CSV, None, 400, "the body is not in UTF-8 (byte 0)"),
        ('{"instances": ["a", " ", {"txt": "b"}, 1]}', JSON, None, 400, "3 of 4 rows cannot be answered: row 2: th"),
        ('{"text": "\\ud800"}', JSON, None, 400, "row 1: half of a surrogate pair is in its text"),
        ('{"messages": []}', JSON, None, 400, 'row 1: is neither a text nor an object with "text" alone'),
        ("a\n" * 10_001, CSV, None, 413, "the body holds more than 10,000 rows. Send fewer at once"),
        ("a" * (bodies.MOST_BYTES + 1), CSV, None, 413, "the body is larger than 26,214,400 bytes"),
    ],
)  # fmt: skip
def test_what_cannot_be_answered_is_refused_with_a_message(
    labels: Endpoint, body: str | bytes, form: str | None, accept: str | None, status: int, message: str
) -> None:
    found = labels.ask(body, form, accept)
    assert (found.status, found.form) == (status, JSON)
    assert message in found.json()["error"]
    assert labels.is_up()


def test_of_more_requests_than_may_wait_some_are_refused_and_no_answer_is_mixed_up(
    labels: Endpoint, own: Predictor
) -> None:
    texts = [f"the fine film of day {number} was poor" for number in range(serve.MOST_REQUESTS + 16)]
    expected = own.predict(texts)
    found: dict[int, Answered] = {}
    # Long enough to be answered that all others have come by then.
    slow = threading.Thread(target=labels.ask, args=("\n".join(["a fine day"] * 3_000), CSV))
    slow.start()
    time.sleep(0.3)

    def ask(number: int) -> None:
        found[number] = labels.ask(json.dumps({"text": texts[number]}))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(len(texts))]
    for thread in threads:
        thread.start()
    for thread in [*threads, slow]:
        thread.join()
    refused = [answered for answered in found.values() if answered.status == 429]
    answered = {number: answered.json() for number, answered in found.items() if answered.status == 200}
    assert len(refused) + len(answered) == len(texts)
    assert len(answered) >= serve.MOST_REQUESTS - 1 and refused
    assert "requests are waiting" in refused[0].json()["error"]
    for number, answer in answered.items():
        assert answer["probabilities"] == pytest.approx(expected[number]["probabilities"], abs=1e-5)


def test_chats_take_texts_and_messages_and_answer_with_texts(chats: tuple[TestClient, Predictor]) -> None:
    client, predictor = chats
    conversation = turns("what a day", "yes", "and now?")
    expected = predictor.predict(["what a day", conversation])
    body = {"instances": ["what a day", {"messages": conversation}]}
    assert client.post("/invocations", json=body).json() == {"predictions": expected}
    table = client.post("/invocations", json=body, headers={"Accept": CSV}).text
    lines = list(csv.reader(io.StringIO(table, newline="")))
    assert lines == [[answer["answer"], "false"] for answer in expected]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages: the conversation is empty"),
        ("hello", "messages is no list of objects"),
        (["hello"], "messages is no list of objects"),
        (turns("hello", "yes"), "messages: the last one is the assistant's"),
        ([{"role": "judge", "content": "x"}], "has the role 'judge'"),
    ],
)
def test_conversations_that_are_none_are_refused(
    chats: tuple[TestClient, Predictor], messages: Any, message: str
) -> None:
    found = chats[0].post("/invocations", json={"messages": messages})
    assert found.status_code == 400 and message in found.json()["error"]


def test_several_labels_are_one_cell_of_a_table() -> None:
    answer = {"labels": ["a", "b|c"], "probabilities": {"a": 0.75, "b|c": 0.5, "d": 0.0}, "thresholds": {}}
    assert bodies.write_answers([answer], CSV, False) == '"[""a"", ""b|c""]",0.75,0.5,0.0,false\n'


def test_a_model_that_cannot_be_loaded_ends_the_container_with_one_message(tmp_path: Path) -> None:
    container = Container(make_image(tmp_path / "app"), tmp_path / "ml")
    code, text = container.run("serve")
    assert code == 1 and "Traceback" not in text
    assert text.count("error: ") == 1 and "holds no folder adapter/. Deploy what a training job" in text
    code, text = container.run("serve", MAX_NEW_TOKENS="many")
    assert code == 1 and "error: MAX_NEW_TOKENS=many in the environment has to be 1 or more." in text


def test_answers_are_as_long_as_the_jobs_own_unless_the_environment_says_otherwise(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = tmp_path / "params.yaml"
    monkeypatch.delenv("MAX_NEW_TOKENS", raising=False)
    assert serve.answer_limit(params) == MAX_NEW_TOKENS
    recipe = (ROOT / "recipes/medical-qa.yaml").read_text(encoding="utf-8")
    params.write_text(recipe.replace("max_new_tokens: 256", "max_new_tokens: 12"), encoding="utf-8")
    assert serve.answer_limit(params) == 12
    monkeypatch.setenv("MAX_NEW_TOKENS", "3")
    assert serve.answer_limit(params) == 3


def test_questions_are_taken_out_of_messages(tmp_path: Path) -> None:
    place = make_served(tmp_path / "project", "question_answering")
    adapter = read_adapter(place.folder / "models/adapter")
    body = json.dumps({"messages": turns("how?")}).encode()
    assert bodies.read_request(body, JSON, adapter) == bodies.Request(["how?"], single=True)


@pytest.mark.parametrize(("module", "arguments"), [("serving.sagemaker", ["serve"]), ("serving.api", [])])
def test_without_make_serving_a_command_says_that_it_is_needed(module: str, arguments: list[str]) -> None:
    without = (
        "import runpy, sys; sys.modules['uvicorn'] = None; sys.argv[1:] = %r; runpy.run_module(%r, run_name='__main__')"
    )
    result = subprocess.run(
        [sys.executable, "-c", without % (arguments, module)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert result.stderr == f"error: {sys.prefix} lacks uvicorn. `make serving` installs what this command needs.\n"
