"""An adapter's folder and the decision rule that belongs to it: read and checked before any model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from stages.common.base import BASE_FOLDER, BASE_PIN
from stages.common.errors import UserError, listing
from stages.common.prompting.kinds import GENERATION_KINDS
from stages.common.prompting.prompts import PromptFormat
from stages.common.tables import read_json, write_json

ADAPTER = Path("models/adapter")
DECISION = Path("models/decision.json")
NEEDED_FILES = (
    *("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"),
    *("prompt.json", "base.json"),
)
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
        folder: holds PEFT's files, the tokenizer, prompt.json and base.json.
        prompt_format: how texts become prompts.
        rule: how probabilities become labels, as models/decision.json says it; None where nothing says it.
    """

    folder: Path
    prompt_format: PromptFormat
    rule: dict[str, Any] | None

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


def read_adapter(folder: Path, decision: Path | None = None) -> Adapter:
    """Read the folder, and the decision rule where there is one.

    Args:
        folder: as `finetune` writes it, wherever it was obtained.
        decision: the file with its decision rule. None: models/decision.json for models/adapter, if it is there; no
            rule for any other folder, since that file would be another adapter's.

    Raises:
        UserError: the folder holds no adapter, lacks a file or has a damaged one; or the rule is no rule for it.
    """
    prompt_format = _read_prompt_format(folder)
    if decision is None:
        rule = _read_rule(DECISION, prompt_format) if is_ours(folder) and DECISION.is_file() else None
    elif not decision.is_file():
        raise UserError(f"{decision}: not found. `dvc pull {DECISION}` fetches the one of {ADAPTER}.")
    else:
        rule = _read_rule(decision, prompt_format)
    return Adapter(folder, prompt_format, rule)


def _read_prompt_format(folder: Path) -> PromptFormat:
    missing = [name for name in NEEDED_FILES if not (folder / name).is_file()]
    if len(missing) == len(NEEDED_FILES):
        raise UserError(f"{folder}: there is no adapter. {_remedy(folder)}")
    if missing:
        raise UserError(f"{folder}: lacks {listing(missing)}. {_remedy(folder)}")
    values = read_json(folder / "prompt.json")
    kind = values.get("kind") if isinstance(values, dict) else None
    if kind not in RULES:
        raise UserError(
            f"{folder / 'prompt.json'}: is for a task of the kind {kind!r}; known here are {', '.join(RULES)}. Use the "
            f"version of this repository that made the adapter. If the file is damaged: {_remedy(folder)}"
        )
    try:
        return PromptFormat.from_json(values)
    except TypeError as error:
        raise UserError(
            f"{folder / 'prompt.json'}: is damaged, or of another version of this repository ({error}). "
            f"{_remedy(folder)}"
        ) from None


def _remedy(folder: Path) -> str:
    if is_ours(folder):
        return f"`dvc pull {ADAPTER}` fetches the one that dvc.lock names; `dvc repro finetune` makes it."
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
    if not _fits(rule, prompt_format.labels):
        named = [rule["positive_label"]] if "positive_label" in rule else list(rule.get("thresholds", {}))
        raise UserError(
            f"{path}: has thresholds of {listing([repr(label) for label in named])}, but this adapter's labels are "
            f"{listing([repr(label) for label in prompt_format.labels])}. {other}"
        )
    return rule


def _fits(rule: dict[str, Any], labels: list[str]) -> bool:
    """Whether a rule's thresholds are of these labels; a rule without thresholds always fits."""
    if rule["rule"] == "threshold":
        return len(labels) == 2 and rule.get("positive_label") in labels and "threshold" in rule
    return rule["rule"] != "thresholds" or set(rule.get("thresholds", {})) == set(labels)


def pin_base(folder: Path) -> str | None:
    """See to it that models/base.json pins the base that the adapter in `folder` was trained on.

    `load_model` fetches and verifies the base by that file, an output of the stage `base_model`. Where only the adapter
    was pulled it is written from the adapter's own copy, which is the same but for a base that was a local folder.

    Returns:
        What was done, for people; None when there was nothing to do.

    Raises:
        UserError: another base is pinned, or the base was a folder on another machine.
    """
    base = read_json(folder / "base.json")
    if not isinstance(base, dict) or not {"source", "files"} <= base.keys():
        raise UserError(f"{folder / 'base.json'}: pins no base model. {_remedy(folder)}")
    if BASE_PIN.is_file():
        if read_json(BASE_PIN)["files"] != base["files"]:
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
