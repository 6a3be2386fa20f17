"""The stage itself runs in a folder of its own, on small tables whose outcome can be counted by hand."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from stages import ingest
from stages.common import text_keys
from stages.common.errors import UserError
from stages.common.labels import join_labels, split_labels
from stages.common.schema.ingest import Columns
from stages.common.schema.task import ClassificationTask, GenerationTask, Task
from stages.common.sources.cells import RefusedRow
from stages.common.sources.columns import make_mapping
from stages.common.text_keys import group_key, text_key

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "tweet-sentiment.yaml"
LABELS = ["negative", "neutral", "positive"]
COLUMNS = {"id": "id", "text": "text", "label": "label", "group": None, "split": None, "slice": None}
SENTIMENT = ClassificationTask(
    kind="classification", multi_label=False, labels=LABELS, label_descriptions=None, positive_label=None
)
CHAT = GenerationTask(kind="chat")
TOPICS = SENTIMENT.model_copy(update={"multi_label": True, "labels": ["art", "law", "war"]})
TABLE = "id,text,label\n1,good,positive\n2,bad,negative\n3,so so,neutral\n"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data" / "raw").mkdir(parents=True)
    return tmp_path


def run(tables: dict[str, str], **changes: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Run the stage on tables in data/raw/; returns records and report. `changes` are the task, or ingest's keys."""
    params = YAML(typ="safe").load(RECIPE.read_text(encoding="utf-8"))
    for name, content in tables.items():
        Path("data/raw", name).write_text(content, encoding="utf-8", newline="")
    paths = changes.pop("paths", [f"data/raw/{name}" for name in tables])
    source = {"kind": "files", "paths": paths, "format": None}
    columns = COLUMNS | changes.pop("columns", {})
    params["task"] = changes.pop("task", params["task"])
    params["ingest"] |= {"source": source, "columns": columns} | changes
    with Path("params.yaml").open("w", encoding="utf-8") as file:
        YAML(typ="safe").dump(params, file)
    ingest.main()
    return pq.read_table(ingest.RECORDS).to_pylist(), json.loads(ingest.REPORT.read_text(encoding="utf-8"))


def make(columns: dict[str, Any], values: list[Any], task: Task = SENTIMENT) -> Any:
    mapping = make_mapping(Columns.model_validate(COLUMNS | columns), task, "ingest.columns")
    return mapping.make(values, "rows.csv:7", None)


# --- text keys --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("  It's GOOD,\tisn't it?! ", "it s good isn t it"),
        # Full-width letters and a ligature are NFKC's, ß is case folding's (Unicode 16.0, CaseFolding.txt).
        ("ＧＯＯＤ ﬁne Straße", "good fine strasse"),
        ("e\u0301tude", "étude"),
        ("हिन्दी", "हिन्दी"),
        ("snake_case 3.5€", "snake case 3 5"),
        ("😀  😀", "😀 😀"),
        ("", ""),
    ],
)
def test_a_text_key_keeps_words_alone(text: str, key: str) -> None:
    assert text_key(text) == key


@given(st.text(alphabet=st.characters(max_codepoint=127)))
def test_the_fast_way_for_ascii_gives_what_the_general_one_gives(text: str) -> None:
    words = text_keys._WORD.findall(text.casefold())
    assert text_key(text) == (" ".join(words) or " ".join(text.split()))


@given(st.text())
def test_a_text_key_is_its_own_key(text: str) -> None:
    assert text_key(text_key(text)) == text_key(text)


def test_a_group_key_is_the_beginning_of_a_sha256() -> None:
    assert group_key("A  b!") == hashlib.sha256(b"a b").hexdigest()[:16]


# --- from rows to records ---------------------------------------------------------------------------------------------


def test_a_pattern_composes_columns_and_its_values_are_never_patterns_themselves() -> None:
    record = make({"text": "{{{a b}}}\n{c.d}", "id": "{a b}-{c.d}"}, ["{label.__class__}", "{{x}}", "neutral"])
    assert (record.text, record.id) == ("{{label.__class__}}\n{{x}}", "{label.__class__}-{{x}}")


