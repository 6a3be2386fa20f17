"""The block `finetune`: how the adapter is trained."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from stages.common.schema.fields import Block, Count, Seed, Share, Text


class Lora(Block):
    """The adapter's shape; see peft.LoraConfig."""

    r: Count
    alpha: Count
    dropout: Share
    target_modules: Literal["all-linear"] | Annotated[list[Text], Field(min_length=1)]
    use_rslora: bool
    use_dora: bool


class Finetune(Block):
    """How the adapter is trained. Nothing here names a machine: micro-batch and precision follow the hardware."""

    seed: Seed = Field(description="initial weights, dropout and the order of rows")
    class_balance: Literal["none", "weighted_loss", "oversample"] = Field(
        description="what rare labels get: nothing, a larger weight in the loss, or more rows"
    )
    lora: Lora
    epochs: Annotated[float, Field(gt=0)] | None = Field(description="passes over train; or null, and max_steps")
    max_steps: Count | None = Field(description="optimizer steps; or null, and epochs")
    global_batch_size: Count = Field(description="rows of one optimizer step, over all devices")
    learning_rate: Annotated[float, Field(gt=0, lt=1)]
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"]
    warmup_steps: Annotated[int, Field(ge=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    optimizer: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit"]
    max_gradient_norm: Annotated[float, Field(gt=0)]
    evaluate_every_steps: Count = Field(description="optimizer steps between losses on validation; the best is kept")
    early_stopping_patience: Count | None = Field(description="evaluations without a better loss; null: never stops")

    @model_validator(mode="after")
    def _one_length(self) -> Finetune:
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("give one of epochs and max_steps, and null for the other")
        return self
