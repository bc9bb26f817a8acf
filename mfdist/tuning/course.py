"""One training on an inner split, as short as it can be: no checkpoint, no export, no report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from mfdist.cluster.world import World
from mfdist.data.dataset import Dataset
from mfdist.data.loader import Loader
from mfdist.log import Console
from mfdist.results.ranking_metrics import FIGURES, HEADLINE
from mfdist.training.config import TrainConfig
from mfdist.training.memory import check_memory
from mfdist.training.session import Session, build, initialise
from mfdist.training.train import batches_of, collector_at_ease, train_step

POINTS = 10
"""The error is looked at so many times in a training, evenly, or at every epoch where these are fewer."""


@dataclass(frozen=True)
class Measure:
    """What a search makes small: ``sign`` times the figure that people know by ``label``."""

    label: str
    sign: float

    def figure(self, value: float) -> float:
        """What people see of a value."""
        return self.sign * value


RMSE = Measure("RMSE", 1.0)
NDCG = Measure(FIGURES[HEADLINE], -1.0)


def measure_of(config: TrainConfig) -> Measure:
    return NDCG if config.is_ranking else RMSE


def course(
    config: TrainConfig, dataset: Dataset, world: World, advance: Callable[[int], None]
) -> Iterator[tuple[int, float]]:
    """(tenths of the training that are done, the measure's value on the held-out rows), the last with all ten.

    ``config`` is one that has what follows from the data. Ends behind a value that is not finite. ``advance`` is told
    about ratings as they are learned from; what it raises ends the training.
    """
    check_memory(config, dataset.manifest, world)
    loader = Loader(
        dataset, batch_size=config.batch_size, seed=config.seed, rank=world.rank, world_size=world.size,
        device=world.device, reduce=world.sum,
    )  # fmt: skip
    config = replace(config, data=dataset.path, run_dir=dataset.path)  # nothing is written there
    with loader, collector_at_ease():
        session = build(config, dataset, world, Console(False), loader)
        try:
            initialise(session)
            for epoch in range(config.epochs):
                for batch in batches_of(session, epoch):
                    train_step(session, batch)
                    advance(batch.global_rows)
                session.progress.epoch, session.progress.step_in_epoch = epoch + 1, 0
                done = POINTS * (epoch + 1) // config.epochs
                if done > POINTS * epoch // config.epochs:
                    value = _value(session)
                    yield done, value
                    if not math.isfinite(value):
                        return
        finally:
            session.saver.close()
            if session.fused:
                session.fused.close()


def _value(session: Session) -> float:
    (session.fused or session.model).settle()
    if session.config.is_ranking:
        return NDCG.sign * float(session.validation.ranking(session.model)[HEADLINE] or 0.0)
    found = session.validation.errors(session.model).summary()["headline"]["val_rmse_clipped"]
    return math.inf if found is None or not math.isfinite(found) else float(found)
