"""Training rows as tensors: padded to the longest, or laid end to end."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

IGNORED = -100  # PyTorch's and TRL's label for positions without a loss
# A batch's tokens and answer tokens are rounded up to such multiples or more. An answer token too many costs the LM
# head alone, and with multiples of 8 for both a hundred batches of 32 rows had 20 shapes to record; so they have 8.
MULTIPLE_OF_TOKENS = 8
MULTIPLE_OF_ANSWERS = 32


def collate(rows: list[dict[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """Join prompts and completions, padded on the right, with labels on answers only.

    Answers are the completions, and in a conversation those earlier answers that `prompt_answer_mask` marks.
    Padding is on the right because a left-padded row gave NaN losses with SDPA in bfloat16.

    Args:
        rows: token ids under "prompt_ids" and "completion_ids"; for conversations booleans, one for each token of the
            prompt, under "prompt_answer_mask"; with weighted loss a number under "weight".
        pad_id: a token id for padding; the attention mask hides it.

    Returns:
        `input_ids`, `attention_mask` and `labels`, each (rows, longest row); `kept`, `targets` and, where rows have
        one, `weights`, see `_answers`.
    """
    rows = rows or _no_row(pad_id)
    sequences = [_tokens_and_labels(row) for row in rows]
    longest = max(len(tokens) for tokens, _ in sequences)
    ids = np.full((len(rows), longest), pad_id)
    labels = np.full((len(rows), longest), IGNORED)
    mask = np.zeros((len(rows), longest), np.int64)
    for index, (tokens, of_row) in enumerate(sequences):
        ids[index, : len(tokens)] = tokens
        labels[index, : len(tokens)] = of_row
        mask[index, : len(tokens)] = 1
    starts = np.arange(len(rows)) * longest
    batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    return _tensors(batch | _answers(sequences, starts, _weights(rows), length=None))


def collate_packed(rows: list[dict[str, Any]], pad_id: int) -> dict[str, torch.Tensor]:
    """Lay prompts and completions end to end, in one sequence whose length is rounded up a little.

    The rounding, by 1 to 2 % on average, leaves few shapes, so that a step's kernels can be recorded for each.

    Args:
        rows: as for `collate`.
        pad_id: a token id for what fills the sequence up, a row of its own.

    Returns:
        `input_ids`, `position_ids` and `labels`, each (1, tokens); `boundaries` int32 (rows + 2,): 0, where each row
        ends, and the end of the filling; `kept`, `targets` and, where rows have one, `weights`, see `_answers`.
    """
    rows = rows or _no_row(pad_id)
    sequences = [_tokens_and_labels(row) for row in rows]
    ends = np.cumsum([len(tokens) for tokens, _ in sequences])
    length = round_up(int(ends[-1]), MULTIPLE_OF_TOKENS)
    filling = length - int(ends[-1])
    starts = np.concatenate([[0], ends[:-1]])
    batch = {
        "input_ids": np.concatenate([*(tokens for tokens, _ in sequences), np.full(filling, pad_id)])[None],
        "position_ids": np.concatenate([*(np.arange(len(tokens)) for tokens, _ in sequences), np.arange(filling)])[
            None
        ],
        "labels": np.concatenate([*(labels for _, labels in sequences), np.full(filling, IGNORED)])[None],
        "boundaries": np.concatenate([[0], ends, [length]]).astype(np.int32),
    }
    count = sum(int((labels != IGNORED).sum()) for _, labels in sequences)
    return _tensors(batch | _answers(sequences, starts, _weights(rows), length=round_up(count, MULTIPLE_OF_ANSWERS)))


def _no_row(pad_id: int) -> list[dict[str, Any]]:
    """What stands for no rows at all, which one of several processes may have: a token without a loss."""
    return [{"prompt_ids": [pad_id], "completion_ids": []}]


def round_up(count: int, least: int) -> int:
    """The next multiple of a power of two that is a 64th to a 32nd of `count`, and at least `least`."""
    multiple = max(least, 1 << max(0, count.bit_length() - 6))
    return -(-count // multiple) * multiple


def _tokens_and_labels(row: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    prompt, completion = np.array(row["prompt_ids"], np.int64), np.array(row["completion_ids"], np.int64)
    tokens = np.concatenate([prompt, completion])
    learned = np.zeros(len(tokens), np.bool_)
    learned[len(prompt) :] = True
    if row.get("prompt_answer_mask") is not None:
        learned[: len(prompt)] = row["prompt_answer_mask"]
        assert not learned[0], "nothing comes before the first token to predict it from"
    return tokens, np.where(learned, tokens, IGNORED)


def _answers(
    sequences: list[tuple[np.ndarray, np.ndarray]], starts: np.ndarray, weights: np.ndarray | None, length: int | None
) -> dict[str, np.ndarray]:
    """Where logits are needed and what they are to predict.

    Args:
        sequences: tokens and labels of each row.
        starts: place of each row's first token, all rows of the batch laid end to end.
        weights: of the rows.
        length: how many there are to be, filled up with places whose target is IGNORED; None for no filling.

    Returns:
        `kept` int64 (n,): places before answer tokens; `targets` int64 (n,): these tokens; `weights` float32 (n,): of
        their rows.
    """
    before = [np.flatnonzero(labels[1:] != IGNORED) for _, labels in sequences]
    kept = np.concatenate([start + places for start, places in zip(starts, before, strict=True)])
    targets = np.concatenate([labels[1:][places] for (_, labels), places in zip(sequences, before, strict=True)])
    filling = 0 if length is None else length - len(kept)
    answers = {"kept": np.pad(kept, (0, filling)), "targets": np.pad(targets, (0, filling), constant_values=IGNORED)}
    if weights is not None:
        answers["weights"] = np.pad(np.repeat(weights, [len(places) for places in before]), (0, filling))
    return answers


def _weights(rows: list[dict[str, Any]]) -> np.ndarray | None:
    return np.array([row["weight"] for row in rows], np.float32) if "weight" in rows[0] else None


def _tensors(arrays: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in arrays.items()}
