"""Numbers become text for people: metrics/report.md, and the adapter's model card with its results."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from stages.common.errors import run_stage
from stages.common.measuring.markdown import literal, markdown_table, number
from stages.common.tables import read_json, write_text

METRICS = Path("metrics/metrics.json")
VALIDATION = Path("metrics/validation.json")
TRAINING = Path("metrics/training.json")
CONFUSION = Path("metrics/evaluation/confusion.csv")
MISCLASSIFIED = Path("metrics/evaluation/misclassified.csv")
DATA_REPORTS = [Path(f"data/reports/{stage}.json") for stage in ("ingest", "format_prompts", "split")]
DECISION = Path("models/decision.json")
ADAPTER_CARD = Path("models/adapter/README.md")
REPORT = Path("metrics/report.md")
MODEL_CARD = Path("metrics/model_card.md")

NAMES = {
    "adapter": "adapter",
    "base": "zero-shot base",
    "tfidf": "TF-IDF + logistic regression",
    "majority": "majority",
}
LISTED_CONFUSIONS = 10
TWO_CLASS_HEADER = ["", "precision", "recall [95 %]", "specificity", "ROC AUC", "PR AUC", "WSS@95", "threshold"]
TWO_CLASS_NUMBERS = ["specificity", "roc_auc", "pr_auc", "wss_at_95", "threshold"]


def with_interval(block: dict[str, Any], name: str) -> str:
    """A metric and its 95 % interval, as `0.829 [0.791, 0.864]`."""
    return f"{number(block[name])} [{number(block[f'{name}_low'])}, {number(block[f'{name}_high'])}]"


def results_table(blocks: dict[str, Any]) -> str:
    """Each predictor's headline metrics with their 95 % intervals."""
    header = ["", "accuracy [95 %]", "macro-F1 [95 %]", "log loss", "invalid answers"]
    return markdown_table(
        header,
        [
            [
                name,
                with_interval(blocks[key], "accuracy"),
                with_interval(blocks[key], "f1_macro"),
                number(blocks[key].get("log_loss")),
                f"{blocks[key]['invalid_rate']:.1%}",
            ]
            for key, name in NAMES.items()
        ],
    )


def two_class_table(blocks: dict[str, Any]) -> str:
    """Each predictor's metrics of the positive label; empty with more than two labels."""
    if "recall" not in blocks["adapter"]:
        return ""
    return markdown_table(
        TWO_CLASS_HEADER,
        [
            [name, number(block["precision"]), with_interval(block, "recall")]
            + [number(block.get(key)) for key in TWO_CLASS_NUMBERS]
            for name, block in ((name, blocks[key]) for key, name in NAMES.items())
        ],
    )


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


def worst_confusions(cells: list[dict[str, str]], most: int) -> list[list[str]]:
    """Label, wrong prediction, rows, and their share of the label's rows; the most frequent first.

    Args:
        cells: rows of confusion.csv; those of equal counts keep its order.
        most: longest list.
    """
    support: dict[str, int] = {}
    for cell in cells:
        support[cell["label"]] = support.get(cell["label"], 0) + int(cell["count"])
    wrong = [cell for cell in cells if cell["label"] != cell["prediction"] and int(cell["count"])]
    wrong.sort(key=lambda cell: -int(cell["count"]))
    return [
        [
            literal(cell["label"]),
            literal(cell["prediction"]),
            number(int(cell["count"])),
            f"{int(cell['count']) / support[cell['label']]:.1%}",
        ]
        for cell in wrong[:most]
    ]


def decision_text(rule: dict[str, Any]) -> str:
    """A predictor's decision rule in words."""
    if rule["rule"] == "answer":
        return "the generated answer, if it is a label"
    if rule["rule"] == "argmax":
        return "the likeliest label"
    reached = ", ".join(f"{name} {number(rule[name])}" for name in ("precision", "recall", "f1"))
    return (
        f"{literal(rule['positive_label'])} from a probability of {rule['threshold']:.6g} on ({rule['method']}, from "
        f"{rule['chosen_on']}; on validation: {reached})"
    )


def data_text(reports: dict[str, dict[str, Any]]) -> str:
    """What each data stage counted, one table for all."""
    rows = [[stage, what, count] for stage, report in reports.items() for what, count in counts(report)]
    return markdown_table(["stage", "what", "count"], rows)


