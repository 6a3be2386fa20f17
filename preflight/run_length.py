"""How long a run is, in optimizer steps and in rows, and what cannot fit into it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

from preflight.findings import Finding, error, warning
from stages.common.schema.finetune import Finetune
from stages.common.schema.ingest import AnySource, Columns, Ingest, Rows
from stages.common.schema.prompts import Split
from stages.common.schema.task import ClassificationTask, Task

# Far beyond the three to five passes of the published systems; the best evaluation is kept, the time is not.
MOST_PASSES = 20


def rows_in_one_pass(task: Task, class_balance: str, rows: int, labels: Counter[str]) -> int:
    """How many rows training sees in one pass over train.

    Args:
        task: with multi_label every row is learned once for each label.
        class_balance: with "oversample" rows of rarer labels are repeated up to the most frequent one.
        rows: of train.
        labels: rows of each label; empty where answers are texts.
    """
    if not isinstance(task, ClassificationTask):
        return rows
    if task.multi_label:
        return rows * len(task.labels)
    return len(labels) * max(labels.values()) if class_balance == "oversample" and labels else rows


def steps_of_run(finetune: Finetune, rows_a_pass: int) -> int:
    """Optimizer steps of the whole run, as transformers' Trainer counts them: an epoch's last step may be smaller."""
    if finetune.max_steps is not None:
        return finetune.max_steps
    assert finetune.epochs is not None, "one of epochs and max_steps is given"
    return math.ceil(finetune.epochs * math.ceil(rows_a_pass / finetune.global_batch_size))


def expected_train_rows(ingest: Ingest, split: Split) -> int | None:
    """Rows of train as far as params.yaml fixes them; None where only the data say.

    An estimate: a group goes into one part as a whole, and exemplars are taken out.
    """
    sources = [(ingest.source, ingest.columns, ingest.rows)]
    sources += [(further.source, further.columns, further.rows) for further in ingest.further_sources]
    shares = [_train_rows(*source, split) for source in sources]
    known = [share for share in shares if share is not None]
    return round(sum(known)) if len(known) == len(shares) else None


def _train_rows(source: AnySource, columns: Columns, rows: Rows | None, split: Split) -> float | None:
    if isinstance(rows, dict):
        return rows.get("train")
    published = columns.split is not None or isinstance(getattr(source, "paths", None), dict)
    return None if rows is None or published else rows * (1 - split.validation_share - split.test_share)


def warmup_outlasts_the_run(finetune: Finetune, steps: int) -> Iterator[Finding]:
    """Warm-up as long as the run or longer: the learning rate is never reached, and never falls."""
    if finetune.warmup_steps >= steps and finetune.lr_scheduler != "constant":
        yield error(
            "finetune.warmup_steps",
            f"{finetune.warmup_steps} in a run of {steps} steps: the learning rate {finetune.learning_rate:g} is never "
            "reached",
            f"fewer than {steps}, usually up to a tenth of them",
            f"Set it to {steps // 20}, or train longer",
        )


def evaluated_only_at_the_end(finetune: Finetune, steps: int) -> Iterator[Finding]:
    """An evaluation interval as long as the run, or longer."""
    if finetune.evaluate_every_steps >= steps > 1:
        yield warning(
            "finetune.evaluate_every_steps",
            f"{finetune.evaluate_every_steps} in a run of {steps} steps: the only evaluation is at the end, so there "
            "is no earlier state to choose and nothing stops early",
            f"at most {steps // 2}",
            f"Set it to {max(1, steps // 4)}",
        )


def rows_never_seen(finetune: Finetune, rows_a_pass: int) -> Iterator[Finding]:
    """A run that ends before every row of train was seen once."""
    seen = math.floor(_passes(finetune, rows_a_pass) * rows_a_pass)
    if seen < rows_a_pass:
        yield warning(
            _length_key(finetune),
            f"{seen:,} of {rows_a_pass:,} rows are seen ({seen / rows_a_pass:.0%}), the others never",
            f"at least one pass: {math.ceil(rows_a_pass / finetune.global_batch_size):,} steps of "
            f"{finetune.global_batch_size}",
            "Train longer, or fetch fewer rows with ingest.rows",
        )


def rows_seen_too_often(finetune: Finetune, rows_a_pass: int) -> Iterator[Finding]:
    """A run of very many passes, which memorises train."""
    passes = _passes(finetune, rows_a_pass)
    if passes > MOST_PASSES:
        yield warning(
            _length_key(finetune),
            f"every one of {rows_a_pass:,} rows is seen {passes:,.0f} times",
            f"at most {MOST_PASSES} passes, usually one to five",
            "Train shorter, or set finetune.early_stopping_patience",
        )


def _passes(finetune: Finetune, rows_a_pass: int) -> float:
    if finetune.epochs is not None:
        return finetune.epochs
    assert finetune.max_steps is not None, "one of epochs and max_steps is given"
    return finetune.max_steps * finetune.global_batch_size / max(rows_a_pass, 1)


def _length_key(finetune: Finetune) -> str:
    return "finetune.epochs" if finetune.max_steps is None else "finetune.max_steps"


CHECKS = (warmup_outlasts_the_run, evaluated_only_at_the_end, rows_never_seen, rows_seen_too_often)
