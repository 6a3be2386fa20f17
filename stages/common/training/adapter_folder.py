"""What lies in models/adapter/ beside the weights, so that somebody who has only this folder can use and trace it."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import ModelCard, ModelCardData

from stages.common.tables import read_json, write_json, write_text


class Kind(NamedTuple):
    """What the model card says about a kind of task.

    Attributes:
        title: of the adapter, behind the base model's name.
        purpose: what it does, as the end of a sentence; may name the labels.
        pipeline_tag: the Hub's word for it. Its `question-answering` is for models that mark an answer in a given text.
        prompt_parts: what in prompt.json a prompt is made of.
        use: what to do once prompt and model are there.
    """

    title: str
    purpose: str
    pipeline_tag: str
    prompt_parts: str
    use: str


_GENERATE = (
    "generate greedily until one\nof the `terminator_ids` that `prompt.json` lists; what comes before it is the answer."
)
KINDS = {
    "classification": Kind(
        "classification adapter",
        "classifies a text as one of {labels}",
        "text-classification",
        "template, labels",
        "compare the\nlikelihoods of the labels' completions, which `prompt.json` lists as token ids.",
    ),
    "multi_label": Kind(
        "multi-label classification adapter",
        "says of each of {labels} whether it applies to a text",
        "text-classification",
        "template, labels",
        'compare, for each\nlabel, the likelihoods of its two completions "LABEL: yes" and "LABEL: no", which '
        "`prompt.json` lists as token ids:\nthe label's probability is L(yes) / (L(yes) + L(no)).",
    ),
    "question_answering": Kind(
        "question-answering adapter", "answers questions", "text-generation", "template", _GENERATE
    ),
    "chat": Kind(
        "chat adapter", "answers in conversations", "text-generation", "the base's chat template, system", _GENERATE
    ),
}
VERSIONED = ("accelerate", "bitsandbytes", "peft", "tokenizers", "torch", "transformers", "trl")


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide what training computes."""
    return {name: importlib.metadata.version(name) for name in VERSIONED}


def hardware(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """The device that trained and the precision it computed in."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": f"{device.type} ({name})", "compute_dtype": str(dtype).removeprefix("torch.")}


def write_companions(folder: Path, provenance: dict[str, Any], prompt_format: dict[str, Any], tokenizer: Path) -> None:
    """Complete a saved PEFT adapter: tokenizer, prompt format, base pin, provenance and model card.

    Args:
        folder: an adapter as PEFT saved it.
        provenance: base, data and code hashes, parameters, library versions, hardware.
        prompt_format: kind, template, labels, token budget and ends of answers, as the split files carry them.
        tokenizer: the folder whose files are copied.
    """
    for path in sorted(tokenizer.iterdir()):
        shutil.copyfile(path, folder / path.name)
    write_json(folder / "base.json", provenance["base"])
    write_json(folder / "prompt.json", prompt_format)
    write_json(folder / "provenance.json", provenance)
    write_text(folder / "README.md", str(model_card(prompt_format, provenance)) + "\n")
    _settle_configuration(folder / "adapter_config.json", provenance["base"])


def published_base(base_pin: dict[str, Any]) -> dict[str, Any]:
    """The base's pin as an adapter carries it into the world: of a folder, its name and not where it lies here."""
    source = base_pin["source"]
    if source["source"] != "folder":
        return base_pin
    return base_pin | {"source": source | {"path": Path(source["path"]).name}}


def _settle_configuration(path: Path, base_pin: dict[str, Any]) -> None:
    """Make PEFT's configuration the same on every run and, for a base from the Hub, loadable from anywhere."""
    configuration = read_json(path)
    if isinstance(configuration["target_modules"], list):
        # PEFT keeps a set, which is saved in an order that changes from process to process.
        configuration["target_modules"].sort()
    if base_pin["source"]["source"] == "hub":
        configuration["base_model_name_or_path"] = base_pin["source"]["repo_id"]
        configuration["revision"] = base_pin["commit"]
    write_json(path, configuration)


def model_card(prompt_format: dict[str, Any], provenance: dict[str, Any]) -> ModelCard:
    """The adapter's model card: metadata that the Hub reads, then what it is, how to use it and what made it.

    The metrics are not known yet when the adapter is saved; the `report` stage adds them in a copy.
    """
    source = provenance["base"]["source"]
    base_name = {
        "hub": lambda: source["repo_id"],
        "package": lambda: source["requirement"],
        "folder": lambda: Path(source["path"]).name,
    }[source["source"]]()
    kind = KINDS[prompt_format["kind"]]
    metadata = ModelCardData(
        base_model=base_name if source["source"] == "hub" else None,
        library_name="peft",
        pipeline_tag=kind.pipeline_tag,
        tags=["qlora", "lora", "dvc"],
    )
    labels = ", ".join(f"`{label}`" for label in prompt_format["labels"])
    data = provenance["data"]
    text = f"""
# {base_name}: {kind.title}

A QLoRA adapter for {base_name} that {kind.purpose.format(labels=labels)}.

## How to use it

Build the prompt from `prompt.json` ({kind.prompt_parts}, {prompt_format["max_length_tokens"]} tokens at most), load the
base model that `base.json` pins in NF4, put this adapter on it with `PeftModel.from_pretrained`, and {kind.use}

## Data

{data["train"]["rows"]:,} rows for training (SHA-256 `{data["train"]["sha256"]}`) and {data["validation"]["rows"]:,} for
validation (SHA-256 `{data["validation"]["sha256"]}`), as Parquet files of prompts and completions.

## Training

```json
{json.dumps(provenance["parameters"], indent=2, ensure_ascii=False)}
```

Trained on {provenance["hardware"]["device"]} in {provenance["hardware"]["compute_dtype"]}; `provenance.json` has the
hashes of base, data and code and the versions of the libraries, `training_log/` the losses.
"""
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n{text.rstrip()}")
