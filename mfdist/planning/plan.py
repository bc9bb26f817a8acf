"""What a training run will take, before anything is submitted: steps, memory, network, checkpoint, time.

Steps, tables, bytes and lanes are counted from the manifest and the vocabulary's counts. What takes time, and what a
process takes beside its tables, is measured: ``calibration`` trains for a few seconds on this machine, in as many
processes as the job has on a host. For ranks on other hosts what they send is added, at the network's given speed.

Example: 1,000 ratings in 4 lanes of 300, 300, 200, 200 rows on 3 ranks, which hold 1, 1 and 2 lanes: the largest
share is 400 rows where an even one is 333.3, so 17% of the machine waits.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass

import numpy as np

from mfdist.cluster.launch import usable_cores
from mfdist.cluster.world import World
from mfdist.config import flag
from mfdist.data.batch_blocks import AHEAD_BYTES
from mfdist.data.batch_order import lanes_of_rank
from mfdist.data.dataset import Dataset, Manifest
from mfdist.data.loader import available_bytes, ranks_here
from mfdist.data.scan import id_dtype
from mfdist.errors import UsageError
from mfdist.log import Console
from mfdist.model.alternating import STEPS
from mfdist.model.objective import ITEM, USER
from mfdist.planning import calibration
from mfdist.planning.calibration import Measured, Trial
from mfdist.prepare.lanes import row_group_rows
from mfdist.results.report import current_rss
from mfdist.training.config import TrainConfig
from mfdist.training.data_facts import fitted
from mfdist.training.memory import bytes_of_row, table_bytes, too_large

BIT_BYTES = 1 / 8  # of a request: whether its row comes early
MESSAGES = 2
"""Messages that a step waits for from each rank of another host, one after the other: late rows, and gradients."""
MESSAGE_SECONDS, HEADER_BYTES = 10e-6, 64
"""What a message takes of a processor's time, sending and taking it, beside its bytes."""
COPY_BYTES_PER_SECOND = 5e9
"""Bytes sent or taken per second of a processor's time: 190 microseconds in a step of 476 kB each way."""
PROCESS_BYTES = 400 << 20
"""What a process takes beside its modules where it is not measured: compiled kernels, buffers, vocabulary, figures."""
FLOOR_BYTES = 1 << 30
"""At its end a rank keeps its training rows, up to so many bytes, to compute what simple predictions reach."""


def parse_ranks(text: str) -> tuple[int, ...]:
    """'1,2,8' as numbers of ranks."""
    ranks = tuple(int(part) for part in text.split(","))
    if min(ranks) < 1:
        raise ValueError("expected numbers of ranks such as 1,2,8")
    return ranks


@dataclass(frozen=True, kw_only=True)
class PlanConfig(TrainConfig):
    """The flags of jobs/train.py, and for what to plan."""

    ranks: tuple[int, ...] = flag(
        (1, 2, 4, 8),
        "numbers of ranks to plan for, such as 1,2,8",
        parse=parse_ranks,
        group="what to plan for",
        basic=True,
        metavar="NUMBERS",
    )
    calibrate_seconds: float = flag(
        2.0,
        "seconds of steps to time for each number of ranks; 0: no times",
        at_least=0,
        group="what to plan for",
        basic=True,
        metavar="SECONDS",
    )
    ranks_per_host: int = flag(
        0,
        "ranks that share a host; 0: all of them, up to this machine's cores",
        at_least=0,
        group="what to plan for",
        basic=True,
        metavar="NUMBER",
    )
    threads: int = flag(
        0,
        "threads of a rank; 0: this machine's cores divided by the ranks of a host",
        at_least=0,
        group="what to plan for",
        metavar="NUMBER",
    )
    network_gbps: float = flag(
        10.0, "network of a host, gigabits per second", above=0, group="what to plan for", basic=True, metavar="GBPS"
    )
    network_latency: float = flag(
        50.0,
        "time of a message from host to host, microseconds",
        at_least=0,
        group="what to plan for",
        metavar="MICROSECONDS",
    )


