"""What SageMaker finds in a training job's log, to draw it and to tune by it."""

from __future__ import annotations

_NUMBER = r"([0-9]+(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?)"
# Name: regular expression, whose group is the number. tests/test_sagemaker_train.py holds them to a real log.
METRICS = {
    "train:loss": rf"'loss': '{_NUMBER}'",
    "train:gradient_norm": rf"'grad_norm': '{_NUMBER}'",
    "train:learning_rate": rf"'learning_rate': '{_NUMBER}'",
    "validation:loss": rf"'eval_loss': '{_NUMBER}'",
    "validation:best_loss": rf"finetune: .* best validation loss {_NUMBER} at step",
    # The job itself prints these at its end, out of metrics/metrics.json; a task has some of them.
    **{
        f"test:{name}": rf"train: test {name}={_NUMBER}"
        for name in ("accuracy", "f1_macro", "log_loss", "pr_auc", "perplexity", "rouge_l", "token_f1", "exact_match")
    },
}
