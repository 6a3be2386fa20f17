"""What params.yaml alone gives away."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import combinations, permutations

from preflight.findings import Finding, error, warning
from stages.common.prompting.templates import ALLOWED, TemplateUserError, prompt_template
from stages.common.schema.base_model import BaseModelSource, HubModel
from stages.common.schema.finetune import Finetune
from stages.common.schema.ingest import HubSource, Ingest
from stages.common.schema.measuring import Infer
from stages.common.schema.prompts import FormatPrompts
from stages.common.schema.task import ClassificationTask, Task

# QLoRA, arXiv:2305.14314: 2e-4 up to 13 B parameters, 1e-4 above. Smaller bases take more (docs/log.md:
# for 135 M 1e-3 is best and 2e-3 worse), full fine-tuning takes ten to a hundred times less.
LEARNING_RATES = (1e-5, 2e-3)


def revision_can_move(base_model: BaseModelSource, ingest: Ingest) -> Iterator[Finding]:
    """A branch or tag of the Hub, which is something else tomorrow."""
    sources = {"base_model": base_model, "ingest.source": ingest.source}
    sources |= {
        f"ingest.further_sources.{n}.source": further.source for n, further in enumerate(ingest.further_sources)
    }
    for key, source in sources.items():
        if isinstance(source, HubModel | HubSource) and not re.fullmatch(r"[0-9a-f]{40}", source.revision):
            yield error(
                f"{key}.revision",
                f"{source.revision!r} of {source.repo_id} is no commit and can point to something else tomorrow",
                "the 40 hexadecimal digits of a commit",
                f"`dvc repro {key.partition('.')[0]}` names the commit of today; or copy it from the list on the Hub",
            )


def learning_rate_is_unusual(finetune: Finetune) -> Iterator[Finding]:
    """A learning rate that is meant for something else than low-rank adapters."""
    low, high = LEARNING_RATES
    if not low <= finetune.learning_rate <= high:
        effect = "hardly anything is learned" if finetune.learning_rate < low else "training is likely to diverge"
        yield warning(
            "finetune.learning_rate",
            f"{finetune.learning_rate:g} is far from what QLoRA is trained with: {effect}",
            f"{low:g} to {high:g} (the QLoRA paper, arXiv:2305.14314: 2e-4 up to 13 B parameters, 1e-4 above)",
            "Try 2e-4; up to 1e-3 with a base below 1 B parameters",
        )


def warmup_is_ignored(finetune: Finetune) -> Iterator[Finding]:
    """Warm-up with a schedule that has none."""
    if finetune.lr_scheduler == "constant" and finetune.warmup_steps:
        yield warning(
            "finetune.warmup_steps",
            f"{finetune.warmup_steps} has no effect with lr_scheduler 'constant', which starts at the full rate",
            "0 with 'constant'",
            "Set it to 0, or lr_scheduler to constant_with_warmup",
        )


def labels_are_nearly_alike(task: Task) -> Iterator[Finding]:
    """Labels that differ only in case or white space: usually one label, spelled in two ways by the data."""
    if not isinstance(task, ClassificationTask):
        return
    for one, other in combinations(task.labels, 2):
        if "".join(one.split()).casefold() == "".join(other.split()).casefold():
            yield warning(
                "task.labels",
                f"{one!r} and {other!r} differ only in case or white space",
                "labels that a reader can tell apart",
                "Join them through aliases in ingest.columns.label, or rename one",
            )


def label_begins_another(task: Task) -> Iterator[Finding]:
    """A label that another one begins with: an answer that stops early is the shorter one."""
    if not isinstance(task, ClassificationTask):
        return
    for one, other in permutations(task.labels, 2):
        if other.startswith(one) and other != one:
            yield warning(
                "task.labels",
                f"{other!r} begins with {one!r}: nothing but the end token tells them apart, and an answer that is cut "
                "or matched by its beginning becomes the shorter one",
                "no label that begins another",
                "Rename one of them through aliases in ingest.columns.label",
            )


def generated_labels_can_match_nothing(task: Task, infer: Infer) -> Iterator[Finding]:
    """Labels from generated text: an answer that is no label is no prediction."""
    if isinstance(task, ClassificationTask) and infer.method == "generate":
        yield warning(
            "infer.method",
            "'generate' writes answers that can match no label. They stay rows and count as wrong (invalid_rate); a "
            "program that leaves them out of the accuracy's denominator reports too much. There are no probabilities, "
            "so no threshold, ranking or calibration",
            "label_scores, which always answers with a label and its probability",
            "Set infer.method to label_scores and infer.max_new_tokens to null",
        )


def template_cannot_be_used(format_prompts: FormatPrompts, task: Task, ingest: Ingest) -> Iterator[Finding]:
    """A template that the stage `format_prompts` would refuse, when the base has been fetched."""
    if format_prompts.template is None:
        return
    labels = isinstance(task, ClassificationTask)
    descriptions = isinstance(task, ClassificationTask) and task.label_descriptions is not None
    try:
        prompt_template(format_prompts.template, str, labels, descriptions, ingest.exemplars_per_label > 0)
    except TemplateUserError as wrong:
        yield error("format_prompts.template", wrong.problem, ALLOWED, "Change the template")


CHECKS = (
    template_cannot_be_used,
    revision_can_move,
    learning_rate_is_unusual,
    warmup_is_ignored,
    labels_are_nearly_alike,
    label_begins_another,
    generated_labels_can_match_nothing,
)
