"""Multi-label completions: for each label one answer that says yes and one that says no, from a table's footer."""

from __future__ import annotations

from typing import Any, NamedTuple


class Branches(NamedTuple):
    """Token ids of a label's two answers, terminators included; they begin alike and differ from "yes" or "no" on."""

    yes: list[int]
    no: list[int]

    @property
    def shared_tokens(self) -> int:
        """How many tokens both begin with: the label itself, which is given rather than answered."""
        pairs = enumerate(zip(self.yes, self.no, strict=False))
        # Both end in the terminator, so that the shorter one differs somewhere.
        return next(index for index, (yes, no) in pairs if yes != no)


def answer_key(label: str, yes: bool) -> str:
    """The completion, and its key in `PromptFormat.completions`, by which multi_label asks whether a label applies."""
    return f"{label}: {'yes' if yes else 'no'}"


def label_branches(prompt_format: dict[str, Any]) -> dict[str, Branches]:
    """Both answers of each label, in the order of `labels`.

    Args:
        prompt_format: the footer `prompt_format` of a multi-label split.
    """
    ids = {key: list(completion["ids"]) for key, completion in prompt_format["completions"].items()}
    return {
        label: Branches(ids[answer_key(label, yes=True)], ids[answer_key(label, yes=False)])
        for label in prompt_format["labels"]
    }
