"""Paths: local ones and any fsspec URL behind the same few calls.

A path is a ``str``. Local files are written beside their target and renamed; on an object store a
file appears whole when it is closed. URLs are redacted before they reach a log or a report.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO, Any

import fsspec
import pyarrow.fs as pafs
from fsspec.core import url_to_fs

from mfdist import errors

SETTLE_SECONDS = 0.02
"""How long :func:`create` waits on a store without conditional create, for others that write at the same time."""


def is_local(path: str) -> bool:
    """Whether ``path`` names the local disk (no protocol, or ``file://``)."""
    return "://" not in path or path.startswith(("file://", "local://"))


def local_path(path: str) -> str:
    """The local file name of a path for which :func:`is_local` holds."""
    return re.sub(r"^(file|local)://", "", path)


def join(base: str, *parts: str) -> str:
    """``base`` and ``parts`` as one path; ``base`` may be a URL."""
    return "/".join([base.rstrip("/") if base != "/" else "", *parts])


def absolute(path: str) -> str:
    """``path`` as it is found from any folder."""
    return os.path.abspath(local_path(path)) if is_local(path) else path


def seen_from(path: str, base: str) -> str:
    """An absolute ``path`` as seen from the directory ``base``, so that both can be moved together; a path that is not
    on the same store as it is."""
    if is_local(path) and is_local(base):
        return os.path.relpath(os.path.realpath(local_path(path)), os.path.realpath(local_path(base)))
    return path


def check_relative(name: str) -> None:
    """ValueError where ``name``, of a file that may come from anywhere, does not lie below the folder that it is of."""
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or re.search(r"[\\:\x00-\x1f]", name):
        raise ValueError(f"{name!r} is no path inside of its folder")


def inside(folder: str, name: str) -> str:
    """The path of the file ``name`` of ``folder``. DataError where it lies elsewhere: by its name, or by a link."""
    try:
        check_relative(name)
    except ValueError as error:
        raise errors.DataError(f"{redact(folder)}: {error}.") from None
    path = join(folder, name)
    if is_local(folder):
        home = os.path.realpath(local_path(folder))
        if os.path.commonpath([home, os.path.realpath(local_path(path))]) != home:
            raise errors.DataError(f"{redact(path)} is a link that leads out of its folder; copy the file there.")
    return path


def name_of(path: str) -> str:
    """The last part of a path or URL."""
    return PurePosixPath(path.rstrip("/")).name


def filesystem(path: str) -> tuple[Any, str]:
    """The fsspec filesystem of ``path`` and the path inside it."""
    fs, inner = url_to_fs(local_path(path) if is_local(path) else path)
    return fs, inner


def arrow_filesystem(path: str) -> tuple[pafs.FileSystem, str]:
    """A pyarrow filesystem and the path inside it; local paths get Arrow's own, which never holds the GIL."""
    if is_local(path):
        return pafs.LocalFileSystem(), os.path.abspath(local_path(path))
    fs, inner = filesystem(path)
    return pafs.PyFileSystem(pafs.FSSpecHandler(fs)), inner


def exists(path: str) -> bool:
    fs, inner = filesystem(path)
    return bool(fs.exists(inner))


def is_dir(path: str) -> bool:
    fs, inner = filesystem(path)
    return bool(fs.isdir(inner))


def size(path: str) -> int:
    """Bytes of a file; FileNotFoundError where there is none."""
    fs, inner = filesystem(path)
    return int(fs.size(inner))


def list_names(path: str) -> list[str]:
    """Sorted names in a directory; empty where it does not exist."""
    fs, inner = filesystem(path)
    fs.invalidate_cache()
    if not fs.isdir(inner):
        return []
    return sorted(name_of(entry) for entry in fs.ls(inner, detail=False))


def make_dirs(path: str) -> None:
    fs, inner = filesystem(path)
    fs.makedirs(inner, exist_ok=True)


def remove(path: str) -> None:
    """Remove a file or a whole directory; nothing happens where there is none."""
    if is_local(path):
        local = local_path(path)
        if os.path.isdir(local) and not os.path.islink(local):
            shutil.rmtree(local, ignore_errors=False)
        elif os.path.lexists(local):
            os.unlink(local)
        return
    fs, inner = filesystem(path)
    if fs.exists(inner):
        fs.rm(inner, recursive=True)


def move(source: str, target: str) -> None:
    """Give a file another name in the same store, in the place of what has it."""
    if is_local(source):
        os.replace(local_path(source), local_path(target))
        return
    fs, inner = filesystem(source)
    fs.mv(inner, filesystem(target)[1])


def version(path: str) -> str:
    """What changes when a file is written again, as its store tells it (size, time, or tag)."""
    fs, inner = filesystem(path)
    fs.invalidate_cache()
    return str(fs.checksum(inner))


def open_read(path: str) -> IO[bytes]:
    fs, inner = filesystem(path)
    stream: IO[bytes] = fs.open(inner, "rb")
    with contextlib.suppress(AttributeError):  # an archive's file system closes the archive when it is collected
        stream.kept_open_by = fs  # type: ignore[attr-defined]
    return stream


def read_bytes(path: str) -> bytes:
    with open_read(path) as stream:
        return stream.read()


def read_text(path: str) -> str:
    return read_bytes(path).decode()


@contextlib.contextmanager
def open_write(path: str) -> Iterator[IO[bytes]]:
    """A stream whose content stands at ``path`` whole once the block ends; an error in the block leaves what was there.

    Makes the folder of a local path. On an object store the upload is completed at the end of the block, or dropped.
    """
    with _local_write(local_path(path)) if is_local(path) else _remote_write(path) as stream:
        yield stream


@contextlib.contextmanager
def _local_write(local: str) -> Iterator[IO[bytes]]:
    os.makedirs(os.path.dirname(os.path.abspath(local)), exist_ok=True)
    partial = f"{local}.{os.getpid()}.tmp"
    try:
        with open(partial, "wb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, local)
    finally:
        if os.path.exists(partial):
            os.unlink(partial)


@contextlib.contextmanager
def _remote_write(path: str) -> Iterator[IO[bytes]]:
    fs, inner = filesystem(path)
    stream = fs.open(inner, "wb", autocommit=False)
    try:
        yield stream
    except BaseException:
        stream.discard()
        with contextlib.suppress(AttributeError):
            stream.closed = True  # else the collector closes it later, which would upload what was dropped
        raise
    stream.close()
    stream.commit()


def write_bytes(path: str, content: bytes) -> None:
    """Write a whole file so that a reader sees the old content or the new, never a part; makes its folder."""
    if is_local(path):
        with open_write(path) as stream:
            stream.write(content)
        return
    with fsspec.open(path, "wb") as stream:
        stream.write(content)


def create(path: str, content: str) -> bool:
    """Make a whole file where there is none; False, and nothing changed, where there is one.

    Of several processes that do so at once one gets True: by a hard link, or by the store's conditional create. A store
    that has none takes the last writer; who needs to know looks afterwards.
    """
    if is_local(path):
        return _create_local(local_path(path), content.encode())
    fs, inner = filesystem(path)
    fs.invalidate_cache()
    if fs.exists(inner):
        return False
    try:
        fs.pipe_file(inner, content.encode(), mode="create")
    except FileExistsError:
        return False
    except (NotImplementedError, TypeError, ValueError):
        write_text(path, content)
        time.sleep(SETTLE_SECONDS)
    return True


def _create_local(local: str, content: bytes) -> bool:
    os.makedirs(os.path.dirname(os.path.abspath(local)), exist_ok=True)
    partial = f"{local}.{secrets.token_hex(8)}.tmp"
    try:
        with open(partial, "xb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.link(partial, local)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise
        return _create_without_links(local, content)
    finally:
        if os.path.exists(partial):
            os.unlink(partial)
    return True


def _create_without_links(local: str, content: bytes) -> bool:
    """On a file system without hard links (FAT, some network mounts): O_EXCL, the content a moment later."""
    try:
        with open(local, "xb") as stream:
            stream.write(content)
    except FileExistsError:
        return False
    return True


def write_text(path: str, content: str) -> None:
    write_bytes(path, content.encode())


def redact(path: str) -> str:
    """``path``, or a text with URLs in it, as it is fit for logs, configs and reports: see ``errors.redact``."""
    return errors.redact(path)
