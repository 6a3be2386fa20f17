"""Serving on a CUDA device; run with `pytest -m gpu` where there is one."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch

from serving.predictor import load_predictor
from stages.common.tables import read_table
from stages.finetune import ADAPTER, PARTS
from tests.api_server import start_service
from tests.served import make_served, serve

ROOT = Path(__file__).resolve().parents[1]
# Of a probability in bfloat16, when a text is answered together with others; tests/test_gpu.py measures it.
ROUNDING = 0.1

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


@pytest.fixture
def texts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Texts of the default recipe, in the folder of its adapter."""
    monkeypatch.chdir(ROOT)
    if not (ADAPTER / "adapter_model.safetensors").is_file() or not PARTS["train"].is_file():
        pytest.skip("there is no trained adapter here: `dvc repro` or `dvc pull` makes it")
    return read_table(PARTS["train"], ["text"])["text"].to_pylist()[:2000]


def probabilities(answers: list[dict[str, Any]]) -> np.ndarray:
    """Of each answer, one row."""
    return np.array([list(answer["probabilities"].values()) for answer in answers])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.usefixtures("texts")
def test_a_model_merged_on_the_gpu_answers_as_its_adapter(tmp_path: Path, dtype: str) -> None:
    output = tmp_path / "merged"
    command = [sys.executable, "-m", "serving.merge", "--dtype", dtype, "--output", str(output)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    report = json.loads((output / "parity.json").read_text())
    print(f"merged in {dtype}: {report}")
    assert report["hardware"]["device"] == f"cuda ({torch.cuda.get_device_name()})"


def test_the_service_gives_each_of_many_clients_the_offline_answer_to_its_own_text(
    texts: list[str], tmp_path: Path
) -> None:
    offline = probabilities(load_predictor().predict(texts))
    # Texts whose labels no rounding changes, so that an answer that went to another client shows.
    sure = np.flatnonzero(offline.max(axis=1) > 0.5 + 2 * ROUNDING)[:512].tolist()
    assert len(set(offline[sure].argmax(axis=1))) > 1
    with start_service([], tmp_path / "log") as server, httpx.Client(base_url=server.url, timeout=60) as client:

        def ask(row: int) -> dict[str, Any]:
            response = client.post("/classify", json={"texts": [texts[row]]})
            assert response.status_code == 200, response.text
            [answer] = response.json()["answers"]
            return answer

        with ThreadPoolExecutor(32) as pool:
            found = probabilities(list(pool.map(ask, sure)))
        assert server.stop() == 0
    np.testing.assert_allclose(found, offline[sure], atol=ROUNDING)


def test_a_chat_is_streamed_as_it_is_answered_whole(tmp_path: Path) -> None:
    place = make_served(tmp_path / "project", "chat")
    body = {
        "model": "adapter",
        "messages": [{"role": "user", "content": "the film was fine"}],
        "temperature": 0,
        "max_tokens": 8,
    }
    with serve(place, "--model-name", "adapter") as server, httpx.Client(base_url=server.url, timeout=60) as client:
        whole = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"]
        with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as response:
            events = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]"
    pieces = [choice["delta"].get("content") or "" for event in events for choice in json.loads(event)["choices"]]
    assert whole and "".join(pieces) == whole


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there are no two CUDA devices here")
def test_two_processes_answer_a_folder_on_a_gpu_each_as_one_process_does(texts: list[str], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts * 20)
    (tmp_path / "in/texts.jsonl").write_text(lines)
    arguments = ["serving.predict", "--folder", str(tmp_path / "in"), "--column", "text", "--rows-per-part", "2000"]
    launch = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "-m"]
    used, ended = np.zeros(2), threading.Event()

    def watch() -> None:
        while not ended.wait(0.05):
            free = [torch.cuda.mem_get_info(device) for device in range(2)]
            used[:] = np.maximum(used, [total - left for left, total in free])

    def run(output: Path, *launcher: str) -> np.ndarray:
        command = [sys.executable, "-m", *launcher, *arguments, "--output-folder", str(output)]
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        assert result.returncode == 0, result.stderr
        parts = sorted(output.rglob("*.jsonl"))
        return probabilities([json.loads(line) for part in parts for line in part.read_text().splitlines()])

    before = [total - left for left, total in map(torch.cuda.mem_get_info, range(2))]
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        by_two = run(tmp_path / "two", *launch)
    finally:
        ended.set()
        watcher.join()
    assert (used - before > 300 * 2**20).all(), "each GPU held a model"
    by_one = run(tmp_path / "one")
    assert len(by_one) == len(by_two) == 20 * len(texts)
    np.testing.assert_allclose(by_two, by_one, atol=ROUNDING)
