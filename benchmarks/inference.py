"""Scoring speed beside the published way: `python -m benchmarks.inference`; on a CPU `--shapes smollm2-135m`."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

from benchmarks import OURS
from benchmarks.measuring import (
    Row,
    floor_share,
    free_memory,
    median_call_seconds,
    peak_gib,
    print_header,
    reached_flops,
    report,
)
from benchmarks.published import answer_in_batches, load_published, pipeline_predictor
from benchmarks.shapes import entered_project, linear_parameters, shape_config
from benchmarks.workloads import make_labels, make_prompts
from stages.common.acceleration.choice import fast_paths
from stages.common.errors import run_stage
from stages.common.model import load_base, load_model
from stages.common.schema.measuring import Infer
from stages.common.scoring.batches import TOKENS_PER_BATCH
from stages.common.scoring.label_predictions import predict_label
from stages.common.scoring.label_scores import _score_each_label, language_model
from stages.common.scoring.loading import load_fast_model

EACH_LABEL, PIPELINE, GENERATE = "each label by itself", "pipeline", "batched generate"
RANK = 16
ADAPTER = Path("models/adapter")
# Ways that write an answer, whatever the labels are, and most rows of a call, as they are slow.
GENERATING = {PIPELINE: 16, GENERATE: 256}


@dataclass(frozen=True)
class Workload:
    """What is scored on a shape: mean tokens of a prompt, numbers of labels, prompts of a call by default."""

    prompt_tokens: int
    labels: tuple[int, ...]
    rows: int


WORKLOADS = {
    "llama-3.2-1b": Workload(387, (5, 77), 1024),
    "llama-3.2-3b": Workload(387, (5,), 512),
    "smollm2-135m": Workload(45, (5, 77), 8192),
    "tiny": Workload(45, (5, 77), 64),
}


def main() -> None:
    """Print a Markdown table with a line for each shape, system and number of labels."""
    options = read_options()
    json_path = options.json.resolve() if options.json else None
    print_header("rows")
    for shape in options.shapes:
        first = None
        with entered_project(shape, options.base) as weights:
            save_adapter()
            for system in options.systems:
                for row in measure(shape, weights, system, options):
                    first = first or row
                    report(row, first, json_path)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    shapes, systems = [name for name in WORKLOADS if name != "tiny"], [PIPELINE, GENERATE, EACH_LABEL, OURS]
    parser.add_argument("--shapes", nargs="+", choices=WORKLOADS, default=shapes, metavar="SHAPE", help="default: all")
    parser.add_argument(
        "--systems", nargs="+", choices=systems, default=systems, metavar="SYSTEM", help=f"of {', '.join(systems)}"
    )
    parser.add_argument("--labels", nargs="+", type=int, metavar="COUNT", help="numbers of labels (default: by shape)")
    parser.add_argument("--rows", type=int, help="prompts of a call, fewer for slow systems (default: by shape)")
    parser.add_argument("--equal-lengths", action="store_true", help="all prompts have the mean length")
    parser.add_argument("--shared-prefix", type=int, default=0, metavar="TOKENS", help="that all prompts begin with")
    parser.add_argument("--base", type=Path, help="folder of a real base model, for the shape that it has")
    parser.add_argument("--json", type=Path, help="append the rows to this file, one JSON object a line")
    return parser.parse_args()


def save_adapter(rank: int = RANK) -> None:
    """Write an adapter that changes what the base computes: as PEFT starts it, with small random B."""
    torch.manual_seed(0)
    configuration = LoraConfig(task_type="CAUSAL_LM", r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    model = get_peft_model(load_base(), configuration)
    for name, weights in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.01)
    model.save_pretrained(str(ADAPTER), save_embedding_layers=False)


def measure(shape: str, weights: str, system: str, options: argparse.Namespace) -> Iterator[Row]:
    """Predict prompts with the current folder's base and adapter, and time whole calls.

    Args:
        shape: of the project's base.
        weights: what they are.
        system: what to measure.
        options: the command line.

    Yields:
        One row, or where labels are scored one for each number of labels.
    """
    free_memory()
    workload, config = WORKLOADS[shape], shape_config(shape)
    with contextlib.redirect_stdout(sys.stderr):  # which paths are taken is said where the table goes
        predict = load_predictor(system)
    for labels in [None] if system in GENERATING else options.labels or workload.labels:
        rows = row_count(system, options.rows or workload.rows, labels)
        prompts = make_prompts(
            rows, workload.prompt_tokens, config.vocab_size, options.equal_lengths, options.shared_prefix
        )
        label_ids = make_labels(labels or 0, config.vocab_size)
        call, warm_up = partial(predict, label_ids, prompts), partial(predict, label_ids, prompts[: max(1, rows // 8)])
        with contextlib.redirect_stdout(sys.stderr):
            rate = rows / median_call_seconds(warm_up, call)
        tokens = rate * sum(map(len, prompts)) / rows
        yield Row(
            benchmark="inference",
            shape=shape,
            weights=weights,
            prompt_tokens=workload.prompt_tokens,
            labels=labels,
            rows=rows,
            system=system,
            examples_per_second=rate,
            tokens_per_second=tokens,
            peak_gib=peak_gib(),
            floor_share=floor_share("inference", linear_parameters(config), tokens, reached_flops()),
        )


def row_count(system: str, rows: int, labels: int | None) -> int:
    """How many of so many rows a system gets, so that the slow ones take no longer."""
    if labels is None:
        return min(rows, GENERATING[system])
    return max(2, rows // labels) if system == EACH_LABEL else rows


def load_predictor(system: str) -> Callable[[dict[str, list[int]], list[list[int]]], object]:
    """A function that takes labels and prompts and predicts, with a freshly loaded model."""
    if system == OURS:
        model = load_fast_model(ADAPTER, 0, scores_labels=True)
        print(fast_paths(language_model(model)), file=sys.stderr, flush=True)
        return partial(predict_here, model)
    if system == EACH_LABEL:
        return partial(score_each_label, load_model(ADAPTER))
    model = PeftModel.from_pretrained(load_published(quantized=True), str(ADAPTER)).eval()
    answer = pipeline_predictor(model) if system == PIPELINE else partial(answer_in_batches, model)
    return lambda _labels, prompts: answer(prompts)


def predict_here(model: PreTrainedModel | PeftModel, labels: dict[str, list[int]], prompts: list[list[int]]) -> None:
    """Predict as the stage `infer` does."""
    predict_label(model, prompts, labels, Infer(method="label_scores", max_new_tokens=None), lambda _rows: None)


def score_each_label(
    model: PreTrainedModel | PeftModel, labels: dict[str, list[int]], prompts: list[list[int]]
) -> None:
    """Score as `infer` does where a model takes no tree: a forward pass for each label."""
    most = TOKENS_PER_BATCH[model.device.type]
    with torch.inference_mode():
        _score_each_label(language_model(model), prompts, list(labels.values()), most, lambda _rows: None)


if __name__ == "__main__":
    run_stage(main)
