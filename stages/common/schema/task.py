"""The block `task`: what is to be learned."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stages.common.labels import INVALID
from stages.common.schema.fields import Block, Text


class ClassificationTask(Block):
    """One label of several for each text; or, with `multi_label`, any number of them."""

    kind: Literal["classification"]
    multi_label: bool = Field(description="whether a text can have several labels, or none")
    labels: Annotated[list[Text], Field(min_length=2, description="the exact strings, in the order of all outputs")]
    label_descriptions: dict[str, Text] | None = Field(description="a text for each label, for the template; or null")
    positive_label: str | None = Field(description="with two labels: the one that recall and precision are about")

    @model_validator(mode="after")
    def _labels_are_consistent(self) -> ClassificationTask:
        problems = []
        repeated = sorted({label for label in self.labels if self.labels.count(label) > 1})
        if repeated:
            problems.append(f"labels: {repeated} listed more than once")
        problems += [
            f"labels: {label!r} begins or ends with white space, or has more than one line"
            for label in self.labels
            if label != label.strip() or len(label.splitlines()) > 1
        ]
        if INVALID in self.labels:
            problems.append(f"labels: {INVALID!r} is what an unreadable answer is written as; choose another name")
        if self.label_descriptions is not None and set(self.label_descriptions) != set(self.labels):
            wrong = sorted(set(self.label_descriptions) ^ set(self.labels))
            problems.append(f"label_descriptions: needs exactly the labels as keys; missing or unknown: {wrong}")
        if self.multi_label and self.positive_label is not None:
            problems.append("positive_label: must be null with multi_label: every label is measured by itself")
        elif not self.multi_label and len(self.labels) == 2 and self.positive_label not in self.labels:
            problems.append(f"positive_label: with two labels it must be one of them, {self.labels}")
        elif len(self.labels) > 2 and self.positive_label is not None:
            problems.append("positive_label: must be null with more than two labels")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class GenerationTask(Block):
    """A text in answer to a question, or to a conversation so far."""

    kind: Literal["question_answering", "chat"] = Field(description="one exchange; or conversations of any length")


Task = Annotated[ClassificationTask | GenerationTask, Field(discriminator="kind")]
