"""Evaluate runs on their validation rows: one table with floors, slices and tested differences.

python jobs/evaluate.py runs/advanced
python -m mfdist.launch --nproc_per_node=4 jobs/evaluate.py runs/advanced runs/svd --html comparison.html
python jobs/evaluate.py runs/advanced --require-better runs/svd     # ends with 5 unless it is
"""

from __future__ import annotations

from collections.abc import Sequence

from mfdist import process
from mfdist.cluster.recorded import recorded
from mfdist.cluster.world import World
from mfdist.config import parse_config
from mfdist.errors import exit_code_of
from mfdist.results.evaluate import EvaluateConfig, check_required, evaluate_runs, format_table, write_result


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(EvaluateConfig, argv, __doc__ or "")
    with World.open("cpu") as world:
        result = evaluate_runs(config, world)
        if world.is_main:
            print(format_table(result))
            for path in write_result(config, result):
                print(f"written: {path}")
    check_required(config, result)
    return 0


def job() -> int:
    """The program: the exit code of ``main`` (see ``mfdist.errors``)."""
    return exit_code_of(recorded(main))


if __name__ == "__main__":
    process.end(job())
