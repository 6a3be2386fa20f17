"""What the rows of data/splits/ give away."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

from preflight.base import Base
from preflight.findings import Finding, error, warning
from stages.common.contents import Hits, Part
from stages.common.errors import listing
from stages.common.schema.prompts import FormatPrompts
from stages.common.schema.task import ClassificationTask, Task

Parts = Mapping[str, Part]


def part_has_no_rows(parts: Parts) -> Iterator[Finding]:
    """A part without rows: nothing to learn from, to choose the best step on, or to measure on."""
    for name, part in parts.items():
        if part.rows == 0:
            shares = "split.test_share" if name == "test" else "split.validation_share"
            yield error(
                shares if name != "train" else "ingest.source",
                f"data/splits/{name}.parquet has no rows",
                "rows in train, validation and test",
                "Add rows, or raise the share" if name != "train" else "Add rows",
            )


def nothing_to_learn_in_a_row(parts: Parts) -> Iterator[Finding]:
    """Rows whose mask covers every token: an empty completion, and no earlier turn to learn."""
    for name in ("train", "validation"):
        yield from _each(
            parts,
            name,
            parts[name].unlearnable,
            "have no token to learn: their completion is empty, and so is prompt_answer_mask",
            "an answer in every row",
            "Look at these rows in the source; remove them, or mend ingest.columns.label",
        )


def mask_does_not_fit_the_prompt(parts: Parts) -> Iterator[Finding]:
    """Masks of another length than the prompt, which would mark the wrong tokens."""
    for name, part in parts.items():
        yield from _each(
            parts,
            name,
            part.wrong_masks,
            "have a prompt_answer_mask that is not as long as prompt_ids",
            "one flag for each token of the prompt",
            "Run `dvc repro --force format_prompts`; if it stays, report it",
        )


def end_token_is_missing(parts: Parts) -> Iterator[Finding]:
    """Answers without end token although there was room for it: the model would not learn to stop."""
    for name, part in parts.items():
        yield from _each(
            parts,
            name,
            part.endless,
            "have an answer that does not end in an end token (terminator_ids of the prompt format)",
            "an end token behind every answer that was not cut",
            "Run `dvc repro --force format_prompts`; if it stays, report it",
        )


def label_lacks_its_end_token(prompt_format: Mapping[str, Any]) -> Iterator[Finding]:
    """Labels' completions without end token."""
    ends = set(prompt_format["terminator_ids"])
    lacking = [name for name, entry in prompt_format["completions"].items() if not ends & set(entry["ids"][-1:])]
    if lacking:
        yield error(
            "data/splits/train.parquet",
            f"the completions of {listing(lacking)} do not end in an end token",
            f"one of the ids {sorted(ends)} last",
            "Run `dvc repro --force format_prompts`; if it stays, report it",
        )


def answers_are_cut(parts: Parts) -> Iterator[Finding]:
    """Answers that were cut to the budget; they carry no end token."""
    for name, part in parts.items():
        yield from _each(
            parts,
            name,
            part.cut,
            "have an answer that was cut to the budget",
            "answers that fit",
            "Raise format_prompts.max_length_tokens",
            key="format_prompts.max_length_tokens",
            level="warning",
        )


def texts_are_shortened(format_prompts: FormatPrompts, shortened: tuple[int, int]) -> Iterator[Finding]:
    """Rows that lost a part of their text, of their conversation or of their answer."""
    count, rows = shortened
    if count:
        yield warning(
            "format_prompts.max_length_tokens",
            f"{count:,} of {rows:,} rows ({count / rows:.1%}) were shortened to {format_prompts.max_length_tokens:,} "
            "tokens",
            "texts that fit; data/reports/format_prompts.json has the lengths",
            "Raise it, where time and memory allow",
        )


def row_is_over_the_budget(format_prompts: FormatPrompts, parts: Parts) -> Iterator[Finding]:
    """Rows that are longer than the budget that memory was planned with."""
    for name, part in parts.items():
        yield from _each(
            parts,
            name,
            part.over_budget,
            f"are longer than the budget, up to {part.longest_tokens:,} tokens",
            f"at most {format_prompts.max_length_tokens:,} tokens (format_prompts.max_length_tokens)",
            "Run `dvc repro --force format_prompts`; if it stays, report it",
        )


