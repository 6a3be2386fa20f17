"""The adapter of a page, loaded: for a chat so that it can be switched off."""

from __future__ import annotations

import sys

from serving.common.adapter import Adapter, pin_base
from serving.predictor import Predictor, load
from stages.common.acceleration.base import dequantize_base
from stages.common.acceleration.choice import choose_paths
from stages.common.model import add_adapter, check_adapter, load_base
from stages.common.prompting.tokenizer import load_prompt_tokenizer


def load_for_page(adapter: Adapter, limit: int) -> Predictor:
    """Load an adapter and its base.

    Where answers are texts the adapter is not merged into the base, as `load` would merge it to be faster: one base in
    memory gives the tuned answers, and with the adapter switched off its own.

    Args:
        adapter: read and checked.
        limit: longest answer in tokens, where answers are texts.

    Raises:
        UserError: the base cannot be had or another one is pinned, or the adapter is damaged.
    """
    # A merged model has no adapter to switch off.
    if not adapter.answers_with_texts or adapter.merged:
        return load(adapter, limit)
    tokenizer = load_prompt_tokenizer(adapter.folder)
    note = pin_base(adapter.folder)
    if note is not None:
        print(note, file=sys.stderr, flush=True)
    check_adapter(adapter.folder)
    base = load_base()
    if choose_paths(base, 0, trains=False).dense is None:
        dequantize_base(base)
    return Predictor(adapter, add_adapter(base, adapter.folder), tokenizer, limit)
