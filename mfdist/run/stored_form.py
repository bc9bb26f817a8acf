"""The form of torch.distributed.checkpoint (DCP): its metadata, and its reader.

Importing DCP takes as long as importing torch, so that this module is imported by the first who reads a checkpoint, or
writes the metadata of one: a run's first step does not wait for it.
"""

from __future__ import annotations

import contextlib
import pickle
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as form
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint.filesystem import _StorageInfo

from mfdist import storage
from mfdist.errors import DataError

METADATA = ".metadata"
Described = tuple[str, torch.dtype, tuple[int, ...], str, int, int]
"""Of a stored tensor: name, dtype, shape, file, offset in it, length."""


def encoded(places: Iterable[Described]) -> bytes:
    """The content of ``.metadata`` over all ranks' tensors."""
    described: dict[str, form.STORAGE_TYPES] = {}
    where = {}
    for name, dtype, size, file, offset, length in places:
        none = [0] * len(size)
        described[name] = form.TensorStorageMetadata(
            form.TensorProperties(dtype=dtype), torch.Size(size),
            [form.ChunkStorageMetadata(torch.Size(none), torch.Size(size))],
        )  # fmt: skip
        where[form.MetadataIndex(name, none)] = _StorageInfo(file, offset, length)
    return pickle.dumps(form.Metadata(described, {name: (name,) for name in described}, where, form.StorageMeta()))


def sizes(folder: str) -> dict[str, tuple[int, ...]]:
    """The shape of each stored tensor."""
    return _sizes(_reader(folder))


def read(folder: str, targets: Mapping[str, torch.Tensor]) -> None:
    """Fill ``targets``, none of them empty, in place. DataError where one is missing or unlike."""
    reader = _reader(folder)
    stored = _sizes(reader)
    for name, tensor in targets.items():
        if stored.get(name) != tuple(tensor.shape):
            raise DataError(f"{storage.redact(folder)}: {name} is {stored.get(name)} instead of {tuple(tensor.shape)}.")
    try:
        with torch.no_grad(), _alone_is_fine():
            dcp.load(dict(targets), storage_reader=reader, no_dist=True)
    except (Exception, dcp.CheckpointException) as error:  # DCP's own is no Exception
        raise DataError(f"{storage.redact(folder)} cannot be read ({_last_line(error)}).") from None


# Inside -------------------------------------------------------------------------------------------

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
        try:
            with storage.open_read(storage.inside(folder, METADATA)) as stream:
                self.about = _metadata(stream, folder)
        except FileNotFoundError:
            raise DataError(f"{storage.redact(folder)}/{METADATA} is missing.") from None

    def read_metadata(self, *args: Any, **kwargs: Any) -> form.Metadata:
        return self.about


class _RemoteReader(_Reader, FsspecReader):
    """The same on an object store."""


def _reader(folder: str) -> _Reader:
    return _Reader(storage.local_path(folder)) if storage.is_local(folder) else _RemoteReader(folder)


def _sizes(reader: _Reader) -> dict[str, tuple[int, ...]]:
    return {name: tuple(getattr(one, "size", ())) for name, one in reader.about.state_dict_metadata.items()}


def _metadata(stream: IO[bytes], folder: str) -> form.Metadata:
    """DataError where the file is no metadata, or asks for more than metadata needs."""
    try:
        found = _Unpickler(stream).load()
        files = {str(place.relative_path) for place in found.storage_data.values()}
        for name, one in found.state_dict_metadata.items():
            str(name), tuple(getattr(one, "size", ()))
    except Exception as error:  # a pickle from anywhere fails in any way
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{storage.redact(folder)}/{METADATA} is no checkpoint's metadata ({reason}).") from None
    if not isinstance(found, form.Metadata) or any("/" in file or not file.endswith(".distcp") for file in files):
        raise DataError(f"{storage.redact(folder)}/{METADATA} points to files outside of its folder.")
    for file in files:
        storage.inside(folder, file)
    return found


def _last_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[-1]


@contextlib.contextmanager
def _alone_is_fine() -> Iterator[None]:
    """torch warns where there is no process group, though it was told so."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
