"""The queue before the model, and what a failing model does to requests and to the log."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fastapi.testclient import TestClient

from serving.common.adapter import read_adapter
from serving.http.application import make_app
from serving.http.logs import start_logging
from serving.http.options import Settings
from serving.http.queue import QueueFullError, WorkQueue
from serving.http.service import Service
from stages.common.errors import UserError
from tests.served import make_served

MARKER = "Xyzzyplugh"


def run(compute: Callable[[list[Any]], Sequence[Any]], work: Callable[[WorkQueue], Awaitable[Any]]) -> list[int]:
    """Let something use a queue of ten rows and batches of four; the sizes of the batches."""
    sizes: list[int] = []

    async def main() -> None:
        with ThreadPoolExecutor(1) as thread:
            queue = WorkQueue(compute, 4, 10, sizes.append, thread)
            running = asyncio.create_task(queue.run())
            await asyncio.wait_for(work(queue), 20)
            running.cancel()

    asyncio.run(main())
    return sizes


def slowly(rows: list[int]) -> list[int]:
    time.sleep(0.1)
    return [row * 10 for row in rows]


def test_rows_are_gathered_while_the_model_is_busy_and_answered_in_order() -> None:
    async def work(queue: WorkQueue) -> None:
        first = queue.put([1])
        await asyncio.sleep(0.05)
        rest = [queue.put([number, number + 1]) for number in (2, 4, 6)]
        assert await asyncio.gather(*first) == [10]
        assert [await asyncio.gather(*rows) for rows in rest] == [[20, 30], [40, 50], [60, 70]]

    assert run(slowly, work) == [1, 4, 2]


def test_a_full_queue_takes_all_rows_of_a_request_or_none() -> None:
    async def work(queue: WorkQueue) -> None:
        taken = queue.put(range(9))
        with pytest.raises(QueueFullError) as full:
            queue.put([1, 2])
        assert full.value.seconds == 1
        taken += queue.put([9])
        assert await asyncio.gather(*taken) == [row * 10 for row in range(10)]

    run(slowly, work)


def test_a_row_that_nobody_waits_for_leaves_the_queue() -> None:
    seen: list[int] = []

    def compute(rows: list[int]) -> list[int]:
        seen.extend(rows)
        return slowly(rows)

    async def work(queue: WorkQueue) -> None:
        first = queue.put([0])
        await asyncio.sleep(0.05)
        left, stays = queue.put([1, 2, 3, 4]), queue.put([5])
        for row in left:
            row.cancel()
        assert len(queue) == 1
        more = queue.put(range(6, 15))
        assert await asyncio.gather(*first, *stays, *more) == [0, 50, *(row * 10 for row in range(6, 15))]

    run(compute, work)
    assert seen == [0, 5, *range(6, 15)]


class PanicError(BaseException):
    """As tokenizers' Rust code raises them."""


def test_a_row_that_fails_fails_alone() -> None:
    def compute(rows: list[int]) -> list[int]:
        if 2 in rows:
            raise ValueError(MARKER)
        if 3 in rows:
            raise PanicError(MARKER)
        return slowly(rows)

    async def work(queue: WorkQueue) -> None:
        found = await asyncio.gather(*queue.put([1, 2, 3, 4]), return_exceptions=True)
        assert [found[0], found[3]] == [10, 40]
        assert isinstance(found[1], ValueError) and isinstance(found[2], RuntimeError)
        assert await asyncio.gather(*queue.put([5])) == [50], "the queue goes on"

    run(compute, work)


BROKEN = "CUDA error: device-side assert triggered"


def test_a_gpu_that_is_broken_ends_the_queue() -> None:
    """Nothing else could be computed in this process; whoever waits is told, and not left waiting."""

    def compute(rows: list[int]) -> list[int]:
        time.sleep(0.1)
        raise RuntimeError(BROKEN)

    async def main() -> None:
        with ThreadPoolExecutor(1) as thread:
            queue = WorkQueue(compute, 2, 10, lambda _: None, thread)
            rows = queue.put([1, 2, 3])
            with pytest.raises(UserError, match=BROKEN):
                await asyncio.wait_for(queue.run(), 20)
            found = await asyncio.wait_for(asyncio.gather(*rows, return_exceptions=True), 1)
            assert [str(error) for error in found] == [BROKEN] * 3

    asyncio.run(main())