@pytest.mark.parametrize("pattern", ["{}", "{text!r}", "{text:>10}", "{text", "}{", "{{text}}"])
def test_a_pattern_holds_nothing_but_columns(pattern: str) -> None:
    with pytest.raises(UserError, match=r"ingest\.columns\.text"):
        make_mapping(Columns.model_validate(COLUMNS | {"text": pattern}), SENTIMENT, "ingest.columns")


@pytest.mark.parametrize("pattern", ["{text.__class__}", "{text[0]}", "{0}"])
def test_a_hostile_pattern_is_only_the_name_of_a_column_that_is_missing(project: Path, pattern: str) -> None:
    with pytest.raises(UserError, match="has no column"):
        run({"a.csv": TABLE}, columns={"text": pattern})


def test_bins_are_closed_on_the_right_as_in_pandas() -> None:
    values = [-4.0, -1.0, -0.99, 0.0, 1.0, 1.01, 4.0]
    expected = pandas.cut(values, [-float("inf"), -1, 1, float("inf")], labels=LABELS).tolist()
    bins = {"label": {"column": "rating", "bins": [-1.0, 1.0]}}
    assert [make(bins, ["1", "text", value]).label for value in values] == expected


@pytest.mark.parametrize(
    ("columns", "values", "reason"),
    [
        ({}, ["1", " \n", "neutral"], "the text is empty"),
        ({}, ["1", None, "neutral"], "the text is empty"),
        ({"text": "{a}: {b}"}, ["1", "", " ", "neutral"], "the text is empty"),
        ({}, ["1", "a\0b", "neutral"], "NUL byte"),
        ({}, ["1", "a\ud800", "neutral"], "surrogate"),
        ({}, ["1", ["a"], "neutral"], "is a list, not a text"),
        ({}, ["1", "a", "Neutral"], "unknown label 'Neutral'"),
        ({}, ["1", "a", float("nan")], "the label is empty"),
        ({"label": {"column": "l", "aliases": {"0": "neutral"}}}, ["1", "a", "neutral"], "unknown label 'neutral'"),
        ({"label": {"column": "l", "bins": [-1.0, 1.0]}}, ["1", "a", "x"], "'x' is no number"),
        ({"label": {"column": "l", "bins": [-1.0, 1.0]}}, ["1", "a", "nan"], "'nan' is no number"),
        ({"label": {"column": "l", "bins": [-1.0, 1.0]}}, ["1", "a", None], "value is empty"),
        ({"group": "g"}, ["1", "a", "neutral", ""], "the group is empty"),
        ({"split": "s"}, ["1", "a", "neutral", "dev"], "split 'dev' is none of train, validation, test"),
    ],
)
def test_a_row_that_makes_no_record_is_refused_with_its_reason(
    columns: dict[str, Any], values: list[Any], reason: str
) -> None:
    with pytest.raises(RefusedRow, match=reason):
        make(columns, values)


def test_labels_come_through_aliases_and_numbers_are_read_as_written() -> None:
    aliases = {"label": {"column": "l", "aliases": {"0": "negative", "true": "positive"}}}
    assert [make(aliases, [7, "a", value]).label for value in ("0", 0, True)] == ["negative", "negative", "positive"]
    assert make(aliases, [7, "a", 0]).id == "7"


@pytest.mark.parametrize(
    ("separator", "cell", "labels"),
    [
        (" ", "war art", ["art", "war"]),
        ("; ", "war; art; ", ["art", "war"]),
        (",", " war,,law , war", ["law", "war"]),
        (",", "", []),
        (",", None, []),
        (None, ["war", "art"], ["art", "war"]),
        (None, '["war", "law", "art"]', ["art", "law", "war"]),
        (None, [], []),
        (None, None, []),
        (None, "[]", []),
        (None, "", []),
    ],
)
def test_a_cell_with_several_labels_gives_them_once_and_in_the_order_of_the_task(
    separator: str | None, cell: Any, labels: list[str]
) -> None:
    columns = {"label": {"column": "l", "separator": separator, "aliases": None}}
    found = make(columns, ["1", "a", cell], TOPICS).label
    assert (found, split_labels(found)) == (join_labels(labels), labels)


