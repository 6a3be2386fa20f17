"""Paired statistics of two sets of predictions for the same rows: exact tests, permutations, bootstrap, Holm.

Everything is two-sided. A p-value is the probability of a difference at least as large if the two sides were equally
good, so that it did not matter which of them gave which prediction. Identical predictions have p = 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from scipy import sparse
from scipy.special import bdtr, stdtrit

# Permutations of a test: the smallest possible p is then 1 / 10,001.
PERMUTATIONS = 10_000
# Of k labels the smallest p that Holm's correction leaves is k / (1 + permutations): with 40 k of them 0.025.
PERMUTATIONS_PER_LABEL = 40
# Above these many draws there are fewer permutations and resamples: 100,000 rows are to take a few seconds.
MOST_COINS, MOST_BINOMIALS, LEAST_PERMUTATIONS = 200_000_000, 20_000_000, 2_000
MOST_DRAWS, LEAST_RESAMPLES = 50_000_000, 500
# Numbers that one chunk of draws holds at a time: 16 MB, measured to be faster than 8 and 32.
CHUNK = 2**21
# Sums of equal numbers in another order differ by rounding; such differences are ties, and ties count against p.
TIE = 1e-12


def mcnemar_exact(fixed: int, broken: int) -> float:
    """McNemar's exact test of two error rates (McNemar 1947, "Note on the sampling error of the difference").

    Under the null hypothesis a row on which exactly one side is right is as likely to be right before as after, so the
    smaller of the two counts is binomial with 1/2; p is twice its lower tail, at most 1.

    Args:
        fixed: rows wrong before and right after.
        broken: rows right before and wrong after.
    """
    return min(1.0, 2 * float(bdtr(min(fixed, broken), fixed + broken, 0.5)))


def holm(p_values: np.ndarray) -> np.ndarray:
    """P-values corrected for their number (Holm 1979, "A simple sequentially rejective multiple test procedure").

    The i-th smallest of m is multiplied by m - i + 1, is at least what the one before became, and at most 1. Rejecting
    what is below 0.05 then rejects any true null hypothesis with probability 0.05 at most, dependent or not.

    Args:
        p_values: shape (m,), in any order; m may be 0.
    """
    order = np.argsort(p_values, kind="stable")
    raised = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1))
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(raised, 1)
    return adjusted


def permutation_p(observed: np.ndarray, permuted: Iterable[np.ndarray]) -> np.ndarray:
    """P-values of differences from what permutations gave (Phipson & Smyth 2010, "Permutation p-values should never
    be zero"): (1 + permutations at least as far from 0) / (1 + permutations).

    Args:
        observed: differences of m metrics, shape (m,).
        permuted: their differences in permutations, in chunks of shape (s, m); without any, p is 1.
    """
    as_far, permutations = np.zeros(len(observed)), 0
    for chunk in permuted:
        as_far += (np.abs(chunk) >= np.abs(observed) - TIE).sum(axis=0)
        permutations += len(chunk)
    return (1 + as_far) / (1 + permutations)


def swap_p(
    difference: Callable[[np.ndarray], np.ndarray], moved: sparse.csr_array, counts: np.ndarray, seed: int, labels: int
) -> tuple[np.ndarray, np.ndarray]:
    """P-values of metrics that follow from sums over rows, and of labels, these with Holm's correction: see `swaps`.

    Args:
        difference: of the metrics and then of the labels, shape (s, m + labels), where sums of shape (s, w) were added
            to the first side's and taken from the second's.
        moved: what a swapped row of each of c cells adds to them, shape (c, w).
        counts: rows in each cell, shape (c,).
        seed: of the draws.
        labels: their number.

    Returns:
        Of the metrics, shape (m,), and of the labels.
    """
    observed = difference(np.zeros((1, moved.shape[1])))[0]
    p_values = permutation_p(observed, (difference(drawn @ moved) for drawn in swaps(counts, seed, labels)))
    return p_values[:-labels], holm(p_values[-labels:])


def percentile_interval(differences: np.ndarray) -> tuple[float, float]:
    """The 95 % percentile interval of a bootstrap (Efron 1979); resamples where a metric is undefined are left out."""
    low, high = np.nanquantile(differences, [0.025, 0.975])
    return float(low), float(high)


def noise_limit(standard_deviation: float, seeds: int) -> float:
    """How large a difference of two runs gets by their seeds alone, in 95 of 100 pairs.

    The difference of two runs has sqrt(2) times the standard deviation of one; Student's t allows for its being
    estimated from few runs.

    Args:
        standard_deviation: of the metric over runs that differ in the seed alone, with n - 1 in the denominator.
        seeds: n, at least 2.
    """
    return float(stdtrit(seeds - 1, 0.975)) * 2**0.5 * standard_deviation


# --- draws ------------------------------------------------------------------------------------------------------------


def resample_count(wanted: int, rows: int) -> int:
    """How many resamples of rows (or cells) are drawn: those wanted; of 2,000 fewer above 25,000 rows, to 500."""
    return min(wanted, max(LEAST_RESAMPLES, MOST_DRAWS // max(rows, 1)))


def permutation_count(units: int, most_draws: int = MOST_COINS, labels: int = 0) -> int:
    """How many permutations are drawn where `units` rows (or cells of equal rows) can be swapped.

    Args:
        units: rows or cells.
        most_draws: permutations times units from which there are fewer.
        labels: how many of them are tested, so that the p of one can be significant after Holm's correction.
    """
    enough = PERMUTATIONS_PER_LABEL * labels
    return min(max(PERMUTATIONS, enough), max(LEAST_PERMUTATIONS, enough, most_draws // max(units, 1)))


def resampled_rows(rows: int, samples: int, seed: int) -> Iterator[np.ndarray]:
    """Resamples of rows with replacement, in chunks of shape (s, rows): how often each row was drawn."""
    generator = np.random.default_rng(seed)
    for size in _chunk_sizes(samples, rows):
        drawn = np.empty((size, rows))
        for weights in drawn:
            weights[:] = np.bincount(generator.integers(0, rows, rows), minlength=rows)
        yield drawn


def resampled_cells(counts: np.ndarray, samples: int, seed: int) -> Iterator[np.ndarray]:
    """The same for rows of which only the cell matters, in chunks of shape (s, cells): how often each cell was drawn.

    Resampling n rows with replacement makes the cells' counts multinomial with the observed shares.

    Args:
        counts: rows in each cell, above 0.
        samples: number of resamples.
        seed: of the draws.
    """
    generator, rows = np.random.default_rng(seed), counts.sum()
    for size in _chunk_sizes(samples, len(counts)):
        yield generator.multinomial(rows, counts / rows, size=size).astype(np.float64)


def swaps(counts: np.ndarray, seed: int, labels: int = 0) -> Iterator[np.ndarray]:
    """Permutations of a paired test, in chunks of shape (s, cells): how many rows of each cell are swapped.

    Each row's predictions are swapped between the two sides with probability 1/2 (approximate randomisation: Noreen
    1989, "Computer-intensive methods for testing hypotheses"; Yeh 2000, "More accurate tests for the statistical
    significance of result differences"). A swap changes nothing where both sides predict the same, so only the other
    rows have to be given; of c equal ones a binomial number is swapped.

    Args:
        counts: rows in each cell, above 0; no cells give no chunk.
        seed: of the draws.
        labels: how many of them are tested.
    """
    generator = np.random.default_rng(seed)
    if not len(counts):
        return
    # What follows from a chunk has two numbers of each label.
    width = max(len(counts), 2 * labels)
    if counts.max() == 1:
        for size in _chunk_sizes(permutation_count(len(counts), MOST_COINS, labels), width):
            yield _coins(generator, size, len(counts))
        return
    for size in _chunk_sizes(permutation_count(len(counts), MOST_BINOMIALS, labels), width):
        yield generator.binomial(counts, 0.5, size=(size, len(counts))).astype(np.float64)


def sign_flip_p(differences: np.ndarray, seed: int) -> np.ndarray:
    """P-values of means of paired differences (Fisher 1935, "The design of experiments", section 21).

    If it does not matter which side a row's two values come from, each difference could as well have the other sign.

    Args:
        differences: of n rows and m metrics, shape (n, m).
        seed: of the draws.
    """
    moved = differences[(differences != 0).any(axis=1)]
    if not len(moved):
        return np.ones(differences.shape[1])
    # Ties are judged on a common scale, whatever the metrics' units.
    moved = moved / np.maximum(np.abs(moved).sum(axis=0), np.finfo(float).tiny)
    generator, observed = np.random.default_rng(seed), moved.sum(axis=0)
    sizes = _chunk_sizes(permutation_count(len(moved)), len(moved))
    return permutation_p(observed, (observed - 2 * (_coins(generator, size, len(moved)) @ moved) for size in sizes))


def _coins(generator: np.random.Generator, samples: int, units: int) -> np.ndarray:
    """Zeros and ones of shape (samples, units), each with probability 1/2."""
    needed = samples * units
    bits = np.frombuffer(generator.bytes((needed + 7) // 8), np.uint8)
    return np.unpackbits(bits, count=needed).reshape(samples, units).astype(np.float64)


def _chunk_sizes(samples: int, width: int) -> Iterator[int]:
    chunk = max(1, CHUNK // max(width, 1))
    for start in range(0, samples, chunk):
        yield min(chunk, samples - start)
