"""Gated residual, LayerNorm and modulation between two linear maps."""

from megadiff.kernels.dispatch import dispatched
from megadiff.kernels.gated_adaln import reference
from megadiff.kernels.gated_adaln.reference import GatedSum, spread

__all__ = ["GatedSum", "adaln", "gated_adaln", "spread"]

adaln = dispatched(reference.adaln)
gated_adaln = dispatched(reference.gated_adaln)
