"""What `synthesize` can make: the built-in dataset, and a twin of the Amazon Electronics ratings of 2014.

The twin's facts are the real file's published statistics: rows, users, items, the rating histogram, how ratings
spread over users and over items, the time range. Its effects are fitted so that Surprise's SVD with its defaults,
on a random 80/20 split, ends where it ends on the real file (RMSE 1.294, MAE 1.019).
"""

from __future__ import annotations

from dataclasses import dataclass

from mfdist.synthetic.degrees import DegreeCurve
from mfdist.synthetic.planted import Effects

DAY_SECONDS = 86_400


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Everything that rows are planted from, but for their number and the seed.

    ``histogram``: rows of each star at ``users.num_rows`` rows; ``days``: first and last day since 1970.
    """

    rows: int
    users: DegreeCurve
    items: DegreeCurve
    effects: Effects
    histogram: tuple[int, ...]
    days: tuple[int, int]


_ELECTRONICS_ROWS = 7_824_482
_ELECTRONICS_USERS = DegreeCurve(
    num_ids=4_201_696,
    num_rows=_ELECTRONICS_ROWS,
    keep=2,
    top=(520, 501, 498, 431, 406, 380, 314, 311, 308, 296),
    knots=(
        (1, 4_201_696), (2, 1_291_744), (3, 648_216), (4, 391_154), (6, 184_013), (10, 65_349), (20, 13_874),
        (50, 1_540), (100, 311.5), (200, 38.06), (296, 10),
    ),
)  # fmt: skip
_ELECTRONICS_ITEMS = DegreeCurve(
    num_ids=476_002,
    num_rows=_ELECTRONICS_ROWS,
    keep=7,
    top=(18_244, 16_454, 14_172, 12_285, 12_226, 11_617, 10_276, 9_907, 9_823, 9_487),
    knots=(
        (1, 476_002), (2, 276_081), (3, 202_362), (4, 169_234), (7, 124_712), (8, 108_592), (16, 44_452.4),
        (32, 24_783.8), (64, 18_742.1), (150, 12_655.6), (500, 2_653.32), (1_500, 281.055), (4_000, 40.1329),
        (9_487, 10),
    ),
)  # fmt: skip

ELECTRONICS = Preset(
    rows=_ELECTRONICS_ROWS,
    users=_ELECTRONICS_USERS,
    items=_ELECTRONICS_ITEMS,
    effects=Effects(user_bias_sd=0.8, item_bias_sd=0.96, factor_sd=0.3, rank=4),
    histogram=(901_765, 456_322, 633_073, 1_485_781, 4_347_541),
    days=(912_729_600 // DAY_SECONDS, 1_405_987_200 // DAY_SECONDS),
)

BUILTIN = Preset(
    rows=200_000,
    users=DegreeCurve(
        num_ids=3_000, num_rows=200_000, knots=((1, 3_000), (10, 2_900), (25, 2_250), (60, 900), (150, 190), (400, 3))
    ),
    items=DegreeCurve(
        num_ids=1_000, num_rows=200_000, knots=((1, 1_000), (20, 900), (60, 650), (200, 250), (600, 60), (1_200, 2))
    ),
    effects=Effects(user_bias_sd=0.7, item_bias_sd=0.9, factor_sd=1.2, rank=2),
    histogram=(16_000, 26_000, 48_000, 64_000, 46_000),
    days=(14_610, 16_071),
)

PRESETS = {"builtin": BUILTIN, "electronics": ELECTRONICS}