@dataclass(frozen=True, kw_only=True)
class Network:
    """Seconds of a rank's step between hosts, beside its arithmetic."""

    line: float  # the host's, for what its ranks send
    copies: float  # of what a rank sends and takes
    messages: float  # travelling, sent and taken, whatever is in them

    @property
    def seconds(self) -> float:
        return self.line + self.copies + self.messages


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds of a run; ``measured`` is what they follow from."""

    start: float  # until the first step: processes, tables, ratings read
    arithmetic: float  # of a step
    network: Network  # of a step, where ranks are on several hosts
    epoch: float  # steps, settling, evaluation
    checkpoint: float  # the pause of one
    end: float  # the last checkpoint, export, report
    total: float
    measured: Measured


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One number of ranks. Figures of a rank are those of the rank that has most; None: not calibrated."""

    ranks: int
    hosts: int
    lanes: tuple[int, int]  # fewest and most of a rank
    efficiency: float  # even share of the rows over the largest share
    steps_per_epoch: int
    table_bytes: int  # weights and optimizer state of a rank
    loader_bytes: int
    step_bytes: int
    end_bytes: int  # for the report's floors
    base_bytes: int  # the process itself: interpreter, torch, compiled kernels
    wire_bytes: float  # that a rank sends in a step
    checkpoint_bytes: int
    export_bytes: int
    too_large: str = ""  # why the tables of a host's ranks would not fit on this one, and what to do
    times: Times | None = None

    @property
    def memory_bytes(self) -> int:
        return self.table_bytes + self.loader_bytes + self.step_bytes + self.end_bytes + self.base_bytes


def plan(config: PlanConfig, console: Console | None = None) -> list[Plan]:
    """A plan for each of ``config.ranks``; UsageError where a number exceeds the lanes or --data is missing."""
    if config.data is None:
        raise UsageError("--data is needed: the plan is made from a prepared dataset.")
    console = console or Console(False)
    base = current_rss() + PROCESS_BYTES
    with console.busy("counting the ratings of users and items"):
        config, dataset = fitted(config, Dataset.open(config.data), World.alone())
    lanes = len(dataset.manifest.lanes)
    if max(config.ranks) > lanes:
        raise UsageError(
            f"--ranks {max(config.ranks)}: the dataset is cut into {lanes} lanes, each of whole users, and each rank "
            f"needs one; ask for at most {lanes}, or prepare it with more --lanes."
        )
    plans = [plan_for(config, dataset, ranks, base) for ranks in config.ranks]
    if not config.calibrate_seconds or config.is_ranking or not dataset.manifest.num_ratings["train"]:
        return plans
    found = measured(config, dataset.manifest, console)
    return [
        with_times(one, config, dataset.manifest, *found[one.ranks]) if one.ranks in found else one for one in plans
    ]


def plan_for(config: PlanConfig, dataset: Dataset, ranks: int, base_bytes: int = 0) -> Plan:
    """What can be counted. ``base_bytes``: what a process takes without tables and data."""
    manifest = dataset.manifest
    form = config.form(manifest)
    shares = rows_of_ranks(manifest, ranks)
    kept = 1 - config.stop_fraction
    rows = sum(shares) * kept
    steps = math.ceil(rows / config.batch_size)
    largest = max(shares) * kept
    lanes = [len(lanes_of_rank(len(manifest.lanes), rank, ranks)) for rank in range(ranks)]
    batch = config.batch_size * largest / max(rows, 1)
    wire = 0.0
    if ranks > 1 and config.sharding != "replicated":
        unique = expected_unique(dataset.counts("items"), batch)
        wide = 2 if config.wire_dtype == "bf16" else 4
        request = request_bytes(manifest.num_items / max(unique, 1))
        wire = unique * (ranks - 1) / ranks * (request + 2 * form.width * wide)
        if config.is_ranking:  # rows for the users' half, then rows and sums for each step of the items'
            wire = unique * (ranks - 1) / ranks * form.width * 4 * (1 + 2 * (1 + STEPS))
    elif ranks > 1:
        # a ring all-reduce sends every gradient twice, but for a rank's own piece
        wire = (manifest.num_users + manifest.num_items) * form.width * 4 * 2 * (ranks - 1) / ranks
    all_rows = manifest.num_users + manifest.num_items
    return Plan(
        ranks=ranks, hosts=math.ceil(ranks / ranks_per_host(config, ranks)), lanes=(min(lanes), max(lanes)),
        efficiency=(rows / ranks / largest) if largest else 1.0, steps_per_epoch=steps,
        table_bytes=table_bytes(config, manifest, ranks),
        loader_bytes=loader_bytes(manifest, int(largest), max(lanes), ranks),
        step_bytes=_solving_bytes(manifest, form.width, batch) if config.is_ranking else (
            int(batch * 2 * form.width * 4 * 8)),
        end_bytes=min(FLOOR_BYTES, int(largest) * rating_bytes(manifest)), base_bytes=base_bytes, wire_bytes=wire,
        checkpoint_bytes=sum(
            rows * stored_bytes_of_row(config, form.stored_width(side))
            for side, rows in ((USER, manifest.num_users), (ITEM, manifest.num_items))
        ),
        export_bytes=all_rows * form.width * 4,
        too_large=too_large(config, manifest, ranks, ranks_per_host(config, ranks)),
    )  # fmt: skip


