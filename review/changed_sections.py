"""The sections of a comparison's page about what was changed: parameters and rows."""

from __future__ import annotations

import json

from review.entries import Entry
from review.page_pieces import and_more, joined, more
from review.rendering import Block, Bullets, Code, Line, Paragraph, Table
from stages.common.measuring.markdown import number

# A page is read, and GitHub takes 65,536 characters in a comment; --json has everything.
LISTED_PARAMETERS, LISTED_IDS = 60, 10
MOST_OF_A_VALUE = 200


def parameter_blocks(changed: list[Entry]) -> list[Block]:
    """The keys of params.yaml that changed."""
    if not changed:
        return [Paragraph(["The same on both sides."])]
    rows = [
        [[Code(entry["key"])], _value(entry, "before"), _value(entry, "after")] for entry in changed[:LISTED_PARAMETERS]
    ]
    return [Table(["key of params.yaml", "before", "after"], rows), *more(len(changed) - LISTED_PARAMETERS, "keys")]


def _value(entry: Entry, end: str) -> Line:
    if end not in entry:
        return ["(not there)"]
    text = json.dumps(entry[end], ensure_ascii=False)
    return [Code(text if len(text) <= MOST_OF_A_VALUE else f"{text[:MOST_OF_A_VALUE]}…")]


def data_blocks(result: Entry) -> list[Block]:
    """How the rows of each part differ, and the numbers on rows that one side alone has."""
    lines: list[Line] = []
    listed: list[Block] = []
    for part, entry in result["data"].items():
        if entry is None:
            lines.append([_split_line(part, result["same_split"][part])])
            continue
        lines.append(_rows_line(part, entry))
        listed += [block for block in (_ids(part, entry), _relabelled(part, entry)) if block]
    return [Bullets(lines), *listed, *_own_rows(result)]


def _split_line(part: str, same: bool | None) -> str:
    """What dvc.lock alone says about a part."""
    if same:
        return f"{part}: the same split on both sides, by dvc.lock."
    if same is None:
        return f"{part}: not known; dvc.lock of one side does not name the split."
    return f"{part}: dvc.lock names other files. Whether rows, texts or only prompts differ needs the predictions."


def _rows_line(part: str, entry: Entry) -> Line:
    changes = [
        f"{len(entry[key]):,} {words}"
        for key, words in (("added", "added"), ("removed", "removed"), ("relabelled", "relabelled"))
        if entry[key]
    ]
    if entry["text_changed"]:
        changes.append(f"{len(entry['text_changed']):,} with another text")
    if not changes:
        return [f"{part}: the same {entry['after']:,} rows on both sides."]
    return [
        f"{part}: {entry['before']:,} rows before, {entry['after']:,} after: {', '.join(changes)}. "
        f"{entry['common']:,} rows are common to both sides with the same label and text"
        f"{', and only these are compared' if part == 'test' else ''}."
    ]


def _ids(part: str, entry: Entry) -> Block | None:
    lines: list[Line] = []
    for key, words in (("added", "added"), ("removed", "removed"), ("text_changed", "with another text")):
        ids = entry[key]
        if ids:
            lines.append([f"{part}, {words}: ", *joined(ids[:LISTED_IDS]), and_more(len(ids) - LISTED_IDS)])
    return Bullets(lines) if lines else None


def _relabelled(part: str, entry: Entry) -> Block | None:
    changed = entry["relabelled"]
    if not changed:
        return None
    if "before" not in changed[0]:
        ids = [one["id"] for one in changed]
        return Bullets([[f"{part}, relabelled: ", *joined(ids[:LISTED_IDS]), and_more(len(ids) - LISTED_IDS)]])
    rows = [[[Code(one["id"])], [Code(one["before"])], [Code(one["after"])]] for one in changed[:LISTED_IDS]]
    return Table([f"relabelled in {part}", "before", "after"], rows)


def _own_rows(result: Entry) -> list[Block]:
    if not result["own_rows"]:
        return []
    rows = [[[name], [number(before)], [number(after)]] for name, (before, after) in result["own_rows"].items()]
    said = "Each side on all of its own test rows. The test sets differ, so these columns do not compare:"
    return [Paragraph([said]), Table(["metric", "before, its own rows", "after, its own rows"], rows)]
