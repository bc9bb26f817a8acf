"""Write a model's vectors for other systems: an index for faiss or hnswlib, Parquet, or safetensors.

python jobs/export.py --run-dir runs/advanced --format parquet --out vectors
python jobs/export.py --run-dir runs/advanced --format faiss --out index

The inner product of a user's and an item's vector orders the items as the model does: the bias of an item is one more
dimension. faiss gets an IndexFlatIP of the items, hnswlib a graph of them in its space "ip", labels being rows of the
file; Parquet and safetensors hold users, too. A side that is larger than --max-shard is cut into several files, which
vectors.json lists with their first rows. The library of an index is an extra: pip install 'mfdist[faiss]'.
"""

from __future__ import annotations

from collections.abc import Sequence

from mfdist import process, storage
from mfdist.config import parse_config
from mfdist.errors import exit_code_of
from mfdist.log import Console
from mfdist.results.vector_files import ExportConfig, export_vectors


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(ExportConfig, argv, __doc__ or "")
    files = export_vectors(config, Console())
    print(f"{storage.redact(config.out)}: {', '.join(files[:6])}{' ...' if len(files) > 6 else ''}")
    return 0


def job() -> int:
    """The program: the exit code of ``main`` (see ``mfdist.errors``)."""
    return exit_code_of(main)


if __name__ == "__main__":
    process.end(job())
