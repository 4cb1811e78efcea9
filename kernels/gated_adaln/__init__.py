"""Gated residual, LayerNorm and modulation between two linear maps."""

from megadiff.kernels.gated_adaln.reference import GatedSum, adaln, gated_adaln, spread

__all__ = ["GatedSum", "adaln", "gated_adaln", "spread"]