def _solving_bytes(manifest: Manifest, width: int, ratings: float) -> int:
    """Of a step that takes all of a rank's ``ratings``: them, their rows here and by side; items' rows five times."""
    return int(ratings * (rating_bytes(manifest) + 5 * 4) + 5 * manifest.num_items * width * 4)


def ranks_per_host(config: PlanConfig, ranks: int) -> int:
    return min(ranks, config.ranks_per_host or max(1, usable_cores()))


def processes_of(config: PlanConfig, ranks: int) -> int:
    """How many processes stand for ``ranks`` on this machine: those of a host, and two at least to exchange rows."""
    return min(ranks, max(2, min(ranks_per_host(config, ranks), usable_cores())))


def rows_of_ranks(manifest: Manifest, ranks: int, split: str = "train") -> list[int]:
    """Rows of each rank's lanes, of the split train or val."""
    rows = [lane.train_rows if split == "train" else lane.val_rows for lane in manifest.lanes]
    return [sum(rows[k] for k in lanes_of_rank(len(rows), rank, ranks)) for rank in range(ranks)]


def stored_bytes_of_row(config: TrainConfig, width: int) -> int:
    """Of one row in a checkpoint."""
    return 4 * (width + sum(config.row_optimizer(1).state_widths(width)) + 1)


def expected_unique(counts: np.ndarray[tuple[int], np.dtype[np.int64]], rows: float) -> float:
    """Distinct items among ``rows`` ratings drawn in proportion to ``counts``."""
    total = counts.sum()
    return float(-np.expm1(rows * np.log1p(-np.minimum(counts / total, 1 - 1e-12))).sum()) if total else 0.0


def request_bytes(gap: float) -> float:
    """Of a request on the wire, where the items asked for are ``gap`` apart: seven bits a byte, and its bit."""
    return 1 + math.exp(-128 / gap) + math.exp(-16384 / gap) + BIT_BYTES


def loader_bytes(manifest: Manifest, rows: int, lanes: int, ranks: int) -> int:
    """Of a rank: a permuted row group open and one ahead per lane, blocks of batches, and all rows where they fit."""
    row_bytes = rating_bytes(manifest)
    window = min(rows, 2 * lanes * row_group_rows(len(manifest.lanes))) * row_bytes
    whole = rows * row_bytes
    resident = whole if whole <= available_bytes() // ranks_here(ranks) // 4 else 0
    return window + resident + min(whole, AHEAD_BYTES)


def rating_bytes(manifest: Manifest) -> int:
    """Of a rating in memory."""
    ids = (np.dtype(id_dtype(count)) for count in (manifest.num_users, manifest.num_items))
    return 4 + sum(int(kind.itemsize) for kind in ids)


# Times --------------------------------------------------------------------------------------------


