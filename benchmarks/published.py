"""What a user would run instead: two published recipes and TRL's defaults, re-created in plain TRL and transformers.

Taken over is what decides speed: rank, batch, checkpointing, optimizer, which tokens have a loss, one prompt at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel, pipeline
from trl import SFTConfig, SFTTrainer

from stages.common.base import BASE_FOLDER
from stages.common.model import machine_device
from stages.common.scoring.batches import pad

MAX_NEW_TOKENS = 8
GENERATED_ROWS = 64
WORD = " the"  # one token, of the tests' tokenizer and of SmolLM2's


@dataclass(frozen=True)
class Recipe:
    """How a published system trains.

    Attributes:
        rank: of the adapter, on all linear layers.
        rows: at a time.
        accumulation: of gradients over so many times, for one optimizer step.
        optimizer: as transformers names it.
        answers_only: whether only the answers' tokens have a loss, or all.
        quantized: whether the base is in NF4.
    """

    rank: int
    rows: int
    accumulation: int
    optimizer: str
    answers_only: bool
    quantized: bool


RECIPES = {
    "arxiv-topics": Recipe(16, 8, 2, "adamw_torch", answers_only=False, quantized=True),
    "slr-screening": Recipe(32, 2, 4, "adamw_8bit", answers_only=False, quantized=True),
}


def default_recipe(rank: int, batch: int) -> Recipe:
    """TRL's defaults: 8 rows at a time (fewer where 8 does not divide the batch), checkpointing, loss on answers.

    On a CPU the base stays in float32: on a quantised one TRL makes the adapter bfloat16, which is slower there.
    """
    rows = max(rows for rows in range(1, 9) if batch % rows == 0)
    return Recipe(rank, rows, batch // rows, "adamw_torch", answers_only=True, quantized=torch.cuda.is_available())


def make_recipe_trainer(recipe: Recipe, rows: Dataset, steps: int, folder: str) -> SFTTrainer:
    """TRL's trainer as a user of the recipe sets it up, float32 on a CPU.

    Args:
        recipe: what to set.
        rows: `prompt_ids` and `completion_ids`.
        steps: optimizer steps.
        folder: for what the trainer writes.
    """
    on_cpu = machine_device().type == "cpu"
    return SFTTrainer(
        model=load_published(recipe.quantized),
        args=SFTConfig(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=recipe.rows,
            gradient_accumulation_steps=recipe.accumulation,
            gradient_checkpointing=True,
            optim=recipe.optimizer,
            learning_rate=2e-4,
            completion_only_loss=recipe.answers_only,
            bf16=not on_cpu,
            use_cpu=on_cpu,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=Dataset.from_list([_sequence(row, recipe.answers_only) for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(str(BASE_FOLDER)),
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=recipe.rank, lora_alpha=2 * recipe.rank, target_modules="all-linear"
        ),
    )


def _sequence(row: dict[str, list[int]], answers_only: bool) -> dict[str, list[int]]:
    """A row as TRL's own tokenisation would leave it."""
    prompt, answer = row["prompt_ids"], row["completion_ids"]
    mask = {"completion_mask": [0] * len(prompt) + [1] * len(answer)} if answers_only else {}
    return {"input_ids": prompt + answer} | mask


def load_published(quantized: bool) -> PreTrainedModel:
    """The base model as the recipes load it: NF4 with double quantisation or not, bfloat16, on a CPU float32."""
    device = machine_device()
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    settings: dict[str, Any] = {}
    if quantized:
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    return AutoModelForCausalLM.from_pretrained(str(BASE_FOLDER), dtype=dtype, device_map={"": device}, **settings)


def pipeline_predictor(model: PeftModel) -> Callable[[list[list[int]]], None]:
    """A function that answers one prompt at a time with the text-generation pipeline, as both recipes do.

    Its texts are a word of one token, repeated as often as the prompt has tokens. Random weights hardly ever end an
    answer early, so that all 8 tokens are generated; a trained model may stop after its label.
    """
    tokenizer = AutoTokenizer.from_pretrained(str(BASE_FOLDER))
    peft_model: Any = model  # the pipeline takes it, though its types do not say so
    answer = pipeline("text-generation", model=peft_model, tokenizer=tokenizer, max_new_tokens=MAX_NEW_TOKENS)

    def answer_each(prompts: list[list[int]]) -> None:
        for prompt in prompts:
            answer(WORD * len(prompt), do_sample=False)

    return answer_each


def answer_in_batches(model: PeftModel, prompts: list[list[int]]) -> None:
    """Answer 64 prompts of similar length at a time with `generate`."""
    ordered = sorted(prompts, key=len)
    for start in range(0, len(ordered), GENERATED_ROWS):
        ids, real = pad(ordered[start : start + GENERATED_ROWS], "left", model.device)
        model.generate(input_ids=ids, attention_mask=real.long(), max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
