"""The report says in text what the metrics say in numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, ModelCardData

from stages import report
from stages.common.measuring.markdown import literal, markdown_table, number

CARD = "---\nlibrary_name: peft\ntags:\n- qlora\n---\n\n# Small model: classification adapter\n\nText.\n"


def block(accuracy: float, labels: list[str]) -> dict[str, Any]:
    scores = {"precision": 0.5, "recall": 0.25, "f1": 1 / 3, "support": 1_200}
    return {
        "n": 2_400,
        "accuracy": accuracy,
        "f1_macro": accuracy - 0.01,
        "invalid_rate": 0.005,
        "log_loss": 0.5,
        "accuracy_low": accuracy - 0.02,
        "accuracy_high": accuracy + 0.02,
        "f1_macro_low": accuracy - 0.03,
        "f1_macro_high": accuracy + 0.03,
        "per_class": dict.fromkeys(labels, scores),
    }


TWO = {"precision": 0.4, "recall": 0.9, "recall_low": 0.85, "recall_high": 0.95, "specificity": 0.6, "roc_auc": 0.8}


def blocks(**extra: Any) -> dict[str, Any]:
    accuracies = {"adapter": 0.829, "base": 0.4, "tfidf": 0.67, "majority": 0.425}
    return {name: block(accuracy, ["a|b", "c"]) | extra for name, accuracy in accuracies.items()}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    decision: dict[str, Any] = {name: {"rule": "argmax"} for name in report.NAMES}
    decision["base"] = {"rule": "answer"}
    decision["tfidf"] = {
        "rule": "threshold", "positive_label": "c", "threshold": 0.25, "method": "max_f1", "chosen_on": "validation",
        "precision": 0.5, "recall": 0.75, "f1": 0.6,
    }  # fmt: skip
    contents = {
        "metrics/metrics.json": blocks(),
        "metrics/validation.json": blocks(),
        "metrics/training.json": {"steps": 100, "best_validation_loss": 0.4567},
        "models/decision.json": decision,
        "data/reports/ingest.json": {"rows_read": 4_200, "refused": {"a_b": 3}, "refused_rows": [{"row": 1}]},
        "data/reports/format_prompts.json": {"shortened": 7, "shortened_share": 0.0017},
        "data/reports/split.json": {"published": False, "train": {"rows": 3_360}},
    }
    for name, value in contents.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(json.dumps(value), encoding="utf-8")
    (tmp_path / "metrics/evaluation").mkdir()
    cells = [
        "label,prediction,count",
        "a|b,a|b,50",
        "a|b,c,40",
        "a|b,<invalid>,10",
        "c,a|b,60",
        "c,c,0",
        "c,<invalid>,0",
    ]
    (tmp_path / "metrics/evaluation/confusion.csv").write_text("\n".join(cells) + "\n")
    mistakes = "id,label,prediction,confidence\n17,a|b,c,0.98\n18,c,<invalid>,\n"
    (tmp_path / "metrics/evaluation/misclassified.csv").write_text(mistakes)
    (tmp_path / "models/adapter").mkdir()
    (tmp_path / "models/adapter/README.md").write_text(CARD)
    return tmp_path


def cells(text: str, first: str) -> list[list[str]]:
    """The table rows that begin with `first`, as cells."""
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("|")
    ]
    return [row for row in rows if row[0] == first]


def test_the_report_begins_with_the_results_and_the_command_ends_with_them(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report.main()
    text = (folder / "metrics/report.md").read_text(encoding="utf-8")
    expected = ["adapter", "0.829 [0.809, 0.849]", "0.819 [0.799, 0.859]", "0.500", "0.5%"]
    assert cells(text, "adapter")[0] == expected
    lines = capsys.readouterr().out.splitlines()
    assert cells("\n".join(lines[-6:]), "adapter") == [expected]
    assert [line.split("|")[1].strip() for line in lines[-4:]] == list(report.NAMES.values())


def test_the_report_has_counts_confusions_mistakes_and_decisions(folder: Path) -> None:
    report.main()
    text = (folder / "metrics/report.md").read_text(encoding="utf-8")
    assert ["ingest", "rows read", "4,200"] in cells(text, "ingest")
    assert ["ingest", "refused: `a_b`", "3"] in cells(text, "ingest")
    assert ["split", "train: `rows`", "3,360"] in cells(text, "split")
    assert ["best validation loss", "0.457"] in cells(text, "best validation loss")
    # 60 of c's 60 rows, then 40 and 10 of a|b's 100; right answers and empty cells are not confusions.
    section = text.split("## Worst confusions")[1].split("##")[0]
    assert section.index("60 ") < section.index("40 ") < section.index("10 ")
    assert "100.0%" in section
    assert "`c`  " not in section.split("`c`", 1)[0]
    assert ["`17`", r"`a\|b`", "`c`", "0.98"] in cells(text, "`17`")
    assert "- TF-IDF + logistic regression: `c` from a probability of 0.25 on (max_f1, from validation;" in text
    assert "- zero-shot base: the generated answer" in text


def test_two_labels_have_a_second_table(folder: Path) -> None:
    (folder / "metrics/metrics.json").write_text(json.dumps(blocks(**TWO)))
    report.main()
    text = (folder / "metrics/report.md").read_text(encoding="utf-8")
    assert ["adapter", "0.400", "0.900 [0.850, 0.950]", "0.600", "0.800", "–", "–", "–"] in cells(text, "adapter")


def test_the_model_card_gets_the_results_as_text_and_as_metadata(folder: Path) -> None:
    report.main()
    text = (folder / "metrics/model_card.md").read_text(encoding="utf-8")
    data = ModelCard(text).data
    assert isinstance(data, ModelCardData)
    assert data.library_name == "peft"
    assert data.tags == ["qlora"]
    results = {result.metric_name: result.metric_value for result in data.eval_results or []}
    assert results == {"accuracy": 0.829, "macro-F1": 0.819, "log loss": 0.5}
    assert "model-index:" in text
    assert cells(text, "adapter")
    assert text.count("Text.") == 1


def test_the_same_numbers_give_the_same_text(folder: Path) -> None:
    report.main()
    first = [(folder / name).read_bytes() for name in ("metrics/report.md", "metrics/model_card.md")]
    report.main()
    assert [(folder / name).read_bytes() for name in ("metrics/report.md", "metrics/model_card.md")] == first


def test_numbers_are_short_and_missing_ones_are_dashes() -> None:
    shown = [number(value) for value in (None, 0, 1_234_567, 0.0, 0.82944, 12.5, 0.000123)]
    assert shown == ["–", "0", "1,234,567", "0.000", "0.829", "12.500", "1.2e-04"]


def test_texts_of_the_data_cannot_break_a_table() -> None:
    table = markdown_table(["id"], [[literal("a|b`c")]])
    assert table.splitlines()[-1] == r"| `a\|b'c` |"
