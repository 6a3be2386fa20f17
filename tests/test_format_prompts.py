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

from stages import format_prompts
from stages.common.errors import UserError
from stages.common.prompting.prompts import PromptFormat, encode_prompts
from stages.common.prompting.tokenizer import load_prompt_tokenizer
from stages.common.tables import table_metadata

RECORD_COLUMNS = ["id", "text", "label", "group", "split", "origin"]
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


def set_params(**changes: Any) -> None:
    task = {"kind": "classification", "labels": LABELS, "label_descriptions": None, "positive_label": "positive"}
    values = {
        "style": "plain",
        "system": None,
        "template": "Text: {{ text }}\nLabel:",
        "max_length_tokens": 48,
        "max_shortened_share": 1,
    }
    # JSON is YAML.
    Path("params.yaml").write_text(json.dumps({"task": task, "format_prompts": values | changes}))


def save_records(path: str, records: list[tuple[str, str, str]]) -> None:
    rows = [
        dict(zip(RECORD_COLUMNS, (*record, f"{index:016x}", None, f"a.csv:{index}"), strict=True))
        for index, record in enumerate(records)
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


@pytest.mark.parametrize("stage", ["format_prompts", "split"])
def test_neither_torch_nor_transformers_is_imported(stage: str) -> None:
    code = f"import sys, stages.{stage}; print({{'torch', 'transformers', 'datasets'}} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
