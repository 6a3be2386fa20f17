"""The adapter's model card with its results on test: as tables, and as metadata that the Hub reads."""

from __future__ import annotations

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from stages.common.measuring.report_columns import Blocks
from stages.common.measuring.report_tables import result_tables
from stages.common.schema.task import GenerationTask, Task

# Key in metrics.json, the Hub's name of the metric, and ours. What a block does not have is left out.
LABEL_METRICS = [
    ("accuracy", "accuracy", "accuracy"),
    ("f1_macro", "f1", "macro-F1"),
    ("log_loss", "log_loss", "log loss"),
    ("recall", "recall", "recall"),
    ("precision", "precision", "precision"),
    ("pr_auc", "average_precision", "average precision"),
]
LABEL_SET_METRICS = [
    ("accuracy", "accuracy", "subset accuracy"),
    ("f1_macro", "f1", "macro-F1"),
    ("f1_micro", "f1", "micro-F1"),
    ("f1_samples", "f1", "sample F1"),
    ("hamming_loss", "hamming_loss", "Hamming loss"),
    ("log_loss", "log_loss", "log loss"),
]
ANSWER_METRICS = [
    ("token_f1", "f1", "token F1"),
    ("rouge_l", "rouge", "ROUGE-L"),
    ("exact_match", "exact_match", "exact match"),
    ("perplexity", "perplexity", "perplexity"),
]


def card_text(card: str, test: Blocks, task: Task) -> str:
    """The card with results.

    Args:
        card: the adapter's model card, whose first heading names the model.
        test: blocks of metrics.json.
        task: decides which metrics there are.
    """
    parsed = ModelCard(card)
    assert isinstance(parsed.data, ModelCardData), "a model card has a model's metadata"
    parsed.data.model_name = next(line[2:] for line in parsed.text.splitlines() if line.startswith("# "))
    parsed.data.eval_results = _eval_results(test, task)
    results = "\n\n".join(result_tables(task, test))
    parsed.text = (
        f"{parsed.text.rstrip()}\n\n## Results\n\nOn {test['adapter']['n']:,} test rows, with 95 % intervals:"
        f"\n\n{results}\n"
    )
    return str(parsed)


def _eval_results(test: Blocks, task: Task) -> list[EvalResult]:
    if isinstance(task, GenerationTask):
        # Not the Hub's `question-answering`, which is for models that mark an answer in a given text.
        task_type, metrics = "text-generation", ANSWER_METRICS
    else:
        task_type, metrics = "text-classification", LABEL_SET_METRICS if task.multi_label else LABEL_METRICS
    return [
        EvalResult(
            task_type=task_type,
            dataset_type="local",
            dataset_name="the pipeline's test split",
            dataset_split="test",
            metric_type=metric_type,
            metric_name=name,
            metric_value=round(test["adapter"][key], 4),
        )
        for key, metric_type, name in metrics
        if key in test["adapter"]
    ]
