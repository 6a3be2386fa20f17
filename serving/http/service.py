"""The loaded model behind its queue: what all routes share."""

from __future__ import annotations

import asyncio
import io
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stderr
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from serving.common.adapter import Adapter, answers_sha256
from serving.common.chat import Outcome, Sampling, write_answer
from serving.common.notes import answer_limit, notes
from serving.http.errors import ApiError
from serving.http.logs import say
from serving.http.metrics import Metrics
from serving.http.middleware import while_connected
from serving.http.options import BATCH_ROWS, Settings
from serving.http.queue import QueueFullError, WorkQueue
from stages.common.prompting.conversations import Message

if TYPE_CHECKING:
    from serving.predictor import Predictor


@dataclass
class Service:
    """An adapter's service; `start` and `stop` are called in the event loop.

    Attributes:
        settings: how it is run.
        adapter: what is served.
        on_failure: called when there is one.
        metrics: its counters.
        version: a digest of all that decides an answer; empty while the model is loaded.
        failure: why the model could not be loaded, or is no longer run.
        loaded_at: seconds since 1970.
        longest_answer: in tokens, where answers are texts.

    Raises:
        UserError: see `answer_limit`.
    """

    settings: Settings
    adapter: Adapter
    on_failure: Callable[[], None]
    metrics: Metrics = field(default_factory=Metrics)
    version: str = ""
    failure: BaseException | None = None
    loaded_at: int = 0
    longest_answer: int = field(init=False)
    _queue: WorkQueue | None = None
    _tasks: list[asyncio.Task[None]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.longest_answer = answer_limit(self.settings.max_new_tokens, self.adapter)

    async def start(self) -> None:
        """Begin to load the model; returns at once."""
        self._tasks.append(asyncio.create_task(self._serve()))

    async def stop(self) -> None:
        """End what still runs."""
        for task in self._tasks:
            task.cancel()

    @property
    def busy(self) -> bool:
        """Whether the model's thread is at work, which nothing can interrupt."""
        return self.failure is None and (self._queue is None or self._queue.computing)

    def room(self) -> WorkQueue:
        """The queue.

        Raises:
            ApiError: 503, the model is not loaded, or no longer run.
        """
        if self.failure is not None:
            raise ApiError(503, "The model failed, and the service ends.", "shutting_down")
        if self._queue is None:
            raise ApiError(503, "The model is being loaded.", "not_ready", headers={"Retry-After": "1"})
        return self._queue

    async def answers(self, receive: Callable[[], Awaitable[Any]], contents: Sequence[Any]) -> list[Any]:
        """What the model gives for each content; whatever the client no longer waits for is dropped.

        Raises:
            ApiError: 429, 503 or 504.
            ClientLeft: it did.
        """
        rows = self.put(contents)
        try:
            async with asyncio.timeout(self.settings.timeout_seconds):
                return list(await while_connected(receive, asyncio.gather(*rows)))
        except TimeoutError:
            raise self.late() from None
        finally:
            for row in rows:
                row.cancel()

    def put(self, contents: Sequence[Any]) -> list[asyncio.Future[Any]]:
        """Queue contents.

        Raises:
            ApiError: 429 or 503.
        """
        try:
            return self.room().put(contents)
        except QueueFullError as full:
            message = f"Too much is waiting already. Come again in about {full.seconds} s."
            raise ApiError(429, message, "queue_full", headers={"Retry-After": str(full.seconds)}) from None

    def late(self) -> ApiError:
        """The error of a request that took too long."""
        return ApiError(504, f"There was no answer in {self.settings.timeout_seconds:g} s.", "timeout")

    async def _serve(self) -> None:
        try:
            queue = await self._load()
            self._queue = queue
            await queue.run()
        except Exception as error:
            self.failure = error
            self.on_failure()

    async def _load(self) -> WorkQueue:
        started, texts = time.monotonic(), self.adapter.answers_with_texts
        for note in notes(self.adapter, self.longest_answer):
            say("note", message=note)
        thread = ThreadPoolExecutor(1, "model")
        predictor, self.version = await asyncio.get_running_loop().run_in_executor(
            thread, _load, self.adapter, self.longest_answer
        )
        queue = WorkQueue(
            _generate(predictor) if texts else _score(predictor),
            1 if texts else self.settings.batch_rows or BATCH_ROWS,
            self.settings.queue_rows(texts),
            self.metrics.count_batch,
            thread,
        )
        self.metrics.watch_queue(queue.__len__)
        self.loaded_at = int(time.time())
        say("ready", model=self.settings.name, version=self.version, seconds=round(time.monotonic() - started, 1))
        return queue


class Conversation(NamedTuple):
    """What is to be answered with a text.

    Attributes:
        messages: checked.
        sampling: how.
        emit: is given each piece, in the model's thread.
        cancelled: ends the generation.
    """

    messages: list[Message]
    sampling: Sampling
    emit: Callable[[str], object]
    cancelled: threading.Event


def _score(predictor: Predictor) -> Callable[[list[str]], list[tuple[dict[str, Any], int]]]:
    def score(texts: list[str]) -> list[tuple[dict[str, Any], int]]:
        # Tokenised twice, to count: a thousandth of what the model takes.
        tokens = [len(prompt.ids) for prompt in predictor.encode(texts)]
        return list(zip(predictor.predict(texts), tokens, strict=True))

    return score


def _generate(predictor: Predictor) -> Callable[[list[Conversation]], list[Outcome]]:
    return lambda rows: [write_answer(predictor, *row) for row in rows]


def _load(adapter: Adapter, limit: int) -> tuple[Predictor, str]:
    from transformers.utils import logging

    from serving.predictor import load

    # Lines of JSON alone: neither bars nor transformers' own form of a warning.
    logging.disable_progress_bar()
    logging.disable_default_handler()
    logging.enable_propagation()
    with redirect_stderr(io.StringIO()) as printed:
        predictor = load(adapter, limit)
    for line in printed.getvalue().splitlines():
        say("note", message=line)
    return predictor, version_of(adapter)


def version_of(adapter: Adapter) -> str:
    """Sixteen hexadecimal digits that change with whatever decides an answer, its decision rule included."""
    return answers_sha256(adapter, with_rule=True)[:16]