def row_exceeds_the_base(parts: Parts, base: Base) -> Iterator[Finding]:
    """Rows with positions that the base has never seen."""
    longest = max(part.longest_tokens for part in parts.values())
    if base.positions is not None and longest > base.positions:
        yield error(
            "format_prompts.max_length_tokens",
            f"the longest row has {longest:,} tokens, more positions than the base model has",
            f"at most {base.positions:,} ({base.positions_source})",
            f"Set it to {base.positions} or less, or take a base with a longer context",
        )


def begin_token_is_doubled(parts: Parts, base: Base) -> Iterator[Finding]:
    """Two begin tokens in a row: one from the chat template or the template, one from the tokenizer."""
    for name, part in parts.items():
        yield from _each(
            parts,
            name,
            part.doubled_begins,
            f"have two begin tokens {base.begin_token} in a row",
            "one, which the base's chat template or the tokenizer writes",
            f"Take {base.begin_token} out of format_prompts.template, or mend the base's chat template",
        )


def begin_token_is_inside(parts: Parts, base: Base) -> Iterator[Finding]:
    """A begin token in the middle of a prompt, unless the chat format begins its turns with it."""
    if base.begins_turns:
        return
    for name, part in parts.items():
        yield from _each(
            parts,
            name,
            part.inner_begins,
            f"have a begin token {base.begin_token} in the middle of the prompt",
            "one at the beginning",
            "Look at the column prompt; take it out of format_prompts.template",
            level="warning",
        )


def labels_have_the_same_tokens(prompt_format: Mapping[str, Any]) -> Iterator[Finding]:
    """Labels that no answer could tell apart."""
    for (one, first), (other, second) in combinations(prompt_format["completions"].items(), 2):
        if first["ids"] == second["ids"]:
            yield error(
                "task.labels",
                f"the tokenizer makes the same tokens of {one!r} and {other!r}",
                "labels with tokens of their own",
                "Rename one of them",
            )


def label_is_absent_from_train(task: Task, parts: Parts) -> Iterator[Finding]:
    """Labels that cannot be learned."""
    absent = _absent_labels(task, parts["train"])
    if absent:
        assert isinstance(task, ClassificationTask)
        yield (warning if task.multi_label else error)(
            "task.labels",
            f"no row of train has the label {listing(absent)}",
            "every label in train",
            "Add rows, take the label out of task.labels, or join it with another one through aliases",
        )


def label_is_absent_from_test(task: Task, parts: Parts) -> Iterator[Finding]:
    """Labels whose recall on test is 0/0."""
    absent = _absent_labels(task, parts["test"])
    if absent and parts["test"].rows:
        yield warning(
            "split.test_share",
            f"no row of test has the label {listing(absent)}, so that its recall and F1 there are undefined and the "
            "macro averages count them as 0",
            "every label in test",
            "Raise split.test_share, or add rows with this label",
        )


def text_is_in_two_parts(parts: Parts) -> Iterator[Finding]:
    """Texts that are also in a part that measures: memory is measured."""
    for name in ("train", "validation"):
        later = "validation or test" if name == "train" else "test"
        yield from _each(
            parts,
            name,
            parts[name].shared,
            f"have a text that is, but for case and punctuation, also in {later}",
            "no text in two parts",
            "Set split.leakage to drop, and ingest.columns.group to null or to a column that equal texts share",
            key="split.leakage",
        )


def _absent_labels(task: Task, part: Part) -> list[str]:
    if not isinstance(task, ClassificationTask):
        return []
    return [label for label in task.labels if not part.labels[label]]


def _each(
    parts: Parts, name: str, hits: Hits, found: str, wanted: str, remedy: str, key: str = "", level: str = "error"
) -> Iterator[Finding]:
    """A finding about rows of one part; none without rows that have the fault."""
    if hits.count:
        more = f" and {hits.count - len(hits.ids):,} more" if hits.count > len(hits.ids) else ""
        where = f"{hits.count:,} of {parts[name].rows:,} rows of {name} {found} (ids {', '.join(hits.ids)}{more})"
        report = error if level == "error" else warning
        yield report(key or f"data/splits/{name}.parquet", where, wanted, remedy)


CHECKS = (
    part_has_no_rows,
    nothing_to_learn_in_a_row,
    mask_does_not_fit_the_prompt,
    end_token_is_missing,
    label_lacks_its_end_token,
    answers_are_cut,
    texts_are_shortened,
    row_is_over_the_budget,
    row_exceeds_the_base,
    begin_token_is_doubled,
    begin_token_is_inside,
    labels_have_the_same_tokens,
    label_is_absent_from_train,
    label_is_absent_from_test,
    text_is_in_two_parts,
)
