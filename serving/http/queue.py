"""Texts of all requests gathered while the model is busy, given to it together, and their answers given back."""

from __future__ import annotations

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

from stages.common.errors import UserError

# How long an idle model waits for texts that come at about the same time.
GATHER_SECONDS = 0.002
# The weight of the last batch in the estimate of how long a row takes.
NEW_ESTIMATE = 0.3


class QueueFullError(Exception):
    """There is no room.

    Attributes:
        seconds: after which there should be some, at least 1.
    """

    def __init__(self, seconds: int) -> None:
        super().__init__(f"the queue is full for about {seconds} s")
        self.seconds = seconds


class _Row(NamedTuple):
    content: Any
    answer: asyncio.Future[Any]


class WorkQueue:
    """A bounded queue of rows in front of one model thread; all methods belong to the event loop's thread.

    Attributes:
        computing: whether the model is at work.

    Args:
        compute: takes one or more rows' contents, in the model's thread; gives an answer for each, in their order.
        batch_rows: most rows of a call.
        most_waiting: most rows in the queue, those being computed aside.
        observe: is told the size of each batch.
        thread: the model's; nothing else may use the model.
    """

    def __init__(
        self,
        compute: Callable[[list[Any]], Sequence[Any]],
        batch_rows: int,
        most_waiting: int,
        observe: Callable[[int], object],
        thread: ThreadPoolExecutor,
    ) -> None:
        self.computing = False
        self._compute = compute
        self._batch_rows = batch_rows
        self._most_waiting = most_waiting
        self._observe = observe
        self._thread = thread
        self._waiting: deque[_Row] = deque()
        self._filled = asyncio.Event()
        self._seconds_per_row = 0.0

    def __len__(self) -> int:
        return sum(not row.answer.cancelled() for row in self._waiting)

    def put(self, contents: Sequence[Any]) -> list[asyncio.Future[Any]]:
        """Queue a request's rows, all or none; whoever cancels a future takes its row out of the queue.

        Raises:
            QueueFullError: they do not fit.
        """
        self._waiting = deque(row for row in self._waiting if not row.answer.cancelled())
        if len(self) + len(contents) > self._most_waiting:
            raise QueueFullError(max(1, math.ceil(len(self) * self._seconds_per_row)))
        rows = [_Row(content, asyncio.get_running_loop().create_future()) for content in contents]
        for row in rows:
            # Whoever waits for several sees the first error; asyncio would print the others.
            row.answer.add_done_callback(lambda answer: answer.cancelled() or answer.exception())
        self._waiting.extend(rows)
        self._filled.set()
        return [row.answer for row in rows]

    async def run(self) -> None:
        """Answer rows until this task is cancelled.

        Raises:
            UserError: the GPU failed, and nothing more can be computed in this process; all rows have its error.
        """
        loop = asyncio.get_running_loop()
        while True:
            await self._filled.wait()
            if len(self._waiting) < self._batch_rows:
                await asyncio.sleep(GATHER_SECONDS)
            batch = self._take()
            if not batch:
                continue
            self._observe(len(batch))
            start = time.monotonic()
            contents = [row.content for row in batch]
            self.computing = True
            try:
                answers = await loop.run_in_executor(self._thread, _answers_or_errors, self._compute, contents)
            except Exception as error:
                self.computing = False
                for row in (*batch, *self._waiting):
                    _settle(row.answer, _Failure(error))
                raise _broken(error) from error
            self.computing = False
            seconds = (time.monotonic() - start) / len(batch)
            self._seconds_per_row += (seconds - self._seconds_per_row) * NEW_ESTIMATE
            for row, answer in zip(batch, answers, strict=True):
                _settle(row.answer, answer)

    def _take(self) -> list[_Row]:
        batch: list[_Row] = []
        while self._waiting and len(batch) < self._batch_rows:
            row = self._waiting.popleft()
            if not row.answer.cancelled():
                batch.append(row)
        if not self._waiting:
            self._filled.clear()
        return batch


def is_lasting(error: BaseException) -> bool:
    """Whether it is an error of CUDA's that all later calls of this process would have as well."""
    return "CUDA error" in str(error) and "out of memory" not in str(error)


def _broken(error: Exception) -> UserError:
    said = str(error).partition("\n")[0]
    return UserError(
        f"the GPU failed, and this process can compute nothing more on it ({said}). Start the service again; if it "
        "soon fails again, the GPU or its driver is at fault (see nvidia-smi and the kernel's log)."
    )


class _Failure(NamedTuple):
    error: Exception


def _answers_or_errors(compute: Callable[[list[Any]], Sequence[Any]], contents: list[Any]) -> list[Any]:
    """The answers; where they fail together each alone, so that one row does not take its batch-mates with it."""
    try:
        return list(compute(contents))
    except BaseException as error:  # a panic in Rust code is no Exception
        if is_lasting(error):
            raise
        if len(contents) > 1:
            return [answer for content in contents for answer in _answers_or_errors(compute, [content])]
        return [_Failure(error if isinstance(error, Exception) else RuntimeError(type(error).__name__))]


def _settle(future: asyncio.Future[Any], answer: Any) -> None:
    if future.done():  # nobody waits any more
        return
    if isinstance(answer, _Failure):
        future.set_exception(answer.error)
    else:
        future.set_result(answer)
