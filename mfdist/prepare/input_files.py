"""Which files are meant: paths, globs, folders and URLs to sources, each file once.

A folder is read with the folders in it; what its ``name=value`` folders say are columns of the rows below. Names that
begin with ``.`` or ``_`` and checksums in a folder or glob, and empty files beside others, are left out, and said. A
folder whose own log says which of its files count (Delta, Iceberg, Hudi) is refused: the files alone hold removed rows
too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import unquote

from mfdist import storage
from mfdist.errors import DataError, UsageError
from mfdist.prepare.sources import Source, Text, recognised

_LOGS = {"_delta_log": "a Delta table", ".hoodie": "a Hudi table", "_spark_metadata": "the output of a Spark stream"}
_ENDING = re.compile(r"(\.(csv|tsv|txt|dat|jsonl?|ndjson|parquet|pq|mtx))?(\.(gz|gzip|bz2|zst|zstd|zip))?$", re.I)
_SMALL_BYTES = 1024
"""Below this a packed part is unpacked to see whether it is empty."""

_COMPARED_BYTES = 1 << 16

Say = Callable[[str], None]


def find_sources(patterns: tuple[str, ...], *, val: bool = False, say: Say = lambda _: None) -> list[Source]:
    """The files that paths, globs, folders and URLs name, sorted within each.

    ``say`` is told what was left out and which file has two names. DataError where one names no file, a folder is a
    table with a log of its own, one name stands there in two forms (packed and unpacked), or all files are empty.
    """
    search = _Search()
    for pattern in patterns:
        search.add(pattern)
    sources, empty = [], []
    for path in _once_each([*search.found], say):
        source = recognised(path, val=val, partition=_partition(path))
        if source is None or _holds_nothing(source):
            empty.append(path)
        else:
            sources.append(source)
    if not sources:
        raise DataError(f"{storage.redact((empty or [*patterns])[0])} is empty.")
    _refuse_two_forms(sources, search.found, say)
    _say_left_out(say, search.left_out, "hidden, a mark or a checksum by its name")
    _say_left_out(say, empty, "empty")
    return sources


def refuse_common(sources: Sequence[Source], vals: Sequence[Source]) -> None:
    """UsageError where a ``--val`` file is one of the training files too, under whatever name."""
    known = {_identity(source.path): source for source in sources}
    for source in vals:
        if twin := known.get(_identity(source.path)):
            raise UsageError(f"{source.shown} is given as --val and, as {twin.shown}, to be trained on: choose one.")


class _Search:
    """What the patterns name so far: ``found`` paths, True where one was named itself, and names left out."""

    def __init__(self) -> None:
        self.found: dict[str, bool] = {}
        self.left_out: list[str] = []
        self._looked_at: set[str] = set()
        self._walked: set[str] = set()

    def add(self, pattern: str) -> None:
        """DataError where ``pattern`` names no file."""
        self._walked.clear()
        fs, inner = (None, "") if "::" in pattern else storage.filesystem(pattern)
        folder = fs is not None and fs.isdir(inner)
        if folder:
            paths = [*self._walk(pattern)]
        elif fs is None or fs.exists(inner):
            paths = [pattern]
        else:
            paths = [*self._matches(pattern, fs, inner)] if any(c in pattern for c in "*?[") else []
        for path in paths:
            _refuse_tables(path, self._looked_at)
            self.found[path] = self.found.get(path, False) or path == pattern
        if not paths:
            raise DataError(f"{storage.redact(pattern)}: there is no such file{' in this folder' * folder}.")

    def _matches(self, pattern: str, fs: Any, inner: str) -> Iterator[str]:
        hidden = storage.name_of(pattern).startswith((".", "_"))
        for match in sorted(fs.glob(inner)):
            path = match if storage.is_local(pattern) else fs.unstrip_protocol(match)
            if not hidden and _is_mark(storage.name_of(path)):
                self._leave_out(path)
            elif fs.isdir(match):
                yield from self._walk(path)
            else:
                yield path

    def _walk(self, folder: str) -> Iterator[str]:
        fs, inner = storage.filesystem(folder)
        fs.invalidate_cache()
        place = os.path.realpath(storage.local_path(folder)) if storage.is_local(folder) else inner
        if place in self._walked:  # a link to a folder above
            return
        self._walked.add(place)
        for entry in sorted(fs.ls(inner, detail=True), key=lambda entry: str(entry["name"])):
            name = storage.name_of(entry["name"])
            path = storage.join(folder, name)
            if entry["name"].rstrip("/") == inner.rstrip("/"):  # a store's mark that the folder exists
                continue
            if _is_mark(name):
                self._leave_out(path)
            elif entry["type"] != "file" and storage.is_dir(path):
                yield from self._walk(path)
            else:
                yield path

    def _leave_out(self, path: str) -> None:
        name = storage.name_of(path)
        if name in _LOGS:
            raise _table_error(path[: -len(name)].rstrip("/"), _LOGS[name])
        self.left_out.append(path)


def _is_mark(name: str) -> bool:
    """Whether a name in a folder is by custom no data: ``_SUCCESS``, ``.part-0.crc``, ``.DS_Store``."""
    return name.startswith((".", "_")) or name.endswith(".crc")


def _refuse_tables(path: str, looked_at: set[str]) -> None:
    """DataError where a file lies in a table that has a log of its own; each folder is looked at once.

    Who may read a file need not be allowed to list its folder: then nothing is said of it.
    """
    if "::" in path or path.startswith(("http://", "https://")):
        return
    folder = path.rpartition("/")[0] or "."
    while folder not in looked_at:
        looked_at.add(folder)
        try:
            names = set(storage.list_names(folder))
        except OSError:
            return
        for name in _LOGS.keys() & names:
            raise _table_error(folder, _LOGS[name])
        if "metadata" in names and any(
            name.endswith(".metadata.json") for name in storage.list_names(storage.join(folder, "metadata"))
        ):
            raise _table_error(folder, "an Iceberg table")
        last = storage.name_of(folder)
        if "=" not in last and last != "data":  # a table's files lie in it, in its partitions, or in its data folder
            return
        folder = folder.rpartition("/")[0] or "."


def _table_error(folder: str, kind: str) -> DataError:
    return DataError(
        f"{storage.redact(folder)} is {kind}: its own log says which of its files count, and the others hold removed "
        "or repeated rows. Let Spark read it (--engine spark --source-format delta, iceberg or hudi), write it as "
        "Parquet with its library (such as polars.read_delta), or give the frame to mfdist.prepare_frame."
    )


def _partition(path: str) -> tuple[tuple[str, str], ...]:
    """Names and values of the ``name=value`` folders of a path, in order; Hive's null is empty."""
    pairs = (part.split("=", 1) for part in path.split("/")[:-1] if re.fullmatch(r"[^=]+=.*", part))
    null = "__HIVE_DEFAULT_PARTITION__"
    return tuple((unquote(name), "" if value == null else unquote(value)) for name, value in pairs)


