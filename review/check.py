"""Does dvc.lock belong to code, parameters and data? `python -m review.check`; it needs neither outputs nor a remote.

What `dvc repro --dry --allow-missing` would run is named, with the reasons. Exit code 1 where that is anything.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import NamedTuple

from dvc.dependency.param import ParamsDependency
from dvc.exceptions import DvcException
from dvc.output import Output
from dvc.repo import Repo, lock_repo
from dvc.repo.reproduce import plan_repro
from dvc.stage import Stage
from dvc_data.hashfile.hash import hash_file
from dvc_data.hashfile.tree import Tree

from review.differences import changed_parameters
from stages.common.errors import UserError, run_stage

# More changed keys of params.yaml than these are counted, not named.
MOST_NAMED = 5
# Characters of a value that are shown.
MOST_SHOWN = 80


class WouldRun(NamedTuple):
    """A stage that `dvc repro` would run, and why."""

    stage: str
    reasons: list[str]


def stages_that_would_run(repo: Repo) -> list[WouldRun]:
    """What `dvc repro --dry --allow-missing` would run, in its order; and stages that lack a file of Git's.

    Outputs that are absent count as unchanged. A folder that lacks only files behind `.dvc` files, or files that were
    not pulled, does too, where what is there belongs to the folder that the lock names; for DVC itself it has changed.
    """
    found = []
    # Not repro itself: of a changed stage whose inputs are absent it only says that they are.
    for stage in plan_repro(repo.index.graph):
        reasons = reasons_to_run(stage)
        if not reasons and _changed_for_dvc(stage, list(repo.index.graph.successors(stage))):
            reasons = ["DVC finds it changed; `dvc status` may say more"]
        if reasons:
            found.append(WouldRun(stage.addressing, reasons))
    return found


def reasons_to_run(stage: Stage) -> list[str]:
    """What differs between a stage's entry in dvc.lock and the workspace.

    Absent files do where Git has to have them; DVC itself takes them for unchanged too.
    """
    if not any(part.hash_info for part in (*stage.deps, *stage.outs)):
        return ["dvc.lock has no entry for it"]
    reasons = ["its command in dvc.yaml is not the one that ran"] if stage.changed_stage() else []
    for dependency in () if stage.frozen else stage.deps:
        if isinstance(dependency, ParamsDependency):
            reasons += parameter_reasons(dependency)
        elif not dependency.hash_info:
            reasons.append(f"{dependency} is a new dependency")
        elif not dependency.exists:
            reasons += _absent(dependency)
        elif _has_changed(dependency):
            reasons.append(f"{dependency} is not what it ran with")
    for output in stage.outs:
        if not output.hash_info:
            reasons.append(f"{output} is a new output")
        elif not output.exists and not output.use_cache:
            reasons.append(f"{output} is not there; Git has to have it")
        elif output.exists and _has_changed(output):
            reasons.append(f"{output} is not what it wrote")
    return reasons


def parameter_reasons(dependency: ParamsDependency) -> list[str]:
    """Each key of params.yaml that has another value than the lock, with both values."""
    if not dependency.exists:
        return [f"{dependency} is not there"]
    texts = []
    for entry in changed_parameters(dependency.hash_info.value or {}, dependency.read_params()):
        before, now = (repr(entry[side]) if side in entry else "absent" for side in ("before", "after"))
        # Of two long lists that differ near their end, the end has to be seen.
        same = next((place for place, signs in enumerate(zip(before, now, strict=False)) if len(set(signs)) > 1), 0)
        before, now = (_shortened(text, max(0, same - MOST_SHOWN // 2)) for text in (before, now))
        texts.append(f"{dependency}: {entry['key']} is {now}, in dvc.lock {before}")
    more = len(texts) - MOST_NAMED
    return [*texts[:MOST_NAMED], f"{dependency}: {more:,} more keys"] if more > 0 else texts


def is_complete_with_absent(repo: Repo, dependency: Output) -> bool:
    """Whether a folder would be what the lock names, were the files that its `.dvc` files stand for there too.

    Args:
        repo: the repository.
        dependency: one that exists.
    """
    folder = Path(dependency.fs_path)
    absent = {
        Path(out.fs_path): out for out in repo.index.outs
        if Path(out.fs_path).is_relative_to(folder) and out.stage.is_data_source and not out.exists
    }  # fmt: skip
    if not folder.is_dir() or not absent or any(out.is_dir_checksum for out in absent.values()):
        return False
    tree = Tree()
    for path, out in absent.items():
        tree.add(path.relative_to(folder).parts, None, out.hash_info)
    for name in repo.dvcignore.find(repo.fs, str(folder)):
        hash_info = hash_file(name, repo.fs, "md5")[1]
        tree.add(Path(name).relative_to(folder).parts, None, hash_info)
    tree.digest()
    return bool(tree.hash_info == dependency.hash_info)


def is_pulled_in_part(output: Output) -> bool:
    """Whether a folder in DVC's care only lacks some of the lock's files, as `dvc pull FOLDER/FILE` leaves it.

    The lock has one hash for the folder. The list of its files comes from the cache, into which such a pull puts it.

    Args:
        output: one that exists, or a dependency.
    """
    folder = Path(output.fs_path)
    # Of a folder in Git's care all has to be there.
    in_cache = any(out.use_cache and Path(out.fs_path) == folder for out in output.repo.index.outs)
    listed = output.get_obj() if in_cache and folder.is_dir() and output.is_dir_checksum else None
    if not isinstance(listed, Tree):
        return False
    listed.digest()
    if listed.hash_info != output.hash_info:
        return False
    hashes = {key: hash_info for key, _, hash_info in listed}
    fs, state = output.repo.fs, output.repo.state
    return all(
        hash_file(name, fs, output.hash_name, state=state)[1] == hashes.get(Path(name).relative_to(folder).parts)
        for name in output.repo.dvcignore.find(fs, str(folder))
    )


def message(found: list[WouldRun], stages: int) -> str:
    """What is wrong, where, and what to do."""
    why: dict[str, list[str]] = {}
    for one in found:
        for reason in one.reasons:
            why.setdefault(reason, []).append(one.stage)
    return "\n".join(
        [
            f"dvc.lock does not belong to what is here: {len(found)} of {stages} stages would run "
            f"({', '.join(one.stage for one in found)}), and after them what gets other inputs.",
            *(f"  {reason} ({', '.join(names)})" for reason, names in why.items()),
            "Run `dvc repro`, commit dvc.lock and metrics/, and `dvc push`; or put back what changed.",
        ]
    )


def _changed_for_dvc(stage: Stage, upstream: list[Stage]) -> bool:
    """Whether DVC would run a stage, were the files there that folders lack."""
    if not stage.changed(allow_missing=True, upstream=upstream):
        return False
    beside = copy.copy(stage)
    beside.deps, beside.outs = (
        [part for part in parts if not part.exists or not part.workspace_status() or _has_changed(part)]
        for parts in (stage.deps, stage.outs)
    )
    # The stage's own command and hash are those with all its dependencies.
    return bool(
        stage.changed_stage()
        or beside.changed_deps(allow_missing=True, upstream=upstream)
        or beside.changed_outs(allow_missing=True)
    )


def _has_changed(part: Output) -> bool:
    """Whether an output or dependency that exists is another one than the lock names, not only without some files."""
    return bool(part.workspace_status()) and not (is_complete_with_absent(part.repo, part) or is_pulled_in_part(part))


def _absent(dependency: Output) -> list[str]:
    """The reason where an absent file is one of Git's, or in dvc.lock another one than its stage wrote."""
    path = Path(dependency.fs_path)
    made_by = {Path(out.fs_path): out for out in dependency.repo.index.outs if path.is_relative_to(out.fs_path)}
    if not made_by:
        return [f"{dependency} is not there; Git has to have it"]
    # Of a single file in an output that is a folder, dvc.lock does not say what the folder holds.
    if path not in made_by or made_by[path].hash_info == dependency.hash_info:
        return []
    return [f"{dependency} is in dvc.lock not what {made_by[path].stage.addressing} wrote: the lock mixes two runs"]


def _shortened(text: str, start: int) -> str:
    if len(text) <= MOST_SHOWN:
        return text
    piece = text[start : start + MOST_SHOWN]
    return f"{'…' * (start > 0)}{piece}{'…' * (start + MOST_SHOWN < len(text))}"


def arguments() -> argparse.Namespace:
    """What the command line says: nothing."""
    return argparse.ArgumentParser(prog="python -m review.check", description=__doc__).parse_args()


def main() -> None:
    """Say that nothing would run, or fail with what would."""
    arguments()
    try:
        with Repo() as repo, lock_repo(repo):
            stages = len([stage for stage in repo.index.stages if stage.cmd])
            found = stages_that_would_run(repo)
    except DvcException as error:
        raise UserError(f"dvc.lock could not be checked: {error}") from None
    if not stages:
        raise UserError("dvc.yaml: has no stages. Run this in the root of the pipeline's repository.")
    if found:
        raise UserError(message(found, stages))
    print(f"check: dvc.lock belongs to code, parameters and data: none of {stages} stages would run")


if __name__ == "__main__":
    run_stage(main)
