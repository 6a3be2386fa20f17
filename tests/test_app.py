"""The web app as people use it: real processes, tiny adapters of every kind, and real Chromium without a network."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from serving.common.adapter import ADAPTER, read_adapter
from serving.predictor import Predictor, load_predictor
from serving.web import inputs
from serving.web.answers import as_csv
from serving.web.look import heading
from stages.common.errors import UserError
from stages.common.spreadsheets import neutral
from tests.served import LABELS, make_served, turns
from tests.workplace import Workplace

CHROMIUM = shutil.which("chromium")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
KINDS = ("classification", "multi_label", "chat")
PASSWORD = "täglich 1 Apfel"
MOST_MILLISECONDS = 30_000
LONGEST = 8_192
# What would do something, were it taken for more than text.
HOSTILE = (
    '<img src=x onerror="window.hit=1"> <script>window.hit=2</script> ${window.hit=3} {{value}} ![x](http://x.test/x)'
)
TEXTS = ["the fine film of day 7 was poor", HOSTILE, "=1+1 the lovely film", "a great film " * 40, "the usual food"]


class App(NamedTuple):
    """A running app, the project that it runs in, and the folder for its temporary files."""

    place: Workplace
    process: subprocess.Popen[str]
    address: str
    temporary: Path

    def predict(self, contents: list[Any], **options: Any) -> list[dict[str, Any]]:
        """What its adapter answers in this process."""
        with self.place.entered():
            return _predictor(self.place.folder, **options).predict(contents)

    def base_answers(self, contents: list[Any]) -> list[dict[str, Any]]:
        """The same without the adapter, as `infer_base` has it, in at most 8 tokens."""
        with self.place.entered():
            return _base_predictor(self.place.folder).predict(contents)


@lru_cache
def _predictor(folder: Path, **options: Any) -> Predictor:
    return load_predictor(folder / ADAPTER, **options)


@lru_cache
def _base_predictor(folder: Path) -> Predictor:
    from stages.common.scoring.loading import load_fast_model

    return replace(_predictor(folder, max_new_tokens=8), model=load_fast_model(None, 0, scores_labels=False))


# --- apps and browser -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def apps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, App]]:
    """An app for each kind of task, started at once; each ends as Ctrl-C ends it."""
    if CHROMIUM is None:
        pytest.skip("needs Debian's chromium: apt install chromium")
    root = tmp_path_factory.mktemp("app")
    places = {kind: make_served(root / kind, kind) for kind in KINDS}
    places["two labels"] = Workplace(shutil.copytree(root / "classification", root / "two labels", symlinks=True))
    _with_two_labels(places["two labels"])
    # So many take seconds, even this model.
    places["chat"].set("infer.max_new_tokens", LONGEST)
    started = {
        kind: _start(place, root / f"{kind} temporary", **({"APP_PASSWORD": PASSWORD} if kind == "multi_label" else {}))
        for kind, place in places.items()
    }
    try:
        yield {
            kind: App(places[kind], process, _address(process), temporary)
            for kind, (process, temporary) in started.items()
        }
    finally:
        for process, _ in started.values():
            process.kill()
            process.wait()


def _with_two_labels(place: Workplace) -> None:
    prompt_format = json.loads((place.folder / "models/adapter/prompt.json").read_text())
    place.write("models/adapter/prompt.json", json.dumps(prompt_format | {"labels": ["good", "bad"]}))
    with place.entered():
        found = [answer["probabilities"]["good"] for answer in load_predictor().predict(TEXTS)]
    # A text has it exactly, and would have the other label if the slider's three digits were all that counts.
    rule = {"rule": "threshold", "positive_label": "good", "threshold": next(x for x in found if round(x, 3) > x)}
    place.write("models/decision.json", json.dumps({"adapter": rule}))


def _start(place: Workplace, temporary: Path, **environment: str) -> tuple[subprocess.Popen[str], Path]:
    temporary.mkdir()
    command = [sys.executable, "-m", "serving.app", "--port", "0"]
    environment = place.environment(TMPDIR=str(temporary), **environment)
    process = subprocess.Popen(
        command, cwd=place.folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    return process, temporary


def _address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None and process.stderr is not None
    line = process.stdout.readline()
    found = re.fullmatch(r"app: (http://127\.0\.0\.1:\d+) \(Ctrl-C ends it\)\n", line)
    assert found, line + process.stderr.read()
    return found[1]


@pytest.fixture(scope="module")
def browser(apps: dict[str, App]) -> Iterator[Browser]:
    expect.set_options(timeout=MOST_MILLISECONDS)
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


@contextmanager
def opened(browser: Browser, app: App) -> Iterator[Page]:
    """The app's page; when the block ends, nothing was asked of another machine and no script had an error."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, locale="en-GB")
    context.set_default_timeout(MOST_MILLISECONDS)
    page = context.new_page()
    hosts, problems = set[str](), list[str]()
    context.on("request", lambda request: hosts.add(urlsplit(request.url).netloc or request.url[:20]))
    page.on("pageerror", lambda error: problems.append(str(error)))
    # What the page's policy forbids does not become a request.
    page.on("console", lambda message: problems.append(message.text) if "Security Policy" in message.text else None)
    page.goto(app.address)
    yield page
    assert page.evaluate("window.hit") is None
    assert hosts == {urlsplit(app.address).netloc}
    assert problems == []
    context.close()


