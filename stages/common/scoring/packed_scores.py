"""The label tree scored over rows without padding: prefix, prompts and nodes of a batch are one sequence.

On a GPU with enough batches all have one shape, so that one recording is replayed, and results are read at the end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, pairwise
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel

from stages.common.acceleration.choice import fast_paths
from stages.common.acceleration.recording import Recording, Tensors
from stages.common.scoring.batches import map_in_batches
from stages.common.scoring.label_tree import LabelTree, build_tree, shared_prefix
from stages.common.scoring.tree_attention import Trees

# With fewer, or where filling them up to one shape would add more than this, batches are run as they come.
LEAST_RECORDED_BATCHES = 6
MOST_FILLING = 1 / 8
# Logits of a batch, in numbers: 4 GiB in bfloat16, half a GiB in float32.
MOST_LOGITS = {"cuda": 2**31, "cpu": 2**27}


class Shape(NamedTuple):
    """The shape of a batch.

    Attributes:
        prefix: the tokens that all prompts begin with.
        rows: prompts in it.
        rest_tokens: tokens of all rests, filling included.
        longest: tokens of the longest prompt, or of the most filling.
    """

    prefix: list[int]
    rows: int
    rest_tokens: int
    longest: int


def score_packed(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    label_ids: Sequence[list[int]],
    tokens_per_batch: int,
    advance: Callable[[int], object],
) -> np.ndarray:
    """As `score_labels`, with a model that `prepare_layers` has made ready.

    Args:
        model: the decoder.
        prompts: token ids, at least one prompt.
        label_ids: token ids of each label.
        tokens_per_batch: most tokens in a forward pass.
        advance: is told how many prompts are queued, after each batch.

    Raises:
        UserError: the GPU's memory is too small for one prompt.
    """
    tree, prefix = build_tree(label_ids), shared_prefix(prompts)
    lengths = np.array([len(prompt) for prompt in prompts]) - len(prefix)
    costs = np.maximum(lengths + len(tree.tokens), _tokens_of_logits(model, 1 + len(tree.tokens), tokens_per_batch))
    run = _runner(model, tree, len(label_ids))

    def inputs_of(shape: Shape, batch: Iterable[int]) -> Tensors:
        return packed_inputs([prompts[index] for index in batch], shape, tree, model.device)

    batches = deal(costs, tokens_per_batch)
    shape = common_shape(batches, lengths, prefix)
    if fast_paths(model).recorded is None and shape is not None and len(batches) >= LEAST_RECORDED_BATCHES:
        try:
            recording = Recording(functools.partial(run, shape), inputs_of(shape, batches[0]))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            tokens_per_batch //= 2
        else:
            return _replay(recording, functools.partial(inputs_of, shape), batches, advance)
    longest = len(prefix) + int(lengths.max())

    def as_it_comes(batch: list[int]) -> torch.Tensor:
        shape = Shape(prefix, len(batch), int(lengths[batch].sum()), longest)
        return run(shape, inputs_of(shape, batch))

    found = map_in_batches(as_it_comes, costs.tolist(), tokens_per_batch, advance)
    return torch.stack(found).cpu().numpy()


def _replay(
    recording: Recording,
    inputs_of: Callable[[Iterable[int]], Tensors],
    batches: list[np.ndarray],
    advance: Callable[[int], object],
) -> np.ndarray:
    """Scores (rows, labels) of all batches' rows, in the order of their indices."""
    queued = []
    for batch in batches:
        queued.append(recording(inputs_of(batch))[: len(batch)].clone())
        advance(len(batch))
    rows = np.concatenate(batches)
    scores = np.empty((len(rows), queued[0].shape[1]))
    scores[rows] = torch.cat(queued).cpu().numpy()
    return scores


