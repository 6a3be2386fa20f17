"""What two blocks of params.yaml say against each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from stages.common.schema.ingest import AliasLabel, BinLabel, Columns, Conversation, Ingest, ListLabel
from stages.common.schema.prompts import FormatPrompts
from stages.common.schema.task import ClassificationTask, GenerationTask, Task

if TYPE_CHECKING:
    from stages.common.params import Params
    from stages.common.schema.finetune import Finetune
    from stages.common.schema.measuring import Evaluate, Infer


def contradictions(params: Params) -> list[str]:
    """What the blocks that were loaded say against each other; each problem begins with its key."""
    if not hasattr(params, "task"):
        return []
    checks: dict[str, Callable[[Any, Task], Iterator[str]]] = {
        "ingest": _ingest,
        "format_prompts": _format_prompts,
        "finetune": _finetune,
        "infer": _infer,
        "evaluate": _evaluate,
    }
    return [
        f"{block}.{problem}"
        for block, check in checks.items()
        if hasattr(params, block)
        for problem in check(getattr(params, block), params.task)
    ]


def _ingest(ingest: Ingest, task: Task) -> Iterator[str]:
    yield from (f"columns.{problem}" for problem in _columns(ingest.columns, task))
    for number, further in enumerate(ingest.further_sources):
        yield from (f"further_sources.{number}.columns.{problem}" for problem in _columns(further.columns, task))
    if ingest.exemplars_per_label and (isinstance(task, GenerationTask) or task.multi_label):
        yield "exemplars_per_label: must be 0: exemplars are for tasks with one label for each text"


def _columns(columns: Columns, task: Task) -> Iterator[str]:
    label = columns.label
    if isinstance(task, GenerationTask):
        if isinstance(columns.text, Conversation) and label is not None:
            yield "label: must be null: text is a conversation, and its last turn is the answer"
        elif not isinstance(columns.text, Conversation) and label is None:
            yield (
                "label: is null, and text is no conversation. Give the column with the answer as label; or, if the "
                "cells of text hold whole conversations, write text: {column: NAME, format: sharegpt} or messages"
            )
        elif not isinstance(label, str | None):
            yield f"label: must be a column or a pattern with the task {task.kind!r}: answers are texts"
        return
    if isinstance(columns.text, Conversation):
        yield "text: a conversation needs the task 'chat' or 'question_answering'; give a column or a pattern"
    if label is None:
        yield "label: is needed with the task 'classification'"
    elif isinstance(label, ListLabel) != task.multi_label:
        needed = "{column, separator, aliases}" if task.multi_label else "a column, aliases or bins"
        yield f"label: with task.multi_label {str(task.multi_label).lower()} it is {needed}"
    if isinstance(label, BinLabel) and len(label.bins) + 1 != len(task.labels):
        yield (
            f"label.bins: {len(label.bins)} edges make {len(label.bins) + 1} bins, "
            f"but task.labels names {len(task.labels)} labels"
        )
    if isinstance(label, AliasLabel | ListLabel) and label.aliases is not None:
        unknown = sorted(set(label.aliases.values()) - set(task.labels))
        if unknown:
            yield f"label.aliases: {unknown} are not in task.labels {task.labels}"


def _format_prompts(block: FormatPrompts, task: Task) -> Iterator[str]:
    if task.kind == "chat" and (block.style != "chat" or block.template is not None):
        yield "template: conversations go through the base's chat template: style must be chat and template null"
    if task.kind != "chat" and block.template is None:
        yield f"template: is needed with the task {task.kind!r}"


def _finetune(block: Finetune, task: Task) -> Iterator[str]:
    if block.class_balance != "none" and (isinstance(task, GenerationTask) or task.multi_label):
        yield "class_balance: must be none: it is for tasks with one label for each text"


def _infer(block: Infer, task: Task) -> Iterator[str]:
    if isinstance(task, GenerationTask) and block.method != "generate":
        yield f"method: must be generate with the task {task.kind!r}"
    if isinstance(task, ClassificationTask) and task.multi_label and block.method != "label_scores":
        yield "method: must be label_scores with task.multi_label"


def _evaluate(block: Evaluate, task: Task) -> Iterator[str]:
    if isinstance(task, GenerationTask):
        if block.threshold is not None or block.calibration_bins is not None:
            yield "threshold and calibration_bins: must be null where answers are texts"
        return
    if block.calibration_bins is None:
        yield "calibration_bins: is needed with the task 'classification', for example 10"
    if task.multi_label and block.threshold is None:
        yield "threshold: with task.multi_label it is needed (one for each label), for example {method: max_f1}"
    elif not task.multi_label and len(task.labels) > 2 and block.threshold is not None:
        yield "threshold: must be null with more than two labels (the likeliest label wins)"
    elif len(task.labels) == 2 and block.threshold is None:
        yield "threshold: with two labels it is needed, for example {method: fixed, value: 0.5}"
