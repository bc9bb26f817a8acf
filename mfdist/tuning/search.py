"""The search: trials one after the other, each on every inner split, poor ones ended early, all of it kept.

What a trial tries depends on the trials that are finished and on the seed alone, and a trial's errors on its settings:
a search that was killed and is run again tries what the undisturbed one would have tried. What an earlier trial of the
same settings has behind it, finished or not, is not trained again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import torch

from mfdist import compilation, json_tables, storage
from mfdist.cluster.world import World
from mfdist.data.dataset import Dataset
from mfdist.errors import DataError, DivergedError, StopRequested, UsageError
from mfdist.log import Console, Progress
from mfdist.run.lease import LEASE, Lease
from mfdist.run.stopping import StopWatch
from mfdist.training.config import TrainConfig
from mfdist.training.data_facts import fitted
from mfdist.training.memory import check_memory
from mfdist.tuning.config import TuneConfig
from mfdist.tuning.course import POINTS, course, measure_of
from mfdist.tuning.inner_splits import inner_splits
from mfdist.tuning.output import write_results
from mfdist.tuning.results import BEST, PAGE, RESULT, Results, Trial, last_words, trial_line
from mfdist.tuning.space import Parameter, settings_of, space_of, start_of

ABOUT, TRIALS, SPLITS = "search.json", "trials.jsonl", "splits"
OWN = (TRIALS, SPLITS, BEST, PAGE, RESULT, ABOUT)
"""What the directory of a search holds; --overwrite removes these names and nothing else, what says so last."""
STUDY = "mfdist"
LEAST_OTHERS = 4
"""Trials to compare with before one is ended early."""
WARM_UP = 3
"""Tenths of the first split that every trial has."""
LOOK_SECONDS = 0.3
OUT_OF_MEMORY = "the device has too little memory for it"
SHARE_OF_OTHERS = 0.1
"""Of a device's memory: where other programs hold more, a trial that does not fit says nothing of its settings."""
RANDOM_TRIALS = 8
"""Trials before the search goes by what it has found."""


Curve = list[tuple[int, float]]
"""(tenths of a training, the measure's value there)."""


class _Halt(Exception):
    """The search should end here: why."""

    def __init__(self, reason: str, is_budget: bool) -> None:
        super().__init__(reason)
        self.is_budget = is_budget


def tune(config: TuneConfig, world: World, console: Console) -> Results:
    """Run or continue a search; it holds ``--run-dir`` meanwhile.

    StopRequested (75) where it was stopped, or --minutes were over before any trial had ended, with trials kept;
    DivergedError (4) where no trial gave a number; LeaseLost where another job has taken the directory; UsageError,
    DataError.
    """
    if world.size > 1:
        raise UsageError("tune runs in one process, on all its threads; start it without torchrun.")
    dataset = Dataset.open(config.data)
    if not dataset.manifest.num_ratings["train"]:
        raise DataError(f"{storage.redact(dataset.path)} has no training ratings.")
    dataset.check_vocabularies()
    with Lease(config.run_dir, console.info) as lease, StopWatch(config.run_dir, None) as watch:
        _open_directory(config, dataset)
        try:
            search = Search(config, dataset, world, console, watch, lease)
        except _Halt as halt:
            watch.clear_stop_file()
            again = _without_overwrite(config)
            raise StopRequested(f"{halt}; run the same command again{again} to go on.") from None
        try:
            search.run()
        except _Halt as halt:
            search.tell(halt)
        finally:
            watch.clear_stop_file()
        return search.finish()


