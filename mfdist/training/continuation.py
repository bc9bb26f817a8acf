"""A training that begins with the exported model of another run (``--init-from``).

Known rows take the exported values; rows behind them (ids that an append has added) begin where the model's own prior
puts them: factors near zero, biases zero. With bags a new user is not without factors even so: its bag holds what it
has rated. Bags are made anew, by one pass over the training ratings of today:

    bag = a / sqrt(n) * (sum of the factors of the user's n items)          own factors = exported factors - bag

so that the first predictions for known users are those of the model that was given.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from mfdist import storage
from mfdist.data.batch_order import lanes_of_rank
from mfdist.data.dataset import Dataset
from mfdist.data.scan import scan
from mfdist.errors import UsageError
from mfdist.model.models import ITEM_TABLE, MF, USER_TABLE, Form
from mfdist.model.tables import ReplicatedTable
from mfdist.results.exported_model import ExportedModel


def begin_with(run: str, model: MF, dataset: Dataset, seed: int) -> None:
    """Fill the tables of ``model`` from the export of ``run``, whose rows are the first ones of these tables.

    ``seed``: of the initial values of new rows. Every rank calls. UsageError where the forms do not go together.
    """
    exported, form = ExportedModel.open(run), model.form
    members = exported.config.get("members", 0)
    if exported.config["dim"] != form.dim or exported.has_biases != form.bias or members != form.members:
        raise UsageError(
            f"--init-from {storage.redact(run)}: that model has another --emb-dim, other biases or --members."
        )
    sides = ((model.user, USER_TABLE, exported.user_embedding, exported.user_bias),
             (model.item, ITEM_TABLE, exported.item_embedding, exported.item_bias))  # fmt: skip
    for table, side, factors, biases in sides:
        if len(factors) > table.layout.num_rows:
            raise UsageError(f"--init-from {storage.redact(run)}: it has more users or items than this dataset.")
        table.initialise(partial(_rows, form, seed, side, factors, biases))
    if model.offset is not None:
        model.offset.data.fill_((exported.offset - form.exported_shift) / form.exported_scale)
    if form.implicit:
        items = _rows(
            form, seed, ITEM_TABLE, exported.item_embedding, exported.item_bias, 0, dataset.manifest.num_items
        )
        _fill_bags(model, dataset, items[:, : form.dim] * form.is_factor(), exported.user_embedding)


def _rows(form: Form, seed: int, side: int, factors: Any, biases: Any, first: int, end: int) -> torch.Tensor:
    """Stored rows ``first`` to ``end``: another model's where it has learned them, initial values elsewhere."""
    rows = form.initial(seed, side, first, end)
    known = max(0, min(end, len(factors)) - first)
    if known:
        bias = None if biases is None else torch.from_numpy(np.array(biases[first : first + known]))
        embedding = torch.from_numpy(np.array(factors[first : first + known]))
        touched = _touched(embedding)
        bias = None if bias is None else bias[touched]
        rows[:known, : form.width][touched] = form.imported(side, embedding[touched], bias)
    return rows


def _touched(embedding: torch.Tensor) -> torch.Tensor:
    """Rows of an export that a rating has touched; the others may be zeros there (``--cold known-side``)."""
    return (embedding != 0).any(dim=1)


def _fill_bags(model: MF, dataset: Dataset, items: torch.Tensor, exported_users: Any) -> None:
    """The bags of this rank's users, from all ``items`` (items, dim); known users keep own factors plus bag."""
    form, table = model.form, model.user
    lanes = range(len(dataset.manifest.lanes))
    if not isinstance(table, ReplicatedTable):  # a whole table needs the ratings of all lanes
        lanes = lanes_of_rank(len(lanes), table.world.rank, table.world.size)
    weights = table.rows.weight.detach()
    counts = torch.zeros(len(weights), dtype=torch.int64)
    sums = torch.zeros(len(weights), form.dim)
    for _, user, item, _, _ in scan(dataset, "train", lanes):
        local = table.local(torch.from_numpy(np.array(user)))
        sums.index_add_(0, local, items[torch.from_numpy(np.array(item)).long()])
        counts += torch.bincount(local, minlength=len(counts))
    bags = (sums * (form.implicit / counts.clamp(min=1).double().sqrt())[:, None]).float().to(weights.device)
    weights[:, form.width : form.width + form.dim] = bags
    for first, end in table.held:
        known = min(end, len(exported_users)) - first
        if known > 0:
            touched = _touched(torch.from_numpy(np.array(exported_users[first : first + known])))
            local = table.local(torch.arange(first, first + known))[touched].to(weights.device)
            weights[local, : form.dim] -= bags[local]
