"""Token draws at chosen positions, out of hidden states, without the logits of all positions."""

from megadiff.kernels.sample_rows.reference import Draws, draw_rows, sample_rows

__all__ = ["Draws", "draw_rows", "sample_rows"]
