"""Greedy answers in batches, and the label that an answer is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import PeftModel
from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedModel

from stages.common.labels import INVALID
from stages.common.scoring.batches import map_in_batches, pad
from stages.common.scoring.label_scores import language_model


def generate_answers(
    model: PreTrainedModel | PeftModel,
    tokenizer: Tokenizer,
    prompts: Sequence[list[int]],
    terminators: list[int],
    max_new_tokens: int,
    tokens_per_batch: int,
    advance: Callable[[int], object] = lambda count: None,
) -> list[str]:
    """The likeliest token after the prompt, and the likeliest after that, until a terminator or the limit.

    Args:
        model: a decoder in evaluation mode, with or without adapter; its own generation settings are replaced.
        tokenizer: the model's.
        prompts: token ids of each prompt, at least one token each.
        terminators: tokens that end an answer.
        max_new_tokens: longest answer, its terminator included.
        tokens_per_batch: most tokens in a batch, answers included.
        advance: is told how many prompts are done, after each batch.

    Returns:
        A text for each prompt, without control tokens and without the terminator; no prompts give an empty list.

    Raises:
        UserError: the GPU's memory is too small for one prompt.
    """
    decoder: Any = language_model(model)
    # Values that `generate` is not given come from here, and many models bring sampling or repetition penalties along.
    decoder.generation_config = GenerationConfig()

    def compute(batch: list[int]) -> list[str]:
        ids, real = pad([prompts[index] for index in batch], "left", decoder.device)
        outputs = decoder.generate(
            input_ids=ids,
            attention_mask=real.long(),
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=terminators,
            pad_token_id=0,
        )
        return [_decode(tokenizer, output, terminators) for output in outputs[:, ids.shape[1] :].tolist()]

    costs = [len(prompt) + max_new_tokens for prompt in prompts]
    with torch.inference_mode():
        return map_in_batches(compute, costs, tokens_per_batch, advance)


def match_label(answer: str, labels: Sequence[str]) -> str:
    """The label that the answer is, white space around it aside, or `<invalid>`; nothing else is forgiven."""
    return answer.strip() if answer.strip() in labels else INVALID


def _decode(tokenizer: Tokenizer, ids: list[int], terminators: list[int]) -> str:
    end = next((index for index, token in enumerate(ids) if token in terminators), len(ids))
    return tokenizer.decode(ids[:end], skip_special_tokens=True)