def test_several_names_of_one_label_in_a_cell_are_that_label() -> None:
    aliases = {"painting": "art", "1": "art", "combat": "war"}
    columns = {"label": {"column": "l", "separator": None, "aliases": aliases}}
    assert make(columns, ["1", "a", ["combat", "painting", 1]], TOPICS).label == '["art", "war"]'


@pytest.mark.parametrize(
    ("separator", "cell", "reason"),
    [
        (" ", "war peace", "unknown label 'peace' in the list 'war peace'"),
        (" ", ["war"], "is a list, not a text"),
        (None, ["war", "Art"], "unknown label 'Art' in the list"),
        (None, ["war", None], "unknown label '' in the list"),
        (None, ["war", ["art"]], "is a list, not a text"),
        (None, "war", "the label 'war' is no list in JSON"),
        (None, '"war"', "the label is a str, not a list"),
        (None, {"war": 1}, "the label is a dict, not a list"),
    ],
)
def test_a_cell_that_is_no_list_of_labels_is_refused(separator: str | None, cell: Any, reason: str) -> None:
    with pytest.raises(RefusedRow, match=reason):
        make({"label": {"column": "l", "separator": separator, "aliases": None}}, ["1", "a", cell], TOPICS)


@given(st.lists(st.text()))
def test_labels_in_a_cell_are_read_as_they_were_written(labels: list[str]) -> None:
    assert split_labels(join_labels(labels)) == labels


def test_a_slice_is_a_column_or_pattern_whose_value_is_stripped() -> None:
    assert make({"slice": " {a}/{b} "}, ["1", "text", "neutral", "x", 2021]).slice == "x/2021"
    for value, reason in (
        ("  ", "the slice is empty"),
        (None, "the slice is empty"),
        ("a\0", "NUL byte is in its slice"),
    ):
        with pytest.raises(RefusedRow, match=reason):
            make({"slice": "s"}, ["1", "text", "neutral", value])


@pytest.mark.parametrize("field", ["text", "label"])
def test_a_column_of_lists_is_no_pattern(field: str) -> None:
    text, label = {"column": "{a}", "format": "messages"}, {"column": "{a}", "separator": None, "aliases": None}
    columns, task = ({"label": label}, TOPICS) if field == "label" else ({"text": text, "label": None}, CHAT)
    with pytest.raises(UserError, match=rf"ingest\.columns\.{field}\.column: '{{a}}' is a pattern"):
        make(columns, [], task)


# --- the stage --------------------------------------------------------------------------------------------------------


def test_records_carry_text_label_group_and_origin(project: Path) -> None:
    records, report = run({"a.csv": TABLE.replace(",good,", ',"  good\r\n",')})
    assert records[0] == {
        "id": "1",
        "text": "good",
        "label": "positive",
        "group": group_key("good"),
        "split": None,
        "slice": None,
        "messages": None,
        "origin": "a.csv:2",
    }
    assert report["rows_per_label"] == {"negative": 1, "neutral": 1, "positive": 1}
    assert pq.read_table(ingest.EXEMPLARS).num_rows == 0
    assert sorted(path.name for path in Path("data").iterdir()) == [
        "exemplars.parquet",
        "raw",
        "records.parquet",
        "reports",
    ]


def test_the_same_input_gives_the_same_bytes(project: Path) -> None:
    digests = []
    for _ in range(2):
        run({"a.csv": many_rows(40)}, exemplars_per_label=3)
        digests.append([path.read_bytes() for path in (ingest.RECORDS, ingest.EXEMPLARS, ingest.REPORT)])
    assert digests[0] == digests[1]


def test_files_match_patterns_in_order_and_rows_without_id_get_file_and_row(project: Path) -> None:
    tables = {"b.csv": TABLE, "a.tsv": "id\ttext\tlabel\n\tother\tneutral\n", ".hidden.csv": "x"}
    records, report = run(tables, paths=["data/raw/*"])
    assert [record["id"] for record in records] == ["a.tsv:2", "1", "2", "3"]
    assert report["rows_per_file"] == {"data/raw/a.tsv": 1, "data/raw/b.csv": 3}


