"""Small split files of every kind of task, written as the `split` stage writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from stages.common.branches import answer_key
from stages.common.tables import open_table

TERMINATOR = 2
TOKENS = pa.list_(pa.int32())
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in ("id", "text", "label", "group", "slice", "prompt", "completion")),
        ("prompt_ids", TOKENS),
        ("prompt_answer_mask", pa.list_(pa.bool_())),
        ("completion_ids", TOKENS),
    ]
)


def prompt_format(kind: str, completions: dict[str, list[int]] | None = None, labels: list[str] | None = None) -> Any:
    """A footer: what `PromptFormat.to_json` gives, as far as training and inference read it."""
    texts = {name: {"text": f" {name}", "ids": ids} for name, ids in (completions or {}).items()}
    return {
        "kind": kind,
        "labels": labels or [],
        "completions": texts,
        "terminator_ids": [TERMINATOR],
        "max_length_tokens": 96,
    }


def multi_label_format(labels: dict[str, list[int]], yes: int, no: int) -> Any:
    """A footer for labels whose tokens are followed by one token for yes or no, and the terminator."""
    completions = {
        answer_key(label, applies): [*ids, yes if applies else no, TERMINATOR]
        for label, ids in labels.items()
        for applies in (True, False)
    }
    return prompt_format("multi_label", completions, list(labels))


def write_split(path: Path, footer: Any, rows: list[dict[str, Any]]) -> None:
    """Write rows, null where a row has nothing for a column; ids count from 0."""
    with open_table(path, SCHEMA, {"prompt_format": footer}) as table:
        for index, row in enumerate(rows):
            table.add(dict.fromkeys(SCHEMA.names) | {"id": f"row-{index}"} | row)
