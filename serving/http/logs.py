"""Logs as JSON lines on stderr, without anything that a client sent."""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import UTC, datetime
from typing import Any, TextIO

from stages.common.errors import UserError

LOGGER = logging.getLogger("serving.api")


class JsonLines(logging.Formatter):
    """A line for each record.

    Of an error the type and the places in the code are said and not its message, which may hold a text; but of a
    UserError that as well, which never does.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The record as one line of JSON."""
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
        }
        fields = getattr(record, "fields", None)
        # asyncio puts the error's message behind the first line.
        line |= {"event": "message", "message": record.getMessage().partition("\n")[0]} if fields is None else fields
        if record.exc_info and record.exc_info[1] is not None:
            line |= describe(record.exc_info[1])
        return json.dumps(line, ensure_ascii=True)


def describe(error: BaseException) -> dict[str, Any]:
    """An error's type, its message where that may be said, and where it was raised, outermost first."""
    frames = traceback.extract_tb(error.__traceback__)
    return {
        "error": type(error).__name__,
        **({"reason": str(error)} if isinstance(error, UserError) else {}),
        "raised": [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames],
    }


def say(event: str, **fields: Any) -> None:
    """Write a line about an event of the service's own."""
    LOGGER.info(event, extra={"fields": {"event": event, **fields}})


def start_logging(stream: TextIO | None = None) -> None:
    """Let all loggers of this process, and warnings, write JSON lines.

    Args:
        stream: None: stderr as it is now, so that redirecting it later changes nothing.
    """
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(JsonLines())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(True)
    LOGGER.setLevel(logging.INFO)
