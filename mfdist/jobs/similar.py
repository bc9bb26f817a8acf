"""Write what is most like each item (or user): item_id (or user_id), similar_id, rank, score, as Parquet or CSV.

python jobs/similar.py --run-dir runs/advanced --out similar.parquet
python jobs/similar.py --run-dir runs/advanced --ids items.txt --top-k 20 --measure inner --out few.csv
python -m mfdist.launch --nproc_per_node=4 jobs/similar.py --run-dir runs/advanced --side users --out friends.parquet

The score is the cosine of the factors, or their inner product; biases play no part. Best first, equal scores by row
number, nothing is like itself. Rows of the output go by row number, then rank. An id that training did not know is left
out and counted, or refused; where all are unknown it is an error. With more neighbours wanted than there are, each has
as many rows as there are others. A signal ends it with 75; finished parts are kept beside the output, and the same
command goes on with the others.
"""

from __future__ import annotations

from collections.abc import Sequence

from mfdist import process, storage
from mfdist.cluster.recorded import recorded
from mfdist.cluster.world import World
from mfdist.config import parse_config
from mfdist.errors import exit_code_of
from mfdist.log import Console
from mfdist.results.similar import SimilarConfig, similar


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(SimilarConfig, argv, __doc__ or "")
    with World.open(config.device) as world:
        console = Console(world.is_main)
        found = similar(config, world, console)
        unknown = f"; {found.unknown:,} unknown to training were left out" if found.unknown else ""
        console.info(f"{storage.redact(config.out)}: the {config.top_k} most similar of {found.rows:,} {config.side}"
                     f"{unknown}")  # fmt: skip
    return 0


def job() -> int:
    """The program: the exit code of ``main`` (see ``mfdist.errors``)."""
    return exit_code_of(recorded(main))


if __name__ == "__main__":
    process.end(job())
