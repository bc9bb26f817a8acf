"""The flags of training and what follows from them and a dataset."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields, replace
from typing import Any

from mfdist import storage
from mfdist.config import Follows, flag, parse_pair, parse_range, read_ready
from mfdist.data.dataset import Manifest
from mfdist.errors import UsageError
from mfdist.model.models import Form, sigmoid_range
from mfdist.model.objective import Objective, six_of
from mfdist.model.optimizers import OPTIMIZERS, SCHEDULES, RowOptimizer
from mfdist.model.units import Units
from mfdist.training import ranking_flags
from mfdist.training.defaults import BATCH_SIZE, IMPLICIT, PLAIN_L2, RECIPE, settled
from mfdist.training.trackers import REMOTE, check_track


def parse_row_l2(text: str) -> tuple[float, ...]:
    """'6,4.5,5,6.5,8,35' as six numbers; two or four mean zero for the rest."""
    parts = [float(part) for part in text.split(",")]
    if len(parts) not in (2, 4, 6) or min(parts) < 0:
        raise ValueError("expected two, four or six numbers of at least 0 with commas between them")
    return (*parts, *[0.0] * (6 - len(parts)))


def parse_l2(text: str) -> tuple[float, ...]:
    """'0.02,0' as factors and biases of both sides, or six numbers as --row-l2 has them."""
    parts = [float(part) for part in text.split(",")]
    if len(parts) not in (2, 6) or min(parts) < 0:
        raise ValueError("expected two or six numbers of at least 0 with commas between them")
    return six_of(parts)


def parse_cadence(text: str) -> str:
    """'epoch', a number of steps such as '500', or minutes such as '10m'."""
    if not re.fullmatch(r"epoch|[1-9]\d*m?", text):
        raise ValueError("expected 'epoch', a number of steps such as 500, or minutes such as 10m")
    return text


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The flags of jobs/train.py; defaults are those of ``recipe.toml``, or what other flags leave of them
    (``training.defaults``)."""

    data: str | None = flag(
        None,
        "dataset directory or URL; not set: a small built-in dataset under data/builtin",
        group="data",
        basic=True,
        metavar="DIR",
    )
    run_dir: str | None = flag(
        None, "run directory or URL; not set: a new numbered folder under runs/", group="run", basic=True, metavar="DIR"
    )
    objective: str = flag(
        "explicit",
        "what is learned: ratings, or a ranking of items by what users chose, whatever the rating (it has few flags of "
        "its own: --config ranking)",
        choices=("explicit", "ranking"),
        group="model",
        basic=True,
    )
    unobserved_weight: float = flag(
        ranking_flags.OWN["unobserved_weight"],
        "--objective ranking: weight of all pairs of a user and an item together, beside that of the ratings",
        above=0,
        group="optimization",
        metavar="WEIGHT",
    )
    ranking_penalty: float = flag(
        ranking_flags.OWN["ranking_penalty"],
        "--objective ranking: penalty of a row for each of its ratings, in units of what chance alone gives a matrix "
        "of this density",
        at_least=0,
        group="optimization",
        metavar="PENALTY",
    )
    model: str = flag(RECIPE["model"], "which model", choices=("mf", "mf_advanced"), group="model", basic=True)
    emb_dim: int = flag(
        Follows(str(RECIPE["emb_dim"])),
        "factors of a user and of an item",
        at_least=1,
        group="model",
        basic=True,
        metavar="FACTORS",
    )
    optimizer: str = flag(
        RECIPE["optimizer"],
        "row optimizer; adamw is exact on untouched rows too; als (rankings alone) solves rows",
        choices=(*OPTIMIZERS, "als"),
        group="optimization",
        basic=True,
    )
    lr: float = flag(
        Follows(f"{RECIPE['lr']}, and what suits it for another --optimizer"),
        "learning rate",
        above=0,
        group="optimization",
        basic=True,
        metavar="RATE",
    )
    lr_schedule: str = flag(
        RECIPE["lr_schedule"],
        "course of the learning rate; linear and cosine reach 0 at the end",
        choices=SCHEDULES,
        group="optimization",
    )
    weight_decay: float = flag(
        RECIPE["weight_decay"],
        "decoupled weight decay: w <- w (1 - lr wd), every row, every step",
        at_least=0,
        group="optimization",
        metavar="DECAY",
    )
    l2: tuple[float, ...] = flag(
        Follows(
            "what rows of the other side leave open, by their numbers of ratings; "
            f"{PLAIN_L2[0]:g},{PLAIN_L2[1]:g} without biases"
        ),
        "FACTORS,BIASES: penalty in the loss, per rating, on its own rows; or six numbers as --row-l2 has them",
        parse=parse_l2,
        group="optimization",
        metavar="FACTORS,BIASES",
    )
    row_l2: tuple[float, ...] = flag(
        Follows(",".join(f"{value:g}" for value in RECIPE["row_l2"]) + "; 0,0 without biases"),
        "penalty of a row, shared out among its ratings: factors of users, of items [, biases of users, of items "
        "[, scales of users, of items]]; 0,0: none",
        parse=parse_row_l2,
        group="optimization",
        metavar="NUMBERS",
    )
    reduction: str = flag(
        Follows("sum, mean for another --optimizer than sgd"),
        "loss of a step: the mean of its squared errors, or "
        "half their sum (then --lr is that of one rating, and the offset takes the mean of their steps)",
        choices=("mean", "sum"),
        group="optimization",
    )
    members: int = flag(
        Follows(f"{RECIPE['members']}, one for every 16 factors; 0 with a sigmoid or without biases"),
        "groups that the factors fall into, each fitted by itself with biases inside, their mean predicts; 0: none",
        at_least=0,
        group="model",
        metavar="GROUPS",
    )
    offset: str = flag(
        RECIPE["offset"],
        "mf_advanced's offset: learned from 0 (--rating-units spread: from the mean), or the mean itself",
        choices=("learned", "mean"),
        group="model",
    )
    rating_units: str = flag(
        RECIPE["rating_units"],
        "what rates, penalties and initial values are meant in: the spread of the training "
        "ratings, from their mean, or ratings as given; predictions are as given anyway",
        choices=("spread", "given"),
        group="model",
    )
    init_std: float = flag(
        Follows(f"{RECIPE['init_std']}, 0 with --no-init"),
        "factors begin as normal(0, this / sqrt(factors of a member)), biases at 0; 0: as --no-init says",
        at_least=0,
        group="model",
        metavar="STD",
    )
    implicit: float = flag(
        Follows(f"{IMPLICIT}, less where users rate much of all items; 0 without sgd or biases"),
        "weight of what a user rated, whatever the rating: "
        "factors plus this / sqrt(n) times the sum of those of the user's n items; 0: none",
        at_least=0,
        group="model",
        metavar="WEIGHT",
    )
    betas: tuple[float, float] = flag(
        (0.9, 0.999),
        "Adam's decay rates of the two moments",
        parse=parse_pair,
        group="optimization",
        metavar="BETA1,BETA2",
    )
    eps: float = flag(1e-8, "added to the root of the second moment", at_least=1e-15, group="optimization")
    batch_size: int = flag(
        Follows(f"{BATCH_SIZE}, less where a user or an item has many of all ratings"),
        "ratings of a step, over all ranks; --objective ranking: always all",
        at_least=1,
        group="optimization",
        basic=True,
        metavar="RATINGS",
    )
    epochs: int = flag(
        RECIPE["epochs"],
        "passes over the training ratings",
        at_least=1,
        group="optimization",
        basic=True,
        metavar="EPOCHS",
    )
    max_minutes: float | None = flag(
        None,
        "stop with a checkpoint after this many minutes",
        above=0,
        group="run",
        basic=True,
        metavar="MINUTES",
        example="55",
    )
    keep: int = flag(3, "checkpoints to keep", at_least=1, group="run", metavar="NUMBER")
    keep_every: int | None = flag(
        None,
        "keep also every checkpoint whose step is a multiple of this",
        at_least=1,
        group="run",
        metavar="STEPS",
        example="10000",
    )
    seed: int = flag(42, "seed of initial values and batch order", at_least=0, group="run", basic=True)
    device: str = flag("auto", "where to compute", choices=("auto", "cpu", "cuda"), group="cluster", basic=True)
    sharding: str = flag(
        "auto",
        "tables cut by rows over the ranks, or whole on each; auto is row, the faster at every size measured",
        choices=("auto", "row", "replicated"),
        group="cluster",
    )
    wire_dtype: str = flag(
        "fp32", "number format of item rows and gradients between ranks", choices=("fp32", "bf16"), group="cluster"
    )
    interface: str | None = flag(
        None,
        "network interface, or its address, for item rows between hosts; not set: that of the rendezvous",
        group="cluster",
        metavar="NAME",
        example="eth0",
    )
    checkpoint_every: str = flag(
        "5m", "'epoch', steps (500) or minutes (10m)", parse=parse_cadence, group="run", basic=True, metavar="EVERY"
    )
    resume: str = flag("auto", "auto, never, or the path of a checkpoint", group="run", metavar="auto|never|PATH")
    track: str | None = flag(
        None,
        "send the figures, while it trains, also to MLflow or Weights & Biases; TensorBoard always has them",
        choices=REMOTE,
        group="run",
    )
    overwrite: bool = flag(False, "remove what the run directory holds and begin anew", group="run", basic=True)
    init_from: str | None = flag(None, "a finished run whose model this one begins with", group="model", metavar="RUN")
    stop_fraction: float = flag(
        0.0,
        "share of training rows held out to choose the epoch",
        at_least=0,
        at_most=0.5,
        group="data",
        metavar="SHARE",
        example="0.02",
    )
    patience: int | None = flag(
        None,
        "stop after this many epochs without progress on the stop rows",
        at_least=1,
        group="optimization",
        metavar="EPOCHS",
        example="3",
    )
    cold: str = flag(
        Follows("known-side, own without biases"),
        "rows without training: their own initial values, or the known side only",
        choices=("own", "known-side"),
        group="model",
    )
    no_sigmoid: bool = flag(
        Follows("True unless --sigmoid-range is given"), "mf_advanced without its sigmoid", group="model"
    )
    no_bias: bool = flag(False, "mf_advanced without biases and offset", group="model")
    no_init: bool = flag(
        False, "mf_advanced with normal(0, 1) initial values instead of uniform(0, 0.05)", group="model"
    )
    sigmoid_range: tuple[float, float] | None = flag(
        None,
        "mf_advanced with a sigmoid onto LOW,HIGH; not set: with no-sigmoid = false in a file, the scale widened "
        "by half a step",
        parse=parse_range,
        group="model",
        metavar="LOW,HIGH",
        example="0.5,5.5",
    )

    @classmethod
    def ready(cls, name: str, **values: Any) -> TrainConfig:
        """A ready configuration by its name, with these values of flags in place of its own."""
        return cls(**{**read_ready(cls, name), **values})

    def __post_init__(self) -> None:
        for name, value in self._settled().items():
            object.__setattr__(self, name, value)
        if self.l2:
            object.__setattr__(self, "l2", six_of(self.l2))
        check_track(self.track)
        plain = self.model == "mf"
        for name in ("no_sigmoid", "no_bias", "no_init"):
            if plain and getattr(self, name):
                raise UsageError(
                    f"--{name.replace('_', '-')} is a switch of mf_advanced; mf has nothing to switch off."
                )
        if self.sigmoid_range and (plain or self.no_sigmoid):
            raise UsageError("--sigmoid-range needs mf_advanced with its sigmoid.")
        if self.cold == "known-side" and (plain or self.no_bias):
            raise UsageError(
                "--cold known-side needs the biases of mf_advanced: there is nothing else to fall back on."
            )
        if self.patience is not None and not self.stop_fraction:
            raise UsageError("--patience watches the stop rows; give --stop-fraction too, such as 0.02.")
        if (plain or self.no_bias or not self.no_sigmoid) and (self.members or self.offset == "mean"):
            raise UsageError("--members and --offset mean need mf_advanced with biases and with --no-sigmoid.")
        if self.members and (self.emb_dim % self.members or self.emb_dim // self.members < 3):
            raise UsageError(
                f"--members {self.members} needs an --emb-dim that it divides into groups of three or more factors."
            )
        if self.implicit > 0 and (self.optimizer != "sgd" or self.weight_decay):
            raise UsageError("--implicit needs --optimizer sgd and --weight-decay 0.")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise UsageError(f"--betas {self.betas[0]:g},{self.betas[1]:g}: both must be at least 0 and below 1.")
        if self.l2 and min(self.l2) < 0:
            raise UsageError("--l2: all numbers must be at least 0.")

    def _settled(self) -> dict[str, Any]:
        """The values of all flags, those that follow from others put in."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if self.is_ranking:
            return ranking_flags.settled(values, {field.name: field for field in fields(self)})
        ranking_flags.check_absent(values)
        return settled(values)

    @property
    def resume_path(self) -> str | None:
        """The checkpoint that ``resume`` names, if it does."""
        return None if self.resume in ("auto", "never") else self.resume

    def found_from_anywhere(self) -> TrainConfig:
        """The same with what it reads named by absolute paths: the run is stored so, and goes on in another folder."""
        places = {"data": self.data, "init_from": self.init_from, "resume": self.resume_path}
        found: dict[str, Any] = {name: storage.absolute(path) for name, path in places.items() if path is not None}
        return replace(self, **found)

    def form(self, manifest: Manifest) -> Form:
        """What predictions are computed from, on this dataset."""
        advanced = self.model == "mf_advanced"
        span = self.sigmoid_range or sigmoid_range(*manifest.rating_scale, manifest.rating_step)
        return Form(
            model=self.model, dim=self.emb_dim, bias=advanced and not self.no_bias, init=advanced and not self.no_init,
            sigmoid_range=span if advanced and not self.no_sigmoid else None, members=self.members,
            init_std=self.init_std or None, implicit=self.implicit, units=self.units(manifest),
        )  # fmt: skip

    def units(self, manifest: Manifest) -> Units:
        """What ratings of this dataset are learned in."""
        if self.rating_units == "given":
            return Units()
        assert manifest.rating_spread is not None
        centred = self.model == "mf_advanced" and not self.no_bias
        return Units.of_ratings(manifest.global_mean, manifest.rating_spread, manifest.rating_skewness, centred)

    @property
    def is_ranking(self) -> bool:
        """Whether a ranking is learned, and not ratings."""
        return self.objective == "ranking"

    def penalties(self) -> Objective:
        return Objective(reduction=self.reduction, l2=self.l2, row_l2=self.row_l2 if any(self.row_l2) else None)

    def row_optimizer(self, total_steps: int) -> RowOptimizer:
        return RowOptimizer(
            kind="sgd" if self.is_ranking else self.optimizer,  # rows that are solved have no state either
            lr=self.lr, lr_schedule=self.lr_schedule, total_steps=total_steps,
            weight_decay=self.weight_decay, betas=self.betas, eps=self.eps,
        )  # fmt: skip