def label_table(per_class: dict[str, Any]) -> str:
    """Precision, recall, F1 and support of each label."""
    return markdown_table(
        ["label", "precision", "recall", "F1", "rows"],
        [
            [literal(label), *(number(scores[name]) for name in ("precision", "recall", "f1", "support"))]
            for label, scores in per_class.items()
        ],
    )


def report_text(
    metrics: dict[str, dict[str, Any]],
    training: dict[str, Any],
    data_reports: dict[str, dict[str, Any]],
    decision: dict[str, Any],
    confusion: list[dict[str, str]],
    misclassified: list[dict[str, str]],
) -> str:
    """The report in Markdown.

    Args:
        metrics: blocks by predictor, for "test" and "validation".
        training: the content of metrics/training.json.
        data_reports: the reports of the data stages.
        decision: the content of models/decision.json.
        confusion: the rows of confusion.csv.
        misclassified: the rows of misclassified.csv.
    """
    test, validation = metrics["test"], metrics["validation"]
    confusions = markdown_table(
        ["label", "prediction", "rows", "of the label"], worst_confusions(confusion, LISTED_CONFUSIONS)
    )
    listed = [
        [*(literal(row[key]) for key in ("id", "label", "prediction")), row["confidence"]] for row in misclassified
    ]
    sections = {
        "": [results_table(test), two_class_table(test)],
        f"Validation ({validation['adapter']['n']:,} rows)": [results_table(validation), two_class_table(validation)],
        "Decisions": ["\n".join(f"- {name}: {decision_text(decision[key])}" for key, name in NAMES.items())],
        "Labels (adapter, test)": [label_table(test["adapter"]["per_class"])],
        "Worst confusions (adapter, test)": [confusions],
        "Surest mistakes (adapter, test)": [markdown_table(["id", "label", "prediction", "confidence"], listed)],
        "Training": [
            markdown_table(
                ["what", "value"], [[key.replace("_", " "), number(value)] for key, value in training.items()]
            )
        ],
        "Data": [data_text(data_reports)],
    }
    introduction = (
        f"# Results\n\n{test['adapter']['n']:,} test rows; intervals are 95 % percentile bootstraps over rows. "
        "Plots: `dvc plots show`. All numbers: `dvc metrics show`."
    )
    blocks = [introduction]
    for title, texts in sections.items():
        blocks += [f"## {title}"] if title else []
        blocks += [text for text in texts if text]
    return "\n\n".join(blocks) + "\n"


def card_text(card: str, test: dict[str, Any]) -> str:
    """The adapter's model card with its results on test, as a table and as the Hub's `model-index` metadata."""
    parsed = ModelCard(card)
    assert isinstance(parsed.data, ModelCardData), "a model card has a model's metadata"
    parsed.data.model_name = next(line[2:] for line in parsed.text.splitlines() if line.startswith("# "))
    wanted = {
        "accuracy": ("accuracy", "accuracy"),
        "f1_macro": ("f1", "macro-F1"),
        "log_loss": ("log_loss", "log loss"),
    }
    parsed.data.eval_results = [
        EvalResult(
            task_type="text-classification",
            dataset_type="local",
            dataset_name="the pipeline's test split",
            dataset_split="test",
            metric_type=metric_type,
            metric_name=name,
            metric_value=round(test["adapter"][key], 4),
        )
        for key, (metric_type, name) in wanted.items()
        if key in test["adapter"]
    ]
    results = "\n\n".join(text for text in (results_table(test), two_class_table(test)) if text)
    parsed.text = (
        f"{parsed.text.rstrip()}\n\n## Results\n\nOn {test['adapter']['n']:,} test rows, with 95 % bootstrap intervals:"
        f"\n\n{results}\n"
    )
    return str(parsed)


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV table."""
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    """Write metrics/report.md and metrics/model_card.md, and end with the results table."""
    test = read_json(METRICS)
    text = report_text(
        {"test": test, "validation": read_json(VALIDATION)},
        read_json(TRAINING),
        {path.stem: read_json(path) for path in DATA_REPORTS},
        read_json(DECISION),
        read_csv(CONFUSION),
        read_csv(MISCLASSIFIED),
    )
    write_text(REPORT, text)
    write_text(MODEL_CARD, card_text(ADAPTER_CARD.read_text(encoding="utf-8"), test))
    print(f"report: {REPORT} and {MODEL_CARD}; {test['adapter']['n']:,} test rows:\n")
    print(results_table(test))


if __name__ == "__main__":
    run_stage(main)
