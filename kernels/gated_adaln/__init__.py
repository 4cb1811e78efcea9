"""Gated residual, LayerNorm and modulation between two linear maps."""

from megadiff.kernels.gated_adaln.reference import Modulated, adaln, gated_adaln, spread

__all__ = ["Modulated", "adaln", "gated_adaln", "spread"]
