"""Draws of tokens by one kernel with the head's product: logits are never in memory. A form of `head_draw`."""
