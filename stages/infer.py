"""Predict validation and test with the adapter, or with the base model alone: `python -m stages.infer [base]`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.common.base import TOKENIZER_FOLDER
from stages.common.branches import label_branches
from stages.common.errors import UserError, run_stage
from stages.common.launching import processes_to_start, run_processes
from stages.common.params import load_params
from stages.common.predictions import write_answers, write_predictions
from stages.common.processes import (
    gathered,
    joined_processes,
    leads,
    process_count,
    process_index,
)
from stages.common.progress import progress
from stages.common.prompting.kinds import prompt_kind
from stages.common.schema.measuring import Infer
from stages.common.schema.task import ClassificationTask, Task
from stages.common.tables import iter_batches, read_table, row_count, table_metadata

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

PARTS = ("validation", "test")
SPLITS_FOLDER = Path("data/splits")
PREDICTIONS_FOLDER = Path("data/predictions")
ADAPTER_FOLDER = Path("models/adapter")


def read_prompt_format(split_path: Path, task: Task, params: Infer) -> dict[str, Any]:
    """How a split file's prompts were made, from its footer, checked against params.yaml.

    Raises:
        UserError: the file was made for another task or other labels, or a label is longer than the answers that may
            be generated.
    """
    prompt_format: dict[str, Any] = table_metadata(split_path, "prompt_format")
    again = "Run `dvc repro format_prompts split` first, or put"
    if prompt_format.get("kind") != prompt_kind(task):
        raise UserError(
            f"{split_path}: was made for a task of the kind {prompt_format.get('kind')!r}, but params.yaml asks for "
            f"{prompt_kind(task)!r} (task.kind and task.multi_label). {again} the task back."
        )
    if isinstance(task, ClassificationTask):
        if prompt_format["labels"] != task.labels:
            raise UserError(
                f"{split_path}: was made for the labels {prompt_format['labels']}, but task.labels in params.yaml is "
                f"{task.labels}. {again} task.labels back."
            )
        _check_room_for_labels(label_ids(prompt_format), params)
    return prompt_format


def label_ids(prompt_format: dict[str, Any]) -> dict[str, list[int]]:
    """Token ids of each completion: of the labels in their order, or of all answers with several labels for a row."""
    names = prompt_format["completions"] if prompt_format["kind"] == "multi_label" else prompt_format["labels"]
    return {name: list(prompt_format["completions"][name]["ids"]) for name in names}


def _check_room_for_labels(ids: dict[str, list[int]], params: Infer) -> None:
    longest = max(ids, key=lambda label: len(ids[label]))
    if params.max_new_tokens is not None and params.max_new_tokens < len(ids[longest]):
        raise UserError(
            f"infer.max_new_tokens: {params.max_new_tokens} cuts answers short: the label {longest!r} takes "
            f"{len(ids[longest])} tokens, its end included. Give at least that."
        )


def predict_labels(
    model: PreTrainedModel | PeftModel,
    split_path: Path,
    prompt_format: dict[str, Any],
    params: Infer,
    predictions_path: Path,
) -> None:
    """Predict the label or labels of every row of a split file, and write the predictions in its order."""
    from stages.common.scoring.label_predictions import predict_label, predict_label_sets

    multi_label = prompt_format["kind"] == "multi_label"
    if params.method == "label_scores":
        _warn_when_slow(model, split_path, label_ids(prompt_format))
    predictions: list[str] = []
    probabilities = [np.empty((0, len(prompt_format["labels"])))]
    with progress(own_count(split_path), f"predicting {split_path.stem}") as bar:
        for batch in own_rows(split_path, ["prompt_ids"]):
            prompts = batch["prompt_ids"].to_pylist()
            found: tuple[list[str], np.ndarray | None]
            if multi_label:
                found = predict_label_sets(model, prompts, label_branches(prompt_format), bar.update)
            else:
                found = predict_label(model, prompts, label_ids(prompt_format), params, bar.update)
            predictions += found[0]
            probabilities += [] if found[1] is None else [found[1]]
    predictions, table = together(predictions), together(np.concatenate(probabilities))
    if leads():
        rows = read_table(split_path, ["id", "label"]).to_pydict()
        scores = table if params.method == "label_scores" else None
        names = prompt_format["labels"]
        write_predictions(
            predictions_path, rows["id"], rows["label"], predictions, scores, names, multi_label=multi_label
        )


def predict_answers(
    model: PreTrainedModel | PeftModel,
    split_path: Path,
    prompt_format: dict[str, Any],
    params: Infer,
    predictions_path: Path,
) -> None:
    """Answer every row of a split file, find how likely the reference answers are, and write both in its order."""
    log_likelihoods, tokens = _score_references(model, split_path)
    answers = _answer(model, split_path, prompt_format["terminator_ids"], params)
    log_likelihoods, tokens, answers = together(log_likelihoods), together(tokens), together(answers)
    if leads():
        rows = read_table(split_path, ["id", "label"]).to_pydict()
        write_answers(predictions_path, rows["id"], rows["label"], answers, log_likelihoods, tokens)


def own_rows(split_path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """This process's rows: of n processes' the one of number i has the rows i, i + n, i + 2 n, and so on."""
    first, step = process_index(), process_count()
    for batch in iter_batches(split_path, columns):
        own = batch if step == 1 else batch.take(pa.array(range(first, batch.num_rows, step), pa.int64()))
        first = (first - batch.num_rows) % step
        if own.num_rows:
            yield own


def own_count(split_path: Path) -> int:
    """How many rows `own_rows` gives."""
    return len(range(process_index(), row_count(split_path), process_count()))


def together(own: Any) -> Any:
    """What all processes found, in the order of the rows.

    Args:
        own: what this process found for its rows, a list or an array whose first axis is the rows.
    """
    parts = gathered(own)
    if len(parts) == 1:
        return own
    count = sum(map(len, parts))
    joined = np.empty((count, *own.shape[1:]), own.dtype) if isinstance(own, np.ndarray) else [None] * count
    for index, part in enumerate(parts):
        joined[index :: len(parts)] = part
    return joined


def _score_references(model: PreTrainedModel | PeftModel, split_path: Path) -> tuple[np.ndarray, np.ndarray]:
    from stages.common.scoring.batches import TOKENS_PER_BATCH
    from stages.common.scoring.references import score_references

    scores, lengths = [np.empty(0)], [np.empty(0, dtype=np.int64)]
    with progress(own_count(split_path), f"scoring the reference answers of {split_path.stem}") as bar:
        for batch in own_rows(split_path, ["prompt_ids", "completion_ids"]):
            prompts, references = batch["prompt_ids"].to_pylist(), batch["completion_ids"].to_pylist()
            found = score_references(model, prompts, references, TOKENS_PER_BATCH[model.device.type], bar.update)
            scores.append(found)
            lengths.append(np.array([len(reference) for reference in references], dtype=np.int64))
    return np.concatenate(scores), np.concatenate(lengths)


def _answer(model: PreTrainedModel | PeftModel, split_path: Path, terminators: list[int], params: Infer) -> list[str]:
    from tokenizers import Tokenizer

    from stages.common.scoring.batches import TOKENS_PER_GENERATED_BATCH
    from stages.common.scoring.generation import generate_answers

    assert params.max_new_tokens is not None, "params.yaml was checked: answers are generated"
    tokenizer = Tokenizer.from_file(str(TOKENIZER_FOLDER / "tokenizer.json"))
    most, limit = TOKENS_PER_GENERATED_BATCH[model.device.type], params.max_new_tokens
    answers: list[str] = []
    with progress(own_count(split_path), f"answering {split_path.stem}") as bar:
        for batch in own_rows(split_path, ["prompt_ids"]):
            prompts = batch["prompt_ids"].to_pylist()
            answers += generate_answers(model, tokenizer, prompts, terminators, limit, most, bar.update)
    return [answer.strip() for answer in answers]  # as the references are


def prompt_tokens(split_path: Path) -> int:
    """Tokens of all prompts of a split file."""
    counts = [pc.sum(pc.list_value_length(batch["prompt_ids"])) for batch in iter_batches(split_path, ["prompt_ids"])]
    return sum(count.as_py() for count in counts)


def _warn_when_slow(model: PreTrainedModel | PeftModel, split_path: Path, ids: dict[str, list[int]]) -> None:
    from stages.common.scoring.label_scores import plain_path_reason

    lengths = [pc.max(pc.list_value_length(batch["prompt_ids"])) for batch in iter_batches(split_path, ["prompt_ids"])]
    longest_prompt = max((length.as_py() for length in lengths), default=0)
    reason = plain_path_reason(model, longest_prompt + max(map(len, ids.values())))
    if reason is not None:
        print(f"each label is run by itself, which is slower: {reason}", flush=True)


def main() -> None:
    """Write data/predictions/{adapter,base}/{validation,test}.parquet; one process for each GPU."""
    arguments = sys.argv[1:]
    if arguments not in ([], ["base"]):
        raise UserError(
            f"stages.infer: unknown arguments {' '.join(arguments)!r}. Allowed: none, to predict with the adapter, "
            "or `base`, to predict with the base model alone."
        )
    params = load_params("infer", "task")
    name = arguments[0] if arguments else "adapter"
    paths = [SPLITS_FOLDER / f"{part}.parquet" for part in PARTS]
    formats = [read_prompt_format(path, params.task, params.infer) for path in paths]
    processes = processes_to_start()
    if processes is not None and not lies_on_all_gpus(processes):
        run_processes(processes, "stages.infer", *arguments)
        return
    with joined_processes():
        run(name, params.task, params.infer, dict(zip(paths, formats, strict=True)))


def lies_on_all_gpus(processes: int) -> bool:
    """Whether no GPU could hold the base, so that one process predicts with its layers on all of them."""
    from stages.common.model import base_is_spread

    if not base_is_spread(processes):
        return False
    print("infer: one process, with the base model's layers on all GPUs", flush=True)
    return True


def run(name: str, task: Task, params: Infer, formats: dict[Path, dict[str, Any]]) -> None:
    """What each process does: predict its rows of every part; rank 0 writes.

    Args:
        name: "adapter" or "base".
        task: what is predicted.
        params: the infer block.
        formats: the split files, and how their prompts were made.
    """
    predict = predict_labels if isinstance(task, ClassificationTask) else predict_answers
    processes = f" on {process_count()} processes" if process_count() > 1 else ""
    print(f"infer: loading the base model{' and the adapter' if name == 'adapter' else ''}{processes}", flush=True)
    from stages.common.acceleration.choice import fast_paths
    from stages.common.scoring.label_scores import language_model
    from stages.common.scoring.loading import load_fast_model

    tokens = sum(prompt_tokens(path) for path in formats) // process_count()
    adapter = ADAPTER_FOLDER if name == "adapter" else None
    model = load_fast_model(adapter, tokens, scores_labels=params.method == "label_scores")
    print(f"infer: {fast_paths(language_model(model))}", flush=True)
    for path, prompt_format in formats.items():
        started = time.perf_counter()
        predict(model, path, prompt_format, params, PREDICTIONS_FOLDER / name / path.name)
        count = row_count(path)
        rate = count / (time.perf_counter() - started)
        print(f"infer: {name} predicted {count:,} rows of {path.stem}, {rate:,.1f} rows/s", flush=True)


if __name__ == "__main__":
    run_stage(main)
