"""From records to prompts and completions, as text and as tokens, within the token budget."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from stages.common.errors import UserError, listing, run_stage
from stages.common.params import load_params
from stages.common.progress import progress
from stages.common.prompting.kinds import GENERATION_KINDS, prompt_kind
from stages.common.prompting.prompts import PromptFormat, build_format
from stages.common.prompting.rows import FormattedRow, format_rows
from stages.common.prompting.tokenizer import PromptTokenizer, load_prompt_tokenizer
from stages.common.schema.prompts import FormatPrompts
from stages.common.schema.task import ClassificationTask, Task
from stages.common.tables import iter_batches, open_table, read_table, row_count, write_json

RECORDS = Path("data/records.parquet")
EXEMPLARS = Path("data/exemplars.parquet")
TOKENIZER = Path("models/tokenizer")
PROMPTS = Path("data/prompts.parquet")
REPORT = Path("data/reports/format_prompts.json")
MOST_IDS_LISTED = 100

# Characters that are tokenised at a time: a tokenizer's own results take some fifty bytes for each.
CHARACTERS_AT_ONCE = 2_000_000

_KEPT = ["id", "text", "label", "group", "split", "slice"]
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in _KEPT),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("prompt_answer_mask", pa.list_(pa.bool_())),
        ("completion_ids", pa.list_(pa.int32())),
        ("shortened", pa.bool_()),
    ]
)


def main() -> None:
    """Format data/records.parquet."""
    params = load_params("task", "format_prompts")
    tokenizer = load_prompt_tokenizer(TOKENIZER)
    exemplars = read_table(EXEMPLARS, ["text", "label"]).to_pylist()
    prompt_format = task_format(params.task, params.format_prompts, exemplars, tokenizer)
    report = format_table(RECORDS, PROMPTS, prompt_format, tokenizer)
    if report["shortened_share"] > params.format_prompts.max_shortened_share:
        raise _too_many_shortened(report, prompt_format)
    write_json(REPORT, report)
    tokens = report["prompt_tokens"]
    print(
        f"format_prompts: {report['rows']:,} rows, {report['shortened']:,} {_what(prompt_format)} shortened "
        f"({report['shortened_share']:.1%}{_details(report)}), tokens in a prompt: median {tokens['p50']}, 95 % at "
        f"most {tokens['p95']}, longest {tokens['max']}"
    )


def task_format(
    task: Task, params: FormatPrompts, exemplars: list[dict[str, str]], tokenizer: PromptTokenizer
) -> PromptFormat:
    """The format of a task's prompts; see `build_format`."""
    labelled = task if isinstance(task, ClassificationTask) else None
    return build_format(
        kind=prompt_kind(task),
        style=params.style,
        system=params.system,
        template=params.template,
        max_length_tokens=params.max_length_tokens,
        labels=labelled.labels if labelled else [],
        label_descriptions=labelled.label_descriptions if labelled else None,
        exemplars=exemplars,
        tokenizer=tokenizer,
    )


def format_table(
    records: Path, prompts: Path, prompt_format: PromptFormat, tokenizer: PromptTokenizer
) -> dict[str, Any]:
    """Format the table `records` into the table `prompts`, a batch in memory at a time.

    Returns:
        The stage's report, see `Tally`.

    Raises:
        UserError: there are no records.
    """
    rows = row_count(records)
    if rows == 0:
        raise UserError(f"{records}: holds no rows. Look into data/raw/ and ingest.columns, then run `dvc repro`.")
    tally = Tally()
    wanted = ["text", "label", *(["messages"] if prompt_format.kind == "chat" else [])]
    # For whoever looks at the tokens without a tokenizer.
    begin_id = tokenizer.control_ids.get(tokenizer.special_tokens.get("bos_token", ""))
    metadata = {"prompt_format": prompt_format.to_json(), "begin_id": begin_id}
    with open_table(prompts, SCHEMA, metadata) as table, progress(rows, "formatting prompts") as bar:
        for batch in iter_batches(records, columns=[*_KEPT, *wanted[2:]]):
            pieces = []
            for piece in _pieces(batch):
                formatted = format_rows(prompt_format, tokenizer, piece.select(wanted).to_pylist())
                pieces.append(_to_batch(piece, formatted))
                tally.add(piece["id"].to_pylist(), formatted)
                bar.update(len(formatted))
            table.add_batch(pa.concat_batches(pieces))
    return tally.report(prompt_format)


