"""What the tables of a training take, and whether this machine has it.

Example: 4.2 million users and 0.5 million items by the recipe, 128 factors and two bags of them a user: 1.5 KB a user
and 0.5 KB an item, 6.5 GB in all; by ``quick``, 16 factors and no bags, 0.3 GB.
"""

from __future__ import annotations

from mfdist.cluster.world import World
from mfdist.data.dataset import Manifest
from mfdist.data.loader import available_bytes, ranks_here
from mfdist.errors import UsageError
from mfdist.kernels import stride_of
from mfdist.model.objective import ITEM, USER
from mfdist.model.tables import item_layout, user_layout
from mfdist.training.config import TrainConfig

SHARE = 0.9
"""Of the free memory that tables may take: a process, its loader and its kernels need some of it as well."""
GIB = 1 << 30


def table_bytes(config: TrainConfig, manifest: Manifest, ranks: int) -> int:
    """Bytes of both tables on the rank that holds most."""
    form = config.form(manifest)
    user, item = (bytes_of_row(config, form.stored_width(side)) for side in (USER, ITEM))
    if config.sharding == "replicated":
        return manifest.num_users * user + manifest.num_items * item
    layouts = user_layout(manifest, ranks), item_layout(manifest, ranks)
    held = [[sum(end - first for first, end in layout.ranges_of(rank)) for layout in layouts] for rank in range(ranks)]
    return max(users * user + items * item for users, items in held)


def bytes_of_row(config: TrainConfig, width: int) -> int:
    """Weights, optimizer state and the number of the last step of one row; a gradient too where tables are whole."""
    state = sum(config.row_optimizer(1).state_widths(width))
    return 4 * (2 * width + state + 1) if config.sharding == "replicated" else 4 * stride_of(width, state)


def check_memory(config: TrainConfig, manifest: Manifest, world: World) -> None:
    """UsageError on every rank where the tables of some host's ranks do not fit; collective."""
    if world.device.type != "cpu":
        return  # torch says it of a device's memory
    text = too_large(config, manifest, world.size, ranks_here(world.size))
    if world.any(bool(text)):
        raise UsageError(text or "the tables of this training do not fit into the memory of another host.")


def too_large(config: TrainConfig, manifest: Manifest, ranks: int, ranks_of_host: int) -> str:
    """Why ``ranks_of_host`` of ``ranks`` cannot run on this machine now, and what to do; empty where they can."""
    needed, free = ranks_of_host * table_bytes(config, manifest, ranks), available_bytes()
    if needed <= SHARE * free:
        return ""
    quick = TrainConfig.ready("quick", rating_units="given", sharding=config.sharding)
    less = ranks_of_host * table_bytes(quick, manifest, ranks)
    remedy = f"--config quick takes {less / GIB:.1f} GiB; or " if less < needed else ""
    host = "its one rank" if ranks_of_host == 1 else f"the {ranks_of_host} ranks of a host"
    return (
        f"the tables of {host} ({ranks} in all) take {needed / GIB:.1f} GiB, and {free / GIB:.1f} GiB are free here: "
        f"{remedy}give a smaller --emb-dim, or ranks on more hosts."
    )
