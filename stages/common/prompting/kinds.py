"""The four kinds of row that prompts are made for."""

from __future__ import annotations

from stages.common.schema.task import ClassificationTask, Task

# Kinds whose answers are texts, not labels.
GENERATION_KINDS = ("question_answering", "chat")


def prompt_kind(task: Task) -> str:
    """The task's kind of row: "classification", "multi_label", "question_answering" or "chat"."""
    return "multi_label" if isinstance(task, ClassificationTask) and task.multi_label else task.kind


def task_labels(task: Task) -> list[str]:
    """The task's labels, in order; none where answers are texts."""
    return task.labels if isinstance(task, ClassificationTask) else []
