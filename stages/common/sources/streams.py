"""Bytes of files as they were before compression, with their progress."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import shutil
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from stages.common.errors import UserError, listing

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst", ".zip")
# What reading a broken archive or compressed file raises; of OSError only those without a number, see `is_damage`.
DAMAGED = (zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError)


def is_damage(error: BaseException) -> bool:
    """Whether an error of DAMAGED is about the file's content: what the operating system reports has a number."""
    return getattr(error, "errno", None) is None


class _CountingFile(io.FileIO):
    """A file that tells how many bytes were read."""

    def __init__(self, path: Path, on_bytes: Callable[[int], Any]) -> None:
        super().__init__(path)
        self._on_bytes = on_bytes

    def readinto(self, buffer: Any) -> int | None:
        count = super().readinto(buffer)
        self._on_bytes(count or 0)
        return count


@contextmanager
def open_decompressed(path: Path, name: str, on_bytes: Callable[[int], Any] | None = None) -> Iterator[Any]:
    """The bytes of a file, decompressed as its first bytes demand.

    Raises:
        UserError: a zip archive that holds none or several files.
    """
    with io.BufferedReader(_CountingFile(path, on_bytes or (lambda _: None)), 1 << 16) as file:
        head = file.peek(6)[:6]
        if head.startswith(b"\x1f\x8b"):
            yield gzip.GzipFile(fileobj=file)
        elif head.startswith(b"BZh") and head[3:4].isdigit():
            yield bz2.BZ2File(file)
        elif head.startswith(b"\xfd7zXZ\x00"):
            yield lzma.LZMAFile(file)  # noqa: SIM115
        elif head.startswith(b"\x28\xb5\x2f\xfd"):
            yield io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd"))
        elif head.startswith(b"PK\x03\x04"):
            with zipfile.ZipFile(file) as archive:
                members = [item for item in archive.namelist() if not item.endswith("/") and "__MACOSX/" not in item]
                if len(members) != 1:
                    raise UserError(
                        f"{name}: holds {len(members)} files ({listing(members)}). Unpack it: one is wanted."
                    )
                yield _open_zipped(archive, members[0], name)
        else:
            yield file


def _open_zipped(archive: zipfile.ZipFile, member: str, name: str) -> IO[bytes]:
    try:
        return archive.open(member)
    except RuntimeError as error:
        # Encrypted, or compressed in a way that Python does not know.
        raise UserError(
            f"{name}: cannot be unpacked ({error}). Unpack it yourself, or compress it with gzip."
        ) from None


@contextmanager
def seekable(stream: IO[bytes]) -> Iterator[IO[bytes]]:
    """Parquet is read from its end, which a decompressed stream shows only once it is unpacked."""
    if isinstance(stream, io.BufferedReader) and isinstance(stream.raw, _CountingFile):
        yield stream
        return
    with tempfile.TemporaryFile() as unpacked:
        shutil.copyfileobj(stream, unpacked, 1 << 20)
        unpacked.seek(0)
        yield unpacked
