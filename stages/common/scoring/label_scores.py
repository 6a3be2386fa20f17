"""The exact log-likelihood of each label after a prompt, all labels in one forward pass over a prefix tree.

The tokens that all prompts begin with are computed once. The rest of each prompt is followed, in the same forward
pass, by the tree of the labels' prefixes: an attention mask shows each node its prompt and its ancestors only, so
labels that share first tokens share their computation, and 77 labels cost one pass. What comes out equals a forward
pass over prompt + label for each label alone.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch
from peft import PeftModel
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import get_layer_types_and_kwargs

from stages.common.acceleration.attention import PACKED
from stages.common.scoring.batches import map_in_batches, pad
from stages.common.scoring.label_tree import LabelTree, build_tree, shared_prefix
from stages.common.scoring.packed_scores import score_packed

# Logits that take about the memory of one token's activations; large vocabularies and many labels shrink a batch.
LOGITS_PER_TOKEN = 16_384
# Layers whose view is bounded by position: within their window they attend to everything, like full attention.
WINDOWED_LAYERS = {"sliding_attention", "chunked_attention"}


def score_labels(
    model: PreTrainedModel | PeftModel,
    prompts: Sequence[list[int]],
    label_ids: Sequence[list[int]],
    tokens_per_batch: int,
    advance: Callable[[int], object] = lambda count: None,
) -> np.ndarray:
    """Log-likelihood of each label after each prompt: the sum over the label's tokens t of log p(t | all before t).

    Args:
        model: a decoder in evaluation mode, with or without adapter.
        prompts: token ids of each prompt, at least one token each.
        label_ids: token ids of each label, terminator included; no two labels are the same.
        tokens_per_batch: most tokens in a forward pass; changes memory and speed, and results only by rounding.
        advance: is told how many prompts are done, after each batch.

    Returns:
        Natural logarithms, float64 of shape (prompts, labels), at most 0. No prompts give shape (0, labels).

    Raises:
        UserError: the GPU's memory is too small for one prompt.
    """
    assert len({tuple(ids) for ids in label_ids}) == len(label_ids) and all(label_ids), "labels must differ"
    if not prompts:
        return np.empty((0, len(label_ids)))
    decoder = language_model(model)
    with torch.inference_mode():
        if decoder.config._attn_implementation == PACKED:
            return score_packed(decoder, prompts, label_ids, tokens_per_batch, advance)
        longest = max(map(len, prompts)) + max(map(len, label_ids))
        score = _score_each_label if plain_path_reason(model, longest) else _score_over_tree
        return np.array(score(decoder, prompts, label_ids, tokens_per_batch, advance))


def plain_path_reason(model: PreTrainedModel | PeftModel, longest_tokens: int) -> str | None:
    """Why `score_labels` has to run each label alone (as exact, but slower), or None where the tree works.

    Args:
        model: the model.
        longest_tokens: tokens of the longest prompt and the longest label together.
    """
    decoder = language_model(model)
    config = decoder.config.get_text_config(decoder=True)
    if config._attn_implementation == PACKED:
        return None
    if "position_ids" not in inspect.signature(decoder.forward).parameters or getattr(config, "alibi", False):
        return f"{config.model_type} derives positions from the order of tokens, so a tree cannot be laid out in it"
    if config._attn_implementation not in ("eager", "sdpa"):
        return f"the attention implementation {config._attn_implementation!r} takes no mask for a tree"
    for layer_type, arguments in zip(*get_layer_types_and_kwargs(config), strict=True):
        if layer_type not in WINDOWED_LAYERS | {"full_attention"}:
            return f"{config.model_type} has layers of the type {layer_type!r}, whose state cannot branch into a tree"
        window = arguments.get("sliding_window", longest_tokens)
        if longest_tokens > window:
            return f"prompts and labels reach {longest_tokens} tokens and some layers see only the last {window}"
    return None


def language_model(model: PreTrainedModel | PeftModel) -> PreTrainedModel:
    """The decoder itself: an adapter's layers sit inside it, so that its own `forward` and `generate` use them."""
    return cast(PreTrainedModel, model.get_base_model()) if isinstance(model, PeftModel) else model


def _score_over_tree(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    label_ids: Sequence[list[int]],
    tokens_per_batch: int,
    advance: Callable[[int], object],
) -> list[np.ndarray]:
    tree = build_tree(label_ids)
    shared = shared_prefix(prompts)
    # A cache made without the model's configuration keeps every token, in layers with a sliding window too.
    shared_cache = DynamicCache()
    if shared:
        ids = torch.tensor([shared], device=model.device)
        model(input_ids=ids, past_key_values=shared_cache, use_cache=True, logits_to_keep=1)

    def compute(batch: list[int]) -> np.ndarray:
        rests = [prompts[index][len(shared) :] for index in batch]
        cache = copy.deepcopy(shared_cache)
        cache.batch_repeat_interleave(len(batch))
        inputs = _tree_inputs(model, rests, len(shared), tree)
        return _sum_steps(model(**inputs, past_key_values=cache, use_cache=True).logits, tree, len(label_ids))

    extra = len(tree.tokens) + tokens_of_logits(model, 1 + len(tree.tokens))
    costs = [len(prompt) - len(shared) + extra for prompt in prompts]
    return map_in_batches(compute, costs, tokens_per_batch, advance)