def _identity(path: str) -> Any:
    """What two names of one local file have in common: device and inode; elsewhere the path itself."""
    if storage.is_local(path) and "::" not in path:
        try:
            status = os.stat(storage.local_path(path))
        except OSError:
            return path
        return status.st_dev, status.st_ino
    if "::" in path:
        return path
    fs, inner = storage.filesystem(path)
    return str(fs.unstrip_protocol(inner))


def _once_each(paths: list[str], say: Say) -> list[str]:
    first: dict[Any, str] = {}
    for path in paths:
        twin = first.setdefault(_identity(path), path)
        if twin != path:
            say(f"{storage.redact(path)} is the same file as {storage.redact(twin)}: it is read once")
    return [*first.values()]


def _refuse_two_forms(sources: list[Source], named: Mapping[str, bool], say: Say) -> None:
    """DataError where one name stands there twice with the same beginning, packed and unpacked, or as Parquet too.

    Beginnings of text and Parquet cannot be compared: they are read both where both were named.
    """
    forms: dict[str, Source] = {}
    for source in sources:
        folder, _, name = source.path.rpartition("/")
        twin = forms.setdefault(f"{folder}/{_ENDING.sub('', name, count=1)}", source)
        if twin is source:
            continue
        if "parquet" in (twin.packing, source.packing):
            alike = not (named[twin.path] and named[source.path])
        else:
            alike = _beginning(twin) == _beginning(source)
        if alike:
            raise DataError(
                f"{twin.shown} and {source.shown} look like the same rows in two forms, which would count twice. Name "
                "one of them."
            )
        say(f"{twin.shown} and {source.shown} have one name and are read both")


def _beginning(source: Source) -> bytes:
    with Text(source) as text:
        head = b""
        while len(head) < _COMPARED_BYTES and (more := text.read(_COMPARED_BYTES - len(head))):
            head += more
    return head


def _holds_nothing(source: Source) -> bool:
    if source.packing in ("parquet", "text", "zip") or source.bytes > _SMALL_BYTES:
        return False
    with Text(source) as text:
        return not text.read(1)


def _say_left_out(say: Say, paths: list[str], why: str) -> None:
    if paths:
        shown = ", ".join(storage.redact(path) for path in paths[:3]) + ", ..." * (len(paths) > 3)
        say(f"left out, {why}: {len(paths)} file{'s' * (len(paths) > 1)} ({shown})")
