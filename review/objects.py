"""What dvc.lock names, read by its hash: out of the local cache, else out of the remote, and nothing else with it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any

from dvc.exceptions import DvcException
from dvc.repo import Repo

from stages.common.errors import UserError


class UnavailableError(UserError):
    """An object that is needed is nowhere to be had, or damaged."""


def output_content(repo: Repo, outputs: Mapping[str, str], path: str) -> bytes:
    """The content of an output, or of a file inside an output that is a directory.

    Nothing is written, not even into the cache.

    Args:
        repo: with cache and remote. Not those of the revision: a remote is often younger than what it holds.
        outputs: the hash of each output of dvc.lock, by path.
        path: of the file, as dvc.yaml writes it.

    Raises:
        UnavailableError: dvc.lock does not name it, or its object is neither in the cache nor in the remote.
    """
    if path in outputs:
        return _object_content(repo, outputs[path], path)
    folder = PurePosixPath(path).parent
    if str(folder) not in outputs:
        raise UnavailableError(f"its dvc.lock names no {path}")
    listing = json.loads(_object_content(repo, outputs[str(folder)], str(folder)))
    hashes = {entry["relpath"]: entry["md5"] for entry in listing}
    name = PurePosixPath(path).name
    if name not in hashes:
        raise UnavailableError(f"its {folder} holds no {name}")
    return _object_content(repo, hashes[name], path)


def _object_content(repo: Repo, hash_value: str, path: str) -> bytes:
    problems = []
    for place, store in stores_of(repo):
        if isinstance(store, str):
            problems.append(store)
            continue
        try:
            with store.fs.open(store.oid_to_path(hash_value), "rb") as file:
                content: bytes = file.read()
        except FileNotFoundError:
            problems.append(f"object {hash_value} is not in {place}")
        except Exception as error:
            # Each kind of remote has a library of its own, which raises what it likes.
            reason = next((line for line in str(error).splitlines() if line.strip()), "")[:200]
            problems.append(f"{place} cannot be read: {type(error).__name__} {reason}".rstrip())
        else:
            if hashlib.md5(content, usedforsecurity=False).hexdigest() == hash_value.removesuffix(".dir"):
                return content
            problems.append(f"object {hash_value} is damaged in {place}")
    raise UnavailableError(f"{path} is neither in the cache nor in a remote ({', '.join(problems)})")


def stores_of(repo: Repo) -> Iterator[tuple[str, Any]]:
    """DVC's stores of objects with their names; of a remote that cannot be used, the reason instead."""
    yield "the cache", repo.cache.local
    name = repo.config["core"].get("remote")
    if name is None:
        yield "", "there is no default remote"
        return
    try:
        yield f"the remote {name!r}", repo.cloud.get_remote_odb()
    except DvcException as error:
        yield "", f"the remote {name!r} cannot be used: {' '.join(str(error).split())[:200]}"
