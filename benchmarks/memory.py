"""Peak memory of training and predicting, and the speed of training, for the table that `preflight.plan` predicts from.

`python -m benchmarks.memory llama-3.2-1b:387:16:32`: a base's shape, tokens of a prompt, rank, rows of a step; as many
of these as wanted. With `--stage infer` labels are scored for so many rows, with `--stage generate` answers of 32
tokens are generated. LOW_MEMORY, PACK_ROWS and the other switches come from the environment. On a CPU (Linux) it is
resident memory, and one configuration a process: what an earlier one held is not all given back.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

from benchmarks.inference import ADAPTER, save_adapter
from benchmarks.measuring import StepClock, context, free_memory, reset_peak
from benchmarks.shapes import SHAPES, entered_project, save_random_base, shape_config
from benchmarks.training import LABELS, train_here
from benchmarks.workloads import make_labels, make_prompts, make_rows, mean_tokens
from preflight.shapes import read_shape
from preflight.throughput import machine_of_device
from stages.common.acceleration.choice import FastPaths, fast_paths
from stages.common.errors import run_stage
from stages.common.model import machine_device
from stages.common.schema.measuring import Infer
from stages.common.scoring.label_predictions import predict_label
from stages.common.scoring.label_scores import language_model
from stages.common.scoring.label_tree import build_tree
from stages.common.scoring.loading import load_fast_model
from stages.common.switches import SWITCHES
from stages.common.training.rows import longest_row
from stages.common.training.trainer import micro_batches

WARMUP_STEPS, STEPS = 2, 3
NEW_TOKENS = 32
INFER = {
    "infer": Infer(method="label_scores", max_new_tokens=None),
    "generate": Infer(method="generate", max_new_tokens=NEW_TOKENS),
}


class Peak(StepClock):
    """Notes peak memory at the end of the last training step, before the evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, int | None] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: Any
    ) -> None:
        """Forget what making the base took."""
        super().on_train_begin(args, state, control, **named)
        forget_peak()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: Any) -> None:
        """Note the time, and at last the memory."""
        super().on_step_end(args, state, control, **named)
        if state.global_step == state.max_steps:
            self.found = peak()


def forget_peak() -> None:
    """Begin measuring peak memory, on a CPU too."""
    reset_peak()
    if not torch.cuda.is_available():
        Path("/proc/self/clear_refs").write_text("5")


def peak() -> dict[str, int | None]:
    """Peak memory since `forget_peak`: of PyTorch's tensors on a GPU, and what the process takes of the device."""
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        outside = total - free - torch.cuda.memory_reserved()
        return {
            "peak_bytes": torch.cuda.max_memory_allocated(),
            "process_bytes": torch.cuda.max_memory_reserved() + outside,
        }
    status = Path("/proc/self/status").read_text()
    return {"peak_bytes": None, "process_bytes": 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])}  # type: ignore[index]


def main() -> None:
    """Print a line of JSON for each configuration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configurations", nargs="+", metavar="SHAPE:TOKENS:RANK:ROWS", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--stage", choices=("finetune", *INFER), default="finetune", help="default: finetune")
    options = parser.parse_args()
    for configuration in options.configurations:
        shape, *numbers = configuration.split(":")
        if shape not in SHAPES or len(numbers) != 3 or not all(number.isdecimal() for number in numbers):
            parser.error(f"{configuration!r} is no SHAPE:TOKENS:RANK:ROWS, as llama-3.2-1b:387:16:32")
        free_memory()
        tokens, rank, rows = map(int, numbers)
        with contextlib.redirect_stdout(sys.stderr), prepared_project(shape, rank):
            if options.stage == "finetune":
                found = train(shape, tokens, rank, rows)
            else:
                found = predict(shape, tokens, rows, options.stage)
        print(json.dumps(described(configuration, shape, rank, options.stage) | found), flush=True)


@contextlib.contextmanager
def prepared_project(shape: str, rank: int) -> Iterator[None]:
    """Work beside a base and an adapter of another process's making: a CPU's process would keep memory of it."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as made:
        maker = multiprocessing.get_context("spawn").Process(target=make, args=(shape, rank, Path(made)))
        maker.start()
        maker.join()
        assert maker.exitcode == 0, "it has said why"
        with entered_project(shape, Path(made) / "base"):
            shutil.copytree(Path(made) / "adapter", ADAPTER)
            yield


