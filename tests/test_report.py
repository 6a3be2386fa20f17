"""The report says in text what the metrics say in numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import ModelCard, ModelCardData
from ruamel.yaml import YAML

from stages import report
from stages.common.measuring.markdown import literal, markdown_table, number
from stages.common.measuring.report_columns import NAMES
from stages.common.measuring.report_slices import slice_tables

CARD = "---\nlibrary_name: peft\ntags:\n- qlora\n---\n\n# Small model: classification adapter\n\nText.\n"


def block(accuracy: float, labels: list[str]) -> dict[str, Any]:
    scores = {"precision": 0.5, "recall": 0.25, "f1": 1 / 3, "support": 1_200}
    return {
        "n": 2_400,
        "accuracy": accuracy,
        "f1_macro": accuracy - 0.01,
        "f1_micro": accuracy,
        "precision_macro": 0.75,
        "recall_macro": accuracy - 0.05,
        "recall_macro_low": accuracy - 0.07,
        "recall_macro_high": accuracy - 0.01,
        "invalid_rate": 0.005,
        "log_loss": 0.5,
        "accuracy_low": accuracy - 0.02,
        "accuracy_high": accuracy + 0.02,
        "f1_macro_low": accuracy - 0.03,
        "f1_macro_high": accuracy + 0.03,
        "per_class": dict.fromkeys(labels, scores),
    }


TWO = {
    "precision": 0.4, "recall": 0.9, "recall_low": 0.85, "recall_high": 0.95, "specificity": 0.6, "roc_auc": 0.8,
    "rows_selected": 1_300, "wss_at_recall": 0.35, "precision_at_recall": 0.41, "threshold": 0.125,
}  # fmt: skip
ANSWERS = {
    "n": 1_400, "rouge_l": 0.31, "rouge_l_low": 0.3, "rouge_l_high": 0.32, "token_f1": 0.41, "token_f1_low": 0.4,
    "token_f1_high": 0.42, "exact_match": 0.05, "answer_words": 61.5, "reference_words": 70.25,
    "repetition_rate": 0.125, "empty_rate": 0.0,
}  # fmt: skip
PERPLEXITY = {"perplexity": 12.5, "perplexity_low": 12.0, "perplexity_high": 13.0}
RECALL = {"method": "recall", "recall": 0.95, "confidence": 0.9}


def blocks(**extra: Any) -> dict[str, Any]:
    accuracies = {"adapter": 0.829, "base": 0.4, "tfidf": 0.67, "majority": 0.425}
    return {name: block(accuracy, ["a|b", "c"]) | extra for name, accuracy in accuracies.items()}


def set_params(
    folder: Path, task: dict[str, Any], threshold: dict[str, Any] | None = None, publish: bool = False
) -> None:
    bins = 10 if task["kind"] == "classification" else None
    evaluate = {
        "seed": 1, "bootstrap_samples": 100, "calibration_bins": bins, "threshold": threshold, "publish_texts": publish
    }  # fmt: skip
    YAML(typ="safe").dump({"task": task, "evaluate": evaluate}, folder / "params.yaml")


def labels(*names: str, positive: str | None = None, multi_label: bool = False) -> dict[str, Any]:
    return {
        "kind": "classification", "multi_label": multi_label, "labels": list(names), "label_descriptions": None,
        "positive_label": positive,
    }  # fmt: skip


def set_blocks(folder: Path, found: dict[str, Any]) -> None:
    for name in ("metrics", "validation"):
        (folder / f"metrics/{name}.json").write_text(json.dumps(found), encoding="utf-8")


def set_examples(folder: Path, *rows: dict[str, str]) -> None:
    schema = pa.schema([(name, pa.string()) for name in ("id", "text", "label", "adapter", "base")])
    pq.write_table(pa.Table.from_pylist(list(rows), schema=schema), folder / "data/examples.parquet")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    decision: dict[str, Any] = {name: {"rule": "argmax"} for name in NAMES}
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
    set_params(tmp_path, labels("a|b", "c", "d"))
    mistakes_with_texts = ({"id": "17", "text": "Some *text*", "label": "a|b", "adapter": "c", "base": "d"},)
    set_examples(tmp_path, *mistakes_with_texts)
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
    assert [line.split("|")[1].strip() for line in lines[-4:]] == list(NAMES.values())


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
    assert ["`17`", "<code>a&#124;b</code>", "`c`", "0.98"] in cells(text, "`17`")
    assert "- TF-IDF + logistic regression: `c` from a probability of 0.25 on (max_f1, from validation;" in text
    assert "- zero-shot base: the generated answer" in text


def test_other_averages_have_a_table_of_their_own(folder: Path) -> None:
    report.main()
    text = (folder / "metrics/report.md").read_text(encoding="utf-8")
    assert ["adapter", "0.779 [0.759, 0.819]", "0.750", "0.829", "–", "–"] in cells(text, "adapter")


def test_texts_of_mistakes_are_in_the_report_only_when_they_may_be_published(folder: Path) -> None:
    report.main()
    text = (folder / "metrics/report.md").read_text(encoding="utf-8")
    assert "Some" not in text
    assert "Their texts are in `data/examples.parquet`" in text
    set_params(folder, labels("a|b", "c", "d"), publish=True)
    report.main()
    text = (folder / "metrics/report.md").read_text(encoding="utf-8")
    assert cells(text, "`17`<br>Some &#42;text&#42;") == [["`17`<br>Some &#42;text&#42;", "a&#124;b", "d", "c"]]


def test_two_labels_have_a_table_of_the_positive_one_and_one_for_screening(folder: Path) -> None:
    set_params(folder, labels("a|b", "c", positive="c"), RECALL)
    set_blocks(folder, blocks(**TWO))
    decision = json.loads((folder / "models/decision.json").read_text())
    decision["adapter"] = decision["tfidf"] | {"recall_promised": 0.95, "confidence": 0.9, "recall_lower_bound": 0.952}
    (folder / "models/decision.json").write_text(json.dumps(decision))
    report.main()
    text = (folder / "metrics/report.md").read_text(encoding="utf-8")
    assert ["adapter", "0.400", "0.900 [0.850, 0.950]", "0.600", "0.800", "–", "–", "0.125"] in cells(text, "adapter")
    screening = text.split("## Screening (test)")[1].split("##")[0]
    assert cells(screening, "")[0] == [
        "", "recall promised", "recall reached [95 %]", "precision", "rows to read", "WSS@95", "WSS at recall 0.95",
        "precision at recall 0.95",
    ]  # fmt: skip
    assert cells(screening, "adapter") == [
        ["adapter", "0.950 (90% sure)", "0.900 [0.850, 0.950]", "0.400", "1,300 of 2,400", "–", "0.350", "0.410"]
    ]
    assert cells(screening, "majority")[0][1] == "–"
    assert "a recall of at least 0.95, with a confidence of 0.9" in text
    assert "data/reading_list.csv" in screening


def test_without_a_wanted_recall_the_screening_table_promises_nothing(folder: Path) -> None:
    set_params(folder, labels("a|b", "c", positive="c"), {"method": "max_f1"})
    set_blocks(folder, blocks(**{name: value for name, value in TWO.items() if "_at_recall" not in name}))
    report.main()
    screening = (folder / "metrics/report.md").read_text(encoding="utf-8").split("## Screening (test)")[1]
    assert cells(screening, "adapter")[0] == ["adapter", "0.900 [0.850, 0.950]", "0.400", "1,300 of 2,400", "–"]


def test_slices_have_a_table_for_each_kind_of_task() -> None:
    topic = {"n": 40, "support": 10, "recall": 0.9, "recall_low": 0.55, "recall_high": 0.99, "rows_selected": 12}
    table, note = slice_tables({"a|b": topic, "none positive": {"n": 3, "support": 0, "rows_selected": 1}})
    assert cells(table, "<code>a&#124;b</code>") == [
        ["<code>a&#124;b</code>", "40", "10", "0.900 [0.550, 0.990]", "–", "12"]
    ]
    assert cells(table, "`none positive`") == [["`none positive`", "3", "0", "–", "–", "1"]]
    assert "exact" in note
    (table,) = slice_tables({"web": {"n": 7, "token_f1": 0.5, "rouge_l": 0.25}})
    assert cells(table, "`web`") == [["`web`", "7", "0.500", "0.250"]]
    (table,) = slice_tables({"web": {"n": 7, "accuracy": 0.5, "f1_macro": 0.25}})
    assert cells(table, "slice") == [["slice", "rows", "accuracy", "macro-F1"]]
    assert slice_tables({}) == []


def test_of_many_slices_the_largest_are_shown_and_the_rest_is_said() -> None:
    many = {f"topic {rows}": {"n": rows, "accuracy": 1.0, "f1_macro": 1.0} for rows in range(1, 61)}
    table, note = slice_tables(many)
    assert len(table.splitlines()) == 2 + 50
    assert not cells(table, "`topic 10`")
    assert cells(table, "`topic 11`")
    assert note == "The 50 largest of 60 slices; `metrics/metrics.json` has all of them."


def test_several_labels_for_a_text_have_their_own_tables(folder: Path) -> None:
    set_params(folder, labels("a|b", "c", multi_label=True), {"method": "recall", "recall": 0.9, "confidence": 0.95})
    found = blocks(f1_samples=0.7, hamming_loss=0.125)
    for scores in found.values():
        scores["per_class"] = {"c": {**scores["per_class"]["c"], "threshold": 0.0625, "pr_auc": 0.875}}
    set_blocks(folder, found)
    promised = {"recall_promised": 0.9, "confidence": 0.95}
    rule = {"rule": "thresholds", "thresholds": {"a|b": 0.5, "c": 0.1}, "method": "recall", "chosen_on": "validation"}
    rule["per_class"] = {"a|b": promised, "c": promised}
    (folder / "models/decision.json").write_text(json.dumps(dict.fromkeys(NAMES, rule)))
    report.main()
    text = (folder / "metrics/report.md").read_text(encoding="utf-8")
    expected = ["adapter", "0.829 [0.809, 0.849]", "0.819 [0.799, 0.859]", "0.829", "0.700", "0.125", "0.500"]
    assert cells(text, "adapter")[0] == expected
    assert ["`c`", "0.500", "0.250", "0.333", "1,200", "0.875", "0.062"] in cells(text, "`c`")
    assert "- adapter: each label from a probability of its own on (recall, from validation); on other texts" in text
    assert "a recall of at least 0.9, with a confidence of 0.95" in text
    assert "Worst confusions" not in text
    results = card_results(folder)
    assert results["subset accuracy"] == ("text-classification", 0.829)
    assert results["sample F1"] == ("text-classification", 0.7)


def answers_report(folder: Path, publish: bool, *examples: dict[str, str]) -> str:
    """The report on generated answers."""
    set_params(folder, {"kind": "question_answering"}, publish=publish)
    set_blocks(folder, {name: ANSWERS | (PERPLEXITY if name in ("adapter", "base") else {}) for name in NAMES})
    (folder / "models/decision.json").write_text(json.dumps({name: {"rule": "text"} for name in NAMES}))
    for name, header in (("confusion", "label,prediction,count"), ("misclassified", "id,label,prediction,confidence")):
        (folder / f"metrics/evaluation/{name}.csv").write_text(header + "\n")
    set_examples(folder, *examples)
    report.main()
    return (folder / "metrics/report.md").read_text(encoding="utf-8")


def test_generated_answers_have_their_metrics_with_intervals(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = answers_report(folder, False)
    headline = ["0.410 [0.400, 0.420]", "0.310 [0.300, 0.320]", "0.050"]
    assert cells(text, "adapter")[:2] == [
        ["adapter", *headline, "12.500 [12.000, 13.000]"],
        ["adapter", "61.5", "70.2", "12.5%", "0.0%"],
    ]
    assert cells(text, "nearest question (TF-IDF)")[0] == ["nearest question (TF-IDF)", *headline, "–"]
    assert cells(capsys.readouterr().out, "most frequent answer") == [["most frequent answer", *headline, "–"]]
    assert "Decisions" not in text
    assert "Surest mistakes" not in text
    assert card_results(folder) == {
        "token F1": ("text-generation", 0.41),
        "ROUGE-L": ("text-generation", 0.31),
        "exact match": ("text-generation", 0.05),
        "perplexity": ("text-generation", 12.5),
    }


def test_examples_stand_side_by_side_when_they_may_be_published_and_else_their_ids(folder: Path) -> None:
    example = {"id": "q7", "text": "What\nis it?", "label": "A | pipe", "adapter": "<b>x</b>", "base": " "}
    shown = ["`q7`<br>What<br>is it?", "A &#124; pipe", "*(empty)*", "&lt;b&gt;x&lt;/b&gt;"]
    text = answers_report(folder, True, example)
    assert cells(text, "text") == [["text", "reference", "zero-shot base", "adapter"]]
    assert cells(text, shown[0]) == [shown]
    text = answers_report(folder, False, example, example | {"id": "q8"})
    assert "Rows: `q7`, `q8`." in text
    assert "What" not in text


def card_results(folder: Path) -> dict[str, tuple[str, float]]:
    """Type of task and value of each metric in the model card."""
    data = ModelCard((folder / "metrics/model_card.md").read_text(encoding="utf-8")).data
    assert isinstance(data, ModelCardData)
    return {str(result.metric_name): (result.task_type, result.metric_value) for result in data.eval_results or []}


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
    shown = [number(value) for value in (None, 0, 1_234_567, 0.0, 0.82944, 12.5, 0.000123, 1e304)]
    assert shown == ["–", "0", "1,234,567", "0.000", "0.829", "12.500", "1.2e-04", "1.0e+304"]


def test_texts_of_the_data_cannot_break_a_table() -> None:
    table = markdown_table(["id"], [[literal("a|b`c")]])
    assert table.splitlines()[-1] == "| <code>a&#124;b&#96;c</code> |"
