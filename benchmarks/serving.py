"""Throughput and latency of `python -m serving.api` beside offline scoring: `python -m benchmarks.serving`.

Starts the real service, lets clients send it texts whose answers were computed beforehand, and checks every answer.
Both are measured on one machine in one run, offline scoring before and after, since machines are seldom idle for long.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import numpy as np
import psutil
import pyarrow.parquet as pq

from benchmarks import rate_text
from serving.common.adapter import ADAPTER
from serving.predictor import Predictor, load_predictor
from stages.common.errors import UserError, run_stage
from tests.api_server import Server, start_service

# Two answers to the same text in different batches may differ by so much, and those to two texts have to differ by
# more than three times as much, so that no answer can pass for another one.
ROUNDING = 3e-5
TEXTS_PER_CLIENT = 3


@dataclass
class Load:
    """What the clients saw."""

    elapsed: float = 0.0
    cpu_seconds: float = 0.0
    seconds: list[float] = field(default_factory=list)
    rows: int = 0
    refused: int = 0
    wrong: int = 0
    largest_difference: float = 0.0
    lost: list[str] = field(default_factory=list)


def main() -> None:
    """Print a Markdown table; end with an error where an answer is lost or wrong."""
    options = read_options()
    predictor = load_predictor(options.adapter)
    if predictor.adapter.answers_with_texts:
        raise UserError(f"--adapter: {options.adapter} answers with texts; only labels can be checked here.")
    texts = list(dict.fromkeys(pq.read_table(options.texts, columns=["text"])["text"].to_pylist()))
    texts = texts[: TEXTS_PER_CLIENT * options.clients]
    predictor.predict(texts[: options.batch_rows])
    before, known = score_offline(predictor, texts, options.batch_rows, options.offline_seconds)
    assert len(known) == len(texts), "each at least once"
    distinct = tell_apart(known, options.clients)
    with started_service(options) as server:
        used = cpu_seconds(server)
        load = asyncio.run(apply_load(server.url, distinct, options))
        load.cpu_seconds = cpu_seconds(server) - used
        average = os.getloadavg()[0]
    after, _ = score_offline(predictor, texts, options.batch_rows, options.offline_seconds)
    print_report(options, load, before, after, len(distinct), average)
    if load.wrong or load.lost:
        raise UserError(f"{load.wrong} answers are wrong, {len(load.lost)} are lost: {load.lost[:3]}")


def read_options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--adapter", type=Path, default=ADAPTER, help=f"one that answers with labels (default: {ADAPTER})")
    add("--texts", type=Path, default=Path("data/splits/train.parquet"), help="Parquet with a column text")
    add("--clients", type=int, default=64, help="at a time, each sends when it has its answer (default: 64)")
    add("--seconds", type=float, default=60.0, help="how long (default: 60)")
    add("--offline-seconds", type=float, default=30.0, help="of offline scoring, before and after (default: 30)")
    add("--texts-per-request", type=int, default=1, help="default: 1")
    add("--batch-rows", type=int, default=32, help="most texts in a call of the model, in both (default: 32)")
    return parser.parse_args()


class Rates(NamedTuple):
    """Rows a second by the clock, and rows for each second of processor time, which other programs hardly change."""

    clock: float
    processor: float


def cpu_seconds(server: Server) -> float:
    """Processor time that the service has taken."""
    times = psutil.Process(server.process.pid).cpu_times()
    return times.user + times.system


def score_offline(
    predictor: Predictor, texts: list[str], batch_rows: int, seconds: float
) -> tuple[Rates, dict[str, dict[str, Any]]]:
    """The rates of `Predictor.predict` over batches, and the answers.

    Args:
        predictor: of labels.
        texts: taken again from the first one when they are used up.
        batch_rows: of a call.
        seconds: at least so long, and all texts once.
    """
    known: dict[str, dict[str, Any]] = {}
    start, used, rows = time.monotonic(), time.process_time(), 0
    for first in itertools.cycle(range(0, len(texts), batch_rows)):
        batch = texts[first : first + batch_rows]
        known |= zip(batch, predictor.predict(batch), strict=True)
        rows += len(batch)
        if time.monotonic() - start > seconds and rows >= len(texts):
            break
    return Rates(rows / (time.monotonic() - start), rows / (time.process_time() - used)), known


def tell_apart(known: dict[str, dict[str, Any]], clients: int) -> dict[str, np.ndarray]:
    """Texts of which no two have answers that could be taken for each other, and their probabilities.

    Raises:
        UserError: there are too few for the clients.
    """
    kept: dict[str, np.ndarray] = {}
    for text, answer in known.items():
        row = np.array(list(answer["probabilities"].values()))
        if not kept or np.abs(np.array(list(kept.values())) - row).max(axis=1).min() > 3 * ROUNDING:
            kept[text] = row
    if len(kept) < clients:
        raise UserError(f"--texts: only {len(kept)} have answers that differ. Give others, or fewer clients.")
    return kept


@contextmanager
def started_service(options: argparse.Namespace) -> Iterator[Server]:
    """The service as a user starts it, its model loaded."""
    arguments = ["--adapter", str(options.adapter), "--batch-rows", str(options.batch_rows)]
    with (
        tempfile.TemporaryDirectory(prefix="benchmark-") as folder,
        start_service(arguments, Path(folder) / "log") as server,
    ):
        yield server


async def apply_load(url: str, known: dict[str, np.ndarray], options: argparse.Namespace) -> Load:
    """Let all clients ask until time is up, and wait for what is under way then: it counts, and so does the time."""
    load, texts = Load(), list(known)
    limits = httpx.Limits(max_connections=options.clients, max_keepalive_connections=options.clients)
    begin = time.monotonic()
    end = begin + options.seconds

    async def ask(own: list[str], client: httpx.AsyncClient) -> None:
        for first in itertools.count(step=options.texts_per_request):
            if time.monotonic() > end:
                return
            asked = [own[(first + index) % len(own)] for index in range(options.texts_per_request)]
            start = time.monotonic()
            try:
                response = await client.post("/classify", json={"texts": asked})
            except httpx.HTTPError as error:
                load.lost.append(repr(error))
                continue
            if response.status_code == 429:
                load.refused += 1
                await asyncio.sleep(float(response.headers["Retry-After"]))
                continue
            if response.status_code != 200:
                load.lost.append(f"status {response.status_code}")
                continue
            check(response.json()["answers"], [known[text] for text in asked], load)
            load.seconds.append(time.monotonic() - start)
            load.rows += len(asked)

    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as client:
        await asyncio.gather(*(ask(texts[number :: options.clients], client) for number in range(options.clients)))
    load.elapsed = time.monotonic() - begin
    return load


def check(answers: list[dict[str, Any]], right: list[np.ndarray], load: Load) -> None:
    """Count answers that are not the right ones."""
    load.lost += ["an answer of a request"] * (len(right) - len(answers))
    for answer, row in zip(answers, right, strict=False):
        difference = float(np.abs(np.array(list(answer["probabilities"].values())) - row).max())
        load.wrong += difference > ROUNDING
        load.largest_difference = max(load.largest_difference, difference)


def print_report(
    options: argparse.Namespace, load: Load, before: Rates, after: Rates, texts: int, average: float
) -> None:
    """One table of all that was measured."""
    rate, per_cpu = load.rows / load.elapsed, load.rows / load.cpu_seconds
    p50, p95, p99 = np.percentile(load.seconds or [np.nan], [50, 95, 99])
    lines = {
        "offline scoring before, after; rows/s": f"{rate_text(before.clock)}, {rate_text(after.clock)}",
        "service; rows/s": rate_text(rate),
        "service / mean of offline scoring": f"{2 * rate / (before.clock + after.clock):.1%}",
        "offline before, after; rows for a CPU second": f"{rate_text(before.processor)}, {rate_text(after.processor)}",
        "service; rows for a CPU second": rate_text(per_cpu),
        "service / mean of offline scoring, by CPU time": f"{2 * per_cpu / (before.processor + after.processor):.1%}",
        "p50, p95, p99; seconds": f"{p50:.2f}, {p95:.2f}, {p99:.2f}",
        "answers; wrong, lost, refused with 429": f"{load.rows:,}; {load.wrong}, {len(load.lost)}, {load.refused}",
        "largest difference of a probability": f"{load.largest_difference:.1e}",
        "clients, distinct texts": f"{options.clients}, {texts:,}",
        "texts of a request; of a batch at most": f"{options.texts_per_request}; {options.batch_rows}",
        "seconds with the last answers; load average at the end": f"{load.elapsed:.0f}; {average:.1f}",
    }
    print("| | |\n|---|---|")
    for name, value in lines.items():
        print(f"| {name} | {value} |")


if __name__ == "__main__":
    run_stage(main)
