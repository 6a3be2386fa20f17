"""The page of a chat or question answering adapter: answers as they are generated, the base model's beside them."""

from __future__ import annotations

import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager, nullcontext
from html import escape
from typing import Any

import gradio as gr
from peft import PeftModel

from serving.common.chat import HIGHEST_TEMPERATURE, Outcome, Sampling, stream_answer
from serving.predictor import Predictor
from serving.web.events import CHECKING_EVENT, LIGHT_EVENT, MODEL_EVENT, ending, errors_in_page, model_lock
from stages.common.errors import UserError
from stages.common.prompting.conversations import Message

MOST_QUESTION_CHARACTERS = 20_000
# A CPU takes minutes for so many.
MOST_NEW_TOKENS = 1_024
# A fast model would have the browser draw more often than it can.
SECONDS_BETWEEN_UPDATES = 0.1
SIDES = {"tuned": "Tuned", "base": "Base model"}
NONE = "(no answer)"
ENDS = {"stop": "", "length": ", cut at the longest answer", "cancelled": ", stopped"}

# By side what was said there, the user and the assistant in turn; an answer may be empty.
Conversations = dict[str, list[Message]]


def build(predictor: Predictor, blocks: gr.Blocks) -> None:
    """Put the page's controls into the open `gr.Blocks`.

    Args:
        predictor: of an adapter that answers with texts, as `load_for_page` gives it.
        blocks: the page.
    """
    # For each session with an answer being made, what its Stop button sets.
    stops: dict[str | None, threading.Event] = {}

    def ask(question: str, conversations: Conversations, request: gr.Request) -> tuple[Any, ...]:
        with errors_in_page():
            if request.session_hash in stops:
                raise UserError("An answer is being made. Wait until it is there, or stop it.")
            turns = [{"role": "user", "content": _checked(question)}, {"role": "assistant", "content": ""}]
        stops[request.session_hash] = threading.Event()
        conversations = {side: [*said, *map(dict, turns)] for side, said in conversations.items()}
        return "", conversations, *_shown(conversations, "…"), "", *_buttons(running=True)

    def answer(
        conversations: Conversations, both: bool, temperature: float, top_p: float, tokens: float, request: gr.Request
    ) -> Iterator[tuple[Any, ...]]:
        cancelled, remarks = stops[request.session_hash], dict[str, str]()
        with errors_in_page():
            sampling = Sampling(temperature, top_p, int(tokens))
            for side in SIDES if both else ("tuned",):
                start = shown = time.monotonic()
                with _closed_apart(_pieces(predictor, conversations[side], sampling, cancelled, side)) as pieces:
                    for piece in pieces:
                        now = time.monotonic()
                        if isinstance(piece, Outcome):
                            remarks[side] = _remark(side, piece, now - start)
                        else:
                            # NUL is refused where a conversation goes on, and no page can show it.
                            conversations[side][-1]["content"] += piece.replace("\0", "\ufffd")
                            if now - shown < SECONDS_BETWEEN_UPDATES:
                                continue
                        if ending.is_set():
                            cancelled.set()
                        shown = now
                        yield conversations, *_shown(conversations, "…"), "".join(remarks.values())

    def finish(conversations: Conversations, request: gr.Request) -> tuple[Any, ...]:
        stops.pop(request.session_hash, None)
        return *_shown(conversations, NONE), *_buttons(running=False)

    def compare(both: bool, conversations: Conversations) -> tuple[Any, ...]:
        # From here on each side is a conversation of its own, which starts with what was said so far.
        conversations = conversations | {"base": [dict(turn) for turn in conversations["tuned"]]}
        return conversations, *_shown(conversations, NONE), gr.Column(visible=both)

    def clear() -> tuple[Any, ...]:
        return _nothing(), *_shown(_nothing(), ""), ""

    def stop(request: gr.Request) -> None:
        if request.session_hash in stops:
            stops[request.session_hash].set()

    def leave(request: gr.Request) -> None:
        stops.pop(request.session_hash, threading.Event()).set()

    conversations = gr.State(_nothing(), time_to_live=3600)
    # A merged model has no adapter to switch off.
    both = gr.Checkbox(
        False, label="Base model beside it", visible=isinstance(predictor.model, PeftModel),
        info="The same model with the adapter switched off. It goes on from what was said so far.",
    )  # fmt: skip
    with gr.Row():
        with gr.Column(min_width=320):
            tuned = _transcript("tuned")
        with gr.Column(min_width=320, visible=False) as beside:
            base = _transcript("base")
    remarks = gr.HTML(apply_default_css=False)
    question, buttons = _inputs(predictor.adapter.kind)
    sampling = _sampling_inputs(predictor.max_new_tokens)
    transcript, (send, stopping, clearing) = [conversations, tuned, base], buttons
    kept = [*buttons, both]
    answering = gr.on(
        [send.click, question.submit], ask, [question, conversations], [question, *transcript, remarks, *kept],
        **CHECKING_EVENT,
    ).success(
        answer, [conversations, both, *sampling], [*transcript, remarks], show_progress="hidden", **MODEL_EVENT
    )  # fmt: skip
    # `then` alone leaves out what failed, as where the queue is full.
    for afterwards in (answering.success, answering.failure):
        afterwards(finish, conversations, [tuned, base, *kept], **LIGHT_EVENT)
    stopping.click(stop, **LIGHT_EVENT)
    clearing.click(clear, None, [*transcript, remarks], **LIGHT_EVENT)
    both.input(compare, [both, conversations], [*transcript, beside], **LIGHT_EVENT)
    blocks.unload(leave)


