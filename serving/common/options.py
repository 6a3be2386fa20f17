"""What several commands refuse in their options."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from stages.common.errors import UserError

if TYPE_CHECKING:
    from serving.common.adapter import Adapter


def refuse_empty(options: argparse.Namespace, names: tuple[str, ...]) -> None:
    """Refuse empty values, as of a shell's variable that is not set.

    Args:
        options: what the command line says.
        names: of those that may be left out but not be empty.

    Raises:
        UserError: names the option.
    """
    for name in names:
        if getattr(options, name) == "":
            raise UserError(f"--{name.replace('_', '-')}: is empty. Give it a value, or leave it out.")


def refuse_decision(options: argparse.Namespace, adapter: Adapter) -> None:
    """Refuse --decision where there is nothing to decide.

    Raises:
        UserError: the adapter answers with texts.
    """
    if options.decision is not None and adapter.answers_with_texts:
        raise UserError(f"--decision: {adapter.folder} answers with texts, which no threshold decides. Leave it out.")