@dataclass
class Tally:
    """What the rows formatted so far add up to; of lengths, how many rows have each."""

    prompt_tokens: Counter[int] = field(default_factory=Counter)
    answer_tokens: Counter[int] = field(default_factory=Counter)
    shortened: int = 0
    answers_cut: int = 0
    turns_dropped: int = 0
    shortened_ids: list[str] = field(default_factory=list)

    def add(self, ids: list[str], rows: list[FormattedRow]) -> None:
        """Count some rows, with their ids."""
        self.prompt_tokens.update(len(row.prompt_ids) for row in rows)
        self.answer_tokens.update(len(row.completion_ids or []) for row in rows)
        self.shortened += sum(row.shortened for row in rows)
        self.answers_cut += sum(row.answer_cut for row in rows)
        self.turns_dropped += sum(row.turns_dropped for row in rows)
        found = [identity for identity, row in zip(ids, rows, strict=True) if row.shortened]
        self.shortened_ids += found[: MOST_IDS_LISTED - len(self.shortened_ids)]

    def report(self, prompt_format: PromptFormat) -> dict[str, Any]:
        """The report on at least one row.

        Returns:
            rows, shortened (count, share, the first 100 ids) and quantiles of the prompts' lengths in tokens. Where
            answers are texts also the quantiles of theirs, and how many of the shortened rows lost the end of their
            answer (answers_cut) or, with conversations, their first turns (turns_dropped).
        """
        rows = self.prompt_tokens.total()
        report: dict[str, Any] = {
            "rows": rows,
            "shortened": self.shortened,
            "shortened_share": self.shortened / rows,
            "shortened_ids": self.shortened_ids,
            "prompt_tokens": _quantiles(self.prompt_tokens),
            "max_length_tokens": prompt_format.max_length_tokens,
        }
        if prompt_format.kind in GENERATION_KINDS:
            report |= {"answers_cut": self.answers_cut, "answer_tokens": _quantiles(self.answer_tokens)}
        if prompt_format.kind == "chat":
            report["turns_dropped"] = self.turns_dropped
        return report


def _pieces(batch: pa.RecordBatch) -> Iterator[pa.RecordBatch]:
    """The batch in slices of about CHARACTERS_AT_ONCE, at least a row each."""
    sizes = np.zeros(batch.num_rows, np.int64)
    for name in {"text", "label", "messages"} & set(batch.schema.names):
        sizes += pc.utf8_length(batch[name]).to_numpy(zero_copy_only=False)
    pieces = np.cumsum(sizes) // CHARACTERS_AT_ONCE
    starts = [0, *(np.flatnonzero(np.diff(pieces)) + 1).tolist(), batch.num_rows]
    for start, end in pairwise(starts):
        yield batch.slice(start, end - start)


def _to_batch(records: pa.RecordBatch, formatted: list[FormattedRow]) -> pa.RecordBatch:
    """The records with their prompts and completions; columns as in SCHEMA, rows in the same order."""
    made = [
        pa.array([getattr(row, column.name) for row in formatted], column.type) for column in list(SCHEMA)[len(_KEPT) :]
    ]
    return pa.RecordBatch.from_arrays([*(records[name] for name in _KEPT), *made], schema=SCHEMA)


def _quantiles(lengths: Counter[int]) -> dict[str, int]:
    found, rows = list(lengths), list(lengths.values())
    p50, p95, longest = np.quantile(found, [0.5, 0.95, 1], method="inverted_cdf", weights=rows)
    return {"p50": int(p50), "p95": int(p95), "max": int(longest)}


def _too_many_shortened(report: dict[str, Any], prompt_format: PromptFormat) -> UserError:
    return UserError(
        f"format_prompts.max_length_tokens: {report['shortened']:,} of {report['rows']:,} {_what(prompt_format)} are "
        f"longer than {report['max_length_tokens']} tokens allow{_details(report)}, ids "
        f"{listing(report['shortened_ids'])}. Raise it (it costs time and memory), or allow a larger "
        "format_prompts.max_shortened_share."
    )


def _what(prompt_format: PromptFormat) -> str:
    return {"chat": "conversations", "question_answering": "questions with their answers"}.get(
        prompt_format.kind, "texts"
    )


def _details(report: dict[str, Any]) -> str:
    """How rows were shortened, where it was not the text alone."""
    words = {"turns_dropped": "conversations without their first turns", "answers_cut": "answers cut"}
    return "".join(f"; {report[key]:,} {text}" for key, text in words.items() if key in report)


if __name__ == "__main__":
    run_stage(main, takes_arguments=False)
