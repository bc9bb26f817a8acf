"""Tensors in the files of torch.distributed.checkpoint: written part by part, read back without executing anything.

Each tensor lies whole in one file, as ``torch.save`` writes it, and ``.metadata`` says where; ``dcp.load`` reads the
folder. It is written without DCP's own save, because that copies every tensor first and needs collectives while it
writes. Example: rank 1 of 2 writes ``__1_0.distcp``; rank 0 writes ``.metadata`` over both files once both ranks have
said what they wrote.

``.metadata`` is a pickle. It is read by an unpickler that knows the dozen classes of such a file and refuses all else;
tensors are read with ``weights_only``.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as form
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint.filesystem import _StorageInfo

from mfdist import storage
from mfdist.errors import DataError

METADATA = ".metadata"
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Place:
    """Where a tensor lies."""

    name: str
    dtype: torch.dtype
    size: tuple[int, ...]
    file: str
    offset: int
    length: int


def write(folder: str, rank: int, tensors: Tensors, files: int = 1) -> list[Place]:
    """Write ``tensors`` to this rank's files in the local ``folder``, ``files`` of them at once.

    The bytes go from the tensors to the page cache with no copy in between (of those on a GPU a file copies one at a
    time); nothing is flushed to the disk here. OSError where the disk refuses. A file that stands there is overwritten
    in place: 1.9 GB take 0.3 s where its pages are in memory, 1 to 5 s where the kernel has to find new ones (the
    most in a virtual machine). Two files are written nearly twice as fast as one, which the kernel locks for each
    writer. zip's CRC32 would take another second; the whole file has a BLAKE2b.
    """
    piles = _split(tensors, files)
    with _without_crc():
        if len(piles) == 1:
            return _write_file(folder, file_of(rank), piles[0])
        with ThreadPoolExecutor(len(piles)) as pool:
            written = [
                pool.submit(_write_file, folder, file_of(rank, number), pile) for number, pile in enumerate(piles)
            ]
        return [place for one in written for place in one.result()]


def _write_file(folder: str, file: str, tensors: Tensors) -> list[Place]:
    places = []
    path = os.path.join(folder, file)
    with open(path, "r+b" if os.path.exists(path) else "wb") as stream:
        for name, tensor in tensors.items():
            offset, exact = stream.tell(), _exact(tensor)
            torch.save(exact, stream)
            places.append(Place(name, exact.dtype, tuple(exact.shape), file, offset, stream.tell() - offset))
        stream.truncate()
    return places


def _split(tensors: Tensors, files: int) -> list[Tensors]:
    """The tensors in at most ``files`` piles of about as many bytes; at least one pile, none empty but that."""
    piles: list[Tensors] = [{} for _ in range(max(1, min(files, len(tensors))))]
    filled = [0] * len(piles)
    for name, tensor in sorted(tensors.items(), key=lambda item: -item[1].nbytes):
        least = filled.index(min(filled))
        piles[least][name] = tensor
        filled[least] += tensor.nbytes + 1
    return piles


def room_of(rank: int, tensors: Tensors, files: int) -> dict[str, int]:
    """About how many bytes each file of :func:`write` will have."""
    return {
        file_of(rank, number): sum(tensor.nbytes for tensor in pile.values())
        for number, pile in enumerate(_split(tensors, files))
    }


def file_of(rank: int, number: int = 0) -> str:
    return f"__{rank}_{number}.distcp"


def write_metadata(path: str, places: Sequence[Place]) -> None:
    """The file ``.metadata`` over all ranks' tensors."""
    described: dict[str, form.STORAGE_TYPES] = {
        place.name: form.TensorStorageMetadata(
            form.TensorProperties(dtype=place.dtype), torch.Size(place.size),
            [form.ChunkStorageMetadata(torch.Size([0] * len(place.size)), torch.Size(place.size))],
        )
        for place in places
    }  # fmt: skip
    where = {
        form.MetadataIndex(place.name, [0] * len(place.size)): _StorageInfo(place.file, place.offset, place.length)
        for place in places
    }
    about = form.Metadata(described, {place.name: (place.name,) for place in places}, where, form.StorageMeta())
    storage.write_bytes(path, pickle.dumps(about))


