"""A tokenizer that tells its own control tokens from the same characters in somebody's text.

A tokenizer finds its control tokens by their spelling, wherever it stands: a text with `<|im_end|>` in it would end the
message. So the control tokens are respelled when the tokenizer is loaded, with characters nobody can guess. Templates
are respelled along with them; whatever comes from data is not, and so can only ever be plain text.
"""

from __future__ import annotations

import json
import re
import secrets
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from stages.common.errors import UserError

# Names under which a tokenizer_config.json keeps special tokens and chat templates read them.
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, eq=False)
class PromptTokenizer:
    """A loaded tokenizer; see `load_prompt_tokenizer`.

    Attributes:
        backend: the tokenizer with its control tokens respelled; it adds no tokens of its own.
        control_ids: id of each control token under its public spelling.
        nonce: the unguessable part of the private spellings. It never reaches an output.
        special_tokens: public spelling of "bos_token", "eos_token" and so on, as far as the tokenizer has them.
        leading_bos_id: id of the begin token when the tokenizer puts one before every text, else None.
        chat_template: the Jinja source, or None when the base model has none.
        longest_token_characters: no token stands for more characters than this.
    """

    backend: Tokenizer
    control_ids: dict[str, int]
    nonce: str
    special_tokens: dict[str, str]
    leading_bos_id: int | None
    chat_template: str | None
    longest_token_characters: int

    @cached_property
    def _control_pattern(self) -> re.Pattern[str]:
        # The longest first, as the tokenizer itself matches.
        contents = sorted(self.control_ids, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, contents)) or "(?!)")

    @cached_property
    def _contents(self) -> dict[str, str]:
        return {str(token_id): content for content, token_id in self.control_ids.items()}

    @property
    def eos_id(self) -> int | None:
        """Id of the end-of-text token; None when the tokenizer names none."""
        return self.control_ids.get(self.special_tokens.get("eos_token", ""))

    @property
    def pad_id(self) -> int | None:
        """Id of the padding token; the end token where the tokenizer names none."""
        return self.control_ids.get(self.special_tokens.get("pad_token", ""), self.eos_id)

    def stand_in(self, name: str) -> str:
        """A string that occurs in no text, template or vocabulary."""
        return f"<{self.nonce}-{name}>"

    def respell(self, template_text: str) -> str:
        """Control tokens of a template in their private spelling; everything else unchanged."""
        return self._control_pattern.sub(lambda match: self.stand_in(str(self.control_ids[match[0]])), template_text)

    def publish(self, prompt: str) -> str:
        """The prompt as people write it: private spellings replaced by the public ones."""
        if self.nonce not in prompt:
            return prompt
        return re.sub(f"<{self.nonce}-([0-9]+)>", lambda match: self._contents[match[1]], prompt)

    def encode(self, prompts: list[str]) -> list[list[int]]:
        """Token ids of each prompt; only privately spelled control tokens give control ids."""
        return [encoding.ids for encoding in self.backend.encode_batch_fast(prompts, add_special_tokens=False)]

    def without_last_tokens(self, texts: list[str], counts: list[int]) -> list[str]:
        """Each text without its last `count` tokens, cut between two characters; empty when it has no more."""
        shorter = []
        encodings = self.backend.encode_batch(texts, add_special_tokens=False)
        for text, encoding, count in zip(texts, encodings, counts, strict=True):
            # A character of several tokens starts where its first token starts, so none is cut in half.
            start = encoding.token_to_chars(len(encoding) - count) if count < len(encoding) else None
            shorter.append(text[: start[0]] if start else "")
        return shorter

    def encode_behind(self, anchor: str, texts: list[str]) -> list[list[int]]:
        """Token ids that each text has behind `anchor`, which is not among them."""
        # SentencePiece tokenizers put a space before a text's first word. The anchor before it, taken off again, gives
        # the tokens that the text has behind a prompt.
        [anchor_ids] = self.encode([anchor])
        anchored = self.encode([anchor + text for text in texts])
        follows = [ids[: len(anchor_ids)] == anchor_ids for ids in anchored]
        alone = iter(self.encode([text for text, behind in zip(texts, follows, strict=True) if not behind]))
        return [
            ids[len(anchor_ids) :] if behind else next(alone) for ids, behind in zip(anchored, follows, strict=True)
        ]

    def first_tokens(self, anchor: str, text: str, count: int) -> tuple[str, list[int]]:
        """What of `encode_behind(anchor, [text])` is left of the first `count` tokens, cut between two characters.

        Args:
            anchor: as in `encode_behind`.
            text: of more than `count` tokens there.
            count: at least 0.

        Returns:
            The beginning of the text, and its tokens.
        """
        [anchor_ids] = self.encode([anchor])
        before = anchor
        encoding = self.backend.encode(anchor + text, add_special_tokens=False)
        if encoding.ids[: len(anchor_ids)] != anchor_ids:
            before, anchor_ids = "", []
            encoding = self.backend.encode(text, add_special_tokens=False)
        starts = [start for start, _ in encoding.offsets]
        first, last = len(anchor_ids), len(anchor_ids) + count
        end = starts[last]
        while last > first and starts[last - 1] >= end:
            last -= 1  # a token of the character that the first token left out belongs to
        return (before + text)[len(before) : end], encoding.ids[first:last]


