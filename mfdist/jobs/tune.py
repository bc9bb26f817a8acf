"""Search for settings of training, on inner splits of the training rows: no validation row is read.

python jobs/tune.py --data data/electronics --run-dir searches/electronics
python jobs/tune.py --data data/electronics --run-dir searches/rates --minutes 20 --search lr=0.005:0.1 epochs
python jobs/tune.py --data data/electronics --run-dir searches/ranking --training ranking

A trial trains on each inner split; its error is the mean over them. The first trial is what the search begins with. One
that is worse than half of the others at the same point is ended early. In --run-dir are best.toml for train --config,
tune.html to look at, tune.json for programs, and the trials, so that the same command goes on after a stop or a kill
and finds what it would have found without one; more --trials go on with a search that is done.
Needs Optuna: pip install 'mfdist[tune]'.
"""

from __future__ import annotations

from collections.abc import Sequence

from mfdist import process
from mfdist.cluster.world import World
from mfdist.config import parse_config
from mfdist.errors import exit_code_of
from mfdist.log import Console
from mfdist.tuning.config import TuneConfig
from mfdist.tuning.search import tune


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(TuneConfig, argv, __doc__ or "")
    with World.open(config.device) as world:
        tune(config, world, Console(world.is_main))
    return 0


def job() -> int:
    """The program: the exit code of ``main`` (see ``mfdist.errors``)."""
    return exit_code_of(main)


if __name__ == "__main__":
    process.end(job())