def make(shape: str, rank: int, folder: Path) -> None:
    """Write a random base and an adapter into a folder."""
    save_random_base(shape, folder / "base")
    with entered_project(shape, folder / "base"):
        save_adapter(rank)
        shutil.copytree(ADAPTER, folder / "adapter")


def described(configuration: str, shape: str, rank: int, stage: str) -> dict[str, Any]:
    """What was measured, and with what."""
    names = [*SWITCHES, "LOW_MEMORY", "MICRO_BATCH_SIZE"]
    switches = [f"{name}={os.environ[name]}" for name in names if os.environ.get(name)]
    chosen = [] if stage == "finetune" else [f"--stage {stage}"]
    memory = torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else 0
    measured, values = context(), read_shape(shape_config(shape).to_dict(), shape)._asdict()
    del values["model_type"]
    return {
        "command": " ".join([*switches, "python -m benchmarks.memory", *chosen, configuration]),
        "device": machine_of_device(measured["device"], memory) or measured["device"],
        "versions": measured["versions"],
        "base": shape,
        "shape": values,
        "rank": rank,
    }


def train(shape: str, tokens: int, rank: int, rows: int) -> dict[str, Any]:
    """Train a few steps on rows of one length, and say what decides about memory and what it took."""
    vocabulary, clock = shape_config(shape).vocab_size, Peak()
    prompts = make_prompts((WARMUP_STEPS + STEPS) * rows, tokens, vocabulary, equal_lengths=True)
    data = make_rows(prompts, make_labels(LABELS, vocabulary))
    micro = micro_batches(rows, longest_row([data]), machine_device().type)[0]
    trainer = train_here(data, rank, rows, WARMUP_STEPS + STEPS, Path("runs"), clock)
    paths = fast_paths(cast(PreTrainedModel, trainer.adapter.get_base_model()))
    return {
        "kind": "training",
        "rows": micro.rows,
        "mean_tokens": mean_tokens(data),
        "longest": longest_row([data]),
        "mean_answers": mean_tokens(data) - tokens,
        "accumulation": micro.accumulation,
        "recomputed": micro.recompute_activations,
        **taken(paths),
        "recordings": len(trainer._recordings),
        **clock.found,
        "tokens_per_second": round(rows * mean_tokens(data) / clock.median_seconds(WARMUP_STEPS)),
    }


def predict(shape: str, tokens: int, rows: int, stage: str) -> dict[str, Any]:
    """Predict rows of one length, and say what decides about memory and what it took; loading is not in it."""
    vocabulary = shape_config(shape).vocab_size
    prompts = make_prompts(rows, tokens, vocabulary, equal_lengths=True)
    labels = make_labels(LABELS, vocabulary)
    model = load_fast_model(ADAPTER, rows * tokens, scores_labels=stage == "infer")
    free_memory()
    forget_peak()
    predict_label(model, prompts, labels, INFER[stage], lambda _rows: None)
    return {
        "kind": "scoring" if stage == "infer" else "generating",
        "rows": rows,
        "mean_tokens": tokens,
        "longest": tokens,
        # Behind each prompt: the nodes of the labels' tree, or what is generated.
        "mean_answers": len(build_tree(list(labels.values())).tokens) if stage == "infer" else NEW_TOKENS,
        "accumulation": 1,
        "recomputed": False,
        **taken(fast_paths(language_model(model))),
        "recordings": None,
        **peak(),
        # Too few rows to tell: see `benchmarks.inference`.
        "tokens_per_second": None,
    }


def taken(paths: FastPaths) -> dict[str, bool]:
    """Whether each fast path was taken."""
    return {name: reason is None for name, reason in paths._asdict().items()}


if __name__ == "__main__":
    run_stage(main)
