"""Jinja in a sandbox, and the prompt template of params.yaml in it; see `chat_frames` for chat templates."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date
from typing import Any

from jinja2 import StrictUndefined, Template, TemplateError, Undefined, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from stages.common.errors import UserError

VARIABLES = {"text", "labels", "descriptions", "exemplars"}
ALLOWED = (
    "Jinja with the variables text, labels, descriptions (by label) and exemplars (each with text and "
    "label); where answers are texts, with text alone"
)


class TemplateUserError(UserError):
    """A wrong `format_prompts.template`.

    Attributes:
        problem: what is wrong with it.
    """

    def __init__(self, problem: str) -> None:
        super().__init__(f"params.yaml: format_prompts.template: {problem}. Allowed is {ALLOWED}; change the template.")
        self.problem = problem


def prompt_template(
    source: str, respell: Callable[[str], str], labels: bool, descriptions: bool, exemplars: bool
) -> Template:
    """Compile `format_prompts.template`, its control tokens respelled.

    Args:
        source: the template.
        respell: gives control tokens in what the template itself writes their private spelling.
        labels: whether the task has labels; without, the template knows `text` alone.
        descriptions: whether the task has label descriptions.
        exemplars: whether exemplars were set aside.

    Raises:
        TemplateUserError: it is not Jinja, does not use `text`, uses an unknown variable or one that the task has no
            value for, or does not use descriptions or exemplars that are there.
    """
    environment = sandbox(StrictUndefined)
    try:
        tree = environment.parse(source)
        used = meta.find_undeclared_variables(tree) - environment.globals.keys()
        # Only text that the template itself writes: names and keywords are not searched for control tokens.
        for data in tree.find_all(nodes.TemplateData):
            data.data = respell(data.data)
        for constant in tree.find_all(nodes.Const):
            if isinstance(constant.value, str):
                constant.value = respell(constant.value)
        template = environment.from_string(tree)
    except TemplateError as error:
        line = getattr(error, "lineno", None)
        raise TemplateUserError(f"{error}{f' (line {line})' if line else ''}") from None
    unknown = used - (VARIABLES if labels else {"text"})
    if unknown:
        raise TemplateUserError(f"unknown variable {', '.join(sorted(unknown))}")
    if "text" not in used:
        raise TemplateUserError("it does not use {{ text }}, so that all prompts would be the same")
    _check_use("exemplars", "exemplars" in used, exemplars, "set ingest.exemplars_per_label to 1 or more", "to 0")
    _check_use("descriptions", "descriptions" in used, descriptions, "give task.label_descriptions", "null for them")
    return template


def _check_use(name: str, used: bool, present: bool, give: str, leave: str) -> None:
    if used and not present:
        raise TemplateUserError(f"it uses {name}, but there are none: {give}, or take {name} out of the template")
    if present and not used:
        raise TemplateUserError(f"it does not use the {name} that there are: use them, or {give.split()[0]} {leave}")


def render(template: Template, values: dict[str, Any]) -> str:
    """Fill in a compiled prompt template.

    Raises:
        TemplateUserError: the template fails, or tries what the sandbox forbids.
    """
    try:
        return template.render(values)
    except Exception as error:  # whatever a template does wrong while it runs is its writer's to mend
        raise TemplateUserError(f"it fails with {type(error).__name__}: {error}") from None


def sandbox(undefined: type[Undefined]) -> ImmutableSandboxedEnvironment:
    """Jinja as transformers sets it up for chat templates, without what makes one prompt differ from the next run's.

    See `_cached_compile_jinja_template` in transformers/utils/chat_template_utils.py.
    """
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=undefined,
        extensions=["jinja2.ext.loopcontrols", _GenerationTag],
    )
    filters: dict[str, Callable[..., Any]] = environment.filters
    filters["tojson"] = _to_json
    del filters["random"], environment.globals["lipsum"]
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_fixed)
    return environment


class _GenerationTag(Extension):
    """`{% generation %}` marks the assistant's words for training; here it is no more than its content."""

    tags = {"generation"}  # noqa: RUF012  (Jinja's own interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_fixed(form: str) -> str:
    """Chat templates write today's date; training and serving must see one prompt, so the day stands still.

    26 July 2024 is what Llama's templates fall back to where no clock is offered.
    """
    return date(2024, 7, 26).strftime(form)