def rows_of(page: Page) -> list[dict[str, Any]]:
    """What the table on the page shows, in the words of the command line's answers."""
    found = []
    for row in page.locator(".answers tbody tr").all():
        line: dict[str, Any] = {"id": row.locator(".id").inner_text(), "text": row.locator(".text").inner_text()}
        if problem := row.locator(".problem").all():
            line["error"] = problem[0].inner_text()
        else:
            line["labels"] = row.locator(".chip").all_inner_texts()
            names = row.locator(".bar .name").all_inner_texts()
            values = [float(cell.get_attribute("title") or "") for cell in row.locator(".bar .percent").all()]
            line["probabilities"] = dict(zip(names, values, strict=True))
            line["remarks"] = row.locator(".remark").all_inner_texts()
        found.append(line)
    return found


def downloaded(page: Page) -> list[dict[str, str]]:
    """The rows of the file behind the download button."""
    with page.expect_download() as download:
        page.get_by_role("button", name="Download as CSV").click()
    assert download.value.suggested_filename == "answers.csv"
    content = Path(download.value.path()).read_bytes()
    assert content.startswith(b"\xef\xbb\xbf"), "or Excel takes UTF-8 for another encoding"
    return list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline="")))


def classify(page: Page, texts: str) -> None:
    page.get_by_role("textbox", name="Texts").fill(texts)
    page.get_by_role("button", name="Classify", exact=True).click()
    page.locator(".answers").wait_for()


def move(page: Page, name: str, value: float) -> None:
    field = page.get_by_role("spinbutton", name=f"number input for {name}")
    field.fill(str(value))
    field.press("Tab")


def message(page: Page) -> str:
    """What the page complains of; it is closed then, as a user would."""
    toast = page.get_by_test_id("toast-body")
    text = toast.inner_text()
    page.get_by_test_id("toast-close").click()
    toast.wait_for(state="detached")
    return text


# --- classification ---------------------------------------------------------------------------------------------------


