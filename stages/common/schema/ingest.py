"""The block `ingest`: where rows come from, and what becomes of their columns."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import Field, model_validator

from stages.common.schema.fields import Block, Count, Member, Requirement, Seed, Sha256, Share, Text


class TableFormat(Block):
    """How to read the source's tables where their names and first rows do not say it."""

    type: Literal["csv", "tsv", "jsonl", "parquet"]
    column_names: Annotated[list[Text], Field(min_length=1)] | None = Field(description="null: the first row has them")
    quoting: bool | None = Field(description='csv and tsv: whether " quotes a cell; null with other types')
    encoding: Text | None = Field(description="null with parquet")

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> TableFormat:
        delimited = self.type in ("csv", "tsv")
        if delimited == (self.quoting is None) or (self.column_names is not None and not delimited):
            raise ValueError(
                "quoting and column_names: for csv and tsv (quoting: true or false); null with other types"
            )
        if (self.type == "parquet") != (self.encoding is None):
            raise ValueError("encoding: needed, and null with parquet")
        return self


Paths = Annotated[list[Text], Field(min_length=1)]
# Files of a published split under its name, or files without one.
SplitPaths = Paths | dict[Literal["train", "validation", "test"], Paths]


class FilesSource(Block):
    """Files below data/raw/, by name or pattern; `dvc.yaml` watches that folder."""

    kind: Literal["files"]
    paths: SplitPaths
    format: TableFormat | None = Field(description="null: from the file names, in UTF-8, the first row naming columns")

    @model_validator(mode="after")
    def _below_data_raw(self) -> FilesSource:
        for path in split_paths(self.paths):
            pure = PurePosixPath(path)
            if pure.parts[:2] != ("data", "raw") or ".." in pure.parts:
                raise ValueError(f"paths: {path!r} does not lie below data/raw/, the folder whose changes are noticed")
        return self


class HubSource(Block):
    """Files of a data set repository on the Hugging Face Hub, at a commit."""

    kind: Literal["hub"]
    repo_id: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    revision: Text = Field(description="the 40 hexadecimal digits of a commit")
    paths: SplitPaths
    format: TableFormat | None

    @model_validator(mode="after")
    def _inside_the_repository(self) -> HubSource:
        for path in split_paths(self.paths):
            pure = PurePosixPath(path)
            if pure.is_absolute() or ".." in pure.parts:
                raise ValueError(f"paths: {path!r} does not lie in the repository")
        return self


class PackageSource(Block):
    """A file inside a published Python package, which may lie in an archive inside it."""

    kind: Literal["package"]
    requirement: Requirement
    distribution: Literal["wheel", "sdist"]
    sha256: Sha256
    member: Member
    format: TableFormat | None


class AliasLabel(Block):
    """Labels made from a column through a mapping: what the data calls it → what task.labels calls it."""

    column: Text
    aliases: Annotated[dict[str, Text], Field(min_length=1)]


class BinLabel(Block):
    """Labels made from a number: bin i of n, edges[i-1] < value <= edges[i] (right-closed, as in pandas.cut)."""

    column: Text
    bins: Annotated[list[float], Field(min_length=1)]

    @model_validator(mode="after")
    def _increasing(self) -> BinLabel:
        if any(low >= high for low, high in zip(self.bins, self.bins[1:], strict=False)):
            raise ValueError(f"bins: {self.bins} must increase")
        return self


class ListLabel(Block):
    """Several labels from one cell, for multi_label; an empty cell (or list) is a text that no label fits."""

    column: Text
    separator: Text | None = Field(description="between the labels of a cell; null: the cell is a list")
    aliases: Annotated[dict[str, Text], Field(min_length=1)] | None = Field(description="as with one label; or null")


class Conversation(Block):
    """A column with the turns of a conversation, as ShareGPT or OpenAI's API write them."""

    column: Text
    format: Literal["sharegpt", "messages"] = Field(description="from and value (human, gpt), or role and content")


class Columns(Block):
    """Where each field of a record comes from: a column's name, or a pattern over columns as "{title}: {abstract}"."""

    id: str | None = Field(description="null: FILE:ROW")
    text: Text | Conversation = Field(description="the text or question; or whole conversations")
    label: Text | AliasLabel | BinLabel | ListLabel | None = Field(
        description="the label, or the answer to the question; null with conversations, which end in the answer"
    )
    group: str | None = Field(description="rows with one value stay in one part; null: rows with the same text do")
    split: str | None = Field(description="a column with train, validation or test; null: none is published")
    slice: str | None = Field(description="metrics are also given for the rows of each value of it; or null")


AnySource = Annotated[FilesSource | HubSource | PackageSource, Field(discriminator="kind")]
Rows = Count | dict[Literal["train", "validation", "test"], Count]


class FurtherSource(Block):
    """Rows of another source, mixed with those of the first."""

    source: AnySource
    columns: Columns
    rows: Rows | None


class Ingest(Block):
    """From the source's tables to one typed table."""

    source: AnySource
    columns: Columns
    rows: Rows | None = Field(description="so many rows, chosen at random, of each published split named; null: all")
    further_sources: list[FurtherSource] = Field(description="mixed with the first; empty: none")
    max_refused_share: Share = Field(description="the stage fails when a larger share of rows is refused")
    exemplars_per_label: Annotated[int, Field(ge=0)] = Field(description="rows set aside for the prompt, in no split")
    seed: Seed = Field(description="chooses the rows and the exemplars")


def split_paths(paths: SplitPaths) -> list[str]:
    """All paths of a source, whichever part they belong to."""
    return [path for group in paths.values() for path in group] if isinstance(paths, dict) else list(paths)
