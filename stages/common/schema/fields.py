"""What all blocks of params.yaml are made of.

No field of a block has a default and no validator changes a value: what a stage computes depends on params.yaml alone,
never on these files. That is why the digests in `stages.code` leave them out (tests hold both promises).
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Share = Annotated[float, Field(ge=0, lt=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
# It begins as a name, never as an option of pip's.
Requirement = Annotated[
    str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*==[A-Za-z0-9._!+-]+$", description="NAME==VERSION")
]
# A path inside an archive, and inside the archive found there, and so on.
Member = Annotated[list[Text], Field(min_length=1)]


class Block(BaseModel):
    """A block of params.yaml: every key is required, unknown keys are errors, types are exact."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)