class Search:
    """A search at work. Its trials are those of Optuna's study in RUN/trials.jsonl."""

    def __init__(
        self, config: TuneConfig, dataset: Dataset, world: World, console: Console, watch: StopWatch, lease: Lease
    ) -> None:
        """_Halt where something ends the search while its inner splits are made."""
        self._config, self._dataset, self._world, self._console = config, dataset, world, console
        self._watch, self._lease, self._began = watch, lease, time.monotonic()
        given = {**config.beginning(), "seed": config.seed}
        folder = storage.join(config.run_dir, SPLITS)
        self._splits = inner_splits(dataset, folder, config.splits, config.seed, console, self._look_and_check)
        beginning = self._fit(0, TrainConfig(**given))
        self._given, self.measure = given, measure_of(beginning)
        self.parameters = space_of(config.search, beginning)
        if not self.parameters:
            raise UsageError("there is nothing to search: all settings that would be are 0; name some with --search.")
        self._start = start_of(self.parameters, beginning)
        self._study = _study(storage.join(config.run_dir, TRIALS), lease.check)
        self._per_trial = beginning.epochs * sum(split.manifest.num_ratings["train"] for split in self._splits)

    def run(self) -> None:
        """Trials up to --trials; _Halt where something ends the search before."""
        self._announce()
        while len(done := self._finished()) < self._config.trials:
            self._look()
            trial = self._ask(len(done))
            self._try(trial, len(done) + 1)
            results = self.results()
            write_results(self._config.run_dir, self._config.data, results)
            self._console.info(trial_line(results, results.trials[-1], self._config.trials))

    def tell(self, halt: _Halt) -> None:
        """Say why the search ends early; StopRequested unless that was --minutes and there is something to show."""
        results = self.results()
        again = f"run the same command again{_without_overwrite(self._config)} to go on"
        kept = f"{len(results.trials)} of {self._config.trials} trials are kept, {again}."
        if not halt.is_budget or results.best is None:
            raise StopRequested(f"{halt}; {kept}")
        self._console.info(f"{halt}; {kept}")

    def finish(self) -> Results:
        """The result, on the console and in files."""
        results = self.results()
        if results.best is None:
            if all("NaN" in trial.why for trial in results.trials):
                raise DivergedError("the loss of every trial became NaN or infinite; search a lower lr.")
            raise UsageError(f"no trial could be trained to its end; the last one: {results.trials[-1].why}")
        write_results(self._config.run_dir, self._config.data, results)
        for line in last_words(results, self._config.data, self._config.run_dir):
            self._console.info(line)
        return results

    def results(self) -> Results:
        """Of the trials that are finished so far."""
        found = [_plain(trial, number, self.parameters) for number, trial in enumerate(self._finished(), 1)]
        best = min((t for t in found if t.error is not None), key=lambda t: t.error or 0.0, default=None)
        settings = self._settings(best.values, self._dataset) if best else {}
        started = found[0] if found and self._start is not None and found[0].values == self._start else None
        return Results(
            dataset=self._dataset.manifest.name, measure=self.measure, parameters=self.parameters, trials=tuple(found),
            best=best, start=started, settings=settings, split_kind=str(self._splits[0].manifest.split["kind"]),
            splits=tuple(split.manifest.num_ratings for split in self._splits),
        )  # fmt: skip

    # One trial ----------------------------------------------------------------------------------------

    def _ask(self, done: int) -> Any:
        """The next trial; what it tries is a function of the finished ones and the seed."""
        import optuna

        study = self._study
        for trial in self._trials("RUNNING"):  # a kill has ended it, or a stop
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        if not done and not self._trials("WAITING") and self._start is not None:
            study.enqueue_trial(self._start)
        study.sampler = optuna.samplers.TPESampler(seed=self._config.seed + done, n_startup_trials=RANDOM_TRIALS)
        trial = study.ask()
        for parameter in self.parameters:
            parameter.suggest(trial)
        curves = [t.user_attrs["curves"] for t in self._trials("FAIL", "COMPLETE")
                  if t.params == trial.params and "curves" in t.user_attrs]  # fmt: skip
        if curves:
            trial.set_user_attr("curves", max(curves, key=len))
        return trial

    def _try(self, trial: Any, number: int) -> None:
        """Train the trial on the splits, one after the other, and tell the study what came of it.

        UsageError where this machine has no room for any trial now: that says nothing of the settings.
        """
        from optuna.trial import TrialState

        began, compiled = time.monotonic(), compilation.seconds()
        values = {one.name: one.suggest(trial) for one in self.parameters}
        curves: list[Curve] = []
        known: list[Curve] = trial.user_attrs.get("curves", [])
        why = ""
        with self._console.progress(f"trial {number}/{self._config.trials}", self._per_trial) as progress:
            for place in range(len(self._splits)):
                points: Curve = []
                again = known[place] if place < len(known) else []
                try:
                    with contextlib.closing(self._points(values, place, again, progress)) as seen:
                        for done, value in seen:
                            points.append((done, value))
                            if why := self._judge(trial, curves, done, value):
                                break
                except UsageError as error:
                    why = str(error)
                    self._refuse_full_machine(place)
                except torch.OutOfMemoryError:
                    why = OUT_OF_MEMORY
                if why == OUT_OF_MEMORY:  # here no traceback holds the trial's tables any more
                    torch.cuda.empty_cache()
                    _refuse_full_device(self._world.device)
                if why:
                    break
                curves.append(points)
                trial.set_user_attr("curves", curves)
        seconds = time.monotonic() - began - (compilation.seconds() - compiled)
        for key, found in {"values": values, "seconds": seconds, "why": why}.items():
            trial.set_user_attr(key, found)
        if why:
            self._study.tell(trial, state=TrialState.PRUNED)
        else:
            self._study.tell(trial, statistics.fmean(curve[-1][1] for curve in curves))

    def _refuse_full_machine(self, place: int) -> None:
        """UsageError where what the search began with does not fit either, as it did then."""
        beginning = self._fit(place, TrainConfig(**self._given))
        check_memory(beginning, self._splits[place].manifest, self._world)

    def _points(
        self, values: dict[str, Any], place: int, again: Curve, progress: Progress
    ) -> Generator[tuple[int, float], None, None]:
        """The course of a trial on one split; ``again``: where it was trained before, as far as it came."""
        if again:
            yield from again
            return
        split = self._splits[place]
        config = self._fit(place, TrainConfig(**self._settings(values, split)))
        before = place * self._per_trial // len(self._splits)
        share = self._per_trial / len(self._splits) / (config.epochs * split.manifest.num_ratings["train"])
        rows, looked, note = 0, time.monotonic(), self._note(place)

        def advance(more: int) -> None:
            nonlocal rows, looked
            rows += more
            progress.reach(before + int(rows * share))
            if time.monotonic() - looked > LOOK_SECONDS:
                self._look()
                looked = time.monotonic()

        progress.advance(0, note)
        yield from course(dataclasses.replace(config, device=self._config.device), split, self._world, advance)

    def _judge(self, trial: Any, before: Sequence[Curve], done: int, value: float) -> str:
        """Report how far a trial is and what it has reached on average; why it ends here, or nothing."""
        if not math.isfinite(value):
            return "the loss became NaN or infinite"
        place = len(before)
        step, last = place * POINTS + done, len(self._splits) * POINTS
        reached = statistics.fmean([*(curve[-1][1] for curve in before), value])
        trial.report(reached, step)
        others = [t.intermediate_values[step] for t in self._complete() if step in t.intermediate_values]
        if len(others) < LEAST_OTHERS or not WARM_UP <= step < last or reached <= statistics.median(others):
            return ""
        return f"ended in split {place + 1} after {10 * done}%, worse there than half of the others"

    # Inside -------------------------------------------------------------------------------------------

    def _fit(self, place: int, config: TrainConfig) -> TrainConfig:
        return fitted(config, self._splits[place], self._world)[0]

    def _settings(self, values: Mapping[str, Any], dataset: Dataset) -> dict[str, Any]:
        """Flags of training for ``values`` by names of parameters, on ``dataset``."""
        chosen: dict[Parameter, Any] = {one: values[one.name] for one in self.parameters}

        def fit(config: TrainConfig) -> TrainConfig:
            return fitted(config, dataset, self._world)[0]

        return settings_of(self._given, chosen, fit)

    def _finished(self) -> list[Any]:
        """The study's trials that are done with, also those that were ended early."""
        return self._trials("COMPLETE", "PRUNED")

    def _complete(self) -> list[Any]:
        return self._trials("COMPLETE")

    def _trials(self, *states: str) -> list[Any]:
        from optuna.trial import TrialState

        return list(self._study.get_trials(deepcopy=False, states=tuple(TrialState[state] for state in states)))

    def _look(self) -> None:
        """_Halt where a signal, a file STOP or --minutes end the search."""
        if reason := self._watch.reason():
            raise _Halt(reason, is_budget=False)
        minutes = self._config.minutes
        if minutes is not None and time.monotonic() - self._began > 60 * minutes:
            raise _Halt(f"--minutes {minutes:g} are over", is_budget=True)

    def _look_and_check(self) -> None:
        self._look()
        self._lease.check()

    def _note(self, place: int) -> str:
        """Behind the bar: the split, the best so far, and how long the whole search will take."""
        best, seconds = self._so_far
        parts = [f"split {place + 1}/{len(self._splits)}"]
        if best is not None:
            parts.append(f"best {self.measure.label} {self.measure.figure(best):.4f}")
        if seconds is not None:
            parts.append(f"all trials in about {max(1, round(seconds / 60))} min")
        return " | ".join(parts)

    @property
    def _so_far(self) -> tuple[float | None, float | None]:
        done = self._finished()
        if not done:
            return None, None
        values = [trial.value for trial in self._complete()]
        each = statistics.fmean(trial.user_attrs.get("seconds", 0.0) for trial in done)
        return min(values, default=None), each * (self._config.trials - len(done))

    def _announce(self) -> None:
        config, done = self._config, len(self._finished())
        rows = self._splits[0].manifest.num_ratings
        self._console.info(
            f"data:   {self._dataset.manifest.name}; {config.splits} inner splits of its training ratings, the first "
            f"of {rows['train']:,} to learn from and {rows['val']:,} held out; validation ratings are not read"
        )
        self._console.info(f"search: {', '.join(_described(one) for one in self.parameters)}")
        limit = f", {config.minutes:g} minutes at most" if config.minutes is not None else ""
        again = f"; {done} are done" if done else ""
        self._console.info(f"trials: {config.trials}{limit}{again}; Ctrl-C or SIGTERM stops, the same command goes on")


