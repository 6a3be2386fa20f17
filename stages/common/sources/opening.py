"""The files behind the sources of params.ingest, wherever they come from."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from stages.common.errors import UserError, listing
from stages.common.schema.ingest import FilesSource, HubSource, PackageSource, SplitPaths, TableFormat, split_paths
from stages.common.sources.cells import ascii_controls
from stages.common.sources.columns import SPLITS
from stages.common.sources.hub import download_repository, require_commit
from stages.common.sources.packages import fetch_package_member
from stages.common.sources.readers import format_of

RAW_FOLDER = "data/raw/"


class SourceFile(NamedTuple):
    """One table of the source.

    Args:
        path: where it lies.
        name: what messages call it.
        origin: what ids and `origin` call it.
        split: the published split it belongs to; None without one.
        format: how it is written.
    """

    path: Path
    name: str
    origin: str
    split: str | None
    format: TableFormat


@contextmanager
def open_source(source: FilesSource | HubSource | PackageSource, key: str) -> Iterator[list[SourceFile]]:
    """The source's files, fetched first where they lie elsewhere; in the order of params.yaml (train,
    validation, test where they are named), matches sorted.

    Args:
        source: params.ingest.source, or that of a further source.
        key: where params.yaml has it, for messages.

    Raises:
        UserError: a path matches no file, one file is in two splits, or the source cannot be fetched.
    """
    if isinstance(source, PackageSource):
        with fetch_package_member(source) as path:
            yield [SourceFile(path, path.name, path.name, None, source.format or format_of(path.name))]
    elif isinstance(source, HubSource):
        require_commit(source.repo_id, source.revision, "dataset", f"{key}.revision")
        patterns = split_paths(source.paths)
        # The Hub knows no ** for "any folders, or none".
        patterns += [pattern.replace("**/", "") for pattern in patterns if "**/" in pattern]
        root = download_repository(source.repo_id, source.revision, "dataset", patterns)
        yield list_files(source.paths, root, source.format, f"{source.repo_id}/", key)
    else:
        yield list_files(source.paths, Path(), source.format, "", key)


def list_files(
    paths: SplitPaths, root: Path, table_format: TableFormat | None, prefix: str, key: str
) -> list[SourceFile]:
    """The files that names and patterns stand for.

    Args:
        paths: relative to `root`; a list, or a list for each published split.
        root: the folder to look in.
        table_format: of all files; None: each file's name says it.
        prefix: put before a file's path in messages.
        key: where params.yaml has the source, for messages.

    Raises:
        UserError: a path matches no file, or one file is in two splits.
    """
    parts = (
        [(split, paths[split]) for split in SPLITS if split in paths] if isinstance(paths, dict) else [(None, paths)]
    )
    found: dict[str, SourceFile] = {}
    for split, patterns in parts:
        for name in [name for pattern in patterns for name in _matches(pattern, root, key)]:
            if name in found and found[name].split != split:
                raise UserError(f"{key}.paths: {name} is in both {found[name].split} and {split}. Choose one.")
            table = table_format or format_of(name)
            # A file's name can be any bytes; what becomes of it goes into messages, tables and JSON.
            shown = ascii_controls(name)
            found[name] = SourceFile(root / name, prefix + shown, shown.removeprefix(RAW_FOLDER), split, table)
    return list(found.values())


def distinct_files(files: list[SourceFile], earlier: list[SourceFile], key: str) -> list[SourceFile]:
    """A further source's files, named apart from those of the sources before it: ids made of them must differ.

    Args:
        files: the source's tables.
        earlier: the tables of all sources before it.
        key: where params.yaml has the source: what is put to a name that is taken.
    """
    names, origins = {file.name for file in earlier}, {file.origin for file in earlier}
    return [
        file._replace(
            name=f"{file.name} ({key})" if file.name in names else file.name,
            origin=f"{key}/{file.origin}" if file.origin in origins else file.origin,
        )
        for file in files
    ]


def _matches(pattern: str, root: Path, key: str) -> list[str]:
    # A file whose name holds brackets is itself before it is a pattern.
    if (root / pattern).is_file():
        return [pattern]
    try:
        paths = [path.relative_to(root) for path in root.glob(pattern) if path.is_file()]
    except ValueError as error:
        raise UserError(f"{key}.paths: {pattern!r} is no pattern ({error}). Correct it in params.yaml.") from error
    # Unlike a shell, Path.glob finds .gitignore and its like.
    names = sorted(path.as_posix() for path in paths if not any(part.startswith(".") for part in path.parts))
    if not names:
        folder = root / (Path(*Path(pattern).parts[:2]) if pattern.startswith(RAW_FOLDER) else Path())
        there = sorted(path.name for path in folder.iterdir() if path.name[0] != ".") if folder.is_dir() else []
        holds = f"has {listing(there)}" if there else "is empty"
        raise UserError(
            f"{key}.paths: no file matches {pattern!r}; the folder {holds}. Put the file there, or correct "
            "the path in params.yaml."
        )
    return names
