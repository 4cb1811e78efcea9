"""The initial values of this rank's pieces, in place of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from megadiff.engine.pieces import Shape
from megadiff.models.initial import Initial, initial_range
from megadiff.weights.boxes import Extent, overlaps

_AT_ONCE = 2**24
"""Numbers of a parameter made at a time, where a piece holds boxes of it."""


@dataclass(frozen=True)
class InitialValues:
    """Reads like a CheckpointReader whose weights are initial values.

    Attributes:
        distributions: by parameter name.
        shapes: by parameter name, the whole shape.
    """

    seed: int
    distributions: Mapping[str, Initial]
    shapes: Mapping[str, Shape]

    def read(self, kind: str, parameter: str, extent: Extent) -> Tensor:
        """Float32 [extent.size]: a part of one parameter."""
        distribution = self.distributions[parameter]
        if extent.boxes is None:
            return initial_range(distribution, self.seed, parameter, extent.start, extent.stop)
        shape, out = self.shapes[parameter], torch.empty(extent.size)
        runs = extent.runs(shape)
        first, last = int(runs[:, 0].min()), int((runs[:, 0] + runs[:, 2]).max())
        for start in range(first, last, _AT_ONCE):
            part = Extent(start, min(start + _AT_ONCE, last))
            shared = list(overlaps(part, extent, shape))
            if shared:
                values = initial_range(distribution, self.seed, parameter, part.start, part.stop)
                for here, there, length in shared:
                    out[there : there + length] = values[here : here + length]
        return out
