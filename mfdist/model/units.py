"""The units that ratings are learned in: counted from their mean, measured by their own spread.

Half stars, 1 to 10, -10 to 10 or 0 to 1 are the same numbers then, and one learning rate, one penalty and one initial
spread fit them all. Example: training ratings 2, 4, 4, 6 have mean 4 and spread 1.41, and are learned as -1.41, 0, 0
and 1.41. The side of the longer tail counts as negative (few low ratings: upwards as given; few high ones: turned
over), so that a scale on which 1 is the best gives the mirrored model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True)
class Units:
    """value = (rating - ``mean``) / ``spread``. ``spread`` is negative where ratings are turned over, never 0."""

    mean: float = 0.0
    spread: float = 1.0

    @staticmethod
    def of_ratings(mean: float, spread: float, skewness: float, centred: bool) -> Units:
        """From mean, standard deviation and skewness of the training ratings.

        Not ``centred``, for a model without an offset: measured from 0, by their root mean square.
        """
        if not centred:
            return Units(0.0, math.hypot(mean, spread) or 1.0)
        return Units(mean, (-spread if skewness > 0 else spread) or 1.0)

    @property
    def plain(self) -> bool:
        """Whether values are the ratings as given."""
        return self == AS_GIVEN

    def values(self, ratings: torch.Tensor) -> torch.Tensor:
        """float32 values of ratings. On a CPU by numpy: torch's threads would wait actively after it."""
        if self.plain:
            return ratings
        if ratings.device.type == "cpu":
            return torch.from_numpy(((ratings.numpy().astype(np.float64) - self.mean) / self.spread).astype(np.float32))
        return ((ratings.double() - self.mean) / self.spread).float()

    def ratings(self, values: torch.Tensor) -> torch.Tensor:
        """The reverse of :meth:`values`, float64 unless plain."""
        return values if self.plain else values.double() * self.spread + self.mean

    def span(self, low: float, high: float) -> tuple[float, float]:
        """A range of ratings as one of values, the lower end first."""
        ends = (low - self.mean) / self.spread, (high - self.mean) / self.spread
        return min(ends), max(ends)


AS_GIVEN = Units()