def _transcript(side: str) -> gr.HTML:
    # Not gr.Chatbot: even with Markdown off it renders HTML in messages, and its bin empties the page alone.
    gr.HTML(f"<h2>{SIDES[side]}</h2>", apply_default_css=False)
    return gr.HTML(
        _as_html([], ""), container=True, padding=True, autoscroll=True, min_height=200, max_height=440, elem_id=side,
        apply_default_css=False,
    )  # fmt: skip


def _inputs(kind: str) -> tuple[gr.Textbox, list[gr.Button]]:
    hint = "Each question is answered by itself" if kind == "question_answering" else "Shift and Enter make a new line"
    question = gr.Textbox(label="Question", placeholder=hint, max_lines=8, autofocus=True)
    with gr.Row():
        send = gr.Button("Send", variant="primary", min_width=80)
        stop = gr.Button("Stop", variant="stop", min_width=80, interactive=False)
        return question, [send, stop, gr.Button("Clear", min_width=80)]


def _sampling_inputs(max_new_tokens: int) -> tuple[gr.Slider, gr.Slider, gr.Slider]:
    most = max(MOST_NEW_TOKENS, max_new_tokens)
    with gr.Row():
        temperature = gr.Slider(
            0, HIGHEST_TEMPERATURE, 0, step=0.05, label="Temperature", info="0: always the likeliest token",
            min_width=220,
        )  # fmt: skip
        top_p = gr.Slider(
            0.05, 1, 1, step=0.05, label="Top-p", info="1: draw from all tokens", min_width=220,
        )  # fmt: skip
        tokens = gr.Slider(1, most, max_new_tokens, step=1, label="Longest answer", info="in tokens", min_width=220)
    return temperature, top_p, tokens


@contextmanager
def _closed_apart(pieces: Generator[str | Outcome, None, None]) -> Iterator[Generator[str | Outcome, None, None]]:
    """An answer's pieces, closed in a thread of its own where somebody leaves before their end.

    Gradio closes in its event loop what nobody listens to. Closing waits for the token being computed, and all visitors
    would wait with it.
    """
    try:
        yield pieces
    except GeneratorExit:
        threading.Thread(target=pieces.close).start()
        raise


def _pieces(
    predictor: Predictor, said: list[Message], sampling: Sampling, cancelled: threading.Event, side: str
) -> Generator[str | Outcome, None, None]:
    """An answer's pieces, then what is known of it; one side's at a time, since both have the same model."""
    messages = said[-2:-1]
    if predictor.adapter.kind == "chat":
        messages = [turn for pair in _exchanges(said[:-2]) if pair[1]["content"] for turn in pair] + messages
    switched: Any = predictor.model.disable_adapter() if side == "base" else nullcontext()  # type: ignore[operator]
    with model_lock, switched:
        yield (yield from stream_answer(predictor, messages, sampling, cancelled))


def _exchanges(said: list[Message]) -> list[tuple[Message, Message]]:
    return list(zip(said[::2], said[1::2], strict=True))


def _checked(question: str) -> str:
    if not question.strip():
        raise UserError("There is no question yet: write one.")
    if len(question) > MOST_QUESTION_CHARACTERS:
        raise UserError(f"These are {len(question):,} characters; a question may have {MOST_QUESTION_CHARACTERS:,}.")
    return question.strip()


def _shown(conversations: Conversations, pending: str) -> tuple[str, ...]:
    """What both sides show; `pending` stands for a last answer that is empty."""
    return tuple(_as_html(said, pending) for said in conversations.values())


def _as_html(said: list[Message], pending: str) -> str:
    if not said:
        return "<p class='subdued'>Nothing was asked yet.</p>"
    turns = []
    for number, turn in enumerate(said, start=1):
        # Escaped, so that nothing of it is rendered or fetched: no HTML, no pictures of Markdown, no formulas.
        text = escape(turn["content"]) or f"<i class='subdued'>{pending if number == len(said) else NONE}</i>"
        turns.append(f"<div class='turn {turn['role']}' dir='auto'>{text}</div>")
    return f"<div class='turns' role='log'>{''.join(turns)}</div>"


def _remark(side: str, outcome: Outcome, seconds: float) -> str:
    """What is known of an answer, as HTML."""
    tokens = "1 token" if outcome.answer_tokens == 1 else f"{outcome.answer_tokens:,} tokens"
    shortened = "; part of what was said is left out, as too long" if outcome.shortened else ""
    return f"<p class='subdued'>{SIDES[side]}: {tokens} in {seconds:.1f} s{ENDS[outcome.finish_reason]}{shortened}</p>"


def _buttons(running: bool) -> list[Any]:
    """Send, Stop, Clear, and the switch, while an answer is made and while not."""
    return [gr.Button(interactive=not running), gr.Button(interactive=running)] + [
        kind(interactive=not running) for kind in (gr.Button, gr.Checkbox)
    ]


def _nothing() -> Conversations:
    return {side: [] for side in SIDES}