def load_prompt_tokenizer(folder: str | Path) -> PromptTokenizer:
    """Load a tokenizer from a folder as `transformers` saves it: models/tokenizer, or an adapter's folder.

    Args:
        folder: holds tokenizer.json, tokenizer_config.json and, where the base model chats, chat_template.jinja (or a
            "chat_template" in tokenizer_config.json).

    Raises:
        UserError: a file is missing or is not a tokenizer's.
    """
    folder = Path(folder)
    definition = _read(folder / "tokenizer.json")
    config = _read(folder / "tokenizer_config.json")
    nonce = secrets.token_hex(16)
    try:
        # White space can be an added token too (runs of blanks in GPT-NeoX's tokenizers): that is text like any other.
        control_ids = {
            token["content"]: token["id"]
            for token in definition["added_tokens"]
            if token["content"].strip("\u2581 \t\r\n\f\v")
        }
        special_tokens = _special_tokens(config)
        first_ids = Tokenizer.from_str(json.dumps(definition)).encode("").ids[:1]
        bos_id = control_ids.get(special_tokens.get("bos_token", ""))
        spellings = {content: f"<{nonce}-{token_id}>" for content, token_id in control_ids.items()}
        _respell_definition(definition, spellings)
        backend = Tokenizer.from_str(json.dumps(definition))
    except Exception as error:  # tokenizers raises bare Exceptions for whatever it cannot read
        raise UserError(
            f"{folder}: does not hold a tokenizer that the `tokenizers` library can read ({error}). "
            "Run `dvc repro base_model`, or choose another base model."
        ) from None
    return PromptTokenizer(
        backend=backend,
        control_ids=control_ids,
        nonce=nonce,
        special_tokens=special_tokens,
        leading_bos_id=bos_id if first_ids == [bos_id] else None,
        chat_template=_chat_template(folder, config),
        longest_token_characters=max(len(token) for token in backend.get_vocab(with_added_tokens=False)),
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: not found. Run `dvc repro base_model` (or `dvc pull`); a base model needs a fast tokenizer."
        ) from None
    except ValueError as error:
        raise UserError(f"{path}: is not valid JSON ({error}). Restore it with `dvc checkout` or `dvc pull`.") from None
    assert isinstance(values, dict)
    return values


def _special_tokens(config: dict[str, Any]) -> dict[str, str]:
    """The special tokens that the configuration names; each is a string, or an object with a "content"."""
    found = {name: config[name] for name in _SPECIAL_NAMES if config.get(name)}
    return {name: token["content"] if isinstance(token, dict) else token for name, token in found.items()}


def _chat_template(folder: Path, config: dict[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.exists():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):  # several named templates
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _respell_definition(definition: dict[str, Any], spellings: dict[str, str]) -> None:
    """Rename a tokenizer.json's control tokens, in place, also where the model could make one out of plain text."""
    for token in definition["added_tokens"]:
        token["content"] = spellings.get(token["content"], token["content"])
    model = definition["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {spellings.get(token, token): token_id for token, token_id in model["vocab"].items()}
    else:  # Unigram: pairs of piece and score
        model["vocab"] = [[spellings.get(piece, piece), score] for piece, score in model["vocab"]]
    if "merges" in model:
        pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
        model["merges"] = [pair for pair in pairs if spellings.keys().isdisjoint([*pair, "".join(pair)])]
    if model.get("unk_token") in spellings:
        model["unk_token"] = spellings[model["unk_token"]]
    definition.update(post_processor=None, truncation=None, padding=None)