def _refuse_full_device(device: torch.device) -> None:
    """UsageError where other programs hold a device's memory."""
    if device.type != "cuda":
        return
    free, total = torch.cuda.mem_get_info(device)
    others = total - free - torch.cuda.memory_reserved(device)
    if others > SHARE_OF_OTHERS * total:
        raise UsageError(
            f"a trial does not fit into the device's memory, of which other programs hold {others / 2**30:.1f} of "
            f"{total / 2**30:.1f} GiB: the search ends here, what is finished is kept."
        )


def _without_overwrite(config: TuneConfig) -> str:
    return " without --overwrite" if config.overwrite else ""


def _described(one: Parameter) -> str:
    span = ", ".join(map(one.shown, one.choices)) or f"{one.shown(one.low)} to {one.shown(one.high)}"
    return f"{one.flag} {span}"


def _plain(trial: Any, number: int, parameters: Sequence[Parameter]) -> Trial:
    attributes = trial.user_attrs
    errors = tuple(curve[-1][1] for curve in attributes.get("curves", []))
    return Trial(
        number=number, values={one.name: attributes["values"][one.name] for one in parameters}, errors=errors,
        error=trial.value if not attributes["why"] else None, seconds=attributes["seconds"], why=attributes["why"],
    )  # fmt: skip


