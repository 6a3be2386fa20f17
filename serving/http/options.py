"""The command line of `python -m serving.api`, the token in its environment, and what of them cannot be."""

from __future__ import annotations

import argparse
import os
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from serving.common.adapter import ADAPTER, Adapter
from serving.common.listening import is_loopback
from serving.common.options import refuse_empty
from stages.common.errors import UserError

TOKEN_VARIABLE = "API_TOKEN"
LEAST_TOKEN_CHARACTERS = 16
# By what the adapter answers with: texts are scored many at a time, answers are generated one after the other.
QUEUE_OF_TEXTS, QUEUE_OF_ANSWERS = 512, 16
BATCH_ROWS = 32
EXAMPLES = f"""
examples:
  python -m serving.api
  curl -s 127.0.0.1:8000/classify --json '{{"texts": ["what a day"]}}'
  {TOKEN_VARIABLE}=$(openssl rand -hex 24) python -m serving.api --host 0.0.0.0

With {TOKEN_VARIABLE} in the environment, requests have to bring it as "Authorization: Bearer ...". docs/api.md has all
of it.
"""


@dataclass(frozen=True)
class Settings:
    """How the service is run.

    Attributes:
        adapter: the folder.
        decision: the file with its thresholds; None: see `read_adapter`.
        name: what clients call the model.
        host: address to listen on.
        port: likewise; 0: any free one.
        token: what requests have to bring; None: nothing.
        batch_rows: most texts in one call of the model; None: BATCH_ROWS.
        queue: most texts (or answers, of a chat) that wait; None: by what the adapter answers with.
        max_texts: most texts, or messages, of one request.
        max_characters: longest text or message.
        max_body_bytes: longest request.
        max_new_tokens: longest answer, where answers are texts; None: see `answer_limit`.
        timeout_seconds: longest time for a request, waiting included.
        shutdown_seconds: longest time for what is under way when the service is told to end.
    """

    adapter: Path
    decision: Path | None
    name: str
    host: str
    port: int
    token: str | None = field(repr=False)
    batch_rows: int | None
    queue: int | None
    max_texts: int
    max_characters: int
    max_body_bytes: int
    max_new_tokens: int | None
    timeout_seconds: float
    shutdown_seconds: float

    def check_kind(self, adapter: Adapter) -> None:
        """Refuse options that mean nothing with this adapter's kind of task.

        Raises:
            UserError: names the option.
        """
        texts = adapter.answers_with_texts
        of_the_other = (
            {"--decision": self.decision, "--batch-rows": self.batch_rows}
            if texts
            else {"--max-new-tokens": self.max_new_tokens}
        )
        for name, value in of_the_other.items():
            if value is not None:
                answers = "texts, one at a time" if texts else "labels"
                raise UserError(f"{name}: {adapter.folder} answers with {answers} ({adapter.kind}). Leave it out.")

    def queue_rows(self, answers_with_texts: bool) -> int:
        """Most that may wait.

        Args:
            answers_with_texts: whether answers are generated, one after the other.

        Raises:
            UserError: a request with as many texts as it may have would never fit.
        """
        if answers_with_texts:
            return self.queue or QUEUE_OF_ANSWERS
        rows = self.queue or max(QUEUE_OF_TEXTS, self.max_texts)
        if rows < self.max_texts:
            raise UserError(
                f"--queue: {rows} is less than the {self.max_texts} texts that one request may have. Raise it or lower "
                "--max-texts."
            )
        return rows


def settings(description: str | None) -> Settings:
    """What the command line and the environment say.

    Args:
        description: what the command does, for its help.

    Raises:
        UserError: names the option or variable that cannot be.
    """
    options = _parser(description).parse_args()
    refuse_empty(options, ("adapter", "decision", "host", "model_name"))
    if options.model_name is not None and not re.fullmatch(r"[A-Za-z0-9._:-]{1,64}", options.model_name):
        raise UserError(
            "--model-name: take up to 64 letters, digits and . _ : - for it, since it is part of addresses."
        )
    token = _token()
    if token is None and not options.allow_anonymous and not is_loopback(options.host):
        raise UserError(
            f"--host: at {options.host} other machines reach the service, and anybody could use it. Set "
            f"{TOKEN_VARIABLE} in the environment, or say --allow-anonymous."
        )
    return Settings(
        adapter=Path(options.adapter),
        decision=None if options.decision is None else Path(options.decision),
        name=options.model_name or Path(options.adapter).resolve().name,
        host=options.host,
        port=options.port,
        token=token,
        batch_rows=options.batch_rows,
        queue=options.queue,
        max_texts=options.max_texts,
        max_characters=options.max_characters,
        max_body_bytes=options.max_body_bytes,
        max_new_tokens=options.max_new_tokens,
        timeout_seconds=options.timeout,
        shutdown_seconds=options.shutdown_timeout,
    )


def _parser(description: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m serving.api",
        description=description,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--adapter", metavar="FOLDER", default=str(ADAPTER), help=f"the adapter (default {ADAPTER})")
    add("--decision", metavar="FILE", help="its thresholds (default: those of models/adapter, for it alone)")
    add("--model-name", metavar="NAME", help="what clients call it (default: the folder's name)")
    add("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    add("--port", type=_port, default=8000, help="0: any free one (default 8000)")
    add("--allow-anonymous", action="store_true", help="listen on other addresses without a token")
    add("--batch-rows", metavar="N", type=_count, help=f"most texts to label at a time (default {BATCH_ROWS})")
    add(
        "--queue",
        metavar="N",
        type=_count,
        help=f"most texts that wait (default {QUEUE_OF_TEXTS}; of answers that are texts {QUEUE_OF_ANSWERS})",
    )
    add("--max-texts", metavar="N", type=_count, default=256, help="texts or messages of a request (default 256)")
    add("--max-characters", metavar="N", type=_count, default=20_000, help="of a text or message (default 20000)")
    add("--max-body-bytes", metavar="N", type=_count, default=2**20, help="of a request (default 1048576)")
    add(
        "--max-new-tokens",
        metavar="N",
        type=_count,
        help="of an answer that is a text (default: infer.max_new_tokens of params.yaml, or 256)",
    )
    add("--timeout", metavar="SECONDS", type=_seconds, default=60.0, help="for a request (default 60)")
    add("--shutdown-timeout", metavar="SECONDS", type=_seconds, default=30.0, help="for what runs (default 30)")
    return parser


def _token() -> str | None:
    token = os.environ.get(TOKEN_VARIABLE)
    if token is None:
        return None
    if len(token) < LEAST_TOKEN_CHARACTERS or not re.fullmatch(r"[!-~]+", token):
        raise UserError(
            f"{TOKEN_VARIABLE} in the environment: is no token. Give {LEAST_TOKEN_CHARACTERS} ASCII characters or more "
            "without blanks, as `openssl rand -hex 24` prints them, or unset it."
        )
    return token


def _count(value: str) -> int:
    with suppress(ValueError):
        if int(value) >= 1:
            return int(value)
    raise argparse.ArgumentTypeError(f"{value!r} is no number of 1 or more")


def _port(value: str) -> int:
    with suppress(ValueError):
        if int(value) in range(2**16):
            return int(value)
    raise argparse.ArgumentTypeError(f"{value!r} is no port from 0 to 65535")


def _seconds(value: str) -> float:
    with suppress(ValueError):
        if 0 < float(value) < 1e9:
            return float(value)
    raise argparse.ArgumentTypeError(f"{value!r} is no number of seconds above 0")
