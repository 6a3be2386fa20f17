"""Several sources in one table, and a part of the rows: which rows stay, and what they are called."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from stages import ingest
from stages.common.errors import UserError
from stages.common.schema.ingest import TableFormat
from stages.common.sources.opening import SourceFile, distinct_files
from stages.common.sources.selection import draw_rows

ROOT = Path(__file__).resolve().parents[1]
REAL = ROOT.parent / "shared" / "data"
RECIPE = ROOT / "recipes" / "tweet-sentiment.yaml"
NO_COLUMNS = {"id": None, "group": None, "split": None, "slice": None}
QUESTIONS = NO_COLUMNS | {"text": "q", "label": "a"}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "raw").mkdir(parents=True)
    return tmp_path


def source(paths: Any, columns: dict[str, Any] = QUESTIONS, rows: Any = None) -> dict[str, Any]:
    if isinstance(paths, str):
        paths = [f"data/raw/{paths}"]
    return {"source": {"kind": "files", "paths": paths, "format": None}, "columns": columns, "rows": rows}


def table(name: str, rows: int, start: int = 0) -> None:
    """Questions "NAME 0?", "NAME 1?", … with answers, in data/raw/NAME.csv."""
    lines = ["q,a", *(f"{name} {number}?,answer {number}" for number in range(start, start + rows))]
    Path(f"data/raw/{name}.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def run(*sources: dict[str, Any], kind: str = "question_answering", **changes: Any) -> tuple[list[Any], dict[str, Any]]:
    """Run the stage on a source and further ones; returns records and report. `changes` are keys of its block."""
    params = YAML(typ="safe").load(RECIPE.read_text(encoding="utf-8"))
    first, *further = sources
    params["task"] = {"kind": kind}
    params["ingest"] |= first | {"further_sources": further} | changes
    YAML(typ="safe").dump(params, Path("params.yaml"))
    ingest.main()
    return pq.read_table(ingest.RECORDS).to_pylist(), json.loads(ingest.REPORT.read_text(encoding="utf-8"))


# --- a part of the rows -----------------------------------------------------------------------------------------------


@given(st.lists(st.integers(-1, 2), max_size=40), st.data())
def test_as_many_rows_are_drawn_as_are_wanted_and_more_only_add_to_them(splits: list[int], data: st.DataObject) -> None:
    fewer = data.draw(st.integers(0, len(splits)))
    more = data.draw(st.integers(fewer, len(splits)))
    numbers = np.array(splits, np.int8)
    few, many = (draw_rows(numbers, count, [7, 1], "rows") for count in (fewer, more))
    assert (few.sum(), many.sum()) == (fewer, more)
    assert not (few & ~many).any()


def test_rows_of_a_split_that_is_not_named_all_stay_and_one_split_does_not_change_another() -> None:
    splits = np.array([0] * 20 + [2] * 10 + [1] * 5, np.int8)
    one = draw_rows(splits, {"train": 3, "test": 4}, [7, 1], "rows")
    other = draw_rows(splits, {"test": 4, "train": 9}, [7, 1], "rows")
    assert [int(one[splits == number].sum()) for number in (0, 1, 2)] == [3, 5, 4]
    assert one[splits == 2].tolist() == other[splits == 2].tolist()
    assert one.tolist() != draw_rows(splits, {"train": 3, "test": 4}, [7, 2], "rows").tolist()


@pytest.mark.parametrize(
    ("splits", "wanted", "expected"),
    [
        ([-1] * 3, 4, "rows: 4 rows are wanted, but the source has only 3"),
        ([], 1, "rows: 1 rows are wanted, but the source has only 0"),
        ([0] * 3, {"train": 4}, "rows.train: 4 rows of train are wanted, but the source has only 3"),
        ([0] * 3, {"validation": 1}, "rows.validation: 1 rows of validation are wanted, but the source has only 0"),
        ([-1] * 3, {"train": 1}, "rows.train: 1 rows of train are wanted, but the source publishes no split"),
    ],
)
def test_fewer_rows_than_are_wanted_are_an_error(splits: list[int], wanted: Any, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        draw_rows(np.array(splits, np.int8), wanted, [7, 1], "rows")
    assert str(caught.value).startswith(expected)


def test_a_drawn_table_keeps_the_order_of_the_source_and_follows_the_seed(project: Path) -> None:
    table("a", 50)
    drawn = []
    for seed in (1, 1, 2):
        records, report = run(source("a.csv", rows=20), seed=seed)
        rows = [int(record["origin"].partition(":")[2]) for record in records]
        assert rows == sorted(rows)
        assert (len(rows), report["rows_not_drawn"], report["rows_kept"]) == (20, 30, 20)
        drawn.append(rows)
    assert drawn[0] == drawn[1] != drawn[2]


def test_rows_are_drawn_of_each_published_split(project: Path) -> None:
    table("a", 30)
    table("b", 10, start=100)
    paths = {"train": ["data/raw/a.csv"], "test": ["data/raw/b.csv"]}
    _, report = run(source(paths, rows={"train": 12}))
    assert report["rows_per_published_split"] == {"train": 12, "validation": 0, "test": 10}
    with pytest.raises(UserError, match=r"ingest\.rows\.test: 11 rows of test are wanted, but the source has only 10"):
        run(source(paths, rows={"train": 12, "test": 11}))


def test_only_rows_that_could_stay_are_drawn(project: Path) -> None:
    lines = [f"question {number // 2}?,answer" for number in range(20)] + [" ,answer"] * 5
    Path("data/raw/a.csv").write_text("\n".join(["q,a", *lines]) + "\n", encoding="utf-8")
    records, report = run(source("a.csv", rows=10), max_refused_share=0.5)
    assert len({record["text"] for record in records}) == 10
    assert (report["exact_duplicates_removed"], report["rows_refused"], report["rows_not_drawn"]) == (10, 5, 0)


# --- several sources --------------------------------------------------------------------------------------------------


def test_sources_keep_their_order_and_each_gives_as_many_rows_as_are_wanted(project: Path) -> None:
    for name in "abc":
        table(name, 10)
    records, report = run(source("b.csv", rows=4), source("a.csv"), source("c.csv", rows=7))
    names = [record["origin"][0] for record in records]
    assert "".join(names) == "b" * 4 + "a" * 10 + "c" * 7
    assert report["rows_per_source"] == {
        "ingest": {"read": 10, "kept": 4},
        "ingest.further_sources.0": {"read": 10, "kept": 10},
        "ingest.further_sources.1": {"read": 10, "kept": 7},
    }
    with pytest.raises(UserError, match=r"ingest\.further_sources\.0\.rows: 11 rows are wanted"):
        run(source("b.csv"), source("a.csv", rows=11))


def test_conversations_and_instructions_make_one_table(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    Path("data/raw/a.jsonl").write_text(json.dumps({"c": turns}) + "\n", encoding="utf-8")
    Path("data/raw/b.csv").write_text("instruction,input,output\nAdd.,1 2,3\nSing.,,La\nHi,,Hello\n", encoding="utf-8")
    conversation = NO_COLUMNS | {"text": {"column": "c", "format": "sharegpt"}, "label": None}
    instruction = NO_COLUMNS | {"text": "{instruction}\n\n{input}", "label": "output"}
    records, report = run(source("a.jsonl", conversation), source("b.csv", instruction), kind="chat")
    contents = [[message["content"] for message in json.loads(record["messages"])] for record in records]
    assert contents == [["Hi", "Hello"], ["Add.\n\n1 2", "3"], ["Sing.", "La"]]
    # The third row of the second source says what the first source says.
    assert report["exact_duplicates_removed"] == 1
    assert "(ingest 1 of 1, ingest.further_sources.0 2 of 3)" in capsys.readouterr().out


def test_a_file_can_be_two_sources_and_its_rows_have_different_ids(project: Path) -> None:
    table("a", 2)
    records, report = run(source("a.csv"), source("a.csv", QUESTIONS | {"text": "a", "label": "q"}))
    assert [record["id"] for record in records] == [
        "a.csv:2",
        "a.csv:3",
        "ingest.further_sources.0/a.csv:2",
        "ingest.further_sources.0/a.csv:3",
    ]
    assert report["rows_per_file"] == {"data/raw/a.csv": 2, "data/raw/a.csv (ingest.further_sources.0)": 2}


def test_an_id_of_another_source_is_taken(project: Path) -> None:
    for name in "ab":
        Path(f"data/raw/{name}.csv").write_text(f"i,q,a\n1,{name}?,yes\n", encoding="utf-8")
    columns = QUESTIONS | {"id": "i"}
    with pytest.raises(UserError, match=r"b\.csv row 2: id '1' is already that of data/raw/a\.csv row 2"):
        run(source("a.csv", columns), source("b.csv", columns))
    records, _ = run(source("a.csv", columns), source("b.csv", QUESTIONS | {"id": "b-{i}"}))
    assert [record["id"] for record in records] == ["1", "b-1"]


@pytest.mark.parametrize(
    ("further", "expected"),
    [
        (source("c.csv"), r"ingest\.further_sources\.0\.source\.paths: no file matches 'data/raw/c\.csv'"),
        (source("a.csv", QUESTIONS | {"text": "{q!r}"}), r"ingest\.further_sources\.0\.columns\.text: "),
        (source("a.csv", QUESTIONS | {"text": "x"}), "has no column 'x'"),
        (source("empty.csv"), "empty.csv: no rows. Put at least one row there"),
        (
            source({"train": ["data/raw/a.csv"]}, QUESTIONS | {"split": "q"}),
            r"ingest\.further_sources\.0\.columns\.split: 'q' contradicts ingest\.further_sources\.0\.source\.paths",
        ),
    ],
)
def test_what_is_wrong_with_a_further_source_is_said_with_its_key(
    project: Path, further: dict[str, Any], expected: str
) -> None:
    table("a", 3)
    table("empty", 0)
    with pytest.raises(UserError, match=expected):
        run(source("a.csv"), further)
    assert not ingest.RECORDS.exists()


def test_names_that_are_taken_get_the_source_before_them() -> None:
    form = TableFormat(type="csv", column_names=None, quoting=True, encoding="utf-8")
    first = [SourceFile(Path("x/a.csv"), "one/set/a.csv", "a.csv", None, form)]
    files = [
        SourceFile(Path("y/a.csv"), "other/set/a.csv", "a.csv", None, form),
        SourceFile(Path("y/b.csv"), "other/set/b.csv", "b.csv", None, form),
    ]
    found = [(file.name, file.origin) for file in distinct_files(files, first, "key")]
    assert found == [("other/set/a.csv", "key/a.csv"), ("other/set/b.csv", "b.csv")]
    again = [(file.name, file.origin) for file in distinct_files(first, first, "key")]
    assert again == [("one/set/a.csv (key)", "key/a.csv")]


# --- published data ---------------------------------------------------------------------------------------------------


def published(name: str) -> Path:
    if not (REAL / name).exists():
        pytest.skip(f"{name} is not in a folder shared/data beside this repository")
    path = Path("data/raw", Path(name).name)
    path.symlink_to(REAL / name)
    return path


def test_a_published_chat_mix_is_read_whole(project: Path) -> None:
    conversation = NO_COLUMNS | {"id": "id", "text": {"column": "conversations", "format": "sharegpt"}, "label": None}
    instruction = NO_COLUMNS | {"text": "{instruction}\n\n{input}", "label": "output"}
    talks, tasks = published("chat/sharegpt_sgd.jsonl.gz"), published("chat/instruction_gpteacher.jsonl.gz")
    records, report = run(
        source([str(talks)], conversation, 1_000), source([str(tasks)], instruction, 500), kind="chat"
    )
    # The data's own description: 3,000 rows each, alternating, none empty and none repeated.
    assert (report["rows_read"], report["rows_refused"], report["exact_duplicates_removed"]) == (6_000, 0, 0)
    assert [source["kept"] for source in report["rows_per_source"].values()] == [1_000, 500]
    assert max(len(json.loads(record["messages"])) for record in records[:1_000]) > 20
    assert {len(json.loads(record["messages"])) for record in records[1_000:]} == {2}


def test_published_medical_questions_are_read_with_their_sources_as_slices(project: Path) -> None:
    columns = NO_COLUMNS | {"text": "question", "label": "answer", "group": "focus", "slice": "source"}
    records, report = run(source([str(published("medical-qa/medquad.jsonl.gz"))], columns))
    # As its description counts them.
    assert (report["rows_kept"], report["rows_per_slice"]["GARD"], len(report["rows_per_slice"])) == (5_000, 1_952, 9)
    assert all(record["messages"] is None for record in records)