def test_exact_duplicates_go_and_other_rows_with_their_text_or_id_are_reported(project: Path) -> None:
    rows = [
        "1,good,positive",
        "2,bad,negative",
        "3,so so,neutral",
        "1,good,positive",  # the same row again
        "5,good,positive",  # the same but for its id
        "6,Good!,positive",  # a near-duplicate
        "7,good,neutral",  # a contradiction
        "2,other,neutral",  # an id that is taken
    ]
    records, report = run({"a.csv": "id,text,label\n" + "\n".join(rows) + "\n"}, max_refused_share=0.2)
    assert [record["id"] for record in records] == ["1", "2", "3", "6", "7"]
    assert (report["rows_read"], report["exact_duplicates_removed"], report["rows_refused"]) == (8, 2, 1)
    assert report["refused"] == [
        {"file": "data/raw/a.csv", "row": 9, "reason": "id '2' is already that of data/raw/a.csv row 3"}
    ]
    assert report["near_duplicates"] == {"texts": 1, "rows": 3, "ids": [["1", "6", "7"]]}
    assert report["contradicting_labels"] == {"texts": 1, "rows": 3, "ids": [["1", "6", "7"]]}


def test_too_many_refused_rows_stop_the_stage_and_leave_no_output(project: Path) -> None:
    broken = TABLE + "".join(f"x{number},text {number},Neutral\n" for number in range(12)) + "y,,neutral\n"
    with pytest.raises(UserError) as caught:
        run({"a.csv": broken}, max_refused_share=0.5)
    message = str(caught.value)
    assert "13 of 16 rows cannot be used" in message
    assert "data/raw/a.csv row 5: unknown label 'Neutral'" in message
    assert "row 14" in message
    assert "row 15:" not in message
    assert "12 x unknown label, 1 x empty text" in message
    assert "Labels allowed: 'negative', 'neutral', 'positive'" in message
    assert not any(path.exists() for path in (ingest.RECORDS, ingest.EXEMPLARS, ingest.REPORT))
    listed = json.loads(ingest.REFUSED_REPORT.read_text())["refused"]
    assert [row["row"] for row in listed] == list(range(5, 18))
    run({"a.csv": TABLE})
    assert not ingest.REFUSED_REPORT.exists()


def test_the_share_of_refused_rows_may_be_reached_but_not_passed(project: Path) -> None:
    broken = TABLE + "4,,neutral\n"
    assert run({"a.csv": broken}, max_refused_share=0.25)[1]["rows_refused"] == 1
    with pytest.raises(UserError, match="1 of 4 rows"):
        run({"a.csv": broken}, max_refused_share=0.249)


def test_more_refused_rows_than_are_listed_are_all_counted(project: Path) -> None:
    broken = TABLE + "".join(f"x{number},t,label {number}\n" for number in range(5_000))
    report = run({"a.csv": broken}, max_refused_share=0.9999)[1]
    assert (report["rows_refused"], sum(report["refused_by_reason"].values()), len(report["refused"])) == (
        5_000,
        5_000,
        1_000,
    )
    assert [report["refused"][0]["row"], report["refused"][-1]["row"]] == [5, 1_004]
    # What cells held stays out of the counts: the report shows them, and lies in Git.
    assert report["refused_by_reason"] == {"unknown label": 5_000}


def test_published_splits_come_from_files_or_from_a_column(project: Path) -> None:
    tables = {"a.csv": TABLE, "b.csv": TABLE.replace("\n", "\nb", 3)}
    paths = {"train": ["data/raw/a.csv"], "test": ["data/raw/b.csv"]}
    records, report = run(tables, paths=paths)
    assert [record["split"] for record in records] == ["train"] * 3 + ["test"] * 3
    assert report["rows_per_published_split"] == {"train": 3, "validation": 0, "test": 3}
    with pytest.raises(UserError, match=r"columns\.split"):
        run(tables, paths=paths, columns={"split": "label"})
    with pytest.raises(UserError, match="in both train and test"):
        run(tables, paths={"train": ["data/raw/a.csv"], "test": ["data/raw/*.csv"]})
    column = {"c.csv": "id,text,label,part\n1,a,neutral,train\n2,b,negative,validation\n3,c,positive,test\n"}
    assert [record["split"] for record in run(column, columns={"split": "part"})[0]] == ["train", "validation", "test"]


