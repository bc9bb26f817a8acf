"""What Spark carries between tasks: messages, whose bytes are columns in Arrow's stream format or a pickled fact."""

from __future__ import annotations

import pickle
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from mfdist.prepare.ids import gather_bytes
from mfdist.prepare.spill import Arrays, Ids

COLUMNS = "target int, kind int, place long, number long, data binary"
SCHEMA = pa.schema([("target", pa.int32()), ("kind", pa.int32()), ("place", pa.int64()), ("number", pa.int64()),
                     ("data", pa.binary())])  # fmt: skip
MESSAGE_ROWS = 1 << 16
"""At most so many rows, ids or numbers are in one message: two megabytes or so."""
_BATCH_BYTES = 8 << 20

ROWS, USERS, ITEMS, REJECTS, COUNTS, FACT, FAULT = range(7)
"""Kinds, in the order in which a task gets them."""


class Message(NamedTuple):
    """``data`` for the task of partition ``target``, which gets what it is sent by (kind, place, number)."""

    target: int
    kind: int
    place: int
    number: int
    data: Any


def to_batches(messages: Iterable[Message]) -> Iterator[pa.RecordBatch]:
    """Messages as Arrow batches of some megabytes, for Spark."""
    held: list[Message] = []
    size = 0
    for message in messages:
        held.append(message)
        size += len(message.data)
        if size >= _BATCH_BYTES:
            yield _batch(held)
            held, size = [], 0
    if held:
        yield _batch(held)


def _batch(messages: list[Message]) -> pa.RecordBatch:
    *columns, data = zip(*messages, strict=True)
    arrays = [pa.array(values, field.type) for values, field in zip(columns, SCHEMA, strict=False)]
    return pa.RecordBatch.from_arrays([*arrays, _binary(data)], schema=SCHEMA)


def _binary(parts: Sequence[Any]) -> pa.BinaryArray:
    """Bytes or buffers as an array; ``pyarrow.array`` never gives back a buffer that it was given."""
    edges = np.cumsum([0, *map(len, parts)]).astype(np.int32)
    return pa.BinaryArray.from_buffers(
        pa.binary(), len(parts), [None, pa.py_buffer(edges), pa.py_buffer(b"".join(parts))]
    )


def from_batches(batches: Iterable[pa.RecordBatch]) -> Iterator[Message]:
    """The messages in batches that Spark gives."""
    for batch in batches:
        target, kind, place, number = (batch.column(k).to_pylist() for k in range(4))
        data = batch.column(4)
        for i in range(batch.num_rows):
            yield Message(target[i], kind[i], place[i], number[i], data[i].as_buffer())


def packed(columns: Arrays) -> bytes:
    """Columns of one length as bytes."""
    batch = pa.record_batch([pa.array(values) for values in columns.values()], names=[*columns])
    return streamed(batch)


def unpacked(data: Any) -> Arrays:
    """What :func:`packed` was given, read-only and not aligned: to be copied before compiled code gets it."""
    batch = pa.ipc.open_stream(data).read_next_batch()
    return {name: batch.column(name).to_numpy(zero_copy_only=False) for name in batch.schema.names}


def streamed(batch: pa.RecordBatch) -> bytes:
    """A batch in Arrow's stream format."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    content: bytes = sink.getvalue().to_pybytes()
    return content


def joined(parts: list[Arrays]) -> Arrays:
    """Parts one after another, in memory of their own."""
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def row_messages(target: int, kind: int, place: int, columns: Arrays, before: int = 0) -> Iterator[Message]:
    """Columns as messages of MESSAGE_ROWS rows each, in order, numbered from ``before``."""
    size = next(iter(columns.values())).size
    for number, first in enumerate(range(0, size, MESSAGE_ROWS), before):
        part = {name: values[first : first + MESSAGE_ROWS] for name, values in columns.items()}
        yield Message(target, kind, place, number, packed(part))


def id_messages(target: int, kind: int, place: int, ids: Ids, **more: Any) -> Iterator[Message]:
    """Ids, and columns of ``more`` values for each, as messages in order."""
    for number, first in enumerate(range(0, len(ids), MESSAGE_ROWS)):
        end = min(first + MESSAGE_ROWS, len(ids))
        edges = ids.edges[first : end + 1]
        content = ids.content[edges[0] : edges[-1]]
        text = pa.LargeBinaryArray.from_buffers(
            pa.large_binary(), end - first, [None, pa.py_buffer(edges - edges[0]), pa.py_buffer(content)]
        )
        columns = {"hash": pa.array(ids.hashes[first:end]), "text": text,
                   **{name: pa.array(values[first:end]) for name, values in more.items()}}  # fmt: skip
        yield Message(target, kind, place, number, streamed(pa.record_batch(columns)))


def ids_in(data: Any) -> tuple[Ids, Arrays]:
    """The ids of one message, and their other columns."""
    batch = pa.ipc.open_stream(data).read_next_batch()
    text = batch.column("text").buffers()
    edges, content = np.frombuffer(text[1], np.int64), np.frombuffer(text[2] or b"", np.uint8)
    ids = Ids(batch.column("hash").to_numpy().copy(), edges[: batch.num_rows + 1].copy(), content.copy())
    return ids, {name: batch.column(name).to_numpy() for name in batch.schema.names if name not in ("hash", "text")}


def joined_ids(parts: list[Ids]) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.int64], npt.NDArray[np.uint8]]:
    """(hashes, lengths, content) of ids one after another."""
    return (np.concatenate([part.hashes for part in parts]), np.concatenate([np.diff(part.edges) for part in parts]),
            np.concatenate([part.content for part in parts]))  # fmt: skip


def taken(hashes: Any, length: Any, content: Any, order: npt.NDArray[np.int64]) -> Ids:
    """Ids given one after another, in another order."""
    start = np.cumsum(length) - length
    out = np.empty(int(length[order].sum()), np.uint8)
    gather_bytes(content, start[order], length[order], out)
    return Ids(hashes[order], np.concatenate([[0], np.cumsum(length[order])]).astype(np.int64), out)


def fact(value: Any, target: int = 0, place: int = 0) -> Message:
    """A small value for the driver."""
    return Message(target, FACT, place, 0, pickle.dumps(value))


def fault(error: Exception, target: int = 0, place: int = 0) -> Message:
    """An error that no repetition helps."""
    return Message(target, FAULT, place, 0, pickle.dumps(error))


def value_of(message: Message) -> Any:
    return pickle.loads(message.data)
