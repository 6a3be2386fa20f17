"""What is in data/splits/, counted by the stage that writes it, so that nobody else has to read all rows to know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import TypeAdapter, ValidationError

from stages.common.base import file_sha256
from stages.common.labels import split_labels
from stages.common.leakage import PARTS
from stages.common.tables import batches_of, open_parquet, read_json, table_metadata, write_json

MOST_IDS = 5
# An answer is cut to the budget, at a character, which may take more than one token: a row without end token that fills
# the budget up to so many tokens was cut; a shorter one had room for its end token.
CUT_SLACK_TOKENS = 8
# Rows that are looked at together: few enough that a batch of long conversations takes tens of MB.
ROWS_AT_A_TIME = 1_000
# For `_text_hash`: ASCII capitals become small letters, and everything in ASCII but letters and digits goes.
_SMALL = bytes(ord(chr(byte).lower()) if byte < 128 else byte for byte in range(256))
_PUNCTUATION = bytes(byte for byte in range(128) if not chr(byte).isalnum())

Numbers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


@dataclass
class Hits:
    """How many rows have a fault, and the ids of the first of them."""

    count: int = 0
    ids: list[str] = field(default_factory=list)

    def add(self, flags: Flags, ids: pa.Array) -> None:
        """Count the rows of a batch whose flag is set."""
        self.count += int(flags.sum())
        self.ids += [ids[int(row)].as_py() for row in np.flatnonzero(flags)[: MOST_IDS - len(self.ids)]]


@dataclass
class Part:
    """What is in data/splits/NAME.parquet.

    Attributes:
        rows: how many.
        labels: rows that have each label; empty where answers are texts.
        longest_tokens: of prompt and completion together.
        tokens, squares: sums over the rows of these lengths, and of their squares.
        answer_tokens: rows by the length of their completion, its terminator included; empty with multi_label.
        unlearnable: rows without any token to learn, the terminator aside.
        wrong_masks: rows whose prompt_answer_mask is not as long as the prompt.
        cut: rows whose answer was cut to the budget.
        endless: rows whose answer has no end token although there was room for it.
        over_budget: rows longer than max_length_tokens.
        doubled_begins: rows with two begin tokens in a row.
        inner_begins: rows with a begin token behind the first token.
        shared: rows whose text, but for ASCII case and punctuation, is also in a later part (train, validation, test).
    """

    rows: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    longest_tokens: int = 0
    tokens: int = 0
    squares: int = 0
    answer_tokens: Counter[int] = field(default_factory=Counter)
    unlearnable: Hits = field(default_factory=Hits)
    wrong_masks: Hits = field(default_factory=Hits)
    cut: Hits = field(default_factory=Hits)
    endless: Hits = field(default_factory=Hits)
    over_budget: Hits = field(default_factory=Hits)
    doubled_begins: Hits = field(default_factory=Hits)
    inner_begins: Hits = field(default_factory=Hits)
    shared: Hits = field(default_factory=Hits)


@dataclass
class Contents:
    """What data/reports/contents.json holds.

    Attributes:
        sha256: of each part's file: of no other file this is true.
        begin_id: see `count_parts`.
        parts: what is in them.
    """

    sha256: dict[str, str]
    begin_id: int | None
    parts: dict[str, Part]


_CONTENTS = TypeAdapter(Contents)


def write_contents(path: Path, folder: Path, begin_id: int | None) -> None:
    """Write down what is in the split files in `folder`."""
    footer = table_metadata(folder / f"{PARTS[0]}.parquet", "prompt_format")
    contents = Contents(_hashes(folder), begin_id, count_parts(folder, footer, begin_id))
    write_json(path, _CONTENTS.dump_python(contents, mode="json"))


def read_contents(path: Path, folder: Path, begin_id: int | None) -> dict[str, Part] | None:
    """What was written down about the very files in `folder`; None where that was about others, or never."""
    if not path.is_file():
        return None
    values = read_json(path)
    try:
        contents = _CONTENTS.validate_python(values)
    except ValidationError:
        return None
    of_this_version = _CONTENTS.dump_python(contents, mode="json") == values
    of_these_files = (contents.begin_id, contents.sha256) == (begin_id, _hashes(folder))
    return contents.parts if of_this_version and of_these_files else None


def _hashes(folder: Path) -> dict[str, str]:
    return {name: file_sha256(folder / f"{name}.parquet") for name in PARTS}


def count_parts(folder: Path, footer: Mapping[str, Any], begin_id: int | None) -> dict[str, Part]:
    """Read the split files in batches: time in proportion to its tokens, memory to one batch and the keys of
    the texts of validation and test.

    Args:
        folder: with the split files.
        footer: their prompt format.
        begin_id: id of the tokenizer's begin token; None when it has none or is not known.
    """
    parts, texts = {}, set[int]()
    # Test first: a text that is also there is a fault of the row in train.
    for name in reversed(PARTS):
        parts[name] = read_part(folder / f"{name}.parquet", footer, begin_id, texts)
        if name != PARTS[0]:
            texts |= read_texts(folder / f"{name}.parquet")
    return {name: parts[name] for name in PARTS}


def read_part(path: Path, footer: Mapping[str, Any], begin_id: int | None, later_texts: set[int]) -> Part:
    """One part; see `count_parts`."""
    part = Part()
    columns = ["id", "text", "prompt_ids", "prompt_answer_mask", "completion_ids"]
    has_labels = bool(footer["labels"])
    for batch in _small_batches(path, columns + ["label"] * has_labels):
        part.rows += batch.num_rows
        keys = _text_hashes(batch)
        part.shared.add(np.array([key in later_texts for key in keys], bool), batch["id"])
        if has_labels:
            _count_labels(part, batch["label"].to_pylist(), footer["kind"])
        _check_begins(part, batch, begin_id)
        _check_answers(part, batch, footer)
    return part


def read_texts(path: Path) -> set[int]:
    """The keys of a part's texts."""
    return {key for batch in _small_batches(path, ["text"]) for key in _text_hashes(batch)}


