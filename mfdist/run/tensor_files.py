"""Tensors in the files of torch.distributed.checkpoint: written part by part, read back without executing anything.

Each tensor lies whole in one file, as ``torch.save`` writes it, and ``.metadata`` says where; ``dcp.load`` reads the
folder. It is written without DCP's own save, because that copies every tensor first and needs collectives while it
writes. Example: rank 1 of 2 writes ``__1_0.distcp``; rank 0 writes ``.metadata`` over both files once both ranks have
said what they wrote.

``.metadata`` is a pickle. It is read by an unpickler that knows the dozen classes of such a file and refuses all else
(``stored_form``); tensors are read with ``weights_only``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch

from mfdist import storage

METADATA = ".metadata"
Tensors = dict[str, torch.Tensor]


class Place(NamedTuple):
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
    from mfdist.run import stored_form

    storage.write_bytes(path, stored_form.encoded(places))


def sizes(folder: str) -> dict[str, tuple[int, ...]]:
    """The shape of each stored tensor."""
    from mfdist.run import stored_form

    return stored_form.sizes(folder)


def read(folder: str, tensors: Tensors) -> None:
    """Fill ``tensors`` in place from ``folder``; any process by itself. DataError where one is missing or unlike."""
    targets = {name: tensor for name, tensor in tensors.items() if tensor.numel()}
    if targets:
        from mfdist.run import stored_form

        stored_form.read(folder, targets)


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