def test_texts_are_answered_as_predict_answers_them(apps: dict[str, App], browser: Browser, tmp_path: Path) -> None:
    app = apps["classification"]
    expected = app.predict(TEXTS)
    with opened(browser, app) as page:
        classify(page, "\n".join([*TEXTS[:2], "", *TEXTS[2:]]))
        found = rows_of(page)
        assert [row["id"] for row in found] == [f"text:{number}" for number in range(1, 7)]
        assert [row["text"] for row in found] == [*TEXTS[:2], "", *map(str.strip, TEXTS[2:])]
        assert found.pop(2)["error"] == "the text is empty"
        assert [row["labels"] for row in found] == [[answer["label"]] for answer in expected]
        for row, answer in zip(found, expected, strict=True):
            assert row["probabilities"] == pytest.approx(answer["probabilities"], abs=1e-6)
            assert ("shortened" in row["remarks"]) == ("shortened" in answer)
        assert page.locator(".summary").inner_text().startswith("6 rows: ")
        page.screenshot(path=tmp_path / "texts.png", full_page=True)
        file = downloaded(page)
    assert [row["id"] for row in file] == [f"text:{number}" for number in range(1, 7)]
    assert file[3]["text"] == "'=1+1 the lovely film", "no formula"
    assert [row["text"] for row in file if row["id"] != "text:4"] == [*TEXTS[:2], "", *map(str.strip, TEXTS[3:])]
    assert file.pop(2)["error"] == "the text is empty"
    for row, answer in zip(file, expected, strict=True):
        assert row["label"] == answer["label"]
        shown = {label: float(row[f"probability.{label}"]) for label in LABELS}
        assert shown == pytest.approx(answer["probabilities"], abs=1e-6)
        assert row["shortened"] == ("true" if "shortened" in answer else "")


def test_answers_below_the_least_probability_are_marked_and_stay(apps: dict[str, App], browser: Browser) -> None:
    app = apps["classification"]
    expected = app.predict(TEXTS)
    surest = sorted(max(answer["probabilities"].values()) for answer in expected)
    least = round((surest[2] + surest[3]) / 2, 3)
    with opened(browser, app) as page:
        classify(page, "\n".join(TEXTS))
        before = rows_of(page)
        for value, unsure in ((1, 5), (least, 3), (0, 0)):
            move(page, "Least probability", value)
            expect(page.locator(".remark", has_text="unsure")).to_have_count(unsure)
            found = rows_of(page)
            assert [row["labels"] for row in found] == [row["labels"] for row in before]
            marked = [max(row["probabilities"].values()) < value for row in found]
            assert ["unsure" in row["remarks"] for row in found] == marked and sum(marked) == unsure
            file = downloaded(page)
            assert [row["unsure"] for row in file] == [str(mark).lower() for mark in marked]
            assert {float(row["least_probability"]) for row in file} == {value}
        page.get_by_role("button", name="Reset to default value").click()
        assert page.get_by_role("slider", name="range slider for Least probability").input_value() == "0.5"


