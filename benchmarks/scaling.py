"""Training and scoring speed by number of processes, one for each GPU: `python -m benchmarks.scaling`.

On a CPU `--shape tiny`. The base has random weights and is made in memory, so that no run waits for a disk.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from unittest.mock import patch

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from benchmarks.inference import WORKLOADS as SCORED
from benchmarks.inference import predict_here
from benchmarks.measuring import StepClock, free_memory, median_call_seconds, peak_gib
from benchmarks.shapes import SHAPES, shape_config
from benchmarks.training import LABELS, WORKLOADS, train_here
from benchmarks.workloads import make_labels, make_prompts, make_rows
from stages.common.base import TOKENIZER_FOLDER
from stages.common.errors import run_stage
from stages.common.launching import run_processes
from stages.common.model import compute_dtype, machine_device
from stages.common.processes import (
    from_leader,
    joined_processes,
    largest,
    leads,
    process_count,
    process_index,
)
from stages.common.scoring.loading import load_fast_model
from tests.tiny import save_tokenizer

LOADED_BY = ("stages.common.training.trainer.load_base", "stages.common.scoring.loading.load_base")
ROWS_SCORED = 4096
STARTED = "BENCHMARK_STARTED"  # when the processes were started, in their environment


def main() -> None:
    """Print a line for each number of processes and workload, with its speed."""
    options = read_options()
    if STARTED not in os.environ:
        for processes in options.processes:
            os.environ[STARTED] = repr(time.time())
            run_processes(processes, "benchmarks.scaling", *sys.argv[1:])
        return
    with joined_processes(), tempfile.TemporaryDirectory() as own, contextlib.chdir(from_leader(own)):
        if leads():
            TOKENIZER_FOLDER.mkdir(parents=True)
            save_tokenizer(TOKENIZER_FOLDER)
        largest(0)
        with contextlib.ExitStack() as patches:
            for name in LOADED_BY:
                patches.enter_context(patch(name, lambda **_: random_base(options.shape)))
            for batch in options.batches if options.batches is not None else [WORKLOADS[options.shape].batch]:
                say(options, "training", batch, measure_training(options, batch))
                free_memory()
            if options.rows:
                say(options, "scoring", options.rows, measure_scoring(options))


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.2-1b", help="default: llama-3.2-1b")
    parser.add_argument("--processes", nargs="+", type=int, default=[2], metavar="COUNT", help="default: 2")
    parser.add_argument(
        "--batches", nargs="*", type=int, metavar="ROWS", help="rows of a step (default: by shape; none: no training)"
    )
    parser.add_argument(
        "--rows", type=int, default=ROWS_SCORED, help=f"prompts of a call (default: {ROWS_SCORED}; 0: no scoring)"
    )
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps that are measured (default: 30)")
    parser.add_argument("--warmup-steps", type=int, default=15, help="and not, before them, at least 1 (default: 15)")
    return parser.parse_args()


def measure_training(options: argparse.Namespace, batch: int) -> float:
    """Rows a second of steps of `batch` rows."""
    workload, config = WORKLOADS[options.shape], shape_config(options.shape)
    steps = options.warmup_steps + options.steps
    prompts = make_prompts(steps * batch, workload.prompt_tokens, config.vocab_size)
    rows = make_rows(prompts, make_labels(LABELS, config.vocab_size))
    clock = StepClock()
    with contextlib.redirect_stdout(sys.stderr):
        train_here(rows, workload.rank, batch, steps, Path(f"runs/{batch}"), clock)
    free_memory()
    return batch / clock.median_seconds(options.warmup_steps)


def measure_scoring(options: argparse.Namespace) -> float:
    """Prompts a second with a label for each, all processes together."""
    workload, config = SCORED[options.shape], shape_config(options.shape)
    prompts = make_prompts(options.rows, workload.prompt_tokens, config.vocab_size)
    labels, own = make_labels(LABELS, config.vocab_size), prompts[process_index() :: process_count()]
    model = load_fast_model(None, 0, scores_labels=True)

    def call() -> None:
        predict_here(model, labels, own)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        largest(0)  # the slowest process counts

    return options.rows / median_call_seconds(call, call)


def random_base(shape: str) -> PreTrainedModel:
    """A base in the precision that the dequantised one has."""
    torch.manual_seed(0)
    device = machine_device()
    with device:
        model = AutoModelForCausalLM.from_config(shape_config(shape), dtype=compute_dtype(device))
    assert isinstance(model, PreTrainedModel)
    return model.eval()


def say(options: argparse.Namespace, what: str, rows: int, rate: float) -> None:
    """A line of JSON, by rank 0."""
    line = {
        "benchmark": what,
        "shape": options.shape,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processes": process_count(),
        "rows": rows,
        "examples_per_second": round(rate, 1),
        "peak_gib": peak_gib(),
        "seconds_since_start": round(time.time() - float(os.environ[STARTED])),
    }
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    run_stage(main)