def many_rows(count: int, ending: str = "a") -> str:
    """Texts "text 0 a", "Text 0, a!", "text 1 a", …: each in two wordings under one label."""
    lines = [
        f'{i}{ending},text {i} {ending},{LABELS[i % 3]}\n{i}x{ending},"Text {i}, {ending}!",{LABELS[i % 3]}\n'
        for i in range(count)
    ]
    return "id,text,label\n" + "".join(lines)


def test_exemplars_leave_with_their_near_duplicates_and_depend_on_the_seed_alone(project: Path) -> None:
    chosen = []
    for seed in (1, 1, 2):
        records, report = run({"a.csv": many_rows(30)}, exemplars_per_label=2, seed=seed)
        exemplars = pq.read_table(ingest.EXEMPLARS).to_pylist()
        assert [exemplar["label"] for exemplar in exemplars] == LABELS * 2
        assert len({exemplar["group"] for exemplar in exemplars}) == 6
        assert not {exemplar["group"] for exemplar in exemplars} & {record["group"] for record in records}
        assert (len(records), report["exemplars"], report["removed_with_exemplars"]) == (60 - 12, 6, 6)
        chosen.append([exemplar["id"] for exemplar in exemplars])
    assert chosen[0] == chosen[1] != chosen[2]


def test_exemplars_take_the_group_of_a_column_and_their_text_elsewhere_with_them(project: Path) -> None:
    rows = [f"{i},text {i // 2},{LABELS[i // 2 % 3]},group {i}\n" for i in range(24)]
    columns = {"group": "g"}
    records, report = run({"a.csv": "id,text,label,g\n" + "".join(rows)}, columns=columns, exemplars_per_label=1)
    texts = {exemplar["text"] for exemplar in pq.read_table(ingest.EXEMPLARS).to_pylist()}
    assert not texts & {record["text"] for record in records}
    assert (len(records), report["removed_with_exemplars"]) == (18, 3)


def test_exemplars_leave_before_rows_are_drawn_and_do_not_depend_on_how_many(project: Path) -> None:
    chosen = []
    for rows in (20, 48):
        records, report = run({"a.csv": many_rows(30)}, exemplars_per_label=2, rows=rows)
        exemplars = pq.read_table(ingest.EXEMPLARS).to_pylist()
        assert (len(records), report["rows_not_drawn"]) == (rows, 48 - rows)
        assert not {exemplar["group"] for exemplar in exemplars} & {record["group"] for record in records}
        chosen.append([exemplar["id"] for exemplar in exemplars])
    assert chosen[0] == chosen[1]
    with pytest.raises(UserError, match="49 rows are wanted, but the source has only 48"):
        run({"a.csv": many_rows(30)}, exemplars_per_label=2, rows=49)


def test_exemplars_come_from_the_published_train_split(project: Path) -> None:
    tables = {"a.csv": many_rows(9), "b.csv": many_rows(30, "b")}
    run(tables, paths={"train": ["data/raw/a.csv"], "test": ["data/raw/b.csv"]}, exemplars_per_label=3)
    assert {exemplar["split"] for exemplar in pq.read_table(ingest.EXEMPLARS).to_pylist()} == {"train"}
    with pytest.raises(UserError, match="the train split has only 3"):
        run(tables, paths={"train": ["data/raw/a.csv"], "test": ["data/raw/b.csv"]}, exemplars_per_label=4)


