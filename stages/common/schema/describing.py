"""Pydantic's errors as lines that begin with the key of params.yaml they are about."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

# Keys whose value chooses what other keys there are.
CHOOSING = ("kind", "source", "method")


class Problem(NamedTuple):
    """One of pydantic's errors.

    Args:
        place: the keys that lead to it.
        member: which member of a union it is about; empty without one. Where another member fits the value better,
            its problems say nothing to the reader of a YAML file.
        chosen: " with kind: chat" or the like, where a key's value decided about the member.
        item: the error.
    """

    place: tuple[str, ...]
    member: tuple[str, ...]
    chosen: str
    item: Any

    @property
    def kind(self) -> str:
        """Pydantic's name of the error."""
        return str(self.item["type"])


def describe(block: str, value: Any, items: Sequence[Any]) -> list[str]:
    """Each error as "key.path: what is wrong", without those of union members that were hardly meant.

    Args:
        block: the block's name.
        value: what stands there.
        items: as `ValidationError.errors()` gives them.
    """
    problems = [_problem(block, value, item) for item in items]
    return [_text(problem, problems) for problem in problems if problem.member == _meant(problem, problems)]


def _problem(block: str, value: Any, item: Any) -> Problem:
    place, member, chosen, found = [block], [], "", value
    for part in item["loc"]:
        choosing = [key for key in CHOOSING if isinstance(found, dict) and found.get(key) == part]
        if choosing:
            # What a key's value chose; another key may have that name.
            member.append(str(part))
            chosen = f" with {choosing[0]}: {part}"
        elif (isinstance(found, dict) and part in found) or (isinstance(found, list) and isinstance(part, int)):
            place.append(str(part))
            found = found[part]
        else:
            member.append(str(part))
    if item["type"] == "missing":
        place.append(member.pop())
    return Problem(tuple(place), tuple(member), chosen, item)


def _meant(problem: Problem, problems: list[Problem]) -> tuple[str, ...]:
    """The member of the problem's union that fits the value best."""
    if not problem.member or problem.chosen:
        return problem.member
    beside: dict[tuple[str, ...], list[Problem]] = {}
    for other in problems:
        if other.member and not other.chosen and _union_place(other) == _union_place(problem):
            beside.setdefault(other.member, []).append(other)
    return min(beside, key=lambda member: sum(map(_misfit, beside[member])))


def _union_place(problem: Problem) -> tuple[str, ...]:
    """The keys that lead to the union: as many as stand before its first member."""
    return problem.place[: 1 + problem.item["loc"].index(problem.member[0])]


def _misfit(problem: Problem) -> int:
    """How much an error says against a union's member: a wrong value little, keys more, another type most."""
    if problem.kind in ("missing", "extra_forbidden"):
        return 2
    if not problem.kind.endswith("_type"):
        return 0
    is_whole = str(problem.item["loc"][-1]) == problem.member[-1]
    return 100 if is_whole else 3


def _text(problem: Problem, problems: list[Problem]) -> str:
    where, item = ".".join(problem.place), problem.item
    if problem.kind == "missing":
        return f"{where}: this key is missing{problem.chosen}"
    if problem.kind == "extra_forbidden":
        absent = [
            other.place[-1]
            for other in problems
            if other.kind == "missing" and (other.place[:-1], other.member) == (problem.place[:-1], problem.member)
        ]
        close = difflib.get_close_matches(problem.place[-1], absent, n=1)
        return f"{where}: unknown key{problem.chosen}{f'; did you mean {close[0]}?' if close else ''}"
    if problem.kind == "union_tag_invalid":
        key = item["ctx"]["discriminator"].strip("'")
        return f"{where}.{key}: {item['ctx']['tag']!r} is none of {item['ctx']['expected_tags']}"
    if problem.kind == "union_tag_not_found":
        return f"{where}: needs the key {item['ctx']['discriminator']}, which chooses the others; docs/ have them"
    message = item["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    if problem.kind == "value_error":
        # Validators of whole blocks begin with the key that they are about, if it is one.
        begins_with_key = re.match(r"[a-z_.]+( and [a-z_]+)?: ", message)
        return f"{where}.{message}" if begins_with_key else f"{where}: {message}"
    return f"{where}: {message}, not {str(item['input'])[:60]!r}"
