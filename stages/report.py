"""Numbers become text for people: metrics/report.md, and the adapter's model card with its results."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any, NamedTuple

from stages.common.errors import run_stage
from stages.common.measuring.markdown import literal, markdown_table, number
from stages.common.measuring.report_columns import NAMES
from stages.common.measuring.report_slices import slice_tables
from stages.common.measuring.report_tables import (
    confusion_table,
    example_table,
    label_table,
    mistake_table,
    result_tables,
    screening_table,
)
from stages.common.measuring.results_card import card_text
from stages.common.params import Params, load_params
from stages.common.schema.measuring import RecallThreshold
from stages.common.schema.task import GenerationTask
from stages.common.spreadsheets import original
from stages.common.tables import read_json, read_table, write_text

METRICS = Path("metrics/metrics.json")
VALIDATION = Path("metrics/validation.json")
TRAINING = Path("metrics/training.json")
CONFUSION = Path("metrics/evaluation/confusion.csv")
MISCLASSIFIED = Path("metrics/evaluation/misclassified.csv")
DATA_REPORTS = [Path(f"data/reports/{stage}.json") for stage in ("ingest", "format_prompts", "split")]
EXAMPLES = Path("data/examples.parquet")
DECISION = Path("models/decision.json")
ADAPTER_CARD = Path("models/adapter/README.md")
REPORT = Path("metrics/report.md")
MODEL_CARD = Path("metrics/model_card.md")

Sections = dict[str, list[str]]


class Results(NamedTuple):
    """What is reported on.

    Attributes:
        test: blocks of metrics/metrics.json by predictor.
        validation: blocks of metrics/validation.json.
        training: metrics/training.json.
        data: the reports of the data stages, by stage.
        decision: models/decision.json.
        confusion: rows of confusion.csv.
        misclassified: rows of misclassified.csv.
        examples: rows of data/examples.parquet.
    """

    test: dict[str, Any]
    validation: dict[str, Any]
    training: dict[str, Any]
    data: dict[str, dict[str, Any]]
    decision: dict[str, Any]
    confusion: list[dict[str, str]]
    misclassified: list[dict[str, str]]
    examples: list[dict[str, str]]


def report_text(results: Results, params: Params) -> str:
    """The report in Markdown.

    Args:
        results: what the stages before wrote.
        params: task and evaluate.
    """
    test, validation = results.test, results.validation
    of_kind = answer_sections if isinstance(params.task, GenerationTask) else label_sections
    sections = {
        "": result_tables(params.task, test),
        **screening_section(results, params),
        "Slices (adapter, test)": slice_tables(test["adapter"].get("per_slice", {})),
        f"Validation ({validation['adapter']['n']:,} rows)": result_tables(params.task, validation),
        **of_kind(results, params),
        "Training": [
            markdown_table(
                ["what", "value"], [[key.replace("_", " "), number(value)] for key, value in results.training.items()]
            )
        ],
        "Data": [data_table(results.data)],
    }
    introduction = (
        f"# Results\n\n{test['adapter']['n']:,} test rows; intervals are 95 % percentile bootstraps over rows. "
        "Plots: `dvc plots show`. All numbers: `dvc metrics show`."
    )
    blocks = [introduction]
    for title, texts in sections.items():
        blocks += [f"## {title}", *texts] if title and texts else texts
    return "\n\n".join(blocks) + "\n"


def label_sections(results: Results, params: Params) -> Sections:
    """How labels were decided on, and what went wrong."""
    task = params.task
    assert not isinstance(task, GenerationTask), "labels are decided on"
    decisions = "\n".join(f"- {name}: {decision_text(results.decision[key])}" for key, name in NAMES.items())
    mistakes = [mistake_table(results.misclassified)] if results.misclassified else ["None."]
    if results.misclassified and params.evaluate.publish_texts:
        mistakes.append(example_table(results.examples, "labels" if task.multi_label else "label"))
    elif results.misclassified:
        mistakes.append(f"Their texts are in `{EXAMPLES}`, which is not in Git.")
    sections = {
        "Decisions": [decisions],
        "Labels (adapter, test)": [label_table(results.test["adapter"]["per_class"])],
        "Worst confusions (adapter, test)": [confusion_table(results.confusion)],
        "Surest mistakes (adapter, test)": mistakes,
    }
    if task.multi_label:
        # A set of labels is not confused with one other label.
        del sections["Worst confusions (adapter, test)"]
    return sections


def answer_sections(results: Results, params: Params) -> Sections:
    """Some test rows with the answers of base and adapter, or where they are."""
    if params.evaluate.publish_texts:
        return {"Examples (test, chosen at random)": [example_table(results.examples, "reference")]}
    ids = ", ".join(literal(row["id"]) for row in results.examples)
    where = (
        f"Texts, references and both answers are in `{EXAMPLES}`, which is not in Git; with `evaluate.publish_texts: "
        f"true` they stand here. Rows: {ids}."
    )
    return {"Examples (test, chosen at random)": [where]}


def screening_section(results: Results, params: Params) -> Sections:
    """With two labels, what the thresholds promised and gave, and where the reading list is."""
    task, threshold = params.task, params.evaluate.threshold
    if isinstance(task, GenerationTask) or task.positive_label is None:
        return {}
    wanted_recall = threshold.recall if isinstance(threshold, RecallThreshold) else None
    reading_list = (
        f"Rows to read are all that were not decided against {literal(task.positive_label)}, invalid answers among "
        "them. The intervals of recall are exact (Clopper & Pearson)."
    )
    if results.decision["adapter"]["rule"] == "threshold":
        reading_list += " `data/reading_list.csv` has all test rows, the adapter's likeliest first."
    return {"Screening (test)": [screening_table(results.test, results.decision, wanted_recall), reading_list]}


def decision_text(rule: dict[str, Any]) -> str:
    """A predictor's decision rule in words."""
    if rule["rule"] == "answer":
        return "the generated answer, if it is a label"
    if rule["rule"] == "argmax":
        return "the likeliest label"
    chosen = f"{rule['method']}, from {rule['chosen_on']}"
    if rule["rule"] == "thresholds":
        # One promise is made for every label.
        [(recall, confidence)] = {(x.get("recall_promised"), x.get("confidence")) for x in rule["per_class"].values()}
        return f"each label from a probability of its own on ({chosen}){_promise(recall, confidence)}"
    reached = ", ".join(f"{name} {number(rule[name])}" for name in ("precision", "recall", "f1"))
    text = f"{literal(rule['positive_label'])} from a probability of {rule['threshold']:.6g} on ({chosen}; "
    text += f"on validation: {reached})"
    return text + _promise(rule.get("recall_promised"), rule.get("confidence"))


