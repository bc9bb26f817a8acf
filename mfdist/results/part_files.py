"""One output made of parts, each of which appears whole: what is finished is kept when a job stops and runs again.

    OUT.parts/request.json        what is being made; parts of another request are removed
    OUT.parts/part-00007.parquet  a finished part (.csv: its lines, without the header)
    OUT.parts/note-00007.json     what a job wants to know of it later
    OUT                           the parts in the order of their numbers; then OUT.parts goes

Parts are the same on any number of ranks, so their sequence is, too. OUT is a file by its ending, .parquet or .csv, or,
without one, a folder that the Parquet parts are moved to.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq

from mfdist import storage
from mfdist.cluster.world import World
from mfdist.errors import StopRequested, UsageError
from mfdist.run.stopping import StopWatch

Write = Callable[[pa.Table], Any]
_PART = re.compile(r"part-(\d+)\.(?:parquet|csv)")
_NOTE = re.compile(r"note-\d+\.json")
_PLAIN, _QUOTED = (pacsv.WriteOptions(include_header=False, quoting_style=style) for style in ("none", "needed"))


def ending_of(out: str) -> str:
    """'.parquet', '.csv', or '' for a folder; UsageError for another ending."""
    ending = os.path.splitext(storage.name_of(out))[1].lower()
    if ending not in ("", ".parquet", ".csv"):
        raise UsageError(f"--out {storage.redact(out)}: write to a name that ends in .parquet or .csv, or to a folder "
                         f"(a name without an ending), not to one in {ending}.")  # fmt: skip
    return ending


class Parts:
    """The parts of ``out``. Every rank makes one; methods named so are collective."""

    def __init__(
        self, out: str, schema: pa.Schema, request: Mapping[str, Any], world: World, *, ending: str | None = None
    ) -> None:
        """``request``: everything that the bytes of the parts depend on; JSON values. ``ending``: of ``out`` where its
        name does not say it. Collective."""
        self.out, self.schema, self._world = out.rstrip("/"), schema, world
        self._ending, self._folder = ending_of(out) if ending is None else ending, f"{self.out}.parts"
        done: list[int] = []
        if world.is_main:
            done = self._finished(json.dumps({**request, "columns": str(schema)}, sort_keys=True))
        self.finished: frozenset[int] = frozenset(world.broadcast(done))

    @contextlib.contextmanager
    def writing(self, number: int) -> Iterator[Write]:
        """A function that adds a table to a part; the part exists once the block ends without an error."""
        with storage.open_write(self._part(number)) as stream:
            if self._ending == ".csv":
                yield lambda table: stream.write(_lines(table.cast(self.schema)))
            else:
                with pq.ParquetWriter(stream, self.schema, compression="zstd") as writer:
                    yield writer.write_table

    def make(self, mine: Sequence[int], make: Callable[[int, Write, StopWatch], None]) -> None:
        """Make the parts of this rank that are not finished; StopRequested on every rank where one should stop.

        ``make(number, write, watch)`` writes a part; it may raise :class:`Interrupted` between two tables. Collective.
        """
        with stoppable(self._world, self.out) as watch:
            for number in mine:
                check(watch)
                if number not in self.finished:
                    with self.writing(number) as write:
                        make(number, write, watch)

    def note_of(self, number: int) -> str:
        """The path of what a part says beside its rows; written before the part ends, so there when that is."""
        return storage.join(self._folder, f"note-{number:05d}.json")

    def join(self, count: int) -> None:
        """Make ``out`` of parts 0 to ``count``, and remove what they were kept in; StopRequested as in ``make``.

        Collective.
        """
        self._world.barrier()
        with stoppable(self._world, self.out) as watch:
            if self._world.is_main:
                if self._ending:
                    self._join_file(count, watch)
                else:
                    self._move_parts(count)
        self.remove()

    def remove(self) -> None:
        """Remove the parts and what is beside them. Collective."""
        if self._world.is_main:
            storage.remove(self._folder)
        self._world.barrier()

    def tables(self, count: int) -> Iterator[pa.Table]:
        """The row groups of Parquet parts 0 to ``count``, in order."""
        for number in range(count):
            fs, inner = storage.arrow_filesystem(self._part(number))
            with pq.ParquetFile(inner, filesystem=fs) as file:
                for group in range(file.metadata.num_row_groups):
                    yield file.read_row_group(group)

    def _finished(self, request: str) -> list[int]:
        path = storage.join(self._folder, "request.json")
        names = storage.list_names(self._folder)
        if "request.json" not in names or storage.read_text(path) != request:
            storage.remove(self._folder)
            storage.write_text(path, request)
            names = ["request.json"]
        parts = [name for name in names if _PART.fullmatch(name)]
        for name in names:
            if name != "request.json" and name not in parts and not _NOTE.fullmatch(name):  # a part that was cut off
                storage.remove(storage.join(self._folder, name))
        return [int(match[1]) for name in parts if (match := _PART.fullmatch(name))]

    def _part(self, number: int) -> str:
        return storage.join(self._folder, f"part-{number:05d}{self._ending or '.parquet'}")

    def _join_file(self, count: int, watch: StopWatch) -> None:
        joined = storage.join(self._folder, "joined") if storage.is_local(self.out) else self.out
        with storage.open_write(joined) as stream:
            if self._ending == ".csv":
                stream.write((",".join(self.schema.names) + "\n").encode())
                for number in range(count):
                    with storage.open_read(self._part(number)) as part:
                        while content := part.read(1 << 22):
                            stream.write(content)
                            check(watch)
            else:
                with pq.ParquetWriter(stream, self.schema, compression="zstd") as writer:
                    for table in self.tables(count):
                        writer.write_table(table)
                        check(watch)
        if joined != self.out:
            storage.move(joined, self.out)

    def _move_parts(self, count: int) -> None:
        storage.make_dirs(self.out)
        for name in storage.list_names(self.out):
            if (match := _PART.fullmatch(name)) and int(match[1]) >= count:
                storage.remove(storage.join(self.out, name))
        for number in range(count):
            if storage.exists(self._part(number)):  # else it was moved before a kill
                storage.move(self._part(number), storage.join(self.out, storage.name_of(self._part(number))))


def _lines(table: pa.Table) -> Any:
    """CSV lines; texts in quotes where one of the table needs it."""
    for options in (_PLAIN, _QUOTED):
        buffer = pa.BufferOutputStream()
        try:
            pacsv.write_csv(table, buffer, options)
            break
        except pa.ArrowInvalid:
            if options is _QUOTED:
                raise
    return buffer.getvalue()


def checksum_of(rows: npt.NDArray[np.int64]) -> str:
    """What tells one choice of rows from another in a request."""
    return hashlib.blake2b(np.ascontiguousarray(rows).tobytes(), digest_size=16).hexdigest()


class Interrupted(Exception):
    """A part was left unfinished because the job should stop."""


@contextlib.contextmanager
def stoppable(world: World, out: str) -> Iterator[StopWatch]:
    """Work that a signal ends: inside, ``check`` may raise :class:`Interrupted`; collective at its end.

    StopRequested on every rank where one should stop.
    """
    with StopWatch(None, None) as watch:
        with contextlib.suppress(Interrupted):
            yield watch
        reason = next((found for found in world.gather(watch.reason()) if found), None)
    if reason:
        raise StopRequested(f"{reason}; what is finished is kept beside {storage.redact(out)}, run the same command "
                            "again to go on.")  # fmt: skip


def check(watch: StopWatch) -> None:
    """Interrupted where the job should stop; between two tables of a part."""
    if watch.reason():
        raise Interrupted
