"""The blocks `infer` and `evaluate`: how predictions are made, and how they become numbers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stages.common.schema.fields import Block, Count, Seed


class Infer(Block):
    """How predictions are made."""

    method: Literal["label_scores", "generate"] = Field(description="exact label probabilities, or greedy decoding")
    max_new_tokens: Count | None = Field(description="generate: longest answer; null with label_scores")

    @model_validator(mode="after")
    def _length_only_when_generating(self) -> Infer:
        if (self.method == "generate") != (self.max_new_tokens is not None):
            raise ValueError(
                "max_new_tokens: needed with method 'generate' as for questions and chats; null with 'label_scores'"
            )
        return self


class FixedThreshold(Block):
    """Positive from this probability on."""

    method: Literal["fixed"]
    value: Annotated[float, Field(gt=0, lt=1)]


class BestF1Threshold(Block):
    """The threshold with the best F1 of the positive label on validation."""

    method: Literal["max_f1"]


class RecallThreshold(Block):
    """The highest threshold that reaches a recall of the positive label.

    Without `confidence`, on validation; with it, on all texts of the same kind: the lower end of a one-sided interval
    around the recall is then at least `recall`.
    """

    method: Literal["recall"]
    recall: Annotated[float, Field(gt=0, le=1)]
    confidence: Annotated[float, Field(gt=0.5, lt=1)] | None

    @model_validator(mode="after")
    def _can_be_promised(self) -> RecallThreshold:
        if self.confidence is not None and self.recall == 1:
            raise ValueError("recall: a recall of 1 cannot be promised from a sample; give less, as 0.95")
        return self


class Evaluate(Block):
    """How predictions become numbers."""

    seed: Seed = Field(description="of the bootstrap and of the examples")
    bootstrap_samples: Annotated[int, Field(ge=100)]
    calibration_bins: Annotated[int, Field(ge=2)] | None = Field(description="null where answers are texts")
    threshold: Annotated[FixedThreshold | BestF1Threshold | RecallThreshold, Field(discriminator="method")] | None = (
        Field(description="two labels, or multi_label: how the decision is made, on validation; else null")
    )
    publish_texts: bool = Field(description="whether metrics/report.md, which goes into Git, may show texts")
