"""Token draws at chosen positions, out of hidden states, without the logits of all positions."""

from megadiff.kernels.dispatch import dispatched
from megadiff.kernels.head_draw import reference
from megadiff.kernels.head_draw.reference import draw_rows, row_uniforms
from megadiff.kernels.head_draw.sharded import head_draw_sharded

__all__ = ["draw_rows", "head_draw", "head_draw_sharded", "row_uniforms"]

head_draw = dispatched(reference.head_draw)
