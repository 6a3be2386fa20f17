"""Any cells, labels, column names and ids, through the real stages: rows whole, or refused with their reason."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import ModelCard
from hypothesis import assume, given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from ruamel.yaml import YAML

from serving.web.answers import as_csv
from stages.common.measuring.markdown import literal, markdown_table
from stages.common.prompting.tokenizer import load_prompt_tokenizer
from stages.common.spreadsheets import FORMULA_STARTS, csv_text, neutral, original
from stages.common.training.adapter_folder import model_card
from stages.report import read_csv
from tests.evaluated import Work
from tests.hostile import anything, examples, is_text, labels, texts
from tests.workplace import ROOT, Workplace, make_workplace

FORMATS = ("csv", "tsv", "jsonl", "parquet")
Row = dict[str, str]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A project whose base is there; each example writes its own table and params.yaml."""
    place = make_workplace(tmp_path_factory.mktemp("tables") / "project")
    assert place.main("stages.base_model") == 0
    return place


def put_table(place: Workplace, name: str, content: bytes) -> None:
    for old in (place.folder / "data/raw").iterdir():
        old.unlink()
    (place.folder / "data/raw" / name).write_bytes(content)


def set_params(place: Workplace, names: list[str], columns: dict[str, str], path: str) -> None:
    values = YAML(typ="safe").load(ROOT / "recipes/tweet-sentiment.yaml")
    values["task"]["labels"] = names
    values["task"]["positive_label"] = names[0] if len(names) == 2 else None
    values["evaluate"]["threshold"] = {"method": "max_f1"} if len(names) == 2 else None
    values["ingest"]["source"] = {"kind": "files", "paths": [path], "format": None}
    values["ingest"]["columns"] = columns | dict.fromkeys(("group", "split", "slice"))
    values["ingest"]["max_refused_share"] = 0.99
    values["format_prompts"] |= {"template": "Review: {{ text }}\nOpinion:", "max_length_tokens": 2_000}
    place.write("params.yaml", yaml_text(values))


