"""Say what a training run will take, for any number of ranks, before it is submitted. Takes no device.

python jobs/plan.py --data data/electronics
python jobs/plan.py --data data/electronics --config vignette_mf --ranks 1,8,64
"""

from __future__ import annotations

from collections.abc import Sequence

from mfdist import process
from mfdist.config import parse_config
from mfdist.errors import exit_code_of
from mfdist.log import Console
from mfdist.planning.plan import PlanConfig, plan
from mfdist.planning.plan_table import format_plans


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(PlanConfig, argv, __doc__ or "")
    print(format_plans(plan(config, Console(aside=True)), config))
    return 0


def job() -> int:
    """The program: the exit code of ``main`` (see ``mfdist.errors``)."""
    return exit_code_of(main)


if __name__ == "__main__":
    process.end(job())
