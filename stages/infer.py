"""Predict validation and test with the adapter, or with the base model alone: `python -m stages.infer [base]`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow.compute as pc

from stages.common.errors import UserError, run_stage
from stages.common.params import Infer, load_params
from stages.common.predictions import write_predictions
from stages.common.progress import progress
from stages.common.tables import iter_batches, table_metadata

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

PARTS = ("validation", "test")
SPLITS_FOLDER = Path("data/splits")
PREDICTIONS_FOLDER = Path("data/predictions")
ADAPTER_FOLDER = Path("models/adapter")
TOKENIZER_PATH = Path("models/tokenizer/tokenizer.json")
# By device. A CPU is fastest while a batch fits its cache: 2,048 beat 4,096 by 1.2 and 8,192 by 1.4 on two AVX2 cores.
TOKENS_PER_BATCH = {"cuda": 16_384, "cpu": 2_048}


def predict(
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
        from tokenizers import Tokenizer

        from stages.common.scoring.generation import generate_answers, match_label

        tokenizer = Tokenizer.from_file(str(TOKENIZER_PATH))
        ends = sorted({ids[-1] for ids in label_ids.values()})
        answers = generate_answers(model, tokenizer, prompts, ends, params.max_new_tokens, tokens_per_batch, advance)
        return [match_label(answer, labels) for answer in answers], None

    from stages.common.scoring.label_scores import score_labels

    scores = score_labels(model, prompts, list(label_ids.values()), tokens_per_batch, advance)
    if not np.isfinite(scores).all():
        raise UserError(
            "the model's label scores are not finite numbers: its weights are broken, most likely because training "
            "diverged. Lower finetune.learning_rate or finetune.max_gradient_norm, then run `dvc repro`."
        )
    return [labels[index] for index in scores.argmax(axis=1)], posterior(scores)


def posterior(log_likelihoods: np.ndarray) -> np.ndarray:
    """Likelihoods of shape (rows, labels) normalised over the labels, which are equally likely beforehand."""
    likelihoods = np.exp(log_likelihoods - log_likelihoods.max(axis=1, keepdims=True))
    return likelihoods / likelihoods.sum(axis=1, keepdims=True)


def read_label_ids(split_path: Path, labels: list[str], params: Infer) -> dict[str, list[int]]:
    """Each label's tokens, in the order of `labels`, from the footer of a split file.

    Raises:
        UserError: the file was made for other labels, or a label is longer than the answers that may be generated.
    """
    prompt_format = table_metadata(split_path, "prompt_format")
    if prompt_format["labels"] != labels:
        raise UserError(
            f"{split_path}: was made for the labels {prompt_format['labels']}, but task.labels in params.yaml is "
            f"{labels}. Run `dvc repro format_prompts split` first, or put task.labels back."
        )
    label_ids = {label: list(prompt_format["completions"][label]["ids"]) for label in labels}
    longest = max(labels, key=lambda label: len(label_ids[label]))
    if params.max_new_tokens is not None and params.max_new_tokens < len(label_ids[longest]):
        raise UserError(
            f"infer.max_new_tokens: {params.max_new_tokens} cuts answers short: the label {longest!r} takes "
            f"{len(label_ids[longest])} tokens, its end included. Give at least that."
        )
    return label_ids


def predict_part(
    model: PreTrainedModel | PeftModel,
    split_path: Path,
    label_ids: dict[str, list[int]],
    params: Infer,
    predictions_path: Path,
) -> int:
    """Predict every row of a split file and write the predictions in its order; return the number of rows."""
    lengths = _prompt_lengths(split_path)
    if params.method == "label_scores":
        _warn_when_slow(model, max(lengths, default=0), label_ids)
    ids: list[str] = []
    true_labels: list[str] = []
    answers: list[str] = []
    probabilities = [np.empty((0, len(label_ids)))]
    with progress(len(lengths), f"predicting {split_path.stem}") as bar:
        for batch in iter_batches(split_path, ["id", "label", "prompt_ids"]):
            found, shares = predict(model, batch["prompt_ids"].to_pylist(), label_ids, params, bar.update)
            ids += batch["id"].to_pylist()
            true_labels += batch["label"].to_pylist()
            answers += found
            probabilities += [] if shares is None else [shares]
    table = np.concatenate(probabilities) if params.method == "label_scores" else None
    write_predictions(predictions_path, ids, true_labels, answers, table, list(label_ids))
    return len(ids)


def _prompt_lengths(split_path: Path) -> list[int]:
    batches = iter_batches(split_path, ["prompt_ids"])
    return [length for batch in batches for length in pc.list_value_length(batch["prompt_ids"]).to_pylist()]


def _warn_when_slow(model: PreTrainedModel | PeftModel, longest_prompt: int, label_ids: dict[str, list[int]]) -> None:
    from stages.common.scoring.label_scores import plain_path_reason

    reason = plain_path_reason(model, longest_prompt + max(map(len, label_ids.values())))
    if reason is not None:
        print(f"each label is run by itself, which is slower: {reason}", flush=True)


def main() -> None:
    """Write data/predictions/{adapter,base}/{validation,test}.parquet."""
    arguments = sys.argv[1:]
    if arguments not in ([], ["base"]):
        raise UserError(
            f"stages.infer: unknown arguments {' '.join(arguments)!r}. Allowed: none, to predict with the adapter, "
            "or `base`, to predict with the base model alone."
        )
    params = load_params("infer", "task")
    name = arguments[0] if arguments else "adapter"
    paths = [SPLITS_FOLDER / f"{part}.parquet" for part in PARTS]
    label_ids = [read_label_ids(path, params.task.labels, params.infer) for path in paths]
    print(f"infer: loading the base model{' and the adapter' if name == 'adapter' else ''}", flush=True)
    # Importing torch and transformers takes seconds, in which the line above is on the screen.
    from stages.common.model import load_model

    model = load_model(ADAPTER_FOLDER if name == "adapter" else None)
    for path, ids in zip(paths, label_ids, strict=True):
        started = time.perf_counter()
        count = predict_part(model, path, ids, params.infer, PREDICTIONS_FOLDER / name / path.name)
        rate = count / (time.perf_counter() - started)
        print(f"infer: {name} predicted {count:,} rows of {path.stem}, {rate:,.1f} rows/s", flush=True)


if __name__ == "__main__":
    run_stage(main)
