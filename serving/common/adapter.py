"""An adapter's folder, or one that it was merged into, and its decision rule: checked before any model is loaded."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from stages.common.base import BASE_FOLDER, BASE_PIN, file_sha256
from stages.common.branches import answer_key
from stages.common.errors import UserError, listing
from stages.common.prompting.kinds import GENERATION_KINDS
from stages.common.prompting.prompts import PromptFormat
from stages.common.schema.base_model import BaseModelSource
from stages.common.tables import read_json, write_json

ADAPTER = Path("models/adapter")
DECISION = Path("models/decision.json")
NEEDED_FILES = (
    *("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("prompt.json", "base.json"),
)
# What `python -m serving.merge` makes of an adapter and its base; the weights may be in several files.
NEEDED_MERGED_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "prompt.json", "parity.json")
# What lies in such a folder and decides no answer.
_UNREAD = ("README.md", "provenance.json", "parity.json", "training_log")
# The rules that `evaluate` writes for each kind of task; see docs/metrics.md.
RULES = {
    "classification": ("argmax", "threshold", "answer"),
    "multi_label": ("thresholds",),
    "question_answering": ("text",),
    "chat": ("text",),
}


class Adapter(NamedTuple):
    """What is known of an adapter without its weights.

    Attributes:
        folder: holds PEFT's files, the tokenizer, prompt.json and base.json; or a whole model, see `merged`.
        prompt_format: how texts become prompts.
        rule: how probabilities become labels, as models/decision.json says it; None where nothing says it.
        merged: whether the folder holds a model that the adapter was merged into, so that no base is needed.
    """

    folder: Path
    prompt_format: PromptFormat
    rule: dict[str, Any] | None
    merged: bool = False

    @property
    def kind(self) -> str:
        """Its kind of task, a key of RULES."""
        return self.prompt_format.kind

    @property
    def answers_with_texts(self) -> bool:
        """Whether its answers are texts, not labels."""
        return self.kind in GENERATION_KINDS


def is_ours(folder: Path) -> bool:
    """Whether it is this project's models/adapter, which params.yaml and models/decision.json belong to."""
    return folder.resolve() == ADAPTER.resolve()


def is_merged(folder: Path) -> bool:
    """Whether it holds a whole model rather than an adapter."""
    return (folder / "parity.json").is_file() and not (folder / "adapter_config.json").is_file()


def read_adapter(folder: Path, decision: Path | None = None) -> Adapter:
    """Read the folder, and the decision rule where there is one.

    Args:
        folder: as `finetune` or `python -m serving.merge` writes it, wherever it was obtained.
        decision: the file with its decision rule. None: models/decision.json for models/adapter, decision.json in a
            merged model's own folder, if it is there; no rule for any other folder, since models/decision.json would
            be another adapter's.

    Raises:
        UserError: the folder holds no adapter, lacks a file or has a damaged one; or the rule is no rule for it.
    """
    prompt_format, merged = _read_prompt_format(folder), is_merged(folder)
    found = folder / "decision.json" if merged else DECISION
    if decision is None:
        rule = _read_rule(found, prompt_format) if (merged or is_ours(folder)) and found.is_file() else None
    elif not decision.is_file():
        raise UserError(f"{decision}: not found. `dvc pull {DECISION}` fetches the one of {ADAPTER}.")
    else:
        rule = _read_rule(decision, prompt_format)
    return Adapter(folder, prompt_format, rule, merged)


def _read_prompt_format(folder: Path) -> PromptFormat:
    needed = NEEDED_MERGED_FILES if is_merged(folder) else NEEDED_FILES
    missing = [name for name in needed if not (folder / name).is_file()]
    if len(missing) == len(needed):
        raise UserError(f"{folder}: there is no adapter. {_remedy(folder)}")
    if missing:
        raise UserError(f"{folder}: lacks {listing(missing)}. {_remedy(folder)}")
    values = read_json(folder / "prompt.json")
    kind = values.get("kind") if isinstance(values, dict) else None
    if not isinstance(kind, str) or kind not in RULES:
        raise UserError(
            f"{folder / 'prompt.json'}: is for a task of the kind {kind!r}; known here are {', '.join(RULES)}. Use the "
            f"version of this repository that made the adapter. If the file is damaged: {_remedy(folder)}"
        )
    try:
        # The first refuses keys that are unknown or missing, the second values of other types.
        PromptFormat.from_json(values)
        prompt_format = TypeAdapter(PromptFormat).validate_python(values)
    except (TypeError, ValidationError) as error:
        problem = str(error) if isinstance(error, TypeError) else _first_problem(error)
    else:
        missing = _missing_parts(prompt_format)
        if not missing:
            return prompt_format
        problem = f"without {listing(missing)}"
    raise UserError(
        f"{folder / 'prompt.json'}: is damaged, or of another version of this repository ({problem}). {_remedy(folder)}"
    )


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    return f"{'.'.join(map(str, problem['loc']))}: {problem['msg']}"


def _missing_parts(prompt_format: PromptFormat) -> list[str]:
    """What `format_prompts` always writes for this kind of task, and is not there."""
    needed = ["terminator_ids"]
    if prompt_format.kind not in GENERATION_KINDS:
        needed.append("labels")
    if prompt_format.kind != "chat":
        needed.append("template")
    answers = prompt_format.labels
    if prompt_format.kind == "multi_label":
        answers = [answer_key(label, yes) for label in answers for yes in (True, False)]
    return [name for name in needed if not getattr(prompt_format, name)] + [
        f"the tokens of {answer!r}" for answer in answers if not prompt_format.completions.get(answer, {}).get("ids")
    ]


