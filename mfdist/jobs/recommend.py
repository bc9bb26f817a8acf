"""Write the best items of users that they have not rated yet, as Parquet or CSV: user_id, item_id, rank, score.

python jobs/recommend.py --run-dir runs/advanced --out recommendations.parquet
python -m mfdist.launch --nproc_per_node=4 jobs/recommend.py --run-dir runs/advanced --out best.csv
python jobs/recommend.py --run-dir runs/advanced --users users.txt --top-k 20 --include-seen --out few.parquet
python jobs/recommend.py --run-dir runs/advanced --deny sold_out.txt --min-item-ratings 20 --out better.parquet

Users of --fold-in, files of ratings that came after training, get rows solved exactly from them: new users, and known
ones with their training ratings, where a new rating of an item takes the place of the old one.

python jobs/recommend.py --run-dir runs/advanced --fold-in today.csv --users folded --out today.parquet

Rows go by user row, then rank; new users, then users unknown to training, come last in the order of their file.
What a user may get: --allow and --deny are files of item ids for everybody, or of pairs user_id,item_id for the users
named there alone; --min-item-ratings is for everybody. At the edges:

* a user of --users without a row gets the items by bias, or is left out or refused (--unknown-users), and is counted;
* a user who is left with fewer items than --top-k has fewer rows, and one who has seen them all has none;
* a --top-k beyond the catalogue gives every item that is left;
* items of a list that training did not know are counted and change nothing; a --deny without any other leaves out
  nothing, but an --allow without any is an error, as are filters that leave no item to anybody, and an empty --users.

A signal ends it with 75; finished parts are kept beside the output, and the same command goes on with the others.
"""

from __future__ import annotations

from collections.abc import Sequence

from mfdist import process, storage
from mfdist.cluster.recorded import recorded
from mfdist.cluster.world import World
from mfdist.config import parse_config
from mfdist.data.dataset import Dataset
from mfdist.errors import exit_code_of
from mfdist.log import Console
from mfdist.results.recommend import RecommendConfig, recommend
from mfdist.results.trained_on import dataset_of_run


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(RecommendConfig, argv, __doc__ or "")
    dataset = Dataset.open(config.data or dataset_of_run(config.run_dir)) if config.needs_dataset else None
    with World.open(config.device) as world:
        console = Console(world.is_main)
        found = recommend(config, world, dataset, console)
        fate = "left out" if config.unknown_users == "skip" else "given items by bias"
        unknown = f"; {found.unknown:,} unknown to training were {fate}" if found.unknown else ""
        console.info(f"{storage.redact(config.out)}: the best {config.top_k} items of {found.users:,} users{unknown}")
    return 0


def job() -> int:
    """The program: the exit code of ``main`` (see ``mfdist.errors``)."""
    return exit_code_of(recorded(main))


if __name__ == "__main__":
    process.end(job())
