"""Score files of pairs: the same pairs with prediction, known_user and known_item beside, as Parquet or CSV.

python jobs/predict.py pairs.csv --run-dir runs/advanced --out predicted.parquet
python jobs/predict.py pairs/ --run-dir runs/advanced --columns user,item --out predicted.csv
python -m mfdist.launch --nproc_per_node=4 jobs/predict.py held_out.parquet --run-dir runs/advanced --out scored.parquet

python jobs/predict.py pairs.csv --run-dir runs/advanced --fold-in today.csv --out scored.parquet

Rows keep their order. Of an id that training did not know the known side decides (a model without biases gives the
training mean), and the flags say so. Users of --fold-in, files of ratings that came after training, get rows solved
exactly from them: new users, and known ones with their training ratings, where a new rating of an item takes the place
of the old one; they count as known. Where ratings stand beside the pairs, RMSE and MAE are printed. A signal ends it
with 75; finished parts are kept beside the output, and the same command goes on with the others.
"""

from __future__ import annotations

from collections.abc import Sequence

from mfdist import process, storage
from mfdist.cluster.recorded import recorded
from mfdist.cluster.world import World
from mfdist.config import parse_config
from mfdist.errors import exit_code_of
from mfdist.log import Console
from mfdist.results.predict import PredictConfig, predict


def main(argv: Sequence[str] | None = None) -> int:
    config = parse_config(PredictConfig, argv, __doc__ or "")
    with World.open("cpu") as world:
        console = Console(world.is_main)
        found = predict(config, world, console)
        errors = "" if found.rmse is None else f"; RMSE {found.rmse:.4f}, MAE {found.mae:.4f} (not clipped)"
        unknown = f"{found.unknown_user:,} of unknown users, {found.unknown_item:,} of unknown items"
        console.info(f"{storage.redact(config.out)}: {found.rows:,} predictions, {unknown}{errors}")
    return 0


def job() -> int:
    """The program: the exit code of ``main`` (see ``mfdist.errors``)."""
    return exit_code_of(recorded(main))


if __name__ == "__main__":
    process.end(job())