def deal(costs: np.ndarray, tokens_per_batch: int) -> list[np.ndarray]:
    """Rows in batches of about as many tokens each: sorted by length, then dealt out in turn.

    Args:
        costs: tokens of each row.
        tokens_per_batch: most tokens that a batch has on average.

    Returns:
        Indices of the rows of each batch; their numbers differ by one at most.
    """
    count = min(len(costs), -(-int(costs.sum()) // tokens_per_batch))
    order = np.argsort(-costs, kind="stable")
    return [order[first::count] for first in range(count)]


def common_shape(batches: list[np.ndarray], lengths: np.ndarray, prefix: list[int]) -> Shape | None:
    """The shape that all batches can be filled up to, a missing row being one token; None where that wastes much."""
    rows = max(map(len, batches))
    tokens = [int(lengths[batch].sum()) + rows - len(batch) for batch in batches]
    filling = max(tokens) - min(tokens)
    if filling > MOST_FILLING * max(tokens):
        return None
    return Shape(prefix, rows, max(tokens), max(len(prefix) + int(lengths.max()), filling))


def _tokens_of_logits(model: PreTrainedModel, positions: int, tokens_per_batch: int) -> int:
    """What a row's logits take of a batch, so that a batch's are at most MOST_LOGITS."""
    numbers = positions * model.config.get_text_config(decoder=True).vocab_size
    return -(-tokens_per_batch * numbers // MOST_LOGITS[model.device.type])


def _runner(model: PreTrainedModel, tree: LabelTree, label_count: int) -> Callable[[Shape, Tensors], torch.Tensor]:
    """Log-likelihoods (rows, labels) of the inputs that `packed_inputs` makes."""
    steps = torch.tensor(tree.steps, device=model.device).T
    ancestors = tree.ancestors.to(model.device)
    divisors = torch.compile(log_divisors) if fast_paths(model).compiled is None else _log_divisors_row_by_row

    def run(shape: Shape, inputs: Tensors) -> torch.Tensor:
        places = {name: inputs[name] for name in ("boundaries", "keys", "key_boundaries", "node_boundaries")}
        layout = Trees(**places, longest=shape.longest, ancestors=ancestors)
        named = {name: inputs[name] for name in ("input_ids", "position_ids", "kept")}
        logits = model(**named, layout=layout, use_cache=False).logits
        return sum_steps(logits.view(shape.rows, -1, logits.shape[-1]), steps, label_count, divisors)

    return run


def packed_inputs(prompts: list[list[int]], shape: Shape, tree: LabelTree, device: torch.device) -> Tensors:
    """Arguments of a forward pass over prefix, rests, filling and trees, all of them in one sequence.

    Args:
        prompts: of a batch, at most `shape.rows`.
        shape: of all batches.
        tree: the labels' prefixes.
        device: where the tensors are put.

    Returns:
        `input_ids` and `position_ids` (1, tokens), the fields of `Trees`, and `kept` (rows x (1 + nodes),): for each
        row the place of its prompt's last token, then of each node.
    """
    start, nodes = len(shape.prefix), len(tree.tokens)
    rests = [prompt[start:] for prompt in prompts] + [[0]] * (shape.rows - len(prompts))
    lengths = np.array([len(rest) for rest in rests])
    filling = shape.rest_tokens - int(lengths.sum())
    ends = np.concatenate([[0, start], start + lengths.cumsum(), [start + shape.rest_tokens]])
    first_node = start + shape.rest_tokens
    ids = np.zeros(first_node + shape.rows * nodes, np.int64)
    ids[:start] = shape.prefix
    ids[start : first_node - filling] = np.fromiter(chain.from_iterable(rests), np.int64, lengths.sum())
    ids[first_node:] = np.tile(np.array(tree.tokens, np.int64), shape.rows)
    parts = np.diff(ends)
    within = np.arange(first_node) - np.repeat(ends[:-1], parts)
    behind_prefix = np.concatenate([[0], np.full(len(lengths), start), [0]])
    of_nodes = start + lengths[:, None] + np.array(tree.depths, np.int64) - 1
    places = [np.arange(start)]
    for first, last in pairwise(ends[1:-1]):
        places += [np.arange(start), np.arange(first, last)]
    places.append(np.arange(first_node - filling, first_node))
    kept = np.empty((shape.rows, 1 + nodes), np.int64)
    kept[:, 0] = ends[2:-1] - 1
    kept[:, 1:] = first_node + np.arange(shape.rows * nodes).reshape(shape.rows, nodes)
    arrays = {
        "input_ids": ids[None],
        "position_ids": np.concatenate([within + np.repeat(behind_prefix, parts), of_nodes.ravel()])[None],
        "boundaries": ends.astype(np.int32),
        "keys": np.concatenate(places),
        "key_boundaries": np.concatenate([[0], (parts + behind_prefix).cumsum()]).astype(np.int32),
        "node_boundaries": np.arange(shape.rows + 1, dtype=np.int32) * np.int32(nodes),
        "kept": kept.ravel(),
    }
    return {name: _send(array, device) for name, array in arrays.items()}


def sum_steps(
    logits: torch.Tensor,
    steps: torch.Tensor,
    label_count: int,
    divisors: Callable[[torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Log-likelihoods, float64 (rows, labels), on the logits' device.

    Args:
        logits: (rows, 1 + nodes, vocabulary).
        steps: int64 (3, steps): node, token and label of each, see `LabelTree`.
        label_count: how many labels there are.
        divisors: `log_divisors`, or what gives the same.
    """
    nodes, tokens, labels = steps
    found = (logits[:, nodes, tokens].float() - divisors(logits)[:, nodes]).double()
    return found.new_zeros(len(logits), label_count).index_add_(1, labels, found)


def log_divisors(logits: torch.Tensor) -> torch.Tensor:
    """Logarithms of the softmaxes' divisors, float32, over the last axis of (rows, 1 + nodes, vocabulary)."""
    return logits.float().logsumexp(dim=-1)


def _log_divisors_row_by_row(logits: torch.Tensor) -> torch.Tensor:
    # Uncompiled, the logits of all rows in float32 would take more memory than the rest of the forward pass.
    return torch.stack([log_divisors(row) for row in logits])


def _send(values: np.ndarray, device: torch.device) -> torch.Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
