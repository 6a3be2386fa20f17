"""Find what would waste a GPU run before it starts: `python -m preflight.check`, run first by the finetune stage.

`python -m preflight.check params` looks at params.yaml alone, whatever lies in data/: before `dvc repro` the data may
be those of another params.yaml, and must not stop it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from preflight import base, data, measuring, parameters, run_length
from preflight.findings import Check, Finding, run_checks
from preflight.splits import other_parameters, read_footer, read_parts, read_shortened
from stages.common.errors import UserError, run_stage
from stages.common.params import Params, load_params
from stages.common.switches import check_switches

# More checks than these are counted, not named.
MOST_NAMED = 5

# Adding a check: write a function and put it into the CHECKS of its module.
CHECKS: tuple[Check, ...] = (
    *parameters.CHECKS,
    *run_length.CHECKS,
    *base.CHECKS,
    *data.CHECKS,
    *measuring.CHECKS,
)


def values_of_params(params: Params) -> dict[str, Any]:
    """The values that follow from params.yaml: its blocks, and the run's length as far as they fix it."""
    values: dict[str, Any] = {name: getattr(params, name) for name in Params.model_fields}
    rows = run_length.expected_train_rows(params.ingest, params.split)
    if rows is not None and params.finetune.class_balance != "oversample":
        values["rows_a_pass"] = run_length.rows_in_one_pass(
            params.task, params.finetune.class_balance, rows, labels=data.Part().labels
        )
    if params.finetune.max_steps is not None:
        values["steps"] = params.finetune.max_steps
    return values


def values_of_files(params: Params, root: Path = Path()) -> tuple[dict[str, Any], str]:
    """The values that lie in models/ and data/, and what to wait for where some are not there.

    Args:
        params: all blocks; files that were made with other ones are left alone.
        root: the repository's root.
    """
    values: dict[str, Any] = {}
    model = base.read_base(params.base_model, root)
    if model is not None:
        values["base"] = model
    footer = read_footer(root)
    if footer is None:
        return values, "data/splits, which `dvc repro split` makes"
    others = other_parameters(footer, params.format_prompts, params.task)
    if others:
        return values, f"data/splits made with these params.yaml (other there: {', '.join(others)})"
    parts = read_parts(footer, model.begin_id if model else None, root)
    values |= {"prompt_format": footer, "parts": parts}
    train, finetune = parts["train"], params.finetune
    if train.rows:
        values["rows_a_pass"] = run_length.rows_in_one_pass(
            params.task, finetune.class_balance, train.rows, train.labels
        )
        values["steps"] = run_length.steps_of_run(finetune, values["rows_a_pass"])
    shortened = read_shortened(root)
    if shortened is None:
        return values, "data/prompts.parquet, which `dvc checkout` restores"
    values["shortened"] = shortened
    return values, "models/base.json of this base_model, which `dvc repro base_model` makes"


def report(findings: list[Finding], waiting: list[str], waits_for: str) -> None:
    """Print the warnings and a summary.

    Raises:
        UserError: there are errors; all of them are in its message.
    """
    errors = [str(finding) for finding in findings if finding.level == "error"]
    warnings = [str(finding) for finding in findings if finding.level == "warning"]
    for text in warnings:
        print(f"preflight: warning: {text}")
    if waiting:
        named = ", ".join(waiting) if len(waiting) <= MOST_NAMED else f"{len(waiting)} checks"
        print(f"preflight: waiting for {waits_for}: {named}")
    if errors:
        listed = "\n  ".join(errors)
        raise UserError(f"preflight found {len(errors)} before time is spent on training:\n  {listed}")
    print(f"preflight: {len(CHECKS) - len(waiting)} of {len(CHECKS)} checks made, no errors, warnings: {len(warnings)}")


def main() -> None:
    """Check params.yaml, and the data and the base's files as far as they are there."""
    arguments = sys.argv[1:]
    if arguments not in ([], ["params"]):
        raise UserError(f"preflight.check: unknown arguments {' '.join(arguments)!r}. Allowed: none, or `params`.")
    check_switches()
    params = load_params()
    values, waits_for = values_of_params(params), "the finetune stage, which has the data"
    if not arguments:
        found, waits_for = values_of_files(params)
        values |= found
    findings, waiting = run_checks(CHECKS, values)
    report(findings, waiting, waits_for)


if __name__ == "__main__":
    run_stage(main)
