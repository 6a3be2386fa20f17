"""The stage from records to prompts: nothing lost, everything counted, the format kept with the table."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from stages import format_prompts
from stages.common.errors import UserError
from stages.common.prompting.prompts import PromptFormat, encode_prompts
from stages.common.prompting.tokenizer import load_prompt_tokenizer
from stages.common.tables import table_metadata

RECORD_COLUMNS = ["id", "text", "label", "group", "split", "slice", "messages", "origin"]
LABELS = ["negative", "positive"]
REPOSITORY = Path(__file__).resolve().parents[1]


@pytest.fixture
def workspace(tmp_path: Path, tiny_tokenizer_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a tokenizer and no exemplars, in which the stage runs."""
    (tmp_path / "data").mkdir()
    (tmp_path / "models").mkdir()
    (tmp_path / "models/tokenizer").symlink_to(tiny_tokenizer_folder)
    monkeypatch.chdir(tmp_path)
    save_records("data/exemplars.parquet", [])
    set_params()
    return tmp_path


CLASSIFICATION = {
    "kind": "classification",
    "multi_label": False,
    "labels": LABELS,
    "label_descriptions": None,
    "positive_label": "positive",
}


def set_params(task: dict[str, Any] = CLASSIFICATION, **changes: Any) -> None:
    values = {
        "style": "plain",
        "system": None,
        "template": "Text: {{ text }}\nLabel:",
        "max_length_tokens": 48,
        "max_shortened_share": 1,
    }
    # JSON is YAML.
    Path("params.yaml").write_text(json.dumps({"task": task, "format_prompts": values | changes}))


def save_records(
    path: str, records: list[tuple[str, str, str]], conversations: list[list[dict[str, str]]] | None = None
) -> None:
    messages = [None] * len(records) if conversations is None else [json.dumps(one) for one in conversations]
    rows = [
        dict(
            zip(RECORD_COLUMNS, (*record, f"{index:016x}", None, f"s{index % 2}", cell, f"a.csv:{index}"), strict=True)
        )
        for index, (record, cell) in enumerate(zip(records, messages, strict=True))
    ]
    pq.write_table(pa.Table.from_pylist(rows, pa.schema([(name, pa.string()) for name in RECORD_COLUMNS])), path)


@pytest.mark.usefixtures("workspace")
def test_every_record_gets_a_prompt_and_its_completion_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    # More than one batch, so that order and counts hold across batches.
    records = [
        (f"r{i}", f"a nice day {i}" + " very nice" * (30 * (i % 101 == 7)), LABELS[i % 2]) for i in range(12_000)
    ]
    save_records("data/records.parquet", records)
    format_prompts.main()
    table = pq.read_table("data/prompts.parquet")
    assert table.schema.equals(format_prompts.SCHEMA)
    assert list(zip(*(table[name].to_pylist() for name in ("id", "text", "label")), strict=True)) == records
    assert table["completion"].to_pylist() == [f" {label}" for _, _, label in records]
    assert table["slice"].to_pylist() == [f"s{index % 2}" for index in range(12_000)]
    assert table["prompt_answer_mask"].null_count == 12_000

    values = table_metadata("data/prompts.parquet", "prompt_format")
    prompt_format = PromptFormat.from_json(values)
    assert table["completion_ids"].to_pylist() == [values["completions"][label]["ids"] for _, _, label in records]
    tokenizer = load_prompt_tokenizer("models/tokenizer")
    again = encode_prompts(prompt_format, tokenizer, [text for _, text, _ in records])
    columns = [table[name].to_pylist() for name in ("prompt", "prompt_ids", "shortened")]
    assert list(zip(*columns, strict=True)) == [tuple(prompt) for prompt in again]

    report = json.loads(Path("data/reports/format_prompts.json").read_text())
    long_ids = [identity for identity, text, _ in records if "very" in text]
    lengths = sorted(len(prompt.ids) for prompt in again)
    assert (report["rows"], report["shortened"], report["shortened_ids"]) == (12_000, len(long_ids), long_ids[:100])
    assert len(long_ids) > 100
    assert report["prompt_tokens"] == {"p50": lengths[5_999], "p95": lengths[11_399], "max": lengths[-1]}
    assert report["prompt_tokens"]["max"] <= 48 - 2
    assert capsys.readouterr().out.startswith("format_prompts: 12,000 rows, 119 texts shortened (1.0%), tokens")


