"""Reading params.yaml: every mistake is found, all at once, with its key; `stages.common.schema` has the blocks."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.common.errors import UserError
from stages.common.schema.base_model import BaseModelSource
from stages.common.schema.consistency import contradictions
from stages.common.schema.describing import describe
from stages.common.schema.fields import Block
from stages.common.schema.finetune import Finetune
from stages.common.schema.ingest import Ingest
from stages.common.schema.measuring import Evaluate, Infer
from stages.common.schema.prompts import FormatPrompts, Split
from stages.common.schema.task import Task

PARAMS_PATH = Path("params.yaml")


class Params(Block):
    """All of params.yaml, or the blocks that were asked for: reading another one is an AttributeError."""

    task: Task
    base_model: BaseModelSource
    ingest: Ingest
    format_prompts: FormatPrompts
    split: Split
    finetune: Finetune
    infer: Infer
    evaluate: Evaluate


def load_params(*blocks: str, path: Path = PARAMS_PATH) -> Params:
    """Read the named blocks of params.yaml.

    A stage names exactly the blocks that `dvc.yaml` lists for it, so that it cannot read what DVC does not watch, and
    a mistake in another stage's block does not stop it.

    Args:
        blocks: names of blocks; none means all of them.
        path: the file.

    Raises:
        UserError: the file cannot be read, or has missing, unknown or wrong keys; all of them are named.
    """
    values = _read_yaml(path)
    types = get_type_hints(Params, include_extras=True)
    wanted = {name: types[name] for name in blocks or Params.model_fields}
    problems = [f"{name}: unknown block{_suggestion(name, list(types))}" for name in values if name not in types]
    loaded = {}
    for name, block_type in wanted.items():
        if name not in values:
            problems.append(f"{name}: this block is missing")
            continue
        try:
            loaded[name] = TypeAdapter(block_type).validate_python(values[name])
        except ValidationError as error:
            problems += describe(name, values[name], error.errors())
    params = Params.model_construct(**loaded)
    if not problems:
        problems = contradictions(params)
    if problems:
        listed = "\n  ".join(dict.fromkeys(problems))
        raise UserError(f"{path} is not usable:\n  {listed}\nComplete examples are in recipes/.")
    return params


def _read_yaml(path: Path) -> dict[str, Any]:
    # YAML 1.2, as DVC reads it: `no` is a text and 1e-3 a number. The safe loader makes plain values only.
    try:
        values = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: not found. Run this in the repository's root, or copy a file of recipes/ to it."
        ) from None
    except (YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: is not valid YAML in UTF-8: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no keys. Complete examples are in recipes/.")
    return values


def _suggestion(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"
