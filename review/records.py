"""What Git keeps of a run, checked as it is read: params.yaml, dvc.lock, and the JSON files of metrics/."""

from __future__ import annotations

import json
import math
from typing import Any, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from review.differences import flatten
from stages.common.errors import UserError, listing


class Locked(NamedTuple):
    """What dvc.lock says of all stages.

    Attributes:
        outputs: hash of each output, by path.
        inputs: hash of each dependency, by path.
        parameters: blocks of params.yaml with which the stages ran.
    """

    outputs: dict[str, str]
    inputs: dict[str, str]
    parameters: dict[str, Any]


def read_yaml(name: str, path: str, content: bytes | None) -> dict[str, Any] | None:
    """The keys of a YAML file; None where there is no file.

    Args:
        name: of the side, for messages.
        path: of the file, for messages.
        content: of the file, or None.

    Raises:
        UserError: it is not valid, or holds no keys.
    """
    if content is None:
        return None
    try:
        values = YAML(typ="safe", pure=True).load(content.decode("utf-8"))
    except (YAMLError, UnicodeDecodeError) as error:
        problem = " ".join(str(error).split())[:200]
        raise UserError(f"{name}: {path} is not valid YAML in UTF-8 (an open merge conflict?): {problem}") from None
    if not isinstance(values, dict):
        raise UserError(f"{name}: {path} holds no keys. Restore it with `git checkout`.")
    return values


def locked(name: str, lock: dict[str, Any]) -> Locked:
    """Outputs, inputs and parameters of all stages.

    Args:
        name: of the side, for messages.
        lock: the content of dvc.lock, with at least one stage.

    Raises:
        UserError: it is not as DVC writes it.
    """
    try:
        stages = list(lock["stages"].values())
        hashes = [
            {entry["path"]: entry["md5"] for stage in stages for entry in stage.get(kind, []) if "md5" in entry}
            for kind in ("outs", "deps")
        ]
        blocks = [stage.get("params", {}).get("params.yaml", {}) for stage in stages]
        return Locked(hashes[0], hashes[1], {key: value for block in blocks for key, value in block.items()})
    except (AttributeError, KeyError, TypeError):
        raise UserError(
            f"{name}: dvc.lock is not as DVC writes it (a merge conflict?). Restore it with `git checkout`, or run "
            "`dvc repro`."
        ) from None


def read_metrics(name: str, path: str, content: bytes | None) -> dict[str, dict[str, Any]]:
    """The blocks of a metrics file; none where there is no file. Arguments as for `read_yaml`.

    Raises:
        UserError: it is not valid, or holds anything but finite numbers.
    """
    blocks = _read_json(name, path, content)
    wrong = [key for key, value in flatten(blocks).items() if value != {} and not is_number(value)]
    for key, block in blocks.items():
        per_class = block.get("per_class", {}) if isinstance(block, dict) else None
        if per_class is None:
            wrong.append(key)
        elif not isinstance(per_class, dict):
            wrong.append(f"{key}.per_class")
        else:
            wrong += [
                f"{key}.per_class.{label}"
                for label, scores in per_class.items()
                if not isinstance(scores, dict) or not {"f1", "support"} <= scores.keys()
            ]
    if wrong:
        raise UserError(
            f"{name}: {path} has something else than finite numbers in {listing(list(dict.fromkeys(wrong)), 3)}. "
            "Restore it, or run `dvc repro evaluate`."
        )
    return blocks


def read_noise(name: str, path: str, content: bytes | None) -> dict[str, Any]:
    """The content of metrics/noise.json; nothing where there is no file. Arguments as for `read_yaml`.

    Raises:
        UserError: it is not as `review.noise` writes it.
    """
    noise = _read_json(name, path, content)
    if not noise:
        return {}
    wanted = {"seeds": list, "metrics": dict, "parameters": dict}
    lacking = [key for key, of_type in wanted.items() if not isinstance(noise.get(key), of_type)]
    if not lacking:
        lacking = [] if "finetune" in noise["parameters"] else ["parameters.finetune"]
        lacking += [
            f"metrics.{metric}.standard_deviation"
            for metric, spread in noise["metrics"].items()
            if not isinstance(spread, dict) or not is_number(spread.get("standard_deviation"))
        ]
    if lacking:
        raise UserError(
            f"{name}: {path} lacks {listing(lacking, 3)}, or has it in another form. `python -m review.noise` writes "
            "it again."
        )
    return noise


def is_number(value: Any) -> bool:
    """Whether it is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _read_json(name: str, path: str, content: bytes | None) -> dict[str, Any]:
    if content is None:
        return {}
    try:
        values = json.loads(content)
    except ValueError as error:
        raise UserError(f"{name}: {path} is not valid JSON (an open merge conflict?): {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{name}: {path} holds no blocks. Restore it, or run `dvc repro evaluate`.")
    return values
