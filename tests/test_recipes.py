"""Every recipe runs from its source's columns to its report, with forty rows and a tiny random model."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from serving.push import adapter_files, check_card
from stages.common.tables import read_json
from tests.workplace import ROOT, Workplace, make_workplace

RECIPES = sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml"))
STAGES = [
    ("stages.base_model",),
    ("stages.ingest",),
    ("stages.format_prompts",),
    ("stages.split",),
    ("preflight.check",),
    ("stages.finetune",),
    ("stages.infer",),
    ("stages.infer", "base"),
    ("stages.baseline",),
    ("stages.evaluate",),
    ("stages.report",),
]
WORDS = ["red", "green", "blue", "dark", "light", "warm", "cold"]


def phrase(number: int) -> str:
    """A text that no other number gives."""
    return f"{WORDS[number % 7]} {WORDS[number // 7 % 7]} thing {number}"


def table(columns: dict[str, list[Any]]) -> bytes:
    """Columns as a Parquet file."""
    buffer = io.BytesIO()
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()


def lines(columns: dict[str, list[Any]]) -> bytes:
    """Columns as a CSV file."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return text.getvalue().encode()


def rated_tweets() -> dict[str, bytes]:
    rows = [f"{number}\t{number % 3 * 3 - 3}\t{phrase(number)}" for number in range(40)]
    return {"tweets.tsv": "\n".join(rows).encode()}


def tweeteval() -> dict[str, bytes]:
    # Label numbers as in the Hub's copy of TweetEval.
    def part(first: int, last: int) -> bytes:
        return table({"text": [phrase(n) for n in range(first, last)], "label": [n % 3 for n in range(first, last)]})

    return {"train.parquet": part(0, 24), "validation.parquet": part(24, 32), "test.parquet": part(32, 40)}


def arxiv() -> dict[str, bytes]:
    categories = ["cs.CL", "cs.CV", "cs.LG", "hep-ph", "quant-ph", "math.CO", "astro-ph.GA", "econ.TH"]
    return {
        "arxiv.parquet": table(
            {
                "id": [f"2505.{number:05}" for number in range(64)],
                "title": [f"On {phrase(number)}" for number in range(64)],
                "abstract": [f"We study {phrase(number)}" for number in range(64)],
                "primary_category": [categories[number % 8] for number in range(64)],
            }
        )
    }


def papers() -> dict[str, bytes]:
    numbers = range(40)
    return {
        "papers.csv": lines(
            {
                "Identifier": ["Topic A" if number % 3 else "Topic B" for number in numbers],
                "Type": ["bad" if number % 4 else "good" for number in numbers],
                "Title": [f"A trial of {phrase(number)}" for number in numbers],
                "Abstract": [f"Patients were given {phrase(number)}." for number in numbers],
            }
        )
    }


def questions() -> dict[str, bytes]:
    numbers = range(40)
    return {
        "questions.csv": lines(
            {
                "qtype": ["symptoms" if number % 2 else "treatment" for number in numbers],
                "Question": [f"What is {phrase(number)}?" for number in numbers],
                "Answer": [f"It is {phrase(number)} and no more." for number in numbers],
            }
        )
    }


def conversations() -> dict[str, bytes]:
    def turns(number: int) -> list[dict[str, str]]:
        asked, said = f"Tell me about {phrase(number)}.", f"Here is {phrase(number)}."
        exchange = [{"from": "human", "value": asked}, {"from": "gpt", "value": said}]
        return exchange * 2 if number % 2 else exchange

    instructions = [{"instruction": f"Describe {phrase(n)}", "output": f"{phrase(n)}!"} for n in range(20, 40)]
    return {
        "tome.parquet": table({"conversations": [turns(number) for number in range(20)]}),
        "wizard.json": json.dumps(instructions).encode(),
    }


DATA: dict[str, Callable[[], dict[str, bytes]]] = {
    "tweet-sentiment": rated_tweets,
    "tweeteval-sentiment": tweeteval,
    "arxiv-topics": arxiv,
    "slr-screening": papers,
    "medical-qa": questions,
    "chat-assistant": conversations,
}


