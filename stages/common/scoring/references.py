"""How likely a model finds the answers that people wrote: what perplexity is made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from stages.common.scoring.answer_logits import answer_logits
from stages.common.scoring.batches import check_finite, map_in_batches, pad
from stages.common.scoring.label_scores import language_model, tokens_of_logits


def score_references(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[list[int]],
    references: Sequence[list[int]],
    tokens_per_batch: int,
    advance: Callable[[int], object] = lambda count: None,
) -> np.ndarray:
    """Log-likelihood of each reference after its prompt: the sum over its tokens t of ln p(t | all before t).

    Args:
        model: a decoder in evaluation mode, with or without adapter.
        prompts: token ids of n prompts, at least one token each.
        references: token ids of n answers, at least one token each, the terminator included where there is one.
        tokens_per_batch: most tokens in a forward pass; changes memory and speed, and results only by rounding.
        advance: is told how many rows are done, after each batch.

    Returns:
        Natural logarithms, float64 of shape (n,), at most 0.

    Raises:
        UserError: the model's scores are not finite, or the GPU's memory is too small for one row.
    """
    decoder = language_model(model)
    head = decoder.get_output_embeddings()

    def compute(batch: list[int]) -> list[float]:
        rows = [[*prompts[index], *references[index]] for index in batch]
        ids, real = pad(rows, "right", decoder.device)
        starts = torch.tensor([len(prompts[index]) for index in batch], device=decoder.device)[:, None]
        place = torch.arange(ids.shape[1], device=decoder.device)
        # Where the next token is one of the reference's.
        positions = (place >= starts - 1) & (place < real.sum(dim=1, keepdim=True) - 1)
        inputs = {"input_ids": ids, "attention_mask": real.long()}
        logits = answer_logits(decoder, head, inputs, positions.flatten().nonzero()[:, 0])
        steps = -torch.nn.functional.cross_entropy(logits, ids.roll(-1, dims=1)[positions], reduction="none")
        counts = [len(references[index]) for index in batch]
        return [float(part.sum()) for part in steps.double().cpu().split(counts)]

    costs = [
        len(prompt) + len(reference) + tokens_of_logits(decoder, len(reference))
        for prompt, reference in zip(prompts, references, strict=True)
    ]
    with torch.inference_mode():
        scores = np.array(map_in_batches(compute, costs, tokens_per_batch, advance), dtype=np.float64)
    check_finite(scores)
    return scores
