"""How much the metrics move when only the seed of training changes: `python -m review.noise --seeds 5`.

Trains the committed configuration with several seeds, as DVC experiments named noise-SEED, and writes the spread of the
adapter's metrics on test into metrics/noise.json. A difference between two commits that lies inside it is no progress.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

from dvc.utils.flatten import flatten

from review.trials import (
    Trial,
    check_committed,
    check_unmoved,
    committed_trial,
    configuration,
    file_at,
    finished_trial,
    run_trial,
    seed_of,
    trial_name,
)
from stages.common.errors import UserError, listing, run_stage
from stages.common.measuring.markdown import markdown_table, number
from stages.common.tables import write_json

METRICS = "metrics/metrics.json"
NOISE = Path("metrics/noise.json")
BLOCK = "adapter"
LARGEST_SEED = 2**32 - 1


def chosen_seeds(text: str, committed: int) -> list[int]:
    """The seeds that a command line asks for.

    Args:
        text: how many, the committed one among them (the next numbers follow it); or a list, as "1,2,3".
        committed: finetune.seed of the last commit.

    Returns:
        Two or more different seeds, in rising order.

    Raises:
        UserError: `text` is neither, or too few.
    """
    allowed = "Give how many seeds (2 or more), as --seeds 5, or a list of different ones, as --seeds 1,2,3."
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"--seeds {text}: is no number and no list of numbers. {allowed}") from None
    if "," not in text:
        numbers = [(committed + step) % (LARGEST_SEED + 1) for step in range(numbers[0])]
    if len(numbers) < 2 or len(set(numbers)) < len(numbers):
        raise UserError(f"--seeds {text}: a spread needs two or more different seeds. {allowed}")
    outside = [str(seed) for seed in numbers if not 0 <= seed <= LARGEST_SEED]
    if outside:
        raise UserError(f"--seeds {text}: {listing(outside)} is no seed; they go from 0 to {LARGEST_SEED}. {allowed}")
    return sorted(numbers)


def trials_of(seeds: list[int], committed: Trial) -> dict[int, Trial]:
    """A finished training for each seed; only what is missing is run.

    Raises:
        UserError: one failed, or the workspace is no longer as committed; the finished ones are kept.
    """
    trials = {}
    for position, seed in enumerate(seeds, start=1):
        progress = f"noise: seed {seed} ({position} of {len(seeds)})"
        if seed == seed_of(committed):
            print(f"{progress}: the last commit's results", file=sys.stderr)
            trials[seed] = committed
            continue
        trial = finished_trial(seed, committed)
        if trial is not None:
            print(f"{progress}: the experiment {trial_name(seed)}", file=sys.stderr)
        else:
            print(f"{progress}: running the experiment {trial_name(seed)}", file=sys.stderr)
            check_unmoved(committed, NOISE)
            trial = finished_trial(seed, committed) if run_trial(seed) else None
        if trial is None:
            raise UserError(
                f"the experiment {trial_name(seed)} (finetune.seed {seed}) failed; what stopped it stands above. "
                f"{NOISE} is as it was, and finished seeds are kept: mend the cause and run this again."
            )
        trials[seed] = trial
    return trials


def spreads(measured: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """The spread of each metric.

    Args:
        measured: the content of metrics.json for two or more seeds.

    Returns:
        By name, its parts joined by dots: the numbers of the block `adapter` that every seed has.
    """
    flat = [flatten({BLOCK: metrics[BLOCK]}) for metrics in measured]
    return {name: spread([metrics[name] for metrics in flat]) for name in flat[0] if _is_number(name, flat)}


def spread(values: list[float]) -> dict[str, float]:
    """Mean, sample standard deviation (of n - 1), lowest and highest of two or more values."""
    return {
        "mean": statistics.fmean(values),
        "standard_deviation": statistics.stdev(values),
        "lowest": min(values),
        "highest": max(values),
    }


def _is_number(name: str, flat: list[dict[str, Any]]) -> bool:
    return all(type(metrics.get(name)) in (int, float) for metrics in flat)


def table(metrics: dict[str, dict[str, float]]) -> str:
    """The spreads as a Markdown table."""
    header = ["metric", "mean", "standard deviation", "lowest", "highest"]
    return markdown_table(header, [[name, *map(number, values.values())] for name, values in metrics.items()])


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(
        prog="python -m review.noise",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--seeds",
        metavar="N|LIST",
        default="5",
        help="how many seeds, that of the last commit and the numbers after it (default: 5); or a list, as 1,2,3",
    )
    return parser.parse_args()


def main() -> None:
    """Train what is missing, write metrics/noise.json and print it."""
    text = arguments().seeds
    check_committed(NOISE)
    committed = committed_trial()
    seeds = chosen_seeds(text, seed_of(committed))
    trials = trials_of(seeds, committed)
    metrics = spreads([json.loads(file_at(trial.commit, METRICS)) for trial in trials.values()])
    write_json(NOISE, {"parameters": configuration(committed.lock), "seeds": seeds, "metrics": metrics})
    print(table(metrics))
    print(f"\nnoise: {len(seeds)} seeds ({listing([str(seed) for seed in seeds])}); {NOISE} has these numbers in full")


if __name__ == "__main__":
    run_stage(main)
