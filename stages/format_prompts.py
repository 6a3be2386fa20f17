"""From records to prompts and completions, as text and as tokens, within the token budget."""

from __future__ import annotations

from array import array
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from stages.common.errors import UserError, listing, run_stage
from stages.common.params import load_params
from stages.common.progress import progress
from stages.common.prompting.prompts import PromptFormat, build_format, encode_prompts
from stages.common.prompting.tokenizer import PromptTokenizer, load_prompt_tokenizer
from stages.common.tables import iter_batches, open_table, read_table, row_count, write_json

RECORDS = Path("data/records.parquet")
EXEMPLARS = Path("data/exemplars.parquet")
TOKENIZER = Path("models/tokenizer")
PROMPTS = Path("data/prompts.parquet")
REPORT = Path("data/reports/format_prompts.json")
MOST_IDS_LISTED = 100

_KEPT = ["id", "text", "label", "group", "split"]
SCHEMA = pa.schema(
    [
        *((name, pa.string()) for name in _KEPT),
        ("prompt", pa.string()),
        ("completion", pa.string()),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completion_ids", pa.list_(pa.int32())),
        ("shortened", pa.bool_()),
    ]
)


def main() -> None:
    """Format data/records.parquet."""
    params = load_params("task", "format_prompts")
    tokenizer = load_prompt_tokenizer(TOKENIZER)
    exemplars = read_table(EXEMPLARS, ["text", "label"]).to_pylist()
    prompt_format = build_format(
        style=params.format_prompts.style,
        system=params.format_prompts.system,
        template=params.format_prompts.template,
        max_length_tokens=params.format_prompts.max_length_tokens,
        labels=params.task.labels,
        label_descriptions=params.task.label_descriptions,
        exemplars=exemplars,
        tokenizer=tokenizer,
    )
    report = format_table(RECORDS, PROMPTS, prompt_format, tokenizer)
    if report["shortened_share"] > params.format_prompts.max_shortened_share:
        raise UserError(
            f"format_prompts.max_length_tokens: {report['shortened']:,} of {report['rows']:,} texts are longer than "
            f"{report['max_length_tokens']} tokens allow, ids {listing(report['shortened_ids'])}. Raise it (it costs "
            "time and memory), or allow a larger format_prompts.max_shortened_share."
        )
    write_json(REPORT, report)
    tokens = report["prompt_tokens"]
    print(
        f"format_prompts: {report['rows']:,} rows, {report['shortened']:,} texts shortened "
        f"({report['shortened_share']:.1%}), tokens in a prompt: median {tokens['p50']}, 95 % at most "
        f"{tokens['p95']}, longest {tokens['max']}"
    )


def format_table(
    records: Path, prompts: Path, prompt_format: PromptFormat, tokenizer: PromptTokenizer
) -> dict[str, Any]:
    """Format the table `records` into the table `prompts`, a batch in memory at a time.

    Returns:
        The stage's report: rows, shortened (count, share, the first 100 ids) and quantiles of the prompts' lengths in
        tokens.

    Raises:
        UserError: there are no records.
    """
    lengths = array("i")
    shortened = 0
    shortened_ids: list[str] = []
    rows = row_count(records)
    if rows == 0:
        raise UserError(f"{records}: holds no rows. Look into data/raw/ and ingest.columns, then run `dvc repro`.")
    metadata = {"prompt_format": prompt_format.to_json()}
    with open_table(prompts, SCHEMA, metadata) as table, progress(rows, "formatting prompts") as bar:
        for batch in iter_batches(records, columns=_KEPT):
            formatted = format_batch(batch, prompt_format, tokenizer)
            table.add_batch(formatted)
            lengths.extend(formatted["prompt_ids"].value_lengths().to_pylist())
            shortened_rows = formatted.filter(formatted["shortened"])
            shortened += shortened_rows.num_rows
            shortened_ids += shortened_rows["id"].slice(0, MOST_IDS_LISTED - len(shortened_ids)).to_pylist()
            bar.update(batch.num_rows)
    p50, p95, longest = np.quantile(lengths, [0.5, 0.95, 1], method="inverted_cdf")
    return {
        "rows": rows,
        "shortened": shortened,
        "shortened_share": shortened / rows,
        "shortened_ids": shortened_ids,
        "prompt_tokens": {"p50": int(p50), "p95": int(p95), "max": int(longest)},
        "max_length_tokens": prompt_format.max_length_tokens,
    }


def format_batch(batch: pa.RecordBatch, prompt_format: PromptFormat, tokenizer: PromptTokenizer) -> pa.RecordBatch:
    """The batch's records with their prompts and completions; columns as in SCHEMA, rows in the same order."""
    encoded = encode_prompts(prompt_format, tokenizer, batch["text"].to_pylist())
    completions = [prompt_format.completions[label] for label in batch["label"].to_pylist()]
    columns = {
        "prompt": [prompt.text for prompt in encoded],
        "completion": [completion["text"] for completion in completions],
        "prompt_ids": [prompt.ids for prompt in encoded],
        "completion_ids": [completion["ids"] for completion in completions],
        "shortened": [prompt.shortened for prompt in encoded],
    }
    made = [pa.array(values, SCHEMA.field(name).type) for name, values in columns.items()]
    return pa.RecordBatch.from_arrays([*(batch[name] for name in _KEPT), *made], schema=SCHEMA)


if __name__ == "__main__":
    run_stage(main)
