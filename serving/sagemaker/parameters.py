"""params.yaml of a job: the image's, a recipe or a channel's, with the job's hyperparameters set in it."""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

from stages.common.errors import UserError, listing
from stages.common.params import load_params, read_yaml
from stages.common.tables import read_json

# The SDK sends some of its own, and the tuner the name of the metric that it tunes by.
FOREIGN_PREFIXES = ("sagemaker_", "_tuning_")


def read_hyperparameters(path: Path) -> dict[str, str]:
    """The job's own, without those that the SDK and the tuner add; none where there is no file.

    Raises:
        UserError: the file holds something else than an object of texts.
    """
    if not path.is_file():
        return {}
    values = read_json(path)
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise UserError(f"{path}: is no JSON object of texts, as SageMaker writes it.")
    return {name: value for name, value in values.items() if not name.startswith(FOREIGN_PREFIXES)}


def write_params(target: Path, project: Path, channels: dict[str, Path], hyperparameters: dict[str, str]) -> None:
    """Write the job's params.yaml, checked.

    Args:
        target: the file to write.
        project: holds params.yaml and recipes/.
        channels: "params" replaces params.yaml, "base" replaces base_model.
        hyperparameters: "recipe" names a file of recipes/; all others are keys of params.yaml as `finetune.max_steps`.

    Raises:
        UserError: says all that is wrong with them.
    """
    hyperparameters = dict(hyperparameters)
    values = read_yaml(_origin(project, channels.get("params"), hyperparameters.pop("recipe", None)))
    if "base" in channels:
        values["base_model"] = {"source": "folder", "path": str(channels["base"])}
    problems = [problem for name, text in hyperparameters.items() if (problem := _set(values, name, text))]
    YAML(typ="safe", pure=True).dump(values, target)
    try:
        load_params(path=target)
    except UserError as error:
        problems.append(str(error).replace(f"{target} is not usable:\n  ", ""))
    else:
        problems += _unread(values, channels)
    if problems:
        raise UserError("\n  ".join(["the job's parameters are not usable:", *problems]))


def _origin(project: Path, channel: Path | None, recipe: str | None) -> Path:
    recipes = {path.stem: path for path in sorted((project / "recipes").glob("*.yaml"))}
    if recipe is not None:
        name = str(_decoded(recipe))
        if channel is not None:
            raise UserError("hyperparameter recipe: the channel 'params' has a whole params.yaml. Give one of them.")
        if name not in recipes:
            raise UserError(f"hyperparameter recipe: {name!r} is none of {', '.join(recipes)}.")
        return recipes[name]
    if channel is None:
        return project / "params.yaml"
    files = sorted(path for path in channel.iterdir() if path.suffix in (".yaml", ".yml"))
    if len(files) != 1:
        found = listing([path.name for path in channel.iterdir()])
        raise UserError(f"channel 'params': has to hold one YAML file, a whole params.yaml; it holds {found}.")
    return files[0]


def _set(values: dict[str, Any], name: str, text: str) -> str | None:
    """Set a key; what is wrong with its name, where something is.

    The last part of the name may be new: whether it may stand there is for the schema to say.
    """
    *parents, last = name.split(".")
    block: Any = values
    for depth, part in enumerate(parents):
        if not isinstance(block, dict) or part not in block:
            close = difflib.get_close_matches(part, block if isinstance(block, dict) else [], n=1)
            return f"{name}: params.yaml has no {'.'.join(parents[: depth + 1])}" + (f"; {close[0]}?" if close else "")
        block = block[part]
    if not parents or not isinstance(block, dict):
        return f"{name}: hyperparameters are `recipe` and keys inside params.yaml's blocks, as finetune.max_steps"
    block[last] = _typed(text, block.get(last))
    return None


def _typed(text: str, current: Any) -> Any:
    """A hyperparameter's value: JSON where it is JSON, else text. Where a text stands now: null, a block or a text.

    SDKs differ in whether they quote texts, and numbers that were given as texts, once more.
    """
    value = _decoded(text)
    if isinstance(current, str) and not (value is None or isinstance(value, dict)):
        return value if isinstance(value, str) else text
    return _decoded(value) if isinstance(value, str) else value


def _decoded(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _unread(values: dict[str, Any], channels: dict[str, Path]) -> list[str]:
    """Channels that nothing would read with these parameters."""
    sources = [values["ingest"]["source"], *(further["source"] for further in values["ingest"]["further_sources"])]
    kinds = [source["kind"] for source in sources]
    problems = []
    if "data" in channels and "files" not in kinds:
        problems.append("channel 'data': nothing reads it; ingest.source.kind: files does, with paths below data/raw/")
    if "wheels" in channels and "package" not in [*kinds, values["base_model"]["source"]]:
        problems.append("channel 'wheels': neither base_model nor ingest.source is a package. Leave it out.")
    return problems
