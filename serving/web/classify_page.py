"""The page of a classification adapter: texts or a CSV file in; labels, probabilities and a CSV file out."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from serving.batch.rows import Row
from serving.predictor import Predictor
from serving.web.answers import SLIDER_STEP, Line, Threshold, answer_rows, as_csv, decided, threshold_of
from serving.web.events import CHECKING_EVENT, LIGHT_EVENT, MODEL_EVENT, ending, errors_in_page, model_lock
from serving.web.inputs import MOST_FILE_MIB, MOST_ROWS, csv_columns, csv_rows, pasted_rows
from serving.web.table import pages, summary, table
from stages.common.errors import UserError

FILE_AND_LINE = ("file name and line", "")
NOTHING_YET = "<p class='subdued'>Answers appear here.</p>"
# Gradio takes its own copy of what is offered at once.
SECONDS_TO_COPY = 60
# Gradio finds by this default who wants to report progress.
PROGRESS = gr.Progress()


def build(predictor: Predictor, folder: Path) -> None:
    """Put the page's controls into the open `gr.Blocks`.

    Args:
        predictor: of a classification adapter.
        folder: for the files that are offered for download.
    """
    adapter = predictor.adapter
    threshold, labels = threshold_of(adapter), adapter.prompt_format.labels

    def answered(rows: Sequence[Row], progress: gr.Progress) -> tuple[list[Line], int]:
        def advance(count: int) -> None:
            if ending.is_set():
                raise UserError("The app is ending.")
            progress((count, len(rows)), unit="rows")

        with model_lock:
            return answer_rows(predictor, rows, advance), 0

    def classify_texts(text: str, by_line: bool, progress: gr.Progress = PROGRESS) -> tuple[list[Line], int]:
        with errors_in_page():
            return answered(pasted_rows(text, by_line), progress)

    def classify_file(
        file: str | None, text_column: str, id_column: str, progress: gr.Progress = PROGRESS
    ) -> tuple[list[Line], int]:
        with errors_in_page():
            if file is None:
                raise UserError("There is no file yet: upload one.")
            return answered(csv_rows(Path(file), text_column, id_column or None), progress)

    def show(lines: list[Line], page: int, position: float) -> tuple[Any, ...]:
        now = [decided(line, threshold, position) for line in lines]
        if not now:
            return "", NOTHING_YET, *_pager(0, 1), gr.DownloadButton(visible=False)
        download = gr.DownloadButton(value=_offer(as_csv(now, labels), folder), visible=True)
        return summary(now), table(now, threshold, page), *_pager(page, pages(now)), download

    def turned(step: int, lines: list[Line], page: int) -> int:
        # Before a click has disabled its button there may be another one.
        return min(max(page + step, 0), pages(lines) - 1)

    lines, page = gr.State([], time_to_live=3600), gr.State(0)
    with gr.Row(equal_height=False):
        with gr.Column(scale=2, min_width=320):
            texts, file = _text_inputs(), _file_inputs()
            position = _threshold_control(threshold, labels, adapter.rule)
        with gr.Column(scale=3, min_width=320):
            results = _results()
    what, (*_, back, forth, _) = [lines, page, position], results
    for (*fields, button), classify in ((texts, classify_texts), (file, classify_file)):
        button.click(classify, fields, [lines, page], show_progress_on=results[1], **MODEL_EVENT).success(
            show, what, results, **LIGHT_EVENT
        )
    position.change(show, what, results, trigger_mode="always_last", **LIGHT_EVENT)
    for button, step in ((back, -1), (forth, 1)):
        button.click(partial(turned, step), [lines, page], page, **LIGHT_EVENT).then(show, what, results, **LIGHT_EVENT)


def _text_inputs() -> tuple[gr.Textbox, gr.Checkbox, gr.Button]:
    with gr.Tab("Texts"):
        text = gr.Textbox(label="Texts", lines=8, max_lines=16, placeholder="Write or paste texts", autofocus=True)
        by_line = gr.Checkbox(True, label="Each line is a text", info="Otherwise all of it is one text.")
        return text, by_line, gr.Button("Classify", variant="primary")


def _file_inputs() -> tuple[gr.File, gr.Dropdown, gr.Dropdown, gr.Button]:
    def columns_of(file: str | None) -> tuple[gr.Dropdown, gr.Dropdown]:
        if file is None:
            return gr.Dropdown([], value=None), gr.Dropdown([FILE_AND_LINE], value="")
        with errors_in_page():
            names = csv_columns(Path(file))
        likely = "text" if "text" in names else names[0]
        return gr.Dropdown(names, value=likely), gr.Dropdown([FILE_AND_LINE, *names], value="")

    with gr.Tab("CSV file"):
        label = f"CSV in UTF-8, at most {MOST_FILE_MIB} MiB and {MOST_ROWS:,} rows"
        file = gr.File(label=label, file_types=[".csv"], height=140)
        text_column = gr.Dropdown([], label="Column of the texts")
        id_column = gr.Dropdown([FILE_AND_LINE], value="", label="Column of the ids")
        file.change(columns_of, file, [text_column, id_column], **CHECKING_EVENT)
        return file, text_column, id_column, gr.Button("Classify file", variant="primary")


def _threshold_control(threshold: Threshold, labels: Sequence[str], rule: dict[str, Any] | None) -> gr.Slider:
    name = "Least probability"
    information = "An answer whose label is less probable than this is marked as unsure. Label and row stay."
    if threshold.decides == "positive":
        name = "Decision threshold"
        information = (
            f"“{threshold.positive_label}” is answered where it is at least as probable as this, else the other label. "
            f"At first {threshold.value:.4g}, as evaluate chose it."
        )
    if threshold.decides == "labels":
        gr.HTML(_thresholds(labels, rule), apply_default_css=False)
    return gr.Slider(
        0, 1, threshold.at_first, step=SLIDER_STEP, label=name, info=information, buttons=["reset"],
        visible=threshold.decides != "labels",
    )  # fmt: skip


def _thresholds(labels: Sequence[str], rule: dict[str, Any] | None) -> str:
    from stages.common.scoring.label_predictions import APPLIES_FROM

    values = rule["thresholds"] if rule else dict.fromkeys(labels, APPLIES_FROM)
    rows = "".join(f"<tr><td>{escape(label)}</td><td>{values[label]:.4g}</td></tr>" for label in labels)
    return (
        "<p class='subdued'>A label is answered where it is at least as probable as its threshold, the mark on its "
        f"bar:</p><table class='thresholds'>{rows}</table>"
    )


def _results() -> list[Any]:
    """Where answers are shown: summary, table, the row to turn pages with and what is in it, and the download."""
    with gr.Row():
        line = gr.HTML(scale=3, min_width=200, apply_default_css=False)
        download = gr.DownloadButton("Download as CSV", visible=False, size="sm", scale=1, min_width=160)
    rows = gr.HTML(NOTHING_YET, elem_id="answers", apply_default_css=False)
    with gr.Row(visible=False, equal_height=True) as pager:
        back = gr.Button("Previous page", size="sm", min_width=100)
        position = gr.HTML(min_width=100, apply_default_css=False)
        forth = gr.Button("Next page", size="sm", min_width=100)
    return [line, rows, pager, position, back, forth, download]


def _pager(page: int, count: int) -> tuple[Any, ...]:
    where = f"<p class='position'>Page {page + 1:,} of {count:,}</p>"
    return gr.Row(visible=count > 1), where, gr.Button(interactive=page > 0), gr.Button(interactive=page < count - 1)


def _offer(content: str, folder: Path) -> str:
    """Write a file to be downloaded; what was offered before is deleted."""
    for old in folder.iterdir():
        # Another visitor's event may be deleting it too.
        with suppress(FileNotFoundError):
            if time.time() - old.stat().st_mtime > SECONDS_TO_COPY:
                shutil.rmtree(old, ignore_errors=True)
    path = Path(tempfile.mkdtemp(dir=folder)) / "answers.csv"
    # Without the mark Excel takes UTF-8 for another encoding.
    path.write_text(content, encoding="utf-8-sig", newline="")
    return str(path)
