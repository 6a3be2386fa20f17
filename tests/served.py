"""Tiny adapters of every kind of task, made without training, and the real service on one of them."""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.common.tables import table_metadata
from tests.api_server import Server, start_service
from tests.sharp import sharp_model
from tests.workplace import REVIEWS, WORDS, Workplace, make_workplace

LABELS = list(WORDS)


def make_served(folder: Path, kind: str) -> Workplace:
    """A project with models/adapter for a kind of task: random weights large enough that answers differ."""
    place = make_workplace(folder)
    sharp_model(place.folder / "base").save_pretrained(place.folder / "base")
    columns: dict[str, Any] = dict.fromkeys(("group", "split", "slice")) | {"id": "number", "text": "review"}
    columns["label"] = "opinion"
    if kind == "multi_label":
        task = {"kind": "classification", "multi_label": True, "labels": LABELS}
        place.set("task", task | {"label_descriptions": None, "positive_label": None})
        columns["label"] = {"column": "opinion", "separator": "|", "aliases": None}
    elif kind != "classification":
        place.set("task", {"kind": kind})
        place.set("infer", {"method": "generate", "max_new_tokens": 8})
    if kind == "chat":
        columns |= {"text": {"column": "turns", "format": "messages"}, "label": None}
        place.set("format_prompts.template", None)
        place.set("format_prompts.style", "chat")
        place.set("format_prompts.max_length_tokens", 160)
        rows = [line.split(",") for line in (place.folder / REVIEWS).read_text().splitlines()[1:]]
        lines = [{"number": number, "turns": turns(text, answer)} for number, text, answer in rows]
        place.write("data/raw/chats.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        place.set("ingest.source.paths", ["data/raw/chats.jsonl"])
    place.set("ingest.columns", columns)
    for stage in ("base_model", "ingest", "format_prompts"):
        assert place.main(f"stages.{stage}") == 0
    _save_adapter(place)
    return place


def turns(text: str, *following: str) -> list[dict[str, str]]:
    """A conversation, the user first."""
    roles = ("user", "assistant")
    return [{"role": roles[index % 2], "content": content} for index, content in enumerate((text, *following))]


def _save_adapter(place: Workplace) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    models = place.folder / "models"
    base = AutoModelForCausalLM.from_pretrained(place.folder / "base")
    base.name_or_path = "models/base"
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(str(models / "adapter"))
    for file in (models / "tokenizer").iterdir():
        shutil.copy(file, models / "adapter")
    shutil.copy(models / "base.json", models / "adapter")
    prompt_format = table_metadata(place.folder / "data/prompts.parquet", "prompt_format")
    place.write("models/adapter/prompt.json", json.dumps(prompt_format))


# A body that is too long is refused as well. Which roles follow each other and that no turn is empty no schema says.
FUZZING = """
[checks]
negative_data_rejection.expected-statuses = [400, 401, 403, 404, 405, 406, 413, 415, 422, 429, "5xx"]
[[operations]]
include-path = "/v1/chat/completions"
checks.positive_data_acceptance.enabled = false
"""


@contextmanager
def serve(place: Workplace, *arguments: str, **environment: str) -> Iterator[Server]:
    """The service on a free port, its model loaded; it is ended when the block ends."""
    log = place.folder / f"{secrets.token_hex(4)}.log"
    with start_service(arguments, log, place.folder, place.environment(**environment)) as server:
        yield server


def fuzz(server: Server, folder: Path, token: str | None, seconds: int, route: str) -> None:
    """Send what schemathesis makes of the service's own description; every answer has to be one that it declares.

    Args:
        server: running.
        folder: for files of the run.
        token: that the service asks for.
        seconds: how long.
        route: that its adapter answers.
    """
    (folder / "schemathesis.toml").write_text(FUZZING)
    before = len(server.log())
    command = [
        str(Path(sys.executable).with_name("schemathesis")), "--config-file", "schemathesis.toml", "run",
        f"{server.url}/openapi.json", "--max-time", str(seconds), "--max-examples", "10000", "--seed", "1",
        "--output-truncate", "true", "--phases", "examples,coverage,fuzzing",
        *(["--header", f"Authorization: Bearer {token}"] if token else []),
    ]  # fmt: skip
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    found = [(line["route"], line["status"]) for line in server.log()[before:] if line["event"] == "request"]
    # A busy machine gets through few of them in the time.
    assert len(found) > 20 and (route, 200) in found, found
    assert max(status for _, status in found) < 500, "nothing fails the service"
    assert server.process.poll() is None
