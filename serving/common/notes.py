"""How answers are made where nobody said it: the longest one, and what a user should know."""

from __future__ import annotations

from collections.abc import Iterator

from serving.common.adapter import DECISION, Adapter, is_ours


def notes(adapter: Adapter, limit: int) -> Iterator[str]:
    """What a user should know about how answers are made."""
    if adapter.answers_with_texts:
        yield f"answers have at most {limit:,} tokens (--max-new-tokens)"
    elif adapter.rule is None:
        found = (
            "the likeliest label is" if adapter.kind == "classification" else "labels of probability 0.5 or more are"
        )
        fetch = f"`dvc pull {DECISION}` fetches it" if is_ours(adapter.folder) else "--decision names one"
        yield f"{found} answered: a threshold chosen on validation would be in a decision.json; {fetch}"
    elif adapter.rule["rule"] == "answer":
        yield "the project's metrics are those of generated labels (infer.method: generate); here labels are scored"


def answer_limit(asked: int | None, adapter: Adapter) -> int:
    """The longest answer in tokens: as asked for, else as the pipeline's own predictions were made.

    Raises:
        UserError: params.yaml is there, but not usable.
    """
    from serving.predictor import MAX_NEW_TOKENS
    from stages.common.params import PARAMS_PATH, load_params

    if asked is not None:
        return asked
    if adapter.answers_with_texts and is_ours(adapter.folder) and PARAMS_PATH.is_file():
        return load_params("infer").infer.max_new_tokens or MAX_NEW_TOKENS
    return MAX_NEW_TOKENS
