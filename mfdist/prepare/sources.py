"""An input file: what it is, and its bytes as one plain stream of UTF-8.

What a file is, is read from its first bytes, not from its name: Parquet, or text, plain or inside gzip, bzip2,
zstandard or zip, in UTF-8 or, with a byte-order mark, UTF-16. Errors of remote stores are tried again where they may
pass.
"""

from __future__ import annotations

import bz2
import codecs
import contextlib
import gzip
import hashlib
import io
import time
import zipfile
import zlib
from dataclasses import dataclass
from typing import IO, Any, cast

import pyarrow as pa

from mfdist import storage
from mfdist.errors import DataError

RETRIES = 5
RETRY_SECONDS = 0.5
KNOWN_MEMBERS = ("ratings.csv", "ratings.dat", "u.data")
_MAGIC = {b"PAR1": "parquet", b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip", b"BZh": "bz2"}
_REFUSED = {b"SQLite format 3": "an SQLite database", b"\x89HDF": "an HDF5 file", b"ORC": "an ORC file",
            b"Obj\x01": "an Avro file", b"ARROW1": "an Arrow IPC file", b"PARE": "an encrypted Parquet file",
            b"\xfd7zXZ": "an xz file", b"7z\xbc\xaf": "a 7z archive", b"\x93NUMPY": "a NumPy array"}  # fmt: skip
_DAMAGED = (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile, OSError, pa.ArrowInvalid)


@dataclass(frozen=True)
class Source:
    """One input file; ``val`` marks a ``--val`` file.

    ``packing``: 'parquet', 'text', or what the text is packed in: 'gzip', 'bz2', 'zstd', 'zip'. ``partition``: names
    and values of the folders ``name=value`` that it lies in, which are columns of all its rows. ``given``: the name
    that it is shown by, where that is not its path. ``columns``: the names of user, item, rating and time, where they
    are known already. ``part``: its number among the files that are one table's, from 1; 0 where it is a file of its
    own.
    """

    path: str
    bytes: int
    packing: str
    val: bool = False
    partition: tuple[tuple[str, str], ...] = ()
    given: str = ""
    columns: tuple[str, ...] = ()
    part: int = 0

    @property
    def shown(self) -> str:
        return storage.redact(self.given or self.path)


def recognised(path: str, *, val: bool = False, partition: tuple[tuple[str, str], ...] = ()) -> Source | None:
    """The source at ``path``, None where it is empty; DataError where there is none or it is no kind that is read."""
    shown = storage.redact(path)
    try:
        with Reopened(path) as stream:
            head = stream.read(1 << 16)
            size = stream.size
    except (FileNotFoundError, IsADirectoryError):
        raise DataError(f"{shown}: there is no such file.") from None
    except (OSError, ValueError) as error:
        raise DataError(f"{shown} cannot be read: {one_line(error)}.") from None
    if not head:
        return None
    packing = next((name for magic, name in _MAGIC.items() if head.startswith(magic)), "text")
    if packing == "text":
        check_text(head, shown)
    return Source(path, size, packing, val, partition)


def one_line(error: Exception) -> str:
    """What another library says of an error, without its line ends and closing point."""
    return " ".join(str(error).split()).rstrip(".")


def check_text(head: bytes, shown: str) -> None:
    """DataError where the first bytes cannot be those of a text file."""
    if head.startswith(codecs.BOM_UTF32_LE):
        raise DataError(f"{shown} is UTF-32 text; convert it to UTF-8 (iconv -f utf-32 -t utf-8).")
    if b"\0" not in head or head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return
    if len(head) > 2 and (head[0] == 0) != (head[1] == 0):
        raise DataError(f"{shown} looks like UTF-16 without a byte-order mark; convert it to UTF-8 (iconv).")
    known = next((name for magic, name in _REFUSED.items() if head.startswith(magic)), None)
    raise DataError(
        f"{shown} is {known or 'a binary file of an unknown kind'}; ratings come as text (CSV, TSV, JSON, Matrix "
        "Market) or Parquet, or, with --engine spark --source-format, in what Spark reads."
    )


class Reopened(io.RawIOBase):
    """A file that is opened again, where it was, after an error that may pass; at most ``RETRIES`` times in a row."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = path
        self._place = 0
        self._stream = self._tried(self._open)
        self.size = int(getattr(self._stream, "size", None) or self._measured())

    def _open(self) -> IO[bytes]:
        return storage.open_read(self._path)

    def _measured(self) -> int:
        if "::" in self._path:  # seeking in an archive unpacks it
            with contextlib.suppress(TypeError):  # a store that does not know
                return storage.size(self._path)
        size = int(self._stream.seek(0, io.SEEK_END))
        self._stream.seek(0)
        return size

    def _tried(self, action: Any) -> Any:
        for attempt in range(RETRIES + 1):
            try:
                return action()
            except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError):
                raise
            except (OSError, TimeoutError):
                if attempt == RETRIES or storage.is_local(self._path):
                    raise
                time.sleep(RETRY_SECONDS * 2**attempt)
                self._stream = None

    def _read_here(self, n: int) -> bytes:
        if self._stream is None:
            self._stream = self._open()
            self._stream.seek(self._place)
        return cast(bytes, self._stream.read(n))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def read(self, n: int | None = -1) -> bytes:
        content = cast(bytes, self._tried(lambda: self._read_here(-1 if n is None else n)))
        self._place += len(content)
        return content

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self.size}[whence]
        self._place = base + offset
        if self._stream is not None:
            self._stream.seek(self._place)
        return self._place

    def tell(self) -> int:
        return self._place

    def close(self) -> None:
        if not self.closed and self._stream is not None:
            self._stream.close()
        super().close()


class Text:
    """The text of a source, unpacked, read from its beginning in pieces; a context manager.

    ``fingerprint`` (BLAKE2b of the packed bytes) and ``packed_place`` are true when everything was read.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._raw = _Hashed(Reopened(source.path)) if source.packing != "zip" else None
        self._closing: list[Any] = [self._raw] if self._raw else []
        self._stream = _Utf8(self._unpacked())

    def __enter__(self) -> Text:
        return self

    def __exit__(self, *_: object) -> None:
        for stream in reversed(self._closing):
            stream.close()

    def read(self, n: int) -> bytes:
        """Up to ``n`` bytes; empty at the end. DataError where the packing is damaged."""
        try:
            return self._stream.read(n)
        except _DAMAGED as error:
            packing = "" if self._source.packing == "text" else f" (damaged or cut off {self._source.packing} file)"
            raise DataError(f"{self._source.shown} cannot be read to its end{packing}: {one_line(error)}.") from None

    @property
    def packed_place(self) -> int:
        return self._raw.count if self._raw else 0

    @property
    def fingerprint(self) -> str:
        if self._raw is None:
            return file_fingerprint(self._source)
        while self._raw.read(1 << 20):
            pass
        return self._raw.digest.hexdigest()

    def _unpacked(self) -> Any:
        packing = self._source.packing
        if packing == "zip":
            return self._zip_member()
        raw: Any = self._raw
        if packing == "text":
            return raw
        if packing == "gzip":
            stream: Any = gzip.GzipFile(fileobj=raw)
        elif packing == "bz2":
            stream = bz2.BZ2File(raw)
        else:
            stream = pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd")
        self._closing.append(stream)
        return stream

    def _zip_member(self) -> Any:
        shown = self._source.shown
        try:
            archive = zipfile.ZipFile(cast(IO[bytes], Reopened(self._source.path)))
            self._closing.append(archive)
            names = [i.filename for i in archive.infolist() if not i.is_dir() and "__MACOSX" not in i.filename]
            known = [name for name in names if name.split("/")[-1] in KNOWN_MEMBERS]
            chosen = names if len(names) == 1 else known
            if len(chosen) != 1:
                raise DataError(
                    f"{shown} holds {len(names)} files ({', '.join(names[:4])} ...); name the one that holds the "
                    f"ratings as zip://MEMBER::{shown}."
                )
            stream = archive.open(chosen[0])
        except _DAMAGED as error:
            raise DataError(f"{shown} is a damaged zip file: {one_line(error)}.") from None
        self._closing.append(stream)
        return stream


class _Utf8:
    """A text as UTF-8: UTF-16 with a byte-order mark is transcoded, anything else is passed on as it is.

    A surrogate without its other half becomes bytes that are no valid UTF-8, so that its row is refused.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._decoder: codecs.IncrementalDecoder | None = None
        self._begun = False

    def read(self, n: int) -> bytes:
        """Some bytes, about ``n`` at most; empty at the end. EOFError where UTF-16 ends within a character."""
        content: bytes = self._stream.read(n)
        if not self._begun:
            while len(content) < 2 and (more := self._stream.read(n)):
                content += more
            self._begun = True
            if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                self._decoder = codecs.getincrementaldecoder("utf-16")("surrogatepass")
        if self._decoder is None:
            return content
        while content:
            if text := self._decoder.decode(content):
                return text.encode("utf-8", "surrogatepass")
            content = self._stream.read(n)
        if self._decoder.getstate()[0]:
            raise EOFError("UTF-16 text ends within a character")
        return b""


class _Hashed(io.RawIOBase):
    """Reads through to a stream, with a digest and a count of what was read, in order, from the beginning."""

    def __init__(self, stream: io.RawIOBase) -> None:
        super().__init__()
        self._stream = stream
        self.digest = hashlib.blake2b(digest_size=16)
        self.count = 0

    def readable(self) -> bool:
        return True

    def read(self, n: int | None = -1) -> bytes:
        content = cast(bytes, self._stream.read(-1 if n is None else n))
        self.digest.update(content)
        self.count += len(content)
        return content

    def readinto(self, buffer: Any) -> int:
        content = self.read(len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        self._stream.close()
        super().close()


def file_fingerprint(source: Source) -> str:
    """BLAKE2b (16 bytes, hex) of a source's bytes."""
    digest = hashlib.blake2b(digest_size=16)
    with Reopened(source.path) as stream:
        while content := stream.read(1 << 22):
            digest.update(content)
    return digest.hexdigest()
