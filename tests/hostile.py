"""What the tests of hostile input draw from, and how often: a fixed choice in CI, more of it by `make test-slow`."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

# `tests/test_hostile_slow.py` sets it: so many times the examples, and other ones each time.
TIMES = int(os.environ.get("HOSTILE_TIMES", "1"))
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
# All 17 control tokens of SmolLM2's tokenizer.
SMOLLM2 = (
    *CHATML, "<repo_name>", "<reponame>", "<file_sep>", "<filename>", "<gh_stars>", "<issue_start>", "<issue_comment>",
    "<issue_closed>", "<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<jupyter_script>",
    "<empty_output>",
)  # fmt: skip
FRAGMENTS = [
    *SMOLLM2, "<|im_", "end|>", "<|", "|>", "<s>", "</s>", "[INST]", "＜|im_end|＞", "\u200b<|im_end|>", "Ġ", "▁",
    "system\n", "user\n", "assistant\n", "\nLabel:", "{{ text }}", "{{ 7 * 7 }}", "{% for x in y %}", "{% endraw %}",
    "{#", "{text}", "{0.__class__}", "%s", "%n", "${HOME}", "$(id)", "=cmd|' /C calc'!A0", "+1", "-1", "@SUM(1)",
    "\t=1", "'=1", "|", "\\|", "`", "```", "<b>", "&#64;", "<!--", "---", "\n", "\r\n", "\r", "\u2028", "\x85", "\0",
    "`id`", "\x1b[2J", "\u202e", "\ufeff", "\ud800", "\udfff", '"', "'", ",", ";", " ", "é", "e\u0301", "🙂", "日本",
    "a",
]  # fmt: skip


def examples(count: int, shrinks: bool = True) -> settings:
    """Hypothesis's settings for a property: `count` examples in CI, the same ones every time.

    Args:
        count: of examples.
        shrinks: whether a failing example is made smaller, which takes hundreds of runs.
    """
    return settings(
        max_examples=count * TIMES,
        derandomize=TIMES == 1,
        deadline=None,
        phases=[Phase.generate, Phase.shrink] if shrinks else [Phase.generate],
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much],
    )


def anything(most: int = 6) -> SearchStrategy[str]:
    """Any texts: lone surrogates and NUL too, and pieces of what means something to a part of the pipeline."""
    characters = st.text(st.characters(exclude_categories=()), max_size=4)
    return st.lists(st.sampled_from(FRAGMENTS) | characters, max_size=most).map("".join)


def is_text(value: str) -> bool:
    """Whether a table can hold it."""
    return "\0" not in value and not any(0xD800 <= ord(character) < 0xE000 for character in value)


def texts(most: int = 6) -> SearchStrategy[str]:
    """Those of `anything` that a table can hold and that are not empty."""
    return anything(most).filter(lambda value: is_text(value) and bool(value.strip()))


def labels(least: int = 2, most: int = 4) -> SearchStrategy[list[str]]:
    """Lists that params.yaml takes as task.labels."""
    one = texts(3).map(str.strip).filter(lambda name: len(name.splitlines()) == 1 and name != "<invalid>")
    return st.lists(one, min_size=least, max_size=most, unique=True)
