"""What the events of both pages share: one model thread, and mistakes said in the page."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import gradio as gr

from stages.common.errors import UserError

# Of the events that use the model one runs at a time, the others wait in the queue.
MODEL_EVENT: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "api_visibility": "private"}
# Everything else is answered at once.
_LIGHT: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
LIGHT_EVENT: dict[str, Any] = {"queue": False, **_LIGHT}
# Of events outside the queue Gradio shows no message in the page.
CHECKING_EVENT: dict[str, Any] = {"concurrency_limit": None, **_LIGHT}
# An event that Gradio has given up may still be running.
model_lock = threading.Lock()
# Set when the server ends.
ending = threading.Event()


@contextmanager
def errors_in_page() -> Iterator[None]:
    """Show what a user can mend as a message in the page, until they close it."""
    try:
        yield
    except UserError as error:
        # Gradio renders messages as HTML, and they quote names of files, columns and values.
        raise gr.Error(escape(str(error)), duration=None, print_exception=False) from None