@pytest.mark.parametrize(
    ("content", "changes", "expected"),
    [
        ("id,text,label\n", {}, "no rows"),
        (TABLE.replace("negative", "neutral"), {}, "no row is left with 'negative'"),
        ("id,text,label\n1,a,neutral\n", {}, "all 1 rows left have the label 'neutral'"),
        (TABLE, {"exemplars_per_label": 1}, "no row is left with 'negative', 'neutral', 'positive'"),
        (TABLE, {"exemplars_per_label": 2}, "the table has only 1"),
        (TABLE, {"columns": {"text": "{titel}: {text}"}}, "no column 'titel'"),
        (TABLE, {"paths": ["data/raw/b*.csv"]}, "no file matches 'data/raw/b*.csv'; the folder has a.csv"),
    ],
)
def test_a_table_that_cannot_be_used_ends_in_one_message(
    project: Path, content: str, changes: dict[str, Any], expected: str
) -> None:
    with pytest.raises(UserError) as caught:
        run({"a.csv": content}, **changes)
    assert expected in str(caught.value)
    assert not any(path.exists() for path in (ingest.RECORDS, ingest.EXEMPLARS, ingest.REPORT))


def test_more_rows_than_one_batch_keep_order_and_number(project: Path) -> None:
    records, report = run({"a.csv": many_rows(15_000) + "0a,again,neutral\n"}, max_refused_share=0.1)
    assert len(records) == 30_000
    assert [record["origin"] for record in records] == [f"a.csv:{line}" for line in range(2, 30_002)]
    assert report["refused"][0]["reason"] == "id '0a' is already that of data/raw/a.csv row 2"
    assert (report["near_duplicates"]["texts"], len(report["near_duplicates"]["ids"])) == (15_000, 100)


# --- other tasks ------------------------------------------------------------------------------------------------------


def test_rows_with_several_labels_are_counted_under_each_of_them(project: Path) -> None:
    table = "id,text,label\n1,one,art war\n2,two,\n3,three,law\n4,four,war\n4,four,war\n5,One!,war\n"
    columns = {"label": {"column": "label", "separator": " ", "aliases": None}}
    records, report = run({"a.csv": table}, task=TOPICS.model_dump(), columns=columns)
    assert [record["label"] for record in records] == ['["art", "war"]', "[]", '["law"]', '["war"]', '["war"]']
    assert report["rows_per_label"] == {"art": 1, "law": 1, "war": 3}
    assert report["exact_duplicates_removed"] == 1
    assert report["contradicting_labels"] == {"texts": 1, "rows": 2, "ids": [["1", "5"]]}


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        ("1,one,art war\n2,two,law war\n", "all 2 rows left have 'war'"),
        ("1,one,art\n2,two,law\n", "no row is left with 'war'"),
        ("1,one,art law war\n", "all 1 rows left have 'art', 'law', 'war'"),
        ("1,one,\n2,two,\n", "no row is left with 'art', 'law', 'war'"),
    ],
)
def test_of_several_labels_each_needs_a_row_with_it_and_one_without(project: Path, rows: str, expected: str) -> None:
    columns = {"label": {"column": "label", "separator": " ", "aliases": None}}
    with pytest.raises(UserError, match=expected):
        run({"a.csv": "id,text,label\n" + rows}, task=TOPICS.model_dump(), columns=columns)


