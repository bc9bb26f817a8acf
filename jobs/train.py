#!/usr/bin/env python
"""Train a matrix factorization model on a prepared dataset.

    python -m mfdist.launch --nproc_per_node=4 jobs/train.py --data data/electronics --run runs/advanced
    python jobs/train.py --data data/electronics --run runs/mf --config jobs/configs/vignette_mf.toml

The same command continues a run that was stopped. Without --data a small built-in dataset is made and used.
"""

import sys
from collections.abc import Sequence

from torch.distributed.elastic.multiprocessing.errors import record

from mfdist.config import parse_config
from mfdist.distributed import World
from mfdist.errors import exit_code_of
from mfdist.train import train
from mfdist.train_config import TrainConfig


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(TrainConfig, argv, __doc__)
    with World.open(config.device) as world:
        train(config, world)
    return 0


@record
def job() -> int:
    return exit_code_of(main)


if __name__ == "__main__":
    sys.exit(job())
