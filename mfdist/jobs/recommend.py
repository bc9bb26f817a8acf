"""Write the top items of users as Parquet: user_id, item_id, rank, score.

python jobs/recommend.py --run-dir runs/advanced --out recommendations.parquet
python -m mfdist.launch --nproc_per_node=4 jobs/recommend.py --run-dir runs/advanced --exclude-seen --out best.parquet
python jobs/recommend.py --run-dir runs/advanced --users users.txt --top-k 20 --out few.parquet
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import record

from mfdist import storage
from mfdist.cluster.world import World
from mfdist.config import parse_config
from mfdist.data.dataset import Dataset
from mfdist.errors import exit_code_of
from mfdist.results.recommend import RecommendConfig, recommend
from mfdist.results.trained_on import dataset_of_run


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(RecommendConfig, argv, __doc__ or "")
    dataset = Dataset.open(config.data or dataset_of_run(config.run_dir)) if config.exclude_seen else None
    with World.open(config.device) as world:
        users = recommend(config, world, dataset)
        if world.is_main:
            print(f"{storage.redact(config.out)}: the best {config.top_k} items of {users:,} users")
    return 0


def job() -> int:
    """The program: the exit code of ``main`` (see ``mfdist.errors``)."""
    return exit_code_of(record(main))


if __name__ == "__main__":
    sys.exit(job())
