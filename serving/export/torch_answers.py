"""What a PyTorch model says of the test rows, on the plain path: no packing, no merging, no compiled layers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from serving.common.adapter import Adapter
from serving.export.parity import Answers, LabelAnswers, TextAnswers, answer_ids, label_probabilities
from serving.export.rows import TestRows
from stages.common.progress import progress
from stages.common.scoring.answer_logits import answer_logits
from stages.common.scoring.batches import TOKENS_PER_BATCH, check_finite, map_in_batches, pad
from stages.common.scoring.label_scores import language_model, score_labels, tokens_of_logits


def torch_answers(model: PreTrainedModel | PeftModel, adapter: Adapter, rows: TestRows, what: str) -> Answers:
    """The model's answers to the rows.

    Args:
        model: in evaluation mode, with or without adapter.
        adapter: says which answers there are.
        rows: what is answered.
        what: the model, for the progress bar.

    Raises:
        UserError: the model's scores are no numbers, or the GPU's memory is too small.
    """
    most = TOKENS_PER_BATCH[model.device.type]
    with progress(len(rows.prompt_ids), f"asking {what}") as bar, torch.inference_mode():
        if adapter.answers_with_texts:
            return _along_references(model, rows, most, bar.update)
        scores = score_labels(model, rows.prompt_ids, answer_ids(adapter), most, bar.update)
    check_finite(scores)
    return LabelAnswers(label_probabilities(adapter, scores))


def _along_references(
    model: PreTrainedModel | PeftModel, rows: TestRows, most: int, advance: Callable[[int], object]
) -> TextAnswers:
    decoder = language_model(model)
    head = decoder.get_output_embeddings()

    def compute(batch: list[int]) -> list[np.ndarray]:
        ids, real = pad(
            [[*rows.prompt_ids[index], *rows.references[index]] for index in batch], "right", decoder.device
        )
        starts = torch.tensor([len(rows.prompt_ids[index]) for index in batch], device=decoder.device)[:, None]
        place = torch.arange(ids.shape[1], device=decoder.device)
        # Where the next token is one of the reference's.
        positions = (place >= starts - 1) & (place < real.sum(dim=1, keepdim=True) - 1)
        inputs = {"input_ids": ids, "attention_mask": real.long()}
        steps = answer_logits(decoder, head, inputs, positions.flatten().nonzero()[:, 0]).log_softmax(dim=-1)
        own = steps.gather(1, ids.roll(-1, dims=1)[positions][:, None])[:, 0]
        found = torch.stack([steps.argmax(dim=1).double(), own.double()]).cpu().numpy()  # (2, tokens)
        ends = np.cumsum([len(rows.references[index]) for index in batch])
        return np.split(found, ends[:-1], axis=1)

    costs = [
        len(prompt) + len(reference) + tokens_of_logits(decoder, len(reference))
        for prompt, reference in zip(rows.prompt_ids, rows.references, strict=True)
    ]
    likeliest, own = np.concatenate(map_in_batches(compute, costs, most, advance), axis=1)
    check_finite(own)
    return TextAnswers(likeliest.astype(np.int64), own)
