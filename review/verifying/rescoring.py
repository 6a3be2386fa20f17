"""A random sample of a commit's rows, predicted again by the commit's own stage `infer`.

The sample takes the place of the splits in a folder of its own, so that nothing here knows how rows are scored.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from review.recompute import PARAMS, copy_into, run_in
from stages.common.base import BASE_FOLDER, BASE_PIN, TOKENIZER_FOLDER
from stages.common.tables import open_parquet, row_count

ADAPTER = Path("models/adapter")
SPLITS = {part: Path(f"data/splits/{part}.parquet") for part in ("validation", "test")}
PREDICTIONS = "data/predictions/{}/{}.parquet"
# What the stage is told to predict with each.
PREDICTORS: dict[str, list[str]] = {"adapter": [], "base": ["base"]}


def sampled_rows(count: int, seed: int) -> dict[str, np.ndarray]:
    """Row numbers of each part, in rising order: `count` of them, or all where there are fewer."""
    generator = np.random.default_rng(seed)
    sizes = {part: row_count(path) for part, path in SPLITS.items()}
    return {part: np.sort(generator.choice(size, min(count, size), replace=False)) for part, size in sizes.items()}


def rescore(rows: dict[str, np.ndarray], folder: Path, base: Path | None) -> None:
    """Predict the sampled rows; the current folder is the commit's.

    Args:
        rows: of each part.
        folder: an empty one, in which the predictions then lie as in the commit's.
        base: where the base model's files are; None: they are fetched from the source that models/base.json pins.

    Raises:
        UserError: the base cannot be had, or the model cannot be run.
    """
    copy_into(folder, [PARAMS, BASE_PIN, TOKENIZER_FOLDER, ADAPTER])
    if base is not None:
        (folder / BASE_FOLDER).symlink_to(base)
    for part, path in SPLITS.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(take_rows(path, rows[part]), folder / path)
    for arguments in PREDICTORS.values():
        run_in(folder, "infer", *arguments)


def take_rows(path: Path, rows: np.ndarray) -> pa.Table:
    """Some rows of a table, with its footer.

    Args:
        path: of the table.
        rows: their numbers, in rising order.
    """
    taken, start = [], 0
    with open_parquet(path) as table:
        for batch in table.iter_batches():
            here = rows[(rows >= start) & (rows < start + batch.num_rows)] - start
            taken.append(batch.take(pa.array(here)))
            start += batch.num_rows
        found = pa.Table.from_batches(taken, schema=table.schema_arrow)
        return found.replace_schema_metadata(table.schema_arrow.metadata)
