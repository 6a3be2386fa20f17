"""The web app as people use it: real processes, tiny adapters of every kind, and real Chromium without a network."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any, NamedTuple
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from serving.predictor import Predictor, decide, load_predictor
from serving.web import inputs
from serving.web.answers import Threshold, as_csv, decided, neutral
from tests.served import LABELS, make_served, turns
from tests.workplace import Workplace

CHROMIUM = shutil.which("chromium")
FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync"),
)
KINDS = ("classification", "two labels", "multi_label", "question_answering", "chat")
PASSWORD = "täglich 1 Apfel"
SECONDS_TO_START = 120
# What would do something, were it taken for more than text.
HOSTILE = '<img src=x onerror="window.hit=1"> <script>window.hit=2</script> ${window.hit=3} {{value}} ![x](http://x.test/x)'
TEXTS = ["the fine film of day 7 was poor", HOSTILE, "=1+1 the lovely film", "a great film " * 40, "the usual food"]


class App(NamedTuple):
    """A running app, the project that it runs in, and the folder for its temporary files."""

    place: Workplace
    process: subprocess.Popen[str]
    address: str
    temporary: Path

    def predictor(self, **options: Any) -> Predictor:
        """Its adapter, loaded in this process."""
        with self.place.entered():
            return load_predictor(**options)


# --- apps and browser -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def apps(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, App]]:
    """An app for each kind of task, started at once; each ends as Ctrl-C ends it."""
    if CHROMIUM is None:
        pytest.skip("needs Debian's chromium: apt install chromium")
    root = tmp_path_factory.mktemp("app")
    places = {kind: make_served(root / kind, "classification" if kind == "two labels" else kind) for kind in KINDS}
    _with_two_labels(places["two labels"])
    started = {
        kind: _start(place, root / f"{kind} temporary", APP_PASSWORD=PASSWORD if kind == "question_answering" else "")
        for kind, place in places.items()
    }
    try:
        yield {kind: App(places[kind], *found, _address(found[0])) for kind, found in started.items()}
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
    with sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)


@contextmanager
def opened(browser: Browser, app: App, password: str | None = None) -> Iterator[Page]:
    """The app's page; when the block ends, nothing was asked of another machine and no script had an error."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, locale="en-GB")
    context.set_default_timeout(20_000)
    page = context.new_page()
    hosts, problems = set[str](), list[str]()
    context.on("request", lambda request: hosts.add(urlsplit(request.url).netloc or request.url[:20]))
    page.on("pageerror", lambda error: problems.append(str(error)))
    # What the page's policy forbids does not become a request.
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.goto(app.address)
    if password is not None:
        log_in(page, password)
    yield page
    assert page.evaluate("window.hit") is None
    assert hosts == {urlsplit(app.address).netloc}
    assert problems == []
    context.close()


def log_in(page: Page, password: str) -> None:
    page.get_by_label("username").fill("anybody")
    page.get_by_label("password").fill(password)
    page.get_by_role("button", name="Login").click()


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
    toast.get_by_role("button").click()
    toast.wait_for(state="detached")
    return text


# --- classification ---------------------------------------------------------------------------------------------------


def test_texts_are_answered_as_predict_answers_them(apps: dict[str, App], browser: Browser, tmp_path: Path) -> None:
    app = apps["classification"]
    expected = app.predictor().predict(TEXTS)
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
    expected = app.predictor().predict(TEXTS)
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
    [expected] = app.predictor().predict(["a lovely day\nand poor food"])
    with opened(browser, app) as page:
        page.get_by_label("Each line is a text").uncheck()
        classify(page, "a lovely day\nand poor food")
        [row] = rows_of(page)
        assert row["text"] == "a lovely day\nand poor food"
        assert row["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-6)


def upload(page: Page, name: str, content: bytes) -> None:
    page.get_by_role("tab", name="CSV file").click()
    for clear in page.get_by_role("button", name="Clear").all() + page.get_by_label("Remove this file").all():
        clear.click()
    page.locator("input[type=file]").set_input_files({"name": name, "mimeType": "text/csv", "buffer": content})


def choose(page: Page, label: str, option: str) -> None:
    page.get_by_label(label).click()
    page.get_by_role("option", name=option, exact=True).click()


def test_a_csv_file_is_answered_by_its_columns_page_by_page(apps: dict[str, App], browser: Browser) -> None:
    app = apps["classification"]
    rows = [[f"r{number}", f"day {number}", f"a fine, {'lovely' if number % 2 else 'poor'} day"] for number in range(30)]
    rows[3][2], rows[5][0], rows[7][2] = " ", "-5", "@home é"
    file = io.StringIO()
    csv.writer(file).writerows([["key", "title", "body"], *rows])
    texts = [body for _, _, body in rows if body.strip()]
    expected = iter(app.predictor().predict(texts))
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
        page.get_by_role("button", name="Next page").click()
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


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("d.csv", b"", "d.csv is empty. Its first row should name the columns."),
        ("d.csv", b"text;key\nfine;1\n", "The cells of d.csv are separated by ; or tabs. Save it with commas."),
        ("d.csv", "text\nsch\u00f6n\n".encode("cp1252"), "Save it as UTF-8 (in Excel: CSV UTF-8)."),
        ("d.csv", "sch\u00f6n\nx\n".encode("cp1252"), "d.csv is not UTF-8 text. Save it as UTF-8 (in Excel: CSV UTF-8)."),
        ("d.csv", b"text\n", "d.csv has no row below the one that names the columns."),
        ("d.csv", b"text,text\na,b\n", "has the column 'text' more than once. Rename one."),
        ("d.csv", b"text\n" + b"fine\n" * (inputs.MOST_ROWS + 1), "more than 2,000 rows, the most that this page"),
        ("d.csv", b"text\n" + b"x" * (inputs.MOST_FILE_MIB * 2**20), "10"),
        ("<img src=x onerror=hit=1>.csv", b"text\n", "has no row below the one that names the columns."),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_answered_is_complained_of_in_the_page(
    mistakes: Page, name: str, content: bytes, expected: str
) -> None:
    upload(mistakes, name, content)
    toast, button = mistakes.get_by_test_id("toast-body"), mistakes.get_by_role("button", name="Classify file")
    with suppress(TimeoutError):
        toast.wait_for(timeout=1_000)
    if not toast.count():
        button.click()
    text = message(mistakes)
    assert expected in text and "--" not in text and "params" not in text
