"""Colours, fonts and sizes of the page, which come from this machine alone."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from serving.common.adapter import Adapter
from stages.common.tables import read_json

CSS = Path(__file__).with_name("page.css")
TITLES = {
    "classification": "Text classification",
    "multi_label": "Text classification",
    "question_answering": "Questions and answers",
    "chat": "Chat",
}


def theme() -> Any:
    """Gradio's own in blue, its grey on white dark enough to be read."""
    import gradio as gr

    # Of the semibold that it takes by default its package has a part of the letters.
    sans = (gr.themes.LocalFont("Source Sans Pro", weights=(400, 700)), "ui-sans-serif", "system-ui", "sans-serif")
    own = gr.themes.Default(primary_hue="blue", secondary_hue="blue", neutral_hue="slate", font=sans)
    return own.set(body_text_color_subdued="*neutral_500", block_info_text_color="*neutral_500")


def heading(title: str, adapter: Adapter) -> str:
    """The first lines of the page, as HTML: what answers here.

    Args:
        title: of the page.
        adapter: the one that answers.
    """
    base = adapter.folder / "base.json"
    # A merged model may come without.
    on = f" on {escape(_base_name(read_json(base)['source']))}" if base.is_file() else ""
    has_thresholds = adapter.kind == "multi_label" or len(adapter.prompt_format.labels) == 2
    chosen = "" if adapter.rule or not has_thresholds else " No decision.json says which thresholds were chosen for it."
    return (
        f"<div class='heading'><h1>{escape(title)}</h1><p class='subdued'>{escape(str(adapter.folder))}{on}.{chosen} "
        "Everything is computed on this machine.</p></div>"
    )


def _base_name(source: dict[str, Any]) -> str:
    """What a base is known by, whatever its source."""
    key = {"package": "member", "hub": "repo_id", "folder": "path"}[source["source"]]
    name = source[key] if isinstance(source[key], str) else source[key][-1]
    return name.rstrip("/").rsplit("/", 1)[-1].removesuffix(".gguf")