def test_all_of_the_field_may_be_one_text(apps: dict[str, App], browser: Browser) -> None:
    app = apps["classification"]
    [expected] = app.predict(["a lovely day\nand poor food"])
    with opened(browser, app) as page:
        page.get_by_label("Each line is a text").uncheck()
        classify(page, "a lovely day\nand poor food")
        [row] = rows_of(page)
        assert row["text"] == "a lovely day\nand poor food"
        assert row["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-6)


def upload(page: Page, name: str, content: bytes) -> None:
    page.get_by_role("tab", name="CSV file").click()
    page.locator("input[type=file]").set_input_files({"name": name, "mimeType": "text/csv", "buffer": content})


def choose(page: Page, label: str, option: str) -> None:
    field = page.get_by_label(label)
    field.click()
    page.locator(f"#{field.get_attribute('aria-controls')}").get_by_role("option", name=option, exact=True).click()
    expect(field).to_have_value(option)


def test_a_csv_file_is_answered_by_its_columns_page_by_page(apps: dict[str, App], browser: Browser) -> None:
    app = apps["classification"]
    rows = [
        [f"r{number}", f"day {number}", f"a fine, {'lovely' if number % 2 else 'poor'} day"] for number in range(30)
    ]
    rows[3][2], rows[5][0], rows[7][2] = " ", "-5", "@home é"
    file = io.StringIO()
    csv.writer(file).writerows([["key", "title", "body"], *rows])
    texts = [body for _, _, body in rows if body.strip()]
    expected = iter(app.predict(texts))
    with opened(browser, app) as page:
        upload(page, "days.csv", file.getvalue().encode())
        expect(page.get_by_label("Column of the texts")).to_have_value("key")
        choose(page, "Column of the texts", "body")
        choose(page, "Column of the ids", "key")
        page.get_by_role("button", name="Classify file").click()
        page.locator(".answers").wait_for()
        assert len(rows_of(page)) == 25
        found = rows_of(page)
        expect(page.get_by_role("button", name="Previous page")).to_be_disabled()
        # Again and again until it is disabled, which takes a moment.
        page.get_by_role("button", name="Next page").evaluate(
            "async (button) => { for (; !button.disabled; await new Promise((f) => setTimeout(f, 5))) button.click(); }"
        )
        expect(page.get_by_text("Page 2 of 2")).to_be_visible()
        expect(page.locator(".answers tbody tr")).to_have_count(5)
        found += rows_of(page)
        expect(page.get_by_role("button", name="Next page")).to_be_disabled()
        page.get_by_role("button", name="Previous page").click()
        expect(page.locator(".answers tbody tr")).to_have_count(25)
        table = downloaded(page)
        choose(page, "Column of the ids", "file name and line")
        page.get_by_role("button", name="Classify file").click()
        expect(page.locator(".answers .id").first).to_have_text("days.csv:2")
    assert [row["id"] for row in found] == [key for key, _, _ in rows]
    assert [row["id"] for row in table] == [neutral(key) for key, _, _ in rows]
    assert [table[5]["id"], table[7]["text"]] == ["'-5", "'@home é"]
    for (_, _, body), row, cells in zip(rows, found, table, strict=True):
        if not body.strip():
            assert row["error"] == cells["error"] == "the text is empty" and cells["label"] == ""
            continue
        answer = next(expected)
        assert (row["text"], cells["text"]) == (body, neutral(body))
        assert row["labels"] == [cells["label"]] == [answer["label"]]
        assert row["probabilities"] == pytest.approx(answer["probabilities"], abs=1e-6)


NOT_UTF8 = "is not UTF-8 text. Save it as UTF-8 (in Excel: CSV UTF-8)."
# What a file holds, and what is said of it: when its columns are looked for, or else when it is read.
MISTAKES = {
    "columns": [
        (b"", "days.csv is empty. Its first row should name the columns."),
        (b"text;key\nfine;1\n", "The cells of days.csv are separated by ; or tabs. Save it with commas."),
        ("schön\nx\n".encode("cp1252"), NOT_UTF8),
        ("text\nx\n".encode("utf-16-le"), NOT_UTF8),
    ],
    "rows": [
        (b"text\n" + b"a fine day\n" * 1500 + b"sch\xf6n\n", "line 1,502 is not utf-8 text"),
        ("text\nx\n".encode("utf-16-le"), "as UTF-16 without a mark or a binary file does. Save it as UTF-8 (in Excel"),
        (b"text\n", "days.csv has no row below the one that names the columns."),
        (b"text,text\na,b\n", "has the column 'text' more than once. Rename one."),
        (b"text\n" + b"fine\n" * (inputs.MOST_ROWS + 1), "more than 2,000 rows, the most that this page answers"),
    ],
}


def test_mistakes_in_files_are_said_in_the_words_of_the_page(tmp_path: Path) -> None:
    file = tmp_path / "days.csv"
    for step, mistakes in MISTAKES.items():
        for content, expected in mistakes:
            file.write_bytes(content)
            with pytest.raises(UserError) as error:
                inputs.csv_columns(file) if step == "columns" else inputs.csv_rows(file, "text", None)
            assert expected in str(error.value) and "--" not in str(error.value), error.value


def test_what_cannot_be_answered_is_complained_of_in_the_page(apps: dict[str, App], browser: Browser) -> None:
    with opened(browser, apps["classification"]) as page:
        page.get_by_role("button", name="Classify", exact=True).click()
        assert "There is no text yet: write or paste one." in message(page)
        page.get_by_role("tab", name="CSV file").click()
        page.get_by_role("button", name="Classify file").click()
        assert "There is no file yet: upload one." in message(page)
        upload(page, "days.csv", b"text\n" + b"x" * (inputs.MOST_FILE_MIB * 2**20))
        assert "exceed the maximum allowed size of 10" in message(page)
        page.reload()
        upload(page, "days.csv", MISTAKES["columns"][0][0])
        assert MISTAKES["columns"][0][1] in message(page)
        page.reload()
        column = "<img src=x onerror=window.hit=1>"
        upload(page, "days.csv", f"{column},{column}\na,b\n".encode())
        expect(page.get_by_label("Column of the texts")).to_have_value(column)
        page.get_by_role("button", name="Classify file").click()
        assert f"has the column '{column}' more than once" in message(page), "shown, not done"
        expect(page.get_by_text("Answers appear here.")).to_be_visible()


def test_the_threshold_between_two_labels_is_shown_used_and_moved(apps: dict[str, App], browser: Browser) -> None:
    app = apps["two labels"]
    expected = app.predict(TEXTS)
    scores = [answer["probabilities"]["good"] for answer in expected]
    threshold = expected[0]["threshold"]
    assert threshold in scores
    with opened(browser, app) as page:
        expect(page.get_by_text(f"At first {threshold:.4g}, as evaluate chose it.")).to_be_visible()
        expect(page.locator(".heading")).not_to_contain_text("decision.json")
        classify(page, "\n".join(TEXTS))
        assert [row["labels"] for row in rows_of(page)] == [[answer["label"]] for answer in expected]
        assert expected[scores.index(threshold)]["label"] == "good"
        assert {float(row["threshold"]) for row in downloaded(page)} == {threshold}
        middle = round(sum(sorted(scores)[2:4]) / 2, 3)
        for value in (middle, 0, 1):
            move(page, "Decision threshold", value)
            labels = [["good" if score >= value else "bad"] for score in scores]
            expect(page.locator(".chip", has_text="good")).to_have_count(labels.count(["good"]))
            assert [row["labels"] for row in rows_of(page)] == labels
        file = downloaded(page)
        assert {(row["threshold"], row["positive_label"], row["label"]) for row in file} == {("1.0", "good", "bad")}


def test_after_a_login_thresholds_of_several_labels_are_shown_and_ctrl_c_ends_the_app(
    apps: dict[str, App], browser: Browser
) -> None:
    app = apps["multi_label"]
    expected = app.predict(TEXTS)
    with opened(browser, app) as page:
        wrong = page.request.post(f"{app.address}/login", form={"username": "anybody", "password": "wrong"})
        assert wrong.status == 400
        page.get_by_label("username").fill("anybody")
        page.get_by_label("password").fill(PASSWORD)
        page.get_by_role("button", name="Login").click()
        expect(page.locator(".heading")).to_contain_text("No decision.json says which thresholds were chosen")
        expect(page.locator(".thresholds td")).to_have_text([x for label in LABELS for x in (label, "0.5")])
        classify(page, "\n".join(TEXTS))
        found = rows_of(page)
        assert [row["labels"] for row in found] == [answer["labels"] for answer in expected]
        for row, answer in zip(found, expected, strict=True):
            assert row["probabilities"] == pytest.approx(answer["probabilities"], abs=1e-6)
        file = downloaded(page)
        assert [json.loads(row["labels"]) for row in file] == [answer["labels"] for answer in expected]
        assert [row["threshold.bad"] for row in file] == ["0.5"] * len(TEXTS)
        assert [path.name for path in app.temporary.iterdir() if path.name.startswith("app-")]
        app.process.send_signal(signal.SIGINT)
        assert app.process.wait(timeout=20) == 0
        assert app.process.stdout and app.process.stdout.read() == "app: ended\n"
        assert app.process.stderr and "app: labels of probability 0.5 or more are answered" in app.process.stderr.read()
        assert list(app.temporary.glob("app-*")) == [], "what was uploaded and offered is gone"
        page.goto("about:blank")


# --- chats ------------------------------------------------------------------------------------------------------------


def said(page: Page, side: str) -> list[dict[str, str]]:
    """The turns that one side shows."""
    turns = page.locator(f"#{side} .turn").all()
    roles = [(turn.get_attribute("class") or "").removeprefix("turn ") for turn in turns]
    return [{"role": role, "content": turn.inner_text()} for role, turn in zip(roles, turns, strict=True)]


def ask(page: Page, question: str) -> None:
    page.get_by_role("textbox", name="Question").fill(question)
    asked = page.locator("#tuned .turn").count()
    page.get_by_role("button", name="Send").click()
    expect(page.locator("#tuned .turn")).to_have_count(asked + 2)
    expect(page.get_by_role("button", name="Send")).to_be_enabled()


def test_a_chat_answers_as_predict_does_with_the_base_model_beside_it(apps: dict[str, App], browser: Browser) -> None:
    app = apps["chat"]
    questions = ["the fine film", f"and {HOSTILE}", "  why\n    indented"]

    def tuned(*before: str) -> str:
        return str(app.predict([turns(*before)], max_new_tokens=8)[0]["answer"])

    def base(*before: str) -> str:
        return str(app.base_answers([turns(*before)])[0]["answer"])

    first = tuned(questions[0])
    with opened(browser, app) as page:
        move(page, "Longest answer", 8)
        ask(page, questions[0])
        assert said(page, "tuned") == turns(questions[0], first)
        expect(page.get_by_role("heading", name="Base model")).to_be_hidden()
        page.get_by_label("Base model beside it").check()
        expect(page.get_by_role("heading", name="Base model")).to_be_visible()
        ask(page, questions[1])
        ask(page, questions[2])
        seconds = []
        for side, answer in (("tuned", tuned), ("base", base)):
            seconds.append(answer(questions[0], first, questions[1]))
            before = (questions[0], first, questions[1], seconds[-1], questions[2].strip())
            assert said(page, side) == turns(*before, answer(*before))
        assert all(seconds) and seconds[0] != seconds[1], "or the test shows less than it says"
        page.get_by_role("button", name="Clear").click()
        expect(page.get_by_text("Nothing was asked yet.")).to_have_count(2)
        ask(page, questions[0])
        assert said(page, "tuned") == turns(questions[0], first)
        assert said(page, "base") == turns(questions[0], base(questions[0]))


def test_the_controls_of_a_chat_change_its_answers(apps: dict[str, App], browser: Browser) -> None:
    app = apps["chat"]
    question = "the fine film"
    longer, shorter = (app.predict([question], max_new_tokens=count)[0]["answer"] for count in (8, 2))
    assert shorter != longer
    with opened(browser, app) as page:
        move(page, "Longest answer", 2)
        ask(page, question)
        assert said(page, "tuned") == turns(question, shorter)
        expect(page.get_by_text("Tuned: 2 tokens in")).to_contain_text("cut at the longest answer")
        move(page, "Longest answer", 8)
        # At 0.3 the likeliest of these tokens have 12 to 40 % of the probability: alone enough for the lower top-p.
        for temperature, top_p, differs in ((0.3, 1, True), (0.3, 0.05, False), (0, 1, False)):
            page.get_by_role("button", name="Clear").click()
            expect(page.get_by_text("Nothing was asked yet.")).to_be_visible()
            move(page, "Temperature", temperature)
            move(page, "Top-p", top_p)
            ask(page, question)
            assert (said(page, "tuned") != turns(question, longer)) == differs


def test_an_answer_comes_in_pieces_and_can_be_stopped(apps: dict[str, App], browser: Browser) -> None:
    app = apps["chat"]
    question = "the fine film"
    with opened(browser, app) as page:
        page.get_by_label("Base model beside it").check()
        page.get_by_role("textbox", name="Question").fill(question)
        page.get_by_role("textbox", name="Question").press("Enter")
        answer = page.locator("#tuned .turn.assistant")
        expect(answer).not_to_have_text("…")
        begun = answer.inner_text()
        expect(page.get_by_role("button", name="Clear")).to_be_disabled()
        page.get_by_role("textbox", name="Question").fill("another")
        page.get_by_role("textbox", name="Question").press("Enter")
        assert "An answer is being made. Wait until it is there, or stop it." in message(page)
        expect(page.get_by_role("textbox", name="Question")).to_have_value("another")
        page.get_by_role("button", name="Stop").click()
        expect(page.get_by_role("button", name="Send")).to_be_enabled()
        expect(page.get_by_text("Tuned: ", exact=False).last).to_contain_text(", stopped")
        stopped = answer.inner_text()
        assert stopped.startswith(begun[:20])
        expect(page.locator("#base .turn.assistant")).to_have_text("(no answer)")
        move(page, "Longest answer", 4)
        ask(page, "go on")
        assert [turn["role"] for turn in said(page, "tuned")] == ["user", "assistant"] * 2


def test_questions_are_answered_each_by_itself_and_who_leaves_keeps_nobody_waiting(tmp_path: Path) -> None:
    import gradio as gr

    from serving.web import chat_page, events
    from serving.web.loading import load_for_page

    app = App(make_served(tmp_path, "question_answering"), *[None] * 3)  # type: ignore[arg-type]
    with app.place.entered(), gr.Blocks() as blocks:
        predictor = load_for_page(read_adapter(ADAPTER), 8)
        chat_page.build(predictor, blocks)
    functions = {block.name: block.fn for block in blocks.fns.values()}
    ask, answer, finish = (functions[name] for name in ("ask", "answer", "finish"))
    request = gr.Request(session_hash="somebody")
    conversations: dict[str, list[Any]] = {"tuned": [], "base": []}
    questions = ["the fine film", "of day 7"]
    for question, problem in ((" ", "There is no question yet"), ("x" * 20_001, "a question may have 20,000")):
        with pytest.raises(gr.Error, match=problem):
            ask(question, conversations, request)
    with app.place.entered():
        for question in questions:
            conversations = ask(question, conversations, request)[1]
            *_, (conversations, *_) = answer(conversations, True, 0, 1, 8, request)
            finish(conversations, request)
    for side, found in (("tuned", app.predict(questions, max_new_tokens=8)), ("base", app.base_answers(questions))):
        expected = [turns(question, row["answer"]) for question, row in zip(questions, found, strict=True)]
        assert conversations[side] == [turn for pair in expected for turn in pair]

    computing, go_on = threading.Event(), threading.Event()

    def stall(*_: object) -> None:
        computing.set()
        go_on.wait(10)

    conversations = ask("the fine film", conversations, request)[1]
    pieces = answer(conversations, False, 0, 1, LONGEST, request)
    next(pieces)
    predictor.model.get_input_embeddings().register_forward_hook(stall)
    assert computing.wait(10)
    # As Gradio does it in its event loop.
    pieces.close()
    assert events.model_lock.locked(), "closed while its token is computed"
    go_on.set()
    with events.model_lock:
        assert not [thread for thread in threading.enumerate() if thread.name.startswith("generation")]


# --- the command ------------------------------------------------------------------------------------------------------


def test_mistakes_of_the_command_line_get_one_message(
    apps: dict[str, App], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def complaint(*arguments: str, kind: str = "classification", **environment: str) -> str:
        assert apps[kind].place.main("serving.app", *arguments, **environment) == 1
        output = capsys.readouterr()
        assert output.out == "" and len(output.err.splitlines()) == 1
        return output.err

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert f"error: --port: another program listens on port {port} of 127" in complaint("--port", port)
    assert "error: nothing: there is no adapter." in complaint("--adapter", "nothing")
    assert "error: --port: 70000 is no port. Give one from 1 to 65535" in complaint("--port", "70000")
    for name in ("--adapter", "--decision", "--host"):
        assert f"error: {name}: is empty. Give it a value, or leave it out." in complaint(name, "")
    apps["chat"].place.write("text.json", json.dumps({"adapter": {"rule": "text"}}))
    assert "error: --decision: models/adapter answers with t" in complaint("--decision", "text.json", kind="chat")
    assert "error: APP_PASSWORD in the environment: is empty" in complaint(APP_PASSWORD="")
    assert "error: --host: at 192.0.2.1 other machines reach the app" in complaint("--host", "192.0.2.1")
    # An address of no machine's, so that nothing is served where the word is enough.
    for word, environment in ((["--allow-anonymous"], {}), ([], {"APP_PASSWORD": PASSWORD})):
        assert "nothing can listen on port 7860" in complaint("--host", "192.0.2.1", *word, **environment)
    assert "error: --host: 'a..b' is no address" in complaint("--host", "a..b", "--allow-anonymous")
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert f"error: {sys.prefix} lacks gradio. `make serving` installs what this command needs." in complaint()


def test_sigterm_while_the_model_is_loaded_leaves_nothing_behind(apps: dict[str, App], tmp_path: Path) -> None:
    process, temporary = _start(apps["classification"].place, tmp_path / "temporary")
    while not list(temporary.glob("app-*")):
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    assert process.communicate(timeout=20)[0] == "" and process.returncode == 130
    assert list(temporary.glob("app-*")) == []


def test_what_is_too_long_is_refused_though_nobody_announced_its_length(apps: dict[str, App]) -> None:
    address = f"{apps['classification'].address}/gradio_api/queue/join"
    for mebibytes, status in ((40, 413), (1, 422)):
        body = (b"x" * 2**20 for _ in range(mebibytes))
        response = httpx.post(address, content=body, headers={"Content-Type": "application/json"})
        assert (response.status_code, "content-security-policy" in response.headers) == (status, True)


def test_what_another_visitors_event_deletes_first_is_no_mistake(tmp_path: Path) -> None:
    from serving.web.classify_page import _offer

    # Listed, and not there.
    (tmp_path / "gone").symlink_to("nowhere")
    assert Path(_offer("id\n", tmp_path)).read_text(encoding="utf-8-sig") == "id\n"


def test_two_labels_without_a_rule_are_remarked_on(apps: dict[str, App]) -> None:
    with apps["two labels"].place.entered():
        adapter = read_adapter(ADAPTER)
        without = heading("Texts", adapter._replace(rule=None))
        assert "No decision.json says which thresholds" in without and "decision.json" not in heading("Texts", adapter)


def test_more_text_than_the_field_takes_is_refused() -> None:
    with pytest.raises(UserError, match="These are 200,001 characters, and the field takes 200,000"):
        inputs.pasted_rows("x" * (inputs.MOST_PASTED_CHARACTERS + 1), by_line=False)
    with pytest.raises(UserError, match="These are more than 2,000 rows"):
        inputs.pasted_rows("x\n" * (inputs.MOST_ROWS + 1), by_line=True)
    assert len(inputs.pasted_rows("x\n" * inputs.MOST_ROWS, by_line=True)) == inputs.MOST_ROWS


def test_cells_that_begin_as_formulas_get_an_apostrophe_and_nothing_else_changes() -> None:
    assert [neutral(f"{start}x") for start in "=+-@"] == ["'=x", "'+x", "'-x", "'@x"]
    for cell in ("", "a=1", "1-2", "'x", "a,=b", '{"a": 1}', "x\n=1"):
        assert neutral(cell) == cell
    lines = [{"id": "-1", "text": 'a "b",\r\nc', "label": "=x", "probabilities": {"=x": 1.0}}]
    [row] = csv.DictReader(io.StringIO(as_csv(lines, ["=x"]), newline=""))
    assert row == {"id": "'-1", "text": 'a "b",\r\nc', "label": "'=x", "probability.=x": "1.0"}
