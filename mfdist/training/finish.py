"""The end of a run: the export of the epoch that counts, and the report.

Every function is collective: every rank calls.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch

from mfdist import storage
from mfdist.config import to_dict
from mfdist.model.alternating import Weights
from mfdist.model.objective import ITEM, USER
from mfdist.model.tables import ReplicatedTable, Table, stored_order
from mfdist.results import exported_model, ranking_metrics, report
from mfdist.results.floors import floors
from mfdist.run import checkpoint
from mfdist.training.announcement import next_commands
from mfdist.training.defaults import RECIPE
from mfdist.training.session import Session, chosen_epoch, load, wait_for_save

BEST_ON_VAL = "best on validation (the vignette's convention)"


def finish(session: Session) -> dict[str, Any]:
    """Export the epoch that ``final`` reports and write the report."""
    progress, config, world, busy = session.progress, session.config, session.world, session.console.busy
    with busy("finishing the last checkpoint"):
        wait_for_save(session)
    chosen = chosen_epoch(progress)
    if chosen != len(progress.epochs) - 1:
        folder = checkpoint.folder_of(session.run, (chosen + 1) * session.loader.num_steps)
        load(session, folder)
    diagnosis, reached = None, {}
    if not config.is_ranking:
        with busy("measuring where the model is wrong"):
            diagnosis = session.validation.diagnosis(session.model).figures()
        with busy("measuring simple predictions to compare with"):
            reached = floors(session.dataset, world)
    with busy("writing the model"):
        export_model(session)
    with busy("measuring the recommendations"):
        ranked = session.validation.ranking(session.model)
    how = "lowest error on the stop rows" if progress.stop_rmse else "last epoch"
    best, best_how = _best_on_val(session)
    peak = world.max([report.peak_rss(), torch.cuda.max_memory_allocated() if world.device.type == "cuda" else 0])
    found = report.new_report(
        job="train", model=config.model, manifest=session.dataset.manifest, world_size=world.size,
        device=world.device.type, seed=config.seed, config=to_dict(config), epochs=progress.epochs,
        final=report.result(chosen + 1, progress.summaries[chosen]["headline"], how),
        best_on_val=report.result(best + 1, progress.summaries[best]["headline"], best_how),
        slices=progress.summaries[chosen]["slices"], floors=reached, ranking=ranked,
        wall_seconds=progress.wall_seconds + time.monotonic() - session.started,
        peak_rss_bytes=int(peak[0]), peak_device_bytes=int(peak[1]),
    )  # fmt: skip
    doubts = [doubt_about(found, config.lr, config.epochs), ranking_metrics.doubt_about(found["ranking"])]
    for doubt in filter(None, doubts):
        session.console.warn(doubt)
        session.metrics.write("warning", step=progress.step, epoch=progress.shown_epoch, text=doubt)
    if world.is_main:
        storage.remove(checkpoint.spare_of(session.run))
        session.metrics.write(
            "result", step=progress.step, epoch=progress.shown_epoch, of_epoch=chosen + 1,
            val_rmse_clipped=found["final"]["val_rmse_clipped"], val_mae_clipped=found["final"]["val_mae_clipped"],
            floors={name: floor["rmse"] for name, floor in found["floors"].items()},
        )  # fmt: skip
        session.metrics.write(
            "finish", step=progress.step, epoch=progress.shown_epoch, wall_seconds=found["wall_seconds"]
        )
        session.metrics.publish()
        with busy("drawing the report"):
            report.write_report(session.run, found, diagnosis, session.metrics.records())
    _say(session, found)
    world.barrier()
    return found


def _say(session: Session, found: dict[str, Any]) -> None:
    """The result on the console, and what to do next."""
    final = found["final"]
    if final["val_rmse"] is not None:
        session.console.info(
            f"result (epoch {final['epoch']}, {final['how_chosen']}): RMSE {final['val_rmse_clipped']:.4f}, MAE "
            f"{final['val_mae_clipped']:.4f}, clipped to the scale (raw {final['val_rmse']:.4f}, "
            f"{final['val_mae']:.4f}), on {found['dataset']['num_ratings']['val']:,} validation ratings"
        )
    if final["val_rmse"] is not None or session.config.is_ranking:
        session.console.info(f"recommendations: {ranking_metrics.sentence(found['ranking'])}")
    session.console.info(f"report: {storage.redact(session.run)}/report.html; next, for example")
    for command in next_commands(session.run, errors=not session.config.is_ranking):
        session.console.info(f"    {command}")


def _best_on_val(session: Session) -> tuple[int, str]:
    """The epoch, from 0, that is best on the validation rows, and what is best about it."""
    progress = session.progress
    if session.config.is_ranking:
        gains = [epoch["val_ndcg"] or 0.0 for epoch in progress.epochs]
        return int(np.argmax(gains)), "best ranking on validation, picked on the rows it is reported on"
    val = [summary["headline"]["val_rmse"] for summary in progress.summaries]
    return int(np.argmin([np.inf if v is None else v for v in val])), BEST_ON_VAL


def doubt_about(found: dict[str, Any], lr: float, epochs: int) -> str:
    """Why the result of a report should not be believed in; '' where nothing speaks against it."""
    rmse, floor = found["final"]["val_rmse_clipped"], found["floors"].get("bias", {}).get("rmse")
    if rmse is None or floor is None or rmse <= floor:
        return ""
    return (
        f"RMSE {rmse:.4f} (clipped) is worse than {floor:.4f}, that of user and item biases alone: --lr {lr:g} is too "
        f"high or too low for this data, or --epochs {epochs} too many or too few.{_remedy(lr)}"
    )


def _remedy(lr: float) -> str:
    """For whoever has left the recipe."""
    return "" if lr == RECIPE["lr"] else " --config recipe suits most data."


def export_model(session: Session) -> None:
    """RUN/model: rank 0 writes, the owners send their rows part by part."""
    form, world = session.model.form, session.world
    shapes: dict[str, tuple[tuple[int, ...], Iterable[Any]]] = {}
    for side, table in (("user", session.model.user), ("item", session.model.item)):
        rows = table.layout.num_rows
        number = USER if side == "user" else ITEM
        shapes[f"{side}_embedding"] = ((rows, form.dim), _chunks(session, table, number, biases=False))
        if form.bias:
            shapes[f"{side}_bias"] = ((rows,), _chunks(session, table, number, biases=True))
    if session.model.offset is not None:
        offset = session.model.offset.detach().cpu().double().numpy()
        shapes["offset"] = ((1,), [(offset * form.exported_scale + form.exported_shift).astype(np.float32)])
    about = {
        "model": form.model, "dim": form.dim, "bias": form.bias, "sigmoid": form.sigmoid_range is not None,
        "sigmoid_range": list(form.sigmoid_range) if form.sigmoid_range else None, "cold": session.config.cold,
        "members": form.members, "implicit": form.implicit, "train_rmse": session.progress.epochs[-1]["train_rmse"],
        "penalty": {"l2": list(session.config.l2), "row_l2": session.config.row_l2 and list(session.config.row_l2)}
        if session.objective.penalised else None,
        "units": {"mean": form.units.mean, "spread": form.units.spread}, **_about_ranking(session),
    }  # fmt: skip
    if world.is_main:
        exported_model.write_model(session.run, shapes, about, session.dataset)
    else:
        for _, chunks in shapes.values():
            for _ in chunks:
                pass
    world.barrier()


def _about_ranking(session: Session) -> dict[str, Any]:
    """What a row was solved with, so that others can be: see ``model.alternating``."""
    config, world = session.config, session.world
    if not config.is_ranking:
        return {}
    users, items = world.sum([float((table.rows.last > 0).sum()) for table in (session.model.user, session.model.item)])
    weights = Weights.of(config.unobserved_weight, config.ranking_penalty, users, items, session.loader.num_rows)
    return {"objective": config.objective, "ranking": weights._asdict()}


def _chunks(session: Session, table: Table, side: int, *, biases: bool) -> Iterator[Any]:
    """float32 chunks of an exported table in global row order, on rank 0; the others send it their rows."""
    world, zero = session.world, session.config.cold == "known-side"
    for part, first, end in stored_order(table.layout):
        owner = 0 if isinstance(table, ReplicatedTable) else table.layout.owner_of_part(part)
        if owner == world.rank:
            start = int(table.local(torch.tensor([first]))[0])
            embedding, bias = session.model.form.exported(side, table.current(start, start + end - first, zero))
            rows = np.ascontiguousarray((bias if biases and bias is not None else embedding).numpy())
            if world.is_main:
                yield rows
            else:
                world.send(torch.from_numpy(rows), to=0)
        elif world.is_main:
            received = torch.empty((end - first,) if biases else (end - first, session.model.form.dim))
            world.receive(received, owner)
            yield received.numpy()
