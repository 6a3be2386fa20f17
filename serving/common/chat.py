"""One answer of a chat or question-answering adapter, piece by piece as it is generated, greedily or sampled."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from tokenizers import Tokenizer

from stages.common.errors import UserError
from stages.common.prompting.conversations import Message
from stages.common.schema.ingest import Conversation
from stages.common.sources.cells import RefusedRow
from stages.common.sources.conversations import messages_maker

if TYPE_CHECKING:
    import torch

    from serving.predictor import Content, Predictor

HIGHEST_TEMPERATURE = 2.0  # as OpenAI's API has it
# Below it the likeliest token has all of the probability, and logits divided by it would leave float32's range.
LEAST_TEMPERATURE = 1e-4
# Seeds come as 64-bit integers, with sign, and torch takes all of them.
SEEDS = range(-(2**63), 2**63)
# torch has one random state for a process: a seed means nothing while two answers draw from it.
_GENERATING = threading.Lock()


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    Attributes:
        temperature: what logits are divided by, 0 to 2; 0: the likeliest token always, as `Predictor.predict` does it.
        top_p: tokens are drawn from the likeliest ones that have this much probability together, 0 to 1.
        max_new_tokens: longest answer, its terminator included; so much room is kept in the prompt.
        stop: texts that end the answer and are left out of it.
        seed: the same seed gives the same answer on the same machine; None: another one each time.

    Raises:
        UserError: names the value that is out of its range.
    """

    temperature: float
    top_p: float
    max_new_tokens: int
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= HIGHEST_TEMPERATURE:
            raise UserError(f"temperature: {self.temperature} is not from 0 to {HIGHEST_TEMPERATURE:g}.")
        if not 0 <= self.top_p <= 1:
            raise UserError(f"top_p: {self.top_p} is not from 0 to 1.")
        if self.max_new_tokens < 1:
            raise UserError(f"the longest answer: {self.max_new_tokens} tokens are none. Give 1 or more.")
        if not all(self.stop):
            raise UserError("stop: an empty text would end every answer at once. Leave it out.")
        if self.seed is not None and self.seed not in SEEDS:
            raise UserError(f"seed: {self.seed} is no integer of 64 bits.")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken."""
        return self.temperature < LEAST_TEMPERATURE


class Outcome(NamedTuple):
    """What is known of an answer when it has ended.

    Attributes:
        finish_reason: "stop": the model or a text of `Sampling.stop` ended it; "length": max_new_tokens; "cancelled".
        prompt_tokens: tokens read.
        answer_tokens: tokens generated, terminator included.
        shortened: whether the conversation was too long and lost its beginning, or its last text its end.
    """

    finish_reason: Literal["stop", "length", "cancelled"]
    prompt_tokens: int
    answer_tokens: int
    shortened: bool


def stream_answer(
    predictor: Predictor, messages: list[Message], sampling: Sampling, cancelled: threading.Event | None = None
) -> Generator[str, None, Outcome]:
    """The answer in pieces, generated in a thread of its own; together they are what `Predictor.predict` would give.

    A generator's return value is the outcome: `outcome = yield from stream_answer(...)`. Closing the generator ends the
    generation. Of several in one process, one generates and the others wait.

    Args:
        predictor: of an adapter that answers with texts.
        messages: see `check_messages`.
        sampling: how tokens are drawn.
        cancelled: set by whoever no longer wants the answer; it ends after the token that is being computed.

    Raises:
        UserError: see `write_answer`.
    """
    cancelled = cancelled or threading.Event()
    pieces: SimpleQueue[str | None] = SimpleQueue()
    with ThreadPoolExecutor(1, "generation") as pool:
        written = pool.submit(write_answer, predictor, messages, sampling, pieces.put, cancelled)
        written.add_done_callback(lambda _: pieces.put(None))
        try:
            while (piece := pieces.get()) is not None:
                yield piece
        except GeneratorExit:
            cancelled.set()
            raise
    return written.result()


def write_answer(
    predictor: Predictor,
    messages: list[Message],
    sampling: Sampling,
    emit: Callable[[str], object],
    cancelled: threading.Event,
) -> Outcome:
    """The same in this thread: `emit` is given each piece.

    Raises:
        UserError: the messages are none that the adapter answers, or its chat template cannot be used for them.
    """
    import torch

    checked = check_messages(predictor.adapter.kind, messages)
    content: Content = checked if predictor.adapter.kind == "chat" else checked[0]["content"]
    [prompt] = replace(predictor, max_new_tokens=sampling.max_new_tokens).encode([content])
    tokenizer = _tokenizer(predictor.adapter.folder / "tokenizer.json")
    ends = predictor.adapter.prompt_format.terminator_ids
    text = _GrowingText(sampling.stop, emit)
    generated: list[int] = []

    def after_each_token(ids: torch.Tensor, scores: object, **options: object) -> torch.Tensor:
        generated.append(int(ids[0, -1]))
        if generated[-1] not in ends:
            # transformers' own streamers forget at each line break what came before, which not all decoders allow.
            text.become(tokenizer.decode(generated, skip_special_tokens=True))
        return torch.tensor([text.ended or cancelled.is_set()], device=ids.device)

    with _GENERATING:
        if not cancelled.is_set():
            _generate(predictor, prompt.ids, sampling, after_each_token)
    text.finish()
    finish: Literal["stop", "length", "cancelled"] = "length" if generated else "cancelled"
    if text.ended or (generated and generated[-1] in ends):
        finish = "stop"
    elif cancelled.is_set() and len(generated) < sampling.max_new_tokens:
        finish = "cancelled"
    return Outcome(finish, len(prompt.ids), len(generated), prompt.shortened)


def check_messages(kind: str, messages: list[Message]) -> list[Message]:
    """Messages as `ingest` would have taken them with an answer behind them, white space around their contents off.

    Args:
        kind: "chat": maybe a system message, then the user's and the assistant's in turn, the user's last;
            "question_answering": one user's message.
        messages: each with "role" and "content".

    Raises:
        UserError: roles are unknown or out of order, or a content is empty or no text; does not show the contents.
    """
    assert kind in ("question_answering", "chat"), "the caller knows what the adapter answers"
    form = Conversation(column="messages", format="messages")
    taker = messages_maker(form, cast(Literal["question_answering", "chat"], kind))
    if messages and messages[-1].get("role") == "assistant":
        raise UserError("messages: the last one is the assistant's; it has to be the user's, to be answered.")
    try:
        return taker([*messages, {"role": "assistant", "content": "?"}] if messages else [])[:-1]
    except RefusedRow as error:
        raise UserError(f"messages: {error.reason}.") from None


class _GrowingText:
    """An answer's text, of which only what can no longer change is emitted, without white space around it.

    Attributes:
        ended: whether one of the texts of `stop` is in it.
    """

    def __init__(self, stop: tuple[str, ...], emit: Callable[[str], object]) -> None:
        self.ended = False
        self._stop = stop
        self._emit = emit
        self._text = self._emitted = ""

    def become(self, text: str) -> None:
        """Take the text as it is after one more token."""
        ends = [text.find(stop) for stop in self._stop if stop in text]
        self.ended = bool(ends)
        self._text = text[: min(ends)] if ends else text
        self._advance(self._text if self.ended else self._settled())

    def finish(self) -> None:
        """Emit the rest."""
        self._advance(self._text)

    def _settled(self) -> str:
        # A character of several tokens is U+FFFD until its last one is there.
        text = self._text.rstrip("\ufffd")
        begun = [
            size
            for stop in self._stop
            for size in range(1, min(len(stop), len(text) + 1))
            if text.endswith(stop[:size])
        ]
        return text[: len(text) - max(begun, default=0)]

    def _advance(self, text: str) -> None:
        stripped = text.strip()
        if len(stripped) > len(self._emitted):
            self._emit(stripped[len(self._emitted) :])
            self._emitted = stripped


def _generate(
    predictor: Predictor, prompt: list[int], sampling: Sampling, after_each_token: Callable[..., torch.Tensor]
) -> None:
    import torch
    from transformers import GenerationConfig

    from stages.common.scoring.label_scores import language_model

    decoder: Any = language_model(predictor.model)
    # See `generate_answers`: what many models bring along is not wanted, and neither are transformers' own 50 tokens.
    decoder.generation_config = GenerationConfig()
    # transformers refuses integers here.
    drawn = {"temperature": float(sampling.temperature), "top_p": float(sampling.top_p), "top_k": 0}
    ids = torch.tensor([prompt], device=decoder.device)
    with torch.inference_mode(), torch.random.fork_rng([ids.device] if ids.is_cuda else []):
        if sampling.seed is None:
            torch.seed()
        else:
            torch.manual_seed(sampling.seed)
        decoder.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=sampling.max_new_tokens,
            eos_token_id=predictor.adapter.prompt_format.terminator_ids,
            pad_token_id=0,
            stopping_criteria=[after_each_token],
            do_sample=not sampling.greedy,
            **({} if sampling.greedy else drawn),
        )


@lru_cache(maxsize=4)
def _tokenizer(file: Path) -> Tokenizer:
    return Tokenizer.from_file(str(file))
