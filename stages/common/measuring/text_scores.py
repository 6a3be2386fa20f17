"""How close generated answers are to their references: ROUGE-L, SQuAD's F1 and exact match, perplexity, repetition.

For texts in ASCII the numbers are those of the packages rouge_score (no stemmer) and torchmetrics (SQuAD). Both are
made for English; `words` and `squad_words` say what differs for other texts.
"""

from __future__ import annotations

import string
import unicodedata
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import regex
from rapidfuzz.distance import LCSseq

# Scripts that put no space between words: each of their characters, with its marks, counts as a word.
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}"
_UNSPACED_CHARACTER = regex.compile(rf"([{_UNSPACED}]\p{{M}}*)")
_WORD = regex.compile(r"[\p{L}\p{M}\p{N}]+")
# string.punctuation and Unicode's, which leaves some of the former to symbols.
_PUNCTUATION = regex.compile(r"[\p{P}$+<=>^`|~]+")
_ARTICLES = frozenset({"a", "an", "the"})
# Byte → its lower-case letter or digit, everything else a space.
_ASCII_WORDS = bytes(ord(chr(i).lower()) if i < 128 and chr(i).isalnum() else 32 for i in range(256))
_ASCII_LOWER = bytes(range(256)).lower()
_ASCII_PUNCTUATION = string.punctuation.encode()
# exp of more is no float64; no model that learned anything comes near.
_MOST_NATS = 700.0


class RowScores(NamedTuple):
    """Numbers of n rows, each an array of shape (n,).

    Attributes:
        token_f1: from 0 to 1.
        rouge_l: from 0 to 1.
        exact_match: 0 or 1.
        answer_words: words of the answer.
        reference_words: words of the reference.
        four_grams: runs of four words in the answer.
        repeated: those of them that occur in the answer before.
        empty: 1 where the answer is white space.
    """

    token_f1: np.ndarray
    rouge_l: np.ndarray
    exact_match: np.ndarray
    answer_words: np.ndarray
    reference_words: np.ndarray
    four_grams: np.ndarray
    repeated: np.ndarray
    empty: np.ndarray


def text_scores(
    references: Sequence[str],
    answers: Sequence[str],
    log_likelihoods: np.ndarray | None,
    tokens: np.ndarray | None,
    samples: int,
    seed: int,
) -> dict[str, float]:
    """How close a predictor's answers are to their references, with 95 % percentile bootstrap intervals over rows.

    - `perplexity`: exp(-sum of log-likelihoods / sum of tokens), pooled over all tokens of all references; at most
      e^700. Left out without log-likelihoods.
    - `rouge_l`, `token_f1`, `exact_match`: means over rows of what `per_row_scores` and `squad_words` define.
    - `answer_words`, `reference_words`: mean lengths.
    - `repetition_rate`: share of the runs of four words, over all answers together, that occur in their answer before;
      0 without such runs. Of one answer it is seq-rep-4 of Welleck et al. 2020, "Neural text generation with
      unlikelihood training".
    - `empty_rate`: share of answers that are nothing but white space.

    Args:
        references: n >= 1 texts.
        answers: n texts.
        log_likelihoods: natural logarithm of each reference's probability under the model, finite, shape (n,); or None.
        tokens: tokens of each reference, at least 1, shape (n,); None with `log_likelihoods`.
        samples: resamples of the bootstrap.
        seed: of the resampling.

    Returns:
        The numbers above and, for `perplexity`, `rouge_l` and `token_f1`, those with `_low` and `_high`.
    """
    assert len(references) == len(answers) > 0, "an answer for each reference"
    rows = score_rows(references, answers)
    sums = np.stack([rows.rouge_l, rows.token_f1])
    scores: dict[str, float] = {}
    if log_likelihoods is not None:
        assert tokens is not None and np.isfinite(log_likelihoods).all() and (tokens > 0).all(), "numbers of each row"
        scores["perplexity"] = float(_perplexity(log_likelihoods.sum(), tokens.sum()))
        sums = np.concatenate([sums, np.stack([log_likelihoods, tokens])])
    means = ("rouge_l", "token_f1", "exact_match", "answer_words", "reference_words")
    scores |= {name: float(getattr(rows, name).mean()) for name in means}
    scores["repetition_rate"] = float(rows.repeated.sum() / max(rows.four_grams.sum(), 1))
    scores["empty_rate"] = float(rows.empty.mean())
    return scores | _intervals(sums, samples, seed)


