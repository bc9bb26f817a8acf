"""The training step by torch's autograd: any device, any placement of the tables; the fused steps' slow equal."""

from __future__ import annotations

import torch
from torch import nn

from mfdist.data.loader import Batch
from mfdist.model.models import MF, Form, Scored
from mfdist.model.objective import ITEM, USER, Floats32, Objective

Shares = tuple[Floats32, Floats32]


def autograd_step(
    replica: nn.Module, model: MF, objective: Objective, shares: Shares | None, batch: Batch, rate: float
) -> torch.Tensor:
    """Move the rows that ``batch`` touches, and leave the offset's gradient; collective where tables are sharded.

    ``replica``: the model as DistributedDataParallel wraps it. ``shares``: with a penalty or bags,
    ``objective.shares_of`` this rank's user rows, and of all items. ``rate``: the step's learning rate. Returns this
    rank's sum of squared errors, float64, in the form's units.
    """
    model.zero_grad(set_to_none=False)
    form, local = model.form, model.user.local(batch.user)
    share = None
    if form.implicit:
        assert shares is not None
        share = torch.from_numpy(shares[USER]).to(batch.user.device)[local]
    scored = replica(batch.user, batch.item, share)
    errors = scored.predictions - form.units.values(batch.rating)[:, None]
    loss = errors.square().sum()
    weight = objective.weight(batch.global_rows)
    bags = None
    if share is not None:
        (slope,) = torch.autograd.grad(loss * weight, scored.scores, retain_graph=True)
        bags = _through_bags(form, scored, share, slope, rate)
    if objective.penalised:
        assert shares is not None
        loss = loss + _penalty(form, objective, shares, (local, batch.item), scored)
    loss = loss * weight
    (loss if bags is None else loss + bags).backward()
    model.user.apply_gradient()
    model.item.apply_gradient()
    sum_of_squares: torch.Tensor = errors.detach().double().mean(dim=1).square().sum()
    return sum_of_squares


def _penalty(
    form: Form, objective: Objective, shares: Shares, rows: tuple[torch.Tensor, torch.Tensor], scored: Scored
) -> torch.Tensor:
    """What draws the rows of each rating towards zero, see ``objective``; ``rows``: of users (local) and of items."""
    total = torch.zeros((), device=scored.item.device)
    for side, weights in ((USER, scored.user[:, : form.width]), (ITEM, scored.item)):
        penalties = torch.from_numpy(objective.penalties(side, form.dim, form.width, form.members)).to(weights.device)
        share = torch.from_numpy(shares[side]).to(weights.device)[rows[side].long()]
        total = total + ((penalties[0] + share[:, None] * penalties[1]) * weights.square()).sum()
    return total


def _through_bags(form: Form, scored: Scored, share: torch.Tensor, slope: torch.Tensor, rate: float) -> torch.Tensor:
    """A loss whose gradient is, for items, what comes through the users' bags, and for bags and their gradients what
    makes a step of sgd their renewal (``Form.implicit``). ``slope`` (rows, members): the loss's derivative by the
    scores."""
    end_of_bag = form.width + form.dim
    bag, running = scored.user[:, form.width : end_of_bag], scored.user[:, end_of_bag:]
    item = scored.item[:, : form.dim]
    to_bag = form.implicit * share.sqrt()[:, None] * item.detach() * form.is_factor().to(share.device)
    to_running = to_bag * slope.repeat_interleave(form.part, dim=1)
    renewal = ((to_bag - share[:, None] * bag.detach()) * bag).sum()
    renewal = renewal + ((to_running - share[:, None] * running.detach()) * running).sum()
    total: torch.Tensor = ((running.detach() - to_running) * item).sum() - renewal / rate
    return total