def sizes(folder: str) -> dict[str, tuple[int, ...]]:
    """The shape of each stored tensor."""
    return _sizes(_reader(folder))


def read(folder: str, tensors: Tensors) -> None:
    """Fill ``tensors`` in place from ``folder``; any process by itself. DataError where one is missing or unlike."""
    targets = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
    if not targets:
        return
    reader = _reader(folder)
    stored = _sizes(reader)
    for name, tensor in targets.items():
        if stored.get(name) != tuple(tensor.shape):
            raise DataError(f"{storage.redact(folder)}: {name} is {stored.get(name)} instead of {tuple(tensor.shape)}.")
    try:
        with torch.no_grad(), _alone_is_fine():
            dcp.load(targets, storage_reader=reader, no_dist=True)
    except (Exception, dcp.CheckpointException) as error:  # DCP's own is no Exception
        raise DataError(f"{storage.redact(folder)} cannot be read ({_last_line(error)}).") from None


# Writing ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _without_crc() -> Iterator[None]:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


def _exact(tensor: torch.Tensor) -> torch.Tensor:
    """The same values on the CPU, contiguous, over a storage of just these bytes: ``torch.save`` writes it all."""
    tensor = tensor.detach().cpu().contiguous()
    return torch.from_numpy(tensor.numpy()) if tensor.untyped_storage().nbytes() != tensor.nbytes else tensor


# Reading ------------------------------------------------------------------------------------------

_KNOWN: dict[tuple[str, str], Any] = {
    (kind.__module__, kind.__qualname__): kind
    for kind in (
        form.Metadata, form.TensorStorageMetadata, form.BytesStorageMetadata, form.TensorProperties,
        form.ChunkStorageMetadata, form.MetadataIndex, form.StorageMeta, form._MEM_FORMAT_ENCODING, _StorageInfo,
        torch.Size,
    )
}  # fmt: skip
_KNOWN["torch.serialization", "_get_layout"] = torch.serialization._get_layout
_KNOWN |= {("torch", name): getattr(torch, name) for name in ("float32", "float64", "bfloat16", "int32", "int64")}


class _Unpickler(pickle.Unpickler):
    """Makes what a checkpoint's metadata consists of, and calls nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")
        return _KNOWN[module, name]


class _Reader(dcp.FileSystemReader):
    """DCP's reader over metadata that was read and checked before."""

    def __init__(self, folder: str) -> None:
        super().__init__(folder)
        with storage.open_read(storage.join(folder, METADATA)) as stream:
            self.about = _metadata(stream, folder)

    def read_metadata(self, *args: Any, **kwargs: Any) -> form.Metadata:
        return self.about


class _RemoteReader(_Reader, FsspecReader):
    """The same on an object store."""


def _reader(folder: str) -> _Reader:
    return _Reader(storage.local_path(folder)) if storage.is_local(folder) else _RemoteReader(folder)


def _sizes(reader: _Reader) -> dict[str, tuple[int, ...]]:
    described = reader.about.state_dict_metadata
    return {name: tuple(getattr(one, "size", ())) for name, one in described.items()}


def _metadata(stream: IO[bytes], folder: str) -> form.Metadata:
    """DataError where the file is no metadata, or asks for more than metadata needs."""
    try:
        found = _Unpickler(stream).load()
        files = {place.relative_path for place in found.storage_data.values()}
    except Exception as error:  # a pickle from anywhere fails in any way
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{storage.redact(folder)}/{METADATA} is no checkpoint's metadata ({reason}).") from None
    if not isinstance(found, form.Metadata) or any("/" in file or not file.endswith(".distcp") for file in files):
        raise DataError(f"{storage.redact(folder)}/{METADATA} points to files outside of its folder.")
    return found


def _last_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


@contextlib.contextmanager
def _alone_is_fine() -> Iterator[None]:
    """torch warns where there is no process group, though it was told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
