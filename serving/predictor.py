"""Texts in, answers out, with an adapter: what `python -m serving.predict` and programs of your own call."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serving.common.adapter import ADAPTER, Adapter, pin_base, read_adapter
from stages.common.prompting.conversations import EncodedConversation, Message, encode_conversations
from stages.common.prompting.prompts import EncodedPrompt, encode_prompts
from stages.common.prompting.tokenizer import PromptTokenizer, load_prompt_tokenizer

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

MAX_NEW_TOKENS = 256
# A text or question; of a chat the turns so far, the user's last.
Content = str | list[Message]


@dataclass(frozen=True)
class Predictor:
    """A loaded adapter; see `load_predictor`.

    Attributes:
        adapter: what lies in its folder.
        model: base and adapter, or what they were merged into, in evaluation mode.
        tokenizer: the adapter's.
        max_new_tokens: longest answer, where answers are texts.
    """

    adapter: Adapter
    model: PreTrainedModel | PeftModel
    tokenizer: PromptTokenizer
    max_new_tokens: int

    def predict(
        self, contents: Sequence[Content], advance: Callable[[int], object] = lambda count: None
    ) -> list[dict[str, Any]]:
        """Answer texts, questions or conversations.

        Args:
            contents: not empty each, white space around them taken off. A chat takes a text as its first turn.
            advance: is told how many are done, after each batch of the model.

        Returns:
            For each, in order: with one label for a text `label` and `probabilities` by label, and with a threshold
            `threshold` and `positive_label`; with several `labels`, `probabilities` and `thresholds`; else `answer`.
            What was too long for the prompt has `shortened`, which is then true.

        Raises:
            UserError: the model's scores are no numbers, or the GPU's memory is too small.
        """
        prompts = self.encode(contents)
        ids = [prompt.ids for prompt in prompts]
        answer = self._answers if self.adapter.answers_with_texts else self._labels
        answers = answer(ids, advance)
        return [
            found | ({"shortened": True} if prompt.shortened else {})
            for found, prompt in zip(answers, prompts, strict=True)
        ]

    def encode(self, contents: Sequence[Content]) -> Sequence[EncodedPrompt | EncodedConversation]:
        """The prompts that the model reads, as token ids; arguments as of `predict`."""
        prompt_format, answer_tokens = self.adapter.prompt_format, [self.max_new_tokens] * len(contents)
        if self.adapter.kind == "chat":
            conversations = [
                [{"role": "user", "content": content}] if isinstance(content, str) else content for content in contents
            ]
            return encode_conversations(prompt_format, self.tokenizer, conversations, answer_tokens)
        texts = [content for content in contents if isinstance(content, str)]
        assert len(texts) == len(contents), "only chats take conversations"
        limits = answer_tokens if self.adapter.answers_with_texts else None
        return encode_prompts(prompt_format, self.tokenizer, texts, limits)

    def _labels(self, prompts: list[list[int]], advance: Callable[[int], object]) -> list[dict[str, Any]]:
        # torch and transformers take seconds to import; whoever has a predictor has imported them.
        from stages.common.branches import label_branches
        from stages.common.schema.measuring import Infer
        from stages.common.scoring.label_predictions import predict_label, predict_label_sets

        prompt_format = self.adapter.prompt_format
        if self.adapter.kind == "multi_label":
            _, table = predict_label_sets(self.model, prompts, label_branches(prompt_format.to_json()), advance)
        else:
            label_ids = {label: list(prompt_format.completions[label]["ids"]) for label in prompt_format.labels}
            scores = Infer(method="label_scores", max_new_tokens=None)
            _, found = predict_label(self.model, prompts, label_ids, scores, advance)
            assert found is not None, "scored labels have probabilities"
            table = found
        rows = (dict(zip(prompt_format.labels, row, strict=True)) for row in table.tolist())
        return [decide(row, self._rule) for row in rows]

    @cached_property
    def _rule(self) -> Mapping[str, Any]:
        return rule_of(self.adapter)

    def _answers(self, prompts: list[list[int]], advance: Callable[[int], object]) -> list[dict[str, Any]]:
        from tokenizers import Tokenizer

        from stages.common.scoring.batches import TOKENS_PER_GENERATED_BATCH
        from stages.common.scoring.generation import generate_answers

        tokenizer = Tokenizer.from_file(str(self.adapter.folder / "tokenizer.json"))
        ends, most = self.adapter.prompt_format.terminator_ids, TOKENS_PER_GENERATED_BATCH[self.model.device.type]
        answers = generate_answers(self.model, tokenizer, prompts, ends, self.max_new_tokens, most, advance)
        return [{"answer": answer.strip()} for answer in answers]


def rule_of(adapter: Adapter) -> Mapping[str, Any]:
    """The rule that its labels are decided by, which is the plainest where its folder names none."""
    from stages.common.scoring.label_predictions import APPLIES_FROM

    if adapter.rule is not None:
        return adapter.rule
    if adapter.kind == "multi_label":
        return {"rule": "thresholds", "thresholds": dict.fromkeys(adapter.prompt_format.labels, APPLIES_FROM)}
    return {"rule": "argmax"}


def decide(probabilities: dict[str, float], rule: Mapping[str, Any]) -> dict[str, Any]:
    """A row's label or labels by a rule of models/decision.json, with what they were decided on.

    Args:
        probabilities: by label, in the order of task.labels.
        rule: "threshold" (of two labels), "thresholds" (of each of several), or another: the likeliest label then, the
            first of equally likely ones.
    """
    if rule["rule"] == "thresholds":
        thresholds = {label: rule["thresholds"][label] for label in probabilities}
        labels = [label for label, probability in probabilities.items() if probability >= thresholds[label]]
        return {"labels": labels, "probabilities": probabilities, "thresholds": thresholds}
    if rule["rule"] != "threshold":
        return {"label": max(probabilities, key=probabilities.__getitem__), "probabilities": probabilities}
    positive, threshold = rule["positive_label"], rule["threshold"]
    [negative] = [label for label in probabilities if label != positive]
    return {
        "label": positive if probabilities[positive] >= threshold else negative,
        "probabilities": probabilities,
        "threshold": threshold,
        "positive_label": positive,
    }


def load_predictor(
    folder: str | Path = ADAPTER, decision: str | Path | None = None, max_new_tokens: int = MAX_NEW_TOKENS
) -> Predictor:
    """Load an adapter and its base, which is fetched from its pinned source and verified where it is absent.

    Args:
        folder: the adapter, or a model that it was merged into, which needs no base.
        decision: the file with its decision rule; None: see `read_adapter`.
        max_new_tokens: longest answer, where answers are texts.

    Raises:
        UserError: the adapter, its rule or its base cannot be used, or the base cannot be had.
    """
    return load(read_adapter(Path(folder), None if decision is None else Path(decision)), max_new_tokens)


def load(adapter: Adapter, max_new_tokens: int) -> Predictor:
    """The same for an adapter whose folder was read already."""
    tokenizer, scores_labels = load_prompt_tokenizer(adapter.folder), not adapter.answers_with_texts
    # How many texts will come is not known, so that compiling is left to COMPILE_LAYERS=1.
    if adapter.merged:
        from serving.common.merged import load_fast_merged

        return Predictor(
            adapter, load_fast_merged(adapter.folder, scores_labels=scores_labels), tokenizer, max_new_tokens
        )
    note = pin_base(adapter.folder)
    if note is not None:
        print(note, file=sys.stderr, flush=True)
    from stages.common.scoring.loading import load_fast_model

    model = load_fast_model(adapter.folder, 0, scores_labels=scores_labels)
    return Predictor(adapter, model, tokenizer, max_new_tokens)