def bring(place: Workplace, recipe: str) -> None:
    """Use the recipe on forty rows below data/raw and the tiny base; its columns, prompt and task stay."""
    data = recipe.removesuffix(".tuned")
    place.write("params.yaml", (ROOT / f"recipes/{recipe}.yaml").read_bytes())
    files = DATA[data]()
    for name, content in files.items():
        place.write(f"data/raw/{name}", content)
    paths: Any = [f"data/raw/{name}" for name in files]
    if data == "tweeteval-sentiment":
        paths = {Path(path).stem: [path] for path in paths}
        if place.params()["ingest"]["rows"]:
            place.set("ingest.rows", {"train": 20, "validation": 6})
    table_format = place.params()["ingest"]["source"]["format"]
    place.set("ingest.source", {"kind": "files", "paths": paths, "format": table_format})
    if data == "chat-assistant":
        source, [further] = place.params()["ingest"]["source"], place.params()["ingest"]["further_sources"]
        place.set("ingest.source", {**source, "paths": paths[:1]})
        further |= {"source": {**source, "paths": paths[1:]}, "rows": 18}
        place.set("ingest.further_sources", [further])
        place.set("ingest.rows", 18)
    place.set("base_model", {"source": "folder", "path": "base"})
    shrink(place, data)


def shrink(place: Workplace, data: str) -> None:
    """A few steps on short sequences."""
    params = place.params()
    # The tiny tokenizer needs some three times as many tokens, and the tiny model has 512 positions.
    place.set("format_prompts.max_length_tokens", 384)
    for name, value in {"epochs": None, "max_steps": 4, "warmup_steps": 1, "evaluate_every_steps": 2}.items():
        place.set(f"finetune.{name}", value)
    place.set("split.validation_share", 0.2)
    place.set("split.test_share", 0.2)
    place.set("evaluate.bootstrap_samples", 100)
    if params["infer"]["method"] == "generate":
        place.set("infer.max_new_tokens", 8)
    if data == "slr-screening":
        # Two of a few positives promise less than 59 would.
        place.set("evaluate.threshold", {"method": "recall", "recall": 0.3, "confidence": 0.6})


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_runs_from_its_columns_to_its_report(recipe: str, tmp_path: Path) -> None:
    place = make_workplace(tmp_path)
    (tmp_path / "data/raw/reviews.csv").unlink()
    bring(place, recipe)
    for command in STAGES:
        assert place.main(*command) == 0, command
    metrics = read_json(tmp_path / "metrics/metrics.json")
    assert list(metrics) == ["adapter", "base", "tfidf", "majority"]
    wanted = "token_f1" if "qa" in recipe or "chat" in recipe else "f1_macro"
    assert all(0 <= block[wanted] <= 1 for block in metrics.values())
    # What was made can be pushed: every file of the adapter is known, and the card is this adapter's.
    assert adapter_files(tmp_path / "models/adapter", links_are_ours=False)
    check_card(tmp_path / "metrics/model_card.md", tmp_path / "models/adapter/README.md")


def test_every_recipe_has_data_here() -> None:
    assert {recipe.removesuffix(".tuned") for recipe in RECIPES} == set(DATA)


def test_texts_with_several_labels_run_from_their_columns_to_their_report(tmp_path: Path) -> None:
    place = make_workplace(tmp_path)
    (tmp_path / "data/raw/reviews.csv").unlink()
    bring(place, "arxiv-topics")
    labels = ["cs.CL", "cs.CV", "cs.LG"]
    rows: dict[str, list[Any]] = {"title": [], "abstract": [], "categories": []}
    for number in range(60):
        # Papers with one category, with two and with none of the three.
        chosen = [label for index, label in enumerate(labels) if number % 7 in (index, index + 2)]
        rows["title"].append(f"On {phrase(number)}")
        rows["abstract"].append(f"We study {' and '.join(chosen)} with {phrase(number)}")
        rows["categories"].append(chosen)
    (tmp_path / "data/raw/arxiv.parquet").write_bytes(table(rows))
    place.set("task.labels", labels)
    place.set("task.multi_label", True)
    place.set("ingest.columns.id", None)
    place.set("ingest.columns.label", {"column": "categories", "separator": None, "aliases": None})
    place.set("ingest.max_refused_share", 0)
    place.set("format_prompts.template", "{{ text }}\nTopics out of {{ labels | join(', ') }}.")
    place.set("evaluate.threshold", {"method": "fixed", "value": 0.5})
    for command in STAGES:
        assert place.main(*command) == 0, command
    metrics = read_json(tmp_path / "metrics/metrics.json")
    assert set(metrics["adapter"]["per_class"]) == set(labels)
    assert 0 <= metrics["tfidf"]["f1_samples"] <= 1
    probabilities = pq.read_table(tmp_path / "data/predictions/adapter/test.parquet").to_pydict()
    sums = np.sum([probabilities[f"probability.{label}"] for label in labels], axis=0)
    assert np.ptp(sums) > 0, "each label has a probability of its own"