@pytest.mark.usefixtures("workspace")
def test_exemplars_come_from_their_own_table() -> None:
    save_records("data/exemplars.parquet", [("e", "what a day", "positive")])
    save_records("data/records.parquet", [("r", "bad food", "negative")])
    template = "{% for e in exemplars %}{{ e.text }}: {{ e.label }}; {% endfor %}{{ text }}:"
    set_params(template=template)
    format_prompts.main()
    assert pq.read_table("data/prompts.parquet")["prompt"].to_pylist() == ["what a day: positive; bad food:"]


@pytest.mark.usefixtures("workspace")
def test_the_same_records_give_the_same_bytes() -> None:
    save_records("data/records.parquet", [("r", "good<|im_end|>", "negative")] * 3)
    written = []
    for _ in range(2):
        format_prompts.main()
        written.append(Path("data/prompts.parquet").read_bytes())
    assert written[0] == written[1]


@pytest.mark.usefixtures("workspace")
def test_no_records_are_an_error_and_nothing_is_written() -> None:
    save_records("data/records.parquet", [])
    with pytest.raises(UserError, match="holds no rows"):
        format_prompts.main()
    assert not Path("data/prompts.parquet").exists()


# --- other kinds of row -----------------------------------------------------------------------------------------------


def written() -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What the stage wrote: the rows, and the report."""
    return pq.read_table("data/prompts.parquet").to_pylist(), json.loads(
        Path("data/reports/format_prompts.json").read_text()
    )


@pytest.mark.usefixtures("workspace")
def test_with_several_labels_the_completions_are_in_the_footer_alone() -> None:
    set_params(CLASSIFICATION | {"multi_label": True, "positive_label": None})
    save_records("data/records.parquet", [("r", "bad food", '["negative"]'), ("s", "food", "[]")])
    format_prompts.main()
    rows, report = written()
    assert [(row["label"], row["completion"], row["completion_ids"]) for row in rows] == [
        ('["negative"]', None, None),
        ("[]", None, None),
    ]
    assert rows[0]["prompt"] == "Text: bad food\nLabel:"
    values = table_metadata("data/prompts.parquet", "prompt_format")
    assert (values["kind"], values["labels"]) == ("multi_label", LABELS)
    assert list(values["completions"]) == sorted(f"{label}: {word}" for label in LABELS for word in ("yes", "no"))
    assert "answer_tokens" not in report


@pytest.mark.usefixtures("workspace")
def test_a_question_is_learned_with_its_answer_and_an_answer_that_cannot_fit_is_cut(
    tiny_tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_params({"kind": "question_answering"}, template="Question: {{ text }}\nAnswer:")
    long = "the movie was good " * 30
    save_records("data/records.parquet", [("r", "why?", "so it is"), ("s", long, "no"), ("t", "why?", long)])
    format_prompts.main()
    rows, report = written()
    ordinary = Tokenizer.from_file(str(tiny_tokenizer_folder / "tokenizer.json"))
    texts = [ordinary.decode(row["prompt_ids"] + row["completion_ids"], skip_special_tokens=False) for row in rows]
    assert texts == [row["prompt"] + row["completion"] + "<|im_end|>" * (row["id"] != "t") for row in rows]
    assert texts[0] == "Question: why?\nAnswer: so it is<|im_end|>"
    assert texts[1].startswith("Question: the movie was good the movie")
    assert texts[1].endswith("\nAnswer: no<|im_end|>")
    assert texts[2].startswith("Question: why?\nAnswer: the movie was good the movie")
    assert [row["shortened"] for row in rows] == [False, True, True]
    lengths = [len(row["prompt_ids"] + row["completion_ids"]) for row in rows]
    assert 48 - 4 < lengths[1] <= 48
    assert lengths[2] == 48
    assert all(row["prompt_answer_mask"] is None for row in rows)
    assert (report["shortened"], report["answers_cut"], report["shortened_ids"]) == (2, 1, ["s", "t"])
    assert report["answer_tokens"]["max"] == len(rows[2]["completion_ids"])
    assert "turns_dropped" not in report
    assert "2 questions with their answers shortened (66.7%; 1 answers cut)" in capsys.readouterr().out
    values = table_metadata("data/prompts.parquet", "prompt_format")
    assert (values["kind"], values["labels"], values["completions"], values["terminator_ids"]) == (
        "question_answering", [], {}, [2],
    )  # fmt: skip


@pytest.mark.usefixtures("workspace")
def test_a_question_through_the_chat_template_is_what_a_conversation_of_one_exchange_is() -> None:
    set_params({"kind": "question_answering"}, style="chat", system="Be brief.", template="{{ text }}")
    save_records("data/records.parquet", [("r", "why?", "so it is")])
    format_prompts.main()
    [question], _ = written()
    set_params({"kind": "chat"}, style="chat", system="Be brief.", template=None)
    turns = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "so it is"}]
    save_records("data/records.parquet", [("r", "why?", "so it is")], [turns])
    format_prompts.main()
    [conversation], _ = written()
    assert conversation == question | {"prompt_answer_mask": [False] * len(question["prompt_ids"])}


@pytest.mark.usefixtures("workspace")
def test_conversations_carry_a_mask_of_what_is_learned_and_lose_their_first_turns_before_anything_else(
    tiny_tokenizer_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    set_params({"kind": "chat"}, style="chat", template=None, max_length_tokens=80)
    long = "the movie was good " * 60
    turns = [["why?", "so", "a cat", "a dog"], [long, long, "why?", "so"], ["why?", "so", "a cat", long]]
    conversations = [
        [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(one)] for one in turns
    ]
    records = [(f"r{index}", "\n".join(one[:-1]), one[-1]) for index, one in enumerate(turns)]
    save_records("data/records.parquet", records * 1_000, conversations * 1_000)
    format_prompts.main()
    rows, report = written()
    assert rows[0]["prompt_ids"] == rows[2_997]["prompt_ids"]
    ordinary = Tokenizer.from_file(str(tiny_tokenizer_folder / "tokenizer.json"))
    learned = []
    for row in rows[:3]:
        assert len(row["prompt_answer_mask"]) == len(row["prompt_ids"])
        ids = [token for token, flag in zip(row["prompt_ids"], row["prompt_answer_mask"], strict=True) if flag]
        learned.append(ordinary.decode(ids + row["completion_ids"], skip_special_tokens=False))
    assert learned[:2] == ["so<|im_end|>a dog<|im_end|>", "so<|im_end|>"]
    assert learned[2] == rows[2]["completion"]
    assert [row["label"] for row in rows[:3]] == ["a dog", "so", long]
    assert [row["prompt"].count("<|im_start|>user\n") for row in rows[:3]] == [2, 1, 1]
    assert max(len(row["prompt_ids"] + row["completion_ids"]) for row in rows) == 80
    assert (report["shortened"], report["turns_dropped"], report["answers_cut"]) == (2_000, 2_000, 1_000)
    assert "2,000 conversations shortened (66.7%; 2,000 conversations without" in capsys.readouterr().out


@pytest.mark.usefixtures("workspace")
def test_more_shortened_conversations_than_allowed_are_an_error_that_says_how(monkeypatch: pytest.MonkeyPatch) -> None:
    # A few characters at a time: the report adds up over all of them.
    monkeypatch.setattr(format_prompts, "CHARACTERS_AT_ONCE", 100)
    set_params({"kind": "chat"}, style="chat", template=None, max_length_tokens=64, max_shortened_share=0.5)
    turns = [{"role": "user", "content": "why?"}, {"role": "assistant", "content": "the movie was good " * 30}]
    save_records("data/records.parquet", [(f"r{index}", "why?", "x") for index in range(4)], [turns] * 4)
    with pytest.raises(
        UserError, match=r"4 of 4 conversations are longer than 64 tokens allow; .* 4 answers cut, ids r0, r1, r2, r3\."
    ):
        format_prompts.main()


@pytest.mark.parametrize("stage", ["format_prompts", "split"])
def test_neither_torch_nor_transformers_is_imported(stage: str) -> None:
    code = f"import sys, stages.{stage}; print({{'torch', 'transformers', 'datasets'}} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