def per_row_scores(references: Sequence[str], answers: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Each row's token F1 and ROUGE-L, shapes (n,), both from 0 to 1.

    Token F1 is SQuAD's: harmonic mean of the shares of the answer's and of the reference's `squad_words` that the other
    has too, counted as often as they occur; without any words it is 1 if both have none, else 0 (Rajpurkar et al. 2016,
    "SQuAD: 100,000+ questions for machine comprehension of text"; 2018 for the empty ones).

    ROUGE-L is the same mean of the shares that the longest common subsequence of both texts' `words` makes up; 0 where
    a text has no words (Lin 2004, "ROUGE: a package for automatic evaluation of summaries", section 3.1, beta 1).
    """
    rows = score_rows(references, answers)
    return rows.token_f1, rows.rouge_l


def score_rows(references: Sequence[str], answers: Sequence[str]) -> RowScores:
    """All that is counted of each row, text by text, so that the words of one row are in memory at a time."""
    table = np.zeros((len(RowScores._fields), len(answers)))
    for row, (reference, answer) in enumerate(zip(references, answers, strict=True)):
        expected, given = words(reference), words(answer)
        runs = list(zip(given, given[1:], given[2:], given[3:], strict=False))
        common = LCSseq.similarity(expected, given)
        table[:, row] = (
            *_squad_scores(reference, answer),
            2 * common / (len(expected) + len(given)) if common else 0,
            len(given),
            len(expected),
            len(runs),
            len(runs) - len(set(runs)),
            not answer.strip(),
        )
    token_f1, exact_match, rouge_l, *counts = table
    return RowScores(token_f1, rouge_l, exact_match, *counts)


def words(text: str) -> list[str]:
    """The words of a text in lower case, as rouge_score takes them for texts in ASCII: runs of a-z and 0-9.

    That package drops all other letters, so that two Russian texts have nothing in common and "café" is "caf". Here
    letters, marks and digits of every script make words; in scripts without spaces between words (Chinese, Japanese,
    Thai, Lao, Khmer, Burmese, Tibetan) every character is one.
    """
    if text.isascii():
        # The same rule, several times faster.
        return text.encode().translate(_ASCII_WORDS).decode().split()
    found: list[str] = _WORD.findall(_spaced(text))
    return found


def squad_words(text: str) -> list[str]:
    """What SQuAD's evaluation keeps of a text: lower case, without punctuation and the articles a, an, the; by spaces.

    Beyond its script, punctuation of every language is taken out, and scripts without spaces between words are split
    into characters (as MLQA's evaluation does for Chinese: Lewis et al. 2020). Articles are English ones only.
    """
    if text.isascii():
        # The same rule, several times faster: without punctuation, words end at white space alone.
        kept = text.encode().translate(_ASCII_LOWER, _ASCII_PUNCTUATION).decode()
    else:
        kept = _PUNCTUATION.sub("", _spaced(text))
    return [word for word in kept.split() if word not in _ARTICLES]


def _spaced(text: str) -> str:
    """A text in lower case and composed characters, with spaces around each character of the unspaced scripts."""
    lower = unicodedata.normalize("NFKC", text).lower()
    return _UNSPACED_CHARACTER.sub(r" \1 ", lower)


def _squad_scores(reference: str, answer: str) -> tuple[float, float]:
    """Token F1 and exact match of one row."""
    expected, given = squad_words(reference), squad_words(answer)
    if expected == given:
        return 1.0, 1.0
    common = (Counter(expected) & Counter(given)).total()
    return 2 * common / (len(expected) + len(given)), 0.0


def _perplexity(log_likelihood: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return np.exp(np.minimum(-log_likelihood / tokens, _MOST_NATS))


def _intervals(sums: np.ndarray, samples: int, seed: int) -> dict[str, float]:
    """Bootstrap intervals over rows.

    Args:
        sums: shape (2, n): rouge_l and token_f1; or (4, n): those, log-likelihoods and tokens.
        samples: resamples.
        seed: of the draws.
    """
    generator, rows = np.random.default_rng(seed), sums.shape[1]
    drawn = np.empty((samples, len(sums)))
    for sample in range(samples):
        # How often each row is drawn: the same as taking rows, in one product.
        times = np.bincount(generator.integers(0, rows, rows), minlength=rows)
        drawn[sample] = sums @ times
    values = {"rouge_l": drawn[:, 0] / rows, "token_f1": drawn[:, 1] / rows}
    if len(sums) == 4:
        values = {"perplexity": _perplexity(drawn[:, 2], drawn[:, 3])} | values
    return {
        f"{name}_{end}": float(edge)
        for name, value in values.items()
        for end, edge in zip(("low", "high"), np.quantile(value, [0.025, 0.975]), strict=True)
    }
