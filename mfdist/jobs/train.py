"""Train a matrix factorization model on a prepared dataset.

    python -m mfdist.launch --nproc_per_node=4 jobs/train.py --data data/electronics --run-dir runs/advanced
    python jobs/train.py --data data/electronics --run-dir runs/mf --config vignette_mf

The same command continues a run that was stopped. Without --data a small built-in dataset is made and used.
"""

from __future__ import annotations

from collections.abc import Sequence

from mfdist import process
from mfdist.cluster.recorded import recorded
from mfdist.cluster.world import World
from mfdist.config import parse_config
from mfdist.errors import exit_code_of
from mfdist.training.config import TrainConfig
from mfdist.training.train import train


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(TrainConfig, argv, __doc__ or "")
    with World.open(config.device) as world:
        train(config, world)
    return 0


def job() -> int:
    """The program: the exit code of ``main`` (see ``mfdist.errors``)."""
    return exit_code_of(recorded(main))


if __name__ == "__main__":
    process.end(job())
