"""All that dvc.lock names put into a commit's folder, each object's bytes hashed; the cache is only read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from dvc.repo import Repo
from dvc_data.hashfile.hash import file_md5

from review.objects import stores_of
from review.storage import Damage, Named, cache_remedy, clear_errors, describe, files_of, problem_of
from stages.common.errors import UserError, listing
from stages.common.progress import progress

Advance = Callable[[int], object]


class Restored(NamedTuple):
    """How many objects there are, how many of them came from the remote, and the bytes that were hashed."""

    objects: int
    fetched: int
    size: int


class Remote(NamedTuple):
    """Where objects come from that the cache lacks.

    Attributes:
        name: in DVC's configuration; None where none can be used.
        store: DVC's object database; where there is none, the reason.
        folder: for what is fetched.
    """

    name: str | None
    store: Any
    folder: Path

    def fetch(self, named: Named, advance: Advance) -> Path | None:
        """An object's file with the bytes that its hash says; None where the remote does not have it.

        Raises:
            UserError: it is damaged there.
        """
        path = self.folder / named.oid
        if self.name is None:
            return None
        try:
            self.store.fs.get_file(self.store.oid_to_path(named.oid), str(path))
        except FileNotFoundError:
            return None
        advance(path.stat().st_size)
        if file_md5(str(path), name=self.store.hash_name) != named.oid.split(".")[0]:
            raise UserError(
                f"{named.path}: object {named.oid} is damaged in remote {self.name}, and the cache lacks it. `python "
                f"-m review.storage --remote {self.name}` names all such objects, and what to do."
            )
        return path


def restore(user: Repo, commit: Repo, folder: Path) -> Restored:
    """Put every output of the pipeline into the commit's folder, as links to bytes that were just hashed.

    Args:
        user: the clone, whose cache and default remote are read.
        commit: as `open_commit` gives it; the current folder is the user's.
        folder: for what is fetched; is to stay as long as the links.

    Raises:
        UserError: dvc.lock names nothing, or objects are damaged or nowhere to be had; all of them are named.
    """
    # What `.dvc` files name is data that no stage made, and no part of dvc.lock.
    outputs = [out for out in commit.index.outs if out.use_cache and out.hash_info and not out.stage.is_data_source]
    if not outputs:
        raise UserError("dvc.lock names no object. Name a commit in which `dvc repro` has run.")
    remote, known, damaged, absent = _remote_of(user, folder), dict[str, Path | str | None](), list[str](), list[str]()
    total = sum(output.meta.size or 0 for output in outputs)
    with progress(total, "hashing what dvc.lock names", "B") as bar, clear_errors(remote.name):
        for output in outputs:
            damages = []
            for named in _objects_of(output, remote, bar.update):
                if named.oid not in known:
                    known[named.oid] = _sound_file(named, output.cache, remote, bar.update)
                place = known[named.oid]
                if isinstance(place, str):
                    damages.append(Damage(named, place))
                elif place is None:
                    absent.append(named.path)
                elif not named.oid.endswith(".dir"):
                    _link(Path(commit.root_dir) / named.path, place)
            if damages:
                damaged.append(describe(output, damages, "the cache", cache_remedy(output, damages)))
    if damaged:
        raise UserError("\n".join(["objects of the commit are damaged, so nothing else was looked at:", *damaged]))
    if absent:
        nowhere = f"remote {remote.name} does not have it" if remote.name else remote.store
        raise UserError(
            f"not in the cache, and {nowhere}: {listing(absent)}. Whoever made the commit has to `dvc push` it; then "
            "run this again."
        )
    places = [place for place in known.values() if isinstance(place, Path)]
    fetched = sum(place.parent == folder for place in places)
    return Restored(len(places), fetched, sum(place.stat().st_size for place in places))


def _objects_of(output: Any, remote: Remote, advance: Advance) -> list[Named]:
    own = Named(str(output), output.hash_info.value, None if output.hash_info.isdir else output.meta.size)
    if not output.hash_info.isdir:
        return [own]
    stores = [output.cache] if remote.name is None else [output.cache, remote.store]
    return [own, *files_of(output, stores, advance)]


def _sound_file(named: Named, cache: Any, remote: Remote, advance: Advance) -> Path | str | None:
    """An object's file; what is wrong with the one in the cache; or None where nobody has it."""
    problem = problem_of(cache, named, advance)
    if problem == "missing":
        return remote.fetch(named, advance)
    return problem or Path(cache.oid_to_path(named.oid)).absolute()


def _link(target: Path, place: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    target.symlink_to(place)


def _remote_of(user: Repo, folder: Path) -> Remote:
    folder.mkdir()
    (_, _), (_, store) = stores_of(user)
    return Remote(None if isinstance(store, str) else user.config["core"]["remote"], store, folder)
