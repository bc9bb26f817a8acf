"""What a flag of training is where it is not given: the recipe's value, or what the flags given leave of it.

The recipe (``configs/recipe.toml``) is a whole: members need a score without a sigmoid and biases inside their rows,
bags need sgd. Where a flag takes one of these away, what rested on it gives way, and the rest stays:

    --model mf, --no-bias   no members, no bags, --cold own (there is no known side), ratings measured from 0 (there is
                            no offset), no penalty of a row
    a sigmoid               no members (--sigmoid-range, or no-sigmoid = false in a file)
    --emb-dim N             members of about sixteen factors: the most that divide N
    another --optimizer     no bags, the mean for the loss of a step, a rate of its own
    --weight-decay          no bags
    --reduction mean        with sgd: the rate of a whole batch, and batches of nearly the same size, the last one too
    --no-init               normal(0, 1) as it says

The rule is a function of what is given alone, so that a flag means the same beside any file.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mfdist.config import Follows, ready_values

RECIPE = ready_values("recipe")
MEMBER_FACTORS = 16
RATES = {"adamw": 0.005, "sparse_adam": 0.005, "rowwise_adagrad": 0.1}
"""--lr of the optimizers that scale their steps themselves."""
RATE_OF_MEAN = 0.2
"""--lr of sgd where the loss of a step is the mean: small enough for a last batch of some tens of ratings."""
NO_ROW_L2 = (0.0,) * 6
"""--row-l2 of a model that has no offset: towards 0 is far from any rating there."""
BATCH_SIZE = 1024
"""--batch-size, less where a user or an item has many of all ratings (``data_facts``)."""
IMPLICIT = 0.25
"""--implicit, less where users rate a large part of all items (``data_facts``)."""
OF_THE_DATA = -1.0
"""--implicit where the data decides; --batch-size is 0 and --l2 empty there."""
PLAIN_L2 = (0.027, 0.0)
"""--l2 of a model without biases."""


def settled(values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` of all flags, those that are a ``Follows`` replaced; what the data decides stays open."""
    given = {name: value for name, value in values.items() if not isinstance(value, Follows)}
    found: dict[str, Any] = {}

    def of(name: str, otherwise: Any) -> Any:
        found[name] = given.get(name, otherwise)
        return found[name]

    advanced = of("model", RECIPE["model"]) == "mf_advanced"
    without_bias, without_sigmoid = of("no_bias", False), of("no_sigmoid", advanced and not given.get("sigmoid_range"))
    bias, sigmoid = advanced and not without_bias, advanced and not without_sigmoid
    kind = of("optimizer", RECIPE["optimizer"])
    dim = of("emb_dim", MEMBER_FACTORS * given.get("members", 0) or RECIPE["emb_dim"])
    of("members", members_of(dim) if bias and not sigmoid else 0)
    of("cold", "known-side" if bias else "own")
    mean = of("reduction", "sum" if kind == "sgd" else "mean") == "mean"
    of("batch_size", 0 if kind == "sgd" else BATCH_SIZE)
    of("lr", RATES.get(kind) or (RATE_OF_MEAN if mean else RECIPE["lr"]))
    of("init_std", 0.0 if of("no_init", False) else RECIPE["init_std"])
    decay = of("weight_decay", RECIPE["weight_decay"])
    of("implicit", OF_THE_DATA if bias and kind == "sgd" and not decay else 0.0)
    of("l2", () if bias else PLAIN_L2)
    of("row_l2", tuple(RECIPE["row_l2"]) if bias else NO_ROW_L2)
    return {**given, **found}


def members_of(dim: int) -> int:
    """Members of about sixteen factors: the most that divide ``dim``; 0 where it has no room for a member's biases."""
    if dim < 3:
        return 0
    return next(count for count in range(max(1, dim // MEMBER_FACTORS), 0, -1) if dim % count == 0)