def tokens_of_logits(model: PreTrainedModel, positions: int) -> int:
    """What the logits of so many positions take, in tokens of a batch."""
    return positions * model.config.get_text_config(decoder=True).vocab_size // LOGITS_PER_TOKEN


def _tree_inputs(
    model: PreTrainedModel, rests: list[list[int]], shared_length: int, tree: LabelTree
) -> dict[str, torch.Tensor]:
    """Arguments of a forward pass over rows of: rest of the prompt, padding, nodes of the tree.

    Its logits have the shape (rows, 1 + nodes, vocabulary): after the prompt, then after each node.
    """
    ids, real = pad(rests, "right", model.device)
    rows, width = ids.shape
    lengths = real.sum(dim=1, keepdim=True)  # (rows, 1)
    nodes = torch.tensor(tree.tokens, dtype=torch.long, device=model.device).expand(rows, -1)
    depths = torch.tensor(tree.depths, dtype=torch.long, device=model.device)
    positions = torch.arange(width, device=model.device).expand(rows, -1)
    node_slots = torch.arange(width, width + nodes.shape[1], device=model.device).expand(rows, -1)
    return {
        "input_ids": torch.cat([ids, nodes], dim=1),
        "position_ids": shared_length + torch.cat([positions, lengths + depths - 1], dim=1),
        "attention_mask": _attention_mask(model, real, shared_length, tree),
        "logits_to_keep": torch.cat([lengths - 1, node_slots], dim=1),
    }


def _attention_mask(model: PreTrainedModel, real: torch.Tensor, shared_length: int, tree: LabelTree) -> torch.Tensor:
    """What each position sees, of shape (rows, 1, width + nodes, shared_length + width + nodes).

    A prompt's positions see the shared prefix and what lies before them; a node sees the shared prefix, the prompt
    without its padding, and its ancestors. Padding sees what a prompt would, so that no row of the softmax is empty.
    """
    rows, width = real.shape
    ancestors = tree.ancestors.to(real.device)
    count = len(ancestors)
    causal = torch.ones(width, shared_length + width, dtype=torch.bool, device=real.device).tril(shared_length)
    prompt_rows = torch.cat([causal, causal.new_zeros(width, count)], dim=1).expand(rows, -1, -1)
    shared = real.new_ones(rows, count, shared_length)
    node_rows = torch.cat([shared, real[:, None].expand(-1, count, -1), ancestors.expand(rows, -1, -1)], dim=2)
    seen = torch.cat([prompt_rows, node_rows], dim=1)[:, None]
    if model.config.get_text_config(decoder=True)._attn_implementation == "sdpa":
        return seen
    # The eager implementation adds the mask to the scores.
    zeros = torch.zeros(seen.shape, dtype=model.dtype, device=seen.device)
    return zeros.masked_fill(~seen, torch.finfo(model.dtype).min)


def _sum_steps(logits: torch.Tensor, tree: LabelTree, label_count: int) -> np.ndarray:
    """Log-likelihoods (rows, label_count) from logits (rows, 1 + nodes, vocabulary)."""
    nodes, tokens, labels = torch.tensor(tree.steps).T
    steps = logits.float().log_softmax(dim=-1)[:, nodes, tokens].double().cpu()
    return steps.new_zeros(len(steps), label_count).index_add_(1, labels, steps).numpy()


def _score_each_label(
    model: PreTrainedModel,
    prompts: Sequence[list[int]],
    label_ids: Sequence[list[int]],
    tokens_per_batch: int,
    advance: Callable[[int], object],
) -> list[np.ndarray]:
    def compute(batch: list[int]) -> np.ndarray:
        return np.stack(
            [_score_one_label(model, [prompts[index] for index in batch], ids) for ids in label_ids], axis=1
        )

    longest_label = max(map(len, label_ids))
    extra = longest_label + tokens_of_logits(model, longest_label)
    costs = [len(prompt) + extra for prompt in prompts]
    return map_in_batches(compute, costs, tokens_per_batch, advance)


def _score_one_label(model: PreTrainedModel, prompts: list[list[int]], ids: list[int]) -> np.ndarray:
    """Log-likelihood (prompts,) of the label `ids`, from a forward pass over each prompt with this label behind it."""
    tokens, real = pad([[*prompt, *ids] for prompt in prompts], "right", model.device)
    # The label's first token is read from the prompt's last position.
    positions = real.sum(dim=1, keepdim=True) - 1 + torch.arange(-len(ids), 0, device=model.device)
    logits = model(input_ids=tokens, attention_mask=real.long(), use_cache=False, logits_to_keep=positions).logits
    steps = logits.float().log_softmax(dim=-1)[:, torch.arange(len(ids)), ids]
    return steps.double().cpu().sum(dim=1).numpy()