def _small_batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    with open_parquet(path) as table:
        yield from batches_of(table, ROWS_AT_A_TIME, columns)


def _text_hashes(batch: pa.RecordBatch) -> list[int]:
    return [_text_hash(text) for text in batch["text"].to_pylist()]


def _text_hash(text: str) -> int:
    # The stage `split` compares whole Unicode, seven times slower; this looks at its result once more.
    encoded = text.encode()
    return hash(encoded.translate(_SMALL, _PUNCTUATION) or encoded)


def _count_labels(part: Part, labels: list[str], kind: str) -> None:
    for label, rows in Counter(labels).items():
        for one in split_labels(label) if kind == "multi_label" else [label]:
            part.labels[one] += rows


def _check_begins(part: Part, batch: pa.RecordBatch, begin_id: int | None) -> None:
    if begin_id is None:
        return
    flat, lengths = _flat(batch["prompt_ids"])
    starts = np.cumsum(lengths) - lengths
    begins = np.flatnonzero(flat == begin_id)
    # With empty prompts several rows start at one place; the last of them is the one that has tokens.
    rows = np.searchsorted(starts, begins, side="right") - 1
    inner = begins > starts[rows]
    doubled = inner & (flat[begins - 1] == begin_id)
    part.inner_begins.add(np.bincount(rows[inner], minlength=batch.num_rows) > 0, batch["id"])
    part.doubled_begins.add(np.bincount(rows[doubled], minlength=batch.num_rows) > 0, batch["id"])


def _check_answers(part: Part, batch: pa.RecordBatch, footer: Mapping[str, Any]) -> None:
    """Lengths, ends and masks of the rows of a batch."""
    ids, prompts = batch["id"], _lengths(batch["prompt_ids"])
    if footer["kind"] == "multi_label":
        totals = prompts + max(len(entry["ids"]) for entry in footer["completions"].values())
    else:
        flat, answers = _flat(batch["completion_ids"])
        totals = prompts + answers
        ended = np.zeros(batch.num_rows, bool)
        some = answers > 0
        ended[some] = np.isin(flat[np.cumsum(answers)[some] - 1], footer["terminator_ids"])
        masks, learned = _masks(batch["prompt_answer_mask"])
        part.unlearnable.add(answers - ended + learned == 0, ids)
        part.wrong_masks.add((masks >= 0) & (masks != prompts), ids)
        full = totals >= footer["max_length_tokens"] - CUT_SLACK_TOKENS
        cut = some & ~ended & full & (footer["kind"] != "classification")
        part.cut.add(cut, ids)
        part.endless.add(some & ~ended & ~cut, ids)
        part.answer_tokens.update(answers.tolist())
    part.over_budget.add(totals > footer["max_length_tokens"], ids)
    part.longest_tokens = max(part.longest_tokens, int(totals.max(initial=0)))
    part.tokens += int(totals.sum())
    part.squares += int((totals**2).sum())


def _lengths(column: pa.Array) -> Numbers:
    return np.asarray(pc.list_value_length(column).fill_null(0), np.int64)


def _flat(column: pa.Array) -> tuple[npt.NDArray[Any], Numbers]:
    return np.asarray(column.flatten()), _lengths(column)


def _masks(column: pa.Array) -> tuple[Numbers, Numbers]:
    """Each row's mask's length, -1 without one, and how many tokens it marks."""
    lengths = np.asarray(pc.list_value_length(column).fill_null(-1), np.int64)
    if column.null_count == len(column):
        return lengths, np.zeros(len(column), np.int64)
    marked = np.concatenate([[0], np.cumsum(column.flatten().to_numpy(zero_copy_only=False), dtype=np.int64)])
    ends = np.cumsum(np.maximum(lengths, 0))
    return lengths, marked[ends] - marked[ends - np.maximum(lengths, 0)]
