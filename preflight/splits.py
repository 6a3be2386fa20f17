"""The files in data/splits/ and data/prompts.parquet: whether they are of these parameters, and what is in them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from stages.common.contents import Part, count_parts, read_contents
from stages.common.leakage import PARTS
from stages.common.prompting.kinds import prompt_kind
from stages.common.schema.prompts import FormatPrompts
from stages.common.schema.task import ClassificationTask, Task
from stages.common.tables import open_parquet, table_metadata

SPLITS = Path("data/splits")
CONTENTS = Path("data/reports/contents.json")
PROMPTS = Path("data/prompts.parquet")


def other_parameters(footer: Mapping[str, Any], format_prompts: FormatPrompts, task: Task) -> list[str]:
    """The keys of params.yaml that a table was not made with, going by its prompt format."""
    wanted = {
        "task.kind": ("kind", prompt_kind(task)),
        "task.labels": ("labels", task.labels if isinstance(task, ClassificationTask) else []),
        "format_prompts.style": ("style", format_prompts.style),
        "format_prompts.system": ("system", format_prompts.system),
        "format_prompts.template": ("template", format_prompts.template),
        "format_prompts.max_length_tokens": ("max_length_tokens", format_prompts.max_length_tokens),
    }
    return [key for key, (name, value) in wanted.items() if (footer.get(name) or None) != (value or None)]


def read_footer(root: Path = Path()) -> dict[str, Any] | None:
    """The prompt format of data/splits/; None until the stage `split` has run."""
    paths = [root / SPLITS / f"{name}.parquet" for name in PARTS]
    if not all(path.is_file() for path in paths):
        return None
    footer: dict[str, Any] = table_metadata(paths[0], "prompt_format")
    return footer


def read_shortened(root: Path = Path()) -> tuple[int, int] | None:
    """How many rows of data/prompts.parquet were shortened, and how many rows it has; None when it is not here."""
    path = root / PROMPTS
    if not path.is_file():
        return None
    with open_parquet(path) as table:
        shortened = table.read(["shortened"])["shortened"]
    return int(pc.sum(shortened).as_py() or 0), len(shortened)


def read_parts(footer: Mapping[str, Any], begin_id: int | None, root: Path = Path()) -> dict[str, Part]:
    """What is in data/splits/: as the stage `split` has written it down, or counted where these files are others.

    Args:
        footer: the prompt format.
        begin_id: id of the tokenizer's begin token; None when it has none or is not known.
        root: the repository's root.
    """
    parts = read_contents(root / CONTENTS, root / SPLITS, begin_id)
    return parts if parts is not None else count_parts(root / SPLITS, footer, begin_id)