def _remedy(folder: Path) -> str:
    if is_ours(folder):
        return f"`dvc pull {ADAPTER}` fetches the one that dvc.lock names; `dvc repro finetune` makes it."
    if is_merged(folder):
        return "`python -m serving.merge` makes a merged model; otherwise obtain the whole folder again."
    return "Obtain the whole folder again, or name another one with --adapter."


def _read_rule(path: Path, prompt_format: PromptFormat) -> dict[str, Any]:
    """The adapter's rule in models/decision.json.

    Raises:
        UserError: the file is damaged, or its rule is for another kind of task or other labels.
    """
    values = read_json(path)
    rule = values.get("adapter") if isinstance(values, dict) else None
    if not isinstance(rule, dict) or "rule" not in rule:
        raise UserError(f"{path}: holds no decision rule of an adapter. `dvc pull {DECISION}` fetches it again.")
    other = (
        f"So it belongs to another adapter: fetch the one of the same commit (`dvc pull {DECISION}`), or move it away "
        "to decide without thresholds."
    )
    if rule["rule"] not in RULES[prompt_format.kind]:
        raise UserError(
            f"{path}: its rule is {rule['rule']!r}, but this adapter's task is {prompt_format.kind!r}. {other}"
        )
    if rule["rule"] in ("threshold", "thresholds") and not _has_thresholds(rule):
        raise UserError(f"{path}: its rule has no numbers for thresholds. `dvc pull {DECISION}` fetches it again.")
    if not _fits(rule, prompt_format.labels):
        named = [rule["positive_label"]] if rule["rule"] == "threshold" else list(rule["thresholds"])
        raise UserError(
            f"{path}: has thresholds of {listing([repr(label) for label in named])}, but this adapter's labels are "
            f"{listing([repr(label) for label in prompt_format.labels])}. {other}"
        )
    return rule


def _has_thresholds(rule: dict[str, Any]) -> bool:
    if rule["rule"] == "threshold":
        return isinstance(rule.get("positive_label"), str) and isinstance(rule.get("threshold"), int | float)
    thresholds = rule.get("thresholds")
    return isinstance(thresholds, dict) and all(isinstance(value, int | float) for value in thresholds.values())


def _fits(rule: dict[str, Any], labels: list[str]) -> bool:
    """Whether a rule's thresholds are of these labels; a rule without thresholds always fits."""
    if rule["rule"] == "threshold":
        return len(labels) == 2 and rule["positive_label"] in labels
    return rule["rule"] != "thresholds" or set(rule["thresholds"]) == set(labels)


def answers_sha256(adapter: Adapter, *, with_rule: bool = False) -> str:
    """One digest over what decides an adapter's answers: weights, tokenizer, prompts and its base's files.

    Args:
        adapter: its folder.
        with_rule: whether its decision rule counts, wherever that was read.
    """
    digest = hashlib.sha256(json.dumps(adapter.rule, sort_keys=True).encode() if with_rule else b"")
    for path in sorted(adapter.folder.rglob("*")):
        name = path.relative_to(adapter.folder)
        if path.is_file() and name.parts[0] not in _UNREAD and not any(part.startswith(".") for part in name.parts):
            # Of the base's pin the files alone: the same base may come from elsewhere.
            pin = repr(sorted(read_json(path)["files"].items())) if name == Path("base.json") else file_sha256(path)
            digest.update(f"{name.as_posix()}\0{pin}\0".encode())
    return digest.hexdigest()


def pin_base(folder: Path) -> str | None:
    """See to it that models/base.json pins the base that the adapter in `folder` was trained on.

    `load_model` fetches and verifies the base by that file, an output of the stage `base_model`. Where only the adapter
    was pulled it is written from the adapter's own copy, which is the same but for a base that was a local folder.

    Returns:
        What was done, for people; None when there was nothing to do.

    Raises:
        UserError: another base is pinned, a pin is damaged, or the base was a folder on another machine.
    """
    base = _read_pin(folder / "base.json", _remedy(folder))
    if BASE_PIN.is_file():
        restore = f"`dvc checkout {BASE_PIN}` restores it; where it is absent the adapter's own is used."
        if _read_pin(BASE_PIN, restore)["files"] != base["files"]:
            raise UserError(
                f"{folder}: was trained on another base model than {BASE_PIN} pins. If {BASE_PIN} is out of date, `dvc "
                f"pull {BASE_PIN}`; otherwise use the adapter in a clone of its own, or move {BASE_PIN} and "
                f"{BASE_FOLDER} away (`dvc checkout {BASE_PIN}` brings the first back, the second is fetched again)."
            )
        return None
    source = base["source"]
    if source["source"] == "folder" and not BASE_FOLDER.is_dir():
        raise UserError(
            f"{folder}: its base model was the folder {source['path']!r} on the machine that trained it, which nobody "
            f"can fetch from here. Put that folder's files into {BASE_FOLDER} (they are verified), or, where it lies "
            f"on this machine under the same path, `dvc pull {BASE_PIN}`."
        )
    write_json(BASE_PIN, base)
    return f"{BASE_PIN} is absent: written from {folder / 'base.json'}"


def _read_pin(path: Path, remedy: str) -> dict[str, Any]:
    """What `base_model` wrote: the source of a base, and the SHA-256 of its files.

    Raises:
        UserError: that is not what the file holds; ends in the remedy.
    """
    pin = read_json(path)
    try:
        TypeAdapter(dict[str, Any]).validate_python(pin)
        TypeAdapter(BaseModelSource).validate_python(pin.get("source"))
        TypeAdapter(dict[str, str]).validate_python(pin.get("files"))
    except ValidationError:
        raise UserError(f"{path}: pins no base model. {remedy}") from None
    return dict(pin)
