"""From prompts to labels with probabilities: one label for each prompt, or any number of them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from peft import PeftModel
from tokenizers import Tokenizer
from transformers import PreTrainedModel

from stages.common.base import TOKENIZER_FOLDER
from stages.common.branches import Branches
from stages.common.labels import join_labels
from stages.common.schema.measuring import Infer
from stages.common.scoring.batches import TOKENS_PER_BATCH, check_finite
from stages.common.scoring.generation import generate_answers, match_label
from stages.common.scoring.label_scores import score_labels

APPLIES_FROM = 0.5  # probability; `evaluate` chooses its own for each label, on validation


def predict_label(
    model: PreTrainedModel | PeftModel,
    prompts: list[list[int]],
    label_ids: dict[str, list[int]],
    params: Infer,
    advance: Callable[[int], object],
) -> tuple[list[str], np.ndarray | None]:
    """A label for each prompt and, when labels are scored, the posterior over all labels.

    The posterior is the labels' likelihoods (each label whole, with its terminator) divided by their sum: the
    probability of each label given that the answer is one of them. Of equally likely labels the first is predicted.

    Args:
        model: the model in evaluation mode.
        prompts: token ids of each row's prompt; may be empty.
        label_ids: token ids of each label's completion, terminator included.
        params: method and longest answer.
        advance: is told how many rows are done, after each batch.

    Returns:
        Labels, or `<invalid>` where a generated answer is none of them; and probabilities, float64 of shape
        (prompts, labels), or None when answers are generated.

    Raises:
        UserError: the model's scores are not finite, or the GPU's memory is too small for one prompt.
    """
    labels, tokens_per_batch = list(label_ids), TOKENS_PER_BATCH[model.device.type]
    if params.max_new_tokens is not None:
        tokenizer = Tokenizer.from_file(str(TOKENIZER_FOLDER / "tokenizer.json"))
        ends = sorted({ids[-1] for ids in label_ids.values()})
        answers = generate_answers(model, tokenizer, prompts, ends, params.max_new_tokens, tokens_per_batch, advance)
        return [match_label(answer, labels) for answer in answers], None
    scores = score_labels(model, prompts, list(label_ids.values()), tokens_per_batch, advance)
    check_finite(scores)
    return [labels[index] for index in scores.argmax(axis=1)], posterior(scores)


def predict_label_sets(
    model: PreTrainedModel | PeftModel,
    prompts: list[list[int]],
    branches: dict[str, Branches],
    advance: Callable[[int], object],
) -> tuple[list[str], np.ndarray]:
    """The labels that apply to each prompt, and for each label the probability that it does.

    That is L(yes) / (L(yes) + L(no)) of the label's two answers. Their likelihoods share the label's own tokens,
    which cancel; so all answers of all labels hang on the prompt as one tree, computed in one pass.

    Args:
        model: the model in evaluation mode.
        prompts: token ids of each row's prompt; may be empty.
        branches: both answers of each of k labels.
        advance: is told how many rows are done, after each batch.

    Returns:
        A cell as `join_labels` makes it for each prompt; and probabilities, float64 of shape (prompts, k).

    Raises:
        UserError: the model's scores are not finite, or the GPU's memory is too small for one prompt.
    """
    answers = [ids for branch in branches.values() for ids in (branch.yes, branch.no)]
    scores = score_labels(model, prompts, answers, TOKENS_PER_BATCH[model.device.type], advance)
    check_finite(scores)
    probabilities = posterior(scores.reshape(-1, len(branches), 2))[:, :, 0]
    cells = [
        join_labels([label for label, applies in zip(branches, row >= APPLIES_FROM, strict=True) if applies])
        for row in probabilities
    ]
    return cells, probabilities


def posterior(log_likelihoods: np.ndarray) -> np.ndarray:
    """Likelihoods normalised over the last axis, whose entries are equally likely beforehand."""
    likelihoods = np.exp(log_likelihoods - log_likelihoods.max(axis=-1, keepdims=True))
    return likelihoods / likelihoods.sum(axis=-1, keepdims=True)
