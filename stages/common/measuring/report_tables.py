"""The tables of metrics/report.md: blocks of metrics.json become Markdown."""

from __future__ import annotations

from typing import Any

from stages.common.measuring.markdown import literal, markdown_table, number, text_cell
from stages.common.measuring.report_columns import (
    ANSWER_NAMES,
    NAMES,
    Blocks,
    Column,
    interval,
    plain,
    predictor_table,
    share,
)
from stages.common.schema.task import GenerationTask, Task

LISTED_CONFUSIONS = 10
EXAMPLE_CHARACTERS = 500


def result_tables(task: Task, blocks: Blocks) -> list[str]:
    """Each predictor's metrics on a part, the headline first."""
    if isinstance(task, GenerationTask):
        return [answer_table(blocks), answer_form_table(blocks)]
    if task.multi_label:
        return [label_set_table(blocks)]
    return [results_table(blocks), averages_table(blocks), *([two_class_table(blocks)] if task.positive_label else [])]


# --- labels -----------------------------------------------------------------------------------------------------------


def results_table(blocks: Blocks) -> str:
    """Each predictor's headline metrics with their 95 % intervals."""
    return predictor_table(
        blocks,
        [
            interval("accuracy", "accuracy"),
            interval("macro-F1", "f1_macro"),
            plain("log loss", "log_loss"),
            share("invalid answers", "invalid_rate"),
        ],
    )


def averages_table(blocks: Blocks) -> str:
    """Each predictor's other averages, and how good its probabilities are."""
    return predictor_table(
        blocks,
        [
            interval("macro-recall", "recall_macro"),
            plain("macro-precision", "precision_macro"),
            plain("micro-F1", "f1_micro"),
            plain("Brier", "brier"),
            plain("ECE", "ece"),
        ],
    )


def two_class_table(blocks: Blocks) -> str:
    """Each predictor's metrics of the positive label."""
    return predictor_table(
        blocks,
        [
            plain("precision", "precision"),
            interval("recall", "recall"),
            plain("specificity", "specificity"),
            plain("ROC AUC", "roc_auc"),
            plain("PR AUC", "pr_auc"),
            plain("WSS@95", "wss_at_95"),
            plain("threshold", "threshold"),
        ],
    )


def screening_table(blocks: Blocks, decision: dict[str, dict[str, Any]], wanted_recall: float | None) -> str:
    """What each predictor's threshold promised, what it gave, and how many rows remain to be read.

    Args:
        blocks: the content of metrics.json.
        decision: the content of models/decision.json.
        wanted_recall: with the threshold method "recall", the one that was asked for.
    """
    rows_to_read: Column = ("rows to read", lambda block: f"{block['rows_selected']:,} of {block['n']:,}")
    columns = [interval("recall reached", "recall"), plain("precision", "precision"), rows_to_read]
    columns.append(plain("WSS@95", "wss_at_95"))
    if wanted_recall is not None:
        promised = {key: rule | blocks[key] for key, rule in decision.items()}
        columns = [("recall promised", _promise), *columns]
        columns += [
            plain(f"WSS at recall {wanted_recall:g}", "wss_at_recall"),
            plain(f"precision at recall {wanted_recall:g}", "precision_at_recall"),
        ]
        return predictor_table(promised, columns)
    return predictor_table(blocks, columns)


def label_set_table(blocks: Blocks) -> str:
    """Each predictor's metrics where a text can have several labels."""
    return predictor_table(
        blocks,
        [
            interval("subset accuracy", "accuracy"),
            interval("macro-F1", "f1_macro"),
            plain("micro-F1", "f1_micro"),
            plain("sample F1", "f1_samples"),
            plain("Hamming loss", "hamming_loss"),
            plain("log loss", "log_loss"),
        ],
    )


def label_table(per_class: dict[str, dict[str, Any]]) -> str:
    """Precision, recall, F1 and support of each label; with several labels for a text also PR AUC and threshold."""
    columns = {"precision": "precision", "recall": "recall", "f1": "F1", "support": "rows"}
    if any("threshold" in scores for scores in per_class.values()):
        columns |= {"pr_auc": "PR AUC", "threshold": "threshold"}
    return markdown_table(
        ["label", *columns.values()],
        [[literal(label), *(number(scores.get(name)) for name in columns)] for label, scores in per_class.items()],
    )


def confusion_table(cells: list[dict[str, str]]) -> str:
    """Label, wrong prediction, rows, and their share of the label's rows; the most frequent first.

    Args:
        cells: rows of confusion.csv; those of equal counts keep its order.
    """
    support: dict[str, int] = {}
    for cell in cells:
        support[cell["label"]] = support.get(cell["label"], 0) + int(cell["count"])
    wrong = [cell for cell in cells if cell["label"] != cell["prediction"] and int(cell["count"])]
    wrong.sort(key=lambda cell: -int(cell["count"]))
    rows = [
        [
            literal(cell["label"]),
            literal(cell["prediction"]),
            number(int(cell["count"])),
            f"{int(cell['count']) / support[cell['label']]:.1%}",
        ]
        for cell in wrong[:LISTED_CONFUSIONS]
    ]
    return markdown_table(["label", "prediction", "rows", "of the label"], rows)


def mistake_table(misclassified: list[dict[str, str]]) -> str:
    """Ids, labels and predictions, never texts.

    Args:
        misclassified: rows of misclassified.csv.
    """
    return markdown_table(
        ["id", "label", "prediction", "confidence"],
        [[*(literal(row[key]) for key in ("id", "label", "prediction")), row["confidence"]] for row in misclassified],
    )


def _promise(rule: dict[str, Any]) -> str:
    if "recall_promised" not in rule:
        return number(None)
    return f"{number(rule['recall_promised'])} ({rule['confidence']:.0%} sure)"


# --- texts ------------------------------------------------------------------------------------------------------------


def answer_table(blocks: Blocks) -> str:
    """How close each predictor's answers are to the references."""
    columns = [
        interval("token F1", "token_f1"),
        interval("ROUGE-L", "rouge_l"),
        plain("exact match", "exact_match"),
        interval("perplexity", "perplexity"),
    ]
    return predictor_table(blocks, columns, ANSWER_NAMES)


def answer_form_table(blocks: Blocks) -> str:
    """How long each predictor's answers are, how often they repeat themselves and how often they are empty."""
    columns: list[Column] = [
        ("words per answer", lambda block: f"{block['answer_words']:.1f}"),
        ("words per reference", lambda block: f"{block['reference_words']:.1f}"),
        share("repeated 4-grams", "repetition_rate"),
        share("empty answers", "empty_rate"),
    ]
    return predictor_table(blocks, columns, ANSWER_NAMES)


def example_table(examples: list[dict[str, str]], reference: str) -> str:
    """Texts with reference (or label), base's and adapter's answer side by side; long ones are shortened visibly.

    Args:
        examples: rows of data/examples.parquet.
        reference: title of their column `label`.
    """
    return markdown_table(
        ["text", reference, NAMES["base"], NAMES["adapter"]],
        [
            [
                f"{literal(row['id'])}<br>{text_cell(row['text'], EXAMPLE_CHARACTERS)}",
                *(text_cell(row[key], EXAMPLE_CHARACTERS) for key in ("label", "base", "adapter")),
            ]
            for row in examples
        ],
        padded=False,
    )
