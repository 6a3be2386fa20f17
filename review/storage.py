"""Verify every object that dvc.lock and .dvc files name, in the cache or in a remote: `python -m review.storage`.

DVC believes read-only files of its cache, and that a directory whose list lies in a remote is complete there: damage
passes `dvc checkout`, `dvc status` and `dvc push`. This reads every byte: with --remote it downloads them, keeps none.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from filecmp import cmp
from pathlib import Path
from typing import Any, NamedTuple

from dvc.exceptions import DvcException
from dvc.repo import Repo
from dvc_data.hashfile.hash import file_md5, fobj_md5
from dvc_data.hashfile.tree import Tree
from tqdm.utils import CallbackIOWrapper

from stages.common.errors import UserError, run_stage
from stages.common.progress import progress

# Where the libraries behind remotes define errors that are no OSError: Amazon's, SSH's, HTTP's.
REMOTE_LIBRARIES = ("aiobotocore", "aiohttp", "asyncssh", "botocore", "fsspec", "s3fs", "sshfs")
Advance = Callable[[int], object]


class Named(NamedTuple):
    """An object that an output consists of.

    Attributes:
        path: in the workspace.
        oid: its hash, by which cache and remote know it; with `.dir` at its end it lists the files of a directory.
        size: in bytes; None where nothing in Git says it.
    """

    path: str
    oid: str
    size: int | None


class Damage(NamedTuple):
    """An object that is not what its hash says."""

    named: Named
    problem: str


def problem_of(store: Any, named: Named, advance: Advance) -> str | None:
    """What is wrong with an object in a store; None: nothing.

    Args:
        store: DVC's object database of the cache or a remote.
        named: the object.
        advance: is told how many bytes were read.
    """
    path = store.oid_to_path(named.oid)
    try:
        size = store.fs.info(path).get("size")
        if named.size is not None and size is not None and size != named.size:
            kind = "truncated" if size < named.size else "altered"
            return f"{kind} ({size:,} of {named.size:,} bytes)"
        with store.fs.open(path, "rb") as stream:
            found = fobj_md5(CallbackIOWrapper(advance, stream), name=store.hash_name)
    except FileNotFoundError:
        return "missing"
    return None if found == named.oid.split(".")[0] else "altered"


def files_of(output: Any, stores: list[Any], advance: Advance) -> list[Named]:
    """The files of a directory output, out of the first store that has a sound list of them; none where none has."""
    listing = Named(str(output), output.hash_info.value, None)
    for store in stores:
        if problem_of(store, listing, advance) is None:
            tree = Tree.load(store, output.hash_info)
            return [Named(f"{output}/{'/'.join(key)}", oid.value, None) for key, _, oid in tree]
    return []


def damages_of(
    output: Any, store: Any, other_store: Any, known: dict[str, str | None], advance: Advance
) -> list[Damage]:
    """What is wrong with an output's objects in a store.

    Args:
        output: of DVC's index.
        store: the one to check.
        other_store: where a directory's list of files is taken from when the store's own is damaged.
        known: what is wrong with objects looked at before; is added to.
        advance: is told how many bytes were read.
    """
    is_directory = output.hash_info.isdir
    objects = [Named(str(output), output.hash_info.value, None if is_directory else output.meta.size)]
    if is_directory:
        objects += files_of(output, [store, other_store], advance)
    for named in objects:
        if named.oid not in known:
            known[named.oid] = problem_of(store, named, advance)
    return [Damage(named, problem) for named in objects if (problem := known[named.oid]) is not None]


def describe(output: Any, damages: list[Damage], place: str, remedy: str) -> str:
    """What is wrong with an output, which stage makes it, and what to do, in some lines."""
    stage = stage_of(output)
    maker = f"added by {stage}" if output.stage.is_data_source else f"made by stage {stage}"
    lines = [f"{output} ({maker}), in {place}:"]
    lines += [f"  {damage.problem}: {damage.named.path}, object {damage.named.oid}" for damage in damages]
    return "\n".join([*lines, f"  do: {remedy}"])


def stage_of(output: Any) -> str:
    """A stage as DVC's commands name it in the root of the clone, wherever the output's own repository lies."""
    return str(output.stage.addressing if output.stage.is_data_source else output.stage.name)


def cache_remedy(output: Any, damages: list[Damage]) -> str:
    """How to get sound objects of an output into the cache."""
    stage = stage_of(output)
    damaged = [damage.named for damage in damages if damage.problem != "missing"]
    stored = {named.path: output.cache.oid_to_path(named.oid) for named in damaged}
    doomed = [os.path.relpath(path) for path in stored.values()]
    # Of a directory's list nobody can say whether the workspace has it.
    here = [damage.named for damage in damages if Path(damage.named.path).is_file()]
    differing = [named.path for named in here if file_md5(named.path, name=output.hash_name) != named.oid]
    if len(here) == len(damages) and not differing:
        return f"{removal(doomed)}`dvc commit {stage}` puts the workspace's sound files into the cache"
    # A file that was checked out of a damaged object is as damaged, and DVC takes it for sound; others are the user's.
    copies = [path for path in differing if path in stored and cmp(path, stored[path], shallow=False)]
    otherwise = "" if output.stage.is_data_source else f"; where no remote has it, `dvc repro {stage}`"
    remedy = f"{removal(doomed + copies)}`dvc pull {output}`{otherwise}"
    if own := [path for path in differing if path not in copies]:
        # DVC fetches the object, and then ends with an error rather than replace a file that it does not know.
        remedy += (
            f"\n  not what {stage if output.stage.is_data_source else 'dvc.lock'} names either, in the workspace: "
            f"{', '.join(own)}\n  to take what was committed: `dvc pull {output}`, which may say `unsaved files`, then "
            f"`dvc checkout --force {output}`, which replaces what is here; to keep that, copy it elsewhere first"
        )
    return remedy


def remote_remedy(output: Any, damages: list[Damage], store: Any, name: str, cache_is_sound: bool) -> str:
    """How to get sound objects into a remote.

    Args:
        output: of DVC's index.
        damages: what is wrong with it there.
        store: the remote's object database.
        name: of the remote.
        cache_is_sound: whether the cache of this clone has the objects.
    """
    doomed = [damage.named.oid for damage in damages if damage.problem != "missing"]
    listing = output.hash_info.value
    if output.hash_info.isdir and listing not in {damage.named.oid for damage in damages}:
        # DVC pushes nothing of a directory whose list is there.
        doomed.append(listing)
    urls = [store.fs.unstrip_protocol(store.oid_to_path(oid)) for oid in doomed]
    first = f"delete {' and '.join(urls)}, then " if urls else ""
    if cache_is_sound:
        return f"{first}`dvc push --remote {name}`"
    stage = stage_of(output)
    makes = "" if output.stage.is_data_source else f"; where nobody has it, `dvc repro {stage}` first"
    return f"{first}`dvc push --remote {name}` from a clone whose cache has it{makes}"


def removal(paths: list[str]) -> str:
    """The first half of a remedy; nothing where there is nothing to remove."""
    return f"`rm {' '.join(paths)}`, then " if paths else ""


def check(repo: Repo, remote: str | None, advance_to: Callable[[int], Any]) -> tuple[list[str], int]:
    """Verify all objects.

    Args:
        repo: whose workspace names the objects.
        remote: its name; None: the cache.
        advance_to: gives a progress bar for so many bytes.

    Returns:
        A text for each output that is damaged, and how many objects were looked at.

    Raises:
        UserError: there is nothing to verify, or the remote's folder is not there.
    """
    outputs = [output for output in repo.index.outs if output.use_cache and output.hash_info]
    if remote:
        # What `dvc import` brought lies in its own repository's remote.
        outputs = [output for output in outputs if output.can_push and not output.stage.is_repo_import]
    if not outputs:
        raise UserError("dvc.lock names no object yet. `dvc repro` runs the pipeline.")
    if remote and (place := repo.cloud.get_remote(remote)).fs.protocol == "local" and not Path(place.path).is_dir():
        raise UserError(f"{place.path} is not there: is it mounted? (remote {remote} in .dvc/config)")
    texts, known = [], dict[str, dict[str, str | None]]()
    with advance_to(sum(output.meta.size or 0 for output in outputs)) as bar:
        for output in outputs:
            cache = output.cache
            store = repo.cloud.get_remote_odb(remote, hash_name=output.hash_name) if remote else cache
            damages = damages_of(output, store, cache, known.setdefault(output.hash_name, {}), bar.update)
            if damages and remote:
                here = all(problem_of(cache, damage.named, lambda _: None) is None for damage in damages)
                remedy = remote_remedy(output, damages, store, remote, here)
                texts.append(describe(output, damages, f"remote {remote}", remedy))
            elif damages:
                texts.append(describe(output, damages, "the cache", cache_remedy(output, damages)))
    return texts, sum(map(len, known.values()))


@contextmanager
def clear_errors(remote: str | None) -> Iterator[None]:
    """Turn what DVC and the libraries behind remotes raise into one message that says what to do."""
    try:
        yield
    except DvcException as error:
        raise UserError(f"{error}") from None
    except Exception as error:
        library = type(error).__module__.split(".")[0]
        if remote is None or not (isinstance(error, OSError) or library in REMOTE_LIBRARIES):
            raise
        raise UserError(
            f"remote '{remote}' cannot be read: {type(error).__name__}: {' '.join(str(error).split())[:300]}. Check "
            "its url, the network and your credentials (`dvc remote modify --local`), see docs/remotes.md."
        ) from None


def arguments() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog="python -m review.storage", description=__doc__)
    parser.add_argument("--remote", metavar="NAME", help="verify this remote; without, the cache is verified")
    return parser.parse_args()


def main() -> None:
    """Print what is damaged, and end with 1 if anything is."""
    remote = arguments().remote
    place = f"remote {remote}" if remote else "the cache"
    with clear_errors(remote), Repo() as repo:
        texts, count = check(repo, remote, lambda size: progress(size, f"verifying {place}", "B"))
    for text in texts:
        print(text)
    if texts:
        raise UserError(
            f"outputs that lack sound objects in {place}: {len(texts)}, see above; looked at {count} objects."
        )
    unseen = "" if remote else "; files in the workspace were not looked at: `dvc status` does"
    print(f"storage: all {count} objects that this commit names are sound in {place}{unseen}")


if __name__ == "__main__":
    run_stage(main)
