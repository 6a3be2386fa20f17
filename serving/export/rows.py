"""The test rows that an export is compared with its adapter on."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from serving.common.adapter import Adapter
from stages.common.base import file_sha256
from stages.common.errors import UserError
from stages.common.tables import read_table, table_metadata

TEST_SPLIT = Path("data/splits/test.parquet")


class TestRows(NamedTuple):
    """Rows of a split file.

    Attributes:
        path: the file.
        sha256: of the file.
        texts: as `ingest` left them; of a chat not of use.
        prompts: the whole prompts as texts, control tokens in their public spelling.
        prompt_ids: their token ids.
        references: token ids of the true answers, the terminator last; empty lists with several labels for a row.
    """

    path: Path
    sha256: str
    texts: list[str]
    prompts: list[str]
    prompt_ids: list[list[int]]
    references: list[list[int]]


def read_test_rows(path: Path, adapter: Adapter) -> TestRows:
    """Read the rows of a split file.

    Args:
        path: a file of data/splits.
        adapter: whose prompts they have to be.

    Raises:
        UserError: the file is absent, damaged or empty, or its prompts are another adapter's.
    """
    if not path.is_file():
        raise UserError(
            f"{path}: not found, and without test rows nothing shows that an export answers as its adapter does. `dvc "
            "pull data/splits` fetches them, `dvc repro split` makes them, and --rows names another split file."
        )
    if table_metadata(path, "prompt_format") != adapter.prompt_format.to_json():
        raise UserError(
            f"{path}: its prompts are not made as those of {adapter.folder} (prompt.json). Give with --rows a split "
            "file of the commit that made this adapter, or `dvc checkout` that commit's."
        )
    columns = read_table(path, ["text", "prompt", "prompt_ids", "completion_ids"]).to_pydict()
    if not columns["prompt_ids"]:
        raise UserError(f"{path}: holds no rows to compare on. Give another split file with --rows.")
    references = [ids or [] for ids in columns["completion_ids"]]
    return TestRows(path, file_sha256(path), columns["text"], columns["prompt"], columns["prompt_ids"], references)