def _promise(recall: float | None, confidence: float | None) -> str:
    if recall is None:
        return ""
    return f"; on other texts of this kind a recall of at least {recall:g}, with a confidence of {confidence:g}"


def data_table(reports: dict[str, dict[str, Any]]) -> str:
    """What each data stage counted, one table for all."""
    rows = [[stage, what, count] for stage, report in reports.items() for what, count in counts(report)]
    return markdown_table(["stage", "what", "count"], rows)


def counts(report: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """What a stage counted, as name and number; lists of rows are left to the stage's own report."""
    found: list[tuple[str, str]] = []
    for key, value in report.items():
        # Keys further in may be labels or file names, which stay as they are.
        name = f"{prefix}{literal(key)}" if prefix else key.replace("_", " ")
        if isinstance(value, dict):
            found += counts(value, f"{name}: ")
        elif isinstance(value, bool):
            found.append((name, "yes" if value else "no"))
        elif isinstance(value, int | float):
            found.append((name, number(value)))
    return found


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV table."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    """Write metrics/report.md and metrics/model_card.md, and end with the results table."""
    params = load_params("evaluate", "task")
    results = Results(
        test=read_json(METRICS),
        validation=read_json(VALIDATION),
        training=read_json(TRAINING),
        data={path.stem: read_json(path) for path in DATA_REPORTS},
        decision=read_json(DECISION),
        confusion=read_csv(CONFUSION),
        misclassified=[row | {"id": original(row["id"])} for row in read_csv(MISCLASSIFIED)],
        examples=read_table(EXAMPLES, ["id", "text", "label", "adapter", "base"]).to_pylist(),
    )
    write_text(REPORT, report_text(results, params))
    card = ADAPTER_CARD.read_text(encoding="utf-8")
    write_text(MODEL_CARD, card_text(card, results.test, params.task))
    print(f"report: {REPORT} and {MODEL_CARD}; {results.test['adapter']['n']:,} test rows:\n")
    print(result_tables(params.task, results.test)[0])


if __name__ == "__main__":
    run_stage(main, takes_arguments=False)
