"""Bytes of files as they were before compression, with their progress and within bounds."""

from __future__ import annotations

import bz2
import errno
import gzip
import io
import lzma
import shutil
import struct
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TextIO

import pyarrow as pa

from stages.common.errors import UserError, listing

# First bytes of a compressed file, and how its name ends.
MAGIC = {b"\x1f\x8b": ".gz", b"BZh": ".bz2", b"\xfd7zXZ\x00": ".xz", b"\x28\xb5\x2f\xfd": ".zst"}
COMPRESSIONS = (*MAGIC.values(), ".zip")
# A file may hold so many times its size. Published tables hold 3 to 40 times theirs; DEFLATE ends at 1,032, xz and
# Zstandard at tens of thousands.
MOST_TIMES_LARGER = 500
# What any file may hold, however small it is.
ALWAYS_ALLOWED_BYTES = 256 * 2**20
# A longer line is no row any more: a file without line breaks, or a bomb.
MOST_LINE_CHARACTERS = 64 * 2**20
# What reading a broken archive or compressed file raises; of OSError only those without a number, see `is_damage`.
DAMAGED = (zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError, zlib.error, EOFError, OSError)


def is_damage(error: BaseException) -> bool:
    """Whether an error of DAMAGED is about the file's content: what the operating system reports has a number.

    Only "invalid argument" comes of the content too: a place before the file's beginning, which an archive names.
    """
    return getattr(error, "errno", None) in (None, errno.EINVAL)


class Allowance:
    """How many bytes may come out of a file, all that is unpacked of it together.

    Args:
        path: the file.
        name: what messages call it.
    """

    def __init__(self, path: Path, name: str) -> None:
        self._left = self._most = max(ALWAYS_ALLOWED_BYTES, MOST_TIMES_LARGER * path.stat().st_size)
        self._name = name

    def take(self, count: int) -> None:
        """Count some bytes.

        Raises:
            UserError: they are more than are left.
        """
        self._left -= count
        if self._left < 0:
            raise UserError(
                f"{self._name}: holds more than {self._most:,} bytes once it is decompressed, over "
                f"{MOST_TIMES_LARGER} times its size: it may be made to fill disk and memory. If it is meant, unpack "
                "it yourself and name the unpacked file."
            )


class _AllowedBytes(io.RawIOBase):
    """A decompressed stream that ends in an error where its allowance does."""

    def __init__(self, stream: IO[bytes], allowance: Allowance) -> None:
        self._stream, self._allowance = stream, allowance

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        piece = self._stream.read(len(buffer))
        self._allowance.take(len(piece))
        buffer[: len(piece)] = piece
        return len(piece)


def within(allowance: Allowance, stream: IO[bytes]) -> io.BufferedReader:
    """The stream, as far as the allowance goes."""
    return io.BufferedReader(_AllowedBytes(stream, allowance), 1 << 16)


def lines_of(text: TextIO, name: str) -> Iterator[str]:
    """The lines of a text with their line breaks, in memory bounded by the longest one that is allowed.

    Raises:
        UserError: a line is longer.
    """
    while line := text.readline(MOST_LINE_CHARACTERS + 1):
        if len(line) > MOST_LINE_CHARACTERS:
            raise UserError(
                f"{name}: has a line of more than {MOST_LINE_CHARACTERS:,} characters, which is no row of a table. "
                "Correct it, or fetch it again."
            )
        yield line


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
        UserError: a zip archive that holds none or several files; or, while it is read, more than the `Allowance`.
    """
    allowance = Allowance(path, name)
    with io.BufferedReader(_CountingFile(path, on_bytes or (lambda _: None)), 1 << 16) as file:
        head = file.peek(6)[:6]
        if head.startswith(b"PK\x03\x04"):
            with open_zip(file) as archive:
                members = [item for item in archive.namelist() if not item.endswith("/") and "__MACOSX/" not in item]
                if len(members) != 1:
                    raise UserError(
                        f"{name}: holds {len(members)} files ({listing([repr(member)[1:-1] for member in members])}). "
                        "Unpack it: one is wanted."
                    )
                yield within(allowance, open_zipped(archive, members[0], name))
            return
        stream = _decompressed(file, head)
        yield file if stream is None else within(allowance, stream)


@contextmanager
def open_compressed(path: Path, allowance: Allowance) -> Iterator[IO[bytes]]:
    """The bytes of a file, decompressed where it is compressed; a zip archive's as they are."""
    with path.open("rb") as file:
        stream = _decompressed(file, file.peek(6)[:6])
        yield file if stream is None else within(allowance, stream)


def _decompressed(file: IO[bytes], head: bytes) -> IO[bytes] | None:
    """The stream inside a compressed file; None where its first bytes are those of no compression."""
    openers: dict[str, Callable[[Any], Any]] = {
        ".gz": lambda file: gzip.GzipFile(fileobj=file),
        ".bz2": bz2.BZ2File,
        ".xz": lzma.LZMAFile,
        ".zst": lambda file: pa.CompressedInputStream(pa.PythonFile(file, mode="r"), "zstd"),
    }
    found = next((suffix for magic, suffix in MAGIC.items() if head.startswith(magic)), None)
    # A table may begin with "BZh": bzip2 has the digit of its block size there.
    if found is None or (found == ".bz2" and not head[3:4].isdigit()):
        return None
    stream: IO[bytes] = openers[found](file)
    return stream


def open_zip(file: Path | IO[bytes]) -> zipfile.ZipFile:
    """A zip archive.

    Raises:
        zipfile.BadZipFile: it is none, or damaged in a way that the module itself stumbles over.
    """
    try:
        return zipfile.ZipFile(file)
    except (NotImplementedError, ValueError, IndexError, OverflowError, struct.error) as error:
        raise zipfile.BadZipFile(str(error)) from None


def open_zipped(archive: zipfile.ZipFile, member: str, name: str) -> IO[bytes]:
    """A file in a zip archive.

    Raises:
        UserError: it is encrypted, or compressed in a way that Python does not know.
    """
    try:
        return archive.open(member)
    except RuntimeError as error:
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