def measured(config: PlanConfig, manifest: Manifest, console: Console) -> dict[int, tuple[Measured, int]]:
    """For each number of ranks whose tables fit here: what was measured, and the bytes of a process by itself."""
    train = TrainConfig(**{field.name: getattr(config, field.name) for field in dataclasses.fields(TrainConfig)})
    width = config.form(manifest).stored_width(USER)  # the wider ones
    trials = []
    for ranks in sorted(set(config.ranks)):
        trial = Trial(ranks=ranks, processes=processes_of(config, ranks), lanes=None, seconds=config.calibrate_seconds)
        fit = calibration.lanes_that_fit(config, manifest, trial, bytes_of_row(config, width), available_bytes() // 2)
        if fit is not None:
            whole = fit == calibration.lanes_of_process(manifest, trial)
            trials.append(trial if whole else dataclasses.replace(trial, lanes=fit))
    found = {}
    with console.progress("trying it on this machine", len(trials), unit="trials") as progress:
        for processes, group in itertools.groupby(trials, lambda trial: trial.processes):
            threads = config.threads or max(1, usable_cores() // processes)
            answers = calibration.measure(train, list(group), threads)
            base = process_bytes(config, manifest, answers[0])
            found.update({answer.trial.ranks: (answer, base) for answer in answers})
            progress.advance(len(answers))
    return found


def process_bytes(config: PlanConfig, manifest: Manifest, first: Measured) -> int:
    """What a process takes beside tables and ratings, by the first trial of its launch, whose tables are largest."""
    share = calibration.share_of(manifest, first.trial)
    size = first.trial.processes
    lanes = math.ceil(len(share.lanes) / size)
    known = table_bytes(config, share, size) + loader_bytes(share, first.largest_rows, lanes, size)
    return max(0, first.peak_bytes - known)


def with_times(one: Plan, config: PlanConfig, manifest: Manifest, found: Measured, base_bytes: int) -> Plan:
    """``one`` with what follows from a measurement."""
    steps, epochs = one.steps_per_epoch, config.epochs
    largest = max(rows_of_ranks(manifest, one.ranks))
    step = (
        found.step_seconds * largest / max(found.largest_rows, 1) if found.trial.lanes is None else found.step_seconds
    )
    network = between_hosts(one, config)
    share = calibration.share_of(manifest, found.trial)
    settle = found.settle_seconds * table_bytes(config, manifest, one.ranks) / max(
        table_bytes(config, share, found.trial.processes), 1
    )  # fmt: skip
    validation = max(rows_of_ranks(manifest, one.ranks, "val")) * found.trial.processes / max(found.validation_rows, 1)
    epoch = steps * (step + network.seconds) + settle + found.evaluate_seconds * validation
    stored = one.checkpoint_bytes * found.trial.processes / one.ranks / max(found.stored_bytes, 1)
    exported = one.export_bytes / max(found.stored_bytes, 1)
    end = stored * found.store_seconds + exported * found.store_seconds + found.floors_seconds
    start = found.start_seconds + found.read_seconds
    pause = stored * found.pause_seconds
    total = start + epochs * epoch + end + pause * checkpoints(config, steps, epochs * epoch)
    times = Times(
        start=start, arithmetic=step, network=network, epoch=epoch, checkpoint=pause, end=end, total=total,
        measured=found,
    )  # fmt: skip
    return dataclasses.replace(one, base_bytes=base_bytes, times=times)


def between_hosts(one: Plan, config: PlanConfig) -> Network:
    """What a step takes for the network, beside what was measured between processes of one host; nothing of it is
    taken to be hidden behind arithmetic.

    The host's line has to carry what its ranks send; each rank copies its own bytes out and others' in, and waits for
    each kind of message as long as one travels."""
    if one.hosts == 1:
        return Network(line=0.0, copies=0.0, messages=0.0)
    here = ranks_per_host(config, one.ranks)
    peers = one.ranks - here
    leaving = one.wire_bytes * peers / (one.ranks - 1) + MESSAGES * HEADER_BYTES * peers
    return Network(
        line=here * leaving * 8 / (config.network_gbps * 1e9),
        copies=2 * leaving / COPY_BYTES_PER_SECOND,
        messages=MESSAGES * (peers * MESSAGE_SECONDS + config.network_latency * 1e-6),
    )


def batch_that_hides(one: Plan, config: PlanConfig) -> int | None:
    """The batch size from which messages take less than a tenth of a step's arithmetic; None where none travel.

    Bytes are no part of this: they grow with the batch as arithmetic does."""
    if one.times is None or not one.times.network.messages:
        return None
    return math.ceil(config.batch_size * 10 * one.times.network.messages / max(one.times.arithmetic, 1e-9))


def checkpoints(config: PlanConfig, steps: int, seconds: float) -> int:
    """How many are written before the last one."""
    cadence = config.checkpoint_every
    if cadence == "epoch":
        return config.epochs - 1
    return int(seconds / 60) // int(cadence[:-1]) if cadence.endswith("m") else steps * config.epochs // int(cadence)
