"""Peak memory and speed of training, for the table that `preflight.plan` predicts from.

`python -m benchmarks.memory llama-3.2-1b:387:16:32`: a base's shape, tokens of a prompt, rank, rows of a step; as many
of these as wanted. LOW_MEMORY, PACK_ROWS and the other switches come from the environment. On a CPU (Linux) it is
resident memory, and one configuration a process: what an earlier one held is not all given back.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel, TrainerControl, TrainerState, TrainingArguments

from benchmarks.measuring import StepClock, context, free_memory
from benchmarks.shapes import SHAPES, entered_project, shape_config
from benchmarks.training import LABELS, train_here
from benchmarks.workloads import make_labels, make_prompts, make_rows, mean_tokens
from preflight.memory import read_shape
from stages.common.acceleration.choice import fast_paths
from stages.common.errors import run_stage
from stages.common.model import machine_device
from stages.common.switches import SWITCHES
from stages.common.training.rows import longest_row
from stages.common.training.trainer import micro_batches

WARMUP_STEPS, STEPS = 2, 3


class Peak(StepClock):
    """Notes peak memory at the end of the last training step, before the evaluation."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, int] = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: Any
    ) -> None:
        """Forget what making the base took."""
        super().on_train_begin(args, state, control, **named)
        if not torch.cuda.is_available():
            Path("/proc/self/clear_refs").write_text("5")

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **named: Any) -> None:
        """Note the time, and at last the memory."""
        super().on_step_end(args, state, control, **named)
        if state.global_step < state.max_steps:
            return
        if torch.cuda.is_available():
            free, total = torch.cuda.mem_get_info()
            outside = total - free - torch.cuda.memory_reserved()
            self.found = {
                "peak_bytes": torch.cuda.max_memory_allocated(),
                "process_bytes": torch.cuda.max_memory_reserved() + outside,
            }
        else:
            status = Path("/proc/self/status").read_text()
            self.found = {"process_bytes": 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])}  # type: ignore[index]


def main() -> None:
    """Print a line of JSON for each configuration."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configurations", nargs="+", metavar="SHAPE:TOKENS:RANK:ROWS", help=f"of {', '.join(SHAPES)}")
    for configuration in parser.parse_args().configurations:
        shape, *numbers = configuration.split(":")
        if shape not in SHAPES or len(numbers) != 3 or not all(number.isdecimal() for number in numbers):
            parser.error(f"{configuration!r} is no SHAPE:TOKENS:RANK:ROWS, as llama-3.2-1b:387:16:32")
        free_memory()
        with contextlib.redirect_stdout(sys.stderr):
            found = measure(shape, *map(int, numbers))
        print(json.dumps({"command": command(configuration)} | found), flush=True)


def command(configuration: str) -> str:
    """What measures a configuration so again."""
    names = [*SWITCHES, "LOW_MEMORY", "MICRO_BATCH_SIZE"]
    switches = [f"{name}={os.environ[name]}" for name in names if os.environ.get(name)]
    return " ".join([*switches, "python -m benchmarks.memory", configuration])


def measure(shape: str, tokens: int, rank: int, rows: int) -> dict[str, Any]:
    """Train a few steps on rows of one length, and say what decides about memory and what it took."""
    config, clock = shape_config(shape), Peak()
    prompts = make_prompts((WARMUP_STEPS + STEPS) * rows, tokens, config.vocab_size, equal_lengths=True)
    data = make_rows(prompts, make_labels(LABELS, config.vocab_size))
    micro = micro_batches(rows, longest_row([data]), machine_device().type)[0]
    with entered_project(shape, None):
        trainer = train_here(data, rank, rows, WARMUP_STEPS + STEPS, Path("runs"), clock)
    paths = fast_paths(cast(PreTrainedModel, trainer.adapter.get_base_model()))
    measured = context()
    return {
        "device": measured["device"],
        "versions": measured["versions"],
        "kind": "training",
        "base": shape,
        "shape": {k: v for k, v in read_shape(config.to_dict(), shape)._asdict().items() if k != "model_type"},
        "rank": rank,
        "rows": micro.rows,
        "mean_tokens": mean_tokens(data),
        "longest": longest_row([data]),
        "mean_answers": mean_tokens(data) - tokens,
        "accumulation": micro.accumulation,
        "recomputed": micro.recompute_activations,
        **{name: reason is None for name, reason in paths._asdict().items()},
        "recordings": len(trainer._recordings),
        "peak_bytes": None,
        **clock.found,
        "tokens_per_second": round(rows * mean_tokens(data) / clock.median_seconds(WARMUP_STEPS)),
    }


if __name__ == "__main__":
    run_stage(main)
