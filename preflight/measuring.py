"""What will keep the numbers from meaning what they should, seen from the data and the blocks that measure."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from preflight.findings import Finding, error, warning
from stages.common.contents import Part
from stages.common.errors import listing
from stages.common.schema.finetune import Finetune
from stages.common.schema.measuring import BestF1Threshold, Evaluate, Infer, RecallThreshold
from stages.common.schema.task import ClassificationTask, GenerationTask, Task

RARE_SHARE = 0.1
# Below this the standard error of a share of one half is above .09.
FEW_ROWS = 30


def rare_label_gets_no_weight(task: Task, finetune: Finetune, parts: Mapping[str, Part]) -> Iterator[Finding]:
    """A rare label without class balance; with many labels rare means below half of an even share."""
    train = parts["train"]
    if not isinstance(task, ClassificationTask) or task.multi_label or finetune.class_balance != "none":
        return
    rarest = min(task.labels, key=lambda label: train.labels[label])
    share = train.labels[rarest] / max(train.rows, 1)
    if 0 < share < min(RARE_SHARE, 0.5 / len(task.labels)):
        yield warning(
            "finetune.class_balance",
            f"{rarest!r} has {train.labels[rarest]:,} of {train.rows:,} rows of train ({share:.1%}), and nothing makes "
            "up for it",
            f"'none' where every label has {min(RARE_SHARE, 0.5 / len(task.labels)):.0%} or more",
            "Try weighted_loss or oversample, and compare f1_macro",
        )


def threshold_cannot_be_chosen(task: Task, evaluate: Evaluate, parts: Mapping[str, Part]) -> Iterator[Finding]:
    """Too few positive rows in validation for the threshold that is asked for.

    With P positive rows the lowest threshold catches all of them, and all P are caught by chance with probability
    recall**P: a promise of `recall` with `confidence` needs recall**P <= 1 - confidence (Wilks, Annals of Mathematical
    Statistics 12, 1941).
    """
    if not isinstance(task, ClassificationTask):
        return
    threshold, validation = evaluate.threshold, parts["validation"]
    if not isinstance(threshold, RecallThreshold | BestF1Threshold) or not validation.rows:
        return
    needed = 1
    if isinstance(threshold, RecallThreshold) and threshold.confidence is not None:
        needed = positives_needed(threshold.recall, threshold.confidence)
    positives = task.labels if task.multi_label else [str(task.positive_label)]
    too_few = [label for label in positives if validation.labels[label] < needed]
    if too_few:
        counts = listing([f"{validation.labels[label]:,} with {label!r}" for label in too_few])
        rarest = min(validation.labels[label] for label in too_few)
        times = f" by a factor of {needed / rarest:.1f}" if rarest else ""
        yield error(
            "evaluate.threshold",
            f"validation has {counts}, too few to choose a threshold by {threshold.method!r}",
            f"at least {needed:,} of {'each' if task.multi_label else 'them'}",
            f"Raise split.validation_share{times}, lower recall or confidence, or set confidence to null (no promise)"
            if needed > 1
            else "Raise split.validation_share, or use a fixed threshold",
        )


def part_is_too_small_to_measure_on(parts: Mapping[str, Part]) -> Iterator[Finding]:
    """A validation or test part whose numbers say next to nothing."""
    for name in ("validation", "test"):
        if 0 < parts[name].rows < FEW_ROWS:
            yield warning(
                f"split.{name}_share",
                f"{name} has {parts[name].rows} rows: the standard error of a share of one half is "
                f"{0.5 / math.sqrt(parts[name].rows):.2f}",
                f"{FEW_ROWS} rows or more, better hundreds",
                "Raise it, or add rows",
            )


def positives_needed(recall: float, confidence: float) -> int:
    """Fewest positive rows P that can promise a recall: recall**P <= 1 - confidence; 59 for .95 and .95."""
    # Rounded, since log(.01) / log(.1) must be 2 and no more.
    return math.ceil(round(math.log(1 - confidence) / math.log(recall), 9))


def label_is_longer_than_generated(task: Task, infer: Infer, prompt_format: Mapping[str, Any]) -> Iterator[Finding]:
    """Labels that generation stops in the middle of; the end token itself need not be written."""
    if not isinstance(task, ClassificationTask) or infer.max_new_tokens is None:
        return
    lengths = {label: len(entry["ids"]) - 1 for label, entry in prompt_format["completions"].items()}
    cut = [label for label, tokens in lengths.items() if tokens > infer.max_new_tokens]
    if cut:
        yield error(
            "infer.max_new_tokens",
            f"{infer.max_new_tokens} is too short for {listing(cut)}, so that every such answer is <invalid>",
            f"at least {max(lengths.values()) + 1}, with the end token",
            "Raise it, or set infer.method to label_scores",
        )


def references_are_longer_than_generated(task: Task, infer: Infer, parts: Mapping[str, Part]) -> Iterator[Finding]:
    """Answers that are cut before they are as long as half of the references."""
    tokens = parts["test"].answer_tokens
    if not isinstance(task, GenerationTask) or infer.max_new_tokens is None or not tokens:
        return
    middle = int(np.quantile(list(tokens), 0.5, method="inverted_cdf", weights=list(tokens.values())))
    if infer.max_new_tokens < middle:
        longer = sum(rows for length, rows in tokens.items() if length > infer.max_new_tokens) / tokens.total()
        yield warning(
            "infer.max_new_tokens",
            f"{infer.max_new_tokens} is shorter than {longer:.0%} of the references in test (median {middle} "
            "tokens): answers will be cut, and overlap with references is bounded",
            f"{middle} or more",
            "Raise it, where time allows",
        )


CHECKS = (
    part_is_too_small_to_measure_on,
    rare_label_gets_no_weight,
    threshold_cannot_be_chosen,
    label_is_longer_than_generated,
    references_are_longer_than_generated,
)