def _study(path: str, check: Callable[[], None]) -> Any:
    import optuna

    from mfdist.tuning.trial_log import TrialLog

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    log = optuna.storages.JournalStorage(TrialLog(path, check))
    return optuna.create_study(storage=log, study_name=STUDY, direction="minimize", load_if_exists=True)


def _open_directory(config: TuneConfig, dataset: Dataset) -> None:
    """Make RUN ready; UsageError where it holds something else, or a search that was asked for otherwise."""
    run, shown = config.run_dir, storage.redact(config.run_dir)
    names = [name for name in storage.list_names(run) if name not in ("STOP", LEASE)]
    if names and ABOUT not in names:
        raise UsageError(f"{shown} is not empty and holds no search; choose another --run-dir.")
    if config.overwrite:
        for name in OWN:
            storage.remove(storage.join(run, name))
    about = {
        "data": dataset.manifest.fingerprint, "settings of --training": config.beginning(),
        "--search": list(config.search), "--splits": config.splits, "--seed": config.seed,
    }  # fmt: skip
    path = storage.join(run, ABOUT)
    if not storage.exists(path):
        storage.make_dirs(run)
        storage.write_text(path, json.dumps(about, indent=1) + "\n")
        return
    before = json_tables.read(path, "--overwrite begins the search anew")
    changed = [key for key, value in json.loads(json.dumps(about)).items() if before.get(key) != value]
    if changed:
        raise UsageError(
            f"{shown} holds a search of other {', '.join(changed)}; choose another --run-dir, or --overwrite."
        )