def yaml_text(value: Any) -> str:
    """YAML with every character that could mean something escaped; ruamel writes some that it cannot read."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{yaml_text(key)}: {yaml_text(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(yaml_text, value)) + "]"
    if isinstance(value, str):
        escaped = (char if char.isascii() and char.isalnum() else f"\\U{ord(char):08x}" for char in value)
        return f'"{"".join(escaped)}"'
    return json.dumps(value)


def table_bytes(form: str, columns: list[str], rows: list[list[str]]) -> bytes:
    """A table as other programs write it; raises UnicodeError for what the form cannot hold."""
    if form == "jsonl":
        return "".join(json.dumps(dict(zip(columns, row, strict=True))) + "\n" for row in rows).encode()
    if form == "parquet":
        file = io.BytesIO()
        arrays = [pa.array([row[number] for row in rows], pa.string()) for number in range(len(columns))]
        pq.write_table(pa.Table.from_arrays(arrays, columns), file)
        return file.getvalue()
    text = io.StringIO(newline="")
    csv.writer(text, delimiter="," if form == "csv" else "\t", quoting=csv.QUOTE_ALL).writerows([columns, *rows])
    return text.getvalue().encode()


column_names = st.lists(
    # A brace would make a pattern of it, and Parquet's paths have dots.
    anything(3).filter(lambda name: bool(name.strip()) and is_text(name) and not set(name) & set("{}.")),
    min_size=3, max_size=3, unique=True,
)  # fmt: skip


@examples(25, shrinks=False)
@given(
    names=labels(), columns=column_names, contents=st.lists(anything(), min_size=1, max_size=6),
    identities=st.lists(anything(), min_size=6, max_size=6), wrong_label=anything(), form=st.sampled_from(FORMATS),
)  # fmt: skip
def test_every_row_is_kept_whole_or_counted_as_refused(
    names: list[str], columns: list[str], contents: list[str], identities: list[str], wrong_label: str, form: str,
    place: Workplace,
) -> None:  # fmt: skip
    rows = [[f"h{n}", f"harmless text number {n}", names[n % len(names)]] for n in range(10 * len(names))]
    for number, (content, identity) in enumerate(zip(contents, identities, strict=False)):
        rows.append([f"{number}:{identity}", f"{number}:{content}", names[number % len(names)]])
    rows.append(["wrong", "text of a wrong label", wrong_label])
    try:
        table = table_bytes(form, columns, rows)
    except UnicodeError:
        assume(False)
    put_table(place, f"table.{form}", table)
    set_params(place, names, dict(zip(("id", "text", "label"), columns, strict=True)), f"data/raw/table.{form}")
    for stage in ("ingest", "format_prompts", "split"):
        if place.main(f"stages.{stage}"):
            # Two labels that no answer could tell apart, or that fill the prompt; said in one message.
            assert stage == "format_prompts"
            return
    expected = {
        identity: (text.strip(), label)
        for identity, text, label in rows
        if is_text(text) and is_text(identity) and label in names
    }
    prompts = {row["id"]: row for row in pq.read_table(place.folder / "data/prompts.parquet").to_pylist()}
    # Numbers make all texts different, so that none is a duplicate.
    assert {identity: (row["text"], row["label"]) for identity, row in prompts.items()} == expected
    report = json.loads((place.folder / "data/reports/ingest.json").read_text(encoding="utf-8"))
    assert (report["rows_read"], report["rows_refused"]) == (len(rows), len(rows) - len(expected))
    controls = set(load_prompt_tokenizer(place.folder / "models/tokenizer").control_ids.values())
    for row in prompts.values():
        assert row["prompt"] == f"Review: {row['text']}\nOpinion:"
        assert not controls & {*row["prompt_ids"], *row["completion_ids"][:-1]}
    parts = [pq.read_table(path) for path in sorted((place.folder / "data/splits").glob("*.parquet"))]
    assert sorted(identity for part in parts for identity in part["id"].to_pylist()) == sorted(expected)


def test_a_file_whose_name_is_no_text_is_read_and_named(place: Workplace) -> None:
    rows = [[str(number), f"text {number}", ("a", "b", "c")[number % 3]] for number in range(30)]
    table = table_bytes("csv", ["id", "text", "label"], rows)
    put_table(place, b"t\xff\x1b[2J.csv".decode(errors="surrogateescape"), table)
    set_params(place, ["a", "b", "c"], {"id": "id", "text": "text", "label": "label"}, "data/raw/*.csv")
    assert place.main("stages.ingest") == 0
    assert pq.read_table(place.folder / "data/records.parquet").num_rows == 30


# --- reports ----------------------------------------------------------------------------------------------------------


class Table(HTMLParser):
    """The texts of a table's cells, row by row, and all tags."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.tags: set[str] = set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_data(self, data: str) -> None:
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def rendered(markdown: str) -> Table:
    found = Table()
    found.feed(MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"]).render(markdown))
    return found


TAGS = {"table", "thead", "tbody", "tr", "th", "td", "br", "em", "code", "h1", "h2", "p", "ul", "li", "strong"}


@examples(300)
@given(names=st.lists(anything(), min_size=1, max_size=4))
def test_names_stand_in_their_cells_and_are_no_markup(names: list[str]) -> None:
    found = rendered(markdown_table(["x"] * len(names), [[literal(name) for name in names]], padded=False))
    assert found.tags <= TAGS
    [_, cells] = found.rows
    # What cannot be shown, and what HTML itself would not take, is a replacement character.
    assert len(cells) == len(names)
    for name, cell in zip(names, cells, strict=True):
        shown = re.sub("[^!-~]", "", " ".join(name.splitlines()))
        assert re.sub("[^!-~]", "", cell) == shown


@examples(8, shrinks=False)
@given(names=labels(2, 3), identities=st.lists(texts(), min_size=8, max_size=8), slices=st.lists(texts(), min_size=1,
       max_size=3))  # fmt: skip
def test_a_report_has_each_id_label_and_slice_in_one_cell(
    names: list[str], identities: list[str], slices: list[str], tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("evaluated")
    parts = [part.strip() for part in slices]
    work = Work(folder, names, rows=24, slices=parts)
    ids = [f"{identities[row % 8]}{row}" for row in range(24)]
    for name in ("validation", "test"):
        rewrite_ids(work, name, ids)
    for name in ("ingest", "format_prompts", "split"):
        place_json(folder, f"data/reports/{name}.json", {"rows": {identities[0]: 1}})
    params = YAML(typ="safe").load(folder / "params.yaml")
    place_json(folder, "models/adapter/README.md", card_of(names, params))
    place = Workplace(folder)
    assert place.main("stages.evaluate") == 0
    assert place.main("stages.report") == 0
    report = (folder / "metrics/report.md").read_text(encoding="utf-8")
    found = rendered(report)
    assert found.tags <= TAGS, report
    for block in tables_of(report):
        widths = {len(row) for row in rendered(block).rows}
        assert len(widths) == 1, block
    shown = {visible(cell) for row in found.rows for cell in row}
    for name in (*names, *parts):
        assert visible(name) in shown
    card = ModelCard((folder / "metrics/model_card.md").read_text(encoding="utf-8"))
    metadata = card.data.to_dict()
    assert (metadata["library_name"], metadata["model-index"][0]["name"]) == ("peft", "base: classification adapter")
    assert [line for line in card.text.splitlines() if line.startswith("# ")] == ["# base: classification adapter"]
    # Spreadsheets compute nothing of it, and whoever reads it back gets the ids themselves.
    mistakes, listed = (
        read_csv(folder / name) for name in ("metrics/evaluation/misclassified.csv", "data/reading_list.csv")
    )
    for row in (*mistakes, *listed):
        assert not row["id"].startswith(FORMULA_STARTS) and original(row["id"]) in ids
    if len(names) == 2:
        assert sorted(original(row["id"]) for row in listed) == sorted(ids)
        assert {original(row["slice"]) for row in listed} == set(parts)


def visible(text: str) -> str:
    return re.sub("[^!-~]", "", text)


def tables_of(markdown: str) -> Iterator[str]:
    for block in markdown.split("\n\n"):
        if block.startswith("|"):
            yield block


def place_json(folder: Path, name: str, value: Any) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")


def rewrite_ids(work: Work, part: str, ids: list[str]) -> None:
    for path in (work.folder / "data").glob(f"*/**/{part}.parquet"):
        table = pq.read_table(path)
        pq.write_table(table.set_column(0, "id", pa.array(ids)).replace_schema_metadata(table.schema.metadata), path)


def card_of(names: list[str], params: dict[str, Any]) -> str:
    provenance = {
        "base": {"source": {"source": "folder", "path": "base"}}, "parameters": params,
        "data": {name: {"sha256": "0" * 64, "rows": 1} for name in ("train", "validation")},
        "hardware": {"device": "cpu", "compute_dtype": "float32"},
    }  # fmt: skip
    return str(model_card({"kind": "classification", "labels": names, "max_length_tokens": 9}, provenance))


# --- exports ----------------------------------------------------------------------------------------------------------


@examples(300)
@given(cell=anything())
def test_no_cell_begins_a_formula_and_every_cell_comes_back(cell: str) -> None:
    assert not neutral(cell).startswith(FORMULA_STARTS)
    assert original(neutral(cell)) == cell
    if not cell.startswith("'") and not cell.startswith(FORMULA_STARTS):
        assert neutral(cell) == cell


@examples(100)
@given(rows=st.lists(st.lists(anything(), min_size=2, max_size=2), max_size=4))
def test_cells_written_as_csv_come_back(rows: list[list[str]]) -> None:
    assert list(csv.reader(io.StringIO(csv_text(rows), newline=""))) == rows


@examples(100)
@given(rows=st.lists(st.tuples(anything(), anything()), min_size=1, max_size=4), names=labels(2, 3))
def test_a_download_of_the_page_is_a_table_of_the_same_cells(rows: list[tuple[str, str]], names: list[str]) -> None:
    probabilities = {name: 1 / len(names) for name in names}
    lines: list[dict[str, Any]] = [
        {"id": identity, "text": text, "label": names[0], "probabilities": probabilities} for identity, text in rows
    ]
    read = list(csv.reader(io.StringIO(as_csv(lines, names), newline="")))
    assert {len(row) for row in read} == {3 + len(names)}
    assert all(not cell.startswith(FORMULA_STARTS) for row in read for cell in row)
    assert [(original(row[0]), original(row[1])) for row in read[1:]] == rows
