"""The model card of each kind of task, and what an adapter says about its base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from stages.common.training.adapter_folder import model_card, published_base
from tests.split_files import multi_label_format, prompt_format

FOLDER = {"source": {"source": "folder", "path": "/home/somebody/models/llama"}, "files": {"config.json": "0" * 64}}
HUB = {"source": {"source": "hub", "repo_id": "some/base", "revision": "1" * 40}, "commit": "1" * 40, "files": {}}
CLASSIFICATION = prompt_format("classification", {"a": [5, 2], "b {c}": [6, 2]}, ["a", "b {c}"])
SEVERAL = multi_label_format({"a": [5], "b": [6]}, yes=7, no=8)


def card_of(footer: dict[str, Any], base: dict[str, Any] = HUB) -> ModelCard:
    data = {name: {"rows": 1200, "sha256": "2" * 64} for name in ("train", "validation")}
    hardware = {"device": "cpu (x86_64)", "compute_dtype": "float32"}
    provenance = {"base": base, "data": data, "parameters": {"task": {"kind": footer["kind"]}}, "hardware": hardware}
    return model_card(footer, provenance)


@pytest.mark.parametrize(
    ("footer", "tag", "title", "words"),
    [
        (CLASSIFICATION, "text-classification", "some/base: classification adapter",
         ["classifies a text as one of `a`, `b {c}`.", "(template, labels, 96 tokens at most)",
          "likelihoods of the labels' completions"]),
        (SEVERAL, "text-classification", "some/base: multi-label classification adapter",
         ["says of each of `a`, `b` whether it applies", '"LABEL: yes" and "LABEL: no"', "L(yes) / (L(yes) + L(no))"]),
        (prompt_format("question_answering"), "text-generation", "some/base: question-answering adapter",
         ["answers questions", "(template, 96 tokens at most)", "`terminator_ids`"]),
        (prompt_format("chat"), "text-generation", "some/base: chat adapter",
         ["answers in conversations", "chat template", "`terminator_ids`"]),
    ],
)  # fmt: skip
def test_the_card_says_what_the_adapter_does_and_how_to_use_it(
    footer: dict[str, Any], tag: str, title: str, words: list[str]
) -> None:
    # As it is read back from the file, metadata included.
    card = ModelCard(str(card_of(footer)))
    assert card.data.to_dict()["pipeline_tag"] == tag
    assert card.data.to_dict()["base_model"] == "some/base"
    text = " ".join(card.text.split())
    assert f"# {title} " in text
    for part in [*words, "1,200 rows for training"]:
        assert part in text


def test_of_a_base_in_a_folder_only_the_folders_name_leaves_this_machine() -> None:
    published = published_base(FOLDER)
    assert published == FOLDER | {"source": {"source": "folder", "path": "llama"}}
    assert "# llama: chat adapter" in str(card_of(prompt_format("chat"), published))
    assert FOLDER["source"]["path"] == "/home/somebody/models/llama", "the pin itself stays"
    assert Path(published["source"]["path"]).name == "llama"


def test_other_bases_are_published_as_they_are_pinned() -> None:
    assert published_base(HUB) == HUB
