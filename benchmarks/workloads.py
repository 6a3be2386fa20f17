"""Prompts, labels and training rows of a known mean length, the same ones in every run.

Lengths are drawn evenly from 75 % to 125 % of the mean and mirrored at it, so that the mean of an even number of rows
is exactly as named. Tokens are random: what they are changes no timing. A label has 1 to 4 tokens and a terminator,
and its first token often another label's too, as in a real list of labels.
"""

from __future__ import annotations

import random

from datasets import Dataset, Features

from stages.common.errors import UserError
from stages.common.training.rows import QUESTIONS

SEED = 0
SPREAD = 0.25
TERMINATOR = 2  # <|im_end|> of both tokenizers named below
# Below lie the control tokens, of the tests' tokenizer and of SmolLM2's.
FIRST_TOKEN = 32


def prompt_lengths(rows: int, mean_tokens: int, equal_lengths: bool) -> list[int]:
    """Tokens of each prompt; their mean is `mean_tokens` exactly."""
    if equal_lengths:
        return [mean_tokens] * rows
    generator = random.Random(SEED)
    spread = int(SPREAD * mean_tokens)
    halves = [generator.randint(-spread, spread) for _ in range(rows // 2)]
    lengths = [mean_tokens + half for half in halves] + [mean_tokens - half for half in halves]
    lengths += [mean_tokens] * (rows % 2)
    generator.shuffle(lengths)
    return lengths


def make_prompts(
    rows: int, mean_tokens: int, vocabulary: int, equal_lengths: bool = False, shared_prefix: int = 0
) -> list[list[int]]:
    """Token ids of each prompt.

    Args:
        rows: number of prompts.
        mean_tokens: of a prompt, the shared prefix included.
        vocabulary: number of token ids.
        equal_lengths: all prompts have the mean length.
        shared_prefix: tokens that all prompts begin with.

    Raises:
        UserError: the prefix is longer than the shortest prompt may be.
    """
    lengths = prompt_lengths(rows, mean_tokens, equal_lengths)
    if shared_prefix >= min(lengths):
        raise UserError(
            f"--shared-prefix: {shared_prefix} tokens do not fit into the shortest prompt, which has {min(lengths)}. "
            "Give fewer."
        )
    generator = random.Random(SEED + 1)
    tokens = range(FIRST_TOKEN, vocabulary)
    prefix = generator.choices(tokens, k=shared_prefix)
    return [prefix + generator.choices(tokens, k=length - shared_prefix) for length in lengths]


def make_labels(count: int, vocabulary: int) -> dict[str, list[int]]:
    """Token ids of so many labels: 1 to 4 tokens, the first out of half as many as there are labels, a terminator."""
    generator = random.Random(SEED + 2)
    tokens = range(FIRST_TOKEN, vocabulary)
    firsts = generator.sample(tokens, k=count // 2 + 1)
    found: set[tuple[int, ...]] = set()
    while len(found) < count:
        found.add((generator.choice(firsts), *generator.choices(tokens, k=generator.randint(0, 3)), TERMINATOR))
    return {f"label {number}": list(ids) for number, ids in enumerate(sorted(found))}


def make_rows(prompts: list[list[int]], labels: dict[str, list[int]]) -> Dataset:
    """Training rows as `stages.common.training.rows` gives them, each with a label by chance."""
    answers = random.Random(SEED + 3).choices(list(labels.values()), k=len(prompts))
    features = Features.from_arrow_schema(QUESTIONS)
    return Dataset.from_dict({"prompt_ids": prompts, "completion_ids": answers}, features=features)


def mean_tokens(rows: Dataset) -> float:
    """Tokens of a training row, prompt and answer, padding left out."""
    return sum(len(row["prompt_ids"]) + len(row["completion_ids"]) for row in rows) / len(rows)
