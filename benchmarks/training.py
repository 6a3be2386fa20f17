"""Training speed beside published recipes: `python -m benchmarks.training`; on a CPU `--shapes smollm2-135m`."""

from __future__ import annotations

import argparse
import contextlib
import sys
from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from benchmarks import OURS
from benchmarks.measuring import Row, StepClock, floor_share, free_memory, peak_gib, print_header, reached_flops, report
from benchmarks.published import RECIPES, Recipe, default_recipe, make_recipe_trainer
from benchmarks.shapes import entered_project, linear_parameters, shape_config
from benchmarks.workloads import make_labels, make_prompts, make_rows, mean_tokens
from stages.common.errors import run_stage
from stages.common.model import machine_device
from stages.common.processes import process_count
from stages.common.schema.finetune import Finetune, Lora
from stages.common.training.answer_loss import AnswerLossTrainer
from stages.common.training.rows import longest_row
from stages.common.training.trainer import make_trainer, micro_batches

DEFAULTS = "trl-defaults"
LABELS = 5


@dataclass(frozen=True)
class Workload:
    """What is trained on a shape.

    Attributes:
        prompt_tokens: mean of a prompt.
        rank: of the adapter, on all linear layers; published recipes have their own.
        batch: rows of an optimizer step; published recipes have their own.
        systems: compared by default, the published recipe first.
    """

    prompt_tokens: int
    rank: int
    batch: int
    systems: tuple[str, ...]


WORKLOADS = {
    "llama-3.2-1b": Workload(387, 16, 32, ("arxiv-topics", DEFAULTS, OURS)),
    "llama-3.2-3b": Workload(387, 32, 16, ("slr-screening", DEFAULTS, OURS)),
    "smollm2-135m": Workload(45, 16, 64, ("arxiv-topics", DEFAULTS, OURS)),
    "tiny": Workload(45, 4, 8, ("arxiv-topics", "slr-screening", DEFAULTS, OURS)),
}


def main() -> None:
    """Print a Markdown table with a line for each shape and system."""
    options = read_options()
    json_path = options.json.resolve() if options.json else None
    print_header("rows a step")
    for shape in options.shapes:
        first = None
        with entered_project(shape, options.base) as weights:
            for system in options.systems or WORKLOADS[shape].systems:
                # Trainers print losses to where the table goes.
                with contextlib.redirect_stdout(sys.stderr):
                    row = measure(shape, weights, system, options)
                first = first or row
                report(row, first, json_path)


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    shapes = [name for name in WORKLOADS if name != "tiny"]
    parser.add_argument("--shapes", nargs="+", choices=WORKLOADS, default=shapes, metavar="SHAPE", help="default: all")
    systems = [*RECIPES, DEFAULTS, OURS]
    parser.add_argument(
        "--systems", nargs="+", choices=systems, metavar="SYSTEM", help=f"of {', '.join(systems)}; default: by shape"
    )
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps that are measured (default: 20)")
    parser.add_argument("--warmup-steps", type=int, default=5, help="and not, before them, at least 1 (default: 5)")
    parser.add_argument("--batch", type=int, help="rows a step, but for the published recipes (default: by shape)")
    parser.add_argument("--equal-lengths", action="store_true", help="all prompts have the mean length")
    parser.add_argument("--base", type=Path, help="folder of a real base model, for the shape that it has")
    parser.add_argument("--json", type=Path, help="append the rows to this file, one JSON object a line")
    options = parser.parse_args()
    if min(options.steps, options.warmup_steps, options.batch or 1) < 1:
        parser.error("--steps, --warmup-steps and --batch must be at least 1")
    return options


def measure(shape: str, weights: str, system: str, options: argparse.Namespace) -> Row:
    """Train in the current folder's project, and time the steps.

    Args:
        shape: of the project's base.
        weights: what they are.
        system: a recipe, TRL's defaults or this project.
        options: the command line.
    """
    free_memory()
    workload, config = WORKLOADS[shape], shape_config(shape)
    batch = options.batch or workload.batch
    recipe = RECIPES.get(system) or default_recipe(workload.rank, batch)
    rows_a_step = recipe.rows * recipe.accumulation
    steps = options.warmup_steps + options.steps
    prompts = make_prompts(steps * rows_a_step, workload.prompt_tokens, config.vocab_size, options.equal_lengths)
    rows = make_rows(prompts, make_labels(LABELS, config.vocab_size))
    clock, folder = StepClock(), Path("runs") / system
    if system == OURS:
        train_here(rows, workload.rank, batch, steps, folder, clock)
    else:
        train_recipe(recipe, rows, steps, folder, clock)
    rate = rows_a_step / clock.median_seconds(options.warmup_steps)
    tokens = rate * mean_tokens(rows)
    return Row(
        benchmark="training",
        shape=shape,
        weights=weights,
        prompt_tokens=workload.prompt_tokens,
        labels=LABELS,
        rows=rows_a_step,
        system=system,
        examples_per_second=rate,
        tokens_per_second=tokens,
        peak_gib=peak_gib(),
        floor_share=floor_share("training", linear_parameters(config), tokens, reached_flops()),
    )


def train_recipe(recipe: Recipe, rows: Dataset, steps: int, folder: Path, clock: StepClock) -> None:
    """Train as a user of a recipe does."""
    trainer = make_recipe_trainer(recipe, rows, steps, str(folder))
    trainer.add_callback(clock)
    trainer.train()


def train_here(rows: Dataset, rank: int, batch: int, steps: int, folder: Path, clock: StepClock) -> AnswerLossTrainer:
    """Train as the stage `finetune` does; it evaluates once, after the last step, which is not timed."""
    params = Finetune(
        seed=0,
        class_balance="none",
        lora=Lora(r=rank, alpha=2 * rank, dropout=0.0, target_modules="all-linear", use_rslora=False, use_dora=False),
        epochs=None,
        max_steps=steps,
        global_batch_size=batch,
        learning_rate=2e-4,
        lr_scheduler="linear",
        warmup_steps=0,
        weight_decay=0.0,
        optimizer="adamw_torch",
        max_gradient_norm=1.0,
        evaluate_every_steps=steps,
        early_stopping_patience=None,
    )
    parts = {"train": rows, "validation": rows.select(range(batch))}
    micro = micro_batches(batch, longest_row(parts.values()), machine_device().type, process_count())[0]
    trainer = make_trainer(params, micro, folder, parts)
    trainer.add_callback(clock)
    trainer.train()
    return trainer


if __name__ == "__main__":
    run_stage(main)