def test_a_question_with_two_answers_stays_twice_and_the_summary_speaks_of_no_labels(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = ["q,a", "Why?,Because.", "why,Therefore.", "Why?,Because.", "How?,So.", "Who?,"]
    columns = {"id": None, "text": "q", "label": "a"}
    task = {"kind": "question_answering"}
    records, report = run({"a.csv": "\n".join(lines) + "\n"}, task=task, columns=columns, max_refused_share=0.5)
    found = [(record["text"], record["label"], record["messages"]) for record in records]
    assert found == [("Why?", "Because.", None), ("why", "Therefore.", None), ("How?", "So.", None)]
    assert (report["refused_by_reason"], report["rows_per_label"]) == ({"empty answer": 1}, {})
    assert report["contradicting_labels"]["ids"] == [["a.csv:2", "a.csv:3"]]
    assert capsys.readouterr().out.startswith("ingest: 3 of 5 rows kept; 1 refused, 1 exact duplicates")
    with pytest.raises(UserError, match=r"1 x empty answer\.\nThe first"):
        run({"a.csv": "\n".join(lines) + "\n"}, task=task, columns=columns)


def test_conversations_come_from_json_lines_from_parquet_and_from_csv_alike(project: Path) -> None:
    turns = [[("user", f"Question {n}"), ("assistant", f"Answer, {n}")] * n for n in (1, 2, 3)]
    rows = [[{"role": role, "content": content} for role, content in conversation] for conversation in turns]
    tables = {
        "a.jsonl": "".join(json.dumps({"id": n, "c": row}) + "\n" for n, row in enumerate(rows)),
        "b.csv": pandas.DataFrame({"id": ["b0", "b1", "b2"], "c": [json.dumps(row) for row in rows]}).to_csv(),
    }
    pq.write_table(pa.table({"id": ["c0", "c1", "c2"], "c": rows}), "data/raw/c.parquet")
    columns = {"text": {"column": "c", "format": "messages"}, "label": None, "group": "id"}
    records, report = run(tables, paths=["data/raw/*"], task={"kind": "chat"}, columns=columns)
    assert [json.loads(record["messages"]) for record in records] == rows * 3
    assert (report["rows_read"], report["rows_kept"]) == (9, 9)
    assert {record["label"] for record in records} == {"Answer, 1", "Answer, 2", "Answer, 3"}


def test_conversations_that_differ_only_in_who_said_it_are_no_duplicates(project: Path) -> None:
    first = [("system", "a"), ("user", "b"), ("assistant", "c")]
    second = [("user", "a\nb"), ("assistant", "c")]
    rows = [
        {"id": n, "c": [{"role": r, "content": c} for r, c in turns]} for n, turns in enumerate((first, second, first))
    ]
    columns = {"text": {"column": "c", "format": "messages"}, "label": None}
    tables = {"a.jsonl": "".join(json.dumps(row) + "\n" for row in rows)}
    records, report = run(tables, task={"kind": "chat"}, columns=columns)
    assert ([record["id"] for record in records], report["exact_duplicates_removed"]) == (["0", "1"], 1)


def test_chats_with_one_first_question_are_one_group_unless_a_column_says_otherwise(project: Path) -> None:
    short = [("user", "Hello there!"), ("assistant", "Hi.")]
    longer = [("system", "Be kind."), *short, ("user", "And now?"), ("assistant", "Nothing.")]
    other = [("user", "Bye"), ("assistant", "Hi.")]
    rows = [
        {"id": n, "c": [{"role": r, "content": c} for r, c in turns]} for n, turns in enumerate((short, longer, other))
    ]
    tables = {"a.jsonl": "".join(json.dumps(row) + "\n" for row in rows)}
    columns = {"text": {"column": "c", "format": "messages"}, "label": None}
    first, second, third = (record["group"] for record in run(tables, task={"kind": "chat"}, columns=columns)[0])
    # The short one's answer is learned with the longer one: they must not be in two parts.
    assert first == second != third
    given = run(tables, task={"kind": "chat"}, columns=columns | {"group": "id"})[0]
    assert len({record["group"] for record in given}) == 3


def test_a_text_in_two_slices_is_no_duplicate_and_slices_are_counted(project: Path) -> None:
    table = (
        "id,text,label,review\n1,good,positive,Statins\n2,good,positive,ADHD\n3,bad,negative,ADHD\n4,so,neutral,ADHD\n"
    )
    records, report = run({"a.csv": table}, columns={"slice": "review"})
    assert [record["slice"] for record in records] == ["Statins", "ADHD", "ADHD", "ADHD"]
    assert report["rows_per_slice"] == {"ADHD": 3, "Statins": 1}
    rows = "".join(f"x{n},text {n},neutral,{n}\n" for n in range(1_001))
    with pytest.raises(UserError, match=r"ingest\.columns\.slice: has 1,003 different values"):
        run({"a.csv": table + rows}, columns={"slice": "review"})
