"""Reading params.yaml: every mistake is found, all at once, with its key; `stages.common.schema` has the blocks."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError
from ruamel.yaml import YAML

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
# Labels and aliases of the largest known tables are some thousands.
MOST_VALUES = 100_000


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
    values = read_yaml(path)
    types = get_type_hints(Params, include_extras=True)
    wanted = {name: types[name] for name in blocks or Params.model_fields}
    problems = [f"{name}: unknown block{_suggestion(str(name), list(types))}" for name in values if name not in types]
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


def read_yaml(path: Path) -> dict[str, Any]:
    """The values of a YAML file as they are.

    Raises:
        UserError: it cannot be read, or holds what no block of params.yaml can.
    """
    # YAML 1.2, as DVC reads it: `no` is a text and 1e-3 a number. The safe loader makes plain values only.
    try:
        values = YAML(typ="safe", pure=True).load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: not found. Run this in the repository's root, or copy a file of recipes/ to it."
        ) from None
    except OSError:
        raise
    except Exception as error:  # beside YAMLError ruamel raises whatever its constructors stumble over
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error) or type(error).__name__
        raise UserError(f"{path}: is not valid YAML in UTF-8: {reason}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: holds no keys. Complete examples are in recipes/.")
    problem = _unusable(values)
    if problem:
        raise UserError(f"{path}: {problem}")
    return values


def _unusable(values: dict[Any, Any]) -> str | None:
    """What no block can hold: texts with a NUL byte, and aliases (`*name`) that make ever more of a few lines."""
    waiting: list[tuple[str, Any]] = [("", values)]
    for _ in range(MOST_VALUES):
        if not waiting:
            return None
        if len(waiting) > MOST_VALUES:
            break
        place, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(f"{place}.{key}".lstrip(".")[:200], item) for key, item in value.items()]
            waiting += [(f"{place}: a key"[:200], key) for key in value]
        elif isinstance(value, list | tuple | set):
            waiting += [(f"{place}.{number}"[:200], item) for number, item in enumerate(value)]
        elif isinstance(value, str) and "\0" in value:
            return f"{place}: holds a NUL byte. Take it out."
    return f"holds more than {MOST_VALUES:,} values, aliases (*name) counted wherever they stand. Write fewer."


def _suggestion(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"
