"""The blocks `format_prompts` and `split`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stages.common.schema.fields import Block, Seed, Text


class FormatPrompts(Block):
    """From a record to a prompt and its completion."""

    style: Literal["plain", "chat"] = Field(description="chat: through the base model's own chat template")
    system: str | None = Field(description="chat: the system message; null: what the chat template puts there")
    template: Text | None = Field(
        description="Jinja: text, labels, descriptions (by label), exemplars (text and label); null with conversations"
    )
    max_length_tokens: Annotated[int, Field(ge=8)] = Field(description="prompt and answer; texts are shortened")
    max_shortened_share: Annotated[float, Field(ge=0, le=1)] = Field(
        description="the stage fails when a larger share of texts, conversations or answers was shortened"
    )

    @model_validator(mode="after")
    def _system_only_in_chat(self) -> FormatPrompts:
        if self.style == "plain" and self.system is not None:
            raise ValueError("system: must be null with style 'plain'; put its text into the template")
        return self


class Split(Block):
    """Shares of the rows; a published split's parts are kept and only what is missing is made."""

    seed: Seed
    validation_share: Annotated[float, Field(gt=0, lt=1)]
    test_share: Annotated[float, Field(gt=0, lt=1)]
    leakage: Literal["error", "drop"] = Field(
        description="a text in two parts of a published split: stop, or drop it from train (then validation)"
    )

    @model_validator(mode="after")
    def _something_is_left(self) -> Split:
        if self.validation_share + self.test_share >= 1:
            raise ValueError("validation_share + test_share must be below 1: nothing would be left to train on")
        return self