def test_a_gpu_without_memory_fails_one_row_alone() -> None:
    def compute(rows: list[int]) -> list[int]:
        if 1 in rows:
            raise RuntimeError("CUDA out of memory. Tried to allocate 2 GiB.")
        return slowly(rows)

    async def work(queue: WorkQueue) -> None:
        found = await asyncio.gather(*queue.put([1, 2]), return_exceptions=True)
        assert isinstance(found[0], RuntimeError) and found[1] == 20

    run(compute, work)


def raising(error: Exception) -> Callable[..., Any]:
    def fail(*_: Any) -> None:
        raise error

    return fail


@pytest.fixture
def lines() -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """The log's lines; the process' own logging is put back afterwards."""
    root, stream = logging.getLogger(), io.StringIO()
    before, level = root.handlers[:], root.level
    root.handlers = []
    start_logging(stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    logging.captureWarnings(False)
    root.handlers, root.level = before, level


def test_a_model_that_fails_is_said_without_the_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: Callable[[], list[dict[str, Any]]]
) -> None:
    """The predictor is the real one until it is made to fail as a broken template or library would."""
    place = make_served(tmp_path / "project", "classification")
    with place.entered():
        options = Settings(
            adapter=Path("models/adapter"), decision=None, name="x", host="127.0.0.1", port=0, token=None, batch_rows=8,
            queue=None, max_texts=8, max_characters=99, max_body_bytes=999, max_new_tokens=9, timeout_seconds=30,
            shutdown_seconds=1,
        )  # fmt: skip
        ended: list[str] = []
        service = Service(options, read_adapter(options.adapter), on_failure=lambda: ended.append("ended"))
        with TestClient(make_app(service)) as client:
            end = time.monotonic() + 60
            while client.get("/readyz").status_code == 503:
                assert service.failure is None and time.monotonic() < end
                time.sleep(0.05)
            assert client.post("/classify", json={"texts": [MARKER]}).status_code == 200

            def fail(self: Any, texts: list[str]) -> None:
                raise ValueError(f"cannot work on {texts}")

            monkeypatch.setattr("serving.predictor.Predictor.predict", fail)
            response = client.post("/classify", json={"texts": [MARKER, "another"]})
            refusal = "the model's scores are not finite numbers"
            monkeypatch.setattr("serving.predictor.Predictor.predict", raising(UserError(refusal)))
            assert client.post("/classify", json={"texts": [MARKER]}).status_code == 500
            monkeypatch.undo()
            assert client.post("/classify", json={"texts": ["and on"]}).status_code == 200
            assert client.get("/readyz").status_code == 200 and not ended
            monkeypatch.setattr("serving.predictor.Predictor.predict", raising(RuntimeError(BROKEN)))
            assert client.post("/classify", json={"texts": [MARKER]}).status_code == 500
            assert client.get("/readyz").status_code == 503 and ended == ["ended"]
            assert client.post("/classify", json={"texts": [MARKER]}).status_code == 503
    assert response.status_code == 500 and response.json()["error"]["code"] == "internal_error"
    assert MARKER not in response.text and MARKER not in json.dumps(lines())
    first, second, third = (line for line in lines() if line["level"] == "error")
    assert first["error"] == "ValueError" and any(place.endswith(" fail") for place in first["raised"])
    assert "reason" not in first and (second["error"], second["reason"]) == ("UserError", refusal)
    assert third["error"] == "RuntimeError" and BROKEN in str(service.failure)
    assert [line["status"] for line in lines() if line.get("route") == "/classify"] == [200, 500, 500, 200, 500, 503]
    assert any("a threshold chosen on validation" in line["message"] for line in lines() if line["event"] == "note")
